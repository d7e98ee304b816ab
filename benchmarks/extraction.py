"""`uvit extract` against a plain loop over batches, in turns: images per second, CPU time and memory.

    python benchmarks/extraction.py                                   # 64, 128 and 256 pixels, VAE preset `shapes`
    python benchmarks/extraction.py --vae sd --resolutions 64 256     # a VAE as large as Stable Diffusion's
    python benchmarks/extraction.py --cores 2

The plain loop is what one would write: Pillow opens, crops and scales each image, the VAE encodes a batch, the captions
become token ids, and `np.save` writes the moments in the end. It is measured at each of --batch_sizes, and the one
with the best median counts. `uvit extract` has its defaults, and stores token ids.

Both read the same folder of JPEGs, whose sides are 3/2 and 5/4 of the resolution, with a caption in a .txt each. Each
measurement is a new process: it extracts a few images and then all of them. The difference between the two counts, so
that start-up does not. CPU time includes that of worker processes; the peak of memory is of the main process.
"""

import argparse
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from uvit.extract.encode import PIXELS_AT_ONCE

SD_CONFIG = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": 4,
    "sample_size": 512,
}
PARTS = {"shapes": 128, "sd": 8}  # for each core, of PIXELS_AT_ONCE pixels: some ten seconds
WORDS = "a red blue green small large photo of the cat dog house tree on under near street table"


def prepare(folder: Path, vae: str, resolutions: list[int], cores: int) -> None:
    """Write the images, the tokenizer and the VAE."""
    import numpy as np
    import torch
    from diffusers import AutoencoderKL
    from PIL import Image

    from uvit.extract.tokenizer import save_tokenizer, train_tokenizer

    random = np.random.default_rng(0)
    words = WORDS.split()
    captions = [" ".join(random.choice(words, 12)) for _ in range(64)]
    save_tokenizer(train_tokenizer(captions, 400), folder / "tokenizer")
    for resolution in resolutions:
        for kind in ("first", "all"):
            place = folder / f"{resolution}-{kind}"
            place.mkdir()
            for i in range(num_images(kind, vae, resolution, cores)):
                blocks = random.integers(0, 256, (10, 12, 3), dtype=np.uint8)
                size = resolution * 3 // 2, resolution * 5 // 4
                Image.fromarray(blocks).resize(size, Image.Resampling.BICUBIC).save(place / f"{i:05d}.jpg", quality=90)
                (place / f"{i:05d}.txt").write_text(captions[i % len(captions)], encoding="utf-8")
    if vae == "sd":
        torch.manual_seed(0)
        AutoencoderKL(**SD_CONFIG).save_pretrained(folder / "vae")  # type: ignore[arg-type]


def num_images(kind: str, vae: str, resolution: int, cores: int) -> int:
    """Of the images that are extracted `first`, one part for each core: else the rest would seem too fast."""
    parts = cores * (PARTS[vae] if kind == "all" else 1)
    return parts * max(1, PIXELS_AT_ONCE // resolution**2)


def uvit_extract(folder: Path, images: Path, vae: str, resolution: int, batch_size: int) -> None:
    from uvit.config.extract import ExtractConfig
    from uvit.extract.extract import extract

    with tempfile.TemporaryDirectory(dir=folder) as output, contextlib.redirect_stdout(sys.stderr):
        config = ExtractConfig(
            source=(str(images),),
            output_dir=output,
            vae_name_or_path=vae,
            tokenizer_name=str(folder / "tokenizer"),
            text="tokens",
            resolution=resolution,
            disable_tqdm=True,
        )
        extract(config)


def plain_loop(folder: Path, images: Path, vae_folder: str, resolution: int, batch_size: int) -> None:
    import numpy as np
    import torch
    from diffusers import AutoencoderKL
    from PIL import Image
    from transformers import AutoTokenizer

    vae = AutoencoderKL.from_pretrained(vae_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    paths = sorted(images.glob("*.jpg"))
    moments, token_ids = [], []
    for start in range(0, len(paths), batch_size):
        batch, captions = [], []
        for path in paths[start : start + batch_size]:
            image = Image.open(path).convert("RGB")
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            image = image.crop((left, top, left + side, top + side)).resize((resolution, resolution), Image.LANCZOS)
            batch.append(torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1)
            captions.append(path.with_suffix(".txt").read_text(encoding="utf-8"))
        with torch.no_grad():
            moments.append(vae.encode(torch.stack(batch)).latent_dist.parameters.half().numpy())
        ids = tokenizer(captions, padding="max_length", truncation=True, max_length=77, return_tensors="np")
        token_ids.append(ids["input_ids"])
    with tempfile.TemporaryDirectory(dir=folder) as output:
        np.save(f"{output}/moments.npy", np.concatenate(moments))
        np.save(f"{output}/token_ids.npy", np.concatenate(token_ids))


def measure(side: str, folder: Path, vae: str, resolution: int, batch_size: int, cores: int) -> dict[str, float]:
    """In this process: wall and CPU milliseconds an image, and the peak of memory in MiB."""
    import torch

    import uvit

    torch.set_num_threads(cores)
    run: Callable[..., None] = plain_loop if side == "plain" else uvit_extract
    preset = str(Path(uvit.__file__).parent / "presets" / "vae" / "shapes")
    place = str(folder / "vae") if vae == "sd" else preset
    spent = []
    for kind in ("first", "first", "all"):  # the very first time imports what is needed
        wall, cpu = time.perf_counter(), cpu_seconds()
        run(folder, folder / f"{resolution}-{kind}", place, resolution, batch_size)
        spent.append((time.perf_counter() - wall, cpu_seconds() - cpu))
    count = num_images("all", vae, resolution, cores) - num_images("first", vae, resolution, cores)
    wall, cpu = (1000 * (last - first) / count for first, last in zip(spent[1], spent[2], strict=True))
    return {"wall": wall, "cpu": cpu, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def cpu_seconds() -> float:
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def measure_alone(options: argparse.Namespace, folder: str, side: str, resolution: int, batch: int) -> dict[str, float]:
    """In a process of its own, on --cores cores."""
    words = [sys.executable, __file__, "--alone", side, "--folder", folder, "--vae", options.vae]
    words += ["--resolutions", str(resolution), "--batch_sizes", str(batch), "--cores", str(options.cores)]
    environment = os.environ | {"OMP_NUM_THREADS": str(options.cores), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(words, env=environment, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return json.loads(done.stdout.splitlines()[-1])


def compare(options: argparse.Namespace, folder: str, resolution: int) -> None:
    count = num_images("all", options.vae, resolution, options.cores)
    sides = [("plain", batch) for batch in options.batch_sizes if batch <= count]
    found: dict[tuple[str, int], list[dict[str, float]]] = {side: [] for side in [*sides, ("uvit", 0)]}
    for _ in range(options.rounds):
        for side, batch in found:
            found[side, batch].append(measure_alone(options, folder, side, resolution, batch))
    # With one core, CPU time is what counts: other programs do not change it. With more, the time that passes counts.
    key = "cpu" if options.cores == 1 else "wall"

    def median(side: tuple[str, int], key: str) -> float:
        return statistics.median(each[key] for each in found[side])

    best = min(sides, key=lambda side: median(side, key))
    ratio = statistics.median(a[key] / b[key] for a, b in zip(found[best], found["uvit", 0], strict=True))
    for side in (best, ("uvit", 0)):
        name = f"plain loop, batch {side[1]}" if side[1] else "`uvit extract`"
        cells = [f"{1000 / median(side, each):.2f}" for each in ("cpu", "wall")]
        cells += [f"{median(side, 'peak'):,.0f}", f"{1.0 if side == best else ratio:.2f}"]
        print(f"| {options.vae} | {resolution} | {options.cores} | {name} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", choices=["shapes", "sd"], default="shapes")
    parser.add_argument("--resolutions", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 4, 16, 64], help="of the plain loop")
    parser.add_argument("--cores", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--alone", choices=["plain", "uvit"], help="measure this process, and print JSON")
    options = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
    if options.alone:
        given: Any = (options.alone, Path(options.folder), options.vae, options.resolutions[0], options.batch_sizes[0])
        print(json.dumps(measure(*given, options.cores)))
        return
    print("| VAE | pixels | cores | | images a CPU second | images a second | peak, MiB | ratio |")
    print("|---|---:|---:|---|---:|---:|---:|---:|", flush=True)
    with tempfile.TemporaryDirectory(prefix="extraction-") as folder:
        prepare(Path(folder), options.vae, options.resolutions, options.cores)
        for resolution in options.resolutions:
            compare(options, folder, resolution)


if __name__ == "__main__":
    main()
