"""Reports have every number, no NaN, and the command that makes them again."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from uvit.cli.parse import parse
from uvit.config.evaluate import EvaluateConfig
from uvit.errors import UserError
from uvit.evaluate.measure import Score
from uvit.evaluate.prompts import Prompt
from uvit.evaluate.write_report import command_line, markdown, notes_on, notes_on_protocol, summarise, write_report

REPORT: dict[str, Any] = {
    "command": "uvit evaluate x",
    "results": [{"label": "", "scores": [{"name": "fid", "value": 12.5, "better": "lower"}], "images": [{}]}],
    "notes": ["mind this"],
    "reference": {"num_images": 3, "inner": {"a": 0.123456789}},
}


def test_the_report_in_both_forms(tmp_path: Path) -> None:
    write_report(tmp_path, REPORT)
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["format"] == "uvit evaluation" and content["results"] == REPORT["results"]
    text = (tmp_path / "report.md").read_text()
    assert "| - | 12.5 |" in text and "- mind this" in text and "  - a: 0.123457" in text


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_report_with_a_nan_is_not_written(tmp_path: Path, bad: float) -> None:
    report = {**REPORT, "reference": {"inner": [1.0, {"a": bad}]}}
    with pytest.raises(UserError, match=r"^report.reference.inner.1.a is NaN or infinite; nothing was written"):
        write_report(tmp_path, report)
    assert not list(tmp_path.iterdir())


def test_the_command_line_gives_the_same_config() -> None:
    config = EvaluateConfig(
        "a b/run", "out", guidance_scale=(1.0, 2.5), metrics=("fid", "kid"), protocol="uvit-coco", ema=("raw",)
    )
    words = shlex.split(command_line(config))
    assert words[:2] == ["uvit", "evaluate"]
    assert parse(EvaluateConfig, words[2:], "uvit evaluate", ("model",))[0] == config


def test_repeats_are_summarised_by_mean_and_sample_deviation() -> None:
    repeats = [[Score("fid", value, "lower", details={"at_infinity": value - 1})] for value in (1.0, 2.0, 3.0)]
    [row] = summarise(repeats)
    assert (row["value"], row["deviation"], row["values"]) == (2.0, 1.0, [1.0, 2.0, 3.0])
    assert row["details"] == {"at_infinity": 1.0}  # of the mean, as the value
    kids = [[Score("kid", value, "lower", value - 1, value + 1, {"subsets": 7})] for value in (1.0, 2.0)]
    [row] = summarise(kids)
    assert "interval" not in row and str(row["details"]) == "{'subsets': 7}"
    [single] = summarise([[Score("kid", 1.0, "lower", 0.5, 1.5)]])
    assert "deviation" not in single and single["interval"] == [0.5, 1.5]


def test_notes_name_small_sets_lossy_files_and_what_was_left_out() -> None:
    problem = {"id": "a", "message": "a.png: the image of a cannot be decoded"}
    notes = notes_on({"lossy_files": 3}, {"problems": [problem]}, 100, ["fid", "kid"])
    assert len(notes) == 3
    assert notes[0].startswith("fid of 100 images is too large") and "JPEG" in notes[1] and "a.png" in notes[2]
    assert notes_on({"pixels_sha256": "a"}, {"pixels_sha256": "a"}, 100, ["kid"]) != []
    assert notes_on({"pixels_sha256": "a"}, {"pixels_sha256": "b"}, 100, ["kid"]) == []
    assert notes_on({"pixels_sha256": "a"}, {}, 100, ["kid"]) == []
    assert notes_on({}, {}, 30_000, ["fid"]) == notes_on({}, {}, 100, ["kid"]) == []


def test_notes_say_where_a_protocol_is_not_kept() -> None:
    def notes(protocol: str | None, number: int, side: int) -> list[str]:
        config = EvaluateConfig("model", "out", protocol=protocol)  # type: ignore[arg-type]
        return notes_on_protocol(config.resolved(), {"resolution": [side, side]}, [Prompt("a cat", "1")] * number)

    assert notes("uvit-coco", 30_000, 256) == notes("geneval", 3, 256) == notes("shapes", 3, 32) == []
    [note] = notes("uvit-coco", 3, 256)
    assert note.startswith("These 3 prompts are not those of the protocol uvit-coco, which has 30,000.")
    [note] = notes("coco-5k", 5000, 256)
    assert "coco-5k (SHA-256 328d84af...)" in note and "captions_val2017.json" in note
    assert notes("geneval", 3, 32) == ["The model generates 32 x 32 pixels; the protocol is one of 256."]
    assert notes(None, 3, 32) == []


def test_problems_are_listed_but_not_by_the_thousand() -> None:
    problems = [{"id": str(i), "message": f"{i}.png: is broken"} for i in range(1234)]
    report = {
        "command": "uvit",
        "results": [{"label": "", "scores": []}],
        "notes": [],
        "images": {"problems": problems},
    }
    text = markdown(report)
    assert "  - 9.png: is broken\n  - and 1,224 more\n" in text and "10.png" not in text
