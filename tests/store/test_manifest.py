"""Every field of a manifest is checked, and what is wrong is named."""

import json
from pathlib import Path
from typing import Any

import pytest

from uvit.errors import UserError
from uvit.store.manifest import Manifest, read_manifest


def described(size: int) -> dict[str, Any]:
    return {"bytes": size, "sha256": "0"}


def valid() -> dict[str, Any]:
    return {
        "format": "uvit features",
        "version": 2,
        "split": "train",
        "num_source_pairs": 6,
        "num_pairs": 5,
        "num_captions": 7,
        "shard_size": 3,
        "dtype": "float16",
        "moments_shape": [8, 2, 2],
        "flipped": True,
        "context_shape": [3, 5],
        "num_tokens": 3,
        "token_dtype": None,
        "latent_scale": 0.5,
        "source": {"resolution": 16},
        "vae": {"name": "a/vae", "sha256": "1"},
        "text_encoder": {"name": "a/text_encoder", "sha256": ""},
        "tokenizer": None,
        "files": {"empty_context.npy": described(158), "tokenizer/vocab.json": described(9)},
        "shards": [
            {"rows": 3, "captions": 4, "files": {"moments-00000.npy": described(300)}},
            {"rows": 2, "captions": 3, "files": {"moments-00001.npy": described(200)}},
        ],
    }


def read(folder: Path, content: str) -> Manifest:
    (folder / "manifest.json").write_text(content, encoding="utf-8")
    return read_manifest(folder, lambda what: UserError(f"here: {what}"))


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    manifest = read(tmp_path, json.dumps(valid()))
    assert manifest.fields == valid()
    assert (manifest.rows, manifest.captions) == ([3, 2], [4, 3])
    assert (manifest.split, manifest.flipped, manifest.resolution) == ("train", True, 16)
    assert (manifest.moments_shape, manifest.context_shape) == ((8, 2, 2), (3, 5))
    assert [file["bytes"] for file in manifest.files.values()] == [158, 9, 300, 200]
    assert manifest.encoder("vae", "sha256") == "1"
    assert manifest.encoder("text_encoder", "sha256") is manifest.encoder("tokenizer", "name") is None


@pytest.mark.parametrize("key", sorted(valid().keys() - {"format", "version", "num_source_pairs", "shard_size"}))
def test_each_key_must_be_there_and_of_its_type(tmp_path: Path, key: str) -> None:
    lacking = {name: value for name, value in valid().items() if name != key}
    with pytest.raises(UserError, match=rf"^here: manifest\.json is damaged: {key} is missing;"):
        read(tmp_path, json.dumps(lacking))
    wrong = [] if isinstance(valid()[key], str) else "?"
    with pytest.raises(UserError, match=rf"^here: manifest\.json is damaged: {key} is .*, but must be "):
        read(tmp_path, json.dumps(valid() | {key: wrong}))


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [
        (["num_pairs"], 4, "num_pairs is 4, but the shards have 5"),
        (["num_captions"], 8, "num_captions is 8, but the shards have 7"),
        (["num_pairs"], -5, "num_pairs is -5, but must not be negative"),
        (["num_pairs"], True, "num_pairs is bool, but must be int"),
        (["num_pairs"], 5.0, "num_pairs is float, but must be int"),
        (["shards", 1, "rows"], -2, r"shards\[1\]\.rows is -2, but must not be negative"),
        (["shards", 0, "captions"], "4", r"shards\[0\]\.captions is str, but must be int"),
        (["shards", 0], 7, r"shards\[0\] is int, but must be dict"),
        (["shards", 0], {"captions": 1, "files": {}}, r"shards\[0\]\.rows is missing"),
        (["shards", 1, "files", "x.npy"], 5, r"shards\[1\]\.files\.x\.npy is int, but must be dict"),
        (["shards", 1, "files", "x.npy"], {"sha256": "0"}, r"shards\[1\]\.files\.x\.npy\.bytes is missing"),
        (["files", "x.npy"], described(-1), r"files\.x\.npy\.bytes is -1, but must not be negative"),
        (["files", "../x.npy"], described(1), r"files lists '\.\./x\.npy', which is not inside the folder"),
        (["files", "a/../../x.npy"], described(1), "not inside the folder"),
        (["files", "/x.npy"], described(1), "not inside the folder"),
        (["files", "a\\..\\x.npy"], described(1), "not inside the folder"),
        (["files", ""], described(1), "not inside the folder"),
        (["shards", 0, "files", "../x.npy"], described(1), r"shards\[0\]\.files lists '\.\./x\.npy'"),
        (["moments_shape"], [8, 2], r"moments_shape is \[8, 2\], but must be 3 numbers above 0"),
        (["moments_shape"], [8, -2, 2], "must be 3 numbers above 0"),
        (["context_shape"], [4, 5], "num_tokens is 3, but context_shape is"),
        (["context_shape"], None, "neither text embeddings .* nor token ids"),
        (["dtype"], "float64", "dtype is 'float64', but must be one of float16, float32"),
        (["dtype"], "O", "dtype is 'O', but must be one of"),
        (["token_dtype"], "int64", "token_dtype is 'int64', but must be one of uint16, int32, None"),
        (["latent_scale"], 0, "latent_scale is 0, but must be above 0"),
        (["latent_scale"], float("nan"), "latent_scale is nan, but must be above 0"),
        (["latent_scale"], 10**400, "manifest.json is damaged"),
        (["source", "resolution"], "big", "source.resolution is str, but must be int"),
        (["vae", "name"], 3, "vae.name is int, but must be str"),
    ],
)
def test_values_that_cannot_be(tmp_path: Path, place: list[Any], value: Any, says: str) -> None:
    manifest = inner = valid()
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    with pytest.raises(UserError, match=says):
        read(tmp_path, json.dumps(manifest))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "cannot be read"),
        ("{", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("[]", "is not the manifest of a feature store"),
        ('{"format": "else"}', "is not the manifest of a feature store"),
        (json.dumps(valid() | {"version": 4}), "has format version 4, but this uvit reads 1 to 3; update uvit"),
        (json.dumps(valid() | {"version": "two"}), "has format version 'two'"),
        ('{"format": "uvit features"}', "has format version None"),
    ],
)
def test_files_that_are_no_manifest_of_ours(tmp_path: Path, content: str, says: str) -> None:
    with pytest.raises(UserError, match=f"^here: .*{says}"):
        read(tmp_path, content)


def test_no_file_and_no_text(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="cannot be read"):
        read_manifest(tmp_path, UserError)
    with pytest.raises(UserError, match="cannot be read"):
        read_manifest(tmp_path / "nowhere", UserError)
