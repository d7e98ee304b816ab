"""`uvit evaluate`: prompt accuracy on the built-in shapes, without another model.

It generates an image for each scene of a split in each of its four wordings. `shapes_reader` reads colour, shape, size,
position and background from the pixels. An attribute is correct if it is the one in the prompt.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from uvit.config.sample import EvaluateConfig
from uvit.evaluate.shapes_reader import ATTRIBUTES, CHANCE, read_scene
from uvit.images import SHEET_COLOUR, contact_sheet, save_png
from uvit.sample.command import generate
from uvit.sample.load import open_pipeline
from uvit.sources.shapes import Scene, render, scenes

NUM_WORDINGS = 4
MAX_SHEET_PROMPTS = 24


def evaluate(config: EvaluateConfig) -> None:
    """Generate an image per prompt of the split, read its attributes, print and write the accuracy."""
    pipeline = open_pipeline(config.pipeline, config.device, disable_tqdm=config.disable_tqdm)
    all_scenes = [scene for scene in scenes(config.split) if isinstance(scene, Scene)]
    pairs = [(scene, wording) for wording in range(NUM_WORDINGS) for scene in all_scenes][: config.max_prompts]
    prompted, prompts = [scene for scene, _ in pairs], [scene.captions()[wording] for scene, wording in pairs]
    seeds = [config.seed + i for i in range(len(prompts))]
    drawn = generate(pipeline, prompts, seeds, config.batch_size, config.guidance_scale, config.num_inference_steps)
    progress = tqdm(drawn, total=len(prompts), unit="image", desc="evaluate", disable=config.disable_tqdm)
    images = [image for _, _, _, image in progress]
    results = accuracy(prompted, images)

    output_dir = Path(config.output_dir)
    save_png(sheet(prompted, prompts, images), output_dir / "contact_sheet.png")
    facts = {**results, "num_prompts": len(prompts), "split": config.split, "guidance_scale": config.guidance_scale}
    (output_dir / "results.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    print(accuracy_table(results, len(prompts), config.split))
    print(f"contact sheet (left: the prompt, rendered; right: the image): {output_dir / 'contact_sheet.png'}")


def accuracy(prompted: Sequence[Scene], images: Sequence[Image.Image]) -> dict[str, float]:
    """The share of correct images for each attribute, their mean (`attributes`), and the share with all five correct.

    The last one is `prompts`.
    """
    correct = [
        [read[name] == getattr(scene, name) for name in ATTRIBUTES]
        for scene, read in zip(prompted, map(read_scene, images), strict=True)
    ]
    results = {name: sum(row[i] for row in correct) / len(correct) for i, name in enumerate(ATTRIBUTES)}
    results["attributes"] = sum(results[name] for name in ATTRIBUTES) / len(ATTRIBUTES)
    results["prompts"] = sum(all(row) for row in correct) / len(correct)
    return results


def chance() -> dict[str, float]:
    """The accuracy of guessing, by the same names."""
    whole = 1.0
    for value in CHANCE.values():
        whole *= value
    return {**CHANCE, "attributes": sum(CHANCE.values()) / len(CHANCE), "prompts": whole}


def accuracy_table(results: dict[str, float], num_prompts: int, split: str) -> str:
    guess = chance()
    names = {**{name: name for name in ATTRIBUTES}, "attributes": "all attributes", "prompts": "whole prompts"}
    rows = [f"  {label:<15} {results[name]:>7.1%}   {guess[name]:>7.1%}" for name, label in names.items()]
    return "\n".join([f"prompt accuracy on {num_prompts} {split} prompts", f"  {'':<15} correct    chance", *rows])


def sheet(prompted: Sequence[Scene], prompts: Sequence[str], images: Sequence[Image.Image]) -> Image.Image:
    """The scene of each prompt, rendered, beside the generated image, with the prompt below."""
    cells = []
    for scene, image in list(zip(prompted, images, strict=True))[:MAX_SHEET_PROMPTS]:
        side = image.width
        cell = Image.new("RGB", (2 * side + 1, side), SHEET_COLOUR)
        cell.paste(render(scene, side), (0, 0))
        cell.paste(image, (side + 1, 0))
        cells.append(cell.resize((cell.width * 4, cell.height * 4), Image.Resampling.NEAREST))
    return contact_sheet(cells, prompts[:MAX_SHEET_PROMPTS], columns=6, cell=200)
