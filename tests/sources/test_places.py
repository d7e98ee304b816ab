"""What an index keeps of a row is its place; the row is read again. Keys tell equal names apart from others."""

import io
import json
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.sources.pictures import png
from uvit.errors import UserError
from uvit.sources import json_entries
from uvit.sources.coco import open_coco
from uvit.sources.json_entries import UnusualError, read_entries
from uvit.sources.lists import open_list
from uvit.sources.places import PlaceList, first_of_each, number_equal

WORDS = ["red", 'a "box"', "été", "红色\u2028", "\U0001f600", "]}", "\\", "\ud800", ""]


@pytest.mark.parametrize("seed", range(5))
def test_equal_names_have_equal_numbers_in_the_order_of_their_first(seed: int) -> None:
    words = random.Random(seed)
    names = [f"{words.choice(WORDS)}{words.randrange(20)}" for _ in range(seed * 40)]
    places = PlaceList()
    for name in names:
        places.add_key(name)
    numbers = number_equal(*places.keys())
    assert numbers.tolist() == [list(dict.fromkeys(names)).index(name) for name in names]
    assert first_of_each(numbers).tolist() == [name not in names[:row] for row, name in enumerate(names)]


def test_keys_whose_first_halves_are_equal_are_told_apart() -> None:
    keys = np.array([5, 5, 3, 5, 5], np.int64), np.array([1, 2, 1, 1, 2], np.uint32)
    assert number_equal(*keys).tolist() == [0, 1, 2, 0, 1]


def document(seed: int) -> dict[str, Any]:
    choose = random.Random(seed)
    entries = [
        choose.choice([{"id": row, "text": choose.choice(WORDS)}, 12, -3.5e7, None, [[], {"b": "]"}], "a"])
        for row in range(choose.randrange(30))
    ]
    others = {"info": {"a": [1, {"b": "}"}]}, "n": 12345, "images": entries[:7], "annotations": entries, "x": []}
    return dict(choose.sample(list(others.items()), len(others)))


@pytest.mark.parametrize("window", [1, 3, 16, 2**20])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
def test_entries_and_their_places(window: int, encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(4):
        expected = document(seed)
        text = json.dumps(expected, ensure_ascii=seed == 0, indent=seed % 2 or None)
        data = text.encode(encoding, "surrogatepass")
        monkeypatch.setattr(json_entries, "WINDOW", max(4, window))
        found = list(read_entries(io.BytesIO(data), ("images", "annotations")))
        for name in ("images", "annotations"):
            assert [entry for key, entry, *_ in found if key == name] == expected[name]
        codec = {"utf-8-sig": "utf-8", "utf-16": "utf-16-le", "utf-32": "utf-32-le"}.get(encoding, encoding)
        for _, entry, start, length in found:
            assert json.loads(data[start : start + length].decode(codec, "surrogatepass")) == entry


@pytest.mark.parametrize("text", ["[]", '{"a": []}', '{"a": [], "b": {}}', '{"a": [], "b": [], "b": []}', "{} x", ""])
def test_what_is_not_one_object_with_each_list_once_is_unusual(text: str) -> None:
    with pytest.raises(UnusualError):
        list(read_entries(io.BytesIO(text.encode()), ("a", "b")))


def test_a_list_that_changes_is_not_read_on(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png("red"))
    path = tmp_path / "list.csv"
    path.write_text("image,caption\na.png,red\n", encoding="utf-8")
    source = open_list(path)
    assert source.captions(0) == ("red",)
    path.write_text("image,caption\na.png,scarlet\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"list\.csv: has changed since it was opened; run the same command again"):
        source.captions(0)
    path.unlink()
    with pytest.raises(UserError, match=r"list\.csv: can no longer be read"):
        source.captions(0)


@pytest.mark.parametrize("form", ["list.csv", "list.jsonl", "captions.json"])
def test_an_index_has_twenty_bytes_a_caption(form: str, tmp_path: Path) -> None:
    number, caption = 2000, "a caption of some length " * 4
    path = tmp_path / form
    (tmp_path / "0.png").write_bytes(png("red"))
    rows = [{"file_name": f"{row}.png", "caption": caption} for row in range(number)]
    if form == "list.csv":
        path.write_text("\n".join(["image,caption", *(f"{row // 2}.png,{caption}" for row in range(number))]))
    elif form == "list.jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        images = [{"id": row, "file_name": f"{row}.png"} for row in range(number // 5)]
        notes = [{"image_id": row % (number // 5), "caption": caption} for row in range(number)]
        path.write_text(json.dumps({"images": images, "annotations": notes}))
    source = open_coco([path], tmp_path) if form == "captions.json" else open_list(path)
    assert len(pickle.dumps(source)) <= 20 * number + 2000
    assert sum(map(len, map(source.captions, range(len(source))))) == number
