import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from uvit.config.sample import SampleConfig
from uvit.errors import UserError
from uvit.sample.files import (
    UNRECORDED_FLAGS,
    check_writable,
    is_generated,
    metadata,
    next_number,
    numbered,
    save_image,
    save_sheet,
)
from uvit.sample.jobs import ImageJob, Variant

RED = Image.new("RGB", (8, 8), "red")
LATENTS = torch.randn(4, 2, 2, generator=torch.Generator().manual_seed(0))


def variant(folder: Path, name: str = "") -> Variant:
    return Variant(Path("p"), 2.0, name, folder)


def test_every_flag_that_matters_to_a_picture_is_recorded(tmp_path: Path) -> None:
    text = metadata(SampleConfig("p", negative_prompt="blue"), variant(tmp_path), {"unet_sha256": "abc"})
    assert text.pop("software").startswith("uvit ")
    flags = {field.name for field in dataclasses.fields(SampleConfig)}
    assert flags > UNRECORDED_FLAGS
    unset = {"init_image", "mask", "strength"}
    assert {*flags - UNRECORDED_FLAGS - unset, "pipeline", "guidance_scale", "unet_sha256"} == set(text)
    assert (text["guidance_scale"], text["negative_prompt"]) == ("2.0", "blue")


def test_numbers_go_on_from_the_highest(tmp_path: Path) -> None:
    assert next_number(tmp_path / "absent") == 0
    for name in ("00003-a.png", "123456-b.png", "00007-c.npy", "contact_sheet.png", ".00009-d.png.writing"):
        (tmp_path / name).touch()
    assert {number: path.name for number, path in numbered(tmp_path).items()} == {
        3: "00003-a.png", 123456: "123456-b.png"
    }  # fmt: skip
    assert next_number(tmp_path) == 123457


@pytest.mark.parametrize("kind", ["npy", "safetensors", None])
def test_latents_lie_beside_the_picture(tmp_path: Path, kind: str | None) -> None:
    path = tmp_path / "new" / "00000-a.png"
    save_image(path, RED, LATENTS, {"seed": "1"}, kind)
    assert {file.name for file in path.parent.iterdir()} == {"00000-a.png"} | ({f"00000-a.{kind}"} if kind else set())
    if kind:
        file = path.with_suffix(f".{kind}")
        read = np.load(file, allow_pickle=False) if kind == "npy" else load_file(file)["latents"].numpy()
        assert np.array_equal(read, LATENTS.numpy())


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "newer", "--output_dir new")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "new"):
        with pytest.raises(UserError, match=f"--output_dir x: {tmp_path}/file is not a folder"):
            check_writable(place, "--output_dir x")


def test_a_picture_is_known_by_what_made_it(tmp_path: Path) -> None:
    path = tmp_path / "00000-a.png"
    text = {"software": "uvit 1", "prompt": "ein Stern ★", "seed": "1"}
    save_image(path, RED, LATENTS, text, None)
    assert is_generated(path, text, None)
    assert is_generated(path, text | {"software": "uvit 2", "pipeline": "./p", "mask": "./m.png"}, None)
    assert not is_generated(path, text, "npy")
    for other, message in [
        (text | {"seed": "2"}, "\n  seed: was 1, now 2"),
        (text | {"mask_sha256": "abc"}, "\n  mask_sha256: was not set, now abc"),
        ({"prompt": text["prompt"]}, "\n  seed: was 1, now not set"),
    ]:
        with pytest.raises(UserError, match=message):
            is_generated(path, other, None)
    for content in (path.read_bytes()[:-30], b"no picture"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"cannot be read .*; delete it and run the same command again"):
            is_generated(path, text, None)
        with pytest.raises(UserError, match=r"00000-a.png: cannot be read"):
            save_sheet(SampleConfig("p", output_dir=str(tmp_path)), [variant(tmp_path)], [ImageJob(0, "a", 1)], {})


def test_a_sheet_waits_for_all_pictures(tmp_path: Path) -> None:
    config = SampleConfig("p", output_dir=str(tmp_path))
    pictures, variants = [ImageJob(i, "a", i) for i in range(2)], [variant(tmp_path / name, name) for name in "xy"]
    for one in variants:
        assert save_sheet(config, variants, pictures, {}) is None
        for picture in pictures:
            save_image(one.folder / picture.file_name, RED, LATENTS, {}, None)
    sheet = save_sheet(config, variants, pictures, {"dtype": "float32"})
    assert sheet == tmp_path / "contact_sheet.png"
    with Image.open(sheet) as image:
        assert image.width < image.height  # two variants beside each other, two pictures with labels beneath
        assert image.info["dtype"] == "float32"
        narrow = image.width
    save_sheet(dataclasses.replace(config, columns=5), variants, pictures, {})  # two pictures, of two variants each
    with Image.open(sheet) as image:
        assert image.width > 1.8 * narrow


def test_a_sheet_of_very_many_shows_the_first(tmp_path: Path) -> None:
    config = SampleConfig("p", output_dir=str(tmp_path))
    pictures = [ImageJob(i, "a", i) for i in range(401)]
    for picture in pictures[:400]:
        save_image(tmp_path / picture.file_name, RED, LATENTS, {}, None)
    assert save_sheet(config, [variant(tmp_path)], pictures, {}) is not None
