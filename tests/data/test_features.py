"""What was written is what is read, from a store and from the old layout; damage is found on opening."""

import json
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uvit.data.features import FeatureStore, open_features
from uvit.data.store import EncodedPairs, StoreInfo, StoreWriter
from uvit.errors import UserError

NUM_PAIRS, SHARD_SIZE = 11, 4
NUM_CAPTIONS = [1 + i % 3 for i in range(NUM_PAIRS)]


def info(**changes: object) -> StoreInfo:
    values: dict = {
        "num_pairs": NUM_PAIRS,
        "shard_size": SHARD_SIZE,
        "dtype": "float16",
        "moments_shape": (8, 2, 2),
        "context_shape": (3, 5),
        "num_tokens": 3,
        "token_dtype": "uint16",
        "latent_scale": 0.5,
        "source": {"source": "made up", "resolution": 16},
        "vae": {"name": "a/vae", "sha256": "0"},
        "text_encoder": {"name": "a/text_encoder", "sha256": "0"},
        "tokenizer": {"name": "a/tokenizer", "sha256": "0"},
    }
    return StoreInfo(**(values | changes))


def encoded(rows: range, what: StoreInfo) -> Iterator[EncodedPairs]:
    """Row i holds i everywhere; its caption k holds 10 i + k."""
    for i in rows:
        numbers = np.array([10 * i + k for k in range(NUM_CAPTIONS[i])])
        yield EncodedPairs(
            ids=[f"pair-{i}"],
            captions=[tuple(f"caption {n}\u2028" for n in numbers)],
            moments=np.full((1, *what.moments_shape), i),
            contexts=np.broadcast_to(numbers[:, None, None], (len(numbers), *what.context_shape))
            if what.context_shape
            else None,
            token_ids=np.broadcast_to(numbers[:, None], (len(numbers), what.num_tokens)) if what.token_dtype else None,
        )


def write_store(folder: Path, what: StoreInfo) -> Path:
    writer = StoreWriter(folder, what)
    for shard in range(writer.num_shards):
        writer.write_shard(shard, encoded(writer.rows(shard), what))
    writer.finish(
        np.full(what.context_shape, -1, np.float16) if what.context_shape else None,
        np.full(what.num_tokens, 65535, what.token_dtype) if what.token_dtype else None,
    )
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("features") / "store", info())


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    return write_store(tmp_path / "store", info())


@pytest.fixture(scope="module")
def old_layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("old")
    (folder / "train").mkdir()
    for i, count in enumerate(NUM_CAPTIONS):
        np.save(folder / "train" / f"{i}.npy", np.full((8, 2, 2), i, np.float32))
        for k in range(count):
            np.save(folder / "train" / f"{i}_{k}.npy", np.full((3, 5), 10 * i + k, np.float32))
    np.save(folder / "empty_context.npy", np.full((3, 5), -1, np.float32))
    return folder


@pytest.fixture(params=["store", "old_layout"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


# Reading


@given(
    samples=st.lists(
        st.tuples(st.integers(0, NUM_PAIRS - 1), st.floats(0, 1, exclude_max=True)), min_size=1, max_size=20
    ),
    kind=st.sampled_from(["store", "old_layout"]),
)
@settings(max_examples=60, deadline=None)
def test_each_row_comes_with_the_caption_that_its_draw_falls_on(
    samples: list[tuple[int, float]], kind: str, store: Path, old_layout: Path
) -> None:
    features = open_features(store if kind == "store" else old_layout)
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
    np.testing.assert_array_equal(before.context, after.context)  # type: ignore[arg-type]


def test_a_store_knows_captions_encoders_and_scale(store: Path) -> None:
    features = open_features(store)
    assert features.captions(5) == ("caption 50\u2028", "caption 51\u2028", "caption 52\u2028")
    assert features.captions(10) == ("caption 100\u2028", "caption 101\u2028")
    assert (features.latent_scale, features.resolution) == (0.5, 16)
    assert (features.vae_name, features.text_encoder_name) == ("a/vae", "a/text_encoder")
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
    with pytest.raises(UserError, match=r"moments-00000\.npy holds .*\(4, 2, 8, 2\).*\(4, 8, 2, 2\)"):
        open_features(damaged)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": 2}, "format is version 2, this uvit reads 1"),
        ({"format": "else"}, "not a feature store's"),
        ({"num_pairs": 12}, "counts 12 pairs, and 11 in its shards"),
        ({"shards": None}, "manifest.json is damaged"),
        ({"moments_shape": [8, 4, 4]}, "moments-00000"),
    ],
)
def test_a_manifest_that_does_not_fit(damaged: Path, change: dict, says: str) -> None:
    manifest = json.loads((damaged / "manifest.json").read_text())
    (damaged / "manifest.json").write_text(json.dumps(manifest | change))
    with pytest.raises(UserError, match=says):
        FeatureStore(damaged)


def test_folders_that_are_no_features(tmp_path: Path, store: Path, old_layout: Path) -> None:
    StoreWriter(tmp_path / "begun", info())
    for path, split, says in [
        (tmp_path / "nowhere", "train", "no such folder"),
        (tmp_path, "train", "neither manifest.json nor train/0.npy"),
        (tmp_path / "begun", "train", "was not finished"),
        (store, "val", "has no splits"),
        (old_layout, "val", "nor val/0.npy"),
        (old_layout / "train", "train", f"give {old_layout}"),
    ]:
        with pytest.raises(UserError, match=says):
            open_features(path, split)


def test_an_old_layout_with_gaps_or_pickles(old_layout: Path, tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    np.save(tmp_path / "train" / "0.npy", np.zeros((8, 2, 2)))
    with pytest.raises(UserError, match="1 moments, 0 contexts"):
        open_features(tmp_path)
    np.save(tmp_path / "train" / "0_0.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(UserError, match=r"0_0\.npy cannot be read"):
        open_features(tmp_path)
    np.save(tmp_path / "train" / "0_0.npy", np.zeros((3, 5)))
    with pytest.raises(UserError, match=r"no empty_context\.npy"):
        open_features(tmp_path)
    np.save(tmp_path / "empty_context.npy", np.zeros((4, 5)))
    with pytest.raises(UserError, match=r"has shape \(4, 5\), and the others have \(3, 5\)"):
        open_features(tmp_path)
