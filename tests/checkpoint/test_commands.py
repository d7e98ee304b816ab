"""`uvit checkpoints list` and `verify`: what they print of a run, and what they find."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoint.test_saver import FILES, TENSORS, flip_a_bit, without_checksums
from tests.tiny import save_checkpoint
from uvit.checkpoint.commands import verify_checkpoints
from uvit.cli.main import main
from uvit.config.checkpoints import CheckpointsVerifyConfig
from uvit.lock import LOCK, WriterLock


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Checkpoints of steps 2, 4 and 10, and a log."""
    folder = tmp_path / "run"
    for step in (2, 4, 10):
        save_checkpoint(folder, step, TENSORS, {"samples": 1000 * step, "config": {"logging_steps": 2}})
    lines = [{"step": step, "loss": float(step)} for step in range(1, 12)]
    lines[2]["val_loss"], lines[3]["loss"] = 0.5, None  # type: ignore[assignment]
    (folder / "logs").mkdir()
    (folder / "logs" / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 12, "l'
    )
    return folder


def test_the_list(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "checkpoint-10" / "ema.safetensors").unlink()
    assert main(["checkpoints", "list", str(run)]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["step", "samples", "size", "saved", "loss", "val", "loss"]
    assert [(row.split()[:2], row.partition(";")[0].split()[6:]) for row in rows] == [
        (["2", "2,000"], ["1.5000", "-"]),
        (["4", "4,000"], ["3.0000", "0.5000"]),
        (["10", "-"], ["9.5000", "0.5000", "is", "not", "complete,", "ema.safetensors", "is", "missing"]),
    ]
    assert main(["checkpoints", "list", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["checkpoints"]
    assert [entry["complete"] for entry in found] == [True, True, False]
    assert found[1]["bytes"] == sum(path.stat().st_size for path in (run / "checkpoint-4").glob("*.s*"))
    with WriterLock(run / LOCK, "run"):
        main(["checkpoints", "list", str(run)])
        assert "\nin use by process " in capsys.readouterr().out


def test_the_best_is_marked(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best = {"metric": "val_loss", "value": 0.51234, "step": 4, "checkpoint": "checkpoint-4"}
    (run / "checkpoint-4" / "ema.safetensors").unlink()
    (run / "best.json").write_text(json.dumps(best))
    assert main(["checkpoints", "list", str(run)]) == 0
    _, first, second, last = capsys.readouterr().out.splitlines()
    assert "best val_loss: 0.5123; is not complete" in second and "best" not in first + last
    main(["checkpoints", "list", str(run), "--json"])
    assert json.loads(capsys.readouterr().out)["checkpoints"][1]["best"] == {"val_loss": 0.51234}
    for content in ("", "[]", '{"step": 4}', json.dumps(best | {"value": None})):
        (run / "best.json").write_text(content)
        assert main(["checkpoints", "list", str(run)]) == 0
        assert "best" not in capsys.readouterr().out


def test_a_list_without_a_log(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for content in ("", "nonsense\n", '{"loss": 1}\n', None):
        path = run / "logs" / "metrics.jsonl"
        path.write_text(content) if content is not None else path.unlink()
        assert main(["checkpoints", "list", str(run)]) == 0
        assert capsys.readouterr().out.splitlines()[1].split()[6:] == ["-", "-"]


@pytest.mark.parametrize("name", FILES)
def test_verify_names_the_damaged_file(name: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoints", "verify", str(run)]) == 0
    assert capsys.readouterr().out == "".join(f"{run}/checkpoint-{step}: whole\n" for step in (2, 4, 10))
    flip_a_bit(run / "checkpoint-4" / name, (run / "checkpoint-4" / name).stat().st_size // 2)
    assert main(["checkpoints", "verify", str(run)]) == 2
    whole, damaged, last = capsys.readouterr().out.splitlines()
    assert whole.endswith(": whole") and last.endswith(": whole") and name in damaged and "checkpoint-4" in damaged
    assert main(["checkpoints", "verify", str(run), "--json"]) == 2
    found = json.loads(capsys.readouterr().out)["checkpoints"]
    assert [entry["whole"] for entry in found] == [True, False, True]
    assert found[1]["damaged"] == ([] if name == "uvit.json" else [name]) and name in found[1]["problem"]
    assert main(["checkpoints", "verify", str(run / "checkpoint-4")]) == 2
    assert verify_checkpoints(CheckpointsVerifyConfig(str(run / "checkpoint-10"))) == 0


def test_verify_of_what_has_no_checksums(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    without_checksums(run / "checkpoint-4")
    assert main(["checkpoints", "verify", str(run)]) == 0
    assert f"{run}/checkpoint-4: whole (it has no checksums: only sizes were compared)\n" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["list", "verify"])
@pytest.mark.parametrize("name", ["nowhere", "", "file"])
def test_where_there_are_none_it_is_a_sentence(
    command: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert main(["checkpoints", command, str(tmp_path / name)]) == 2
    assert "give the --output_dir" in capsys.readouterr().err


def test_they_need_no_torch(run: Path) -> None:
    code = "import sys; from uvit.cli.main import main; main(sys.argv[1:]); print({'torch', 'numpy'} & {*sys.modules})"
    for command in ("list", "verify"):
        done = subprocess.run(
            [sys.executable, "-c", code, "checkpoints", command, str(run)], capture_output=True, text=True
        )
        assert done.stdout.endswith("set()\n"), done.stdout + done.stderr
