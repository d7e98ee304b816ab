"""`uvit COMMAND ...`: find the command, turn its arguments into a config, run it, and speak to the person.

Exit status: 0 done, 2 a mistake of the user's (one sentence on stderr), 130 stopped by Ctrl-C.
"""

import difflib
import errno
import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from uvit import __version__
from uvit.cli.parse import parse
from uvit.config_file import to_yaml
from uvit.errors import UserError

# What is wrong with a place that a person named, or with its disk.
PLACES = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG,
    errno.ENOSPC, errno.EDQUOT,
}  # fmt: skip


@dataclass(frozen=True)
class Command:
    summary: str
    config: str  # module:dataclass, standard library only
    run: str  # module:function that takes the config; imported when it runs
    positional: tuple[str, ...] = ()  # fields that may be given without their flag, the last one any number of times


COMMANDS = {
    "autoencoder": Command(
        "train a first stage (AutoencoderKL) of your own on a source of images",
        "uvit.config.extract:AutoencoderConfig",
        "uvit.train.autoencoder:train_autoencoder",
    ),
    "tokenizer": Command(
        "build a tokenizer from a source's captions",
        "uvit.config.extract:TokenizerConfig",
        "uvit.data.tokenizer:build_tokenizer",
    ),
    "extract": Command(
        "encode captioned images into a feature store",
        "uvit.config.extract:ExtractConfig",
        "uvit.data.extract:extract",
    ),
    "features info": Command(
        "say what a feature store, or a folder in the old layout, holds",
        "uvit.config.store:FeaturesInfoConfig",
        "uvit.features.info:info",
        positional=("path",),
    ),
    "features verify": Command(
        "read every byte of a feature store and compare it with its checksums",
        "uvit.config.store:FeaturesVerifyConfig",
        "uvit.features.verify:verify",
        positional=("path",),
    ),
    "features import": Command(
        "turn features in the old layout into a feature store",
        "uvit.config.store:FeaturesImportConfig",
        "uvit.features.old_layout:import_",
        positional=("path",),
    ),
    "features export": Command(
        "turn a feature store into the old layout",
        "uvit.config.store:FeaturesExportConfig",
        "uvit.features.old_layout:export",
        positional=("path",),
    ),
    "features merge": Command(
        "make one feature store of several",
        "uvit.config.store:FeaturesMergeConfig",
        "uvit.features.merge:merge",
        positional=("paths",),
    ),
    "features sample": Command(
        "show a few pairs of a feature store as a picture",
        "uvit.config.store:FeaturesSampleConfig",
        "uvit.features.sample:sample",
        positional=("path",),
    ),
    "train": Command(
        "train a U-ViT on a feature store; run again to resume",
        "uvit.config.train:TrainConfig",
        "uvit.train.trainer:train",
    ),
    "sample": Command(
        "draw images from prompts",
        "uvit.config.sample:SampleConfig",
        "uvit.sample.generate:sample",
        positional=("prompts",),
    ),
    "convert": Command(
        "turn a model from one format into another: a checkpoint into a pipeline, others' weights into ours, and back",
        "uvit.config.convert:ConvertConfig",
        "uvit.convert.export:convert",
        positional=("source", "dest"),
    ),
    "evaluate": Command(
        "measure how often a model trained on the built-in shapes draws what the words ask for",
        "uvit.config.sample:EvaluateConfig",
        "uvit.evaluate.prompts:evaluate",
        positional=("pipeline",),
    ),
    "bench": Command(
        "time the training step, the forward pass and the loader, beside what the machine can do",
        "uvit.config.bench:BenchConfig",
        "uvit.bench.run:bench",
    ),
}


def usage(group: str = "") -> str:
    """The commands, or those of a group such as `features`."""
    named = {name: command for name, command in COMMANDS.items() if name.startswith(group)}
    width = max(map(len, named))
    rows = "\n".join(f"  {name:<{width}}  {command.summary}" for name, command in named.items())
    return (
        f"uvit {__version__}: train text-to-image latent diffusion models, with a U-ViT, from scratch\n\n"
        f"usage: uvit {group}COMMAND [--flag value ...]\n\n{rows}\n\n"
        "`uvit COMMAND --help` lists a command's flags; `--config FILE.yaml` reads them from a file."
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
    if any(command.startswith(f"{name} ") for command in COMMANDS):  # a group of commands
        if not arguments or arguments[0] in ("-h", "--help", "help"):
            print(usage(f"{name} "))
            return 0
        name = f"{name} {arguments.pop(0)}"
    try:
        return _run(name, arguments)
    except UserError as error:
        sentence = " ".join(str(error).split())  # a file's name or a flag's value may hold line breaks
        print(f"uvit {name}: error: {sentence}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nuvit {name}: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.errno not in PLACES:
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"uvit {name}: error: {where}{error.strerror}; mend that, or name another place", file=sys.stderr)
        return 2


def _run(name: str, arguments: list[str]) -> int:
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean `uvit {close[0]}`?" if close else f"the commands are {', '.join(COMMANDS)}"
        raise UserError(f"there is no command {name!r}; {hint}")
    command = COMMANDS[name]
    config, print_config = parse(_load(command.config), arguments, prog=f"uvit {name}", positional=command.positional)
    if print_config:
        print(to_yaml(config), end="")
        return 0
    return _load(command.run)(config) or 0


def _load(path: str):  # type: ignore[no-untyped-def]  # whatever the path names
    module, name = path.split(":")
    return getattr(importlib.import_module(module), name)
