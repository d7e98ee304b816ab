"""Put the code of this package into a pipeline folder, so that plain diffusers opens it.

diffusers loads the class of a pipeline from `pipeline.py`, with the modules beside it that it imports relatively. It
loads the class of a network from the folder of the network. It does so only with `trust_remote_code=True`. This package
never runs the code of a folder.
"""

import json
import re
import shutil
from pathlib import Path

import uvit
from uvit.modern_model import ModernUViTT2IModel
from uvit.sample.limited import LimitedDPMSolverScheduler

PACKAGE = Path(uvit.__file__).parent
ENTRY_MODULE = "sample.pipeline"
# Modules in unet/ and scheduler/. The modern network imports parts of the published one.
NETWORK, MODERN_NETWORK, SOLVER = "modeling_uvit", "modeling_modern_uvit", "limited_dpm_solver"
IMPORT = re.compile(r"^(\s*)from uvit\.([\w.]+) import ", re.MULTILINE)
# Replaced modules: such a pipeline does not read other formats.
STUBS = {
    "weights.components": ('"""Other formats are not read here."""\n\ndef pipeline_components(*_):\n    return None\n'),
}


def write_code(folder: Path) -> None:
    """Add the code to a pipeline folder, and name its modules in model_index.json."""
    path = folder / "model_index.json"
    index = json.loads(path.read_text(encoding="utf-8"))
    for name, text in collect_modules(ENTRY_MODULE).items():
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
    shutil.copy(PACKAGE / "model.py", folder / "unet" / f"{NETWORK}.py")
    network = NETWORK
    if index["unet"][1] == ModernUViTT2IModel.__name__:
        network = MODERN_NETWORK
        text = (
            (PACKAGE / "modern_model.py").read_text(encoding="utf-8").replace("from uvit.model ", f"from .{NETWORK} ")
        )
        (folder / "unet" / f"{network}.py").write_text(text, encoding="utf-8")
    index |= {"_class_name": ["pipeline", "UViTPipeline"], "unet": [network, index["unet"][1]]}
    if index["scheduler"][1] == LimitedDPMSolverScheduler.__name__:
        shutil.copy(PACKAGE / "sample" / "limited.py", folder / "scheduler" / f"{SOLVER}.py")
        index["scheduler"] = [SOLVER, LimitedDPMSolverScheduler.__name__]
    path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def collect_modules(start: str) -> dict[str, str]:
    """{file name: text} of a module and of all modules of this package that it imports, with relative imports."""
    found: dict[str, str] = {}
    waiting = [start]
    while waiting:
        module = waiting.pop()
        name = flat_name(module)
        if name in found:
            continue
        text = STUBS.get(module) or (PACKAGE / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
        waiting += [match[2] for match in IMPORT.finditer(text)]
        found[name] = IMPORT.sub(lambda match: f"{match[1]}from .{flat_name(match[2])} import ", text)
    # diffusers copies the modules that this file imports, but not those that they import.
    others = sorted(name for name in found if name != flat_name(start))
    found[flat_name(start)] += "\n" + "".join(
        f"from .{name} import __name__ as _{name}  # noqa: E402\n" for name in others
    )
    return found


def flat_name(module: str) -> str:
    """The name of a module's file: `pipeline` for sample.pipeline; `uvit_weights_encoders` for weights.encoders."""
    return "pipeline" if module == ENTRY_MODULE else f"uvit_{module.replace('.', '_')}"
