"""Lists of image files: the same pictures in any form are the same pairs, and a bad row is bad alone."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.sources.pictures import PICTURES, ROWS, coco_of_pictures, png, write_images, write_lines, write_table
from uvit.errors import UserError
from uvit.sources.coco import open_coco
from uvit.sources.files import FileSource
from uvit.sources.folders import open_folder
from uvit.sources.lists import open_list
from uvit.sources.parquet_lists import lists_paths
from uvit.sources.types import PairError, RandomAccessSource


def write_parquet(path: Path, columns: dict[str, list[Any]]) -> Path:
    arrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(arrow.table(columns), path)
    return path


def write_metadata(path: Path) -> Path:
    return write_lines(path, [{"file_name": name, "text": list(captions)} for name, (_, captions) in PICTURES.items()])


def parquet_of_pictures(path: Path) -> Path:
    return write_parquet(path, {"image": [name for name, _ in ROWS], "caption": [caption for _, caption in ROWS]})


def parquet_of_lists(path: Path) -> Path:
    captions = [list(captions) for _, captions in PICTURES.values()]
    return write_parquet(path, {"file_name": list(PICTURES), "captions": captions})


def write_sidecars(folder: Path) -> Path:
    for name, (_, captions) in PICTURES.items():
        (folder / name).with_suffix(".txt").write_text("\n".join(captions), encoding="utf-8")
    return folder


FORMS: dict[str, Callable[[Path], RandomAccessSource]] = {
    "metadata.jsonl": lambda folder: open_list(write_metadata(folder / "metadata.jsonl")),
    "metadata.csv": lambda folder: open_list(write_table(folder / "metadata.csv", ROWS, ("file_name", "text"))),
    "csv": lambda folder: open_list(write_table(folder / "list.csv", ROWS)),
    "tsv": lambda folder: open_list(write_table(folder / "list.tsv", ROWS)),
    "parquet": lambda folder: open_list(parquet_of_pictures(folder / "list.parquet")),
    "parquet of lists": lambda folder: open_list(parquet_of_lists(folder / "list.parquet")),
    "COCO": lambda folder: open_coco([coco_of_pictures(folder / "captions.json")], folder),
    "images with .txt": lambda folder: open_folder(write_sidecars(folder)),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_same_pictures_in_any_form_are_the_same_pairs(form: str, tmp_path: Path) -> None:
    source = pickle.loads(pickle.dumps(FORMS[form](write_images(tmp_path))))
    pairs = [source[row] for row in range(len(source))]
    expected = [(name, colour, captions) for name, (colour, captions) in PICTURES.items()]
    if form == "COCO":
        expected = [(str(10 - row), *rest) for row, (_, *rest) in enumerate(expected)]
    if form == "images with .txt":
        expected = sorted((name, colour, ("\n".join(captions),)) for name, colour, captions in expected)
    for pair, (id, colour, captions) in zip(pairs, expected, strict=True):
        assert (pair.id, pair.captions, pair.problems) == (id, captions, ())
        assert pair.image.getpixel((0, 0)) == {"blue": (0, 0, 255), "red": (255, 0, 0), "lime": (0, 255, 0)}[colour]
    assert [source.captions(row) for row in range(len(source))] == [pair.captions for pair in pairs]
    assert source.problems() == []


def test_images_are_looked_for_in_the_image_folder_and_absolute_paths_as_they_are(tmp_path: Path) -> None:
    images = write_images(tmp_path / "elsewhere")
    path = write_table(tmp_path / "list.csv", ROWS)
    assert open_list(path, images)[1].image.getpixel((0, 0)) == (255, 0, 0)
    with pytest.raises(UserError, match=r"any of its first 3 images, such as .*b\.png; .*--image_folder"):
        open_list(path)
    absolute = write_table(tmp_path / "absolute.tsv", [(str(images / name), caption) for name, caption in ROWS])
    assert open_list(absolute)[0].captions == PICTURES["b.png"][1]


def test_columns_by_flag_or_by_usual_name(tmp_path: Path) -> None:
    write_images(tmp_path)
    rows = [("one", "a.png", "first"), ("two", "b.png", "second")]
    path = write_table(tmp_path / "list.csv", rows, ("alt", "photo", "caption"))
    assert open_list(path, None, "photo").captions(0) == ("first",)
    assert open_list(path, None, "photo", "alt").captions(1) == ("two",)
    with pytest.raises(UserError, match=r"its columns are 'alt', 'photo', 'caption'; .* --image_column"):
        open_list(path)
    with pytest.raises(UserError, match=r"^--caption_column title: .* has no such column; it has 'alt', 'photo'"):
        open_list(path, None, "photo", "title")
    lines = write_lines(tmp_path / "list.jsonl", [{"photo": "a.png", "text": "no", "alt": ["yes", "oui"]}])
    assert open_list(lines, None, "photo", "alt").captions(0) == ("yes", "oui")


def good_and(*rows: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"file_name": "a.png", "text": "red"}, *rows, {"file_name": "b.png", "text": "blue"}]


@pytest.mark.parametrize(
    ("line", "kind", "id", "says"),
    [
        (b"{", "broken JSON", "metadata.jsonl:2", "line 2: is not valid JSON"),
        (b"[]", "broken JSON", "metadata.jsonl:2", "line 2: must be a JSON object"),
        (b"\xff", "not UTF-8", "metadata.jsonl:2", "line 2: is not UTF-8"),
        (b'{"text": "a"}', "broken line", "metadata.jsonl:2", "found 'text'"),
        (b'{"file_name": "c"}', "no caption", "c", "line 2: needs text"),
        (b'{"file_name": "c", "text": " "}', "no caption", "c", "only empty captions"),
        (b'{"file_name": "c", "text": "\\ud800"}', "not UTF-8", "c", "is not Unicode"),
        (b'{"file_name": "\\ud800", "text": 3}', "no caption", r"\ud800", "needs text"),
    ],
)
def test_a_bad_line_is_bad_alone(line: bytes, kind: str, id: str, says: str, tmp_path: Path) -> None:
    write_images(tmp_path)
    path = tmp_path / "metadata.jsonl"
    good = [json.dumps(row).encode() for row in good_and()]
    path.write_bytes(b"\n".join([good[0], line, b"", good[1]]))
    source = open_list(path)
    [problem] = source.problems()
    assert (problem.kind, problem.id, problem.left_out) == (kind, id, True) and says in problem.message
    for read in (source.captions, source.__getitem__):
        with pytest.raises(PairError) as error:
            read(1)
        assert error.value.problem == problem
    assert [source[row].id for row in (0, 2)] == ["a.png", "b.png"]
    problem.message.encode()


@pytest.mark.parametrize("name", ["list.jsonl", "list.csv"])
def test_rows_with_the_same_image_are_joined(name: str, tmp_path: Path) -> None:
    """At the place of the first, whatever the format, and however the path is spelled."""
    write_images(tmp_path)
    rows = [("a.png", "red"), ("b.png", "blue"), ("./a.png", "crimson"), ("a.png", "scarlet")]
    if name == "list.csv":
        source = open_list(write_table(tmp_path / name, rows, ("image", "caption")))
    else:
        source = open_list(write_lines(tmp_path / name, [{"file_name": image, "text": text} for image, text in rows]))
    assert [source.captions(row) for row in range(len(source))] == [("red", "crimson", "scarlet"), ("blue",)]
    assert (source[0].id, source.problems()) == ("a.png", [])


@pytest.mark.parametrize("separator", ["\u2028", "\x85"])
def test_only_a_newline_ends_a_line(separator: str, tmp_path: Path) -> None:
    write_images(tmp_path)
    row = json.dumps({"file_name": "a.png", "text": f"one{separator}two"}, ensure_ascii=False)
    (tmp_path / "metadata.jsonl").write_text(row + "\n", encoding="utf-8")
    assert open_list(tmp_path / "metadata.jsonl").captions(0) == (f"one{separator}two",)


def test_bad_rows_of_a_table_are_bad_alone(tmp_path: Path) -> None:
    write_images(tmp_path)
    lines = [b"image,caption", b"a.png,red", b"b.png,blue, or so", b"", b"b.png", b",nothing", b"b.png,", b"b.png,blue"]
    lines += [b"c.png, ", b"d.png,\xff", b"gone.png,gone", b""]
    (tmp_path / "list.csv").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines))
    source = open_list(tmp_path / "list.csv")
    kinds = [(problem.kind, problem.id, problem.left_out) for problem in source.problems()]
    assert kinds == [
        ("broken line", "list.csv:3", True),
        ("broken line", "list.csv:5", True),
        ("broken line", "list.csv:6", True),
        ("empty caption", "b.png", False),
        ("no caption", "c.png", True),
        ("not UTF-8", "d.png", True),
    ]
    assert "has 3 fields, but the first line has 2; does a caption need quotes?" in source.problems()[0].message
    assert source[4].captions == ("blue",) and source[4].problems == (source.problems()[3],)
    with pytest.raises(PairError, match=r"gone\.png of gone\.png cannot be read") as error:
        _ = source[7]
    assert error.value.problem.kind == "missing image"


def test_an_open_quote_is_found(tmp_path: Path) -> None:
    write_images(tmp_path)
    path = tmp_path / "list.tsv"
    path.write_text('image\tcaption\na.png\tred\nb.png\t"open\na.png\tlost"\nb.png\tblue\n')
    source = open_list(path)
    first, second = source.problems()
    assert first.kind == "broken line" and "line 3: a field continues to line 4; is a quote" in first.message
    assert (second.id, second.left_out) == ("list.tsv:4", True) and "begins in line 3" in second.message
    assert [source.captions(row) for row in (0, 3)] == [("red",), ("blue",)]
    assert len(source) == 4, "every line counts"
    path.write_text('image\tcaption\na.png\tred\nb.png\t"' + "x" * 200_000 + "\n")
    with pytest.raises(UserError, match=r"list\.tsv: cannot be read after line 2 .* quote"):
        open_list(path)
    lines = write_table(tmp_path / "list.csv", [("a.png", "two\nlines")])
    assert open_list(lines).captions(0) == ("two\nlines",)  # spreadsheets write such


SPELLINGS = {
    "semicolons": ("l.csv", "image;caption\n{a}\n{b}\n", ";", "utf-8"),
    "tabs in a .csv": ("l.csv", "image\tcaption\n{a}\n{b}\n", "\t", "utf-8"),
    "commas in a .tsv": ("l.tsv", "image,caption\n{a}\n{b}\n", ",", "utf-8"),
    "vertical bars": ("l.csv", "image|caption\n{a}\n{b}", "|", "utf-8-sig"),
    "spaces after the separator": ("l.csv", "image, caption\n{a}\n{b}\n", ",", "utf-8"),
    "an empty line first": ("l.csv", "\nimage,caption\n{a}\n\n{b}\n", ",", "utf-8"),
    "CRLF": ("l.csv", "image,caption\r\n{a}\r\n{b}\r\n", ",", "utf-8"),
    "CR": ("l.csv", "image,caption\r{a}\r{b}\r", ",", "utf-8"),
    "UTF-16 of a spreadsheet": ("l.csv", "image\tcaption\r\n{a}\r\n{b}\r\n", "\t", "utf-16"),
    "UTF-16 without a mark": ("l.tsv", "image\tcaption\n{a}\n{b}\n", "\t", "utf-16-le"),
    "UTF-16, the other way round": ("l.tsv", "image\tcaption\n{a}\n{b}\n", "\t", "utf-16-be"),
    "UTF-32": ("l.tsv", "image\tcaption\n{a}\n{b}\n", "\t", "utf-32"),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_separator_and_the_encoding_are_detected(spelling: str, tmp_path: Path) -> None:
    write_images(tmp_path)
    name, text, separator, encoding = SPELLINGS[spelling]
    rows = {"a": f"a.png{separator}红色 é", "b": f'b.png{separator}"a ""box"", blue; or| so"'}
    (tmp_path / name).write_bytes(text.format(**rows).encode(encoding))
    source = open_list(tmp_path / name)
    assert [(source[row].id, source.captions(row)) for row in range(len(source))] == [
        ("a.png", ("红色 é",)),
        ("b.png", ('a "box", blue; or| so',)),
    ]
    assert source.problems() == []


def test_json_lines_in_utf_16(tmp_path: Path) -> None:
    write_images(tmp_path)
    text = json.dumps({"file_name": "a.png", "text": "红\u2028色"}, ensure_ascii=False)
    (tmp_path / "l.jsonl").write_bytes(f"{text}\n".encode("utf-16"))
    assert open_list(tmp_path / "l.jsonl").captions(0) == ("红\u2028色",)


def test_a_quote_that_swallows_rows_costs_those_alone(tmp_path: Path) -> None:
    write_images(tmp_path)
    lines = ["image,caption", "a.png,red", 'b.png,"blue', "deep/c.png,lime", 'x.png,"a, b"', "a.png,rouge"]
    lines.append('b.png,5" x')
    (tmp_path / "list.csv").write_text("\n".join(lines))
    source = open_list(tmp_path / "list.csv")
    assert [problem.id for problem in source.problems()] == ["list.csv:3", "list.csv:4", "list.csv:5"]
    assert source.captions(0) == ("red", "rouge") and source.captions(4) == ('5" x',)


def test_a_few_rows_that_are_not_utf_8_are_bad_alone(tmp_path: Path) -> None:
    write_images(tmp_path)
    lines = [b"image,caption", "a.png,红色".encode(), "b.png,où".encode("latin-1"), "deep/c.png,vert été".encode()]
    (tmp_path / "list.csv").write_bytes(b"\n".join(lines))
    assert [problem.kind for problem in open_list(tmp_path / "list.csv").problems()] == ["not UTF-8"]


def test_bad_rows_of_parquet(tmp_path: Path) -> None:
    write_images(tmp_path)
    columns = {"image": ["a.png", None, "b.png", "b.png"], "text": [["red"], ["nothing"], None, ["blue"]]}
    source = open_list(write_parquet(tmp_path / "list.parquet", columns))
    assert [(problem.kind, problem.id) for problem in source.problems()] == [
        ("broken line", "list.parquet:2"),
        ("empty caption", "b.png"),
    ]
    assert source.captions(2) == ("blue",)
    numbers = write_parquet(tmp_path / "numbers.parquet", {"image": ["a.png"], "text": [3]})
    with pytest.raises(UserError, match="no column contains captions"):
        open_list(numbers)
    whole = write_parquet(tmp_path / "damaged.parquet", {"image": ["a.png"] * 99, "text": ["red"] * 99}).read_bytes()
    (tmp_path / "damaged.parquet").write_bytes(whole[:4] + b"\xff" * 40 + whole[44:])
    with pytest.raises(UserError, match="is not a complete parquet file"):
        open_list(tmp_path / "damaged.parquet")


def test_a_parquet_file_names_its_images_or_holds_them(tmp_path: Path) -> None:
    images: list[Any] = [{"bytes": png("red"), "path": None}]
    assert not lists_paths(write_parquet(tmp_path / "a.parquet", {"image": images, "text": ["red"]}), None, None)
    both = write_parquet(tmp_path / "b.parquet", {"image": images, "file": ["a.png"], "text": ["red"]})
    assert not lists_paths(both, None, None) and lists_paths(both, "file", None)
    with pytest.raises(UserError, match=r"^--image_column photo: .* no such column; it has image, file, text"):
        lists_paths(both, "photo", None)
    both.write_bytes(both.read_bytes()[:-20])
    with pytest.raises(UserError, match="is not a complete parquet file"):
        lists_paths(both, None, None)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("l.jsonl", b"", "lists no image"),
        ("l.jsonl", b"\n\n", "lists no image"),
        (
            "l.jsonl",
            b'{"file_name": "a.png"}\n[]\n',
            "none of its 2 images is usable; the first problem: .* needs text",
        ),
        ("l.csv", b"", "its columns are none"),
        ("l.csv", b"image,caption\na.png\tred\n", r"has 1 fields, .* is the separator '\\t', not ','"),
        ("l.csv", b"image,caption\n", "lists no image"),
        ("l.csv", b"photo,words\na.png,red\n", r"its columns are 'photo', 'words'; name the one"),
        ("l.csv", b"photo;words\na.png;red\n", r"its columns are 'photo', 'words'; name the one"),
        (
            "l.csv",
            b"a.png,red\n",
            r"first line must name the columns, such as image and caption, but contains 'a\.png'",
        ),
        ("l.tsv", b"a.png|red\n", r"first line must name the columns, .* 'a\.png', 'red'"),
        ("l.csv", b'image,caption\na.png,"red\nb.png,blue\n', "the quote that opens in line 2 is never closed"),
        ("l.tsv", b'image\tcaption\na.png\tred\nb.png\t"blue', "the quote that opens in line 3 is never closed"),
        ("l.csv", "image,caption\na.png,été\nb.png,où\n".encode("latin-1"), r"not UTF-8 \(2 rows; the first: .*line 2"),
        ("l.tsv", "image\tcaption\na.png\t红色\nb.png\t蓝色\n".encode("gb18030"), "iconv -f GB18030 -t UTF-8"),
        ("l.jsonl", '{"image": "a.png", "text": "é"}\n{"image": "b.png", "text": "è"}\n'.encode("cp1252"), "not UTF-8"),
        ("l.csv", "image,caption\na.png,red\n".encode("utf-16")[:-1], "is damaged UTF-16-LE text"),
        ("l.jsonl", b'{"file_name": "gone.png", "text": "x"}', r"cannot find its only image, such as .*gone\.png"),
    ],
)
def test_lists_of_no_use(name: str, content: bytes, says: str, tmp_path: Path) -> None:
    write_images(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=says) as error:
        open_list(tmp_path / name)
    str(error.value).encode()


def test_a_folder_that_goes_away_is_no_fault_of_the_pairs(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images")
    source = open_list(write_table(tmp_path / "list.csv", ROWS), images)
    (images / "a.png").unlink()
    with pytest.raises(PairError):
        _ = source[1]
    shutil.rmtree(images)
    with pytest.raises(UserError, match=r"images can no longer be read") as error:
        _ = source[1]
    assert not isinstance(error.value, PairError)


def test_broken_images_are_the_pairs_own_fault(tmp_path: Path) -> None:
    write_images(tmp_path)
    (tmp_path / "a.png").write_bytes(png("red")[:-30])
    source = open_list(write_table(tmp_path / "list.csv", ROWS))
    assert isinstance(source, FileSource) and source.problems() == []
    with pytest.raises(PairError) as error:
        _ = source[1]
    assert (error.value.problem.kind, error.value.problem.id) == ("broken image", "a.png")
    assert source.captions(1) == ("红色",)
