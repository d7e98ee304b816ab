"""Checkpoints of two processes: written together, read by any other layout. The processes check what they read."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoint.saving_worker import LAYOUTS, NETWORKS, Training, whole
from tests.tiny import save_checkpoint
from uvit.checkpoint.folder import latest_checkpoint, read_checkpoint
from uvit.checkpoint.saver import all_gather_channel
from uvit.distributed.mesh import Degrees, World

ONE = World(0, 1, Degrees(), torch.device("cpu"), None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a world of two has left, and a checkpoint that one process made before."""
    folder = tmp_path_factory.mktemp("saving")
    save_checkpoint(folder / "one", 1, Training(ONE, seed=7).groups(), {})
    environment = os.environ | {"WORLD_SIZE": "2", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.checkpoint.saving_worker", str(folder), rank],
            env=environment | {"RANK": rank},
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in ("0", "1")
    ]
    try:
        said = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    return folder


def test_a_world_of_one_opens_nothing() -> None:
    assert all_gather_channel(ONE)("x") == ["x"]
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("i", range(len(LAYOUTS)), ids=LAYOUTS)
def test_one_process_reads_what_two_wrote(folder: Path, i: int) -> None:
    found = read_checkpoint(folder / "layouts" / f"checkpoint-{i}")
    tensors = found.load("weights")
    assert all(torch.equal(tensors[name], tensor) for name, tensor in whole(i).items())
    assert tensors.keys() == whole().keys()


def test_only_what_is_cut_is_spread_over_files(folder: Path) -> None:
    cut, replicated = (read_checkpoint(folder / "layouts" / f"checkpoint-{i}") for i in (0, LAYOUTS.index("plain")))
    assert [path.name for path in cut.files("ema")] == [f"ema-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert [path.name for path in replicated.files("ema")] == ["ema.safetensors"]
    assert load_file(replicated.files("ema")[0]).keys() == whole().keys()


def test_what_training_changed_meanwhile_does_not_show(folder: Path) -> None:
    for step in (4, 5):
        assert (read_checkpoint(folder / "async" / f"checkpoint-{step}").load("weights")["a"] == step - 1).all()


def test_after_a_full_disk_it_goes_on(folder: Path) -> None:
    found = latest_checkpoint(folder / "full")
    assert found is not None and found.step == 2 and found.load("weights")["a"].shape == (4,)


@pytest.mark.parametrize("name", NETWORKS)
def test_one_process_goes_on_with_what_two_trained(folder: Path, name: str) -> None:
    """Published names, whole shapes, published order of rows; weights and moments, bit for bit."""
    ours = Training(ONE, seed=8)
    ours.load(read_checkpoint(folder / name / "checkpoint-1"))
    for group, tensors in Training(ONE, seed=7).groups().items():
        assert all(torch.equal(ours.groups()[group][key], tensor) for key, tensor in tensors.items())
        assert ours.groups()[group].keys() == tensors.keys()


@pytest.mark.parametrize("name", ["sharded", "tensor_parallel"])
def test_each_process_writes_its_share(folder: Path, name: str) -> None:
    found = read_checkpoint(folder / name / "checkpoint-1")
    one = read_checkpoint(folder / "one" / "checkpoint-1")
    sizes, [whole_size] = [path.stat().st_size for path in found.files("weights")], one.files("weights")
    larger = {"sharded": 0.55, "tensor_parallel": 0.75}[name]  # with headers; embeddings and norms are in one file
    assert len(sizes) == 2 and max(sizes) < larger * whole_size.stat().st_size
