"""Each kind of source gives its pairs in order; what is wrong with one is a sentence that names the file."""

import io
import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from uvit.data.sources import captions_of, open_source
from uvit.errors import UserError


def png(colour: str, size: tuple[int, int] = (6, 4), mode: str = "RGB", format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, colour).save(buffer, format=format)
    return buffer.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_metadata(folder: Path, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "a.png").write_bytes(png("red"))
    (folder / "b.png").write_bytes(png("blue"))
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_coco(root: Path, name: str = "train2014") -> Path:
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / name).mkdir()
    content = {
        "images": [
            {"id": 7, "file_name": "7.png"},
            {"id": 3, "file_name": "3.png"},
            {"id": 9, "file_name": "9.png"},
        ],
        "annotations": [
            {"image_id": 3, "caption": "three \n"},
            {"image_id": 7, "caption": "seven"},
            {"image_id": 3, "caption": "drei"},
        ],
    }
    (root / "annotations" / f"captions_{name}.json").write_text(json.dumps(content))
    (root / name / "7.png").write_bytes(png("red"))
    (root / name / "3.png").write_bytes(png("blue"))
    return root


# What is right


@pytest.mark.parametrize("name", ["shapes", "shapes:two"])
def test_shapes_of_train_and_heldout_share_no_caption_and_come_at_the_resolution(name: str) -> None:
    train, heldout = open_source(name, resolution=32), open_source(name, "heldout", resolution=32)
    assert train[0].image.size == heldout[0].image.size == (32, 32)
    assert not set(train[0].captions) & set(captions_of(heldout))
    assert next(captions_of(train)) == train[0].captions[0]


def test_a_tar_gives_its_pairs_in_order_whatever_their_kind(tmp_path: Path) -> None:
    tar = write_tar(
        tmp_path / "pairs.tar",
        [
            ("x/b.jpg", png("red", format="JPEG")),
            ("x/b.txt", b"a red box\n"),
            ("x/a.json", b'{"captions": ["two", "more"]}'),
            ("x/a.PNG", png("blue")),
            ("c.webp", png("lime", format="WEBP")),
            ("c.json", '{"caption": "绿色"}'.encode()),
            ("c.cls", b"3"),
        ],
    )
    source = pickle.loads(pickle.dumps(open_source(str(tar))))
    assert [source[i].id for i in range(len(source))] == ["x/b", "x/a", "c"]
    assert list(captions_of(source)) == ["a red box", "two", "more", "绿色"]
    assert source[1].captions == ("two", "more")
    assert source[1].image.getpixel((0, 0)) == (0, 0, 255)
    assert source[0].image.size == (6, 4)


def test_what_is_transparent_becomes_white(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "t.tar", [("a.png", png("#ff000000", mode="RGBA")), ("a.txt", b"nothing")])
    image = open_source(str(tar))[0].image
    assert image.mode == "RGB"
    assert image.getpixel((0, 0)) == (255, 255, 255)


def test_an_image_is_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4)).save(buffer, format="JPEG", exif=exif)
    tar = write_tar(tmp_path / "t.tar", [("a.jpg", buffer.getvalue()), ("a.txt", b"dark")])
    assert open_source(str(tar))[0].image.size == (4, 6)


def test_coco_keeps_the_order_of_images_and_leaves_out_those_without_captions(tmp_path: Path) -> None:
    root = write_coco(tmp_path)
    annotations = root / "annotations" / "captions_train2014.json"
    for source in (
        open_source(str(root)),
        open_source(str(annotations), image_folder=str(root / "train2014")),
    ):
        assert [source[i].id for i in range(len(source))] == ["7", "3"]
        assert source[1].captions == ("three", "drei")
        assert source[1].image.getpixel((0, 0)) == (0, 0, 255)


def test_a_split_picks_the_captions_file_of_a_coco_folder(tmp_path: Path) -> None:
    write_coco(tmp_path)
    assert len(open_source(str(tmp_path), "whatever, there is only one")) == 2
    write_coco(tmp_path, "val2014")
    assert open_source(str(tmp_path), "val")[0].captions == ("seven",)
    with pytest.raises(UserError, match=r"captions_train2014\.json, captions_val2014\.json"):
        open_source(str(tmp_path), "test")


def test_metadata_in_a_folder_and_in_folders_of_splits(tmp_path: Path) -> None:
    rows = [{"file_name": "b.png", "text": "blue"}, {"file_name": "a.png", "captions": ["red", "rouge"]}]
    write_metadata(tmp_path, rows)
    write_metadata(tmp_path / "val", [{"file_name": "a.png", "caption": "the same"}])
    assert list(captions_of(open_source(str(tmp_path)))) == ["blue", "red", "rouge"]
    source = open_source(str(tmp_path), "val")
    assert (len(source), source[0].id, source[0].captions) == (1, "a.png", ("the same",))


def test_real_coco(coco_mini: Path) -> None:
    source = open_source(str(coco_mini))
    assert len(source) == 76
    assert source[0].id == "790"
    assert source[0].captions[0] == "a family is sitting down at a table to have cake"
    assert source[75].image.size == (256, 256)


def test_real_tar(emoji_tar: Path) -> None:
    source = open_source(str(emoji_tar))
    assert len(source) == 1911
    assert (source[0].id, source[0].captions) == ("1f600", ("an emoji of grinning face",))
    assert source[1910].image.size == (64, 64)
    assert source[0].image.getpixel((0, 0)) == (255, 255, 255)


# What is wrong


@pytest.mark.parametrize(
    ("source", "split", "image_folder", "says"),
    [
        ("no/such/place", "train", None, "no such file or folder"),
        ("shapes:three", "train", None, "shapes and shapes:two"),
        ("shapes", "val", None, "--split val"),
        ("shapes", "train", "images", "--image_folder images"),
    ],
)
def test_unknown_names(source: str, split: str, image_folder: str | None, says: str) -> None:
    with pytest.raises(UserError, match=says):
        open_source(source, split, image_folder)


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ([], "holds no files"),
        ([("a.png", png("red"))], r"a must be .* and is \.png"),
        ([("a.txt", b"red")], r"a must be .* and is \.txt"),
        (
            [("a.png", png("red")), ("a.json", b'{"label": 3}')],
            r"a\.json: needs caption or captions.*found label",
        ),
        ([("a.png", png("red")), ("a.json", b"[]")], "must be a JSON object"),
        ([("a.png", png("red")), ("a.json", b"{")], "is not valid JSON"),
        ([("a.png", png("red")), ("a.txt", b" \n")], "pair a has an empty caption"),
        ([("a.png", png("red")), ("a.txt", b"\xff\xfe")], "not UTF-8"),
        ([("a.png", png("red")[:-30]), ("a.txt", b"red")], "pair a: its image in .* cannot be decoded"),
        ([("a.png", b"no image"), ("a.txt", b"red")], "pair a: its image in .* cannot be decoded"),
    ],
)
def test_malformed_tars(tmp_path: Path, members: list[tuple[str, bytes]], says: str) -> None:
    tar = write_tar(tmp_path / "bad.tar", members)
    with pytest.raises(UserError, match=says) as error:
        _ = open_source(str(tar))[0]
    assert "bad.tar" in str(error.value)


def test_files_that_are_no_source(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "cut.tar", [("a.txt", b"red"), ("a.png", png("red", (600, 600)))])
    tar.write_bytes(tar.read_bytes()[:2100])
    (tmp_path / "words.tar").write_text("not a tar")
    (tmp_path / "words.csv").write_text("a,b")
    (tmp_path / "words.json").write_text('{"info": 1}')
    for name, says in [
        ("cut.tar", "not a whole, uncompressed tar"),
        ("words.tar", "not a whole, uncompressed tar"),
        ("words.csv", "is a .csv file"),
        ("words.json", "needs --image_folder"),
    ]:
        with pytest.raises(UserError, match=says):
            open_source(str(tmp_path / name))
    with pytest.raises(UserError, match="`images` and `annotations`, and holds info"):
        open_source(str(tmp_path / "words.json"), image_folder=str(tmp_path))
    with pytest.raises(UserError, match="--split val"):
        open_source(str(tar), "val")


def test_malformed_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds nothing, and no metadata\.jsonl"):
        open_source(str(tmp_path))
    for rows, says in [
        ([], "lists no image"),
        ([{"text": "red"}], "line 1: has no file_name; found text"),
        ([{"file_name": "a.png"}], "line 1: needs text or caption or captions"),
        ([{"file_name": "a.png", "text": ""}], "pair a.png has an empty caption"),
        ([{"file_name": "missing.png", "text": "red"}], "missing.png, does not exist"),
    ]:
        write_metadata(tmp_path, rows)
        with pytest.raises(UserError, match=says):
            open_source(str(tmp_path))
    write_metadata(tmp_path, [{"file_name": "a.png", "text": "red"}, {"file_name": "gone.png", "text": "gone"}])
    with pytest.raises(UserError, match="--split val"):
        open_source(str(tmp_path), "val")
    with pytest.raises(UserError, match=r"pair gone\.png"):
        _ = open_source(str(tmp_path))[1]


def test_annotations_that_are_not_captions(tmp_path: Path) -> None:
    path = tmp_path / "instances.json"
    path.write_text(json.dumps({"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 1, "bbox": []}]}))
    with pytest.raises(UserError, match="lacks 'caption'"):
        open_source(str(path), image_folder=str(tmp_path))
