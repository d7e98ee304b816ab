"""Folders, sources and stores as sets of images in a fixed order."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.sources.pictures import PICTURES, ROWS, coco_of_pictures, png, write_images, write_table, write_tar
from uvit.cli.main import main
from uvit.config.evaluate import EvaluateConfig
from uvit.errors import UserError
from uvit.evaluate.image_sets import FolderImages, ImageSet, LoadedImages, SourceImages, open_images
from uvit.progress import Progress


def opened(name: object, resolution: int | None = None, **flags: object) -> ImageSet:
    config = EvaluateConfig("model", "out", **flags).resolved()  # type: ignore[arg-type]
    return open_images(config, str(name), "reference", resolution)


def load(images: ImageSet) -> LoadedImages:
    with Progress("test", None, "image", bar=False, lines=False) as progress:
        return images.load(0, len(images), progress)


def save(path: Path, colour: tuple[int, ...] = (255, 0, 0), size: tuple[int, int] = (8, 8), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


def test_a_folder_of_images_is_sorted_by_path_and_needs_no_captions(tmp_path: Path) -> None:
    for name in ("b.png", "a/2.PNG", "a/10.png", "c.bmp", "contact_sheet.png"):
        save(tmp_path / name)
    images = opened(tmp_path)
    assert isinstance(images, FolderImages)
    assert load(images).ids == ["a/10.png", "a/2.PNG", "b.png", "c.bmp"]
    assert images.description["num_images"] == 4 and "lossy_files" not in images.description


def test_a_split_or_a_list_that_cannot_be_read_is_no_reason_to_take_all_images(tmp_path: Path) -> None:
    for split, number in (("train", 3), ("val", 2)):
        for i in range(number):
            save(tmp_path / split / f"{i}.png")
        lines = [f'{{"file_name": "{i}.png", "text": "a"}}' for i in range(number)]
        (tmp_path / split / "metadata.jsonl").write_text("\n".join(lines))
    assert len(opened(tmp_path)) == 3 and len(opened(tmp_path, split="val")) == 2
    with pytest.raises(UserError, match=r"vaal"):
        opened(tmp_path, split="vaal")
    for split in ("val", "train"):
        (tmp_path / split / "metadata.jsonl").write_text("{")
        with pytest.raises(UserError, match=r"metadata\.jsonl"):
            opened(tmp_path, **({"split": "val"} if split == "val" else {}))


def test_jpeg_files_are_counted(tmp_path: Path) -> None:
    for name in ("a.png", "b.JPG", "c.webp"):
        save(tmp_path / name)
    assert opened(tmp_path).description["lossy_files"] == 2


def test_images_of_every_mode_become_rgb_on_white(tmp_path: Path) -> None:
    save(tmp_path / "a.png", (255, 0, 0, 0), mode="RGBA")
    save(tmp_path / "b.png", (255, 255), mode="LA")
    assert (load(opened(tmp_path)).pixels == 255).all()


def test_images_of_several_sizes_need_a_resolution(tmp_path: Path) -> None:
    save(tmp_path / "a.png", size=(8, 8))
    save(tmp_path / "b.png", size=(12, 10))
    with pytest.raises(UserError, match=r"^b.png: has 12 x 10 pixels, and a.png has 8 x 8; give --resolution"):
        load(opened(tmp_path))
    assert load(opened(tmp_path, 6)).pixels.shape == (2, 6, 6, 3)


def test_captioned_images_are_a_source_and_those_without_captions_are_left_out(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        save(tmp_path / f"{name}.png")
    for name in ("a", "c"):
        (tmp_path / f"{name}.txt").write_text("words")
    images = opened(tmp_path)
    loaded = load(images)
    assert isinstance(images, SourceImages)
    assert loaded.rows == [0, 2] and [problem.kind for problem in loaded.problems] == ["no caption"]


def test_a_feature_store_gives_the_images_that_it_was_made_from(tmp_path: Path) -> None:
    command = "extract --source shapes --resolution 32 --vae_name_or_path shapes --text tokens --model_max_length 18 "
    command += f"--output_dir {tmp_path / 'store'} --device cpu --num_workers 0"
    assert main(command.split()) == 0
    images = opened(tmp_path / "store", 32)
    assert np.array_equal(load(images).pixels, load(opened("shapes", 32)).pixels)
    with pytest.raises(UserError, match="was made of images of 32 pixels, and 64 are needed"):
        opened(tmp_path / "store", 64)


@pytest.mark.parametrize("name", ["nothing", "empty"])
def test_what_has_no_images_is_named_with_its_flag(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=f"^--reference .*{name}"):
        opened(tmp_path / name)


def test_files_of_other_sizes_are_other_images(tmp_path: Path) -> None:
    """So that features of images that were replaced are not used."""
    save(tmp_path / "a.png")
    before = opened(tmp_path).description
    assert opened(tmp_path).description == before
    save(tmp_path / "a.png", size=(9, 99))
    after = opened(tmp_path).description
    assert {key for key in before if before[key] != after[key]} == {"names_and_sizes_sha256"}


@pytest.mark.parametrize("kind", ["images", "captioned", "list", "coco", "tars", "two tars", "table", "store"])
def test_replaced_files_are_other_images_but_not_in_reports(kind: str, tmp_path: Path) -> None:
    """Files of the same names and sizes, at another time."""
    place = tmp_path / "data"
    changed = write_images(place) / "a.png"
    flags: dict[str, Any] = {"resolution": 4}
    if kind == "captioned":
        for name in PICTURES:
            (place / name).with_suffix(".txt").write_text("words")
    elif kind == "list":
        place, flags = write_table(tmp_path / "list.csv", ROWS), {**flags, "image_folder": (str(place),)}
    elif kind == "coco":
        place, flags = coco_of_pictures(tmp_path / "list.json"), {**flags, "image_folder": (str(place),)}
    elif kind in ("tars", "two tars"):
        place = tmp_path / "tars"
        place.mkdir()
        for name in ("a.tar", "b.tar")[: 2 if kind == "two tars" else 1]:
            changed = write_tar(place / name, [(f"{name}.png", png("red")), (f"{name}.txt", b"words")])
    elif kind == "table":
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        changed = tmp_path / "tables" / "train.parquet"
        changed.parent.mkdir()
        parquet.write_table(arrow.table({"image": [{"bytes": png("red")}], "caption": ["words"]}), changed)
        place = changed.parent
    elif kind == "store":
        for name in PICTURES:
            (place / name).with_suffix(".txt").write_text("words")
        command = f"extract --source={place} --output_dir={tmp_path / 'store'} --latents none --resolution 4 "
        command += "--min_image_size 1 --text tokens --num_workers 0 --disable_tqdm --vocab_size 300 --val_every 2"
        assert main(command.split()) == 0
        place = tmp_path / "store"
    before = opened(place, **flags)
    assert before.files_sha256 == opened(place, **flags).files_sha256
    os.utime(changed, ns=(1, 1))
    after = opened(place, **flags)
    assert after.files_sha256 != before.files_sha256
    assert after.description == before.description


def test_what_holds_no_images_of_its_own(tmp_path: Path) -> None:
    save(tmp_path / "images" / "a.png")
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(UserError, match=r"^--reference .*: is the folder of an evaluation; give its images, .*images$"):
        opened(tmp_path)
    with pytest.raises(UserError, match=r"^--reference a.npz: holds statistics"):
        opened("a.npz")


def test_a_store_whose_source_has_changed_gives_no_images(tmp_path: Path) -> None:
    for name in "abc":
        save(tmp_path / "images" / f"{name}.png", size=(16, 16))
        (tmp_path / "images" / f"{name}.txt").write_text("words")
    store = tmp_path / "store"
    flags = "--latents none --resolution 16 --text tokens --num_workers 0 --disable_tqdm --vocab_size 300"
    assert main(["extract", f"--source={tmp_path / 'images'}", f"--output_dir={store}", *flags.split()]) == 0
    assert len(opened(store)) == 3
    (tmp_path / "images" / "a.png").rename(tmp_path / "images" / "d.png")
    (tmp_path / "images" / "a.txt").rename(tmp_path / "images" / "d.txt")
    with pytest.raises(UserError, match=r"^--reference .*store: the source that it was made from has changed"):
        opened(store)


def test_captions_of_another_split_of_coco_are_no_reason_to_take_all_images(tmp_path: Path) -> None:
    save(tmp_path / "val2017" / "a.png")
    save(tmp_path / "masks" / "a.png")
    (tmp_path / "annotations").mkdir()
    content = '{"images": [{"id": 1, "file_name": "a.png"}], "annotations": [{"image_id": 1, "caption": "words"}]}'
    (tmp_path / "annotations" / "captions_val2017.json").write_text(content)
    with pytest.raises(UserError, match="name one with --split"):
        opened(tmp_path)
    assert len(opened(tmp_path, split="val")) == 1
