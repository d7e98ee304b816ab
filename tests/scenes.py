"""Scenes of the built-in shapes that are alike."""

from dataclasses import fields, replace

from uvit.sources.shapes import BACKGROUNDS, COLOURS, POSITIONS, SHAPES, SIZES, Scene


def neighbours(scene: Scene) -> list[Scene]:
    """The scenes that differ from `scene` in one attribute."""
    choices = {"colour": COLOURS, "shape": SHAPES, "size": SIZES, "position": POSITIONS, "background": BACKGROUNDS}
    return [
        replace(scene, **{field.name: value})
        for field in fields(scene)
        for value in choices[field.name]
        if value != getattr(scene, field.name)
    ]
