"""What was written is what is read, from a store and from .npy features; damage is found on opening."""

import hashlib
import json
import os
import pickle
import resource
import subprocess
import sys
from collections.abc import Container, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uvit.conventions import LatentSpace
from uvit.errors import UserError
from uvit.sources.types import Problem
from uvit.store.reader import FeatureStore, open_features
from uvit.store.shard import EncodedPairs
from uvit.store.writer import StoreInfo, StoreWriter

NUM_PAIRS, SHARD_SIZE = 11, 4
NUM_CAPTIONS = [1 + i % 3 for i in range(NUM_PAIRS)]


def info(**changes: object) -> StoreInfo:
    values: dict = {
        "num_source_pairs": NUM_PAIRS,
        "shard_size": SHARD_SIZE,
        "dtype": "float16",
        "moments_shape": (8, 2, 2),
        "flipped": False,
        "context_shape": (3, 5),
        "num_tokens": 3,
        "token_dtype": "uint16",
        "latent_scale": 0.5,
        "split": "train",
        "source": {"source": "made up", "resolution": 16},
        "vae": {"name": "a/vae", "sha256": "1"},
        "text_encoder": {"name": "a/text_encoder", "sha256": "2"},
        "tokenizer": {"name": "a/tokenizer", "sha256": "3"},
    }
    return StoreInfo(**(values | changes))


def encoded(rows: range, what: StoreInfo, left_out: Container[int] = ()) -> Iterator[EncodedPairs]:
    """A part for each row. Row i holds i everywhere, mirrored i + 0.5; its caption k holds 10 i + k."""
    for i in rows:
        kept = [] if i in left_out else [i]
        numbers = np.array([10 * row + k for row in kept for k in range(NUM_CAPTIONS[row])])
        moments = np.full((len(kept), *what.moments_shape), i)
        yield EncodedPairs(
            ids=[f"pair-{row}" for row in kept],
            captions=[tuple(f"caption {n}\u2028" for n in numbers)] * len(kept),
            moments=moments,
            flipped=moments + 0.5 if what.flipped else None,
            contexts=np.broadcast_to(numbers[:, None, None], (len(numbers), *what.context_shape))
            if what.context_shape
            else None,
            token_ids=np.broadcast_to(numbers[:, None], (len(numbers), what.num_tokens)) if what.token_dtype else None,
            problems=() if kept else (Problem(f"pair-{i}", "broken image", f"pair-{i} is made up"),),
        )


def write_store(folder: Path, what: StoreInfo, left_out: Container[int] = ()) -> Path:
    """A split's folder, written whole."""
    writer = StoreWriter(folder, what)
    for number in range(-(-NUM_PAIRS // what.shard_size)):
        with writer.open_shard(number) as shard:
            rows = writer.rows(number)
            for row, part in zip(rows, encoded(rows, what, left_out), strict=True):
                shard.append(part, next_row=row + 1)
            shard.finish()
    writer.finish(
        np.full(what.context_shape, -1, np.float16) if what.context_shape else None,
        np.full(what.num_tokens, 65535, what.token_dtype) if what.token_dtype else None,
    )
    return folder


def as_version_1(folder: Path) -> Path:
    """What the first version wrote into a manifest, of a store that is written now."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for key in ("num_source_pairs", "split", "flipped", "problems", "num_left_out"):
        del manifest[key]
    path.write_text(json.dumps(manifest | {"version": 1}))
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("features") / "store", info())


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    return write_store(tmp_path / "store", info())


@pytest.fixture(scope="module")
def npy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("old")
    (folder / "train").mkdir()
    for i, count in enumerate(NUM_CAPTIONS):
        np.save(folder / "train" / f"{i}.npy", np.full((8, 2, 2), i, np.float32))
        for k in range(count):
            np.save(folder / "train" / f"{i}_{k}.npy", np.full((3, 5), 10 * i + k, np.float32))
    np.save(folder / "empty_context.npy", np.full((3, 5), -1, np.float32))
    return folder


@pytest.fixture(params=["store", "npy_folder"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


# Reading


@given(
    samples=st.lists(
        st.tuples(st.integers(0, NUM_PAIRS - 1), st.floats(0, 1, exclude_max=True)), min_size=1, max_size=20
    ),
    kind=st.sampled_from(["store", "npy_folder"]),
)
@settings(max_examples=60, deadline=None)
def test_each_row_comes_with_the_caption_that_its_draw_falls_on(
    samples: list[tuple[int, float]], kind: str, store: Path, npy_folder: Path
) -> None:
    features = open_features(store if kind == "store" else npy_folder)
    rows, draws = np.array([row for row, _ in samples]), np.array([draw for _, draw in samples])
    batch = features.read(rows, draws)
    expected = [10 * row + int(draw * NUM_CAPTIONS[row]) for row, draw in samples]
    assert batch.moments.shape == (len(samples), 8, 2, 2)
    assert (batch.moments == rows[:, None, None, None]).all()
    assert batch.context is not None
    assert batch.context.shape == (len(samples), 3, 5)
    assert (batch.context == np.array(expected)[:, None, None]).all()
    if kind == "store":
        assert batch.token_ids is not None
        assert (batch.token_ids == np.array(expected)[:, None]).all()


def test_both_say_what_they_hold(folder: Path) -> None:
    features = open_features(folder)
    assert (features.num_samples, features.moments_shape) == (NUM_PAIRS, (8, 2, 2))
    assert (features.context_shape, features.num_tokens) == ((3, 5), 3)
    assert features.empty_context is not None
    assert (features.empty_context == -1).all()


def test_what_is_read_may_be_changed(folder: Path) -> None:
    features = open_features(folder)
    rows, draws = np.array([3, 3]), np.zeros(2)
    batch = features.read(rows, draws)
    assert batch.context is not None
    batch.moments[0] = batch.context[0] = 99
    again = features.read(rows, draws)
    assert (again.moments == 3).all()
    assert again.context is not None
    assert (again.context == 30).all()


def test_a_copy_in_another_process_reads_the_same(folder: Path) -> None:
    features = open_features(folder)
    rows, draws = np.arange(NUM_PAIRS)[::-1].copy(), np.full(NUM_PAIRS, 0.7)
    data = pickle.dumps(features)
    assert len(data) < 5000  # no array goes along
    before, after = features.read(rows, draws), pickle.loads(data).read(rows, draws)
    np.testing.assert_array_equal(before.moments, after.moments)
    np.testing.assert_array_equal(before.context, after.context)


def test_a_store_knows_captions_encoders_and_scale(store: Path) -> None:
    features = open_features(store)
    assert features.captions(5) == ("caption 50\u2028", "caption 51\u2028", "caption 52\u2028")
    assert features.captions(10) == ("caption 100\u2028", "caption 101\u2028")
    assert (features.latent_space, features.resolution) == (LatentSpace(0.5), 16)
    assert (features.vae_name, features.text_encoder_name) == ("a/vae", "a/text_encoder")
    assert (features.vae_sha256, features.text_encoder_sha256) == ("1", "2")
    assert features.tokenizer_name == "a/tokenizer"
    assert features.empty_token_ids is not None
    assert features.empty_token_ids.tolist() == [65535] * 3
    assert features.read(np.array([0]), np.zeros(1)).moments.dtype == np.float16


def test_token_ids_alone_and_contexts_alone(tmp_path: Path) -> None:
    rows, draws = np.array([0, 9]), np.zeros(2)
    tokens = open_features(write_store(tmp_path / "t", info(context_shape=None, text_encoder=None)))
    assert (tokens.context_shape, tokens.empty_context, tokens.text_encoder_name) == (None, None, None)
    assert tokens.read(rows, draws).context is None
    contexts = open_features(write_store(tmp_path / "c", info(token_dtype=None)))
    assert contexts.empty_token_ids is None
    assert contexts.read(rows, draws).token_ids is None


def test_the_mirrored_image_is_read_where_the_draw_says_so(tmp_path: Path) -> None:
    features = open_features(write_store(tmp_path / "store", info(flipped=True)))
    assert features.flipped
    rows = np.arange(NUM_PAIRS)
    flip_draws = np.where(rows % 2, 0.49, 0.5)
    batch = features.read(rows, np.zeros(NUM_PAIRS), flip_draws)
    assert (batch.moments == (rows + rows % 2 / 2)[:, None, None, None]).all()
    assert batch.context is not None
    assert (batch.context == 10 * rows[:, None, None]).all()
    assert (features.read(rows, np.zeros(NUM_PAIRS)).moments == rows[:, None, None, None]).all()


@pytest.mark.parametrize("left_out", [{0, 1, 2, 3}, {4, 5, 6, 7}, {8, 9, 10}, {0, 5, 10}])
def test_pairs_left_out_and_shards_without_any(tmp_path: Path, left_out: set[int]) -> None:
    features = FeatureStore(write_store(tmp_path / "store", info(flipped=True), left_out))
    kept = np.array([row for row in range(NUM_PAIRS) if row not in left_out])
    assert features.num_samples == len(kept)
    rows = np.arange(len(kept))
    batch = features.read(rows, np.full(len(rows), 0.99), np.zeros(len(rows)))
    assert (batch.moments == kept[:, None, None, None] + 0.5).all()
    last = [10 * row + NUM_CAPTIONS[row] - 1 for row in kept]
    assert batch.context is not None
    assert (batch.context == np.array(last)[:, None, None]).all()
    assert [features.ids(int(row)) for row in rows] == [f"pair-{row}" for row in kept]


def test_a_store_lists_its_files(store: Path) -> None:
    files = FeatureStore(store).files()
    there = {path.relative_to(store).as_posix() for path in store.rglob("*") if path.is_file()}
    records = {"manifest.json", "settings.json", *(f"shard-{i:05d}.json" for i in range(3))}
    assert set(files) == there - records
    for name, described in files.items():
        assert described["bytes"] == (store / name).stat().st_size
        assert described["sha256"] == hashlib.sha256((store / name).read_bytes()).hexdigest()


def test_version_1_is_still_read(tmp_path: Path) -> None:
    folder = as_version_1(write_store(tmp_path / "store", info()))
    features = open_features(folder)
    assert (features.num_samples, features.flipped, features.vae_sha256) == (NUM_PAIRS, False, "1")
    assert (features.read(np.array([7]), np.zeros(1)).moments == 7).all()
    with pytest.raises(UserError, match="version 1, which has no splits"):
        open_features(folder, "val")


def test_splits_lie_side_by_side(tmp_path: Path) -> None:
    write_store(tmp_path / "train", info())
    write_store(tmp_path / "val", info(split="val"), left_out={3})
    assert open_features(tmp_path).num_samples == NUM_PAIRS
    assert open_features(tmp_path, "val").num_samples == NUM_PAIRS - 1
    assert open_features(tmp_path / "val", "val").num_samples == NUM_PAIRS - 1
    with pytest.raises(UserError, match=r"--eval_path .*val: is the split val, not train"):
        open_features(tmp_path / "val", flag="eval_path")
    with pytest.raises(UserError, match="no split heldout, only train, val"):
        open_features(tmp_path, "heldout")
    StoreWriter(tmp_path / "heldout", info(split="heldout"))
    with pytest.raises(UserError, match="heldout: its extraction is not finished"):
        open_features(tmp_path, "heldout")


def test_npy_features_has_splits_and_no_mirrored_images(npy_folder: Path) -> None:
    features = open_features(npy_folder)
    assert (features.flipped, features.vae_sha256, features.text_encoder_sha256) == (False, None, None)
    with pytest.raises(UserError, match="no split val, only train"):
        open_features(npy_folder, "val")


def test_more_files_than_a_process_may_have_open(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", info(shard_size=1, flipped=True))
    assert len(list(store.glob("*-000*.npy"))) == 5 * NUM_PAIRS
    code = f"""
import resource, numpy as np
from uvit.store.reader import open_features
resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))
features = open_features({str(store)!r})
rows = np.arange({NUM_PAIRS})
for _ in range(2):
    assert (features.read(rows, rows / 100, rows / 10).moments.mean((1, 2, 3)) == rows + (rows < 5) / 2).all()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the memory of a process from /proc")
def test_memory_does_not_grow_with_what_was_read(tmp_path: Path) -> None:
    """Positioned reads leave the files in the system's cache, which is not the process's: maps would count as its."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    features = open_features(write_store(tmp_path / "store", info(context_shape=(3, 200_000))))
    size = sum(path.stat().st_size for path in (tmp_path / "store").glob("contexts-*"))
    features.read(np.array([0]), np.zeros(1))
    before = resident()
    for draw in (0.0, 0.5, 0.99):
        for row in range(NUM_PAIRS):
            features.read(np.array([row]), np.array([draw]))
    assert resident() - before < size / 4


def test_the_files_are_plain_npy_that_numpy_opens(store: Path) -> None:
    assert np.load(store / "moments-00002.npy").shape == (3, 8, 2, 2)
    assert np.load(store / "contexts-00000.npy").shape == (1 + 2 + 3 + 1, 3, 5)
    assert np.load(store / "tokens-00000.npy").dtype == np.uint16
    line = (store / "captions-00001.jsonl").read_text(encoding="utf-8").split("\n")[0]
    assert json.loads(line) == {"id": "pair-4", "captions": ["caption 40\u2028", "caption 41\u2028"]}


# Damage


def test_a_missing_file(damaged: Path) -> None:
    (damaged / "contexts-00001.npy").unlink()
    with pytest.raises(UserError, match=r"contexts-00001\.npy is missing"):
        open_features(damaged)


def test_a_file_cut_short(damaged: Path) -> None:
    path = damaged / "tokens-00002.npy"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"tokens-00002\.npy has \d+ bytes, not \d+"):
        open_features(damaged)


def test_a_file_of_another_shape(damaged: Path) -> None:
    path = damaged / "moments-00000.npy"
    np.save(path, np.load(path).reshape(4, 2, 8, 2))
    with pytest.raises(UserError, match=r"moments-00000\.npy contains .*\(4, 2, 8, 2\).*\(4, 8, 2, 2\)"):
        open_features(damaged)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": 4}, "has format version 4, but this uvit reads 1 to 3; update uvit"),
        ({"format": "else"}, "not the manifest of a feature store"),
        ({"num_pairs": 12}, "num_pairs is 12, but the shards have 11"),
        ({"shards": None}, "manifest.json is damaged: shards is NoneType, but must be list"),
        ({"moments_shape": [8, 4, 4]}, r"moments-00000\.npy contains"),
        ({"dtype": "float32"}, r"moments-00000\.npy contains float16 .* float32"),
        ({"token_dtype": "int32"}, r"tokens-00000\.npy contains uint16 .* int32"),
        ({"flipped": True}, r"does not list flipped-00000\.npy"),
    ],
)
def test_a_manifest_that_does_not_fit(damaged: Path, change: dict, says: str) -> None:
    manifest = json.loads((damaged / "manifest.json").read_text())
    (damaged / "manifest.json").write_text(json.dumps(manifest | change))
    with pytest.raises(UserError, match=says):
        FeatureStore(damaged)


def test_a_file_that_does_not_fit_its_header(damaged: Path) -> None:
    path = damaged / "moments-00001.npy"
    path.write_bytes(path.read_bytes()[:-64])
    manifest = json.loads((damaged / "manifest.json").read_text())
    manifest["shards"][1]["files"][path.name]["bytes"] -= 64
    (damaged / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"moments-00001\.npy has \d+ bytes, not \d+"):
        open_features(damaged)


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"\x93NUMPY\x01\x00\x10\x00{'shape': (((((,\n"])
def test_a_file_that_is_no_npy(damaged: Path, content: bytes) -> None:
    path = damaged / "contexts-00002.npy"
    size = path.stat().st_size
    path.write_bytes(content.ljust(size, b"\0"))
    with pytest.raises(UserError, match=r"contexts-00002\.npy cannot be read"):
        open_features(damaged)


def test_counts_that_disagree_with_the_manifest(damaged: Path) -> None:
    for counts in ([1, 2, 3, 2], [1, 2, 4, 0], [1, 2, 5, -1]):
        np.save(damaged / "counts-00000.npy", np.array(counts, np.int32))
        with pytest.raises(UserError, match=r"counts-00000\.npy and manifest\.json give different numbers of captions"):
            open_features(damaged)


def test_a_file_cut_short_while_it_is_being_read(damaged: Path) -> None:
    features = open_features(damaged)
    os.truncate(damaged / "moments-00000.npy", 150)
    with pytest.raises(UserError, match=r"--feature_path .*moments-00000\.npy is shorter than when it was opened"):
        features.read(np.arange(4), np.zeros(4))


def test_a_store_without_pairs(damaged: Path) -> None:
    manifest = json.loads((damaged / "manifest.json").read_text())
    (damaged / "manifest.json").write_text(json.dumps(manifest | {"num_pairs": 0, "num_captions": 0, "shards": []}))
    with pytest.raises(UserError, match="contains no pairs"):
        open_features(damaged)


def test_folders_that_are_no_features(tmp_path: Path, store: Path, npy_folder: Path) -> None:
    StoreWriter(tmp_path / "begun", info())
    for path, split, says in [
        (tmp_path / "nowhere", "train", "no such folder"),
        (tmp_path, "train", "no train/manifest.json, manifest.json or train/0.npy"),
        (tmp_path / "begun", "train", "is not finished"),
        (store, "val", "is the split train, not val"),
        (npy_folder / "train", "train", f"give {npy_folder}"),
    ]:
        with pytest.raises(UserError, match=says):
            open_features(path, split)


def test_npy_features_with_gaps_or_pickles(npy_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    np.save(tmp_path / "train" / "0.npy", np.zeros((8, 2, 2)))
    with pytest.raises(UserError, match=r"^--feature_path: .*/0_0\.npy is missing"):
        open_features(tmp_path)
    np.save(tmp_path / "train" / "0_0.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(UserError, match=r"0_0\.npy cannot be read"):
        open_features(tmp_path)
    np.save(tmp_path / "train" / "0_0.npy", np.zeros((3, 5)))
    with pytest.raises(UserError, match=r"no empty_context\.npy"):
        open_features(tmp_path)
    np.save(tmp_path / "empty_context.npy", np.zeros((4, 5)))
    with pytest.raises(UserError, match=r"has shape \(4, 5\), but the others have \(3, 5\)"):
        open_features(tmp_path)
