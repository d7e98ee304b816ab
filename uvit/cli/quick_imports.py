"""Less to import before a command computes: torch's compiler, and the second of transformers' two lists of its models.

For the process of a command alone; `import uvit` changes nothing in other libraries.
"""

import importlib
import sys
from collections.abc import Sequence
from functools import wraps
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any

COMPILER = "torch._dynamo"
INDEXING = f"{COMPILER}._trace_wrapped_higher_order_op"
LISTING = "create_import_structure_from_path"


def import_less(is_distributed: bool) -> None:
    """To be called before diffusers and transformers are imported, by a command that compiles nothing.

    is_distributed: whether networks of transformers may be distributed over processes.
    """
    if COMPILER not in sys.modules and "diffusers" not in sys.modules:
        sys.meta_path.insert(0, _CompilerParts())
        _stand_in(COMPILER, _COMPILER_NAMES)
        _stand_in(INDEXING, {"TransformGetItemToIndex": lambda: _compiler(INDEXING).TransformGetItemToIndex()})
        importlib.import_module("torch")._dynamo = sys.modules[COMPILER]  # type: ignore[attr-defined]
    if "transformers" not in sys.modules:
        _list_models_once()
        if not is_distributed:
            _say_undistributed()


# diffusers and transformers import torch's compiler to mark some of their functions, and to ask whether a module is
# compiled. While it is not loaded, nothing is compiled, and the marks mean nothing. Whatever else is asked of the
# stand-in loads the compiler, and is answered by it.


def _unchanged(fn: Any = None, *_: Any, **__: Any) -> Any:
    """In place of a decorator, with or without arguments."""
    return fn if fn is not None else lambda decorated: decorated


class _NoModule:
    """In place of `OptimizedModule`: no object is one."""


class _EvalFrame:
    OptimizedModule = _NoModule


_COMPILER_NAMES = {
    "allow_in_graph": _unchanged,
    "assume_constant_result": _unchanged,
    "disable": _unchanged,
    "eval_frame": _EvalFrame,
}


class _StandIn(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked of every module, by inspect and others
            raise AttributeError(name)
        return getattr(_compiler(self.__name__), name)


class _CompilerParts(MetaPathFinder):
    """The first finder: a part of the compiler is imported after the compiler itself."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if not name.startswith(f"{COMPILER}."):
            return None
        places = _compiler(COMPILER).__path__
        return spec_from_loader(name, _Loaded()) if name in sys.modules else PathFinder.find_spec(name, places)


class _Loaded(Loader):
    """The loader of a module that its package has imported already."""

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        self.own_spec = sys.modules[spec.name].__spec__
        return sys.modules[spec.name]

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.own_spec


def _stand_in(name: str, content: dict[str, Any]) -> None:
    sys.modules[name] = module = _StandIn(name)
    vars(module).update(content, __path__=[])


def _compiler(name: str) -> ModuleType:
    """The compiler, or a part of it, in place of the stand-ins."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _CompilerParts)]
    for stand_in in (COMPILER, INDEXING):
        if isinstance(sys.modules.get(stand_in), _StandIn):
            del sys.modules[stand_in]
    importlib.import_module(COMPILER)
    return importlib.import_module(name)


def _list_models_once() -> None:
    """transformers reads the 1,500 files of its models for a list, and again when `transformers.models` is imported.

    The second time it names the folder by its __init__.py, and does not find the first list in its own cache.
    """
    importlib.import_module("transformers")
    listing = importlib.import_module("transformers.utils.import_utils")
    create = getattr(listing, LISTING, None)
    if create is not None:
        vars(listing)[LISTING] = wraps(create)(lambda path: create(_folder(Path(path))))


def _say_undistributed() -> None:
    """transformers does without torch.distributed where torch lacks it. It remembers what torch answers first."""
    parts, utils = importlib.import_module("torch.distributed"), importlib.import_module("transformers.utils")
    is_available = parts.is_available
    try:
        vars(parts)["is_available"] = lambda: False
        getattr(utils, "is_torch_distributed_available", bool)()
    finally:
        vars(parts)["is_available"] = is_available


def _folder(path: Path) -> Path:
    return path.parent if path.name == "__init__.py" else path
