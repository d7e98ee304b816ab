"""Two reports: what they compare, whether they may be compared, and how sure the difference is."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from uvit.config.evaluate import EvaluateCompareConfig
from uvit.errors import UserError
from uvit.evaluate.compare import compare_reports, not_comparable, verdicts

REPORT: dict[str, Any] = {
    "format": "uvit evaluation",
    "version": 1,
    "results": [
        {
            "label": "",
            "scores": [{"name": "fid", "value": 10.0, "better": "lower", "deviation": 0.1, "values": [9.9, 10, 10.1]}],
            "images": [{"unet_sha256": "a", "guidance_scale": 2.0, "num_images": 100}],
        }
    ],
    "reference": {"num_images": 100, "pixels_sha256": "r"},
    "prompts": {"num_prompts": 100, "sha256": "p"},
    "extractors": {"inception": {"weights_sha256": "w", "input": "pytorch-fid"}},
    "settings": {"kid_subsets": 100},
}


def changed(*path: Any, to: Any) -> dict[str, Any]:
    report = copy.deepcopy(REPORT)
    place: Any = report
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = to
    return report


def write(folder: Path, report: dict[str, Any]) -> str:
    folder.mkdir()
    (folder / "report.json").write_text(json.dumps(report))
    return str(folder)


def test_a_better_model_is_said_to_be_better(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = changed("results", 0, "scores", 0, to={**REPORT["results"][0]["scores"][0], "value": 9.0})
    other["results"][0]["images"][0]["unet_sha256"] = "b"
    reports = (write(tmp_path / "a", REPORT), write(tmp_path / "b", other))
    assert compare_reports(EvaluateCompareConfig(reports)) == 0
    out = capsys.readouterr().out
    assert "unet_sha256: in the first report a, in the second b\n" in out
    assert "fid: 10 and 9, better in the second; the difference 1 is more than" in out


@pytest.mark.parametrize(
    ("path", "name"),
    [
        (("results", 0, "images", 0, "num_images"), "images.num_images"),
        (("reference", "pixels_sha256"), "reference.pixels_sha256"),
        (("reference", "num_images"), "reference.num_images"),
        (("prompts", "sha256"), "prompts.sha256"),
        (("extractors", "inception", "input"), "extractors.inception.input"),
        (("settings", "kid_subsets"), "settings.kid_subsets"),
    ],
)
def test_the_line_that_makes_two_protocols_is_named(path: tuple[Any, ...], name: str) -> None:
    [obstacle] = not_comparable(REPORT, changed(*path, to="other"))
    assert obstacle.startswith(f"{name}: in the first report ") and obstacle.endswith(", in the second other")


def test_reports_that_cannot_be_compared_end_with_status_1(tmp_path: Path) -> None:
    reports = (write(tmp_path / "a", REPORT), write(tmp_path / "b", changed("reference", "num_images", to=7)))
    assert compare_reports(EvaluateCompareConfig(reports)) == 1


def test_what_may_differ_and_extractors_of_other_metrics_are_no_obstacle() -> None:
    assert not list(not_comparable(REPORT, changed("results", 0, "images", 0, "guidance_scale", to=3.0)))
    more = changed("extractors", to={**REPORT["extractors"], "clip": {"weights_sha256": "c"}})
    assert not list(not_comparable(REPORT, more))


def score(value: float, **more: Any) -> list[dict[str, Any]]:
    return [{"name": "kid", "value": value, "better": "lower", **more}]


def test_how_sure_a_difference_is() -> None:
    repeats = {"deviation": 0.1, "values": [0, 0, 0, 0]}  # a standard error of 0.05 each, of 0.0707 the difference
    assert "is not more than" in next(verdicts(score(1.0, **repeats), score(1.13, **repeats)))
    assert "is more than" in next(verdicts(score(1.0, **repeats), score(1.15, **repeats)))
    assert "overlap, so" in next(verdicts(score(1.0, interval=[0.9, 1.1]), score(1.15, interval=[1.05, 1.2])))
    assert "do not overlap" in next(verdicts(score(1.0, interval=[0.9, 1.1]), score(1.3, interval=[1.2, 1.4])))
    assert "--repeats 3" in next(verdicts(score(1.0), score(2.0)))
    assert "better in the first" in next(verdicts(score(1.0), score(2.0)))


@pytest.mark.parametrize("more", [{}, {"interval": [0.9, 1.1]}, {"deviation": 0.1, "values": [0.9, 1.1]}])
def test_of_equal_scores_nothing_more_is_said(more: dict[str, Any]) -> None:
    assert list(verdicts(score(1.0, **more), score(1.0, **more))) == ["kid: 1 and 1, the same"]


def test_the_interval_of_one_repeat_is_not_compared() -> None:
    """Reports of earlier versions have it beside the mean of several."""
    repeats = {"deviation": 0.1, "values": [1.0, 1.2], "interval": [0.9, 1.1]}
    assert "--repeats 3" in next(verdicts(score(1.1, **repeats), score(1.5, interval=[1.4, 1.6])))


def test_other_files_are_refused(tmp_path: Path) -> None:
    report = write(tmp_path / "a", REPORT)
    (tmp_path / "b.json").write_text("{}")
    (tmp_path / "c.json").write_text(json.dumps({**REPORT, "results": [{}]}))
    for other in ("b.json", "c.json", "nothing"):
        with pytest.raises(UserError, match=r"is not the report.json of an evaluation"):
            compare_reports(EvaluateCompareConfig((report, str(tmp_path / other))))


def test_of_a_sweep_the_first_setting_is_compared_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = changed("results", to=[{**REPORT["results"][0], "label": f"guidance_scale {scale}"} for scale in (2, 3)])
    compare_reports(EvaluateCompareConfig((write(tmp_path / "a", REPORT), write(tmp_path / "b", sweep))))
    assert "b/report.json: has 2 settings; the first one is compared: guidance_scale 2\n" in capsys.readouterr().out
