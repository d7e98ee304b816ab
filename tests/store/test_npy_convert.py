""".npy features -> store -> .npy features keeps every byte; store -> .npy features -> store keeps every value."""

import os
from pathlib import Path

import numpy as np
import pytest

from tests.store.test_reader import NUM_CAPTIONS, NUM_PAIRS, info, write_store
from tests.store.test_splits import add_preview_prompts
from uvit.config.store import FeaturesExportConfig, FeaturesImportConfig
from uvit.conventions import LatentSpace
from uvit.errors import UserError
from uvit.store.npy_convert import check_room, export_npy, import_npy
from uvit.store.npy_layout import num_captions
from uvit.store.reader import open_features
from uvit.store.shard import EncodedPairs
from uvit.store.writer import StoreWriter
from uvit.weights.encoders import encode_tokens, load_tokenizer, load_transformers_encoder


def run_import(old: Path, store: Path, **flags: object) -> Path:
    import_npy(FeaturesImportConfig(str(old), str(store), disable_tqdm=True, **flags))  # type: ignore[arg-type]
    return store


def run_export(store: Path, old: Path, **flags: object) -> Path:
    export_npy(FeaturesExportConfig(str(store), str(old), disable_tqdm=True, **flags))  # type: ignore[arg-type]
    return old


def contents(folder: Path) -> dict[str, bytes]:
    """All that is not hidden."""
    paths = (path for path in folder.rglob("[!.]*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def arrays(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: np.load(path) for path in folder.glob("*.npy")}


# There and back


def test_old_store_old_is_the_same_to_the_byte(old: Path, tmp_path: Path) -> None:
    store = run_import(old, tmp_path / "store", shard_size=2)
    assert contents(run_export(store, tmp_path / "again")) == contents(old)


def test_store_old_store_is_the_same_in_values(root: Path, tmp_path: Path) -> None:
    old = run_export(root, tmp_path / "old")
    again = arrays(run_import(old, tmp_path / "again", dtype="float16", shard_size=1000) / "train")
    features = open_features(root)
    rows = np.arange(NUM_PAIRS - 2)
    np.testing.assert_array_equal(again["moments-00000.npy"], features.read(rows, np.zeros(len(rows))).moments)
    contexts = np.concatenate([np.load(root / "train" / f"contexts-0000{i}.npy") for i in range(3)])
    np.testing.assert_array_equal(again["contexts-00000.npy"], contexts)
    np.testing.assert_array_equal(again["empty_context.npy"], features.empty_context)
    assert again["counts-00000.npy"].tolist() == [count for i, count in enumerate(NUM_CAPTIONS) if i not in (2, 5)]


def test_both_are_read_alike(old: Path, tmp_path: Path) -> None:
    store = run_import(old, tmp_path / "store")
    for split, num_pairs in (("train", 5), ("val", 2)):
        rows, draws = np.arange(num_pairs), np.linspace(0, 0.99, num_pairs)
        before, after = open_features(old, split).read(rows, draws), open_features(store, split).read(rows, draws)
        np.testing.assert_array_equal(before.moments, after.moments)
        np.testing.assert_array_equal(before.context, after.context)  # type: ignore[arg-type]


# Import


def test_an_import_says_that_the_preview_prompts_are_not_read(
    old: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add_preview_prompts(old)
    store = run_import(old, tmp_path / "store")
    assert sorted(path.name for path in store.iterdir() if path.is_dir()) == ["train", "val"]
    assert capsys.readouterr().out.count("not read: run_vis/ (prompts of the official code's previews)\n") == 1


def test_an_import_records_what_it_is_told(
    old: Path, tmp_path: Path, vae_folder: Path, text_encoder_folder: Path
) -> None:
    unknown = open_features(run_import(old, tmp_path / "unknown"))
    assert (unknown.latent_space, unknown.vae_name, unknown.text_encoder_name) == (LatentSpace(), None, None)
    assert unknown.captions(0) == ()
    flags = {"vae_name_or_path": str(vae_folder), "text_encoder_name_or_path": str(text_encoder_folder)}
    told = open_features(run_import(old, tmp_path / "told", latent_scale=0.25, dtype="float16", **flags))
    assert (told.latent_space, told.vae_name, told.resolution) == (LatentSpace(0.25), str(vae_folder), 16)
    assert told.text_encoder_name == told.tokenizer_name == str(text_encoder_folder)
    assert told.vae_sha256 is not None
    assert told.read(np.array([0]), np.zeros(1)).moments.dtype == np.float16


def test_a_stopped_import_goes_on_where_it_stopped(old: Path, tmp_path: Path) -> None:
    whole = contents(run_import(old, tmp_path / "whole", dtype="float16", shard_size=2))
    moments = np.load(old / "train" / "3.npy")
    np.save(old / "train" / "3.npy", moments * 1e6)
    with pytest.raises(UserError, match=r"^--dtype float16: .*3\.npy has values beyond its range"):
        run_import(old, tmp_path / "stopped", dtype="float16", shard_size=2)
    first = (tmp_path / "stopped" / "train" / "moments-00000.npy").stat().st_ino
    np.save(old / "train" / "3.npy", moments)
    assert contents(run_import(old, tmp_path / "stopped", dtype="float16", shard_size=2)) == whole
    assert (tmp_path / "stopped" / "train" / "moments-00000.npy").stat().st_ino == first
    assert contents(run_import(old, tmp_path / "stopped", dtype="float16", shard_size=2)) == whole


def test_pairs_that_cannot_be_used_are_left_out_and_listed(old: Path, tmp_path: Path) -> None:
    (old / "train" / "1.npy").write_bytes(b"no array")
    np.save(old / "train" / "2_1.npy", np.full((16, 32), np.nan, np.float32))
    np.save(old / "train" / "4_0.npy", np.zeros((16, 31), np.float32))
    store = run_import(old, tmp_path / "store", shard_size=1)
    features = open_features(store)
    assert features.num_samples == 2
    assert features.manifest["problems"] == {"broken file": 1, "not finite": 1, "wrong shape": 1}  # type: ignore[attr-defined]
    assert "2_1.npy has values that are NaN or infinite" in (store / "train" / "problems.jsonl").read_text()


def test_what_cannot_be_imported(old: Path, root: Path, tmp_path: Path, vae_folder: Path) -> None:
    with pytest.raises(UserError, match="is a feature store already"):
        run_import(root, tmp_path / "out")
    np.save(old / "train" / "0.npy", np.zeros((6, 4, 4)))
    with pytest.raises(UserError, match="its arrays are float64; give --dtype float32"):
        run_import(old, tmp_path / "out")
    with pytest.raises(UserError, match=r"has 4 latent channels, .* need 3"):
        run_import(old, tmp_path / "out", dtype="float32", vae_name_or_path=str(vae_folder))
    np.save(old / "empty_context.npy", np.zeros((16, 31)))
    with pytest.raises(UserError, match=r"empty_context\.npy has shape \(16, 31\)"):
        run_import(old, tmp_path / "out")
    (old / "empty_context.npy").unlink()
    with pytest.raises(UserError, match=r"has no empty_context\.npy"):
        run_import(old, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_numbers_must_have_no_holes(old: Path) -> None:
    assert num_captions(old / "train").tolist() == [1, 2, 3, 1, 2]
    (old / "train" / "2_1.npy").unlink()
    with pytest.raises(UserError, match=r"2_1\.npy is missing"):
        num_captions(old / "train")
    (old / "train" / "1.npy").unlink()
    with pytest.raises(UserError, match=r"/1\.npy is missing"):
        num_captions(old / "train")


# Export


def test_a_stopped_export_keeps_what_is_whole(root: Path, tmp_path: Path) -> None:
    old = run_export(root, tmp_path / "old")
    whole, kept = contents(old), (old / "train" / "5.npy").stat()
    (old / "train" / "8_1.npy").unlink()
    (old / "train" / "0.npy").write_bytes(b"cut")
    assert contents(run_export(root, old)) == whole
    assert os.path.samestat((old / "train" / "5.npy").stat(), kept)


def test_shards_of_which_nothing_is_left(tmp_path: Path) -> None:
    write_store(tmp_path / "store" / "train", info(), left_out=range(4))
    old = run_export(tmp_path / "store", tmp_path / "old")
    assert num_captions(old / "train").tolist() == NUM_CAPTIONS[4:]
    assert np.load(old / "train" / "0.npy")[0, 0, 0] == 4


def test_a_folder_of_something_else_is_left_alone(root: Path, old: Path, tmp_path: Path) -> None:
    before = contents(old)
    with pytest.raises(UserError, match="contains something other than this export"):
        run_export(root, old)
    assert contents(old) == before
    run_export(root, tmp_path / "out")
    with pytest.raises(UserError, match=r"other than this export; .*\n  dtype: was float32, now float16$"):
        run_export(root, tmp_path / "out", dtype="float16")
    store = run_import(old, tmp_path / "imported")
    with pytest.raises(UserError, match=r"its empty_context\.npy is from another text encoder"):
        run_export(store, tmp_path / "out", split="val")


def test_mirrored_images_are_said_to_be_left_out(
    root: Path, old: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_export(root, tmp_path / "a")
    assert "mirrored images were not exported" in capsys.readouterr().out
    run_export(run_import(old, tmp_path / "imported"), tmp_path / "b", split="val")
    assert "not exported" not in capsys.readouterr().out
    assert not (tmp_path / "b" / "train").exists()


def test_splits_of_other_encoders_cannot_share_a_folder(root: Path, tmp_path: Path) -> None:
    write_store(root / "val", info(split="val"))
    path = root / "val" / "empty_context.npy"
    np.save(path, np.load(path) + 1)
    with pytest.raises(UserError, match="different text embeddings of the empty caption"):
        run_export(root, tmp_path / "old")


def test_token_ids_alone_are_encoded(tmp_path: Path, text_encoder_folder: Path) -> None:
    tokenizer = load_tokenizer(str(text_encoder_folder))
    ids = tokenizer(["two cats", "a red circle"], padding="max_length", max_length=16, return_tensors="pt")["input_ids"]
    what = info(
        num_source_pairs=1,
        num_tokens=16,
        context_shape=None,
        text_encoder=None,
        tokenizer={"name": str(text_encoder_folder), "sha256": "3"},
    )
    writer = StoreWriter(tmp_path / "store" / "train", what)
    with writer.open_shard(0) as shard:
        part = EncodedPairs(["a"], [("two cats", "a red circle")], np.zeros((1, 8, 2, 2)), None, None, ids.numpy())
        shard.append(part, next_row=1)
        shard.finish()
    writer.finish(None, ids[0].numpy().astype(np.uint16))
    with pytest.raises(UserError, match="stores only token ids and records no text encoder"):
        run_export(tmp_path / "store", tmp_path / "old")
    run_export(tmp_path / "store", tmp_path / "old", text_encoder_name_or_path=str(text_encoder_folder))
    expected = encode_tokens(load_transformers_encoder(str(text_encoder_folder)), ids, tokenizer.pad_token_id)
    for k in range(2):  # a batch of another size adds in another order
        np.testing.assert_allclose(np.load(tmp_path / "old" / "train" / f"0_{k}.npy"), expected[k], atol=1e-5)


def test_a_text_encoder_that_has_changed_is_not_taken_unasked(tmp_path: Path, text_encoder_folder: Path) -> None:
    named = {"name": str(text_encoder_folder), "sha256": "2"}
    write_store(tmp_path / "store" / "train", info(context_shape=None, text_encoder=named, tokenizer=named))
    with pytest.raises(UserError, match="has other weights than the recorded one"):
        run_export(tmp_path / "store", tmp_path / "old")


def test_too_little_room_is_said_before_anything_is_written(tmp_path: Path) -> None:
    check_room(1, tmp_path / "not" / "there" / "yet")
    with pytest.raises(UserError, match=r"needs 1,048,576\.0 TiB"):
        check_room(2**60, tmp_path / "not" / "there" / "yet")
    assert list(tmp_path.iterdir()) == []
