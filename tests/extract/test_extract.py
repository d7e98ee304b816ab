"""What is extracted is what the encoders say, whatever interrupts it, from any kind of source."""

import contextlib
import errno
import fcntl
import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from tests.sources.image_files import SRGB_PRIMARIES, matrix_profile
from tests.store.test_writer import contents
from uvit.config.extract import ExtractConfig
from uvit.config.store import FeaturesInfoConfig, FeaturesMergeConfig
from uvit.conventions import LATENT_SCALE
from uvit.errors import UserError
from uvit.extract import extract as extract_module
from uvit.extract.extract import extract
from uvit.images import to_pixels, to_unit
from uvit.sources.open import open_source, require_random_access
from uvit.sources.shapes import ShapesSource
from uvit.sources.types import Pair, PairError, Problem, Source
from uvit.store import shard
from uvit.store.info import info
from uvit.store.merge import merge
from uvit.store.reader import FeatureStore, open_features
from uvit.store.shard import EncodedPairs
from uvit.store.writer import StoreWriter
from uvit.weights import encoders

ALL = np.arange(9)
ROOT = Path(__file__).parents[2]


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
        "source": (str(pairs),),
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
    return FeatureStore(Path(flags["output_dir"]) / flags.get("split", "train"))


# What is stored


def test_the_store_holds_what_the_encoders_say(flags: dict[str, Any]) -> None:
    store = run(flags | {"dtype": "float32"})
    source = require_random_access(open_source(flags["source"]), "--source")
    vae = encoders.load_diffusers_vae(flags["vae_name_or_path"])
    text_encoder = encoders.load_transformers_encoder(flags["text_encoder_name_or_path"])
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
    encoders.load_transformers_encoder(store.text_encoder_name)
    assert store.latent_space.latent_scale == 0.5
    vae = encoders.load_diffusers_vae(store.vae_name)
    assert store.manifest["vae"]["sha256"] == encoders.fingerprint(vae)


def test_token_ids_alone_need_no_text_encoder_and_bring_their_tokenizer(flags: dict[str, Any], tmp_path: Path) -> None:
    store = run(flags | {"text": "tokens", "text_encoder_name_or_path": None, "vocab_size": 300})
    assert store.context_shape is None
    moved = tmp_path / "elsewhere"
    shutil.move(Path(flags["output_dir"]) / "train", moved)
    store = FeatureStore(moved)
    assert store.tokenizer_name == str(moved / "tokenizer")
    tokenizer = encoders.load_tokenizer(store.tokenizer_name)
    ids = encoders.tokenize(tokenizer, [store.captions(i)[0] for i in range(9)], 16)
    assert (store.read(ALL, np.zeros(9)).token_ids == ids.numpy()).all()


def test_splits_share_the_tokenizer_that_was_built_for_the_first(flags: dict[str, Any], tmp_path: Path) -> None:
    flags |= {"source": ("shapes",), "text": "tokens", "text_encoder_name_or_path": None, "vocab_size": 300}
    train, heldout = run(flags), run(flags | {"split": "heldout", "vocab_size": None})
    first, second = (store.manifest["tokenizer"] for store in (train, heldout))
    assert first == second
    assert run(flags).manifest == train.manifest
    shutil.rmtree(tmp_path / "store" / "heldout")
    with pytest.raises(UserError, match=r"--vocab_size 299: .*tokenizer has 300 tokens"):
        run(flags | {"split": "heldout", "vocab_size": 299})


def test_a_text_encoder_for_later_is_named_beside_token_ids(flags: dict[str, Any]) -> None:
    store = run(flags | {"text": "tokens"})
    assert store.context_shape is None
    text_encoder = encoders.load_transformers_encoder(flags["text_encoder_name_or_path"])
    assert store.manifest["text_encoder"]["sha256"] == encoders.fingerprint(text_encoder)


def test_latent_scale(flags: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(flags | {"latent_scale": 0.75, "output_dir": str(tmp_path / "a")}).latent_space.latent_scale == 0.75
    shutil.copytree(flags["vae_name_or_path"], tmp_path / "sd")
    config = json.loads((tmp_path / "sd" / "config.json").read_text()) | {"scaling_factor": 0.18215}
    (tmp_path / "sd" / "config.json").write_text(json.dumps(config))
    assert run(flags | {"vae_name_or_path": str(tmp_path / "sd")}).latent_space.latent_scale == LATENT_SCALE
    assert "0.2301: U-ViT's value" in capsys.readouterr().out


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


@pytest.mark.parametrize("content", ["", '{"num_pairs": ', "[]"])
def test_a_damaged_manifest_is_written_again(content: str, flags: dict[str, Any]) -> None:
    run(flags)
    before = contents(Path(flags["output_dir"]))
    for path in Path(flags["output_dir"]).rglob("manifest.json"):
        path.write_text(content)
    run(flags)
    assert contents(Path(flags["output_dir"])) == before


@pytest.mark.parametrize("change", [{"resolution": 24}, {"dtype": "float32"}, {"shard_size": 5}, {"text": "contexts"}])
def test_other_settings_are_refused(flags: dict[str, Any], change: dict[str, Any]) -> None:
    run(flags)
    with pytest.raises(UserError, match="started with other settings"):
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
    flags |= {"source": ("shapes",), "text": "contexts", "num_workers": 0, "shard_size": 20}
    with monkeypatch.context() as patch:
        patch.setattr("uvit.extract.extract.open_given", lambda *_, **__: Interrupted("train", flags["resolution"]))
        with pytest.raises(KeyboardInterrupt):
            run(flags)
    assert "run the same command to resume" in capsys.readouterr().out
    run(flags)
    done = re.search(r"Resuming after (\d+) of 648 pairs", capsys.readouterr().out)
    assert done is not None
    assert 40 < int(done[1]) <= 50, "shards are not redone, and what was encoded is kept"
    run(flags | {"output_dir": str(tmp_path / "whole")})
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")


def test_stopped_after_every_batch(
    flags: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once it is written and committed, as often as there are batches; then all is as if never stopped."""

    class StopError(Exception):
        pass

    class Stopping(extract_module.ShardAppender):
        stopped = False

        def append(self, rows: range, part: EncodedPairs) -> None:
            if not self.stopped:  # others may be waiting for their turn
                super().append(rows, part)
            self.stopped = True
            raise StopError

    run(flags | {"output_dir": str(tmp_path / "whole")})
    stops = 0
    monkeypatch.setattr(extract_module, "ShardAppender", Stopping)
    while not (tmp_path / "store" / "train" / "manifest.json").exists():
        with contextlib.suppress(StopError):
            run(flags)
        stops += 1
    assert stops == 6, "nine pairs in shards of four and batches of two are five batches"
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")


SCRIPT = """
import json, sys
from uvit.config.extract import ExtractConfig
from uvit.extract import extract
from uvit.errors import UserError

extract.COMMIT_SECONDS = 0.0
try:
    extract.extract(ExtractConfig(**json.loads(sys.argv[1])))
except UserError as error:
    sys.exit(f"UserError: {error}")
"""


def start(flags: dict[str, Any], script: str = SCRIPT) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, json.dumps(flags)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True)


def wait_for_file(pattern: str, folder: Path, process: subprocess.Popen[str]) -> None:
    while not any(folder.glob(pattern)):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)


@pytest.mark.slow
def test_killed_three_times_at_random(flags: dict[str, Any], tmp_path: Path) -> None:
    flags |= {"source": ("shapes",), "num_workers": 2, "shard_size": 200, "batch_size": 8, "resolution": 64}
    run(flags | {"output_dir": str(tmp_path / "whole")})
    random = np.random.default_rng(0)
    for kill in range(3):
        with start(flags) as process:
            wait_for_file(f"train/.partial-0000{kill}/progress.json", tmp_path / "store", process)
            time.sleep(random.uniform(0, 0.3))
            process.kill()
            process.communicate(timeout=60)  # until its workers, which share its output, have ended too
        assert process.returncode == -signal.SIGKILL, "it was done before it was killed"
    run(flags)
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")


def progress_files(store: Path) -> list[Path]:
    return list(store.glob("train/.partial-*/progress.json"))


@pytest.mark.slow
def test_sigterm_commits_what_was_done(flags: dict[str, Any], tmp_path: Path) -> None:
    flags |= {"source": ("shapes",), "shard_size": 1000, "batch_size": 8, "resolution": 64, "text": "contexts"}
    lazy = SCRIPT.replace("= 0.0", "= 1e9")  # no commit but at the end
    with start(flags, lazy) as process:
        wait_for_file("train/.partial-00000/moments-00000.npy", tmp_path / "store", process)
        time.sleep(0.5)
        process.terminate()
        said, _ = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM, said
    assert "run the same command to resume" in said
    (progress,) = progress_files(tmp_path / "store")
    assert json.loads(progress.read_text())["next_row"] >= 8


# Several processes


def test_parts_one_after_the_other(flags: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(flags | {"output_dir": str(tmp_path / "whole")})
    extract(ExtractConfig(**flags, shard="1/2"))
    assert "The other processes still have to write 2 of 3" in capsys.readouterr().out
    extract(ExtractConfig(**flags | {"batch_size": 3, "num_workers": 1}, shard="1/2"))  # has nothing to do
    with pytest.raises(UserError, match="not finished"):
        open_features(tmp_path / "store")
    extract(ExtractConfig(**flags, shard="0/2"))
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")


def test_parts_as_torchrun_says(flags: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(flags | {"output_dir": str(tmp_path / "whole")})
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in (2, 0, 1):
        monkeypatch.setenv("RANK", str(rank))
        extract(ExtractConfig(**flags))
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")
    with pytest.raises(UserError, match=r"--shard 0/2: torchrun.* 3 processes"):
        extract(ExtractConfig(**flags, shard="0/2"))


@pytest.mark.slow
def test_parts_at_once(flags: dict[str, Any], tmp_path: Path) -> None:
    flags |= {"source": ("shapes",), "shard_size": 50, "batch_size": 8, "text": "tokens", "vocab_size": 300}
    flags["text_encoder_name_or_path"] = None
    processes = [start(flags | {"shard": f"{part}/2"}) for part in range(2)]
    said = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert sum("is complete" in each for each in said) in (1, 2), said
    run(flags | {"output_dir": str(tmp_path / "whole")})
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")


# Pairs that cannot be used


@pytest.fixture
def bad_pairs(pairs: Path, tmp_path: Path) -> Path:
    """Of the nine, the second is cut off, the fifth is tiny and the sixth has an empty caption beside a good one."""
    folder = tmp_path / "bad"
    shutil.copytree(pairs, folder)
    (folder / "1.png").write_bytes((pairs / "1.png").read_bytes()[:60])
    with Image.open(pairs / "4.png") as image:
        image.crop((0, 0, 24, 9)).save(folder / "4.png")
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    row = json.loads(lines[5])
    lines[5] = json.dumps(row | {"captions": [row["captions"][0], " "]})
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_pairs_are_left_out_and_listed(
    flags: dict[str, Any], bad_pairs: Path, tmp_path: Path, num_workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    flags |= {"source": (str(bad_pairs),), "num_workers": num_workers}
    store = run(flags)
    problems = [json.loads(line) for line in (tmp_path / "store/train/problems.jsonl").read_text().splitlines()]
    assert [(problem["kind"], problem["left_out"]) for problem in problems] == [
        ("broken image", True),
        ("tiny image", True),
        ("empty caption", False),
    ]
    assert "24 x 9 pixels, less than --min_image_size" in problems[1]["message"]
    assert (store.num_samples, store.manifest["num_source_pairs"], store.manifest["num_left_out"]) == (7, 9, 2)
    assert store.manifest["problems"] == {"broken image": 1, "empty caption": 1, "tiny image": 1}
    said = capsys.readouterr().out
    assert "9 pairs found: 7 stored, 2 skipped (1 broken image, 1 tiny image); also 1 empty caption. See " in said
    assert "problems.jsonl" in said
    whole = run(flags | {"source": (str(bad_pairs.parent / "bad"),), "output_dir": str(tmp_path / "other")})
    assert whole.num_samples == 7
    good = require_random_access(open_source(str(bad_pairs)), "")
    assert [store.captions(i) for i in range(7)] == [good[i].captions for i in (0, 2, 3, 5, 6, 7, 8)]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_bad_pairs_stop_it_where_that_is_asked(
    flags: dict[str, Any], pairs: Path, bad_pairs: Path, num_workers: int
) -> None:
    flags |= {"source": (str(bad_pairs),), "num_workers": num_workers, "on_error": "stop"}
    with pytest.raises(UserError, match="--on_error skip skips such pairs"):
        run(flags)
    shutil.copytree(pairs, bad_pairs, dirs_exist_ok=True)
    assert run(flags).num_samples == 9


def test_what_the_index_shows_is_said_first(
    flags: dict[str, Any], pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(pairs, tmp_path / "bad")
    with (tmp_path / "bad" / "metadata.jsonl").open("a") as file:
        file.write('{"file_name": "8.png"\n')
    flags |= {"source": (str(tmp_path / "bad"),)}
    with pytest.raises(UserError, match=r"first of 1 problems\); --on_error skip"):
        run(flags | {"on_error": "stop", "vae_name_or_path": "no/such/vae"})
    assert run(flags).num_samples == 9
    assert "Problems in the index: 1 " in capsys.readouterr().out


def test_nothing_but_bad_pairs(flags: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"all 9 pairs were skipped; .*problems\.jsonl says"):
        run(flags | {"min_image_size": 100})
    assert not (tmp_path / "store" / "train" / "manifest.json").exists()


# Captions that are cut


@pytest.mark.parametrize("below_longest", [20, 1, 0])
def test_captions_that_are_cut_are_counted(
    flags: dict[str, Any], bad_pairs: Path, tmp_path: Path, below_longest: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each caption of the store once: not those of pairs that are skipped."""
    tokenizer = encoders.load_tokenizer(flags["text_encoder_name_or_path"])
    good = require_random_access(open_source(str(bad_pairs)), "")
    captions = [caption for i in (0, 2, 3, 5, 6, 7, 8) for caption in good[i].captions]
    lengths = [len(ids) for ids in tokenizer(captions, verbose=False)["input_ids"]]
    num_tokens = max(lengths) - below_longest
    count = sum(length > num_tokens for length in lengths)
    assert (count == 0) == (below_longest == 0)
    flags |= {"source": (str(bad_pairs),), "model_max_length": num_tokens, "text": "tokens"}
    flags |= {"tokenizer_name": flags["text_encoder_name_or_path"], "text_encoder_name_or_path": None}
    store = run(flags)
    said = capsys.readouterr().out
    share = f"{count} of {len(captions)} captions ({count / len(captions):.2%})"
    assert f"{share} have more than --model_max_length {num_tokens} tokens" in said
    assert store.manifest["num_truncated_captions"] == count

    for part in ("1/2", "0/2"):
        run_part = flags | {"output_dir": str(tmp_path / "parts"), "shard": part, "batch_size": 3}
        extract(ExtractConfig(**run_part))
    parts = FeatureStore(tmp_path / "parts" / "train")
    assert [shard["truncated_captions"] for shard in parts.manifest["shards"]] == [
        shard["truncated_captions"] for shard in store.manifest["shards"]
    ]
    merge(FeaturesMergeConfig((flags["output_dir"], str(tmp_path / "parts")), str(tmp_path / "merged")))
    capsys.readouterr()
    info(FeaturesInfoConfig(str(tmp_path / "merged"), json=True))
    assert json.loads(capsys.readouterr().out)["splits"][0]["num_truncated_captions"] == 2 * count
    info(FeaturesInfoConfig(str(tmp_path / "merged")))
    assert f"cut captions     {2 * count} ({count / len(captions):.2%})" in capsys.readouterr().out


def test_a_shard_that_an_earlier_version_wrote_leaves_the_count_open(
    flags: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run(flags)
    folder = Path(flags["output_dir"]) / "train"
    record = json.loads((folder / "shard-00000.json").read_text())
    del record["truncated_captions"]
    (folder / "shard-00000.json").write_text(json.dumps(record))
    (folder / "manifest.json").unlink()
    capsys.readouterr()
    assert run(flags).manifest["num_truncated_captions"] is None
    assert "--model_max_length" not in capsys.readouterr().out


# How images become features


def test_mirrored_images_are_encoded_beside_the_others(flags: dict[str, Any]) -> None:
    store = run(flags | {"random_flip": True, "dtype": "float32"})
    vae = encoders.load_diffusers_vae(flags["vae_name_or_path"])
    source = require_random_access(open_source(flags["source"]), "--source")
    pixels = torch.stack([to_unit(to_pixels(source[i].image, 16)) for i in range(9)])
    plain, mirrored = encoders.encode_images(vae, pixels), encoders.encode_images(vae, pixels.flip(-1))
    flips = np.array([0, 0.9] * 4 + [0.4])
    read = torch.from_numpy(store.read(ALL, np.zeros(9), flips).moments)
    torch.testing.assert_close(read, torch.where(torch.tensor(flips < 0.5)[:, None, None, None], mirrored, plain))


def test_crops_and_filters_reach_the_pixels(flags: dict[str, Any], tmp_path: Path) -> None:
    wide = tmp_path / "wide"
    wide.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(wide / "0.png")
    (wide / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "noise"}\n')
    seen = {}
    for crop, resize in itertools.product(("center", "random", "pad", "stretch"), ("lanczos", "box")):
        out = str(tmp_path / f"{crop}-{resize}")
        store = run(flags | {"source": (str(wide),), "crop": crop, "resize": resize, "output_dir": out})
        seen[crop, resize] = store.read(ALL[:1], np.zeros(1)).moments.tobytes()
        assert (store.manifest["source"]["crop"], store.manifest["source"]["resize"]) == (crop, resize)
    assert len(set(seen.values())) == 8


def test_profiles_are_converted_or_ignored_as_the_flag_says(flags: dict[str, Any], tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    seen = {}
    for name, profile in (("plain", None), ("linear", matrix_profile(SRGB_PRIMARIES, 1.0))):
        folder = tmp_path / name
        folder.mkdir()
        Image.fromarray(noise).save(folder / "0.png", icc_profile=profile)
        (folder / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "noise"}\n')
        for icc in ("srgb", "ignore"):
            store = run(flags | {"source": (str(folder),), "icc": icc, "output_dir": str(tmp_path / f"{name}-{icc}")})
            seen[name, icc] = store.read(ALL[:1], np.zeros(1)).moments.tobytes()
            assert store.manifest["source"]["icc"] == icc
    assert seen["plain", "srgb"] == seen["plain", "ignore"] == seen["linear", "ignore"] != seen["linear", "srgb"]


def test_a_store_that_an_earlier_version_began_says_so(
    flags: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(flags)
    assert "Warning" not in capsys.readouterr().out
    folder = Path(flags["output_dir"]) / "train"
    settings = json.loads((folder / "settings.json").read_text())
    assert settings["source"].pop("crop_before_resize") is True
    assert settings["source"].pop("icc") == "srgb"
    (folder / "settings.json").write_text(json.dumps(settings))
    run(flags)  # is complete
    assert "Warning" not in capsys.readouterr().out
    for path in (folder / "manifest.json", *folder.glob("*-00001.*")):
        path.unlink()
    store = run(flags)
    assert "was started by an earlier version" in capsys.readouterr().out
    source = store.manifest["source"]
    assert (source["icc"], source["crop_before_resize"]) == ("ignore", "partly")
    with pytest.raises(UserError, match=r"\n  source\.crop: was center, now pad$"):
        run(flags | {"crop": "pad"})


def test_low_precision_is_near(flags: dict[str, Any], tmp_path: Path) -> None:
    full = run(flags).read(ALL, np.zeros(9))
    half = run(flags | {"bf16": True, "output_dir": str(tmp_path / "half")}).read(ALL, np.zeros(9))
    assert full.context is not None
    assert half.context is not None
    for a, b in ((full.moments, half.moments), (full.context, half.context)):
        assert not np.array_equal(a, b)
        np.testing.assert_allclose(a.astype(np.float32), b.astype(np.float32), atol=0.1)


# Streams


class Numbered(Source):
    """A stream of shapes, whose fourth pair is broken."""

    def __init__(self, length: int):
        self.length = length

    def read(self, start: int, wanted: Callable[[int], bool]) -> Iterator[tuple[int, Pair | PairError | None]]:
        shapes = ShapesSource("train", 16)
        for i in range(start, self.length):
            if i == 3 and wanted(i):
                yield i, PairError(Problem("3", "broken image", "3 is broken"))
            else:
                yield i, shapes[i] if wanted(i) else None

    def all_captions(self) -> Iterator[str]:
        shapes = ShapesSource("train", 16)
        for i in range(self.length):
            yield from shapes[i].captions


@pytest.mark.parametrize("length", [21, 24])
@pytest.mark.parametrize("num_workers", [0, 3])
def test_a_stream_in_parts_that_are_stopped(
    flags: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    num_workers: int,
    length: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(extract_module, "open_given", lambda *_, **__: Numbered(length))
    store = run(flags | {"output_dir": str(tmp_path / "whole")})
    assert "Stream of unknown length" in capsys.readouterr().out
    assert (store.num_samples, store.manifest["num_source_pairs"]) == (length - 1, None)
    assert [store.captions(i) for i in range(3, 20)] == [ShapesSource("train", 16)[i].captions for i in range(4, 21)]

    # Cut off between batches, as by a kill.
    monkeypatch.setattr(extract_module, "open_given", lambda *_, **__: Numbered(10))
    flags["num_workers"] = num_workers
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StoreWriter, "end_stream", interrupt)
        extract(ExtractConfig(**flags, shard="0/2"))
    monkeypatch.setattr(extract_module, "open_given", lambda *_, **__: Numbered(length))
    extract(ExtractConfig(**flags, shard="1/2"))
    extract(ExtractConfig(**flags, shard="0/2"))
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")
    run(flags)
    assert "is complete: " in capsys.readouterr().out


def interrupt(*arguments: object) -> None:
    raise KeyboardInterrupt


# Real images


def test_real_images(coco_folder: Path, image_tar: Path, flags: dict[str, Any], tmp_path: Path) -> None:
    coco = run(flags | {"source": (str(coco_folder),), "batch_size": 3, "shard_size": 4})
    assert (coco.num_samples, coco.manifest["num_captions"]) == (8, 16)
    assert coco.captions(3)[0] == "a close-up of a ginger cat with green eyes"
    tar = run(flags | {"source": (str(image_tar),), "output_dir": str(tmp_path / "tar")})
    assert [tar.captions(i) for i in range(8)] == [coco.captions(i) for i in range(8)]


# What is wrong


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"resolution": 18}, "--resolution 18: must be a multiple of 4"),
        ({"model_max_length": 17}, "--model_max_length 17: the text encoder supports 16 at most"),
        ({"model_max_length": 2}, "--model_max_length 2: must be in 3.."),
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


def test_a_tokenizer_of_another_text_encoder(flags: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = encoders.load_tokenizer(flags["text_encoder_name_or_path"])
    size = encoders.load_transformers_encoder(flags["text_encoder_name_or_path"]).get_input_embeddings().num_embeddings
    tokenizer.add_tokens([f"word{i}" for i in range(size - encoders.highest_token_id(tokenizer))])
    tokenizer.save_pretrained(tmp_path / "larger")
    flags |= {"tokenizer_name": str(tmp_path / "larger")}
    for text in ("contexts", "tokens", "both"):
        with pytest.raises(
            UserError, match=rf"token ids 0 to {size - 1}, but --tokenizer_name .*larger has ids up to {size}"
        ):
            run(flags | {"text": text})
    assert not Path(flags["output_dir"]).exists()


def test_a_vae_of_other_channels(flags: dict[str, Any], tmp_path: Path) -> None:
    AutoencoderKL(in_channels=1, out_channels=1, block_out_channels=(32,)).save_pretrained(tmp_path / "grey")
    with pytest.raises(UserError, match=r"--vae_name_or_path .*grey: encodes images of 1 channels, but they have 3"):
        run(flags | {"vae_name_or_path": str(tmp_path / "grey")})


def test_text_embeddings_that_float16_cannot_hold_are_seen_first(flags: dict[str, Any], tmp_path: Path) -> None:
    text_encoder = encoders.load_transformers_encoder(flags["text_encoder_name_or_path"])
    dict(text_encoder.named_parameters())["final_layer_norm.bias"].data[0] = 1e5
    text_encoder.save_pretrained(tmp_path / "loud")
    flags |= {"tokenizer_name": flags["text_encoder_name_or_path"], "text_encoder_name_or_path": str(tmp_path / "loud")}
    with pytest.raises(UserError, match=r"embeddings of the empty caption are NaN or infinite; give --dtype float32"):
        run(flags)
    assert not list(Path(flags["output_dir"]).rglob("moments*"))


def test_what_float16_cannot_hold(flags: dict[str, Any], tmp_path: Path) -> None:
    vae = encoders.load_diffusers_vae(flags["vae_name_or_path"])
    vae.quant_conv.bias[0] = 1e5
    vae.save_pretrained(tmp_path / "loud")
    with pytest.raises(UserError, match=r"moments are NaN or infinite.*give --dtype float32"):
        run(flags | {"vae_name_or_path": str(tmp_path / "loud")})


class Alone(ShapesSource):
    """Its 20th picture is too much for the process that reads it."""

    def __getitem__(self, index: int) -> Pair:
        if index == 20:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def test_a_worker_that_the_system_kills(flags: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    flags |= {"source": ("shapes",), "num_workers": 1, "text": "contexts", "shard_size": 1000}
    with monkeypatch.context() as patch:
        patch.setattr(extract_module, "open_given", lambda *_, **__: Alone("train", 16))
        with pytest.raises(UserError, match=r"--num_workers 1: a worker process was killed"):
            run(flags)
    assert run(flags).num_samples == 648


def test_a_disk_that_is_too_small(flags: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 5000, 5000))
    with pytest.raises(UserError, match=r"needs \d+\.\d KiB, but its disk has 4\.9 KiB free"):
        run(flags)
    assert not list((tmp_path / "store" / "train").glob(".partial*"))


def test_a_disk_that_fills_up(flags: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(flags | {"output_dir": str(tmp_path / "whole")})
    full = OSError(errno.ENOSPC, "No space left on device")

    def write_all(file: io.FileIO, data: np.ndarray) -> None:
        if "contexts-00001" in str(file.name):
            file.write(data.data[:7])
            raise full
        file.write(data.data)

    with monkeypatch.context() as patch, pytest.raises(UserError, match="its disk is full; free some space"):
        patch.setattr(shard, "_write_all", write_all)
        run(flags)
    run(flags)
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")


def test_a_second_process_at_the_same_shard(flags: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="started with other settings"):
        extract(ExtractConfig(**flags, shard="1/2"))
        extract(ExtractConfig(**flags | {"on_error": "stop"}, shard="1/2"))
    partial = tmp_path / "store" / "train" / ".partial-00000"
    partial.mkdir()
    with (partial / "lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is writing shard 0"):
            run(flags)
    assert run(flags).num_samples == 9


def test_an_earlier_store_is_not_written_into(flags: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="of version 1"):
        run(flags)


@pytest.mark.parametrize("kind", ["texts", "list", "tar"])
def test_a_source_that_has_changed_is_refused(kind: str, flags: dict[str, Any], pairs: Path, tmp_path: Path) -> None:
    """Before and after the end: as many images with other names, or with other captions."""

    def write(names: str, captions: str) -> None:
        shutil.rmtree(tmp_path / "changing", ignore_errors=True)
        folder = tmp_path / "changing"
        folder.mkdir()
        for number, name in enumerate(names):
            shutil.copy(pairs / f"{number}.png", folder / f"{name}.png")
            (folder / f"{name}.txt").write_text(captions)
        if kind == "list":
            rows = [{"file_name": f"{name}.png", "text": captions} for name in names]
            (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if kind == "tar":
            with tarfile.open(tmp_path / "changing.tar", "w") as tar:
                for path in sorted(folder.iterdir()):
                    tar.add(path, path.name)

    source = tmp_path / ("changing.tar" if kind == "tar" else "changing")
    flags = flags | {"source": (str(source),), "shard_size": 2}
    write("abcd", "one")
    extract(ExtractConfig(**flags, shard="0/2"))
    for _ in range(2):
        for names, captions in (("0abc", "one"), ("abcd", "three")):
            write(names, captions)
            with pytest.raises(UserError, match="the source has changed since it was started"):
                run(flags)
        write("abcd", "one")
        assert run(flags).ids(0).startswith("a")
