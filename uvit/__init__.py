"""uvit: train a text-to-image latent diffusion model with a U-ViT backbone from scratch.

The public names load on first use, so that `import uvit` and `uvit --help` start without torch.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "UViTT2IModel": "uvit.model",
    "ModernUViTT2IModel": "uvit.modern_model",
    "UViTPipeline": "uvit.sample.pipeline",
    "load_unet": "uvit.weights.components",
    "LDMTextToImageUViTPipeline": "uvit.sample.pipeline",
}
__all__ = [
    "LDMTextToImageUViTPipeline", "ModernUViTT2IModel", "UViTPipeline", "UViTT2IModel", "__version__", "load_unet",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'uvit' has no attribute {name!r}")
