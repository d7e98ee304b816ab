"""What starts at once: commands that compute nothing import neither torch nor diffusers."""

import subprocess
import sys
from pathlib import Path

import pytest

PIPELINE = Path(__file__).parents[1] / "fixtures" / "v0.1" / "run" / "pipeline"
SLOW = ("torch", "diffusers", "transformers")
CODE = """
import sys
from uvit.cli.main import main
status = main(sys.argv[1:])
print(status, *(name for name in {slow} if name in sys.modules), file=sys.stderr)
"""


def imported(*words: str) -> tuple[int, set[str]]:
    """(exit status, which of the slow packages a command imports)"""
    code = CODE.format(slow=SLOW)
    result = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=120)
    status, *names = result.stderr.splitlines()[-1].split()
    return int(status), set(names)


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["--version"], 0),
        (["--help"], 0),
        (["train", "--no_such_flag"], 2),
        (["sample", "a", "--seed", "-1"], 2),
        (["features", "info", "no-such-folder"], 2),
        (["features", "verify", "no-such-folder"], 2),
        (["checkpoints", "list", "no-such-folder"], 2),
        (["checkpoints", "verify", "no-such-folder"], 2),
        (["evaluate", "compare", "no-such-folder", "nor-this"], 2),
    ],
)
def test_what_computes_nothing_starts_at_once(words: list[str], status: int) -> None:
    assert imported(*words) == (status, set())


def test_a_config_is_printed_at_once() -> None:
    assert imported("train", "--feature_path", "x", "--output_dir", "y", "--print_config") == (0, set())


def test_commands_that_compute_import_no_libraries_of_other_tasks() -> None:
    """Of tables, plots, trackers and graphs: they are imported where a flag or a file asks for them."""
    unused = ("pandas", "scipy", "sklearn", "matplotlib", "tensorboard", "wandb", "pyarrow", "datasets", "onnx")
    code = (
        "import sys; from importlib import import_module; from uvit.cli.main import COMMANDS\n"
        "for name in ('sample', 'train', 'extract', 'evaluate'): import_module(COMMANDS[name].run.split(':')[0])\n"
        f"print('torch' in sys.modules, [name for name in {unused} if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert result.stdout == "True []\n"


def test_an_image_needs_no_compiler_no_symbols_and_no_distribution(tmp_path: Path) -> None:
    """torch's compiler with sympy, and its distributed tensors, take a third of the time until the first image."""
    unused = ("torch._dynamo.convert_frame", "torch._inductor", "sympy", "torch.distributed.tensor")
    code = (
        "import sys; from uvit.cli.main import main\n"
        "status = main(sys.argv[1:])\n"
        f"print([status, *(name for name in {unused} if name in sys.modules)])"
    )
    words = ["sample", "a", "--pipeline", str(PIPELINE), "--num_inference_steps", "1", "--device", "cpu"]
    words += ["--output_dir", str(tmp_path)]
    result = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=300, check=True
    )
    assert result.stdout.splitlines()[-1] == "[0]"
    assert list(tmp_path.glob("*.png"))
