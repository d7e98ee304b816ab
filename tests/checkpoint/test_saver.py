"""A checkpoint is there whole or not at all, and says what it is."""

import hashlib
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.tiny import save_checkpoint
from uvit.checkpoint.folder import (
    checkpoint_folders,
    keep_latest,
    latest_checkpoint,
    read_checkpoint,
    read_verified,
)
from uvit.checkpoint.saver import Saver
from uvit.errors import UserError
from uvit.train.optimizer import flatten_optimizer, init_optimizer_state

TENSORS = {"weights": {"a": torch.arange(6.0).reshape(2, 3)}, "ema": {"a": torch.ones(2)}}
FILES = ["ema.safetensors", "uvit.json", "weights.safetensors"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def of_value(value: float, size: int = 10) -> dict[str, dict[str, Tensor]]:
    return {group: {"a": torch.full((size,), value), "b": torch.tensor(value)} for group in ("weights", "optimizer")}


@contextmanager
def files_at_most(num_bytes: int) -> Iterator[None]:
    """Writing past this fails as on a full disk, but with EFBIG."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# One after another


def test_what_is_written_is_read(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, 7, TENSORS, {"samples": 70})
    found = read_checkpoint(folder)
    assert folder.name == "checkpoint-7" and found.step == 7 and found.record["samples"] == 70
    assert torch.equal(found.load("weights")["a"], TENSORS["weights"]["a"])
    assert not list(tmp_path.glob(".*"))


def test_anybody_can_read_what_one_process_wrote(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, 7, TENSORS, {})
    assert names(folder) == FILES
    assert torch.equal(load_file(folder / "weights.safetensors")["a"], TENSORS["weights"]["a"])


def test_the_latest_whole_one_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (5, 10, 100):
        save_checkpoint(tmp_path, step, TENSORS, {})
    (tmp_path / "checkpoint-abc").mkdir()
    (tmp_path / "checkpoint-100" / "ema.safetensors").unlink()
    found = latest_checkpoint(tmp_path)
    assert found is not None and found.step == 10
    assert "ema.safetensors is missing" in capsys.readouterr().out
    assert latest_checkpoint(tmp_path / "nothing") is None


@pytest.mark.parametrize("content", ["", "[]", '{"format": 99}', '{"format": 1}', '{"format": 2}'])
def test_a_record_that_is_none_is_refused(content: str, tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, 1, TENSORS, {})
    (folder / "uvit.json").write_text(content)
    with pytest.raises(UserError, match="checkpoint"):
        read_checkpoint(folder)


def test_a_damaged_file_of_the_right_size_is_named(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, 3, TENSORS, {})
    path = folder / "weights.safetensors"
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(UserError, match=r"weights.safetensors is damaged"):
        read_checkpoint(folder).load("weights")
    without_checksums(folder)
    with pytest.raises(UserError, match=r"weights.safetensors: cannot be read"):
        read_checkpoint(folder).load("weights")


def without_checksums(folder: Path) -> None:
    """As older versions wrote it."""
    record = json.loads((folder / "uvit.json").read_text())
    kept = {key: value for key, value in record.items() if key not in ("sha256", "record_sha256")}
    (folder / "uvit.json").write_text(json.dumps(kept))


def flip_a_bit(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_found_and_the_file_named(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, step, TENSORS | {"optimizer": {}}, {"samples": 240})
    size = (tmp_path / "checkpoint-2" / name).stat().st_size
    for place in (0, 8, size // 2, size - 4):
        flip_a_bit(tmp_path / "checkpoint-2" / name, place)
        found = latest_checkpoint(tmp_path)
        assert found is not None and found.step == 1
        assert f"checkpoint-2{'/' if name == 'uvit.json' else ': '}{name}" in capsys.readouterr().out.replace(
            "is not a checkpoint (uvit.json", "checkpoint-2/uvit.json"
        )
        flip_a_bit(tmp_path / "checkpoint-2" / name, place)
    read_verified(tmp_path / "checkpoint-2")
    capsys.readouterr()


def test_the_checksum_is_that_of_the_file(tmp_path: Path) -> None:
    tensors = {
        "scalar": torch.tensor(1.5), "none": torch.empty(0, 3), "half": torch.ones(3, dtype=torch.bfloat16),
        "byte": torch.ones(5, dtype=torch.uint8), "long": torch.arange(7), "bool": torch.tensor([True]),
    }  # fmt: skip
    folder = save_checkpoint(tmp_path, 1, {"weights": tensors}, {})
    record = json.loads((folder / "uvit.json").read_text())
    digest = hashlib.sha256((folder / "weights.safetensors").read_bytes()).hexdigest()
    assert record["sha256"] == {"weights.safetensors": digest}


def test_a_checkpoint_without_checksums_is_read(tmp_path: Path) -> None:
    without_checksums(save_checkpoint(tmp_path, 1, TENSORS, {}))
    found = latest_checkpoint(tmp_path)
    assert found is not None and torch.equal(found.load("weights")["a"], TENSORS["weights"]["a"])


def test_where_no_checkpoint_is_whole_it_ends_with_the_way_out(tmp_path: Path) -> None:
    for step in (1, 2):
        flip_a_bit(save_checkpoint(tmp_path, step, TENSORS, {}) / "ema.safetensors", 20)
    message = (
        r"has 2 checkpoints and none is whole \(.*checkpoint-2: ema.safetensors is damaged.*--overwrite_output_dir"
    )
    with pytest.raises(UserError, match=message):
        latest_checkpoint(tmp_path)


def test_a_group_that_was_not_saved_is_named(tmp_path: Path) -> None:
    found = read_checkpoint(save_checkpoint(tmp_path, 3, {"weights": TENSORS["weights"]}, {}))
    assert found.files("ema") == [] and [path.name for path in found.files("weights")] == ["weights.safetensors"]
    with pytest.raises(UserError, match="checkpoint-3: has no ema"):
        found.load("ema")


def test_the_limit_keeps_the_latest(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        save_checkpoint(tmp_path, step, TENSORS, {})
    keep_latest(tmp_path, None)
    assert len(checkpoint_folders(tmp_path)) == 3
    keep_latest(tmp_path, 2)
    assert [path.name for path in checkpoint_folders(tmp_path)] == ["checkpoint-2", "checkpoint-10"]


def test_the_limit_counts_whole_ones_and_spares_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        save_checkpoint(tmp_path, step, TENSORS, {})
    (tmp_path / "checkpoint-10" / "ema.safetensors").unlink()
    keep_latest(tmp_path, 1)
    assert [path.name for path in checkpoint_folders(tmp_path)] == ["checkpoint-2", "checkpoint-10"]
    with Saver(tmp_path, limit=1) as saver:  # it went back to the start, and a later one is still there
        save_checkpoint(tmp_path, 20, TENSORS, {})
        saver.save(1, TENSORS, {})
    assert [path.name for path in checkpoint_folders(tmp_path)] == ["checkpoint-1", "checkpoint-20"]


# In the background


def test_what_changes_after_save_does_not_show(tmp_path: Path) -> None:
    tensor = torch.zeros(1000, 1000)
    with Saver(tmp_path) as saver:
        for step in (1, 2, 3):
            saver.save(step, {"weights": {"a": tensor}}, {})
            tensor += 1
    for step in (1, 2, 3):
        assert (read_checkpoint(tmp_path / f"checkpoint-{step}").load("weights")["a"] == step - 1).all()


def test_it_tells_once_of_each_that_is_whole(tmp_path: Path) -> None:
    saver = Saver(tmp_path)
    assert saver.saved() is None
    saver.save(1, of_value(1), {})
    saver.wait()
    assert saver.saved() == tmp_path / "checkpoint-1"
    assert saver.saved() is None


def test_the_limit_holds_in_the_background(tmp_path: Path) -> None:
    with Saver(tmp_path, limit=2) as saver:
        for step in range(1, 6):
            saver.save(step, of_value(step), {})
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-5"]


def test_a_full_disk_is_a_sentence_in_the_next_call_and_costs_nothing_else(tmp_path: Path) -> None:
    saver = Saver(tmp_path, limit=1)
    saver.save(1, of_value(1), {})
    saver.wait()
    with files_at_most(100_000):
        saver.save(2, of_value(2, size=1_000_000), {})
        with pytest.raises(UserError, match=r"^--output_dir .*checkpoint-2 could not be written \(.*File too large"):
            saver.save(3, of_value(3), {})
    assert names(tmp_path) == ["checkpoint-1"]
    found = latest_checkpoint(tmp_path)
    assert found is not None and (found.load("weights")["a"] == 1).all()
    saver.save(3, of_value(3), {})
    saver.wait()
    assert names(tmp_path) == ["checkpoint-3"]


def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    saver = Saver(tmp_path / "run")
    saver.save(1, of_value(1), {})
    with pytest.raises(UserError, match=r"run: checkpoint-1 could not be written"):
        saver.wait()
    saver.wait()  # it is raised once


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_a_sentence(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="could not be written"):
        save_checkpoint(tmp_path, 1, TENSORS, {})


def test_an_error_of_training_is_not_hidden_by_one_of_saving(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(ZeroDivisionError), Saver(tmp_path / "run") as saver:
        saver.save(1, of_value(1), {})
        _ = 1 / 0


def test_a_mistake_of_ours_is_not_taken_for_the_disk(tmp_path: Path) -> None:
    saver = Saver(tmp_path)
    saver.save(1, of_value(1), {"not for JSON": object()})
    with pytest.raises(TypeError, match="JSON"):
        saver.wait()
    assert names(tmp_path) == []


def test_a_disk_that_processes_do_not_share_is_a_sentence(tmp_path: Path) -> None:
    """Process 1's file is not where process 0 looks."""

    def of_two(value: object) -> list[object]:
        return (
            [value, ({"weights-00002-of-00002.safetensors": (8, "")}, None)]
            if isinstance(value, tuple)
            else [value, []]
        )

    saver = Saver(tmp_path, all_gather=of_two)
    saver.save(1, of_value(1), {})
    with pytest.raises(UserError, match="must share this disk"):
        saver.wait()
    assert names(tmp_path) == []


# Kills


KILLED = """
import os, random, shutil, signal, sys, time
from pathlib import Path
import torch
from uvit.checkpoint.folder import checkpoint_folders, latest_checkpoint, read_checkpoint
from uvit.checkpoint.saver import Saver

torch.set_num_threads(1)
CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir"}

def tensors(value):
    return {group: {"a": torch.full((1000,), value)} for group in ("weights", "ema")}

def child(run, work, kill_at):
    # Dies before its `kill_at`-th operation on files.
    count = 0
    def audit(event, arguments):
        nonlocal count
        if event in CHANGES or event == "open" and str(run) in str(arguments[0]):
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
    if kill_at:
        sys.addaudithook(audit)
    work(run)
    os._exit(0)

def fork(run, work, kill_at=0, delay=None):
    # -> whether it was killed
    pid = os.fork()
    if pid == 0:
        try:
            child(run, work, kill_at)
        finally:
            os._exit(1)
    if delay is not None:
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, status
    return os.WIFSIGNALED(status)

def check(run, allowed):
    # The latest is whole and one of those that were saved: {step: {values}}.
    found = latest_checkpoint(run)
    assert found is not None, sorted(os.listdir(run))
    for group in ("weights", "ema"):
        value = found.load(group)["a"].unique().tolist()
        assert len(value) == 1 and value[0] == found.record["value"] and value[0] in allowed[found.step], (found, value)
    for folder in checkpoint_folders(run):
        read_checkpoint(folder)
    return found

def go_on(run, step):
    with Saver(run, limit=1) as saver:
        saver.save(step, tensors(9.0), {"value": 9.0})
    assert os.listdir(run) == [f"checkpoint-{step}"], os.listdir(run)

def save_checkpoint(run, step, value, limit):
    with Saver(run, limit) as saver:
        saver.save(step, tensors(value), {"value": value})

def again(run):
    save_checkpoint(run, 3, 2.0, 1)

def next_one(run):
    save_checkpoint(run, 4, 2.0, 1)

def at_every_operation(root):
    save_checkpoint(root / "before", 3, 1.0, None)
    for name, work, allowed in (("again", again, {3: {1.0, 2.0}}), ("next", next_one, {3: {1.0}, 4: {2.0}})):
        kill_at, killed = 0, True
        while killed:
            kill_at += 1
            run = root / f"{name}-{kill_at}"
            shutil.copytree(root / "before", run)
            killed = fork(run, work, kill_at)
            check(run, allowed)
            go_on(run, 5)
        print(name, kill_at)

def in_a_loop(run):
    with Saver(run, limit=2) as saver:
        step = latest_checkpoint(run).step
        while True:
            step += 1
            saver.save(step, tensors(float(step)), {"value": float(step)})

class Own(dict):
    def __missing__(self, step):
        return {float(step)}

def at_random_moments(root):
    run, random_number = root / "random", random.Random(0)
    save_checkpoint(run, 0, 0.0, None)
    for _ in range(15):
        assert fork(run, in_a_loop, delay=0.1 + 0.1 * random_number.random())
        step = check(run, Own()).step
    assert step > 15
    print("random", step)

at_every_operation(Path(sys.argv[1]))
at_random_moments(Path(sys.argv[1]))
"""


def test_a_kill_at_any_moment_leaves_the_last_whole_one(tmp_path: Path) -> None:
    """Before each operation on files, as Python's audit events count them, and at random moments."""
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    moments = {line.split()[0]: int(line.split()[1]) for line in done.stdout.splitlines() if "skipped" not in line}
    assert moments["again"] > 15 and moments["next"] > 15  # else nobody was killed anywhere


def test_what_a_kill_leaves_behind_is_not_in_the_way(tmp_path: Path) -> None:
    for name in (".checkpoint-3.writing", ".checkpoint-2.writing", ".checkpoint-1.deleting"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights.safetensors").write_bytes(b"half")
    assert latest_checkpoint(tmp_path) is None
    save_checkpoint(tmp_path, 3, TENSORS, {})
    save_checkpoint(tmp_path, 3, TENSORS, {"second": True})
    found = latest_checkpoint(tmp_path)
    assert found is not None and found.record["second"]
    assert names(tmp_path) == ["checkpoint-3"]


# The optimizer


def optimizer_of(parameters: list[torch.nn.Parameter]) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=0.1, fused=True)


def step(parameters: list[torch.nn.Parameter], optimizer: torch.optim.AdamW) -> None:
    for parameter in parameters:
        parameter.grad = parameter.detach() + 1
    optimizer.step()


def test_the_optimizer_comes_back(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = optimizer_of([parameter])
    step([parameter], optimizer)
    names = {parameter: "p"}
    folder = save_checkpoint(tmp_path, 1, {"optimizer": flatten_optimizer(optimizer, names)}, {})
    other = optimizer_of([parameter])
    init_optimizer_state(other)
    read_checkpoint(folder).load_into("optimizer", flatten_optimizer(other, names))
    for key, value in optimizer.state[parameter].items():
        assert torch.equal(other.state[parameter][key], value)
    assert json.loads((folder / "uvit.json").read_text())["files"].keys() == {"optimizer.safetensors"}


def test_a_run_loaded_in_place_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    def fresh() -> tuple[list[torch.nn.Parameter], torch.optim.AdamW, Callable[[], dict[str, dict[str, Tensor]]]]:
        parameters = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2, 2))]
        optimizer = optimizer_of(parameters)
        init_optimizer_state(optimizer)
        called: dict[Tensor, str] = {parameter: f"p{i}" for i, parameter in enumerate(parameters)}
        return (
            parameters,
            optimizer,
            lambda: {
                "weights": {name: parameter for parameter, name in called.items()},
                "optimizer": flatten_optimizer(optimizer, called),
            },
        )

    parameters, optimizer, state = fresh()
    unprepared = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2, 2))]
    step(parameters, optimizer)
    step(unprepared, optimizer_of(unprepared))
    assert all(torch.equal(a, b) for a, b in zip(parameters, unprepared, strict=True))

    found = read_checkpoint(save_checkpoint(tmp_path, 1, state(), {}))
    again, other, loaded = fresh()
    for group, targets in loaded().items():
        found.load_into(group, targets)
    step(parameters, optimizer)
    step(again, other)
    assert all(torch.equal(a, b) for a, b in zip(parameters, again, strict=True))


def test_what_may_change_after_the_copy_is_saved_as_it_was(tmp_path: Path) -> None:
    tensors = of_value(1.0, size=1_000_000)
    with Saver(tmp_path) as saver:
        saver.start(1, tensors, {})
        saver.wait_for_copy()
        for group in tensors.values():
            group["a"].zero_()
        saver.wait()
        saver.start(2, tensors, {})
    first, second = (read_verified(tmp_path / f"checkpoint-{step}").load("weights")["a"] for step in (1, 2))
    assert (first == 1).all() and (second == 0).all()


def test_a_copy_that_fails_does_not_block_training(tmp_path: Path) -> None:
    with pytest.raises(NotImplementedError), Saver(tmp_path) as saver:  # a tensor of the meta device has no content
        saver.start(1, {"weights": {"a": torch.empty(3, device="meta")}}, {})
        saver.wait_for_copy()
    assert not list(tmp_path.iterdir())
