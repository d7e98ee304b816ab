"""Configs as YAML, readable and read back."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import yaml


def to_yaml(config: Any) -> str:
    """The resolved config, as a file that `--config` reads back to the same config."""
    content = {
        key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(config).items()
    }
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def write_yaml(config: Any, path: Path) -> None:
    """Whole or not at all."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(to_yaml(config), encoding="utf-8")
    aside.replace(path)
