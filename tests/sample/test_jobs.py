from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uvit.config.sample import SampleConfig
from uvit.errors import UserError
from uvit.sample.jobs import ImageJob, image_jobs, job_batches, list_variants, short_names


@pytest.fixture
def pipelines(tmp_path: Path) -> list[str]:
    """Folders that look like pipelines from afar."""
    paths = [tmp_path / name / "pipeline" for name in ("small", "large")]
    for path in paths:
        path.mkdir(parents=True)
        (path / "model_index.json").write_text("{}")
    return [str(path) for path in paths]


@pytest.mark.parametrize(
    ("number", "prompt", "name"),
    [
        (0, "A red circle, on a BLUE background!", "00000-a-red-circle-on-a-blue-background.png"),
        (12, "一个红色的圆", "00012-一个红色的圆.png"),
        (3, "../../etc/passwd", "00003-etc-passwd.png"),
        (4, "", "00004-empty.png"),
        (123456, "a", "123456-a.png"),
    ],
)
def test_file_name(number: int, prompt: str, name: str) -> None:
    assert ImageJob(number, prompt, 0).file_name == name


def test_file_names_fit_any_file_system() -> None:
    assert len(ImageJob(0, "圆" * 500, 0).file_name.encode()) < 255


def test_each_picture_has_the_number_and_seed_after_the_one_before() -> None:
    config = SampleConfig("p", seed=7, num_images_per_prompt=2)
    assert image_jobs(config, ["a", "b"], 3) == [
        ImageJob(3, "a", 7), ImageJob(4, "a", 8), ImageJob(5, "b", 9), ImageJob(6, "b", 10)
    ]  # fmt: skip


@given(number=st.integers(0, 40), batch_size=st.integers(1, 9), num_parts=st.integers(1, 5))
def test_parts_are_whole_batches_of_the_same_cut(number: int, batch_size: int, num_parts: int) -> None:
    pictures = [ImageJob(i, "a", i) for i in range(number)]
    whole = job_batches(pictures, batch_size, 0, 1)
    assert [picture for batch in whole for picture in batch] == pictures
    parts = [job_batches(pictures, batch_size, part, num_parts) for part in range(num_parts)]
    assert sorted((batch for part in parts for batch in part), key=lambda batch: batch[0].number) == whole


def test_one_way_of_drawing_needs_no_folder_of_its_own(pipelines: list[str], tmp_path: Path) -> None:
    (variant,) = list_variants(SampleConfig(pipelines[0], output_dir=str(tmp_path / "out")))
    assert (variant.name, variant.folder, variant.guidance_scale) == ("", tmp_path / "out", 7.5)


def test_several_are_named_after_what_tells_them_apart(pipelines: list[str], tmp_path: Path) -> None:
    def names(**flags) -> list[tuple[str, str]]:  # type: ignore[no-untyped-def]
        config = SampleConfig(str(tmp_path / "small"), output_dir=str(tmp_path / "out"), **flags)
        return [(variant.name, str(variant.folder.relative_to(tmp_path / "out"))) for variant in list_variants(config)]

    assert names(guidance_scale=(2, 7.5, 2)) == [("guidance 2", "guidance-2"), ("guidance 7.5", "guidance-7.5")]
    assert names(compare_with=(pipelines[1],)) == [("small", "small"), ("large", "large")]
    assert [name for name, _ in names(compare_with=(pipelines[1],), guidance_scale=(1.0, 2.0))] == [
        "small guidance 1", "small guidance 2", "large guidance 1", "large guidance 2"
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"--compare_with .*: two pipelines cannot be distinguished"):
        names(compare_with=(pipelines[0],))


def test_short_names() -> None:
    assert short_names([Path("out/a/pipeline"), Path("out/b/pipeline")]) == ["a", "b"]
    assert short_names([Path("out/a/1/pipeline"), Path("out/b/2/pipeline")]) == ["a-1", "b-2"]
    assert short_names([Path("out/run-1"), Path("out/run-2")]) == ["run-1", "run-2"]
    assert short_names([Path("out/a")]) == [""]
