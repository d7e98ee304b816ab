"""Tars give their pairs in order, on disk or behind a URL alike; what is wrong with one costs that one only."""

import pickle
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from PIL import Image

from tests.sources.pictures import png, write_tar
from uvit.errors import UserError
from uvit.sources.tars import TarSource, TarStream, expand, open_tars
from uvit.sources.types import Pair, PairError, Problem

GOOD = [
    ("x/b.jpg", png("red", format="JPEG")),
    ("x/b.txt", b"a red box\n"),
    ("x/a.json", b'{"captions": ["two", " ", "more"]}'),
    ("x/a.PNG", png("blue")),
    ("c.webp", png("lime", format="WEBP")),
    ("c.json", '{"caption": "绿色"}'.encode()),
    ("c.cls", b"3"),
]
BAD: list[tuple[str, list[tuple[str, bytes]]]] = [
    ("missing image", [("k.txt", b"red")]),
    ("several images", [("k.png", png("red")), ("k.txt", b"red"), ("k.jpg", png("red"))]),
    ("no caption", [("k.png", png("red"))]),
    ("no caption", [("k.png", png("red")), ("k.txt", b" \n")]),
    ("no caption", [("k.png", png("red")), ("k.json", b'{"label": 3}')]),
    ("broken JSON", [("k.png", png("red")), ("k.json", b"[]")]),
    ("broken JSON", [("k.png", png("red")), ("k.json", b"{")]),
    ("not UTF-8", [("k.png", png("red")), ("k.txt", b"\xff\xfe")]),
    ("broken image", [("k.png", png("red")[:-30]), ("k.txt", b"red")]),
    ("broken image", [("k.png", b""), ("k.txt", b"red")]),
    ("duplicate id", [("x/a.png", png("red")), ("x/a.txt", b"red")]),
]


def opened(*places: object) -> TarSource:
    source = open_tars([str(place) for place in places])
    assert isinstance(source, TarSource)
    return pickle.loads(pickle.dumps(source))


def get(source: TarSource, index: int) -> Pair | PairError:
    try:
        return source[index]
    except PairError as error:
        return error


def plain(got: Pair | PairError | None) -> Any:
    """Something to compare."""
    if isinstance(got, Pair):
        return got.id, got.captions, got.problems, got.image.size, got.image.tobytes()
    return got.problem if got else None


@pytest.fixture
def memory() -> Iterator[Any]:
    """URLs without a network: memory://..."""
    files = fsspec.filesystem("memory")
    yield files
    files.store.clear()


def put(memory: Any, url: str, path: Path) -> str:
    with memory.open(url, "wb") as file:
        file.write(path.read_bytes())
    return url


# What is right


def test_pairs_in_order_whatever_their_kind(tmp_path: Path) -> None:
    source = opened(write_tar(tmp_path / "pairs.tar", GOOD))
    assert [source[i].id for i in range(len(source))] == ["x/b", "x/a", "c"]
    assert [source.captions(i) for i in range(3)] == [("a red box",), ("two", "more"), ("绿色",)]
    assert source[1].captions == ("two", "more")
    assert [problem.kind for problem in source[1].problems] == ["empty caption"]
    assert source[1].image.getpixel((0, 0)) == (0, 0, 255)
    assert source[0].image.size == (6, 4)
    assert source.problems() == []
    with pytest.raises(IndexError):
        _ = source[3]


def test_a_txt_goes_before_a_json(tmp_path: Path) -> None:
    members = [("a.json", b'{"caption": "other"}'), ("a.png", png("red")), ("a.txt", b"this")]
    assert opened(write_tar(tmp_path / "a.tar", members)).captions(0) == ("this",)


def test_several_tars_follow_one_another_and_the_same_key_in_two_is_no_problem(tmp_path: Path) -> None:
    for folder in ("", "one", "two"):
        (tmp_path / folder).mkdir(exist_ok=True)
    first, second = write_tar(tmp_path / "one" / "00.tar", GOOD), write_tar(tmp_path / "one" / "01.tar", GOOD[:2])
    source = opened(first, write_tar(tmp_path / "one" / "empty.tar", []), second)
    assert [source[i].id for i in range(len(source))] == ["00/x/b", "00/x/a", "00/c", "01/x/b"]
    assert source.problems() == []
    again = opened(first, write_tar(tmp_path / "two" / "00.tar", GOOD[:2]))
    assert [again[i].id for i in (0, 3)] == ["one/00/x/b", "two/00/x/b"]


def test_the_index_is_small_and_fast(tmp_path: Path) -> None:
    members = [(f"{i:06d}.{suffix}", b"x") for i in range(5000) for suffix in ("jpg", "txt")]
    path = write_tar(tmp_path / "many.tar", members)
    start = time.process_time()
    source = TarSource([path])
    assert time.process_time() - start < 2  # seconds; a tenth of one on a quiet machine
    assert len(pickle.dumps(source)) < 5000 * 60


def test_expand(tmp_path: Path) -> None:
    assert expand("a{008..010}.tar") == ["a008.tar", "a009.tar", "a010.tar"]
    assert expand("{a,b}-{9..10}.tar") == ["a-9.tar", "a-10.tar", "b-9.tar", "b-10.tar"]
    assert expand("a{3..1}{x}.tar") == ["a3{x}.tar", "a2{x}.tar", "a1{x}.tar"]
    assert expand("s3://place/{00..01}.tar?version=1") == [f"s3://place/0{i}.tar?version=1" for i in (0, 1)]
    for name in ("b.tar", "a.tar", ".half.tar", "{0..1}.tar"):
        (tmp_path / name).touch()
    assert expand(f"{tmp_path}/?.tar") == [f"{tmp_path}/a.tar", f"{tmp_path}/b.tar"]
    assert expand(f"{tmp_path}/{{0..1}}.tar") == [f"{tmp_path}/{{0..1}}.tar"], "a file that is called so"
    with pytest.raises(UserError, match=r"there is no file .*c\*\.tar"):
        expand(f"{tmp_path}/{{a,c}}*.tar")
    with pytest.raises(UserError, match=r"^--source s3://place/\*\.tar: .* write a range"):
        expand("s3://place/*.tar")


# What is wrong


@pytest.mark.parametrize(("kind", "members"), BAD)
def test_a_bad_pair_costs_that_pair_only(tmp_path: Path, kind: str, members: list[tuple[str, bytes]]) -> None:
    source = opened(write_tar(tmp_path / "bad.tar", [*GOOD, *members, ("z.png", png("red")), ("z.txt", b"end")]))
    assert len(source) == 5
    with pytest.raises(PairError, match=r"bad\.tar") as error:
        _ = source[3]
    problem = error.value.problem
    assert (problem.kind, problem.left_out, problem.id) == (kind, True, members[0][0].partition(".")[0])
    assert source.problems() in ([], [problem])
    assert source[4].captions == ("end",)
    if kind != "broken image":
        with pytest.raises(PairError):
            source.captions(3)


def test_pairs_before_a_cut_are_kept(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "cut.tar", [*GOOD, ("z.txt", b"end"), ("z.png", png("red", (600, 600)))])
    data = path.read_bytes()
    start = data.index(b"z.png")
    for end in (start, start + 100, start + 512, start + 700):
        path.write_bytes(data[:end])
        source = opened(path, write_tar(tmp_path / "whole.tar", GOOD))
        assert [source[i].id for i in (0, 1, 2, 4)] == ["cut/x/b", "cut/x/a", "cut/c", "whole/x/b"]
        expected = Problem("cut/z", "cut off", f"{path}: is truncated or damaged in cut/z; the pairs after it are lost")
        assert source.problems() == [expected]
        with pytest.raises(PairError, match="is truncated"):
            _ = source[3]


SCATTERED = {
    "images, then captions": ["a.jpg", "b.jpg", "a.txt", "b.txt"],
    "captions, then images": ["a.txt", "b.txt", "b.jpg", "a.jpg"],
    "json in the middle": ["a.jpg", "b.jpg", "a.json", "b.json", "a.txt", "b.txt"],
    "txt before json": ["a.txt", "b.txt", "a.jpg", "b.jpg", "b.json", "a.json", "a.cls"],
    "clutter between": ["a.jpg", "._a.jpg", "a.txt", "b.jpg", ".DS_Store", "README", "b.txt"],
}


@pytest.mark.parametrize("order", SCATTERED)
def test_the_members_of_a_pair_are_joined_wherever_they_lie(order: str, tmp_path: Path) -> None:
    contents = {"jpg": lambda key: png("red" if key == "a" else "blue"), "txt": str.encode, "json": lambda key: b"{}"}
    members = [(name, contents.get(name[2:], contents["txt"])(name[0])) for name in SCATTERED[order]]
    source = opened(write_tar(tmp_path / "a.tar", members))
    assert source.problems() == []
    pairs = {source[i].id: source[i] for i in range(len(source))}
    assert {id: pair.captions for id, pair in pairs.items()} == {"a": ("a",), "b": ("b",)}
    assert pairs["b"].image.getpixel((0, 0)) == (0, 0, 255)


@pytest.mark.parametrize(
    ("names", "kinds"),
    [
        ("a.png a.txt a.png a.txt", ["good", "duplicate id"]),
        ("a.png a.txt b.png b.txt a.png a.txt", ["good", "good", "duplicate id"]),
        ("a.png a.txt b.png b.txt a.txt", ["good", "good", "duplicate id"]),
        ("a.png a.txt b.png b.txt a.jpg", ["good", "good", "duplicate id"]),
        ("a.png a.txt b.png b.txt a.cls", ["good", "good"]),
        ("a.png b.txt a.png b.png a.txt", ["good", "good", "duplicate id"]),
        ("a.png a.jpg b.png b.txt a.txt", ["several images", "good"]),
        ("a.heic a.txt", ["missing image"]),
        ("a.png b.txt", ["no caption", "missing image"]),
        ("a.cls b.png b.txt", ["missing image", "good"]),
    ],
)
def test_every_image_of_a_tar_is_a_pair_or_a_problem(names: str, kinds: list[str], tmp_path: Path) -> None:
    members = [(name, png("red") if name.endswith(("png", "jpg")) else b"red") for name in names.split()]
    source = opened(write_tar(tmp_path / "a.tar", members))
    found = [get(source, row) for row in range(len(source))]
    assert sorted(got.problem.kind if isinstance(got, PairError) else "good" for got in found) == sorted(kinds)


def test_members_below_the_present_folder(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", [(f"././/{name}", data) for name, data in GOOD])
    assert opened(tar)[0].id == opened(write_tar(tmp_path / "b.tar", GOOD))[0].id


def test_links_in_a_tar_are_named(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, kind in [("a.txt", tarfile.REGTYPE), ("a.png", tarfile.LNKTYPE)]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "other.png"
            tar.addfile(info)
    [problem] = opened(tmp_path / "a.tar").problems()
    assert "but has .txt, .png (a link)" in problem.message


def test_a_stream_says_that_members_must_be_adjacent(tmp_path: Path, memory: Any) -> None:
    members = [("a.png", png("red")), ("b.png", png("red")), ("b.txt", b"b"), ("a.txt", b"a")]
    stream = open_tars([put(memory, "memory://place/a.tar", write_tar(tmp_path / "a.tar", members))])
    found = [got for _, got in stream.read(0, lambda _: True)]
    assert isinstance(found[1], Pair)
    for got, kind in ((found[0], "no caption"), (found[2], "missing image")):
        assert isinstance(got, PairError) and got.problem.kind == kind
        assert got.problem.message.endswith("the members of a pair must be adjacent")


def test_other_files_in_a_tar_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    opened(write_tar(tmp_path / "a.tar", [*GOOD, ("__MACOSX/x/._a.PNG", b"x"), ("README", b"x")]))
    assert "a.tar: __MACOSX/x/._a.PNG, README.\n" in capsys.readouterr().out


def test_places_that_are_no_tars(tmp_path: Path) -> None:
    (tmp_path / "words.tar").write_text("not a tar")
    (tmp_path / "zipped.tar.gz").write_bytes(b"\x1f\x8b" + bytes(1000))
    tar = write_tar(tmp_path / "good.tar", GOOD)
    for places, says in [
        ([tmp_path / "words.tar"], r"words\.tar: is not a tar file"),
        ([tar, tmp_path / "words.tar"], r"words\.tar: is not a tar file"),
        ([tmp_path / "zipped.tar.gz"], r"zipped\.tar\.gz: is compressed"),
        ([tmp_path / "none.tar"], r"none\.tar: cannot be read \(No such file"),
        ([tmp_path], r"cannot be read \(Is a directory"),
        ([write_tar(tmp_path / "empty.tar", [])], "contains no pairs$"),
        ([tar, tar], "is given twice"),
        (["nope://x/a.tar"], "Protocol not known: nope"),
    ]:
        with pytest.raises(UserError, match=says):
            opened(*places)


def test_a_tar_that_is_gone_is_no_fault_of_a_pair(tmp_path: Path) -> None:
    source = opened(write_tar(tmp_path / "pairs.tar", GOOD))
    (tmp_path / "pairs.tar").unlink()
    with pytest.raises(UserError, match=r"pairs\.tar: cannot be read") as error:
        _ = source[0]
    assert not isinstance(error.value, PairError)


# Behind a URL


def test_a_stream_gives_what_the_same_tars_give_on_disk(tmp_path: Path, memory: Any) -> None:
    bad = [member for number, (_, members) in enumerate(BAD) for member in
           [(name.replace("k.", f"{number}."), data) for name, data in members]]  # fmt: skip
    first = write_tar(tmp_path / "first.tar", [*GOOD, *bad])
    second = write_tar(tmp_path / "second.tar", GOOD)
    second.write_bytes(second.read_bytes()[:3600])
    source = opened(first, second)
    stream = open_tars([put(memory, f"memory://place/{path.name}", path) for path in (first, second)])
    assert isinstance(stream, TarStream)
    stream = pickle.loads(pickle.dumps(stream))

    def named(problem: Any) -> Any:
        """On disk the files have other names."""
        text = repr(problem).replace("memory://place", str(tmp_path))
        return text.replace("; in a tar at a URL, the members of a pair must be adjacent", "")

    expected = [named(plain(get(source, index))) for index in range(len(source))]
    assert [named(plain(got)) for _, got in stream.read(0, lambda _: True)] == expected
    assert sum("Problem(" in got for got in expected) == len(BAD) + 2  # one of an empty caption, one of the cut
    every_third = list(stream.read(4, lambda position: position % 3 == 0))
    assert [position for position, _ in every_third] == list(range(4, len(source)))
    for position, got in every_third:
        assert (named(plain(got)) == expected[position]) if position % 3 == 0 else got is None
    captions = [caption for index in range(len(source)) for caption in captions_or_none(source, index)]
    assert list(stream.all_captions()) == captions


def captions_or_none(source: TarSource, index: int) -> tuple[str, ...]:
    try:
        return source.captions(index)
    except PairError:
        return ()


def test_a_stream_decodes_only_what_is_wanted(tmp_path: Path, memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    real = Image.open
    monkeypatch.setattr(Image, "open", lambda file, **how: decoded.append(1) or real(file, **how))  # type: ignore[func-returns-value]
    stream = open_tars([put(memory, "memory://place/a.tar", write_tar(tmp_path / "a.tar", GOOD))])
    assert isinstance(stream, TarStream)
    assert sum(got is not None for _, got in stream.read(0, lambda position: position == 1)) == 1
    assert len(list(stream.all_captions())) == 4
    assert len(decoded) == 1


def test_streams_that_cannot_be_read(tmp_path: Path, memory: Any) -> None:
    (tmp_path / "words.tar").write_text("not a tar")
    for url, says in [
        ("memory://place/none.tar", r"^--source memory://place/none\.tar: cannot be read"),
        (put(memory, "memory://place/words.tar", tmp_path / "words.tar"), r"words\.tar: is not a tar file"),
    ]:
        stream = open_tars([url])
        assert isinstance(stream, TarStream)
        with pytest.raises(UserError, match=says):
            list(stream.read(0, lambda _: True))


def test_what_webdataset_writes(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "pairs.tar")) as writer:
        for number in range(3):
            picture = Image.new("RGB", (8, 8), (number, 0, 0))
            writer.write({"__key__": f"{number:04d}", "png": picture, "txt": f"picture {number}"})
    source = opened(tmp_path / "pairs.tar")
    assert [(source[i].id, source.captions(i)) for i in range(3)] == [(f"000{i}", (f"picture {i}",)) for i in range(3)]
    assert source[2].image.getpixel((0, 0)) == (2, 0, 0)


def test_real_images(image_tar: Path) -> None:
    source = opened(image_tar)
    assert len(source) == 8
    assert (source[6].id, source[6].captions[0]) == ("horse", "the black silhouette of a horse")
    assert source[7].image.size == (256, 171)
