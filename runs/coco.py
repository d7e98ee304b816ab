"""The parts of runs/coco.sh that are no command of uvit: downloads, unpacking, a few held-out images, the batch.

python runs/coco.py download DATA              the zip files of MS-COCO 2014, from where they stopped
python runs/coco.py unpack DATA [--official]   check and unpack them; --official: compare with the known SHA-256
python runs/coco.py heldout DATA NUM           NUM images of val2014 as the split `heldout`, to validate on
python runs/coco.py batch TOTAL FLAGS...       flags of `uvit train` for TOTAL samples a step that fit into memory
python runs/coco.py curve RUN                  the validation losses of a run
python runs/coco.py tiny FOLDER DATA           small zip files of a folder of COCO captions, and tiny encoders
"""

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

# Bytes and SHA-256 of the official files, as TensorFlow Datasets recorded them (url_checksums/coco.txt).
URL = "http://images.cocodataset.org"
OFFICIAL = {
    "train2014.zip": (
        f"{URL}/zips/train2014.zip",
        13_510_573_713,
        "ede4087e640bddba550e090eae701092534b554b42b05ac33f0300b984b31775",
    ),
    "val2014.zip": (
        f"{URL}/zips/val2014.zip",
        6_645_013_297,
        "fe9be816052049c34717e077d9e34aa60814a55679f804cd043e3cbee3b9fde0",
    ),
    "annotations_trainval2014.zip": (
        f"{URL}/annotations/annotations_trainval2014.zip",
        252_872_794,
        "031296bbc80c45a1d1f76bf9a90ead27e94e99ec629208449507a4917a3bf009",
    ),
}
CHUNK = 2**24
UNPACKED = "unpacked.json"  # in DATA: which zip files are checked and unpacked

# Downloads


def download(data: Path) -> None:
    data.mkdir(parents=True, exist_ok=True)
    missing = [name for name in OFFICIAL if not (data / name).exists()]
    needed = sum(2 * OFFICIAL[name][1] for name in missing)  # zipped and unpacked
    if missing and shutil.disk_usage(data).free < needed:
        raise SystemExit(
            f"{data}: {', '.join(missing)} need {needed / 1e9:.0f} GB, zipped and unpacked; free some space"
        )
    for name in missing:
        url, size, _ = OFFICIAL[name]
        part = data / f"{name}.part"
        if not part.exists() or part.stat().st_size != size:
            print(f"{name}: {size / 1e9:.1f} GB from {url}", flush=True)
            done = subprocess.run(["curl", "--fail", "--location", "--retry", "5", "-C", "-", "-o", str(part), url])
            if done.returncode:
                raise SystemExit(f"{url}: the download stopped (curl: {done.returncode}); run the same command again")
        part.rename(data / name)


def unpack(data: Path, official: bool) -> None:
    """Check the zip files and unpack them. Files that are there are not written again."""
    record = data / UNPACKED
    done: dict[str, Any] = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    for name, (_, size, sha256) in OFFICIAL.items():
        path = data / name
        if name in done and (not path.exists() or path.stat().st_size == done[name]["bytes"]):
            print(f"{name}: unpacked already, SHA-256 {done[name]['sha256'][:8]}")
            continue
        if not path.exists():
            raise SystemExit(f"{path}: is missing")
        if official and path.stat().st_size != size:
            raise SystemExit(f"{path}: has {path.stat().st_size:,} bytes, and not {size:,}; delete it and run again")
        found = file_sha256(path)
        if official and found != sha256:
            raise SystemExit(f"{path}: its SHA-256 is {found}, and not {sha256}; delete it and run again")
        num_files = unzip(path, data)
        done[name] = {"bytes": path.stat().st_size, "sha256": found, "files": num_files}
        write_whole(record, json.dumps(done, indent=2) + "\n")
        known = "as it must be" if official else "recorded"
        print(f"{name}: {num_files:,} files, SHA-256 {found[:8]}, {known}", flush=True)


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def unzip(path: Path, folder: Path) -> int:
    """Unpack a zip file; its CRC of each file is compared. -> the number of files."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = [member for member in archive.infolist() if not member.is_dir()]
            for member in members:
                target = folder / member.filename
                if not target.resolve().is_relative_to(folder.resolve()):
                    raise SystemExit(f"{path}: holds {member.filename}, which is not in its folder")
                if target.exists() and target.stat().st_size == member.file_size:
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                part = target.with_name(f"{target.name}.part")
                with archive.open(member) as packed, part.open("wb") as file:
                    shutil.copyfileobj(packed, file, CHUNK)
                part.rename(target)
    except zipfile.BadZipFile as error:
        raise SystemExit(f"{path}: is damaged ({error}); delete it and run again") from None
    return len(members)


def write_whole(path: Path, text: str) -> None:
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.rename(path)


# Held-out images


def heldout(data: Path, num_images: int) -> None:
    """The first images of val2014, by the SHA-256 of their ids, as a split of its own beside the official ones."""
    goal = data / "annotations" / "captions_heldout2014.json"
    if not (link := data / "heldout2014").is_symlink():
        link.symlink_to("val2014")
    content = json.loads((data / "annotations" / "captions_val2014.json").read_text(encoding="utf-8"))

    def order(image: dict[str, Any]) -> str:
        return hashlib.sha256(f"heldout {image['id']}".encode()).hexdigest()

    images = sorted(content["images"], key=order)[:num_images]
    ids = {image["id"] for image in images}
    notes = [note for note in content["annotations"] if note["image_id"] in ids]
    text = json.dumps({"images": images, "annotations": notes})
    if not goal.exists() or goal.read_text(encoding="utf-8") != text:
        write_whole(goal, text)
    print(f"{goal}: {len(images):,} images, {len(notes):,} captions")


# The batch


def batch(total: int, flags: list[str]) -> None:
    """Print flags for the largest part of `total` samples that each process can take at a time, by the plan."""
    from uvit.cli.parse import parse
    from uvit.config.train import TrainConfig
    from uvit.train.dry_run import ALLOCATOR_OVERHEAD, DRIVER_BYTES, build_meta_run, fitting_config, plan_of_run

    first, _ = parse(TrainConfig, flags, prog="uvit train")
    num_data_ranks = first.dp_degree * first.sharding_parallel_degree
    if total % num_data_ranks:
        raise SystemExit(f"{total} samples a step: cannot be divided among {num_data_ranks} processes")
    share, (limit, where) = total // num_data_ranks, memory_limit(first.device, num_data_ranks)
    whole = ["--per_device_train_batch_size", str(share), "--gradient_accumulation_steps", "1"]
    chosen: TrainConfig | None = parse(TrainConfig, [*flags, *whole], prog="uvit train")[0]
    assert chosen is not None
    needed = sum(plan_of_run(build_meta_run(chosen)).memory.values())
    if needed * ALLOCATOR_OVERHEAD + DRIVER_BYTES > limit:
        chosen = fitting_config(chosen, limit)
    if chosen is None:
        raise SystemExit(f"{first.uvit_config_file}: not even one sample fits into {limit / 2**30:,.1f} GiB {where}")
    size, steps = chosen.per_device_train_batch_size, chosen.gradient_accumulation_steps
    print(f"{size} samples at a time fit into {limit / 2**30:,.1f} GiB {where}", file=sys.stderr)
    recompute = " --recompute" if chosen.recompute else ""
    print(f"--per_device_train_batch_size {size} --gradient_accumulation_steps {steps}{recompute}")


def memory_limit(device: str, num_processes: int) -> tuple[int, str]:
    """-> (bytes that a process may take, of what): a tenth stays free."""
    import torch

    from uvit.device import pick_device

    if pick_device(device).type == "cuda":
        sizes = [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]
        return int(0.9 * min(sizes)), "of a GPU"
    available = re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text(encoding="utf-8"))
    if available is None:
        raise SystemExit("the free memory of this machine is not known; give --per_device_train_batch_size yourself")
    return int(0.9 * int(available[1]) * 1024 / num_processes), "of this machine"


# The validation curve


def curve(run: Path) -> None:
    lines = map(json.loads, (run / "logs" / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    print("| step | validation loss, EMA weights | raw weights |\n|---:|---:|---:|")
    for line in lines:
        if line.get("val_loss") is not None:
            raw = line.get("val_loss_raw")
            print(f"| {line['step']:,} | {line['val_loss']:.4f} | {'' if raw is None else f'{raw:.4f}'} |")


# The tiny run


def tiny(folder: Path, data: Path) -> None:
    """The official layout of any COCO captions: every second image is of val2014. And encoders with random weights."""
    captions = sorted(folder.glob("annotations/captions_*.json"))
    if len(captions) != 1:
        raise SystemExit(f"{folder}: needs one annotations/captions_*.json, and has {len(captions)}")
    content = json.loads(captions[0].read_text(encoding="utf-8"))
    files = {path.name: path for path in folder.rglob("*") if path.is_file()}
    data.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(data / "annotations_trainval2014.zip", "w") as annotations:
        for number, split in enumerate(("train2014", "val2014")):
            images = content["images"][number::2]
            ids = {image["id"] for image in images}
            notes = [note for note in content["annotations"] if note["image_id"] in ids]
            notes = [{"id": i} | note for i, note in enumerate(notes)]
            text = json.dumps({"images": images, "annotations": notes})
            annotations.writestr(f"annotations/captions_{split}.json", text)
            with zipfile.ZipFile(data / f"{split}.zip", "w") as archive:
                for image in images:
                    archive.write(files[image["file_name"]], f"{split}/{image['file_name']}")
    tiny_encoders(data / "models", [note["caption"] for note in content["annotations"]])


def tiny_encoders(folder: Path, captions: list[str]) -> None:
    """vae/, clip/ and unet.json in `folder`: the classes of the real ones, very small and with random weights."""
    import torch
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel
    from transformers.utils import logging

    from uvit.extract.tokenizer import train_tokenizer

    logging.disable_progress_bar()

    torch.manual_seed(0)
    levels: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (8, 8, 8, 8),
    }
    AutoencoderKL(**levels, latent_channels=4, norm_num_groups=4, sample_size=64).save_pretrained(folder / "vae")
    tokenizer = train_tokenizer(captions, 400, 16)
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPTextConfig(vocab_size=len(tokenizer), max_position_embeddings=16, **sizes, **special)
    CLIPTextModel(config).save_pretrained(folder / "clip")
    tokenizer.save_pretrained(folder / "clip")
    unet = {"sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 2, "num_attention_heads": 2}
    unet |= {"attention_head_dim": 16, "clip_dim": 32, "num_text_tokens": 16}
    write_whole(folder / "unet.json", json.dumps(unet) + "\n")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    for name in ("download", "unpack", "heldout"):
        parts.add_parser(name).add_argument("data", type=Path)
    parts.choices["unpack"].add_argument("--official", action="store_true")
    parts.choices["heldout"].add_argument("num_images", type=int)
    parts.add_parser("batch").add_argument("total", type=int)
    parts.add_parser("curve").add_argument("run", type=Path)
    small = parts.add_parser("tiny")
    small.add_argument("folder", type=Path)
    small.add_argument("data", type=Path)
    options, flags = parser.parse_known_args(arguments)  # `batch` passes its flags on
    if flags and options.part != "batch":
        parser.error(f"unknown flags: {' '.join(flags)}")
    values = {name: value for name, value in vars(options).items() if name != "part"}
    if options.part == "batch":
        values["flags"] = flags
    globals()[options.part](**values)


if __name__ == "__main__":
    main()
