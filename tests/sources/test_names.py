"""Names of images are those that Pillow can open; a folder is listed with its links, each folder once."""

import io
from pathlib import Path

import pytest
from PIL import Image

from uvit.sources.names import is_clutter, is_image, list_files, some_of, stem_of, suffix_of

FORMATS = {"a.JPG": "JPEG", "b.jpe": "JPEG", "c.jfif": "JPEG", "d.Tiff": "TIFF", "e.tif": "TIFF", "f.PPM": "PPM"}
FORMATS |= {
    "m.mpo": "MPO",
    "g.tga": "TGA",
    "h.ico": "ICO",
    "i.gif": "GIF",
    "j.bmp": "BMP",
    "k.qoi": "QOI",
    "l.pcx": "PCX",
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_that_pillow_opens_is_an_image(name: str) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(buffer, format=FORMATS[name])
    assert Image.open(buffer).size == (32, 32)
    assert is_image(f"a.b/{name}")


def test_other_names() -> None:
    for name in ("a.txt", "a.eps", "a.pdf", "a.svg", "a.mpg", "a.h5", "png", ".png", "v.png/readme", "a.png.txt"):
        assert not is_image(name) or name == ".png"
    assert is_clutter("._a.jpg") and is_clutter("__MACOSX") and is_clutter("Thumbs.db") and not is_clutter("a.db")
    assert [(stem_of(name), suffix_of(name)) for name in ("a/b.c.PNG", "v1.0/b", "b")] == [
        ("a/b.c", "png"),
        ("v1.0/b", ""),
        ("b", ""),
    ]
    assert some_of("abcdefg") == "a, b, c, d, e and 2 more"


def test_links_are_followed_once_and_loops_end(tmp_path: Path) -> None:
    folder, other = tmp_path / "folder", tmp_path / "other"
    (folder / "z").mkdir(parents=True)
    other.mkdir()
    (folder / "z" / "a.png").touch()
    (other / "b.png").touch()
    for link, target in {
        "A": "z",  # another name of a folder that is there already
        "loop": ".",
        "up": "..",
        "z/back": "../z",
        "linked": "../other",
        "linked_again": "../other",
    }.items():
        (folder / link).symlink_to(target)
    (other / "return").symlink_to("../folder")
    (folder / "c.png").symlink_to("z/a.png")
    (folder / "broken").symlink_to("nowhere")
    (folder / ".git").mkdir()
    listing = list_files(folder)
    assert listing.files == ["broken", "c.png", "linked/b.png", "z/a.png"]
    assert (listing.clutter, listing.problems) == ([".git/"], [])


def test_a_folder_that_cannot_be_read_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0)
    try:
        list((tmp_path / "closed").iterdir())
    except PermissionError:
        [problem] = list_files(tmp_path).problems
        assert "closed: the folder cannot be read (Permission denied)" in problem.message
    else:
        pytest.skip("this user can read all folders")
