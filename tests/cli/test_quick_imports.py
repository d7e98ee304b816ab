"""What a command leaves out of its imports is there when it is asked for."""

import subprocess
import sys

CODE = """
import sys
import torch
from uvit.cli.quick_imports import import_less

import_less(is_distributed=True)

import diffusers.hooks
import transformers.masking_utils
import transformers.models
from transformers.utils import import_utils

# The second list of models is the first, and it is right.
folder = transformers.models.__file__
listing = import_utils.create_import_structure_from_path
assert listing(folder) == listing.__wrapped__(folder) != {}
assert transformers.models.clip.CLIPTextModel is transformers.CLIPTextModel

# A part of the compiler loads the compiler, once.
stand_in = torch._dynamo
assert stand_in is sys.modules["torch._dynamo"] and "torch._inductor" not in sys.modules
import torch._dynamo.utils as utils
assert torch._dynamo is not stand_in and utils is torch._dynamo.utils is sys.modules["torch._dynamo.utils"]
assert stand_in.config is torch._dynamo.config
with transformers.masking_utils.TransformGetItemToIndex() as mode:
    assert type(mode) is sys.modules["torch._dynamo._trace_wrapped_higher_order_op"].TransformGetItemToIndex

# It compiles, and sees what is compiled.
module = torch.nn.Linear(2, 2)
compiled = torch.compile(module, backend="eager")
assert diffusers.utils.torch_utils.is_compiled_module(compiled)
assert torch.equal(compiled(torch.ones(2)), module(torch.ones(2)))
assert torch.distributed.is_available() == transformers.utils.is_torch_distributed_available()
"""


def test_the_rest_is_there_when_it_is_asked_for() -> None:
    result = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
