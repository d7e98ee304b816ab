import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.sample.parts import tiny_pipeline_folder
from uvit.cli.main import main
from uvit.config.sample import SampleConfig
from uvit.errors import UserError
from uvit.sample.generate import file_name, generate, read_prompts, sample
from uvit.sample.pipeline import UViTPipeline
from uvit.sample.schedulers import build_scheduler

PROMPTS = ["a red circle", "a small green square", "two cats", "一个红色的圆", ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline_folder(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture
def pipeline(folder: Path) -> UViTPipeline:
    pipeline = UViTPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def arguments(folder: Path, output_dir: Path, *more: str) -> list[str]:
    fixed = "--num_inference_steps=2", "--disable_tqdm", "--device=cpu"
    return ["sample", f"--pipeline={folder}", f"--output_dir={output_dir}", *fixed, *more]


def opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        image.load()
    return image


def pictures(output_dir: Path) -> list[str]:
    return sorted(path.name for path in output_dir.iterdir() if path.name != "contact_sheet.png")


@pytest.mark.parametrize("scheduler", ["dpmsolver++", "ddpm"])
def test_an_image_is_its_seed_whatever_the_batch(pipeline: UViTPipeline, scheduler: str) -> None:
    pipeline.scheduler = build_scheduler(scheduler)
    runs = [list(generate(pipeline, PROMPTS, range(10, 15), batch_size, 2.0, 4)) for batch_size in (1, 2, 5, 8)]
    assert [item[:3] for item in runs[0]] == [(i, PROMPTS[i], 10 + i) for i in range(5)]
    arrays = [np.stack([np.asarray(item[3]) for item in run]).astype(int) for run in runs]
    for array in arrays[1:]:  # measured: 1.4e-6 apart before rounding to 255 levels, which tips 1 value in 10,000
        assert np.abs(array - arrays[0]).max() <= 1
        assert (array != arrays[0]).mean() < 1e-3
    assert np.abs(arrays[0][0] - arrays[0][1]).max() > 10
    (alone,) = generate(pipeline, PROMPTS[3:4], [13], 1, 2.0, 4)
    assert np.array_equal(np.asarray(alone[3]), arrays[0][3])


def test_writes_pictures_with_what_made_them(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    more = (
        "--seed=7",
        "--num_images_per_prompt=2",
        "--negative_prompt=blue",
        "--scheduler=ddim",
        "--batch_size=3",
    )
    assert main(arguments(folder, tmp_path, "A red circle!", "two cats", *more)) == 0
    assert pictures(tmp_path) == [
        "00000-a-red-circle.png", "00001-a-red-circle.png", "00002-two-cats.png", "00003-two-cats.png"
    ]  # fmt: skip
    image = opened(tmp_path / "00002-two-cats.png")
    assert image.size == (32, 32)
    assert image.text.pop("software").startswith("uvit ")
    assert image.text == {
        "prompt": "two cats",
        "seed": "9",
        "negative_prompt": "blue",
        "scheduler": "ddim",
        "guidance_scale": "7.5",
        "num_inference_steps": "2",
        "pipeline": str(folder),
        "dtype": "float32",
    }
    sheet = opened(tmp_path / "contact_sheet.png")
    assert sheet.height > sheet.width  # two columns of two pictures with their prompts beneath
    out = capsys.readouterr().out
    assert f"4 images in {tmp_path}" in out
    assert str(tmp_path / "contact_sheet.png") in out


def test_metadata_redraws_the_picture(folder: Path, tmp_path: Path) -> None:
    assert main(arguments(folder, tmp_path / "a", "a red circle", "two cats", "--seed=3")) == 0
    text = opened(tmp_path / "a" / "00001-two-cats.png").text
    assert main(arguments(folder, tmp_path / "b", text["prompt"], f"--seed={text['seed']}")) == 0
    first, again = (
        np.asarray(opened(tmp_path / name)).astype(int) for name in ("a/00001-two-cats.png", "b/00000-two-cats.png")
    )
    assert np.abs(first - again).max() <= 1


def test_a_second_run_adds_and_overwrites_nothing(folder: Path, tmp_path: Path) -> None:
    for _ in range(2):
        assert main(arguments(folder, tmp_path, "two cats", "green")) == 0
    assert pictures(tmp_path) == [
        "00000-two-cats.png", "00001-green.png", "00002-two-cats.png", "00003-green.png"
    ]  # fmt: skip


def test_columns(folder: Path, tmp_path: Path) -> None:
    assert main(arguments(folder, tmp_path, "a", "b", "--columns=1")) == 0
    narrow = opened(tmp_path / "contact_sheet.png").size
    assert main(arguments(folder, tmp_path, "a", "b", "--columns=2")) == 0
    assert opened(tmp_path / "contact_sheet.png").width > narrow[0]


def test_dtype_and_progress_bar(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(arguments(folder, tmp_path, "a", "--dtype=bfloat16", "--guidance_scale=1")) == 0
    assert "denoising" not in capsys.readouterr().err
    assert main([*arguments(folder, tmp_path, "a"), "--disable_tqdm=False"]) == 0
    assert "denoising" in capsys.readouterr().err
    assert opened(tmp_path / "00000-a.png").text["dtype"] == "bfloat16"


def test_prompts_from_arguments_file_and_pipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("two cats\n\n  一个红色的圆 \n", encoding="utf-8")
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    config = SampleConfig(pipeline="p", prompts=("a", "-", "b"), prompts_file=str(file))
    assert read_prompts(config) == ["a", "one", "two", "b", "two cats", "一个红色的圆"]
    monkeypatch.setattr("sys.stdin", io.StringIO("piped\n"))
    assert read_prompts(SampleConfig(pipeline="p")) == ["piped"]
    assert read_prompts(SampleConfig(pipeline="p", prompts=("a",))) == ["a"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"prompts": ()}, "--prompts: there is none"),
        ({"prompts_file": "absent.txt"}, "--prompts_file absent.txt"),
        ({"pipeline": "absent"}, "--pipeline absent: there is no such folder"),
        ({"pipeline": "."}, "--pipeline .: has no model_index.json"),
        ({"device": "gpu9"}, "--device gpu9"),
    ],
)
def test_mistakes_are_named(
    folder: Path, flags: dict, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    with pytest.raises(UserError, match=message):
        sample(SampleConfig(**{"pipeline": str(folder), "prompts": ("a",)} | flags))
    assert not list(tmp_path.iterdir())


def test_pipeline_must_be_named(capsys: pytest.CaptureFixture) -> None:
    assert main(["sample", "a red circle"]) == 2
    assert "--pipeline" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("number", "prompt", "name"),
    [
        (0, "A red circle, on a BLUE background!", "00000-a-red-circle-on-a-blue-background.png"),
        (12, "一个红色的圆", "00012-一个红色的圆.png"),
        (3, "../../etc/passwd", "00003-etc-passwd.png"),
        (4, "", "00004-empty.png"),
    ],
)
def test_file_name(number: int, prompt: str, name: str) -> None:
    assert file_name(number, prompt) == name


def test_file_names_fit_any_file_system() -> None:
    assert len(file_name(0, "圆" * 500).encode()) < 255


def test_noise_is_the_same_on_every_device_and_dtype(pipeline: UViTPipeline) -> None:
    drawn = pipeline.to(torch.bfloat16)._noise((1, 4, 8, 8), torch.Generator().manual_seed(0), None)
    assert torch.equal(drawn, torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)))
