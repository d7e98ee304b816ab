"""`uvit features info`: describe a folder of features."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from uvit.config.store import FeaturesInfoConfig
from uvit.conventions import LatentSpace
from uvit.io import format_bytes
from uvit.store.manifest import with_image_settings
from uvit.store.npy_layout import load_npy, num_captions
from uvit.store.splits import Split, find_splits

NPY_LAYOUT = "old layout"  # the name of .npy features in the output of `--json`, kept for its readers
SHORT_SHA = 12  # characters; enough to distinguish encoders


def info(config: FeaturesInfoConfig) -> None:
    """The command. Raises UserError if there are no features."""
    splits = [describe_split(split) for split in find_splits(config.path, config.split)]
    if config.json:
        print(json.dumps({"path": str(Path(config.path).absolute()), "splits": splits}, indent=1))
        return
    for split in splits:
        rows = summary_rows(split)
        width = max(len(name) for name, _ in rows)
        print(f"{split['split']}  ({split['folder']})")
        print("\n".join(f"  {name:<{width}}  {value}" for name, value in rows) + "\n")


def describe_split(split: Split) -> dict[str, Any]:
    """A description of one split for programs (`--json`)."""
    paths = list(split.own_files())
    common = {
        "split": split.name,
        "folder": str(split.folder),
        "layout": NPY_LAYOUT if split.kind == "npy" else split.kind,
        "bytes": sum(path.stat().st_size for path in paths),
        "num_files": len(paths),
    }
    if split.kind == "npy":
        return common | _describe_npy(split)
    keys = "dtype moments_shape images_shape teacher_shape context_shape num_tokens token_dtype"
    keys += " latent_scale latent_shift latent_std latents source vae text_encoder tokenizer teacher"
    common |= {key: split.settings.get(key) for key in keys.split()}
    common["flipped"] = split.settings.get("flipped", False)
    if split.manifest is None:
        num_shards = len(list(split.folder.glob("shard-*.json")))
        return common | {"num_source_pairs": split.settings.get("num_source_pairs"), "num_shards_done": num_shards}
    return common | {
        "version": split.manifest.fields["version"],
        "num_pairs": split.manifest.num_pairs,
        "num_captions": sum(split.manifest.captions),
        "num_truncated_captions": split.manifest.num_truncated,
        "num_shards": len(split.manifest.rows),
        "problems": split.manifest.fields.get("problems", {}),
        "num_left_out": split.manifest.fields.get("num_left_out", 0),
    }


def _describe_npy(split: Split) -> dict[str, Any]:
    counts = num_captions(split.folder)
    moments, context = load_npy(split.folder / "0.npy"), load_npy(split.folder / "0_0.npy")
    return {
        "num_pairs": len(counts),
        "num_captions": int(np.sum(counts)),
        "dtype": moments.dtype.name,
        "moments_shape": list(moments.shape),
        "context_shape": list(context.shape),
        "num_tokens": context.shape[0],
    }


def summary_rows(split: dict[str, Any]) -> list[tuple[str, str]]:
    """The description of one split as lines of text: (name, value)."""
    rows = [("layout", _layout(split))]
    if split["layout"] == "unfinished":
        rows.append(("shards", f"{split['num_shards_done']:,} complete; run the same command again to resume"))
        rows += [("source pairs", f"{split['num_source_pairs']:,}")] if split["num_source_pairs"] else []
    else:
        pairs, captions = split["num_pairs"], split["num_captions"]
        rows += [("pairs", f"{pairs:,}"), ("captions", f"{captions:,}, {captions / max(1, pairs):.2f} per pair")]
        if (truncated := split.get("num_truncated_captions")) is not None:
            share = truncated / max(1, captions)
            rows.append(("cut captions", f"{truncated:,} ({share:.2%}), of more than {split['num_tokens']} tokens"))
    if shape := split.get("images_shape"):
        rows.append(("images", f"{_shape(shape)} uint8" + ", mirrored at random in training" * split["flipped"]))
    else:
        mirrored = ", also of the mirrored images" if split.get("flipped") else ""
        rows.append(("moments", f"{_shape(split['moments_shape'])} {split['dtype']}{mirrored}"))
    if shape := split.get("teacher_shape"):
        rows.append(("teacher's features", f"{_shape(shape)} float16"))
    context = split["context_shape"]
    rows.append(("text embeddings", f"{_shape(context)} {split['dtype']}" if context else "not stored"))
    if split["layout"] != NPY_LAYOUT:
        tokens = split["token_dtype"]
        rows.append(("token ids", f"({split['num_tokens']},) {tokens}" if tokens else "not stored"))
        space = LatentSpace.recorded(split)
        encoders = ["text_encoder", "tokenizer"] if space.is_pixels else ["vae", "text_encoder", "tokenizer"]
        encoders += ["teacher"] if split["teacher_shape"] else []
        rows += [(key.replace("_", " "), _encoder(split[key])) for key in encoders]
        if not space.is_pixels:
            rows.append(("latent scale", space.describe_latents().removeprefix("latent scale ")))
        source = with_image_settings(split["source"])
        if source.get("layout") == "old":
            source = {key: value for key, value in source.items() if key != "layout"}
            rows.append(("imported from", ".npy features (U-ViT layout)"))
        rows += [(key.replace("_", " "), _value(value)) for key, value in source.items() if value not in (None, [])]
    rows.append(("on disk", f"{format_bytes(split['bytes'])} in {split['num_files']:,} files"))
    if split.get("problems"):
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in split["problems"].items())
        rows.append(("problems", f"{kinds}; {split['num_left_out']:,} pairs skipped (see problems.jsonl)"))
    return rows


def _layout(split: dict[str, Any]) -> str:
    if split["layout"] == NPY_LAYOUT:
        return ".npy features (U-ViT layout); `uvit features import` converts them to a feature store"
    if split["layout"] == "unfinished":
        return "feature store, not finished"
    return f"feature store, version {split['version']}, {split['num_shards']:,} shards"


def _shape(shape: list[int]) -> str:
    return "(" + ", ".join(map(str, shape)) + ")"


def _value(value: Any) -> str:
    """An entry of `source`. The inputs of a merged store are shown as their folders."""
    if isinstance(value, list):
        return ", ".join(item["folder"] if isinstance(item, dict) else str(item) for item in value)
    return str(value)


def _encoder(encoder: dict[str, str | None] | None) -> str:
    if not encoder or not encoder["name"]:
        return "not recorded"
    return f"{encoder['name']}  sha256 {(encoder['sha256'] or 'unknown')[:SHORT_SHA]}"
