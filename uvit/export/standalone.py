"""A pipeline folder with its own code, so that diffusers opens it where this package is not installed.

diffusers loads a pipeline's class from `pipeline.py`, and the modules that it imports by a dot from beside it; a
network's from its own folder. Both happen only where its user says `trust_remote_code=True`; this package, which has
the code, never runs that of a folder.
"""

import json
import re
import shutil
from pathlib import Path

import uvit
from uvit.sample.limited import LimitedDPMSolverScheduler

PACKAGE = Path(uvit.__file__).parent
ENTRY_MODULE = "sample.pipeline"
NETWORK, SOLVER = "modeling_uvit", "limited_dpm_solver"  # the files in unet/ and scheduler/
IMPORT = re.compile(r"^(\s*)from uvit\.([\w.]+) import ", re.MULTILINE)
# Modules that a pipeline does without there: reading other formats.
STUBS = {
    "weights.components": (
        '"""Folders of other formats are not read here."""\n\ndef pipeline_components(*_):\n    return None\n'
    ),
}


def write_code(folder: Path) -> None:
    """Add the code to a pipeline folder, and say in its model_index.json where it is."""
    for name, text in collect_modules(ENTRY_MODULE).items():
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
    shutil.copy(PACKAGE / "model.py", folder / "unet" / f"{NETWORK}.py")
    path = folder / "model_index.json"
    index = json.loads(path.read_text(encoding="utf-8"))
    index |= {"_class_name": ["pipeline", "UViTPipeline"], "unet": [NETWORK, "UViTT2IModel"]}
    if index["scheduler"][1] == LimitedDPMSolverScheduler.__name__:
        shutil.copy(PACKAGE / "sample" / "limited.py", folder / "scheduler" / f"{SOLVER}.py")
        index["scheduler"] = [SOLVER, LimitedDPMSolverScheduler.__name__]
    path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def collect_modules(start: str) -> dict[str, str]:
    """{file name: text} of a module of this package and of all that it imports from it, by a dot each."""
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
    # diffusers takes along what this file names, and not what that names in turn.
    others = sorted(name for name in found if name != flat_name(start))
    found[flat_name(start)] += "\n" + "".join(
        f"from .{name} import __name__ as _{name}  # noqa: E402\n" for name in others
    )
    return found


def flat_name(module: str) -> str:
    """A file's name: of sample.pipeline, where all starts, `pipeline`; of data.encoders `uvit_data_encoders`."""
    return "pipeline" if module == ENTRY_MODULE else f"uvit_{module.replace('.', '_')}"
