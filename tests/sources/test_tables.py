"""Which columns of a table are images and captions, and what becomes of its rows."""

from pathlib import Path
from typing import Any

import pytest

from tests.sources.pictures import png
from uvit.errors import UserError
from uvit.sources.tables import Columns, TableRows, TableSource, choose_columns
from uvit.sources.types import PairError

pa = pytest.importorskip("pyarrow")

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
TEXT, TEXTS, NUMBER = pa.string(), pa.list_(pa.large_string()), pa.int64()


class Lists:
    """A table in memory, of rows."""

    def __init__(self, rows: list[dict[str, Any]]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def schema(self) -> Any:
        raise NotImplementedError

    def row(self, index: int, columns: tuple[str, ...]) -> dict[str, Any]:
        return {name: self.rows[index][name] for name in columns}

    def column(self, name: str) -> list[Any]:
        return [row[name] for row in self.rows]


def chosen(kinds: dict[str, Any], image: str | None = None, caption: str | None = None) -> Columns:
    return choose_columns(pa.schema(list(kinds.items())), "place", image, caption)


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ({"image": IMAGE, "text": TEXT}, Columns("image", "text", None)),
        ({"caption": TEXTS, "jpg": pa.binary(), "__key__": TEXT}, Columns("jpg", "caption", "__key__")),
        ({"file_name": TEXT, "photo": IMAGE, "prompt": TEXT, "id": NUMBER}, Columns("photo", "prompt", "id")),
        ({"path": TEXT, "txt": pa.dictionary(pa.int8(), TEXT)}, Columns("path", "txt", None)),
        (
            {"image": IMAGE, "caption": NUMBER, "sentences": TEXTS, "image_id": TEXT},
            Columns("image", "sentences", None),
        ),
    ],
)
def test_columns_are_found_by_name_and_kind(kinds: dict[str, Any], expected: Columns) -> None:
    assert chosen(kinds) == expected


def test_columns_that_are_named() -> None:
    kinds = {"image": IMAGE, "second": IMAGE, "text": TEXT, "alt": TEXTS, "label": NUMBER}
    assert chosen(kinds, "second", "alt") == Columns("second", "alt", None)
    for image, caption, says in [
        ("none", None, r"^--image_column none: .* no such column; it has image, second, text, alt, label$"),
        (None, "none", r"^--caption_column none: .* no such column; it has image"),
        ("label", None, "^--image_column label: contains int64"),
        (None, "label", "^--caption_column label: must contain a string or a list of strings .* contains int64$"),
    ]:
        with pytest.raises(UserError, match=says):
            chosen(kinds, image, caption)
    with pytest.raises(UserError, match=r"no column contains images; choose one of text, label with --image_column"):
        chosen({"text": TEXT, "label": NUMBER})
    with pytest.raises(
        UserError, match=r"no column contains captions; choose one of image, label with --caption_column"
    ):
        chosen({"image": IMAGE, "label": NUMBER})


def source_of(rows: list[dict[str, Any]], folder: Path | None, id: str | None = None) -> TableSource:
    return TableSource(Lists(rows), TableRows("place", Columns("image", "text", id), folder))


def test_images_as_bytes_in_a_struct_or_as_a_path(tmp_path: Path) -> None:
    (tmp_path / "blue.png").write_bytes(png("blue"))
    images = [
        png("blue"),
        {"bytes": png("blue"), "path": "elsewhere.png"},
        {"bytes": None, "path": "blue.png"},
        {"bytes": None, "path": str(tmp_path / "blue.png")},
        "blue.png",
    ]
    source = source_of([{"image": image, "text": ["a", " "]} for image in images], tmp_path)
    for index in range(len(images)):
        pair = source[index]
        assert (pair.id, pair.captions, pair.image.getpixel((0, 0))) == (str(index), ("a",), (0, 0, 255))
        assert [problem.kind for problem in pair.problems] == ["empty caption"]
        assert source.captions(index) == ("a",)


def test_paths_of_the_hub_may_be_urls_and_no_others(tmp_path: Path) -> None:
    url = (tmp_path / "blue.png").as_uri()
    rows = [{"image": {"bytes": None, "path": url}, "text": "a"}]
    with pytest.raises(PairError, match="cannot be read"):
        _ = source_of(rows, None)[0]
    (tmp_path / "blue.png").write_bytes(png("blue"))
    assert source_of(rows, None)[0].image.getpixel((0, 0)) == (0, 0, 255)
    with pytest.raises(PairError, match="cannot be read"):
        _ = source_of(rows, tmp_path)[0]


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("missing image", {"image": None, "text": "a"}),
        ("missing image", {"image": {"bytes": None, "path": None}, "text": "a"}),
        ("missing image", {"image": "none.png", "text": "a"}),
        ("broken image", {"image": b"words", "text": "a"}),
        ("no caption", {"image": png("red"), "text": None}),
        ("no caption", {"image": png("red"), "text": []}),
        ("no caption", {"image": png("red"), "text": " "}),
    ],
)
def test_bad_rows(tmp_path: Path, kind: str, row: dict[str, Any]) -> None:
    source = source_of([{"image": png("red"), "text": "a"}, row], tmp_path)
    with pytest.raises(PairError, match=r"^place, row 1") as error:
        _ = source[1]
    assert error.value.problem.kind == kind
    assert source[0].captions == ("a",)


def test_ids_that_come_twice(tmp_path: Path) -> None:
    rows = [{"image": png("red"), "text": "a", "id": id} for id in (7, 8, 7, None)]
    source = source_of(rows, tmp_path, "id")
    assert [source[i].id for i in (0, 1, 3)] == ["7", "8", "3"]
    (problem,) = source.problems()
    assert (problem.id, problem.kind, problem.message) == (
        "7",
        "duplicate id",
        "place, row 2: id 7 appears a second time",
    )
    for read in (source.__getitem__, source.captions):
        with pytest.raises(PairError, match="a second time"):
            read(2)


def test_no_rows(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^--source place: has no rows$"):
        source_of([], tmp_path)
