"""How large an index is, and how long it takes to make: lists, tables and COCO captions, each in a process of its own.

    python benchmarks/indexes.py [--captions 10_000_000] [--kinds jsonl csv parquet coco coco.gz]

Five captions describe each image; in `jsonl`, each image has one. The captions have 52 letters on average, and
those of COCO are in random order. Only the first image exists: opening a source looks for no more. Peak is the most
memory that the process ever had, with the libraries that it loads, which `before` shows alone."""

import argparse
import csv
import gzip
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from uvit.sources.open import open_source

KINDS = ("jsonl", "csv", "parquet", "coco", "coco.gz")
WORDS = ("man", "riding", "horse", "on", "the", "sandy", "beach", "with", "umbrella", "near", "table", "dogs")


def captions(number: int) -> Iterator[str]:
    words = random.Random(0)
    return (" ".join(words.choices(WORDS, k=10)) for _ in range(number))


def name(image: int) -> str:
    return f"COCO_train2014_{image:012d}.jpg"


def write(kind: str, folder: Path, number: int) -> Path:
    path = folder / {"coco": "captions.json", "coco.gz": "captions.json.gz"}.get(kind, f"list.{kind}")
    if kind == "jsonl":
        with path.open("w", encoding="utf-8") as file:
            for row, caption in enumerate(captions(number)):
                file.write(json.dumps({"file_name": name(row), "text": caption}) + "\n")
    elif kind == "csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["image", "caption"])
            rows.writerows((name(row // 5), caption) for row, caption in enumerate(captions(number)))
    elif kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        schema = pyarrow.schema({"image": pyarrow.string(), "caption": pyarrow.string()})
        texts = captions(number)
        with pyarrow.parquet.ParquetWriter(path, schema) as writer:
            for first in range(0, number, 100_000):
                rows = range(first, min(first + 100_000, number))
                columns = {"image": [name(row // 5) for row in rows], "caption": [next(texts) for _ in rows]}
                writer.write_table(pyarrow.table(columns, schema))
    else:
        ids = list(range(number))
        random.Random(1).shuffle(ids)
        with gzip.open(path, "wt", compresslevel=1) if kind == "coco.gz" else path.open("w") as file:
            images = ({"file_name": name(i), "height": 480, "width": 640, "id": i} for i in range(-(-number // 5)))
            file.write('{"info": {}, "images": [' + json.dumps(next(images)))
            for image in images:
                file.write(", " + json.dumps(image))
            file.write('], "annotations": [')
            for row, (id, caption) in enumerate(zip(ids, captions(number), strict=True)):
                entry = {"image_id": id // 5, "id": id, "caption": caption}
                file.write((", " if row else "") + json.dumps(entry))
            file.write("]}")
    return path


def peak() -> float:
    """MiB that this process has ever had in memory at once."""
    status = Path("/proc/self/status").read_text()  # getrusage knows of what the parent had, too
    return int(status.split("VmHWM:")[1].split()[0]) / 2**10


def measure(path: Path) -> None:
    before, started = peak(), time.process_time()
    source = open_source([str(path)], image_folder=[str(path.parent)])
    seconds = time.process_time() - started
    print(json.dumps([len(source), seconds, before, peak()]))  # type: ignore[arg-type]


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        measure(Path(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=int, default=1_000_000)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    options = parser.parse_args()
    print("| file | captions | pairs | MB | CPU seconds | before, MiB | peak, MiB |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for kind in options.kinds:
        with tempfile.TemporaryDirectory() as folder:
            path = write(kind, Path(folder), options.captions)
            Image.new("RGB", (8, 8)).save(Path(folder) / name(0))
            command = [sys.executable, __file__, "--measure", str(path)]
            result = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            pairs, seconds, before, most = json.loads(result)
            size = path.stat().st_size / 1e6
        cells = f"{pairs:,} | {size:,.0f} | {seconds:.1f} | {before:,.0f} | {most:,.0f}"
        print(f"| {kind} | {options.captions:,} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
