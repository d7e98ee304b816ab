"""The model card: what a pipeline is, what it was trained on and how far, from what the run itself recorded."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from uvit.errors import UserError
from uvit.weights.components import Components
from uvit.weights.encoders import downsampling_of

NUM_LOSSES = 100  # training steps that the loss is averaged over
UNKNOWN = "not recorded"


def write_card(
    parts: Components, folder: Path, name: str, license_name: str | None, run: Path | None, code: bool
) -> None:
    """README.md, and the latest preview of the run folder, if there is one."""
    previews = sorted((run / "previews").glob("step-*.png")) if run is not None else []
    if previews:
        (folder / "previews").mkdir()
        shutil.copy(previews[-1], folder / "previews" / previews[-1].name)
    image = f"previews/{previews[-1].name}" if previews else None
    (folder / "README.md").write_text(card(parts, name, license_name, run, image, code), encoding="utf-8")


def card(
    parts: Components, name: str, license_name: str | None, run: Path | None, image: str | None, code: bool
) -> str:
    """Markdown with the Hub's fields at its head."""
    head = {
        "license": license_name or "unknown",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["uvit", "latent-diffusion"],
    }
    size = parts.unet.config["sample_size"]
    sides = [size, size] if isinstance(size, int) else size
    pixels = "x".join(str(side * downsampling_of(parts.vqvae)) for side in sides)
    millions = sum(value.numel() for value in parts.unet.parameters()) / 1e6
    opening = f"A U-ViT of {millions:.1f}M parameters that draws {pixels} pixels from words."
    sections = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n",
        f"# {name}\n",
        f"{opening}\n",
        usage_example(code),
    ]
    if image is not None:
        sections.append(f"![from the last preview of its training]({image})\n")
    sections.append("## Training\n\n" + markdown_table(training_rows(parts, run)))
    if parts.report.lines():
        sections.append("## Conversion\n\n" + "\n".join(f"- {line}" for line in public(parts.report.lines())) + "\n")
    licence = f"`{license_name}`" if license_name else "None was named when this card was written."
    sections.append(f"## Licence\n\n{licence}\n")
    return "\n".join(sections)


def usage_example(code: bool) -> str:
    ours = 'from uvit import UViTPipeline\n\npipeline = UViTPipeline.from_pretrained("PATH_OR_ID")'
    plain = (
        "from diffusers import DiffusionPipeline\n\n"
        'pipeline = DiffusionPipeline.from_pretrained("PATH_OR_ID", trust_remote_code=True)'
    )
    draw = 'pipeline("a caption like those it was trained on", guidance_scale=2.0).images[0].save("picture.png")'
    return f"```python\n{plain if code else ours}\n{draw}\n```\n"


def training_rows(parts: Components, run: Path | None) -> dict[str, str]:
    """What is known of the training, in a table's rows."""
    facts, said = parts.facts, parts.conventions
    config = facts.get("config", {})
    rows = {
        "steps": f"{facts['step']:,}" if "step" in facts else UNKNOWN,
        "samples drawn": f"{facts['samples']:,}" if "samples" in facts else UNKNOWN,
        "data": data_of(config.get("feature_path")),
        "learning rate": str(config.get("learning_rate", UNKNOWN)),
        "weights": {True: "averaged (EMA)", False: "as trained", None: UNKNOWN}[facts.get("ema")],
        "predicts": said.prediction_type,
        "latent scale": str(said.latent_scale),
        "timestep labels": said.timestep_labels,
        "VAE": (facts.get("vae_sha256") or UNKNOWN)[:12],
        "text encoder": (facts.get("text_encoder_sha256") or UNKNOWN)[:12],
        "software": ", ".join(f"{name} {version}" for name, version in facts.get("versions", {}).items()) or UNKNOWN,
    }
    return rows | losses_of(config, run)


def data_of(feature_path: str | None) -> str:
    """What the feature store says of its pairs. Only the last parts of paths: the rest is its owner's."""
    if feature_path is None:
        return UNKNOWN
    for path in (Path(feature_path) / "train" / "manifest.json", Path(feature_path) / "manifest.json"):
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            sources = manifest.get("source", {}).get("source", [])
            names = ", ".join(Path(str(source).rstrip("/")).name for source in sources)
            return f"{manifest['num_pairs']:,} images, {manifest['num_captions']:,} captions ({names})"
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            continue
    return Path(feature_path).name


def losses_of(config: dict[str, Any], run: Path | None) -> dict[str, str]:
    """From the run's metrics.jsonl."""
    if run is None:
        return {}
    path = Path(config.get("logging_dir") or run / "logs") / "metrics.jsonl"
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        losses = [float(line["loss"]) for line in lines if line.get("loss") is not None][-NUM_LOSSES:]
        validated = [line for line in lines if line.get("val_loss") is not None]
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return {}
    rows = {f"training loss, mean of the last {len(losses)} steps": f"{np.mean(losses):.4f}"} if losses else {}
    if validated:
        rows["validation loss"] = f"{validated[-1]['val_loss']:.4f} at step {validated[-1]['step']:,}"
    return rows


def markdown_table(rows: dict[str, str]) -> str:
    return "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows.items()) + "\n"


def public(lines: list[str]) -> list[str]:
    """Without the folders of the machine that it was made on."""
    return [re.sub(r"(?<!\S)[^\s:,]*/", "", line) for line in lines]


def run_folder(source: Path) -> Path | None:
    """The run that a checkpoint or its pipeline lies in."""
    return source.parent if (source.parent / "config.yaml").is_file() else None


def push(folder: Path, repository: str, private: bool) -> str:
    """Upload a folder, but for `training.json`, which names places on this machine. -> its address.

    Raises UserError where the Hub does not take it.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        url = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repository, folder_path=folder, ignore_patterns=["training.json"], commit_message="uvit convert"
        )
    except Exception as error:  # of the connection, the token, the name: each library beneath has its own
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--push_to_hub {repository}: was not taken ({reason}); {folder} is written") from None
    return str(url)
