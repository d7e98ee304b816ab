"""Sweeps: the settings of lists of flags, the best of them, and a plot of two scores against each other."""

from collections.abc import Sequence
from dataclasses import fields
from itertools import product
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from uvit.config.evaluate import EvaluateConfig
from uvit.evaluate.generate import Setting
from uvit.evaluate.measure import Score

PLOT_SIZE = (720, 540)
MARGIN = 70


def list_settings(config: EvaluateConfig) -> tuple[list[Setting], list[str]]:
    """(every combination of the flags with several values, the names of these flags)."""
    numbers = config.guidance_interval
    intervals = list(zip(numbers[::2], numbers[1::2], strict=True))
    values = (config.guidance_scale, intervals, config.num_inference_steps, config.scheduler, config.weights())
    names = [field.name for field in fields(Setting)]
    settings = [Setting(*combination) for combination in product(*values)]
    return settings, [name for name, several in zip(names, values, strict=True) if len(several) > 1]


def best_setting(first_halves: Sequence[Sequence[Score]], second_halves: Sequence[Sequence[Score]]) -> dict[str, Any]:
    """The setting with the best first score on one half of the prompts, and that score on the other half.

    A score on the half that chose it is too good, by chance; the other half does not know of the choice.
    """
    scores = [halves[0] for halves in first_halves]
    choose = min if scores[0].better == "lower" else max
    best = choose(range(len(scores)), key=lambda i: scores[i].value)
    return {
        "score": scores[0].name,
        "setting": best,
        "value_on_the_half_that_chose": scores[best].value,
        "value_on_the_other_half": second_halves[best][0].value,
    }


def pareto_plot(labels: Sequence[str], x: Sequence[Score], y: Sequence[Score]) -> Image.Image:
    """Each setting as a point; those that no other setting beats in both scores are filled and joined by a line."""
    image = Image.new("RGB", PLOT_SIZE, "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    (left, right), (low, high) = (_range([score.value for score in scores]) for scores in (x, y))
    width, height = PLOT_SIZE

    def place(i: int) -> tuple[float, float]:
        across = (x[i].value - left) / (right - left)
        up = (y[i].value - low) / (high - low)
        return MARGIN + across * (width - 2 * MARGIN), height - MARGIN - up * (height - 2 * MARGIN)

    draw.rectangle((MARGIN, MARGIN, width - MARGIN, height - MARGIN), outline="black")
    for i in range(5):
        at = i / 4
        across, up = MARGIN + at * (width - 2 * MARGIN), height - MARGIN - at * (height - 2 * MARGIN)
        draw.text((across, height - MARGIN + 6), f"{left + at * (right - left):.4g}", "black", font, "ma")
        draw.text((MARGIN - 6, up), f"{low + at * (high - low):.4g}", "black", font, "rm")
    draw.text((width / 2, height - 20), f"{x[0].name} ({x[0].better} is better)", "black", font, "mm")
    draw.text((MARGIN, MARGIN - 20), f"{y[0].name} ({y[0].better} is better)", "black", font, "lm")
    front = pareto_front(x, y)
    draw.line([place(i) for i in sorted(front, key=lambda i: x[i].value)], fill=(50, 80, 220), width=2)
    for i, label in enumerate(labels):
        across, up = place(i)
        fill = (50, 80, 220) if i in front else "white"
        draw.ellipse((across - 5, up - 5, across + 5, up + 5), fill=fill, outline=(50, 80, 220))
        anchor = "lm" if across < width / 2 else "rm"
        draw.text((across + (9 if anchor == "lm" else -9), up), label, "black", font, anchor)
    return image


def pareto_front(x: Sequence[Score], y: Sequence[Score]) -> list[int]:
    """The settings that no other one beats."""
    return [i for i in range(len(x)) if not any(_beats(x, y, j, i) for j in range(len(x)))]


def _beats(x: Sequence[Score], y: Sequence[Score], j: int, i: int) -> bool:
    """Whether setting j is at least as good as i in both scores, and better in one."""
    gains = [(scores[j].value - scores[i].value) * (1 if scores[i].better == "higher" else -1) for scores in (x, y)]
    return min(gains) >= 0 and max(gains) > 0


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Ends of an axis, with some room around the values."""
    room = 0.1 * (max(values) - min(values)) or 0.1 * abs(values[0]) or 1.0
    return min(values) - room, max(values) + room
