"""A folder for a Hugging Face Space: a page by Gradio, what it needs, its card, and the pipeline with its code."""

import shutil
from importlib.metadata import version
from pathlib import Path

import yaml

APP = Path(__file__).with_name("space_app.py")
MODEL_FOLDER = "model"  # where space_app.py looks for the pipeline
GRADIO = "6.31.0"  # the version that the page was tried with
# Gradio comes with the Space, by `sdk_version`. The model's code was written for these versions of these packages.
REQUIREMENTS = ("accelerate", "diffusers", "safetensors", "torch", "transformers")


def write_space(folder: Path, name: str, license_name: str | None) -> None:
    """Add the page to a folder that has the pipeline, with its code, in `model`."""
    shutil.copy(APP, folder / "app.py")
    lines = [f"{package}=={version(package).split('+')[0]}" for package in REQUIREMENTS]
    (folder / "requirements.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(space_card(name, license_name), encoding="utf-8")


def space_card(name: str, license_name: str | None) -> str:
    """The card as Markdown, with the fields of a Space in its front matter."""
    head = {
        "title": name,
        "colorFrom": "blue",
        "colorTo": "green",
        "sdk": "gradio",
        "sdk_version": GRADIO,
        "app_file": "app.py",
        "pinned": False,
        **({"license": license_name} if license_name else {}),
        "short_description": "Images from text, by a U-ViT",
    }
    sections = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n",
        f"# {name}\n",
        f"A page that generates images from text. [{MODEL_FOLDER}/README.md]({MODEL_FOLDER}/README.md) describes the "
        "model. To start the page on your own machine:\n",
        f"```sh\npip install -r requirements.txt gradio=={GRADIO}\npython app.py\n```\n",
    ]
    return "\n".join(sections)
