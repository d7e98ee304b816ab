"""`uvit train` in several processes: the same as in one, and going on in another layout than before."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.soak import contents
from tests.checkpoint.test_saver import flip_a_bit
from tests.distributed.training_worker import World, write_worlds
from tests.tiny import tiny_vit_folder
from uvit.checkpoint.folder import read_checkpoint
from uvit.lock import WriterLock

ROOT = Path(__file__).parents[2]
ONE = (1, 1, 1)
LAYOUTS = {"replicas": (2, 1, 1), "sharded": (1, 2, 1), "tensor_parallel": (1, 1, 2)}
CHAIN = [ONE, *LAYOUTS.values(), ONE]  # two steps each
EPOCHS = [  # another batch of a step and another number of processes each time: 8, 6, 10 and 3 samples
    (ONE, "--num_train_epochs 0.04"),
    ((2, 1, 1), "--num_train_epochs 0.08 --per_device_train_batch_size 3 --gradient_accumulation_steps 1"),
    ((1, 2, 1), "--num_train_epochs 0.12 --per_device_train_batch_size 1 --gradient_accumulation_steps 5"),
    ((1, 1, 2), "--num_train_epochs 0.14 --per_device_train_batch_size 3 --gradient_accumulation_steps 1"),
]
EPOCH_STEPS = [(4, 32), (8, 56), (11, 86), (13, 92)]  # (steps, samples) of 26, 52, 78 and 91 samples at least
FLOAT16 = "--fp16 --feature_path FOLDER/bad/store --max_steps 6 --save_steps 6"
EVALUATED = """--max_steps 4 --save_steps 4 --eval_steps 2 --eval_metrics fd attributes --eval_prompts 5
    --feature_extractor FOLDER/vit --num_inference_steps 2 --keep_best fd"""
ALIGNED = "--align sra --align_until 3 --max_steps 4 --save_steps 4"
HALVES = ("replicas", "sharded")  # where the processes read different samples


def worlds() -> list[World]:
    found = [World("one", ONE)]
    found += [World(name, degrees) for name, degrees in LAYOUTS.items()]
    found += [World(f"{name}-resumed", degrees, after=f"{name}/run/checkpoint-4") for name, degrees in LAYOUTS.items()]
    before = "one/run/checkpoint-2"
    for i, degrees in enumerate(CHAIN[1:], 1):
        found.append(World(f"chain-{i}", degrees, f"--max_steps {2 * i + 2}", before))
        before = f"chain-{i}/run/checkpoint-{2 * i + 2}"
    before = ""
    for i, (degrees, flags) in enumerate(EPOCHS):
        found.append(World(f"epochs-{i}", degrees, flags, before))
        before = f"epochs-{i}/run/checkpoint-{EPOCH_STEPS[i][0]}"
    found.append(World("one-float16", ONE, FLOAT16))
    found += [World(f"{name}-evaluated", degrees, EVALUATED) for name, degrees in {"one": ONE, **LAYOUTS}.items()]
    found += [World(f"{name}-aligned", degrees, ALIGNED) for name, degrees in {"one": ONE, **LAYOUTS}.items()]
    return found + [World(f"{name}-float16", LAYOUTS[name], FLOAT16) for name in HALVES]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What all the worlds have left."""
    folder = tmp_path_factory.mktemp("training")
    write_worlds(worlds(), folder)
    tiny_vit_folder(folder / "vit")
    command = [sys.executable, "-m", "tests.distributed.training_worker", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def tensors(run: Path, step: int) -> dict[str, Tensor]:
    found = read_checkpoint(run / f"checkpoint-{step}")
    groups = {group: found.load(group) for group in ("weights", "ema", "optimizer")}
    return {f"{group}/{name}": value for group, values in groups.items() for name, value in values.items()}


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "logs" / "metrics.jsonl").read_text().splitlines()]


def test_epochs_are_counted_in_samples_whatever_the_batch_and_the_processes(folder: Path) -> None:
    rows: list[tuple[int, ...]] = []
    for i, (steps, samples) in enumerate(EPOCH_STEPS):
        logged = lines(folder / f"epochs-{i}" / "run")
        assert (logged[-1]["step"], logged[-1]["samples"]) == (steps, samples)
        assert [line["step"] for line in logged] == list(range(1, steps + 1))
        read = (folder / f"epochs-{i}" / "rows.txt").read_text().splitlines()
        assert len(read) == (samples - len(rows)) * EPOCHS[i][0][2]  # tensor parallel processes read the same
        rows += sorted(tuple(map(int, line.split())) for line in set(read))
    assert [counter for counter, _ in rows] == list(range(92))
    assert len({row for _, row in rows}) == 92


def distances(run: Path, other: Path, step: int) -> dict[str, float]:
    """The 2-norm of the difference of each tensor, relative to the other run's."""
    found, wanted = tensors(run, step), tensors(other, step)
    assert found.keys() == wanted.keys()
    return {name: ((found[name] - wanted[name]).norm() / value.norm()).item() for name, value in wanted.items()}


def same_but_for_rounding(run: Path, other: Path, step: int, tolerance: float = 1e-5) -> None:
    for name, distance in distances(run, other, step).items():
        assert distance <= tolerance, name
    found, wanted = lines(run), lines(other)
    for key in ("step", "samples", "skipped", "lr"):
        assert [line[key] for line in found] == [line[key] for line in wanted]
    for key in ("loss", "grad_norm"):
        for line, expected in zip(found, wanted, strict=True):
            assert line[key] == (expected[key] and pytest.approx(expected[key], rel=tolerance)), (key, line["step"])


@pytest.mark.parametrize("name", LAYOUTS)
def test_two_processes_evaluate_what_one_does(folder: Path, name: str) -> None:
    """And agree on the best checkpoint."""
    run, alone = folder / f"{name}-evaluated" / "run", folder / "one-evaluated" / "run"
    same_but_for_rounding(run, alone, 4)
    evaluated = [line for line in lines(alone) if "eval_fd-vit" in line]
    assert [line["step"] for line in evaluated] == [2, 4]
    for expected in evaluated:
        line = lines(run)[expected["step"] - 1]
        scores = {key: value for key, value in expected.items() if key.startswith("eval_")}
        assert {key: line[key] for key in scores} == pytest.approx(scores, rel=1e-2), expected["step"]
    best, expected = (json.loads((each / "best.json").read_text()) for each in (run, alone))
    assert best["checkpoint"] == expected["checkpoint"] and (run / best["checkpoint"]).is_dir()


@pytest.mark.parametrize("name", LAYOUTS)
def test_two_processes_train_what_one_does(folder: Path, name: str) -> None:
    """Sums in another order differ by float32's rounding; `test_equality` says how far that goes."""
    same_but_for_rounding(folder / name / "run", folder / "one" / "run", step=10)


@pytest.mark.parametrize("name", LAYOUTS)
def test_two_processes_align_what_one_does(folder: Path, name: str) -> None:
    run, alone = (folder / f"{which}-aligned" / "run" for which in (name, "one"))
    same_but_for_rounding(run, alone, step=4)
    found, expected = ([line.get("align_loss") for line in lines(each)] for each in (run, alone))
    assert found[:3] == pytest.approx(expected[:3], rel=1e-5) and found[3] is expected[3] is None


def test_every_layout_can_go_on_where_any_other_was(folder: Path) -> None:
    same_but_for_rounding(folder / f"chain-{len(CHAIN) - 1}" / "run", folder / "one" / "run", step=10)


def test_a_step_makes_far_more_than_rounding(folder: Path) -> None:
    one = folder / "one" / "run"
    last, before = tensors(one, 10), tensors(one, 8)
    for name in ("weights/unet.pos_embed", "ema/unet.pos_embed", "optimizer/exp_avg/unet.pos_embed"):
        assert (last[name] - before[name]).norm() > 1e-3 * last[name].norm()
    assert len({round(line["loss"], 3) for line in lines(one)}) == 10


@pytest.mark.parametrize("name", LAYOUTS)
def test_on_the_same_layout_a_resumed_run_is_the_same_in_every_bit(folder: Path, name: str) -> None:
    whole, resumed = tensors(folder / name / "run", 10), tensors(folder / f"{name}-resumed" / "run", 10)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(resumed[key], value) for key, value in whole.items())
    pipelines = [folder / some / "run" / "pipeline" / "unet" for some in (name, f"{name}-resumed")]
    weights = [(path / "diffusion_pytorch_model.safetensors").read_bytes() for path in pipelines]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("name", HALVES)
def test_what_is_not_finite_in_one_process_is_skipped_by_both(folder: Path, name: str) -> None:
    """The same steps are skipped and the loss scale is the same. The rest differs by some roundings of float16, 2**-11,
    which the tokens have in all blocks.
    """
    run, one = folder / f"{name}-float16" / "run", folder / "one-float16" / "run"
    same_but_for_rounding(run, one, step=6, tolerance=2**-7)
    assert 0 < sum(line["skipped"] for line in lines(one)) < 6
    scales = [read_checkpoint(some / "checkpoint-6").record["loss_scale"] for some in (run, one)]
    assert scales[0] == scales[1] and scales[0]["scale"] < 2.0**16


START = """
import sys
from pathlib import Path
from benchmarks.soak import start, wait
print(wait(start(sys.argv[3:], Path(sys.argv[1]), int(sys.argv[2]))))
"""


def run_again(name: str, folder: Path, here: Path, *flags: str) -> tuple[str, str]:
    """The command of a world once more, in `here`. -> (the exit statuses, what it printed)."""
    [world] = [world for world in worlds() if world.name == name]
    (here / "output.txt").unlink(missing_ok=True)
    command = [sys.executable, "-c", START, str(here), str(world.size), *world.arguments(folder), *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip(), (here / "output.txt").read_text()


def test_two_processes_are_one_writer_and_are_refused_together(folder: Path, tmp_path: Path) -> None:
    with WriterLock(tmp_path / "run" / ".lock", "run"):
        statuses, said = run_again("sharded", folder, tmp_path)
        assert statuses == "[2, 2]" and f"--output_dir run: is in use by process {os.getpid()} on" in said
    assert not (tmp_path / "run").exists() and not list((folder / "sharded" / "run").glob(".*"))


def test_two_processes_find_a_flipped_bit_together(folder: Path, tmp_path: Path) -> None:
    """It is in a file that process 1 loads, and that process 0 does not read."""
    shutil.copytree(folder / "sharded", tmp_path, dirs_exist_ok=True)
    flip_a_bit(tmp_path / "run" / "checkpoint-10" / "optimizer-00002-of-00002.safetensors", 5000)
    statuses, said = run_again("sharded", folder, tmp_path)
    assert statuses == "[0, 0]"
    assert "checkpoint-10: optimizer-00002-of-00002.safetensors is damaged" in said
    assert "resumed run/checkpoint-8" in said
    assert contents(tmp_path / "run", 10) == contents(folder / "sharded" / "run", 10)
    statuses, said = run_again("sharded", folder, tmp_path, "--resume_from_checkpoint", "run/checkpoint-12")
    assert statuses == "[2, 2]" and "there is no such checkpoint" in said


def test_two_processes_go_back_together(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "sharded", tmp_path, dirs_exist_ok=True)
    back = ("--resume_from_checkpoint", "run/checkpoint-4")
    statuses, said = run_again("sharded", folder, tmp_path, *back)
    assert statuses == "[0, 0]" and "resumed run/checkpoint-4" in said and "is now in run/set-aside-1" in said
    found, before = tensors(tmp_path / "run", 10), tensors(folder / "sharded" / "run", 10)
    assert all(torch.equal(found[name], value) for name, value in before.items())
    statuses, said = run_again("sharded", folder, tmp_path, *back)
    assert statuses == "[0, 0]" and "resumes at checkpoint-10" in said
    assert [path.name for path in (tmp_path / "run").glob("set-aside-*")] == ["set-aside-1"]


def worker_of(torchrun: int) -> int:
    """The process id of one of the processes that torchrun started."""
    children = Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text().split()
    return next(int(pid) for pid in reversed(children) if b"uvit" in Path(f"/proc/{pid}/cmdline").read_bytes())


@pytest.mark.slow
def test_torchrun_starts_a_killed_worker_again_and_nothing_is_lost(folder: Path) -> None:
    [world] = [world for world in worlds() if world.name == "replicas"]
    here = folder / "killed"
    here.mkdir()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=3"]
    command = [*torchrun, "-m", "uvit", *world.arguments(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    said, killed = "", False
    with subprocess.Popen(
        command, cwd=here, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        deadline = threading.Timer(150, process.terminate)
        deadline.start()
        assert process.stdout is not None
        for line in process.stdout:
            said += line
            if not killed and re.match(r"step 7/", line):
                os.kill(worker_of(process.pid), signal.SIGKILL)
                killed = True
        deadline.cancel()
    assert process.returncode == 0, said
    assert killed and re.search(r"resumed \S+checkpoint-\d", said), said
    assert contents(here / "run", 10) == contents(folder / "replicas" / "run", 10)
