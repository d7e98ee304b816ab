"""Several images in one call of the network, each with exactly the bits of a call of its own.

The arithmetic of a matrix product may depend on how many rows it has: other kernels add in another order. So what may
share a call is measured, once for each shape, with this network on this device:

- Layers whose rows depend on the batch (on a CPU: convolutions, which have few images, and products of few rows) are
  called image by image inside the shared call. They are a small part of a U-ViT.
- Then the whole network is compared: the sizes of a batch that give every image, at every place, the bits of a call of
  its own are used, and no others. If there is none, images are computed one at a time.
- On other devices than a CPU, where nearly every product depends on the batch, every call is padded to one size
  instead, if there the place in the batch makes no difference.

Shapes: R rows of an image, 2 with guidance and otherwise 1; see `uvit.sample.denoise`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from uvit.sample.denoise import NetworkInput

MAX_SPLIT = 0.1  # the share of a network's parameters in layers that are called image by image


@dataclass(frozen=True)
class BatchPlan:
    """How images of one shape share calls."""

    sizes: tuple[int, ...]  # numbers of images, falling
    is_padded: bool = False  # whether every call has sizes[0] images, and the last of them are repeated

    def parts(self, num_images: int) -> list[int]:
        """The sizes of the calls for a number of images."""
        parts = []
        while num_images > 0:
            parts.append(self.sizes[0] if self.is_padded else next(s for s in self.sizes if s <= num_images))
            num_images -= parts[-1]
        return parts


class SharedNetwork:
    """A U-ViT that answers several images in one call.

    Args:
        max_images: in one call.
    """

    def __init__(self, unet: nn.Module, max_images: int):
        self.unet, self.max_images = unet, max_images
        self.plans: dict[Any, BatchPlan] = {}
        self.split: set[nn.Module] = set()
        self._rows: int | None = None  # of an image, in a shared call

    @torch.no_grad()
    def __call__(self, inputs: Sequence[NetworkInput]) -> list[Tensor]:
        """The predictions for inputs of any shapes, in their order."""
        groups: dict[Any, list[int]] = {}
        for i, each in enumerate(inputs):
            groups.setdefault(_shape(each), []).append(i)
        predictions: dict[int, Tensor] = {}
        for group in groups.values():
            plan = self.plan_for(inputs[group[0]]) if self._shares(group) else BatchPlan((1,))
            for size in plan.parts(len(group)):
                members, group = group[:size], group[size:]
                padding = [members[-1]] * (size - len(members))
                answers = self.together([inputs[i] for i in members + padding])
                predictions |= dict(zip(members, answers, strict=False))
        return [predictions[i] for i in range(len(inputs))]

    def _shares(self, group: Sequence[int]) -> bool:
        """On a CPU, an image alone needs no plan; on other devices it may have to be padded like the others."""
        return len(group) > 1 or next(self.unet.parameters()).device.type != "cpu"

    def together(self, inputs: Sequence[NetworkInput]) -> Sequence[Tensor]:
        """One call for images of one shape."""
        if len(inputs) == 1:
            return [self.unet(*inputs[0])]
        rows = len(inputs[0].latents)
        self._rows = rows
        try:
            prediction = self.unet(*(torch.cat(tensors) for tensors in zip(*inputs, strict=True)))
        finally:
            self._rows = None
        return prediction.split(rows)

    def plan_for(self, like: NetworkInput) -> BatchPlan:
        """Measured when first asked for a shape."""
        key = _shape(like)
        if key not in self.plans:
            self.plans[key] = self._measure(like)
        return self.plans[key]

    def _measure(self, like: NetworkInput) -> BatchPlan:
        example = _random_like(like)
        sizes = [size for size in (32, 16, 8, 4, 2) if size < self.max_images]
        sizes = ([self.max_images] if self.max_images > 1 else []) + sizes
        dependent: set[nn.Module] = set()

        def compare(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            if _has_rows(arguments, output, len(example.latents)):
                many = [_repeated(arguments[0], size) for size in sizes]
                if not all(_all_equal(module.forward(each), output) for each in many):
                    dependent.add(module)

        hooks = [m.register_forward_hook(compare) for m in self.unet.modules() if not any(m.children())]
        try:
            alone = self.unet(*example)
        finally:
            for hook in hooks:
                hook.remove()
        if self._share_of(dependent | self.split) <= MAX_SPLIT:
            for module in dependent - self.split:
                self._call_by_image(module)
            equal = [size for size in sizes if _all_equal(torch.cat([*self.together([example] * size)]), alone)]
            if equal or alone.device.type == "cpu":
                return BatchPlan((*equal, 1))
        if sizes and alone.device.type != "cpu":
            first, *others = self.together([example] * sizes[0])
            if all(torch.equal(first, other) for other in others):
                return BatchPlan((sizes[0],), is_padded=True)
        return BatchPlan((1,))

    def _share_of(self, modules: set[nn.Module]) -> float:
        count = sum(parameter.numel() for module in modules for parameter in module.parameters())
        return count / sum(parameter.numel() for parameter in self.unet.parameters())

    def _call_by_image(self, module: nn.Module) -> None:
        forward: Callable[[Tensor], Tensor] = module.forward

        def by_image(x: Tensor) -> Tensor:
            if self._rows is None:
                return forward(x)
            return torch.cat([forward(part) for part in x.split(self._rows)])

        module.forward = by_image
        self.split.add(module)


def _shape(inputs: NetworkInput) -> tuple[Any, ...]:
    return tuple(tensor.shape for tensor in inputs)


def _random_like(inputs: NetworkInput) -> NetworkInput:
    generator = torch.Generator("cpu").manual_seed(0)
    latents, context = (
        torch.randn(tensor.shape, generator=generator).to(tensor) for tensor in (inputs.latents, inputs.context)
    )
    return NetworkInput(latents, torch.full_like(inputs.timesteps, 321.5), context)


def _has_rows(arguments: tuple[Any, ...], output: Any, rows: int) -> bool:
    """Whether a layer maps each row of an image for itself: one tensor to one, both with the rows first."""
    tensors = (*arguments, output)
    return len(tensors) == 2 and all(isinstance(t, Tensor) and t.ndim > 1 and len(t) == rows for t in tensors)


def _repeated(x: Tensor, times: int) -> Tensor:
    return x.repeat(times, *[1] * (x.ndim - 1))


def _all_equal(many: Tensor, one: Tensor) -> bool:
    """Whether `many` is `one`, repeated, to the bit."""
    return torch.equal(many, _repeated(one, len(many) // len(one)))
