"""`uvit evaluate`: prompt accuracy on the built-in shapes, without another model.

It generates an image for each scene of a split in each of its four wordings. `shapes_reader` reads colour, shape, size,
position and background from the pixels. An attribute is correct if it is the one in the prompt.
"""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from uvit.config.sample import EvaluateConfig
from uvit.evaluate.shapes_reader import ATTRIBUTES, CHANCE, read_scene
from uvit.images import SHEET_COLOUR, contact_sheet, save_png
from uvit.io import write_json
from uvit.progress import Progress
from uvit.sample.command import generate
from uvit.sample.load import open_pipeline
from uvit.sources.shapes import Scene, render, scenes

NUM_WORDINGS = 4
MAX_SHEET_PROMPTS = 24


def evaluate(config: EvaluateConfig) -> None:
    """Generate an image per prompt of the split, read its attributes, print and write the accuracy."""
    pipeline = open_pipeline(config.pipeline, config.device)
    all_scenes = [scene for scene in scenes(config.split) if isinstance(scene, Scene)]
    pairs = [(scene, wording) for wording in range(NUM_WORDINGS) for scene in all_scenes][: config.max_prompts]
    prompted, prompts = [scene for scene, _ in pairs], [scene.captions()[wording] for scene, wording in pairs]
    seeds = [config.seed + i for i in range(len(prompts))]
    scale, num_steps = config.guidance_scale, config.num_inference_steps
    with Progress("evaluate", len(prompts), "image", bar=not config.disable_tqdm) as progress:
        samples = generate(pipeline, prompts, seeds, config.batch_size, scale, num_steps, progress=progress)
        images = [image for _, _, _, image in samples]
    results = accuracy(prompted, images)

    output_dir = Path(config.output_dir)
    save_png(sheet(prompted, prompts, images), output_dir / "contact_sheet.png")
    facts = {**results, "num_prompts": len(prompts), "split": config.split, "guidance_scale": config.guidance_scale}
    write_json(output_dir / "results.json", facts)
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
