"""The model card of a pipeline: the data, the steps, the losses and the licence, from the records of its run."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from uvit.checkpoint.folder import TRAINING_FILE, step_of
from uvit.errors import UserError
from uvit.weights.components import Components
from uvit.weights.encoders import downsampling_of

REPORT_FILE = "conversion.json"  # in a pipeline folder: the report of the conversion
PRIVATE_FILES = TRAINING_FILE, REPORT_FILE  # of a pipeline folder: they have paths of this machine
NUM_LOSSES = 100  # the training loss is averaged over so many of the last steps
UNKNOWN = "not recorded"


def write_card(
    components: Components, folder: Path, name: str, license_name: str | None, run: Path | None, has_code: bool
) -> None:
    """Write README.md, and copy the latest preview of the run folder, if there is one.

    has_code: whether the pipeline folder has its own code.
    """
    last = components.facts.get("step", math.inf)
    previews = sorted((run / "previews").glob("step-*.png")) if run is not None else []
    previews = [path for path in previews if (step_of(path) or 0) <= last]
    if previews:
        (folder / "previews").mkdir()
        shutil.copy(previews[-1], folder / "previews" / previews[-1].name)
    image = f"previews/{previews[-1].name}" if previews else None
    (folder / "README.md").write_text(card(components, name, license_name, run, image, has_code), encoding="utf-8")


def card(
    components: Components, name: str, license_name: str | None, run: Path | None, image: str | None, has_code: bool
) -> str:
    """The card as Markdown, with the fields of the Hub in its front matter."""
    head = {
        "license": license_name or "unknown",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["uvit", "pixel-diffusion" if components.conventions.is_pixels else "latent-diffusion"],
    }
    size = components.unet.config["sample_size"]
    sides = [size, size] if isinstance(size, int) else size
    pixels = "x".join(str(side * downsampling_of(components.vqvae)) for side in sides)
    millions = sum(value.numel() for value in components.unet.parameters()) / 1e6
    opening = f"A U-ViT with {millions:.1f}M parameters. It generates images of {pixels} pixels from text."
    sections = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n",
        f"# {name}\n",
        f"{opening}\n",
        usage_example(has_code),
    ]
    if image is not None:
        sections.append(f"![The last preview of the training run]({image})\n")
    sections.append("## Training\n\n" + markdown_table(training_rows(components, run)))
    if components.report.lines():
        sections.append(
            "## Conversion\n\n" + "\n".join(f"- {line}" for line in without_folders(components.report.lines())) + "\n"
        )
    licence = f"`{license_name}`" if license_name else "No licence was given when this card was written."
    sections.append(f"## Licence\n\n{licence}\n")
    return "\n".join(sections)


def usage_example(has_code: bool) -> str:
    with_uvit = 'from uvit import UViTPipeline\n\npipeline = UViTPipeline.from_pretrained("PATH_OR_ID")'
    with_diffusers = (
        "from diffusers import DiffusionPipeline\n\n"
        'pipeline = DiffusionPipeline.from_pretrained("PATH_OR_ID", trust_remote_code=True)'
    )
    generate = 'pipeline("a caption like those of its training data", guidance_scale=2.0).images[0].save("image.png")'
    return f"```python\n{with_diffusers if has_code else with_uvit}\n{generate}\n```\n"


def training_rows(components: Components, run: Path | None) -> dict[str, str]:
    """What is known of the training run: the rows of a table."""
    facts, conventions = components.facts, components.conventions
    config = facts.get("config", {})
    rows = {
        "steps": f"{facts['step']:,}" if "step" in facts else UNKNOWN,
        "training samples": f"{facts['samples']:,}" if "samples" in facts else UNKNOWN,
        "data": data_of(config.get("feature_path")),
        "learning rate": str(config.get("learning_rate", UNKNOWN)),
        "weights": {True: "EMA", False: "raw", None: UNKNOWN}[facts.get("ema")],
        "prediction type": conventions.prediction_type,
        "path": conventions.path,
        ("latents" if conventions.is_pixels else "latent scale"): conventions.describe_latents().removeprefix(
            "latent scale "
        ),
        "timesteps": conventions.timestep_labels,
        "VAE (sha256)": "none" if conventions.is_pixels else (facts.get("vae_sha256") or UNKNOWN)[:12],
        "text encoder (sha256)": (facts.get("text_encoder_sha256") or UNKNOWN)[:12],
        "software": ", ".join(f"{name} {version}" for name, version in facts.get("versions", {}).items()) or UNKNOWN,
    }
    return rows | losses_of(config, run, facts.get("step", math.inf))


def data_of(feature_path: str | None) -> str:
    """The data in the manifest of the feature store. Of paths, only the last part: the rest is private."""
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


def losses_of(config: dict[str, Any], run: Path | None, last: float) -> dict[str, str]:
    """The losses in the run's metrics.jsonl, up to the step `last`: rows of a table."""
    if run is None:
        return {}
    path = Path(config.get("logging_dir") or run / "logs") / "metrics.jsonl"
    try:
        whole = path.read_bytes().rpartition(b"\n")[0]  # the last line may still be being written
        lines = [line for line in map(json.loads, whole.splitlines()) if line["step"] <= last]
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


def without_folders(lines: list[str]) -> list[str]:
    """Lines without the folders of this machine."""
    return [re.sub(r"(?<!\S)[^\s:,]*/", "", line) for line in lines]


def run_folder(source: Path) -> Path | None:
    """The run folder of a checkpoint or a pipeline, if it lies in one."""
    parent = source.absolute().parent  # of `.` too
    return parent if (parent / "config.yaml").is_file() else None


def push(folder: Path, repository: str, private: bool, is_space: bool = False) -> str:
    """Upload a folder as a model or a Space, without the files that have paths of this machine. -> the URL.

    Raises UserError where the upload fails.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        kind, sdk = ("space", "gradio") if is_space else ("model", None)
        url = api.create_repo(repository, private=private, exist_ok=True, repo_type=kind, space_sdk=sdk)
        api.upload_folder(
            repo_id=repository,
            repo_type=kind,
            folder_path=folder,
            ignore_patterns=list(PRIVATE_FILES),
            commit_message="uvit convert",
        )
    except Exception as error:  # connection, token, name: each library raises its own
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--push_to_hub {repository}: the upload failed ({reason}); {folder} is written") from None
    return str(url)
