"""Kill training with SIGKILL at random moments, resume it until it ends, compare every byte with an uninterrupted run.

    python benchmarks/soak.py                                       # 100 kills over all variants
    python benchmarks/soak.py --variants plain sharded --kills 20 --seed 1

The run that is never killed is the plain command, or torchrun's; the others are forked off this process, which has
imported everything, so that a kill costs no import. Prints where the kills hit. Exits with 1 if any file of a run
folder differs (except times and memory in metrics.jsonl), if a hidden file or a process is left over, or if a run that
was killed does not resume."""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from multiprocessing.context import ForkProcess
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}

import numpy as np

import uvit.extract.extract
import uvit.sample.pipeline
import uvit.train.trainer  # noqa: F401 - here, so that no child has to
from uvit.cli.main import main as uvit_main
from uvit.train.metrics import PART_SECONDS

MODEL = {
    "sample_size": 8,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "clip_dim": 64,
    "num_text_tokens": 18,
}
# The fields of metrics.jsonl that are measured, and so differ between two equal runs.
TIMING_FIELDS = ("seconds", *PART_SECONDS, "samples_per_second", "mfu", "peak_memory_bytes", "evaluation_seconds")
STEPS = 40
TRAIN = f"""train --feature_path FOLDER/store --uvit_config_file FOLDER/model.json --output_dir run --device cpu
    --per_device_train_batch_size 4 --max_steps {STEPS} --save_steps 4 --save_total_limit 5 --learning_rate 1e-3
    --warmup_steps 10 --ema_decay 0.9 --dataloader_num_workers 0 --image_logging_steps -1 --report_to none
    --logging_steps 1 --disable_tqdm"""
VARIANTS = {
    "plain": "--image_logging_steps 15 --num_inference_steps 2",
    "accumulation": "--gradient_accumulation_steps 2 --noise_offset 0.1 --snr_gamma 5",
    "workers": "--dataloader_num_workers 2",
    "bf16": "--bf16",
    "text_encoder": "--train_text_encoder --prediction_type v_prediction",
    "fp16_o2": "--fp16 --fp16_opt_level O2",
    "rollback": "--feature_path FOLDER/bad/store --max_nonfinite_steps 2",
    "replicas": "--dp_degree 2",
    "sharded": "--sharding_parallel_degree 2",
    "tensor_parallel": "--tensor_parallel_degree 2",
}
AIMS = {"anywhere": 0.6, "at a save": 0.25, "at the export": 0.15}
PLACES = ("start", "step", "save", "export")
SAVE_SECONDS = 0.015  # about what a save takes here
PATIENCE = 20.0  # seconds for what is left of a run after a kill; torchrun has 30


# Processes


def start(arguments: Sequence[str], folder: Path, size: int = 1) -> list[ForkProcess]:
    """`uvit ARGUMENTS` in `folder`, by as many processes as torchrun would start. Their output goes to output.txt."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": size, "MASTER_ADDR": "localhost", "MASTER_PORT": port} if size > 1 else {}
    processes = []
    for rank in range(size):
        environment = world | {"RANK": rank, "LOCAL_RANK": rank} if world else {}
        processes.append(multiprocessing.get_context("fork").Process(target=run, args=(arguments, folder, environment)))
        processes[-1].start()
    return processes


def run(arguments: Sequence[str], folder: Path, environment: dict[str, object]) -> None:
    os.setsid()  # a session of its own, by which its workers are found
    os.chdir(folder)
    output = os.open("output.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ |= {name: str(value) for name, value in environment.items()}
    sys.exit(uvit_main(arguments))


def wait(processes: list[ForkProcess], seconds: float = 120.0) -> list[int | None]:
    """Their exit statuses; None for one that had to be killed after so long."""
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    statuses = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return statuses


def all_running(processes: list[ForkProcess]) -> bool:
    return all(process.is_alive() for process in processes)


def left_over(sessions: set[int]) -> set[int]:
    """Sessions that have a process still."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, session = path.read_text().rpartition(")")[2].split()[:4]
        except OSError:  # it has just ended
            continue
        if state != "Z":
            found.add(int(session))
    return found & sessions


# Kills


def kill(processes: list[ForkProcess], run_folder: Path, rng: random.Random, life: tuple[float, float]) -> bool:
    """Kill a run somewhere in its life of (seconds to the last checkpoint, seconds); False: it had come to its end.

    Of several processes all, as where a machine fails, or one: the others then get SIGTERM, as from torchrun.
    """
    aim = rng.choices(list(AIMS), list(AIMS.values()))[0]
    if aim == "anywhere":
        moment = time.monotonic() + rng.random() * life[1]
        while all_running(processes) and time.monotonic() < moment:
            time.sleep(0.0005)
    elif aim == "at a save":
        saves, wanted = set(run_folder.glob(".checkpoint-*")), 0
        wanted = len(saves) + rng.randint(1, 3)
        while all_running(processes) and len(saves) < wanted:
            saves.update(run_folder.glob(".checkpoint-*"))
            time.sleep(0.0002)
        time.sleep(rng.random() * SAVE_SECONDS)
    else:
        while all_running(processes) and not (run_folder / f"checkpoint-{STEPS}").exists():
            time.sleep(0.0005)
        time.sleep(rng.random() * (life[1] - life[0]))
    if not all_running(processes):
        return False
    victims = processes if rng.random() < 0.5 else [rng.choice(processes)]
    for process in victims:
        process.kill()
    for process in processes:
        process.terminate()
    wait(processes, PATIENCE)
    return any(process.exitcode in (-signal.SIGKILL, -signal.SIGTERM) for process in processes)


def place(run_folder: Path, before: set[tuple[str, int]], output: str) -> str:
    """What a run was doing when it was killed, from what it left."""
    if hidden(run_folder) - before:
        return "save"
    if (run_folder / f"checkpoint-{STEPS}").exists():
        return "export"
    return "step" if "\nstep " in output else "start"


def hidden(run_folder: Path) -> set[tuple[str, int]]:
    return {(path.name, path.stat().st_ino) for path in run_folder.glob(".checkpoint-*")}


# What is compared


def contents(run_folder: Path, num_steps: int = STEPS) -> dict[str, bytes]:
    """Every file; metrics.jsonl, which has a line a step, without what was measured."""
    found = {p.relative_to(run_folder).as_posix(): p.read_bytes() for p in run_folder.rglob("*") if p.is_file()}
    records = [json.loads(line) for line in found["logs/metrics.jsonl"].splitlines()]
    assert [record["step"] for record in records] == list(range(1, num_steps + 1))
    kept = [{name: value for name, value in record.items() if name not in TIMING_FIELDS} for record in records]
    return found | {"logs/metrics.jsonl": json.dumps(kept).encode()}


def differences(run_folder: Path, whole: dict[str, bytes]) -> list[str]:
    found = contents(run_folder)
    return sorted(name for name in found.keys() | whole.keys() if found.get(name) != whole.get(name))


# The soak


def command(arguments: Sequence[str], folder: Path, size: int) -> float:
    """The command as a user calls it. Returns its seconds."""
    program = [sys.executable, "-m", "uvit"]
    if size > 1:
        torchrun = ["torch.distributed.run", "--standalone", f"--nproc_per_node={size}", "-m", "uvit"]
        program = [sys.executable, "-m", *torchrun]
    started = time.monotonic()
    done = subprocess.run([*program, *arguments], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(arguments)} fails:\n{done.stdout[-1000:]}{done.stderr[-3000:]}")
    return time.monotonic() - started


def make_features(folder: Path) -> None:
    """Text embeddings and token ids in folder/store, by a text encoder that a first step of training leaves."""
    (folder / "model.json").write_text(json.dumps(MODEL))
    common = "extract --source shapes --resolution 32 --vae_name_or_path shapes --model_max_length 18 --num_workers 0"
    first = f"{TRAIN} --feature_path tokens --uvit_config_file model.json --max_steps 1 --train_text_encoder"
    for arguments in (
        f"{common} --text tokens --output_dir tokens",
        first,
        f"{common} --text both --text_encoder_name_or_path run/pipeline --output_dir store",
    ):
        if wait(start(arguments.split(), folder)) != [0]:
            sys.exit((folder / "output.txt").read_text())
    spoil(folder)


def spoil(folder: Path) -> None:
    """FOLDER/bad/store: the features, with latents of every sixteenth image that are not finite."""
    shutil.copytree(folder / "store", folder / "bad" / "store")
    [path] = (folder / "bad" / "store" / "train").glob("moments-*.npy")
    moments = np.load(path)
    moments[::16] = np.inf
    np.save(path, moments)


def num_processes(variant: str) -> int:
    return 2 if "_degree 2" in VARIANTS[variant] else 1


def shares(variants: Sequence[str], num_kills: int) -> list[int]:
    """How many of the kills each gets: one of two processes, which takes several times as long, half as many."""
    weights = np.array([1 / num_processes(variant) for variant in variants])
    ends = [round(num_kills * part) for part in np.cumsum(weights) / weights.sum()]
    return [end - begin for begin, end in zip([0, *ends], ends, strict=False)]


def soak(variant: str, num_kills: int, folder: Path, rng: random.Random, hits: Counter[str]) -> bool:
    """Adds to `hits` where the kills hit. Returns whether all was well."""
    arguments = f"{TRAIN} {VARIANTS[variant]}".replace("FOLDER", str(folder)).split()
    size = num_processes(variant)
    started = time.monotonic()
    (folder / f"{variant}-whole").mkdir()
    command(arguments, folder / f"{variant}-whole", size)
    whole = contents(folder / f"{variant}-whole" / "run")
    seconds = time.monotonic() - started
    print(f"{variant}: the command takes {seconds:.1f} s and leaves {len(whole)} files", flush=True)

    kills: Counter[str] = Counter()
    sessions: set[int] = set()
    life, num_runs, well = (0.0, 0.0), 0, True
    while kills.total() < num_kills or not num_runs:
        here = folder / f"{variant}-{num_runs}"
        here.mkdir()
        num_runs += 1
        while True:
            before, printed = hidden(here / "run"), len(read_output(here))
            began = time.monotonic()
            processes = start(arguments, here, size)
            sessions |= {process.pid or 0 for process in processes}
            if life[1] and kills.total() < num_kills and kill(processes, here / "run", rng, life):
                kills[place(here / "run", before, read_output(here)[printed:])] += 1
                continue
            if not life[1]:  # the first one is let live
                while all_running(processes) and not (here / "run" / f"checkpoint-{STEPS}").exists():
                    time.sleep(0.001)
                saved = time.monotonic() - began
            statuses = wait(processes)
            if any(statuses):
                print(f"{variant}: a run ended with {statuses}\n{read_output(here)[printed:][-3000:]}")
                return False
            life = life if life[1] else (saved, time.monotonic() - began)
            break
        if different := differences(here / "run", whole):
            print(f"{variant}, run {num_runs}: {len(different)} files differ: {', '.join(different)}", flush=True)
            well = False
    deadline = time.monotonic() + PATIENCE
    while (left := left_over(sessions)) and time.monotonic() < deadline:
        time.sleep(0.1)
    hits.update(kills)
    print(
        f"{variant}: {in_words(kills)} in {num_runs} runs of {life[1]:.1f} s, "
        f"{time.monotonic() - started:.0f} s in all: {'every byte equal' if well else 'NOT EQUAL'}"
        f"{f', {len(left)} processes left over' if left else ''}",
        flush=True,
    )
    return well and not left


def in_words(kills: Counter[str]) -> str:
    return f"{kills.total()} kills ({', '.join(f'{name} {kills[name]}' for name in PLACES)})"


def read_output(folder: Path) -> str:
    path = folder / "output.txt"
    return path.read_text(errors="replace") if path.exists() else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="keep everything there")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    started = time.monotonic()
    well, hits = True, Counter[str]()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        make_features(folder)
        print(f"features are there after {time.monotonic() - started:.1f} s", flush=True)
        for variant, share in zip(options.variants, shares(options.variants, options.kills), strict=True):
            well = soak(variant, share, folder, rng, hits) and well
    print(f"{in_words(hits)} in {time.monotonic() - started:.0f} s: {'all is well' if well else 'NOT WELL'}")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
