"""`uvit COMMAND ...`: find the command, parse its arguments into a config, run it, and report errors.

Exit status: 0 success, 2 a mistake of the user (one sentence on stderr), 130 stopped by Ctrl-C.
"""

import difflib
import errno
import gc
import importlib
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from uvit import __version__
from uvit.cli.help import show_help
from uvit.cli.other_names import flag_hint
from uvit.cli.parse import parse
from uvit.cli.quick_imports import import_less
from uvit.errors import UserError
from uvit.io import takes_files, to_yaml

# Errors of a path that the user chose, or of its disk.
PATH_ERRORS = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG,
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG,
}  # fmt: skip
IN_PROCESSES = ("train", "extract", "sample", "evaluate")  # the commands that several processes share


@dataclass(frozen=True)
class Command:
    group: str  # on the help screen
    summary: str
    config: str  # module:dataclass, standard library only
    run: str  # module:function that takes the config; imported when it runs
    positional: tuple[str, ...] = ()  # fields that may be given without their flag, the last one any number of times


COMMANDS = {
    "demo": Command(
        "Begin",
        "all steps on built-in images of shapes, in 2 to 4 minutes",
        "uvit.config.demo:DemoConfig",
        "uvit.cli.demo:demo",
    ),
    "autoencoder": Command(
        "Prepare data",
        "train a VAE on your images, if you have none",
        "uvit.config.extract:AutoencoderConfig",
        "uvit.train.autoencoder:train_autoencoder",
    ),
    "tokenizer": Command(
        "Prepare data",
        "train a tokenizer on your captions",
        "uvit.config.extract:TokenizerConfig",
        "uvit.extract.tokenizer:build_tokenizer",
    ),
    "extract": Command(
        "Prepare data",
        "encode captioned images into a feature store",
        "uvit.config.extract:ExtractConfig",
        "uvit.extract.extract:extract",
    ),
    "features info": Command(
        "Prepare data",
        "show what a feature store holds",
        "uvit.config.store:FeaturesInfoConfig",
        "uvit.store.info:info",
        positional=("path",),
    ),
    "features verify": Command(
        "Prepare data",
        "check a feature store for damage",
        "uvit.config.store:FeaturesVerifyConfig",
        "uvit.store.verify:verify",
        positional=("path",),
    ),
    "features sample": Command(
        "Prepare data",
        "show some pairs of a feature store as images",
        "uvit.config.store:FeaturesSampleConfig",
        "uvit.store.show:show",
        positional=("path",),
    ),
    "features merge": Command(
        "Prepare data",
        "merge feature stores",
        "uvit.config.store:FeaturesMergeConfig",
        "uvit.store.merge:merge",
        positional=("paths",),
    ),
    "features import": Command(
        "Prepare data",
        "convert .npy features (U-ViT layout) to a feature store",
        "uvit.config.store:FeaturesImportConfig",
        "uvit.store.npy_convert:import_npy",
        positional=("path",),
    ),
    "features export": Command(
        "Prepare data",
        "convert a feature store to .npy features (U-ViT layout)",
        "uvit.config.store:FeaturesExportConfig",
        "uvit.store.npy_convert:export_npy",
        positional=("path",),
    ),
    "train": Command(
        "Train",
        "train a U-ViT on a feature store; run again to resume",
        "uvit.config.train:TrainConfig",
        "uvit.train.trainer:train",
    ),
    "checkpoints list": Command(
        "Train",
        "list the checkpoints of a run",
        "uvit.config.checkpoints:CheckpointsListConfig",
        "uvit.checkpoint.commands:list_checkpoints",
        positional=("path",),
    ),
    "checkpoints verify": Command(
        "Train",
        "check the checkpoints of a run for damage",
        "uvit.config.checkpoints:CheckpointsVerifyConfig",
        "uvit.checkpoint.commands:verify_checkpoints",
        positional=("path",),
    ),
    "sample": Command(
        "Use a model",
        "generate images from prompts",
        "uvit.config.sample:SampleConfig",
        "uvit.sample.command:sample",
        positional=("prompts",),
    ),
    "convert": Command(
        "Use a model",
        "convert checkpoints, pipelines and weights of other code",
        "uvit.config.convert:ConvertConfig",
        "uvit.export.convert:convert",
        positional=("source", "dest"),
    ),
    "ema": Command(
        "Use a model",
        "choose the length of a run's EMA weights after training",
        "uvit.config.ema:EmaConfig",
        "uvit.export.reconstruct:make_average",
        positional=("run",),
    ),
    "serve": Command(
        "Use a model",
        "generate images for many people: a page and OpenAI's image API",
        "uvit.config.serve:ServeConfig",
        "uvit.serve.start:serve",
        positional=("models",),
    ),
    "evaluate": Command(
        "Use a model",
        "measure a model's images, or compare two sets of images",
        "uvit.config.evaluate:EvaluateConfig",
        "uvit.evaluate.evaluate:evaluate",
        positional=("model",),
    ),
    "evaluate compare": Command(
        "Use a model",
        "say whether two evaluations differ by more than chance",
        "uvit.config.evaluate:EvaluateCompareConfig",
        "uvit.evaluate.compare:compare_reports",
        positional=("reports",),
    ),
    "evaluate statistics": Command(
        "Use a model",
        "store the statistics of real images for later evaluations",
        "uvit.config.evaluate:EvaluateStatisticsConfig",
        "uvit.evaluate.reference:store_statistics",
        positional=("images",),
    ),
    "bench": Command(
        "Other",
        "time the training step, the forward pass and the data loader",
        "uvit.config.bench:BenchConfig",
        "uvit.bench.run:bench",
    ),
}

UNCOMPILED = ("sample", "evaluate", "extract", "train")  # they compute, without torch.compile unless --compile says so


def usage(prefix: str = "") -> str:
    """The commands, or those that begin with a prefix such as `features `."""
    named = {name: command for name, command in COMMANDS.items() if name.startswith(prefix)}
    width = max(map(len, named))
    groups: dict[str, list[str]] = {}
    for name, command in named.items():
        groups.setdefault("Commands" if prefix else command.group, []).append(f"  {name:<{width}}  {command.summary}")
    begin = "Begin with `uvit demo`, or with `uvit extract`, then `uvit train`, then `uvit sample`.\n\n"
    return (
        f"uvit {__version__}: train text-to-image latent diffusion models, with a U-ViT, from scratch\n\n"
        f"usage: uvit {prefix}COMMAND [FLAGS]\n\n"
        + ("" if prefix else begin)
        + "\n\n".join("\n".join([f"{group}:", *rows]) for group, rows in groups.items())
        + f"\n\n`uvit {prefix}COMMAND --help` shows an example and all flags of a command."
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    name, *arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help", "help"):
        print(usage())
        return 0
    if name in ("-V", "--version"):
        print(__version__)
        return 0
    if arguments and f"{name} {arguments[0]}" in COMMANDS:
        name = f"{name} {arguments.pop(0)}"
    elif name not in COMMANDS and any(command.startswith(f"{name} ") for command in COMMANDS):  # a group of commands
        if not arguments or arguments[0] in ("-h", "--help", "help"):
            print(usage(f"{name} "))
            return 0
        name = f"{name} {arguments.pop(0)}"
    try:
        return _run(name, arguments)
    except UserError as error:
        # A file's name or a flag's value may hold line breaks; other spaces stay, so that paths can be pasted.
        lines = (" ".join(part.strip() for part in text.splitlines()) for text in (error.args[0], *error.details))
        print(f"uvit {name}: error: " + "\n  ".join(lines), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nuvit {name}: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of the pipe, such as `head`, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.errno not in PATH_ERRORS and not _is_refused(error):
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"uvit {name}: error: {where}{error.strerror}; fix that, or choose another path", file=sys.stderr)
        return 2


def _is_refused(error: OSError) -> bool:
    """Whether a file was not found because its folder takes no new ones, such as /proc."""
    if error.errno != errno.ENOENT or not isinstance(error.filename, str):
        return False
    folder = Path(error.filename).absolute().parent
    return folder.is_dir() and not takes_files(folder)


def _run(name: str, arguments: list[str]) -> int:
    if name not in COMMANDS:
        if name.startswith("--") and (hint := flag_hint(name[2:].partition("=")[0].replace("-", "_"))):
            raise UserError(f"there is no flag {name}; {hint}")
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean `uvit {close[0]}`?" if close else f"the commands are {', '.join(COMMANDS)}"
        raise UserError(f"there is no command {name!r}; {hint}")
    command = COMMANDS[name]
    if name not in IN_PROCESSES and "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("runs in one process; start it without torchrun")
    if {"-h", "--help"} & set(arguments):
        show_help(_load(command.config), f"uvit {name}", command.positional)
        raise SystemExit(0)
    config, print_config = parse(_load(command.config), arguments, prog=f"uvit {name}", positional=command.positional)
    if print_config:
        print(to_yaml(config), end="")
        return 0
    is_uncompiled = name in UNCOMPILED and not getattr(config, "compile", False)
    try:
        return _load_once(command.run, is_uncompiled, is_distributed="WORLD_SIZE" in os.environ)(config) or 0
    except (MemoryError, RuntimeError) as error:
        if (sentence := _too_little_memory(error, getattr(config, "batch_size", 1))) is None:
            raise
        raise sentence from None


def _too_little_memory(error: Exception, batch_size: int) -> UserError | None:
    """What to do about an error of an allocator, of a GPU's too. None: it is another error."""
    reason = (str(error).splitlines() or ["no more can be allocated"])[0].rpartition("Allocator: ")[2]
    if not isinstance(error, MemoryError) and not re.search("out of memory|allocate memory", reason):
        return None
    smaller = f"pass --batch_size {batch_size // 2} or less" if batch_size > 1 else "make the batches smaller"
    return UserError(f"there is too little memory ({reason}); {smaller}, or make the images or the model smaller")


def _load_once(path: str, is_uncompiled: bool, is_distributed: bool):  # type: ignore[no-untyped-def]
    """`_load` without garbage collection, if it is the process's first: imports make a million objects that all stay.

    It takes a third off the time until a command computes. Later collections leave these objects out.
    """
    if gc.get_freeze_count():
        return _load(path)
    gc.disable()
    try:
        if is_uncompiled:
            import_less(is_distributed)
        return _load(path)
    finally:
        gc.enable()
        gc.freeze()


def _load(path: str):  # type: ignore[no-untyped-def]  # whatever the path names
    module, name = path.split(":")
    return getattr(importlib.import_module(module), name)
