"""Which files of a source are of a split: by the names of files and folders. Nothing of another split comes along."""

from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from tests.sources.pictures import png, write_coco, write_lines
from tests.sources.test_open import captioned_image, captions_in, opened, tar_of
from uvit.errors import UserError
from uvit.sources.names import names_split, split_of


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train/a.tar", "train"), ("x-validation-0000.tar", "validation"), ("my_val.parquet", "val"),
        ("Test-0.parquet", "test"), ("valset.csv", "val"), ("captions_val2014.json", "val"), ("val/train.tar", "train"),
        ("test/00000.tar", "test"), ("training.tar", None), ("contest/a.tar", None), ("0000.tar", None),
    ],
)  # fmt: skip
def test_names_of_splits(name: str, split: str | None) -> None:
    assert split_of(name) == split


def test_splits_with_a_year() -> None:
    assert names_split("captions_val2014.json", "val2014") and names_split("captions_val2014.json", "val")
    assert not names_split("captions_val2014.json", "val2017") and not names_split("captions.json", "val")


def test_images_in_the_folder_of_another_split_are_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    captioned_image(tmp_path, "a")
    captioned_image(tmp_path / "val", "b")
    assert captions_in(opened(tmp_path)) == [("a",)]
    assert capsys.readouterr().out == f"Not read in {tmp_path}: val/.\n"
    assert captions_in(opened(tmp_path, split="val")) == [("b",)]


def test_tars_of_a_split_by_their_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tar_of(tmp_path / "x-train-0000.tar", "a", "b")
    tar_of(tmp_path / "x-validation-0000.tar", "c")
    assert captions_in(opened(tmp_path)) == [("a",), ("b",)]
    assert "Not read in" in capsys.readouterr().out
    assert captions_in(opened(tmp_path, split="validation")) == [("c",)]
    with pytest.raises(UserError, match=r"--split test: .* no such split; it has train, validation"):
        opened(tmp_path, split="test")
    with pytest.raises(UserError, match=r"--val_every 2: .* already has splits, those that its files name"):
        opened(tmp_path, val_every=2)
    (tmp_path / "x-validation-0000.tar").unlink()
    assert captions_in(opened(tmp_path, val_every=2, split="val")) == [("b",)]


def test_tables_of_a_split_by_a_word_of_their_names(tmp_path: Path) -> None:
    for name in ("my_train.parquet", "my_test.parquet"):
        rows = {"image": [{"bytes": png("red"), "path": None}], "text": [name]}
        parquet.write_table(pyarrow.table(rows), tmp_path / name)
    assert captions_in(opened(tmp_path)) == [("my_train.parquet",)]
    assert captions_in(opened(tmp_path, split="test")) == [("my_test.parquet",)]


def test_a_file_that_names_its_split_is_that_split(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png("red"))
    for name in ("val.jsonl", "others.jsonl"):
        write_lines(tmp_path / name, [{"file_name": "a.png", "text": "one"}])
    assert captions_in(opened(tmp_path / "val.jsonl", split="val")) == [("one",)]
    assert captions_in(opened(tmp_path / "val.jsonl")) == [("one",)]  # as it says
    with pytest.raises(UserError, match=r"--split val: .*others\.jsonl has no such split"):
        opened(tmp_path / "others.jsonl", split="val")


def test_the_only_captions_of_coco(tmp_path: Path) -> None:
    """They are of the split that their name says, and of no other."""
    images = tmp_path / "val2014"
    images.mkdir()
    (images / "a.png").write_bytes(png("red"))
    captions = tmp_path / "annotations" / "captions_val2014.json"
    captions.parent.mkdir()
    write_coco(captions, [{"id": 1, "file_name": "a.png"}], [{"image_id": 1, "caption": "one"}])
    for split in ("val", "val2014"):
        assert captions_in(opened(tmp_path, split=split)) == [("one",)]
        assert captions_in(opened(captions, split=split, image_folder=[str(images)])) == [("one",)]
    with pytest.raises(UserError, match=r"--split train: .* contains captions_val2014\.json; name one"):
        opened(tmp_path)
    assert captions_in(opened(captions, image_folder=[str(images)])) == [("one",)]
    captions.rename(captions.with_name("captions_mini2017.json"))
    assert captions_in(opened(tmp_path, image_folder=[str(images)])) == [("one",)]


def test_a_source_that_is_given_twice_is_refused(tmp_path: Path) -> None:
    captioned_image(tmp_path / "a", "a")
    with pytest.raises(UserError, match="is given twice; remove one"):
        opened(tmp_path / "a", f"{tmp_path}/a/../a")


def test_a_pattern_below_a_folder_with_brackets_in_its_name(tmp_path: Path) -> None:
    tar_of(tmp_path / "set [v1]" / "0.tar", "a")
    assert captions_in(opened(f"{tmp_path}/set [v1]/{{0..0}}.tar")) == [("a",)]


def test_metadata_beside_folders_of_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its rows are of the split of their folder; images in other folders are of train."""
    names = ("train/a", "test/b", "c", "./test/d")
    for name in names:
        captioned_image((tmp_path / name).parent, Path(name).name)
    write_lines(tmp_path / "metadata.jsonl", [{"file_name": f"{name}.png", "text": name} for name in names])
    assert captions_in(opened(tmp_path)) == [("train/a",), ("c",)]
    assert "Not read in" in (said := capsys.readouterr().out) and "test/b.png" in said
    assert captions_in(opened(tmp_path, split="test")) == [("test/b",), ("./test/d",)]
    with pytest.raises(UserError, match="already has splits, its folders"):
        opened(tmp_path, val_every=2)
    (tmp_path / "train" / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "own"}\n')
    assert captions_in(opened(tmp_path)) == [("own",)]


def test_metadata_beside_folders_of_years(tmp_path: Path) -> None:
    names = ("train2017/a", "val2017/b")
    for name in names:
        captioned_image((tmp_path / name).parent, Path(name).name)
    write_lines(tmp_path / "metadata.jsonl", [{"file_name": f"{name}.png", "text": name} for name in names])
    assert captions_in(opened(tmp_path)) == [(name,) for name in names]
    for name in names:
        assert captions_in(opened(tmp_path, split=name.partition("/")[0])) == [(name,)]


@pytest.mark.parametrize("kind", ["texts", "metadata", "elsewhere"])
def test_classes_that_are_called_like_splits(kind: str, tmp_path: Path) -> None:
    """Without a folder train/, and no images beside the folders."""
    folders = ("cat", "dev", "test")
    for name in folders:
        captioned_image(tmp_path / "pictures" / name, "a")
    place, flags = tmp_path / "pictures", {}
    if kind != "texts":
        place = tmp_path if kind == "elsewhere" else place
        write_lines(place / "metadata.jsonl", [{"file_name": f"{name}/a.png", "text": "a"} for name in folders])
    if kind == "elsewhere":
        (tmp_path / "train").mkdir()
        flags = {"image_folder": [str(tmp_path / "pictures")]}
    assert captions_in(opened(place, **flags)) == [("a",)] * 3
    assert captions_in(opened(place, val_every=3, split="val", **flags)) == [("a",)]


def test_lists_in_parquet_of_a_split(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png("red"))

    def write(name: str, caption: str) -> None:
        parquet.write_table(pyarrow.table({"image": ["a.png"], "text": [caption]}), tmp_path / name)

    write("val.parquet", "v")
    assert captions_in(opened(tmp_path, split="val")) == [("v",)]
    with pytest.raises(UserError, match=r"--split train: .* no such split; it has val"):
        opened(tmp_path)
    write("train-00000-of-00002.parquet", "one")
    write("train-00001-of-00002.parquet", "two")
    assert captions_in(opened(tmp_path)) == [("one",), ("two",)]


def test_val_every_of_a_folder_of_one_split(tmp_path: Path) -> None:
    tar_of(tmp_path / "test.tar", "a", "b")
    assert captions_in(opened(tmp_path, val_every=2)) == [("a",)]


def test_a_table_of_images_that_names_its_split(tmp_path: Path) -> None:
    rows = {"image": [{"bytes": png("red"), "path": None}], "text": ["one"]}
    parquet.write_table(pyarrow.table(rows), tmp_path / "latent_test.parquet")
    assert captions_in(opened(tmp_path / "latent_test.parquet", split="test")) == [("one",)]
