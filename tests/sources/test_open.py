"""What --source names is recognised, joined and divided; what does not go together is a sentence that says so."""

import contextlib
import gzip
import pickle
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from tests.sources.pictures import (
    PICTURES,
    ROWS,
    coco_of_pictures,
    png,
    write_coco,
    write_images,
    write_lines,
    write_table,
    write_tar,
)
from uvit.errors import UserError
from uvit.images import to_rgb
from uvit.sources.open import open_source, require_random_access
from uvit.sources.types import PairError, RandomAccessSource

ALL = [captions for _, captions in PICTURES.values()]


def opened(*places: Path | str, **flags: Any) -> RandomAccessSource:
    source = open_source([str(place) for place in places], **flags)
    assert pickle.loads(pickle.dumps(source)) is not source
    return require_random_access(source, "--source")


def captions_in(source: RandomAccessSource) -> list[tuple[str, ...]]:
    return [source.captions(row) for row in range(len(source))]


def tar_of(path: Path, *letters: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    members = [each for x in letters for each in [(f"{x}.png", png("red")), (f"{x}.txt", x.encode())]]
    return write_tar(path, members)


def captioned_image(folder: Path, name: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.png").write_bytes(png("red"))
    (folder / f"{name}.txt").write_text(name)
    return folder


# What a place is


@pytest.mark.parametrize("name", ["shapes", "shapes:two"])
def test_shapes_of_train_and_heldout_share_no_caption_and_come_at_the_resolution(name: str) -> None:
    train, heldout = opened(name, resolution=32), opened(name, split="heldout", resolution=32)
    assert train[0].image.size == heldout[0].image.size == (32, 32)
    assert not set(train.all_captions()) & set(heldout.all_captions())
    assert next(train.all_captions()) == train[0].captions[0] == train.captions(0)[0]
    assert train.problems() == []


def test_lists_by_their_suffix_and_metadata_by_its_name(tmp_path: Path) -> None:
    write_images(tmp_path)
    rows = [{"file_name": name, "text": list(captions)} for name, (_, captions) in PICTURES.items()]
    for path in (
        write_lines(tmp_path / "other.jsonl", rows),
        write_table(tmp_path / "list.csv", ROWS),
        write_table(tmp_path / "list.tsv", ROWS),
    ):
        assert captions_in(opened(path)) == ALL
    write_lines(tmp_path / "metadata.jsonl", rows)
    assert captions_in(opened(tmp_path)) == ALL
    (tmp_path / "metadata.jsonl").unlink()
    write_table(tmp_path / "metadata.csv", ROWS, ("file_name", "text"))
    assert captions_in(opened(tmp_path)) == ALL


def test_parquet_of_paths_is_a_list_and_parquet_of_images_a_data_set(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    write_images(tmp_path)
    columns = {"image": [name for name, _ in ROWS], "text": [caption for _, caption in ROWS]}
    parquet.write_table(arrow.table(columns), tmp_path / "paths.parquet")
    assert captions_in(opened(tmp_path / "paths.parquet")) == ALL
    images = [{"bytes": png(colour), "path": None} for colour, _ in PICTURES.values()]
    parquet.write_table(arrow.table({"image": images, "text": list(map(list, ALL))}), tmp_path / "images.parquet")
    source = opened(tmp_path / "images.parquet")
    assert captions_in(source) == ALL and source[1].image.getpixel((0, 0)) == (255, 0, 0)


def test_coco_files_and_folders(tmp_path: Path) -> None:
    write_images(tmp_path / "train2014")
    path = coco_of_pictures(tmp_path / "annotations" / "captions_train2014.json")
    packed = tmp_path / "packed.json.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    write_coco(tmp_path / "annotations" / "captions_val2014.json", [], [])
    images = [str(tmp_path / "train2014")]
    for source in (opened(tmp_path), opened(path, image_folder=images), opened(packed, image_folder=images)):
        assert captions_in(source) == ALL and source[0].image.getpixel((0, 0)) == (0, 0, 255)
    with pytest.raises(UserError, match="needs --image_folder"):
        open_source(str(path))
    with pytest.raises(UserError, match=r"val2014\.json: lists no image"):
        open_source(str(tmp_path), "val2014", images)


def test_tars_by_name_by_pattern_and_by_folder(tmp_path: Path) -> None:
    tar_of(tmp_path / "0.tar", "a", "b")
    tar_of(tmp_path / "1.tar", "c")
    for place in (tmp_path / "{0..1}.tar", tmp_path / "*.tar", tmp_path):
        assert captions_in(opened(place)) == [("a",), ("b",), ("c",)]
    assert captions_in(opened(tmp_path / "1.tar", tmp_path / "0.tar")) == [("c",), ("a",), ("b",)]


def test_folders_of_images_with_text_files(tmp_path: Path) -> None:
    captioned_image(tmp_path / "deep", "b")
    captioned_image(tmp_path, "a")
    assert captions_in(opened(tmp_path)) == [("a",), ("b",)]


def test_folders_of_parts(tmp_path: Path) -> None:
    for kind in ("metadata", "tars", "images"):
        for part in ("train", "val"):
            folder = captioned_image(tmp_path / kind / part, part)
            if kind == "metadata":
                write_lines(folder / "metadata.jsonl", [{"file_name": f"{part}.png", "text": part}])
            if kind == "tars":
                tar_of(folder / "0.tar", part)
        for part in ("train", "val"):
            assert captions_in(opened(tmp_path / kind, split=part)) == [(part,)]
        with pytest.raises(UserError, match=r"--split test: .* has no such split"):
            open_source(str(tmp_path / kind), "test")
        for part in ("train", "val"):
            with pytest.raises(UserError, match=f"--val_every 2: .* already has splits, {part}/"):
                open_source(str(tmp_path / kind), part, val_every=2)


def test_what_is_at_a_url_is_a_stream(tmp_path: Path) -> None:
    url = tar_of(tmp_path / "0.tar", "a", "b").as_uri()
    source = open_source(url)
    assert list(source.all_captions()) == ["a", "b"]
    with pytest.raises(UserError, match=r"^--source there: can only be read from beginning to end"):
        require_random_access(source, "--source there")


# Several places, and parts of them


def test_several_places_follow_one_another_whatever_they_are(tmp_path: Path) -> None:
    write_images(tmp_path / "list")
    path = write_table(tmp_path / "list" / "list.csv", ROWS)
    tar = tar_of(tmp_path / "0.tar", "x", "y")
    folder = captioned_image(tmp_path / "folder", "z")
    expected = [("x",), ("y",), *ALL, ("z",)]
    source = opened(tar, path, folder)
    assert captions_in(source) == expected
    assert source[3].image.getpixel((0, 0)) == (255, 0, 0)
    assert len(opened("shapes", tar)) == len(opened("shapes")) + 2
    stream = open_source([tar.as_uri(), str(path), str(folder)])
    assert list(stream.all_captions()) == [caption for captions in expected for caption in captions]


def test_coco_files_about_the_same_images_are_joined_and_others_follow(tmp_path: Path) -> None:
    one, two = write_images(tmp_path / "one"), write_images(tmp_path / "two")
    first = coco_of_pictures(tmp_path / "first.json")
    second = write_coco(
        tmp_path / "second.json", [{"id": 1, "file_name": "a.png"}], [{"image_id": 1, "caption": "rouge"}]
    )
    joined = [ALL[0], (*ALL[1], "rouge"), ALL[2]]
    assert captions_in(opened(first, second, image_folder=[str(one)])) == joined
    assert captions_in(opened(first, second, image_folder=[str(one), str(two)])) == [*ALL, ("rouge",)]
    with pytest.raises(UserError, match="--image_folder: 3 folders for 2 caption files"):
        open_source([str(first), str(second)], image_folder=[str(one)] * 3)


def test_val_every_divides_what_has_no_parts(tmp_path: Path) -> None:
    tar = tar_of(tmp_path / "tars" / "0.tar", *"abcde")
    folder = captioned_image(tmp_path / "folder", "f")
    assert captions_in(opened(tar, folder, val_every=3)) == [("a",), ("b",), ("d",), ("e",)]
    assert captions_in(opened(tar, folder, split="val", val_every=3)) == [("c",), ("f",)]
    stream = open_source([tar.as_uri()], "val", val_every=2)
    assert [(row, pair and pair.captions) for row, pair in stream.read(0, lambda _: True)] == [(0, ("b",)), (1, ("d",))]  # type: ignore[union-attr]
    for places, split in (([str(tar)], "val"), (["shapes", str(tar)], "heldout")):
        with pytest.raises(UserError, match=f"--split {split}: .* has no such split; .*--val_every"):
            open_source(places, split)
    with pytest.raises(UserError, match="--val_every 6: leaves --split val empty, of 5 pairs"):
        open_source(str(tar), "val", val_every=6)
    for split in ("train", "val"):
        with pytest.raises(UserError, match="--val_every 10: --source shapes already has splits"):
            open_source("shapes", split, val_every=10)


def test_val_every_divides_a_coco_folder_of_one_captions_file(tmp_path: Path) -> None:
    write_images(tmp_path / "images")
    coco_of_pictures(tmp_path / "annotations" / "captions_mini.json")
    assert captions_in(opened(tmp_path, split="val", val_every=2)) == [ALL[1]]
    write_coco(tmp_path / "annotations" / "captions_train.json", [], [])
    with pytest.raises(UserError, match="already has splits"):
        open_source(str(tmp_path), "val", val_every=2)


def test_captions_leave_out_pairs_that_cannot_be_used(tmp_path: Path) -> None:
    folder = captioned_image(tmp_path, "a")
    captioned_image(tmp_path, "b")
    (folder / "a.txt").write_text(" ")
    assert list(open_source(str(folder)).all_captions()) == ["b"]


# What is wrong


@pytest.mark.parametrize(
    ("source", "flags", "says"),
    [
        ("no/such/place", {}, "no such file or folder"),
        ("no/such/{0..2}.tar", {}, r"--source no/such/0\.tar: no such file"),
        ("shapes:three", {}, "shapes and shapes:two"),
        ("shapes", {"split": "val"}, "--split val: shapes have"),
        ("shapes", {"image_folder": ["images"]}, "--image_folder images"),
        ("shapes", {"image_column": "image"}, "--image_column image: needs"),
        ("shapes", {"caption_column": "text"}, "--caption_column text: needs"),
        ("shapes", {"streaming": True}, "--streaming: needs"),
        ([], {}, "--source: names no source"),
    ],
)
def test_names_and_flags_that_do_not_go_together(source: str, flags: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        open_source(source, **flags)


def test_files_that_are_no_source(tmp_path: Path) -> None:
    for name, says in [
        ("words.tar", "words.tar"),
        ("words.tar.gz", "words.tar.gz"),
        ("words.csv", "its columns are 'not any"),
        ("words.parquet", "is not a complete parquet file"),
        ("words.doc", r"is a \.doc file; give shapes"),
        ("words", "is a nameless file"),
    ]:
        (tmp_path / name).write_text("not any of these")
        if name == "words.parquet":
            pytest.importorskip("pyarrow")
        with pytest.raises(UserError, match=says):
            open_source(str(tmp_path / name))


def test_folders_that_are_no_source(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"contains nothing; it needs annotations/ of COCO captions, metadata\.jsonl"):
        open_source(str(tmp_path))
    for name in "abcdefg":
        (tmp_path / f"{name}.png").write_bytes(png("red"))
    with pytest.raises(UserError, match=r"contains a\.png, b\.png, c\.png, d\.png, e\.png and 2 more; it needs"):
        open_source(str(tmp_path))


# Folders with other things beside the images


def image_folder(folder: Path, texts: bool = True) -> Path:
    for name in "ab":
        captioned_image(folder, name)
        if not texts:
            (folder / f"{name}.txt").unlink()
    return folder


def test_what_holds_no_images_is_passed_over_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = image_folder(tmp_path)
    (folder / "annotations").mkdir()
    write_lines(folder / "metadata.jsonl", [{"loss": 1}])
    write_table(folder / "metadata.csv", [("gone.png", "x")])
    write_table(folder / "scores.tsv", [("a.png", "x")], ("file", "score"))
    (folder / "dataset_info.json").write_text("{}")
    (folder / "0_stats.json").write_text("{}")
    (folder / "README.md").write_text("#")
    with contextlib.suppress(ImportError):
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"a": [1]}), folder / "embeddings.parquet")
    source = opened(folder)
    assert captions_in(source) == [("a",), ("b",)]
    said = capsys.readouterr().out
    assert f"Not read in {folder}: 0_stats.json, README.md, dataset_info.json, " in said


@pytest.mark.parametrize("header", [("Image", "Caption"), ("FILE_NAME", "TEXT"), ("filename", "Prompt")])
def test_names_of_columns_and_suffixes_in_any_case(header: tuple[str, str], tmp_path: Path) -> None:
    folder = image_folder(tmp_path, texts=False)
    write_table(folder / "LIST.CSV", [("a.png", "one")], header)
    (tmp_path / "lists").mkdir()
    write_lines(tmp_path / "lists" / "ROWS.JSONL", [{header[0]: str(folder / "a.png"), header[1]: "one"}])
    for place in (folder, folder / "LIST.CSV", tmp_path / "lists" / "ROWS.JSONL"):
        assert captions_in(opened(place)) == [("one",)]
    assert captions_in(opened(tar_of(tmp_path / "tars" / "A.TAR", "a"))) == [("a",)]
    assert captions_in(opened(tmp_path / "tars")) == [("a",)]


def test_each_folder_has_metadata_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in ("x", "y", "val/z"):
        inner = image_folder(tmp_path / folder, texts=False)
        write_lines(inner / "metadata.jsonl", [{"file_name": "a.png", "text": folder}])
    source = opened(tmp_path)
    assert [(source[row].id, source.captions(row)) for row in range(len(source))] == [
        ("x/a.png", ("x",)),
        ("y/a.png", ("y",)),
    ]
    assert "Not read in" in (said := capsys.readouterr().out) and "x/b.png, y/b.png" in said
    assert [opened(tmp_path, split="val")[0].id] == ["z/a.png"]
    write_table(tmp_path / "y" / "metadata.csv", [("a.png", "again")], ("file_name", "text"))
    with pytest.raises(UserError, match=r"both y/metadata\.csv and y/metadata\.jsonl"):
        open_source(str(tmp_path))


def test_coco_captions_beside_the_images_say_what_to_give(tmp_path: Path) -> None:
    folder = image_folder(tmp_path, texts=False)
    (folder / "coco.json").write_text("{}")
    with pytest.raises(
        UserError, match=r"if coco\.json holds COCO captions, give --source .*coco\.json --image_folder"
    ):
        open_source(str(folder))


def test_the_usual_case_of_a_column_goes_before_another(tmp_path: Path) -> None:
    folder = image_folder(tmp_path, texts=False)
    write_table(folder / "list.csv", [("a.png", "no", "yes")], ("image", "Text", "caption"))
    assert captions_in(opened(folder)) == [("yes",)]


def test_a_list_of_urls_and_compressed_tars_say_what_to_do(tmp_path: Path) -> None:
    write_table(tmp_path / "urls.csv", [("http://x/a.png", "x")], ("URL", "TEXT"))
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "a.TGZ").write_bytes(b"\x1f\x8b" + bytes(1000))
    with pytest.raises(UserError, match="'URL', 'TEXT'; URL contains URLs, so download the images"):
        open_source(str(tmp_path / "urls.csv"))
    with pytest.raises(UserError, match=r"a\.TGZ: is compressed"):
        open_source(str(tmp_path / "tars"))


def test_a_list_beside_the_images_of_any_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = image_folder(tmp_path, texts=False)
    write_table(folder / "captions.csv", [("a.png", "one")])
    write_table(folder / "other.tsv", [("gone.png", "x")])
    assert captions_in(opened(folder)) == [("one",)]
    assert f"Not read in {folder}: b.png, other.tsv." in capsys.readouterr().out
    write_table(folder / "other.tsv", [("b.png", "x")])
    with pytest.raises(UserError, match=r"both captions\.csv and other\.tsv hold captioned images; .*--source .*csv$"):
        open_source(str(folder))


def test_metadata_goes_before_txt_and_two_of_them_are_ambiguous(tmp_path: Path) -> None:
    folder = image_folder(tmp_path)
    write_lines(folder / "metadata.jsonl", [{"file_name": "a.png", "text": "one"}])
    assert captions_in(opened(folder)) == [("one",)]
    write_table(folder / "metadata.csv", [("a.png", "two")], ("file_name", "text"))
    with pytest.raises(UserError, match=r"both metadata\.jsonl and metadata\.csv hold captioned images"):
        open_source(str(folder))


def test_tars_and_tables_of_images_are_ambiguous(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    tar_of(tmp_path / "deep" / "0.tar", "a")
    table = arrow.table({"image": [png("red")], "text": ["red"]})
    parquet.write_table(table.select(["text"]), tmp_path / "words.parquet")
    assert captions_in(opened(tmp_path)) == [("a",)]
    parquet.write_table(table, tmp_path / "images.parquet")
    with pytest.raises(UserError, match=r"both deep/0\.tar and images\.parquet, words\.parquet hold"):
        open_source(str(tmp_path))


def test_a_list_of_images_that_are_elsewhere_says_so(tmp_path: Path) -> None:
    image_folder(tmp_path / "images", texts=False)
    write_table(tmp_path / "captions.csv", [("a.png", "one")])
    with pytest.raises(UserError, match=r"captions\.csv: cannot find its only image, .* as --image_folder"):
        open_source(str(tmp_path))
    assert captions_in(opened(tmp_path, image_folder=[str(tmp_path / "images")])) == [("one",)]


def test_real_images(image_tar: Path) -> None:
    source = opened(image_tar)
    assert len(source) == 8
    assert (source[6].id, source[6].captions[0]) == ("horse", "the black silhouette of a horse")
    assert source[7].image.size == (256, 171)
    assert to_rgb(source[6].image).getpixel((0, 0)) == (255, 255, 255)  # transparent pixels become white


@pytest.mark.parametrize("kind", ["images", "tars"])
def test_captions_of_several_lines_are_pointed_out(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    captioned_image(tmp_path, "a")
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    place = tmp_path
    if kind == "tars":
        place = write_tar(tmp_path / "x.tar", [("a.png", png("red")), ("a.txt", b"one\ntwo\n")])
    assert captions_in(opened(place)) == [("one\ntwo",)]
    said = capsys.readouterr().out
    assert "1 of the first 1 captions have several lines. A text file is one caption" in said
    captioned_image(tmp_path / "plain", "b")
    opened(tmp_path / "plain")
    assert "several lines" not in capsys.readouterr().out


def test_names_too_long_for_a_file_are_missing_images(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png("red"))
    for long in ("x" * 300, "é" * 200):
        rows = [(long, "one"), ("a.png", "two"), (f"{long}.png", "three")]
        source = opened(write_table(tmp_path / "list.csv", rows))
        assert captions_in(source) == [("one",), ("two",), ("three",)]
        with pytest.raises(PairError, match="cannot be read"):
            _ = source[0]
    with pytest.raises(UserError, match="cannot find its only image"):
        opened(write_table(tmp_path / "list.csv", [("é" * 200, "one")]))


def test_a_list_of_paths_in_parquet_counts_in_a_folder_too(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png("red"))
    rows = {"image": ["a.png", "a.png"], "text": ["one", "two"]}
    parquet.write_table(pyarrow.table(rows), tmp_path / "list.parquet")
    for flags in ({}, {"image_folder": [str(tmp_path)]}):
        assert captions_in(opened(tmp_path, **flags)) == [("one", "two")]


def test_the_file_name_of_an_imagefolder_goes_before_other_columns(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png("red"))
    write_lines(tmp_path / "metadata.jsonl", [{"image": "http://x/y.png", "file_name": "a.png", "text": "one"}])
    assert captions_in(opened(tmp_path)) == [("one",)]


def test_cells_that_hold_a_list_are_several_captions(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png("red"))
    cells = ['["one", "two"]', "['three', \"it's four\"]", "['five' 'six'\n 'seven']"]
    source = opened(write_table(tmp_path / "list.csv", [("a.png", cell) for cell in cells]))
    assert captions_in(source) == [("one", "two", "three", "it's four", "five", "six", "seven")]
    plain = ["[a photo]", '["no end', "[]", "[1, 2]", "['a' + 'b']", "['it's a cat']", '["a" is here]']
    source = opened(write_table(tmp_path / "list.csv", [("a.png", cell) for cell in plain]))
    assert captions_in(source) == [tuple(plain)]


def test_one_image_under_two_spellings_of_its_path_is_one_pair(tmp_path: Path) -> None:
    captioned_image(tmp_path / "im", "a")
    rows = [("im/a.png", "one"), ("./im/a.png", "two"), ("im//a.png", "three")]
    assert captions_in(opened(write_table(tmp_path / "list.csv", rows))) == [("one", "two", "three")]
