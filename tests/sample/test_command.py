import hashlib
import io
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.sample.parts import tiny_pipeline_folder
from uvit.cli.main import main
from uvit.config.sample import SampleConfig
from uvit.errors import UserError
from uvit.images import center_crop
from uvit.progress import Progress
from uvit.sample.command import read_prompts, sample, sample_batch
from uvit.sample.pipeline import UViTPipeline
from uvit.sample.schedulers import build_scheduler
from uvit.weights.encoders import fingerprint

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

    def images_of(numbers: range, batch_size: int) -> np.ndarray:
        """(N, H, W, 3), of prompts of these numbers and their seeds."""
        images, progress = [], Progress("images", len(numbers), "image", bar=False, lines=False)
        for batch in (numbers[i : i + batch_size] for i in range(0, len(numbers), batch_size)):
            prompts, seeds = [PROMPTS[i] for i in batch], [10 + i for i in batch]
            images += sample_batch(pipeline, prompts, seeds, progress, guidance_scale=2.0, num_inference_steps=4)[0]
        return np.stack([np.asarray(image) for image in images]).astype(int)

    arrays = [images_of(range(5), batch_size) for batch_size in (1, 2, 5)]
    for array in arrays[1:]:  # measured: 1.4e-6 apart before rounding to 255 levels, which tips 1 value in 10,000
        assert np.abs(array - arrays[0]).max() <= 1
        assert (array != arrays[0]).mean() < 1e-3
    assert np.abs(arrays[0][0] - arrays[0][1]).max() > 10
    assert np.array_equal(images_of(range(3, 4), 1)[0], arrays[0][3])


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
    assert len(image.text.pop("pipeline_sha256")) == 64
    assert image.text == {
        "prompt": "two cats",
        "seed": "9",
        "negative_prompt": "blue",
        "scheduler": "ddim",
        "guidance_scale": "7.5",
        "guidance_interval": "1 1000",
        "num_inference_steps": "2",
        "pipeline": str(folder),
        "unet_sha256": fingerprint(UViTPipeline.from_pretrained(folder).unet),
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


def test_a_negative_prompt_without_guidance_is_said_to_do_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for scale, times in (("1", 1), ("2", 0)):
        assert main(arguments(folder, tmp_path, "a", "--negative_prompt=blue", f"--guidance_scale={scale}")) == 0
        assert capsys.readouterr().out.count("--negative_prompt: has no effect at --guidance_scale 1") == times


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
    wide = opened(tmp_path / "contact_sheet.png").size
    assert wide[0] > narrow[0]
    assert main(arguments(folder, tmp_path, "a", "b", "--columns=1000")) == 0
    assert opened(tmp_path / "contact_sheet.png").size == wide
    assert main(arguments(folder, tmp_path, "a", "--num_images_per_prompt=25")) == 0
    assert opened(tmp_path / "contact_sheet.png").width < 6 * wide[0] / 2, "a square: no row of 25"


def test_dtype_and_progress(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(arguments(folder, tmp_path, "a", "--dtype=bfloat16", "--guidance_scale=1")) == 0
    last = capsys.readouterr().err.splitlines()[-1]  # a CPU may be said to have no fast bfloat16
    assert last.startswith("sample: 1/1 images (100%), ")
    assert opened(tmp_path / "00000-a.png").text["dtype"] == "bfloat16"


def test_prompts_from_arguments_file_and_pipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("two cats\n\n  一个红色的圆 \n", encoding="utf-8-sig")
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    config = SampleConfig(pipeline="p", prompts=("a", "-", "b"), prompts_file=str(file))
    assert read_prompts(config) == ["a", "one", "two", "b", "two cats", "一个红色的圆"]
    monkeypatch.setattr("sys.stdin", io.StringIO("piped\n"))
    assert read_prompts(SampleConfig(pipeline="p")) == ["piped"]
    assert read_prompts(SampleConfig(pipeline="p", prompts=("a",))) == ["a"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"prompts": ()}, "--prompts: there are none"),
        ({"prompts_file": "absent.txt"}, "--prompts_file absent.txt"),
        ({"pipeline": "absent"}, "--pipeline absent: there is no such folder"),
        ({"compare_with": ("absent",)}, "--compare_with absent: there is no such folder"),
        ({"init_image": "absent.png"}, "--init_image absent.png: cannot be read"),
        ({"device": "gpu9"}, "--device gpu9"),
        ({"output_dir": "/dev/null/x"}, "--output_dir /dev/null/x: /dev/null is not a folder"),
        ({"prompts": ("caf\udce9",)}, r"the prompt 'caf.udce9': is not UTF-8"),
        ({"speed": "fast"}, r"--pipeline .*: no solver of 8 steps"),
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


def test_what_comes_out_as_no_numbers_is_not_written(folder: Path, tmp_path: Path) -> None:
    copy = UViTPipeline.from_pretrained(folder)
    torch.nn.init.constant_(copy.unet.norm.bias, torch.nan)
    copy.save_pretrained(tmp_path / "copy")
    with pytest.raises(UserError, match="'a': the image is NaN"):
        sample(SampleConfig(str(tmp_path / "copy"), ("a",), output_dir=str(tmp_path / "out"), num_inference_steps=2))
    assert not (tmp_path / "out").exists()


def test_pipeline_must_be_named(capsys: pytest.CaptureFixture) -> None:
    assert main(["sample", "a red circle"]) == 2
    assert "--pipeline" in capsys.readouterr().err


def test_noise_is_the_same_on_every_device_and_dtype(pipeline: UViTPipeline) -> None:
    drawn = pipeline.to(torch.bfloat16)._noise((1, 4, 8, 8), torch.Generator().manual_seed(0), None)
    assert torch.equal(drawn, torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)))


# Pictures to begin with


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """48 x 32 pixels, whose middle square is noise."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_init_image_and_mask(folder: Path, tmp_path: Path, photo: Path) -> None:
    mask = np.zeros((32, 48), dtype=np.uint8)
    mask[:, 20:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    begin = "--guidance_scale=1", f"--init_image={photo}", "--batch_size=2", "a", "b"
    assert main(arguments(folder, tmp_path / "changed", "--strength=0.5", *begin)) == 0
    assert main(arguments(folder, tmp_path / "masked", f"--mask={tmp_path / 'mask.png'}", *begin)) == 0
    middle = np.asarray(opened(photo))[:, 8:40]
    for name in ("00000-a.png", "00001-b.png"):
        changed, masked = (np.asarray(opened(tmp_path / kind / name)) for kind in ("changed", "masked"))
        assert changed.shape == middle.shape
        assert (changed != middle).mean() > 0.9
        assert np.array_equal(masked[:, :12], middle[:, :12])
        assert (masked[:, 12:] != middle[:, 12:]).mean() > 0.9
    text = opened(tmp_path / "masked" / "00000-a.png").text
    assert text["init_image"] == str(photo)
    assert text["mask_sha256"] == hashlib.sha256((tmp_path / "mask.png").read_bytes()).hexdigest()


def test_a_mask_is_of_the_image_s_size(folder: Path, tmp_path: Path, photo: Path) -> None:
    Image.new("L", (32, 32)).save(tmp_path / "mask.png")
    config = SampleConfig(str(folder), ("a",), init_image=str(photo), mask=str(tmp_path / "mask.png"))
    with pytest.raises(UserError, match=r"--mask .*: has 32 x 32 pixels, and --init_image has 48 x 32"):
        sample(config)


def test_too_few_steps_for_the_default_strength(
    folder: Path, tmp_path: Path, photo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(folder, tmp_path / "out", f"--init_image={photo}", "--num_inference_steps=1", "a")) == 2
    assert "strength 0.8 of 1 steps is less than one step; raise one of them" in capsys.readouterr().err


def test_an_image_that_fits_is_taken_as_it_is(photo: Path) -> None:
    image = opened(photo)
    assert np.array_equal(np.asarray(center_crop(image, (48, 32))), np.asarray(image))
    assert np.array_equal(np.asarray(center_crop(image, (32, 32))), np.asarray(image)[:, 8:40])


# Side by side


def test_variants_are_drawn_from_the_same_seeds_and_shown_side_by_side(folder: Path, tmp_path: Path) -> None:
    other = tiny_pipeline_folder(tmp_path / "other", "v_prediction")
    more = "a", "b", "--guidance_scale", "1", "2", f"--compare_with={other}"
    assert main(arguments(folder, tmp_path / "out", *more)) == 0
    folders = sorted(path for path in (tmp_path / "out").iterdir() if path.is_dir())
    assert len(folders) == 4
    assert [path.name.endswith(f"guidance-{scale}") for path in folders for scale in (1, 2)].count(True) == 4
    assert all(pictures(path) == ["00000-a.png", "00001-b.png"] for path in folders)
    drawn = {np.asarray(opened(path / "00001-b.png")).tobytes() for path in folders}
    assert len(drawn) == 4
    assert {opened(path / "00001-b.png").text["seed"] for path in folders} == {"1"}
    sheet = opened(tmp_path / "out" / "contact_sheet.png")
    assert sheet.width > 1.5 * sheet.height  # four columns, two rows
    assert "guidance_scale" not in sheet.text

    assert main(arguments(folder, tmp_path / "alone", "a", "b", "--guidance_scale=2")) == 0
    scale_2 = [path for path in folders if opened(path / "00001-b.png").text["pipeline"] == str(folder)][1]
    assert (scale_2 / "00001-b.png").read_bytes() == (tmp_path / "alone" / "00001-b.png").read_bytes()


def test_no_contact_sheet_where_none_is_wanted(folder: Path, tmp_path: Path) -> None:
    assert main(arguments(folder, tmp_path, "a", "--no_grid")) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["00000-a.png"]


# In parts, and again


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_parts_draw_together_what_one_process_draws(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(f"number {i}" for i in range(7)))
    more = f"--prompts_file={tmp_path / 'prompts.txt'}", "--batch_size=2", "--seed=5", "--save_latents=npy"
    assert main(arguments(folder, tmp_path / "one", *more)) == 0
    for part in (2, 0):
        assert main(arguments(folder, tmp_path / "parts", *more, f"--shard={part}/3")) == 0
        assert "contact_sheet.png" not in contents(tmp_path / "parts")
    monkeypatch.setenv("WORLD_SIZE", "3")  # as torchrun says it
    monkeypatch.setenv("RANK", "1")
    assert main(arguments(folder, tmp_path / "parts", *more)) == 0
    assert contents(tmp_path / "parts") == contents(tmp_path / "one")
    assert "2 images in" in capsys.readouterr().out.splitlines()[-1]


def test_an_interrupted_run_goes_on(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    more = "a", "b", "c", "d", "--batch_size=2", "--save_latents=safetensors"
    assert main(arguments(folder, tmp_path, *more)) == 0
    whole = contents(tmp_path)
    for name in ("00001-b.png", "00002-c.png", "00002-c.safetensors", "contact_sheet.png"):
        (tmp_path / name).unlink()
    (tmp_path / "00003-d.safetensors").unlink()  # its picture alone is not all
    kept = (tmp_path / "00000-a.png").stat().st_mtime_ns
    assert main(arguments(folder, tmp_path, *more, "--skip_existing")) == 0
    assert contents(tmp_path) == whole
    assert (tmp_path / "00000-a.png").stat().st_mtime_ns == kept
    assert "4 images in" in (out := capsys.readouterr().out)
    assert "1 of them existed already" in out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["x", "b", "--skip_existing"], "prompt: was a, now x"),
        (["a", "b", "--skip_existing", "--seed=1"], "seed: was 0, now 1"),
        (["a", "b", "--skip_existing", "--negative_prompt=c"], "negative_prompt: was not set, now c"),
        (["a", "b", "--shard=0/2"], "exists already; add --skip_existing"),
    ],
)
def test_other_pictures_are_never_taken_for_one_s_own_nor_overwritten(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, change: list[str], message: str
) -> None:
    assert main(arguments(folder, tmp_path, "a", "b")) == 0
    before = contents(tmp_path)
    assert main(arguments(folder, tmp_path, *change)) == 2
    assert message in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_nothing_is_written_before_all_is_compared(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Not in the batches before the first image that was made otherwise, nor in the variants before its own."""
    for more in ([], ["--guidance_scale", "1", "2"]):
        output_dir = tmp_path / str(len(more))
        given = arguments(folder, output_dir, "a", "b", "--batch_size=1", *more)
        assert main(given) == 0
        for path in sorted(output_dir.rglob("00000-a.png"))[:1]:
            path.unlink()
        before = {path: path.read_bytes() for path in output_dir.rglob("*.png")}
        assert main([*given, "--skip_existing", "--num_inference_steps=3"]) == 2
        assert "num_inference_steps: was" in capsys.readouterr().err
        assert {path: path.read_bytes() for path in output_dir.rglob("*.png")} == before


@pytest.mark.parametrize("part", ["vqvae", "text_encoder"])
def test_images_of_another_vae_or_text_encoder_are_not_taken(
    part: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    other = shutil.copytree(folder, tmp_path / "other")
    (path,) = (other / part).glob("*.safetensors")
    save_file({name: value * 1.5 for name, value in load_file(path).items()}, path, {"format": "pt"})
    assert main(arguments(folder, tmp_path / "out", "a")) == 0
    before = contents(tmp_path / "out")
    assert main(arguments(folder, tmp_path / "out", "a", "--skip_existing")) == 0
    assert main(arguments(other, tmp_path / "out", "a", "--skip_existing")) == 2
    assert "pipeline_sha256: was" in capsys.readouterr().err
    assert contents(tmp_path / "out") == before


# Speaking with people


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_it_asks(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("sys.stdin", Terminal("a\n/seed 7\n\n/num_images_per_prompt 2\nb\nc\n"))
    assert main(arguments(folder, tmp_path)) == 0
    assert pictures(tmp_path) == ["00000-a.png", "00001-b.png", "00002-b.png", "00003-c.png", "00004-c.png"]
    assert [opened(tmp_path / name).text["seed"] for name in pictures(tmp_path)] == ["0", "7", "8", "9", "10"]
    out = capsys.readouterr().out
    assert out.index(str(tmp_path / "00000-a.png")) < out.index("/seed 7") < out.index(str(tmp_path / "00001-b.png"))
    assert out.count("contact_sheet.png") == 2


def test_what_several_processes_share_is_no_terminal(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for more in (["--shard=0/2"], ["--skip_existing"], ["--num_inference_steps=2"]):
        monkeypatch.setattr("sys.stdin", None if "--num_inference_steps=2" in more else Terminal("a\n"))
        assert main(arguments(folder, tmp_path, *more)) == 2
        assert "--prompts: there are none" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", io.StringIO("a\n"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert main(arguments(folder, tmp_path)) == 2
    assert "--prompts -: several processes" in capsys.readouterr().err


def test_what_is_cut_off_a_prompt_is_said_once(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    long = "a red circle " * 6 + "elephant"
    assert main(arguments(folder, tmp_path, long, "--num_images_per_prompt=3", "--batch_size=1")) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(lines) == 1
    assert "uvit sample: warning: the model reads 16 tokens; cut off:" in lines[0]
    assert "elephant' of 'a red circle" in lines[0]


def test_options_that_spare_memory(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(arguments(folder, tmp_path / "a", "a", "b")) == 0
    assert main(arguments(folder, tmp_path / "b", "a", "b", "--enable_vae_slicing", "--enable_vae_tiling")) == 0
    for name in ("00000-a.png", "00001-b.png"):
        one, other = (np.asarray(opened(tmp_path / kind / name)).astype(int) for kind in "ab")
        assert np.abs(one - other).max() <= 1
    assert main(arguments(folder, tmp_path / "c", "a", "--enable_model_cpu_offload")) == 2
    assert "--enable_model_cpu_offload: saves GPU memory, and --device cpu" in capsys.readouterr().err


def test_fit_schedule_makes_the_speeds(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder, output_dir = tiny_pipeline_folder(tmp_path), tmp_path / "samples"
    common = ["sample", f"--pipeline={folder}", "a red circle", "two cats", "--device=cpu", "--disable_tqdm"]
    fast = [*common, f"--output_dir={output_dir}", "--speed=fast"]
    assert main([*fast, "--guidance_scale=2"]) == 2
    assert "no solver of 8 steps is fitted for guidance 2 (fitted: none)" in capsys.readouterr().err
    assert main([*common, "--fit_schedule", "--guidance_scale=2", "--num_images_per_prompt=3"]) == 2
    assert "--fit_schedule: 6 images are too few" in capsys.readouterr().err

    assert main([*common, "--fit_schedule", "--guidance_scale=2", "--num_images_per_prompt=4"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in said] == [
        "--speed fast, 8 steps for guidance 2", "--speed balanced, 12 steps for guidance 2",
        "--speed quality, 24 steps for guidance 2"
    ]  # fmt: skip
    assert all(float(line.split("error ")[1].split("%")[0]) < 5 for line in said)
    assert not output_dir.exists()
    assert main([*fast, "--fit_schedule"]) == 2
    assert f"--output_dir {output_dir}: --fit_schedule generates no images" in capsys.readouterr().err

    assert main([*fast, "--guidance_scale=2"]) == 0
    (tmp_path / "close").mkdir()
    close = [*common, f"--output_dir={tmp_path / 'close'}", "--guidance_scale=2", "--num_inference_steps=200"]
    assert main(close) == 0
    for name in pictures(output_dir):
        drawn, wanted = (opened(path / name) for path in (output_dir, tmp_path / "close"))
        assert np.abs(np.asarray(drawn).astype(int) - np.asarray(wanted)).mean() < 4
        assert (drawn.text["scheduler"], drawn.text["num_inference_steps"]) == ("fitted", "8")
    assert main([*fast, "--guidance_scale=3"]) == 2
    assert "(fitted: 8 for guidance 2; 12 for guidance 2; 24 for guidance 2)" in capsys.readouterr().err
