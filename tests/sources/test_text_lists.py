"""A row of a text list is read again by its place, whatever the encoding and the line ends."""

import json
from pathlib import Path

import pytest

from uvit.sources.files import ListRow
from uvit.sources.text_lists import JsonLines, SeparatedValues

ROWS = [
    ("a.png", "red"),
    ("é.png", "红色, 'été'"),
    ("b.png", 'a "box"'),
    ("c.png", "two\nlines \U0001f601"),
    ("a.png", ""),
]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_rows_of_a_table_are_read_again(end: str, encoding: str, tmp_path: Path) -> None:
    lines = ["", "image,caption", *(f'{name},"{text.replace(chr(34), chr(34) * 2)}"' for name, text in ROWS), ""]
    (tmp_path / "list.csv").write_bytes(end.join(lines).encode(encoding))
    reader = SeparatedValues(tmp_path / "list.csv", None, None)
    rows = [row for row in reader.rows() if isinstance(row, ListRow)]
    assert [(row.name, row.captions) for row in rows] == [(name, [text]) for name, text in ROWS]
    assert reader.read([(row.start, row.length) for row in rows]) == [(row.name, row.captions) for row in rows]
    assert [row.number for row in rows[:4]] == [3, 4, 5, 6]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
def test_objects_are_read_again(encoding: str, tmp_path: Path) -> None:
    lines = [json.dumps({"image": name, "text": [text]}, ensure_ascii=False) for name, text in ROWS]
    (tmp_path / "list.jsonl").write_bytes("\r\n\n".join(lines).encode(encoding))
    reader = JsonLines(tmp_path / "list.jsonl", None, None)
    rows = [row for row in reader.rows() if isinstance(row, ListRow)]
    assert [(row.name, row.captions) for row in rows] == [(name, [text]) for name, text in ROWS]
    assert reader.read([(row.start, row.length) for row in rows]) == [(row.name, row.captions) for row in rows]
