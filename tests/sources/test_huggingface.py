"""The same pairs in every form in which Hugging Face datasets come, at once or streamed, without a network."""

import contextlib
import io
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from tests.sources.pictures import png
from uvit.errors import UserError
from uvit.sources import huggingface
from uvit.sources.huggingface import is_dataset, open_dataset
from uvit.sources.tables import TableSource, TableStream
from uvit.sources.types import Pair, PairError

datasets = pytest.importorskip("datasets")
pq = pytest.importorskip("pyarrow.parquet")

COLOURS = ["red", "blue", "lime", "black", "white", "yellow", "cyan"]


@pytest.fixture(autouse=True)
def no_home(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The library keeps its locks there."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def dataset() -> Any:
    datasets.disable_progress_bars()
    rows = {
        "id": [f"{colour[0]}{number}" for number, colour in enumerate(COLOURS)],
        "photo": [{"bytes": png(colour), "path": None} for colour in COLOURS],
        "captions": [[colour, f"all {colour}"] for colour in COLOURS],
    }
    texts = datasets.List(datasets.Value("string"))
    features = {"id": datasets.Value("string"), "photo": datasets.Image(), "captions": texts}
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


@pytest.fixture(scope="module")
def places(dataset: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every form; those with splits have one of two pairs, `val`."""
    root = tmp_path_factory.mktemp("places")
    first, rest = dataset.select([0, 1]), dataset
    rest.save_to_disk(root / "saved")
    datasets.DatasetDict({"train": rest, "val": first}).save_to_disk(root / "saved_splits")
    for folder, names in {
        "numbered": ("data/train-00000-of-00002", "data/train-00001-of-00002", "data/val-00000-of-00001"),
        "folders": ("default/train/0000", "default/train/0001", "default/val/0000"),
        "named": ("train_0", "train_1", "val"),
    }.items():
        for name, part in zip(names, (rest.select(range(3)), rest.select(range(3, 7)), first), strict=True):
            (root / folder / name).parent.mkdir(parents=True, exist_ok=True)
            table = part.with_format("arrow")[:]
            pq.write_table(table, root / folder / f"{name}.parquet", row_group_size=2)
    pq.write_table(rest.with_format("arrow")[:], root / "one.parquet")
    return root


WITH_SPLITS = ["saved_splits", "numbered", "folders", "named"]
ALL = ["saved", "one.parquet", *WITH_SPLITS]


def opened(place: object, *flags: Any) -> TableSource:
    source = open_dataset(str(place), *flags)
    assert isinstance(source, TableSource)
    return source


def streamed(place: object, split: str = "train") -> TableStream:
    stream = open_dataset(str(place), split, streaming=True)
    assert isinstance(stream, TableStream)
    return pickle.loads(pickle.dumps(stream))


def plain(pair: Pair | PairError | None) -> Any:
    assert isinstance(pair, Pair)
    return pair.id, pair.captions, pair.image.getpixel((0, 0))


@pytest.mark.parametrize("name", ALL)
def test_every_form_gives_the_same_pairs(places: Path, name: str) -> None:
    assert is_dataset(places / name)
    expected = [plain(opened(places / "saved")[index]) for index in range(len(COLOURS))]
    assert expected[1] == ("b1", ("blue", "all blue"), (0, 0, 255))
    source = opened(places / name)
    stored = pickle.dumps(source)
    assert len(stored) < 3000, "the data are in the pickle"
    source = pickle.loads(stored)
    for index in (5, 0, 6, 3, 2, 1, 4):
        assert plain(source[index]) == expected[index]
        assert source.captions(index) == expected[index][1]
    assert (len(source), source.problems()) == (len(COLOURS), [])
    with pytest.raises(IndexError):
        _ = source[len(COLOURS)]


@pytest.mark.parametrize("name", ALL)
def test_every_form_can_be_streamed(places: Path, name: str) -> None:
    stream = streamed(places / name)
    expected = [plain(opened(places / "saved")[index]) for index in range(len(COLOURS))]
    assert [plain(pair) for _, pair in stream.read(0, lambda _: True)] == expected
    found = list(stream.read(2, lambda position: position in (0, 3, 6)))
    assert [(position, pair is not None) for position, pair in found] == [(i, i in (3, 6)) for i in range(2, 7)]
    assert plain(found[1][1]) == expected[3]
    assert list(stream.all_captions()) == [caption for colour in COLOURS for caption in (colour, f"all {colour}")]


@pytest.mark.parametrize("name", WITH_SPLITS)
def test_splits(places: Path, name: str) -> None:
    assert [opened(places / name, "val")[i].id for i in range(2)] == ["r0", "b1"]
    assert len(list(streamed(places / name, "val").read(0, lambda _: False))) == 2
    for streaming in (False, True):
        with pytest.raises(UserError, match=r"^--split test: .* has no such split; it has train, val$"):
            open_dataset(str(places / name), "test", streaming=streaming)


@pytest.mark.parametrize("name", ["saved", "one.parquet"])
def test_a_single_part_is_train(places: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"^--split val: .* it has train$"):
        open_dataset(str(places / name), "val")


def test_what_is_no_data_set(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png("red"))
    assert not is_dataset(tmp_path)
    assert not is_dataset(tmp_path / "a.png")


class Shared(IterableDataset[tuple[int, str]]):
    """Each loader process takes its part of the positions."""

    def __init__(self, stream: TableStream):
        self.stream = stream

    def __iter__(self) -> Any:
        worker = torch.utils.data.get_worker_info()
        assert worker is not None
        for position, pair in self.stream.read(0, lambda position: position % worker.num_workers == worker.id):
            if isinstance(pair, Pair):
                yield position, pair.id


def test_loader_processes_see_all_positions_of_a_stream(places: Path) -> None:
    loader = DataLoader(Shared(streamed(places / "numbered")), batch_size=None, num_workers=2)
    expected = [(number, f"{colour[0]}{number}") for number, colour in enumerate(COLOURS)]
    assert sorted((position, id) for position, id in loader) == expected


def test_nothing_is_shown_and_nothing_is_written_beside_the_data(places: Path) -> None:
    before = sorted((path, path.stat().st_mtime_ns) for path in places.rglob("*"))
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        for name in ALL:
            assert opened(places / name)[0].id == "r0"
            assert next(streamed(places / name).read(0, lambda _: True))[0] == 0
    assert out.getvalue() + err.getvalue() == ""
    assert sorted((path, path.stat().st_mtime_ns) for path in places.rglob("*")) == before


def test_folders_of_images_as_the_library_streams_them(tmp_path: Path) -> None:
    """The hub has such datasets too; their images come as paths."""
    for colour in COLOURS[:2]:
        (tmp_path / f"{colour}.png").write_bytes(png(colour))
    rows = [{"file_name": f"{colour}.png", "text": colour} for colour in COLOURS[:2]]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    table = huggingface._Streamed("place", lambda: load_folder(tmp_path))
    columns = huggingface.choose_columns(table.schema(), "place", None, None)
    stream = TableStream(table, huggingface.TableRows("place", columns, None))
    found = [plain(pair) for _, pair in stream.read(0, lambda _: True)]
    assert sorted(pixel for _, _, pixel in found) == [(0, 0, 255), (255, 0, 0)]
    assert {(captions, pixel) for _, captions, pixel in found} == {(("red",), (255, 0, 0)), (("blue",), (0, 0, 255))}


def load_folder(folder: Path) -> Any:
    return datasets.load_dataset("imagefolder", data_dir=str(folder), split="train", streaming=True)


# What is wrong


def test_files_that_are_broken(places: Path, tmp_path: Path) -> None:
    whole = (places / "one.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[:-100])
    (tmp_path / "words.parquet").write_text("words")
    for name in ("cut", "words"):
        for streaming in (False, True):
            with pytest.raises(UserError, match=rf"{name}\.parquet: "):
                open_dataset(str(tmp_path / f"{name}.parquet"), streaming=streaming)
    damaged = bytearray(whole)
    damaged[4:60] = bytes(56)
    (tmp_path / "damaged.parquet").write_bytes(damaged)
    with pytest.raises(UserError, match=r"damaged\.parquet: cannot be read"):
        _ = opened(tmp_path / "damaged.parquet")[0]
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text("{}")
    with pytest.raises(UserError, match=r"saved: cannot be opened"):
        opened(tmp_path / "saved")
    (tmp_path / "splits").mkdir()
    (tmp_path / "splits" / "dataset_dict.json").write_text("[")
    with pytest.raises(UserError, match=r"dataset_dict\.json: lists no splits"):
        opened(tmp_path / "splits")


def test_files_of_different_columns(places: Path, tmp_path: Path) -> None:
    table = pq.read_table(places / "one.parquet")
    pq.write_table(table, tmp_path / "a.parquet")
    pq.write_table(table.select(["id", "captions"]), tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"b\.parquet: has the columns id, captions, but a\.parquet has id, photo"):
        opened(tmp_path)


def test_columns_that_are_not_there(places: Path) -> None:
    for streaming in (False, True):
        with pytest.raises(UserError, match=r"^--caption_column text: .* no such column; it has id, photo, captions$"):
            open_dataset(str(places / "numbered"), "train", None, "text", streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_the_hub_out_of_reach_is_one_sentence(monkeypatch: pytest.MonkeyPatch, streaming: bool) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"^--source hf:user/none:en, --split train: cannot be opened \(") as error:
        open_dataset("hf:user/none:en", streaming=streaming)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"must be hf:USER/NAME or hf:USER/NAME:CONFIG"):
        open_dataset("hf:user/name/more", streaming=streaming)


def test_what_to_install_is_said(monkeypatch: pytest.MonkeyPatch, places: Path) -> None:
    for module, name in (("datasets", "saved"), ("pyarrow.parquet", "one.parquet")):
        with monkeypatch.context() as changed:
            changed.setitem(sys.modules, module, None)
            with pytest.raises(UserError, match=r"pip install 'uvit\[datasets\]'"):
                opened(places / name)
