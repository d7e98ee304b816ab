"""Our reader of tar headers finds what Python's finds, in tars of every dialect, and says where a tar breaks off."""

import io
import tarfile
from pathlib import Path

import pytest

from tests.sources.pictures import write_tar
from uvit.errors import UserError
from uvit.sources.tar_format import Member, members

LONG = "folder/" * 30 + "long"


def tar_of(dialect: int, names: list[str], mtime: float = 0) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=dialect) as tar:
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = 300 * number, mtime
            tar.addfile(info, io.BytesIO(bytes([number]) * info.size))
    return buffer.getvalue()


def members_in(data: bytes) -> list[Member]:
    return list(members(io.BytesIO(data), "the.tar"))


@pytest.mark.parametrize("dialect", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("mtime", [0, 1.5])  # pax says such a time in a header of its own
def test_names_and_places_are_those_that_python_finds(dialect: int, mtime: float) -> None:
    names = ["a.jpg", "b.c.TXT", "d/e.jpg", "é.png", "prefix/" * 15 + "f.jpg"]
    names += [] if dialect == tarfile.USTAR_FORMAT else [f"{LONG}.jpg", f"{LONG}.txt"]
    data = tar_of(dialect, names, mtime)
    found = members_in(data)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        expected = list(tar)
    assert [f"{member.key}.{member.suffix}".lower() for member in found] == [name.lower() for name in names]
    assert [(member.offset, member.size) for member in found] == [(info.offset_data, info.size) for info in expected]
    assert not any(member.cut for member in found)
    assert [member.key for member in found[:3]] == ["a", "b", "d/e"]
    assert found[1].suffix == "c.txt"


def test_sizes_that_only_an_extension_can_hold() -> None:
    """More than 8 GiB: written as binary by GNU tar, in a pax header by Python."""
    for dialect in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        info = tarfile.TarInfo("a.jpg")
        info.size = 9 * 2**30
        header = info.tobuf(dialect)
        assert members_in(header)[0] == Member("a", "jpg", len(header), 9 * 2**30)


def test_what_cannot_belong_to_a_pair_has_no_key() -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, kind in [
            ("./", tarfile.DIRTYPE),
            ("folder", tarfile.DIRTYPE),
            ("link.jpg", tarfile.SYMTYPE),
            (".DS_Store", tarfile.REGTYPE),
            ("folder/._a.jpg", tarfile.REGTYPE),
            ("__MACOSX/a.jpg", tarfile.REGTYPE),
            ("folder/Thumbs.db", tarfile.REGTYPE),
            ("README", tarfile.REGTYPE),
            ("./folder/a.jpg", tarfile.REGTYPE),
        ]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "x"
            tar.addfile(info)
    assert [(member.key, member.suffix) for member in members_in(buffer.getvalue())] == [
        ("link", "jpg (a link)"),
        ("", ".DS_Store"),
        ("", "folder/._a.jpg"),
        ("", "__MACOSX/a.jpg"),
        ("", "folder/Thumbs.db"),
        ("", "README"),
        ("folder/a", "jpg"),
    ]


def test_names_that_are_no_text_stay_apart_and_can_be_written() -> None:
    data = tar_of(tarfile.GNU_FORMAT, ["\udcff.jpg", "\udcfe.jpg"])
    keys = [member.key for member in members_in(data)]
    assert len(set(keys)) == 2
    assert all(key.encode() for key in keys)


@pytest.mark.parametrize("dialect", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_wherever_a_tar_is_cut_the_last_member_begun_is_marked(dialect: int) -> None:
    names = ["a.jpg", "b.jpg", "c.jpg"] + ([] if dialect == tarfile.USTAR_FORMAT else [f"{LONG}.jpg"])
    data = tar_of(dialect, names, 1.5)
    whole = members_in(data)
    for end in range(1, whole[-1].offset + whole[-1].size, 37):
        try:
            found = members_in(data[:end])
        except UserError:
            assert end < whole[0].offset, "a member was found"
            continue
        begun = [member for member in whole if member.offset <= end]
        assert found[:-1] == begun
        assert (found[-1].key, found[-1].cut) == (begun[-1].key, True)


def test_a_damaged_header_ends_the_tar() -> None:
    data = bytearray(tar_of(tarfile.USTAR_FORMAT, ["a.jpg", "b.jpg", "c.jpg"]))
    second = members_in(bytes(data))[1].offset - 512
    for position in (second, second + 125, second + 150):  # name, size, checksum
        broken = data.copy()
        broken[position] ^= 1
        found = members_in(bytes(broken))
        assert [(member.key, member.cut) for member in found] == [("a", False), ("a", True)]


def test_headers_made_to_send_a_reader_astray() -> None:
    for field in (b"-0000010000\0", b"-1\0", b"9\0", b"1_0\0"):
        header = bytearray(tarfile.TarInfo("a.jpg").tobuf(tarfile.USTAR_FORMAT))
        header[124 : 124 + len(field)] = field
        header[148:156] = b" " * 8
        header[148:156] = f"{sum(header):06o}\0 ".encode()
        with pytest.raises(UserError, match="is not a tar file, or is damaged at byte 0"):
            members_in(bytes(header) + bytes(1024))
    for record in (b"0 path=x\n", b"5 pa\n" + b"99 path=x\n", b"path=x\n", b"-7 size=1\n", b"11 size=-9\n"):
        info = tarfile.TarInfo("x")
        info.type, info.size = tarfile.XHDTYPE, len(record)
        data = info.tobuf(tarfile.USTAR_FORMAT) + record.ljust(512, b"\0") + tar_of(tarfile.USTAR_FORMAT, ["a.jpg"])
        with pytest.raises(UserError, match="is not a tar file, or is damaged"):
            members_in(data)


@pytest.mark.parametrize("start", [b"\x1f\x8b\x08", b"BZh9", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd"])
def test_compressed_tars_are_refused(start: bytes) -> None:
    with pytest.raises(UserError, match=r"^--source the\.tar: is compressed.* decompress it$"):
        members_in(start + bytes(range(256)) * 4)


def test_no_tar_and_an_empty_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^--source the\.tar: is not a tar file"):
        members_in(b"words " * 200)
    assert members_in(b"") == []
    assert members_in(write_tar(tmp_path / "empty.tar", []).read_bytes()) == []
