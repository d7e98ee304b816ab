"""COCO captions: pairs in the order of the images, whatever the order of the captions; several files joined."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from tests.sources.pictures import png, write_coco
from uvit.errors import UserError
from uvit.sources.coco import find_captions, open_coco
from uvit.sources.types import PairError

IMAGES = [{"id": 7, "file_name": "7.png"}, {"id": 3, "file_name": "3.png"}, {"id": 9, "file_name": "9.png"}]
ANNOTATIONS = [
    {"image_id": 3, "caption": "three \n"},
    {"image_id": 7, "caption": "seven"},
    {"image_id": 3, "caption": "drei"},
]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "7.png").write_bytes(png("red"))
    (folder / "3.png").write_bytes(png("blue"))
    return folder


def test_images_keep_their_order_and_those_without_captions_are_problems(images: Path, tmp_path: Path) -> None:
    source = open_coco([write_coco(tmp_path / "captions.json", IMAGES, ANNOTATIONS)], images)
    assert len(source) == 3
    assert [source[row].id for row in (0, 1)] == ["7", "3"]
    assert source[1].captions == ("three", "drei")
    assert source[1].image.getpixel((0, 0)) == (0, 0, 255)
    with pytest.raises(PairError, match=r"captions\.json: 9 has no caption") as error:
        source.captions(2)
    assert [error.value.problem] == source.problems()


def test_compressed_annotations_are_the_same(images: Path, tmp_path: Path) -> None:
    plain = write_coco(tmp_path / "captions.json", IMAGES, ANNOTATIONS)
    packed = tmp_path / "captions.json.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    sources = [open_coco([path], images) for path in (packed, plain)]
    first, second = ([source.entry(row) for row in range(len(source))] for source in sources)
    assert first == second
    for damaged in (packed.read_bytes()[:-20], plain.read_bytes()):
        packed.write_bytes(damaged)
        with pytest.raises(UserError, match="is not a complete gzip file"):
            open_coco([packed], images)


def test_files_about_the_same_images_are_joined_by_file_name(images: Path, tmp_path: Path) -> None:
    english = write_coco(tmp_path / "en.json", IMAGES, ANNOTATIONS)
    others = [{"id": 1, "file_name": "9.png"}, {"id": 3, "file_name": "7.png"}, {"id": 2, "file_name": "new.png"}]
    chinese = write_coco(
        tmp_path / "zh.json", others, [{"image_id": n, "caption": c} for n, c in [(3, "七"), (2, "新"), (1, "九")]]
    )
    source = open_coco([english, chinese], images)
    assert [(id, captions) for id, _, captions in map(source.entry, range(len(source)))] == [
        ("7", ("seven", "七")),
        ("3", ("three", "drei")),
        ("9", ("九",)),
        ("2", ("新",)),
    ]


@pytest.mark.parametrize(
    ("image", "annotation", "kind"),
    [
        ({"id": 3, "file_name": "other.png"}, {}, "duplicate id"),
        ({"id": 5}, {}, "broken line"),
        ({"file_name": "5.png"}, {}, "broken line"),
        (None, {}, "broken line"),
        ({"id": 5, "file_name": "5.png"}, {}, "no caption"),
        ({"id": 5, "file_name": "5.png"}, {"image_id": 5, "caption": 5}, "no caption"),
        ({"id": 5, "file_name": "5.png"}, {"image_id": 5, "caption": " "}, "no caption"),
        ({"id": 5, "file_name": "5.png"}, {"image_id": 5, "caption": "\ud800"}, "not UTF-8"),
        ({"id": 5, "file_name": "5.png"}, "five", "no caption"),
    ],
)
def test_a_bad_image_is_bad_alone(image: Any, annotation: Any, kind: str, images: Path, tmp_path: Path) -> None:
    path = write_coco(tmp_path / "captions.json", [*IMAGES[:2], image], [*ANNOTATIONS, annotation])
    source = open_coco([path], images)
    assert [problem.kind for problem in source.problems()] == [kind]
    assert "captions.json" in source.problems()[0].message
    assert (source.captions(0), source.captions(1)) == (("seven",), ("three", "drei"))
    with pytest.raises(PairError):
        source.captions(2)


def test_captions_of_images_that_are_not_listed_are_problems(images: Path, tmp_path: Path) -> None:
    more = [{"image_id": n, "caption": "lost"} for n in (4, 4, "x")] + [{"caption": "of nothing"}]
    source = open_coco([write_coco(tmp_path / "captions.json", IMAGES[:2], [*ANNOTATIONS, *more])], images)
    assert [(problem.kind, problem.id) for problem in source.problems()] == [
        ("missing image", "4"),
        ("missing image", "x"),
        ("missing image", "None"),
    ]
    assert "annotations have the image_id 4, which no entry of images has" in source.problems()[0].message
    assert (len(source), source.captions(1)) == (5, ("three", "drei"))


def test_one_empty_caption_among_others_goes_alone(images: Path, tmp_path: Path) -> None:
    empty = [{"image_id": 7, "caption": None}, {"image_id": 7, "caption": ""}]
    source = open_coco([write_coco(tmp_path / "captions.json", IMAGES[:2], [*ANNOTATIONS, *empty])], images)
    assert source[0].captions == ("seven",)
    assert source[0].problems == tuple(source.problems())
    assert [(problem.kind, problem.left_out) for problem in source.problems()] == [("empty caption", False)]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b"[]", "but contains a list"),
        (b'{"images": ["\xe9"]}', "is not UTF-8 text"),
        (b'{"info": 1}', "but contains 'info'"),
        (b'{"images": {}, "annotations": []}', "must contain COCO's lists"),
        (b'{"images": [], "annotations": []}', "lists no image"),
        (json.dumps({"images": IMAGES, "annotations": [{"image_id": 3, "bbox": []}]}).encode(), "have no `caption`"),
        (json.dumps({"images": IMAGES, "annotations": []}).encode(), "none of its 3 images is usable"),
    ],
)
def test_files_that_are_not_captions(content: bytes, says: str, images: Path, tmp_path: Path) -> None:
    (tmp_path / "captions.json").write_bytes(content)
    with pytest.raises(UserError, match=says):
        open_coco([tmp_path / "captions.json"], images)


def test_a_wrong_folder_is_told_at_once_and_a_missing_image_when_asked_for(images: Path, tmp_path: Path) -> None:
    path = write_coco(tmp_path / "captions.json", IMAGES, ANNOTATIONS)
    with pytest.raises(UserError, match=r"any of its first 2 images, such as .*7\.png; .*--image_folder"):
        open_coco([path], tmp_path)
    (images / "7.png").unlink()
    source = open_coco([path], images)
    assert source[1].id == "3"
    with pytest.raises(PairError) as error:
        _ = source[0]
    assert error.value.problem.kind == "missing image"


def names(root: Path, *names: str) -> Path:
    for name in names:
        write_coco(root / "annotations" / name, [], [])
    return root


def test_a_split_picks_the_captions_file_of_a_folder(tmp_path: Path) -> None:
    names(tmp_path, "captions_mini2017.json", "instances_train2017.json")
    (tmp_path / "images").mkdir()
    captions, images, has_splits = find_captions(tmp_path, "train")
    assert (captions.name, images, has_splits) == ("captions_mini2017.json", tmp_path / "images", False)
    with pytest.raises(UserError, match=r"--split val: .* contains captions_mini2017\.json"):
        find_captions(tmp_path, "val")

    names(tmp_path, "captions_train2014.json", "captions_train2017.json.gz", "captions_val2014.json")
    (tmp_path / "val2014").mkdir()
    captions, images, has_splits = find_captions(tmp_path, "val")
    assert (captions.name, images, has_splits) == ("captions_val2014.json", tmp_path / "val2014", True)
    assert find_captions(tmp_path, "train2017")[0].name == "captions_train2017.json.gz"
    several = r"captions_train2014\.json and captions_train2017\.json\.gz in .*; give for example --split train2014"
    with pytest.raises(UserError, match=several):
        find_captions(tmp_path, "train")


def test_real_images(coco_folder: Path) -> None:
    captions, images, _ = find_captions(coco_folder, "train")
    assert images is not None
    source = open_coco([captions], images)
    assert (len(source), source.problems()) == (8, [])
    assert source[3].id == "3"
    assert source[3].captions[0] == "a close-up of a ginger cat with green eyes"
    assert source[3].image.size == (256, 170)
