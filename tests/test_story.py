"""Real pictures by several routes: whichever way they come in, the features are the same."""

import csv
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.real_images import SHARED
from tests.tiny import tiny_text_encoder_folder, tiny_vae_folder
from uvit.cli.main import main
from uvit.store.reader import FeatureStore

Pairs = list[tuple[str, bytes, list[str]]]  # file name, the image file's bytes, captions


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("encoders")
    vae, text = tiny_vae_folder(folder / "vae"), tiny_text_encoder_folder(folder / "text")
    return ["--vae_name_or_path", str(vae), "--text_encoder_name_or_path", str(text), "--text", "both"]


def coco_pairs() -> Pairs:
    root = SHARED / "coco_mini"
    content = json.loads((root / "annotations" / "captions_mini2017.json").read_bytes())
    captions: dict[int, list[str]] = {}
    for annotation in content["annotations"]:
        captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
    return [
        (image["file_name"], (root / "images" / image["file_name"]).read_bytes(), captions[image["id"]])
        for image in content["images"]
    ]


def emoji_pairs(number: int = 80) -> Pairs:
    pairs: Pairs = []
    with tarfile.open(SHARED / "emoji_noto_64.tar") as tar:
        members = {member.name: member for member in tar}
        for name in list(members)[: 2 * number]:
            if name.endswith(".png"):
                image, caption = tar.extractfile(name), tar.extractfile(name.replace(".png", ".json"))
                assert image is not None
                assert caption is not None
                pairs.append((name, image.read(), [json.loads(caption.read())["caption"]]))
    return pairs


def write_images(folder: Path, pairs: Pairs) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data, _ in pairs:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def imagefolder(folder: Path, pairs: Pairs) -> list[str]:
    write_images(folder, pairs)
    lines = [json.dumps({"file_name": name, "captions": captions}) + "\n" for name, _, captions in pairs]
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    return [str(folder)]


def table(folder: Path, pairs: Pairs) -> list[str]:
    write_images(folder / "images", pairs)
    with (folder / "pairs.csv").open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image_path", "caption"])
        rows.writerows((name, caption) for name, _, captions in pairs for caption in captions)
    return [str(folder / "pairs.csv"), "--image_folder", str(folder / "images")]


def coco(folder: Path, pairs: Pairs) -> list[str]:
    write_images(folder / "images", pairs)
    images = [{"id": i, "file_name": name} for i, (name, _, _) in enumerate(pairs)]
    notes = [{"image_id": i, "caption": caption} for i, pair in enumerate(pairs) for caption in pair[2]]
    (folder / "captions.json").write_text(json.dumps({"images": images, "annotations": notes}), encoding="utf-8")
    return [str(folder / "captions.json"), "--image_folder", str(folder / "images")]


def tars(folder: Path, pairs: Pairs) -> list[str]:
    folder.mkdir(parents=True)
    for shard, first in enumerate(range(0, len(pairs), 30)):
        with tarfile.open(folder / f"{shard:03d}.tar", "w") as tar:
            for i, (name, data, captions) in enumerate(pairs[first : first + 30]):
                texts = json.dumps({"captions": captions}).encode()
                for suffix, content in ((name.rpartition(".")[2], data), ("json", texts)):
                    info = tarfile.TarInfo(f"{i:05d}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return [str(folder / f"{{000..{shard:03d}}}.tar")]


def parquet(folder: Path, pairs: Pairs) -> list[str]:
    import pyarrow
    import pyarrow.parquet

    folder.mkdir(parents=True)
    columns = {
        "image": [{"bytes": data, "path": name} for name, data, _ in pairs],
        "captions": [captions for _, _, captions in pairs],
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "train.parquet", row_group_size=16)
    return [str(folder / "train.parquet")]


ROUTES: list[Callable[[Path, Pairs], list[str]]] = [imagefolder, table, coco, tars, parquet]


@pytest.mark.parametrize("pairs_of", [coco_pairs, emoji_pairs])
def test_the_same_features_by_every_route(
    pairs_of: Callable[[], Pairs], encoders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not SHARED.is_dir():
        pytest.skip("the real pictures are not beside the repository")
    pairs = pairs_of()
    moments, contexts, tokens = [], [], []
    for route in ROUTES:
        source = route(tmp_path / route.__name__, pairs)
        words = ["--resolution", "32", "--model_max_length", "16", "--num_workers", "0", "--disable_tqdm"]
        store = tmp_path / f"{route.__name__}_features"
        assert main(["extract", "--source", *source, *encoders, *words, "--output_dir", str(store)]) == 0
        features = FeatureStore(store / "train")
        rows, first = np.arange(len(pairs)), np.zeros(len(pairs))
        batch = features.read(rows, first)
        assert batch.context is not None
        assert batch.token_ids is not None
        moments.append(batch.moments)
        contexts.append(batch.context)
        tokens.append(batch.token_ids)
        assert [features.captions(i) for i in range(len(pairs))] == [
            tuple(caption.strip() for caption in pair[2]) for pair in pairs
        ]
    for other in range(1, len(ROUTES)):
        np.testing.assert_array_equal(moments[0], moments[other])
        np.testing.assert_array_equal(contexts[0], contexts[other])
        np.testing.assert_array_equal(tokens[0], tokens[other])
    capsys.readouterr()
