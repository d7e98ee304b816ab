"""What is extracted is what the encoders say, whatever interrupts it, from any kind of source."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.data.test_store import contents
from uvit.config.extract import ExtractConfig
from uvit.data import encoders
from uvit.data.extract import extract
from uvit.data.features import FeatureStore
from uvit.data.shapes import ShapesSource
from uvit.data.sources import open_source
from uvit.data.types import Pair
from uvit.diffusion import LATENT_SCALE
from uvit.errors import UserError
from uvit.images import to_pixels, to_unit

ALL = np.arange(9)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine pairs of the built-in shapes, as a folder with metadata.jsonl."""
    folder = tmp_path_factory.mktemp("pairs")
    shapes = open_source("shapes", resolution=24)
    rows = []
    for i in range(9):
        shapes[i].image.save(folder / f"{i}.png")
        rows.append({"file_name": f"{i}.png", "captions": shapes[i].captions[: 1 + i % 2]})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def flags(pairs: Path, vae_folder: Path, text_encoder_folder: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "source": str(pairs),
        "output_dir": str(tmp_path / "store"),
        "vae_name_or_path": str(vae_folder),
        "text_encoder_name_or_path": str(text_encoder_folder),
        "text": "both",
        "resolution": 16,
        "model_max_length": 16,
        "batch_size": 2,
        "shard_size": 4,
        "num_workers": 0,
        "device": "cpu",
        "disable_tqdm": True,
    }


def run(flags: dict[str, Any]) -> FeatureStore:
    extract(ExtractConfig(**flags))
    return FeatureStore(Path(flags["output_dir"]))


# What is stored


def test_the_store_holds_what_the_encoders_say(flags: dict[str, Any]) -> None:
    store = run(flags | {"dtype": "float32"})
    source = open_source(flags["source"])
    vae = encoders.load_vae(flags["vae_name_or_path"])
    text_encoder = encoders.load_text_encoder(flags["text_encoder_name_or_path"])
    tokenizer = encoders.load_tokenizer(flags["text_encoder_name_or_path"])
    batch = store.read(ALL, np.full(9, 0.99))  # the last caption of each
    pixels = torch.stack([to_unit(to_pixels(source[i].image, 16)) for i in range(9)])
    ids = encoders.tokenize(tokenizer, [source[i].captions[-1] for i in range(9)], 16)
    moments, context = encoders.encode_images(vae, pixels), encoders.encode_tokens(text_encoder, ids, 0)
    assert batch.context is not None
    assert batch.token_ids is not None
    torch.testing.assert_close(torch.from_numpy(batch.moments), moments)
    torch.testing.assert_close(torch.from_numpy(batch.context), context)
    assert (batch.token_ids == ids.numpy()).all()
    assert [store.captions(i) for i in range(9)] == [source[i].captions for i in range(9)]
    empty_ids = encoders.tokenize(tokenizer, [""], 16)
    torch.testing.assert_close(
        torch.from_numpy(store.empty_context), encoders.encode_tokens(text_encoder, empty_ids, 0)[0]
    )
    assert store.empty_token_ids is not None
    assert store.empty_token_ids.tolist() == empty_ids[0].tolist()


def test_float16_is_the_same_but_for_rounding(flags: dict[str, Any], tmp_path: Path) -> None:
    half, full = run(flags), run(flags | {"dtype": "float32", "output_dir": str(tmp_path / "full")})
    a, b = half.read(ALL, np.zeros(9)), full.read(ALL, np.zeros(9))
    assert a.moments.dtype == np.float16
    np.testing.assert_array_equal(a.moments, b.moments.astype(np.float16))


def test_the_store_names_its_encoders_so_that_they_load(flags: dict[str, Any]) -> None:
    store = run(flags)
    assert store.vae_name == str(Path(flags["vae_name_or_path"]).resolve())
    assert store.text_encoder_name is not None
    encoders.load_text_encoder(store.text_encoder_name)
    assert store.latent_scale == 0.5
    vae = encoders.load_vae(store.vae_name)
    assert store.manifest["vae"]["sha256"] == encoders.fingerprint(vae)


def test_token_ids_alone_need_no_text_encoder_and_bring_their_tokenizer(flags: dict[str, Any], tmp_path: Path) -> None:
    store = run(flags | {"text": "tokens", "text_encoder_name_or_path": None, "vocab_size": 300})
    assert store.context_shape is None
    moved = tmp_path / "elsewhere"
    shutil.move(flags["output_dir"], moved)
    store = FeatureStore(moved)
    assert store.tokenizer_name == str(moved / "tokenizer")
    tokenizer = encoders.load_tokenizer(store.tokenizer_name)
    ids = encoders.tokenize(tokenizer, [store.captions(i)[0] for i in range(9)], 16)
    assert (store.read(ALL, np.zeros(9)).token_ids == ids.numpy()).all()


def test_latent_scale(flags: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(flags | {"latent_scale": 0.75, "output_dir": str(tmp_path / "a")}).latent_scale == 0.75
    shutil.copytree(flags["vae_name_or_path"], tmp_path / "sd")
    config = json.loads((tmp_path / "sd" / "config.json").read_text()) | {"scaling_factor": 0.18215}
    (tmp_path / "sd" / "config.json").write_text(json.dumps(config))
    assert run(flags | {"vae_name_or_path": str(tmp_path / "sd")}).latent_scale == LATENT_SCALE
    assert "0.2301: U-ViT's own" in capsys.readouterr().out


# Stopping and going on


def test_workers_change_nothing(flags: dict[str, Any], tmp_path: Path) -> None:
    run(flags)
    run(flags | {"num_workers": 2, "output_dir": str(tmp_path / "workers")})
    assert contents(tmp_path / "workers") == contents(tmp_path / "store")


def test_a_finished_store_is_left_as_it_is(flags: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    run(flags)
    before = contents(Path(flags["output_dir"]))
    capsys.readouterr()
    run(flags)
    assert "is complete: 9 pairs" in capsys.readouterr().out
    assert contents(Path(flags["output_dir"])) == before


@pytest.mark.parametrize("change", [{"resolution": 24}, {"dtype": "float32"}, {"shard_size": 5}, {"text": "contexts"}])
def test_other_settings_are_refused(flags: dict[str, Any], change: dict[str, Any]) -> None:
    run(flags)
    with pytest.raises(UserError, match="begun with other settings"):
        run(flags | change)


class Interrupted(ShapesSource):
    """Ctrl-C while its 50th picture is decoded."""

    def __getitem__(self, index: int) -> Pair:
        if index == 50:
            raise KeyboardInterrupt
        return super().__getitem__(index)


def test_stopped_by_ctrl_c_and_run_again(
    flags: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags |= {"source": "shapes", "text": "contexts", "num_workers": 0, "shard_size": 20}
    with monkeypatch.context() as patch:
        patch.setattr("uvit.data.extract.open_source", lambda *_: Interrupted("train", flags["resolution"]))
        with pytest.raises(KeyboardInterrupt):
            run(flags)
    assert "Stopped after 2 of 33 shards; run the same command to go on" in capsys.readouterr().out
    (tmp_path / "store" / ".moments-00005.npy.partial").write_text("what a kill may leave behind")
    run(flags)
    assert "Going on after 40 of 648 pairs" in capsys.readouterr().out
    run(flags | {"output_dir": str(tmp_path / "whole")})
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")


# Real pictures


def test_real_pictures(coco_mini: Path, emoji_tar: Path, flags: dict[str, Any], tmp_path: Path) -> None:
    store = run(flags | {"source": str(coco_mini), "batch_size": 16, "shard_size": 64})
    assert (store.num_samples, store.manifest["num_captions"]) == (76, 380)
    assert store.captions(0)[0] == "a family is sitting down at a table to have cake"
    subset = tmp_path / "emoji.tar"
    subset.write_bytes(emoji_tar.read_bytes()[: _end_of_members(emoji_tar, 20)] + bytes(1024))
    store = run(flags | {"source": str(subset), "output_dir": str(tmp_path / "emoji")})
    assert (store.num_samples, store.captions(0)) == (10, ("an emoji of grinning face",))


def _end_of_members(tar: Path, count: int) -> int:
    import tarfile

    with tarfile.open(tar) as opened:
        return next(info for i, info in enumerate(opened) if i == count).offset


# What is wrong


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"resolution": 18}, "--resolution 18: must be a multiple of 4"),
        ({"model_max_length": 17}, "--model_max_length 17: the text encoder takes 16 at most"),
        ({"device": "abacus"}, "--device abacus"),
        ({"text_encoder_name_or_path": None}, "--text both: needs --text_encoder_name_or_path"),
        ({"vocab_size": 300}, "--vocab_size 300"),
        ({"latent_scale": -1.0}, "--latent_scale -1.0"),
        ({"batch_size": 0}, "--batch_size 0"),
    ],
)
def test_flags_that_do_not_fit(flags: dict[str, Any], change: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        run(flags | change)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_broken_image_is_named(flags: dict[str, Any], pairs: Path, tmp_path: Path, num_workers: int) -> None:
    shutil.copytree(pairs, tmp_path / "broken")
    (tmp_path / "broken" / "6.png").write_bytes((pairs / "6.png").read_bytes()[:60])
    with pytest.raises(UserError, match=r"^pair 6\.png: its image"):
        run(flags | {"source": str(tmp_path / "broken"), "num_workers": num_workers})
    (tmp_path / "broken" / "6.png").write_bytes((pairs / "6.png").read_bytes())
    assert run(flags | {"source": str(tmp_path / "broken")}).num_samples == 9


def test_what_float16_cannot_hold(flags: dict[str, Any], tmp_path: Path) -> None:
    vae = encoders.load_vae(flags["vae_name_or_path"])
    vae.quant_conv.bias[0] = 1e5
    vae.save_pretrained(tmp_path / "loud")
    with pytest.raises(UserError, match=r"moments come out infinite.*give --dtype float32"):
        run(flags | {"vae_name_or_path": str(tmp_path / "loud")})
