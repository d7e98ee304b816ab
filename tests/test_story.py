"""Real images in several layouts: the features are the same in all of them."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.real_images import EXAMPLES, LAYOUTS, example_pairs
from tests.tiny import tiny_text_encoder_folder, tiny_vae_folder
from uvit.cli.main import main
from uvit.store.reader import FeatureStore


def test_the_same_features_from_every_layout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vae, text = tiny_vae_folder(tmp_path / "vae"), tiny_text_encoder_folder(tmp_path / "text")
    flags = ["--vae_name_or_path", str(vae), "--text_encoder_name_or_path", str(text), "--text", "both"]
    flags += ["--resolution", "32", "--model_max_length", "16", "--num_workers", "0", "--disable_tqdm"]
    pairs = example_pairs()
    sources = [[str(EXAMPLES)], *(write(tmp_path / write.__name__, pairs) for write in LAYOUTS)]
    moments, contexts, tokens = [], [], []
    for number, source in enumerate(sources):
        store = tmp_path / f"features{number}"
        assert main(["extract", "--source", *source, *flags, "--output_dir", str(store)]) == 0
        features = FeatureStore(store / "train")
        rows, first = np.arange(len(pairs)), np.zeros(len(pairs))
        batch = features.read(rows, first)
        assert batch.context is not None
        assert batch.token_ids is not None
        moments.append(batch.moments)
        contexts.append(batch.context)
        tokens.append(batch.token_ids)
        assert [features.captions(i) for i in range(len(pairs))] == [tuple(captions) for _, _, captions in pairs]
    for other in range(1, len(sources)):
        np.testing.assert_array_equal(moments[0], moments[other])
        np.testing.assert_array_equal(contexts[0], contexts[other])
        np.testing.assert_array_equal(tokens[0], tokens[other])
    assert np.unique(moments[0].reshape(len(pairs), -1), axis=0).shape[0] == len(pairs)
    capsys.readouterr()


def test_the_example_images_are_small_and_their_licences_are_stated() -> None:
    readme = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in (EXAMPLES / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {path.name for path in EXAMPLES.iterdir()} == {row["file_name"] for row in rows} | {
        "README.md",
        "metadata.jsonl",
    }
    for row in rows:
        [line] = [line for line in readme.splitlines() if f"`{row['file_name']}`" in line]
        assert row["author"] in line and f"| {row['licence']} |" in line and row["source"] in line
        assert row["licence"] in ("CC0-1.0", "public domain")
        with Image.open(EXAMPLES / row["file_name"]) as image:
            assert max(image.size) <= 256
    assert sum(path.stat().st_size for path in EXAMPLES.iterdir()) < 300_000
