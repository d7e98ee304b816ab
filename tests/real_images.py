"""The eight real images of examples/images, and the same pairs as other sources: a tar, a COCO folder, ..."""

import csv
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples" / "images"
Pairs = list[tuple[str, bytes, list[str]]]  # file name, the image file's bytes, captions


def example_pairs() -> Pairs:
    lines = (EXAMPLES / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    return [
        (row["file_name"], (EXAMPLES / row["file_name"]).read_bytes(), row["captions"])
        for row in map(json.loads, lines)
    ]


def write_images(folder: Path, pairs: Pairs) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data, _ in pairs:
        (folder / name).write_bytes(data)


# Each writes the pairs and returns the values of --source.


def write_imagefolder(folder: Path, pairs: Pairs) -> list[str]:
    write_images(folder, pairs)
    lines = [json.dumps({"file_name": name, "captions": captions}) + "\n" for name, _, captions in pairs]
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    return [str(folder)]


def write_table(folder: Path, pairs: Pairs) -> list[str]:
    write_images(folder / "images", pairs)
    with (folder / "pairs.csv").open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image_path", "caption"])
        rows.writerows((name, caption) for name, _, captions in pairs for caption in captions)
    return [str(folder / "pairs.csv"), "--image_folder", str(folder / "images")]


def write_coco(folder: Path, pairs: Pairs) -> list[str]:
    """COCO's own layout: annotations/captions_train2017.json and train2017/."""
    write_images(folder / "train2017", pairs)
    images = [{"id": i, "file_name": name} for i, (name, _, _) in enumerate(pairs)]
    notes = [{"image_id": i, "caption": caption} for i, pair in enumerate(pairs) for caption in pair[2]]
    (folder / "annotations").mkdir()
    content = json.dumps({"images": images, "annotations": notes})
    (folder / "annotations" / "captions_train2017.json").write_text(content, encoding="utf-8")
    return [str(folder)]


def write_tars(folder: Path, pairs: Pairs, pairs_per_tar: int = 3) -> list[str]:
    folder.mkdir(parents=True)
    for shard, first in enumerate(range(0, len(pairs), pairs_per_tar)):
        with tarfile.open(folder / f"{shard:03d}.tar", "w") as tar:
            for name, data, captions in pairs[first : first + pairs_per_tar]:
                key, _, suffix = name.rpartition(".")
                texts = json.dumps({"captions": captions}).encode()
                for ending, content in ((suffix, data), ("json", texts)):
                    info = tarfile.TarInfo(f"{key}.{ending}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return [str(folder / f"{{000..{shard:03d}}}.tar")]


def write_parquet(folder: Path, pairs: Pairs) -> list[str]:
    import pyarrow
    import pyarrow.parquet

    folder.mkdir(parents=True)
    columns = {
        "image": [{"bytes": data, "path": name} for name, data, _ in pairs],
        "captions": [captions for _, _, captions in pairs],
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "train.parquet", row_group_size=3)
    return [str(folder / "train.parquet")]


LAYOUTS: list[Callable[[Path, Pairs], list[str]]] = [
    write_imagefolder,
    write_table,
    write_coco,
    write_tars,
    write_parquet,
]


@pytest.fixture
def coco_folder(tmp_path: Path) -> Path:
    write_coco(tmp_path / "coco", example_pairs())
    return tmp_path / "coco"


@pytest.fixture
def image_tar(tmp_path: Path) -> Path:
    pairs = example_pairs()
    write_tars(tmp_path / "tars", pairs, len(pairs))
    return tmp_path / "tars" / "000.tar"
