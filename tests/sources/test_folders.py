"""Images with a .txt beside them."""

import unicodedata
from pathlib import Path

import pytest

from tests.sources.pictures import png
from uvit.sources.files import FileSource
from uvit.sources.folders import open_folder
from uvit.sources.open import open_source
from uvit.sources.types import PairError


def write(folder: Path, **files: str | bytes) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = folder / name.replace("_", ".")
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def test_pairs_come_in_sorted_order_at_any_depth(tmp_path: Path) -> None:
    write(tmp_path / "z", b_JPG=png("red", format="JPEG"), b_txt="\ufeffred \n")
    write(tmp_path, c_png=png("blue"), c_txt="blue", y_webp=png("lime", format="WEBP"), y_txt="green", README_txt="?")
    write(tmp_path / ".cache", d_png=png("blue"), d_txt="hidden")
    write(tmp_path, _hidden_png=png("blue"), _hidden_txt="hidden")
    source = open_folder(tmp_path)
    pairs = [source[row] for row in range(len(source))]
    assert [(pair.id, pair.captions) for pair in pairs] == [
        ("c.png", ("blue",)),
        ("y.webp", ("green",)),
        ("z/b.JPG", ("red",)),
    ]
    assert pairs[0].image.getpixel((0, 0)) == (0, 0, 255)
    assert source.problems() == []


def test_what_is_wrong_with_a_pair_stays_with_it(tmp_path: Path) -> None:
    write(tmp_path, a_png=png("red"), b_png=png("red"), b_txt=" ", c_png=png("red"), c_txt=b"\xff")
    write(tmp_path, d_png=b"", d_txt="d", e_png=png("red"), e_txt="e", f_png=png("red"), f_txt="f")
    source = open_folder(tmp_path)
    (tmp_path / "f.txt").unlink()
    assert [problem.id for problem in source.problems()] == ["a.png"]
    kinds = []
    for row in (0, 1, 2, 3, 5):
        with pytest.raises(PairError) as error:
            _ = source[row]
        kinds.append(error.value.problem.kind)
    assert kinds == ["no caption", "no caption", "not UTF-8", "broken image", "no caption"]
    assert (source[4].captions, source.captions(3)) == (("e",), ("d",))


def test_every_file_is_a_pair_a_problem_or_unread(tmp_path: Path) -> None:
    image = png("red")
    write(tmp_path, a_png=image, a_TXT="a", b_JPG=png("red", format="JPEG"), b_json='{"caption": "b"}', c_jfif=image)
    write(tmp_path, two_png=image, two_gif=png("red", format="GIF"), two_txt="2", lonely_txt="x", x_heic="?", x_txt="x")
    write(tmp_path, Thumbs_db="x", notes_doc="x", _hidden_png=image, LICENSE_txt="x", b_txt_bak="x", y_json="{}")
    write(tmp_path / "__MACOSX", __a_png="x")
    (tmp_path / "dir.png").mkdir()
    (tmp_path / "dir.txt").write_text("a folder")
    (tmp_path / "gone.png").symlink_to("nowhere.png")
    (tmp_path / "gone.txt").write_text("gone")
    source = open_folder(tmp_path)
    good, bad = [], []
    for row in range(len(source)):
        try:
            good.append((source[row].id, source[row].captions))
        except PairError as error:
            bad.append((error.problem.id, error.problem.kind))
    assert good == [("a.png", ("a",)), ("b.JPG", ("b",)), ("two.gif", ("2",)), ("two.png", ("2",))]
    assert bad == [
        ("c.jfif", "no caption"),
        ("gone.png", "missing image"),
        ("dir.txt", "missing image"),
        ("lonely.txt", "missing image"),
        ("x.txt", "missing image"),
    ]
    assert "x.heic is not in an image format that is read" in source.problems()[-1].message
    assert source.unread == [
        *("LICENSE.txt", "b.txt.bak", "notes.doc", "y.json"),
        *(".hidden.png", "Thumbs.db", "__MACOSX/"),
    ]


def test_a_folder_counts_when_one_image_has_a_caption(tmp_path: Path) -> None:
    write(tmp_path / "deep", a_png=png("red"))
    write(tmp_path, a_txt="elsewhere")
    assert not open_folder(tmp_path).is_captioned()
    write(tmp_path / "deep", a_txt="red")
    assert open_folder(tmp_path).is_captioned()
    assert not open_folder(tmp_path / "gone").is_captioned()


def test_captions_in_other_common_names(tmp_path: Path) -> None:
    write(tmp_path, a_jpg=png("red", format="JPEG"), a_jpg_txt="full name", b_png=png("red"), b_caption="b")
    write(tmp_path, c_png=png("red"), c_txt="c", c_caption="other", c_png_txt="another", lost_caption="x")
    source = open_folder(tmp_path)
    assert [source.captions(row) for row in range(3)] == [("full name",), ("b",), ("c",)]
    assert [problem.id for problem in source.problems()] == ["lost.caption"]
    assert source.unread == ["c.caption", "c.png.txt"]


def test_accents_of_one_character_and_of_two(tmp_path: Path) -> None:
    short, long = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    for image, caption in (("a", "a"), (f"{short}1", f"{long}1"), (f"{long}2", f"{short}2")):
        (tmp_path / f"{image}.png").write_bytes(png("red"))
        (tmp_path / f"{caption}.txt").write_text(image)
    source = open_folder(tmp_path)
    assert source.problems() == [] == source.unread
    assert sorted(source.captions(row)[0] for row in range(3)) == sorted(["a", f"{short}1", f"{long}2"])
    (tmp_path / "metadata.csv").write_text(f"file_name,text\n{long}1.png,x\n{short}2.png,y\n", encoding="utf-8")
    listed = open_source(str(tmp_path))
    assert isinstance(listed, FileSource)
    assert [(listed[row].id, listed.captions(row)) for row in range(2)] == [
        (f"{long}1.png", ("x",)),
        (f"{short}2.png", ("y",)),
    ]
