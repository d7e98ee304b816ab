"""The house rules: what imports what, what is tested where, and that what we ship or write down runs."""

import ast
import dataclasses
import importlib
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from uvit.cli.main import COMMANDS, _load
from uvit.cli.parse import parse
from uvit.config.model import resolve_model_config
from uvit.config.presets import preset_files
from uvit.config.train import IGNORED_FLAGS, UNSUPPORTED, TrainConfig
from uvit.errors import UserError
from uvit.weights.unet import new_unet

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "uvit"
SOURCES = sorted(PACKAGE.rglob("*.py"))

# From the ground up: whole folders, without exceptions. A module imports from lower layers, or from its own folder.
LAYERS = [
    ["errors"],
    ["lock"],
    ["io", "conventions"],
    ["model", "diffusion", "images", "device", "progress", "compiling"],
    ["modern_model"],
    ["config"],
    ["sources", "distributed"],
    ["weights", "checkpoint"],
    ["store"],
    ["sample", "extract"],
    ["export"],
    ["evaluate"],
    ["train"],
    ["bench"],
    ["cli"],
    ["serve"],
]
UNLAYERED = {"uvit", "uvit.__main__"}  # the public names, which load when they are asked for; and `python -m uvit`
PLACES = {name: layer for layer, names in enumerate(LAYERS) for name in names}

# Modules with nothing of their own to test: plain records, and what every other test runs through.
UNTESTED = {"uvit/__init__.py", "uvit/__main__.py"}
DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml"}
SERVING = {"fastapi", "pydantic", "starlette", "uvicorn"}  # of `uvit serve`, which says so where they are missing
# Imported where they are needed, with a sentence where they are not installed.
OPTIONAL = {"datasets", "gradio", "onnxruntime", "pyarrow", "wandb", *SERVING}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = [module_name(path) for path in SOURCES]


def imports(path: Path) -> Iterator[str]:
    """Modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in MODULES else node.module


def place(module: str) -> str:
    """The entry of LAYERS that a module belongs to: its folder, or itself where it lies in none."""
    return module.split(".")[1]


# The tree


@pytest.mark.parametrize("path", [path for path in SOURCES if module_name(path) not in UNLAYERED], ids=module_name)
def test_imports_go_down_only(path: Path) -> None:
    here = place(module_name(path))
    assert here in PLACES, f"{here}: name its layer in LAYERS"
    for target in imports(path):
        if target.startswith("uvit.") and place(target) != here:
            assert PLACES[place(target)] < PLACES[here], f"{path} imports {target}, which is not below it"


# Modules of one name: each pair has its reason.
EQUAL_MODULES = {
    "types": "the records and protocols of its folder",
    "files": "weights.files reads files of weights, sources.files image files, sample.files writes images",
    "model": "config.model is what --uvit_config_file names, and model.py is that model",
}
# A command's flags are in the module of config that is called like the command, or like the folder of its commands.
FLAGS_OF_COMMANDS = {"bench", "convert", "demo", "ema", "evaluate", "extract", "sample", "store", "train"}


def test_equal_names_of_modules_have_a_reason() -> None:
    names: dict[str, list[str]] = {}
    for path in SOURCES:
        if path.stem[0] != "_":
            names.setdefault(path.stem, []).append(module_name(path))
    for name, modules in names.items():
        others = [module for module in modules if module != f"uvit.config.{name}" or name not in FLAGS_OF_COMMANDS]
        assert len(others) <= 1 or name in EQUAL_MODULES, f"{name}: {', '.join(modules)}"


def public_names(path: Path) -> Iterator[str]:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Assign):
            names = [name.id for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names = [node.target.id]
        else:
            names = []
        yield from (name for name in names if not name.startswith("_"))


# Functions, classes and constants of one name in different modules.
EQUAL_NAMES = {
    "T": "a type variable",
}


def test_equal_names_of_things_have_a_reason() -> None:
    where: dict[str, list[str]] = {}
    for path in SOURCES:
        for name in public_names(path):
            where.setdefault(name, []).append(module_name(path))
    equal = {name: modules for name, modules in where.items() if len(set(modules)) > 1}
    assert set(equal) == set(EQUAL_NAMES), {name: modules for name, modules in equal.items() if name not in EQUAL_NAMES}


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_base_dependencies_suffice(path: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {re.match(r"[\w-]+", dependency)[0].lower() for dependency in project["dependencies"]}  # type: ignore[index]
    for target in imports(path):
        top = target.split(".")[0]
        known = top in sys.stdlib_module_names or top == "uvit" or DISTRIBUTIONS.get(top, top) in declared | OPTIONAL
        assert known, f"{path} imports {top}, which pyproject.toml does not name"
    importlib.import_module(module_name(path))


@pytest.mark.parametrize("folder", ["config", "cli"])
def test_configs_need_the_standard_library_alone_and_the_command_line_no_torch(folder: str) -> None:
    allowed = {"uvit"} if folder == "config" else {"uvit", "yaml"}
    for path in (PACKAGE / folder).glob("*.py"):
        tops = {target.split(".")[0] for target in imports(path)}
        assert tops <= sys.stdlib_module_names | allowed, path


@pytest.mark.parametrize("name", ["model", "modern_model", "diffusion"])
def test_the_mathematics_knows_no_files_flags_or_ranks(name: str) -> None:
    found = set(imports(PACKAGE / f"{name}.py")) - {"uvit.conventions", "uvit.model"}
    tops = {target.split(".")[0] for target in found}
    assert tops <= {"math", "functools", "typing", "collections", "torch", "diffusers"}
    assert "torch.distributed" not in (PACKAGE / f"{name}.py").read_text(encoding="utf-8")


# Users' images are decoded in one place; sample/files.py reads back what `uvit sample` wrote.
IMAGE_READERS = {"uvit/sources/decode.py", "uvit/sample/files.py"}


def test_image_files_are_decoded_in_one_place() -> None:
    opening = {
        path.relative_to(ROOT).as_posix()
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr == "open" and ast.unparse(node.value).endswith("Image")
    }
    assert opening == IMAGE_READERS


def test_tests_mirror_the_tree() -> None:
    """By folder: a test file lies in the folder of the modules that it tests, and each module has one."""
    folders = {path.relative_to(PACKAGE).parent for path in SOURCES}
    for path in (ROOT / "tests").rglob("test_*.py"):
        assert path.relative_to(ROOT / "tests").parent in folders, f"{path}: there is no such folder in uvit/"
        assert re.search(r"^def test_", path.read_text(encoding="utf-8"), re.M), f"{path}: has no test"
    tested = {target for path in (ROOT / "tests").rglob("*.py") for target in imports(path)}
    for path in SOURCES:
        name = path.relative_to(ROOT).as_posix()
        if name not in UNTESTED and path.read_text(encoding="utf-8").strip():
            own = ROOT / "tests" / path.relative_to(PACKAGE).with_name(f"test_{path.name}")
            assert own.is_file() or module_name(path) in tested, f"{name}: it has no test"


def test_files_stay_short() -> None:
    lengths = {module_name(path): len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def test_no_paths_of_a_machine_and_no_marks_are_left() -> None:
    forbidden = re.compile(r"(?<![\w.])/(home|root|tmp|work)/\w|\b(TO" + r"DO|FIX" + r"ME)\b")
    folders = [ROOT / name for name in ("uvit", "tests", "docs", "runs", "benchmarks", ".ci")]
    paths = [path for path in ROOT.iterdir() if path.is_file()] + [
        path for folder in folders for path in folder.rglob("*")
    ]
    text = {".py", ".md", ".sh", ".toml", ".yaml", ".json", ".txt", ".cff", ""}
    for path in paths:
        if path.is_file() and path.suffix in text and path != Path(__file__) and "__pycache__" not in path.parts:
            found = forbidden.search(path.read_text(encoding="utf-8"))
            assert found is None, f"{path}: {found[0]!r}"


# Configs and flags


def with_required(name: str) -> list[str]:
    """Something for each flag that the command must be given."""
    fields = dataclasses.fields(_load(COMMANDS[name].config))
    return [f"--{field.name}=1" for field in fields if field.default is dataclasses.MISSING]


@pytest.mark.parametrize("name", preset_files("model"))
def test_every_model_preset_builds(name: str) -> None:
    with torch.device("meta"):
        new_unet(resolve_model_config(name))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_preset_of_a_command_parses(command: str) -> None:
    for name in preset_files(command):
        parse(_load(COMMANDS[command].config), [*with_required(command), "--config", name], prog=f"uvit {command}")


def attributes_of(owner: str, tree: ast.AST) -> set[str]:
    """X of every `owner.X` and `....owner.X`."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            value = node.value
            name = value.id if isinstance(value, ast.Name) else value.attr if isinstance(value, ast.Attribute) else ""
            if name == owner:
                found.add(node.attr)
    return found


def config_reads() -> set[str]:
    """What is read off configs: outside their files, or in a method of theirs that is called from outside."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}
    configs = {path for path in SOURCES if path.parent.name == "config"}
    reads = set().union(*(attributes_of("config", trees[path]) for path in SOURCES if path not in configs))
    for path in configs:
        for node in ast.walk(trees[path]):
            if isinstance(node, ast.FunctionDef) and node.name in reads:
                reads |= attributes_of("self", node)
    return reads


# Flags that nothing reads because the config's own checks are all that they do.
CHECKED_ONLY = {"train": {"do_train", *IGNORED_FLAGS, *UNSUPPORTED}}


@pytest.mark.parametrize("name", COMMANDS)
def test_no_flag_is_inert(name: str) -> None:
    fields = {field.name for field in dataclasses.fields(_load(COMMANDS[name].config))}
    assert fields - config_reads() - CHECKED_ONLY.get(name, set()) == set(), "flags that nothing reads"


def test_ignored_flags_say_why() -> None:
    assert "ignored_flags" in config_reads(), "nobody shows the reasons"
    for field in dataclasses.fields(TrainConfig):
        if field.name in IGNORED_FLAGS:
            other = not field.default if isinstance(field.default, bool) else 7
            config = TrainConfig("features", "out", **{field.name: other})
            assert config.ignored_flags() == [f"--{field.name} is ignored: {IGNORED_FLAGS[field.name]}"]


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_degrees_other_than_one_are_refused_with_the_reason(name: str) -> None:
    with pytest.raises(UserError, match=f"^--{name} 2: .* 1"):
        TrainConfig("features", "out", **{name: 2})


def test_every_flag_has_help_and_every_config_a_description() -> None:
    commands = [_load(command.config) for command in COMMANDS.values()]
    for cls in [base for command in commands for base in command.__mro__ if dataclasses.is_dataclass(base)]:
        tree = ast.parse((ROOT / f"{cls.__module__.replace('.', '/')}.py").read_text(encoding="utf-8"))
        body = next(
            node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == cls.__name__
        ).body
        assert ast.get_docstring(ast.parse(ast.unparse(body[0]))) is not None, cls
        for node, after in zip(body, [*body[1:], None], strict=True):
            if isinstance(node, ast.AnnAssign):
                described = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                assert described, f"{cls.__name__}.{ast.unparse(node.target)} has no help"


# What is written down


README, README_ZH = ROOT / "README.md", ROOT / "README.zh-CN.md"
DOCUMENTS = [README, README_ZH, *sorted((ROOT / "docs").rglob("*.md")), ROOT / "CONTRIBUTING.md"]
SCRIPTS = sorted((ROOT / "runs").glob("*.sh"))


def code_blocks(path: Path, languages: str = r"\w*") -> list[str]:
    """Fenced blocks, without their comments, which are in the document's own language."""
    blocks = re.findall(rf"^```(?:{languages})\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [re.sub(r"(^|\s)#.*$", "", block, flags=re.MULTILINE).rstrip() for block in blocks]


def commands(script: str) -> Iterator[list[str]]:
    """The arguments of every `uvit ...` in shell text; variables and `$(...)` become 1."""
    script = script.replace("\\\n", " ")
    arrays = dict(re.findall(r"(\w+)=\(([^)]*)\)", script))  # of several, the last
    script = re.sub(r"\"\$\{(\w+)\[@\]\}\"", lambda found: arrays.get(found[1], ""), script).replace('"$@"', "")
    script = re.sub(r"\$\([^()]*\)|\$\{[^}]*\}|\$\w+", "1", script)
    for line in script.splitlines():
        if not re.search(r"\buvit\s", line) or line.lstrip().startswith(("#", "echo", "say", "printf")):
            continue
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words = list(lexer)
        while "uvit" in words:
            words = words[words.index("uvit") + 1 :]
            ends = [i for i, word in enumerate(words) if set(word) <= set("();<>|&") and word]
            yield words[: ends[0]] if ends else words


def here(word: str) -> str:
    """A variable before a path that the repository has is the repository."""
    return word[2:] if word.startswith("1/") and (ROOT / word[2:]).exists() else word


def check_command(arguments: list[str]) -> None:
    name, *rest = [here(word) for word in arguments] or ["--help"]
    if name in ("--help", "--version", "COMMAND"):
        return
    if rest and f"{name} {rest[0]}" in COMMANDS:
        name, rest = f"{name} {rest[0]}", rest[1:]
    assert name in COMMANDS, f"uvit {name}: no such command"
    cls = _load(COMMANDS[name].config)
    if "--help" not in rest:
        parse(cls, rest, prog=f"uvit {name}", positional=COMMANDS[name].positional)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_commands_in_documents_parse(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for block in code_blocks(path, "sh|bash"):
        for arguments in commands(block):
            check_command(arguments)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_commands_in_scripts_parse(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    found = list(commands(path.read_text(encoding="utf-8")))
    assert found, "no command found: has the script another way of calling uvit?"
    for arguments in found:
        check_command(arguments)


def test_commands_are_found_and_their_mistakes_too() -> None:
    script = 'more=()\nmore=(--seed 3)\nnice uvit train --config "$RUN/a.yaml" \\\n'
    script += ' --max_steps ${STEPS:-3} "${more[@]}" "$@" | tee log  # uvit banana\necho uvit x\n'
    assert list(commands(script)) == [["train", "--config", "1/a.yaml", "--max_steps", "1", "--seed", "3"]]
    assert list(commands("A=1 uvit sample 'a b' && uvit bench > log")) == [["sample", "a b"], ["bench"]]
    with pytest.raises(UserError, match="--banana"):
        check_command(["bench", "--banana"])
    with pytest.raises(AssertionError, match="uvit banana"):
        check_command(["banana"])


def test_both_readmes_hold_the_same_code() -> None:
    assert code_blocks(README) == code_blocks(README_ZH)
    assert code_blocks(README), "a README without a command"


def test_make_targets_in_documents_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for path in DOCUMENTS:
        for block in code_blocks(path, "sh|bash"):
            assert set(re.findall(r"^make (\w+)", block, re.MULTILINE)) <= targets, path


def test_links_in_documents_lead_somewhere() -> None:
    for path in DOCUMENTS:
        for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text(encoding="utf-8")):
            if "://" not in link:
                assert (path.parent / link).exists(), f"{path.name}: {link}"
