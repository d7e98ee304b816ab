"""Kill a long command in its middle or near its end and run it again: no file tells that it ever stopped.

`tests/test_reliability.py` is the test of `uvit train`, `tests/extract/test_extract.py` that of `uvit extract`.
"""

import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.soak import read_output, run, wait
from tests.train.conftest import TINY_MODEL
from uvit.cli.main import main

AUTOENCODER = "--resolution 16 --factor 4 --channels 8 --batch_size 2 --max_steps 12 --save_steps 2 --preview_steps 5"
COMMANDS = {
    "autoencoder": f"--source shapes --output_dir out --device cpu {AUTOENCODER}",
    "tokenizer": "--source shapes --output_dir out --vocab_size 300",
    "features export": "INPUTS/store --output_dir out --device cpu",
    "features import": "INPUTS/npy --output_dir out --shard_size 200",
    "features merge": "INPUTS/store INPUTS/store --output_dir out",
    "convert": "INPUTS/run/checkpoint-1 out",
    "sample": "red blue green --pipeline INPUTS/run/pipeline --output_dir out --num_inference_steps 2 --batch_size 1 "
    "--device cpu --skip_existing",
    "evaluate": "INPUTS/run/pipeline --output_dir out --num_inference_steps 2 --max_prompts 4 --device cpu",
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, vae_folder: Path, text_encoder_folder: Path) -> Iterator[Path]:
    """A feature store, the same as .npy features, and a run of one step."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "model.json").write_text(json.dumps(TINY_MODEL))
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for command in (
        f"extract --source shapes --resolution 16 --vae_name_or_path {vae_folder} --text_encoder_name_or_path "
        f"{text_encoder_folder} --model_max_length 16 --num_workers 0 --shard_size 200 --output_dir {folder}/store "
        "--device cpu --disable_tqdm",
        f"features export {folder}/store --output_dir {folder}/npy --device cpu --disable_tqdm",
        f"train --feature_path {folder}/store --uvit_config_file {folder}/model.json --output_dir {folder}/run "
        "--max_steps 1 --per_device_train_batch_size 2 --device cpu --report_to none --disable_tqdm",
    ):
        assert main(command.split()) == 0
    yield folder
    torch.set_num_threads(num_threads)


def run_and_count(arguments: Sequence[str], folder: Path, fatal: int) -> None:
    """`uvit ARGUMENTS`, with SIGKILL where the `fatal`-th file or folder is about to get its name; 0: never."""
    count = 0

    def hook(event: str, values: tuple[Any, ...]) -> None:
        nonlocal count
        if event == "os.rename" and Path(os.fsdecode(values[1])).absolute().is_relative_to(folder):
            count += 1
            if count == fatal:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    try:
        run(arguments, folder, {})
    finally:
        (folder / "count.txt").write_text(str(count))


def start(arguments: Sequence[str], folder: Path, fatal: int = 0) -> int | None:
    """Run it in a process of its own, forked off one that has imported everything. Returns the exit status."""
    context = multiprocessing.get_context("forkserver")
    folder.mkdir(exist_ok=True)
    process = context.Process(target=run_and_count, args=(arguments, folder, fatal))
    process.start()
    return wait([process])[0]  # type: ignore[list-item]


def contents(folder: Path) -> dict[str, bytes]:
    """All that the command wrote, also under hidden names."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    return {
        name: path.read_bytes() if path.is_file() else b""
        for name, path in found.items()
        if name not in ("output.txt", "count.txt", "out/seconds.json")
    }


@pytest.mark.parametrize("name", COMMANDS)
def test_killed_and_run_again(name: str, inputs: Path, tmp_path: Path) -> None:
    arguments = [*name.split(), *COMMANDS[name].replace("INPUTS", str(inputs)).split()]
    whole = tmp_path / "whole"
    assert start(arguments, whole) == 0, read_output(whole)
    count = int((whole / "count.txt").read_text())
    for fatal in {count // 2 + 1, count}:
        killed = tmp_path / f"killed-{fatal}"
        assert start(arguments, killed, fatal) == -signal.SIGKILL, read_output(killed)
        assert start(arguments, killed) == 0, read_output(killed)
        assert contents(killed) == contents(whole)
