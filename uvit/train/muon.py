"""Muon (Jordan et al. 2024) for the matrices of transformer blocks, beside AdamW for all other parameters.

The average of a matrix's gradients is made nearly orthogonal, so that an update moves all its directions alike. Five
Newton-Schulz iterations do this, for all matrices of one shape at a time. An update is then scaled to the root mean
square of AdamW's (Liu et al. 2025), so that learning rates and weight decay are of a kind.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from uvit.checkpoint.tensors import local_offset
from uvit.distributed.mesh import World
from uvit.distributed.ops import is_known, local_grads, local_tensor, map_in_parts, whole_tensor
from uvit.train.adamw import FusedAdamW

MOMENTUM = 0.95
NUM_ITERATIONS, COEFFICIENTS = 5, (3.4445, -4.7750, 2.0315)
UPDATE_RMS = 0.2  # AdamW's, about
NORM_FLOOR = 1e-7
MAX_ELEMENTS = 2**25  # of the matrices that are made orthogonal at a time


class Muon(torch.optim.Optimizer):
    """Updates block matrices; `adamw` updates the other parameters in the same step.

    Args:
        groups: of matrices: `params`, `num_matrices` (of which each parameter consists: its rows are so many matrices),
            `lr`.
        adamw: the optimizer of the others. Its groups come first in `param_groups`, and the state is common.
        weight_decay: decoupled, as AdamW's.
        dtype: of the iterations: bfloat16, or float32, which takes four times as long.
        world: the processes that share the work: each makes a part of the matrices orthogonal, for all of them.
            None: this one alone.

    Sharded and tensor parallel parameters are gathered to be made orthogonal; each process updates its own part.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        adamw: FusedAdamW,
        weight_decay: float,
        dtype: torch.dtype,
        world: World | None = None,
    ):
        super().__init__(groups, {"weight_decay": weight_decay})
        self.adamw, self.dtype, self.world = adamw, dtype, world
        self.matrix_groups = self.param_groups
        self.param_groups = adamw.param_groups + self.matrix_groups
        adamw.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None, skipped: Tensor | None = None) -> None:  # type: ignore[override]
        """`skipped`: a flag on the device. If it is set, nothing changes."""
        assert closure is None
        if skipped is not None and is_known(skipped):
            if skipped:
                return
            skipped = None
        self.adamw.step(skipped=skipped)
        for group in self.matrix_groups:
            for parameters in shape_batches(group["params"], group["num_matrices"]):
                self.update(parameters, group["num_matrices"], group["lr"], group["weight_decay"], skipped)

    def momentum(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        return state["momentum"]

    def orthogonalize(self, matrices: Tensor) -> Tensor:
        return map_in_parts(orthogonalize, matrices, self.world)

    def update(
        self,
        parameters: list[Tensor],
        num_matrices: int,
        lr: float,
        weight_decay: float,
        skipped: Tensor | None = None,
    ) -> None:
        """Update parameters that consist of matrices of one shape, or of its transpose."""
        weights = [local_tensor(parameter) for parameter in parameters]
        grads = local_grads(parameters)
        averages = [local_tensor(self.momentum(parameter)) for parameter in parameters]
        if skipped is not None:  # an average stays where it is if the gradient equals it
            grads = [torch.where(skipped, *pair) for pair in zip(averages, grads, strict=True)]
        torch._foreach_lerp_(averages, grads, 1 - MOMENTUM)
        directions = [part.to(self.dtype) for part in torch._foreach_lerp(grads, averages, MOMENTUM)]  # Nesterov's
        matrices = [
            to_matrices(whole_tensor(part, parameter), parameter, num_matrices)
            for part, parameter in zip(directions, parameters, strict=True)
        ]
        rows, columns = matrices[0].shape[1:]
        updates = self.orthogonalize(torch.cat(matrices)).split(num_matrices)
        parts = [
            own_part(from_matrices(update, parameter, num_matrices), parameter).to(weight.dtype)
            for update, parameter, weight in zip(updates, parameters, weights, strict=True)
        ]
        decay = 1 - lr * weight_decay
        if skipped is not None:
            torch._foreach_mul_(parts, (~skipped).to(parts[0].dtype))
        torch._foreach_mul_(weights, decay if skipped is None else torch.where(skipped, 1.0, decay))
        torch._foreach_add_(weights, parts, alpha=-lr * UPDATE_RMS * math.sqrt(max(rows, columns)))


def orthogonalize(x: Tensor) -> Tensor:
    """Matrices (M, r, c) with r <= c -> nearly the orthogonal factor of each: singular values in 0.7..1.2."""
    a, b, c = COEFFICIENTS
    norms = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.float32)
    x = (x / (norms + NORM_FLOOR)).to(x.dtype)  # singular values of at most 1
    for _ in range(NUM_ITERATIONS):
        gram = x @ x.mT  # (M, r, r)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # (M, r, r)
        x = torch.baddbmm(x, polynomial, x, beta=a)  # (M, r, c)
    return x


# Which parameters are matrices of blocks


def block_matrices(network: nn.Module) -> dict[Tensor, int]:
    """The weights of linear layers in a network's blocks -> of how many matrices each consists, stacked by rows.

    Blocks are `mid_block` and the members of lists of modules. A layer called `qkv` has three matrices. One called
    `fc1` with twice as many outputs as its `fc2` has inputs has two: gates and values.
    """
    blocks = [block for module in network.modules() if isinstance(module, nn.ModuleList) for block in module]
    blocks += [module for name, module in network.named_modules() if name.endswith("mid_block")]
    found: dict[Tensor, int] = {}
    for parent in [module for block in blocks for module in block.modules()]:
        for name, layer in parent.named_children():
            if isinstance(layer, nn.Linear):
                inner = getattr(parent, "fc2", None) if name == "fc1" else None
                num_gated = layer.out_features // inner.in_features if isinstance(inner, nn.Linear) else 1
                found[layer.weight] = 3 if name == "qkv" else num_gated
    return found


def shape_batches(parameters: list[Tensor], num_matrices: int) -> Iterator[list[Tensor]]:
    """Parameters with a gradient whose matrices have one shape or its transpose, up to MAX_ELEMENTS at a time."""
    by_shape: dict[tuple[int, ...], list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            rows, columns = parameter.shape[0] // num_matrices, parameter.shape[1]
            by_shape.setdefault((min(rows, columns), max(rows, columns)), []).append(parameter)
    for group in by_shape.values():
        count = max(1, MAX_ELEMENTS // group[0].numel())
        yield from (group[i : i + count] for i in range(0, len(group), count))


# Matrices of parameters that are sharded


def own_part(whole: Tensor, parameter: Tensor) -> Tensor:
    """The part of a whole tensor that this process has of `parameter`."""
    if not isinstance(parameter, DTensor):
        return whole
    sizes = local_tensor(parameter).shape
    for dim, (start, size) in enumerate(zip(local_offset(parameter), sizes, strict=True)):
        whole = whole.narrow(dim, start, size)
    return whole


def num_ranks_by_row(parameter: Tensor, num_matrices: int) -> int:
    """By how many ranks the rows are ordered, before they are by matrices (`parallelize.order_by_rank`), or 1."""
    names = parameter.device_mesh.mesh_dim_names or () if isinstance(parameter, DTensor) else ()
    if num_matrices == 1 or "tp" not in names:
        return 1
    return parameter.device_mesh.shape[names.index("tp")]  # type: ignore[attr-defined]


def to_matrices(whole: Tensor, parameter: Tensor, num_matrices: int) -> Tensor:
    """A whole parameter, or its gradient -> (num_matrices, r, c) with r <= c."""
    tp = num_ranks_by_row(parameter, num_matrices)
    matrices = whole.unflatten(0, (tp, num_matrices, -1)).transpose(0, 1).flatten(1, 2)
    return matrices.mT if matrices.shape[1] > matrices.shape[2] else matrices


def from_matrices(matrices: Tensor, parameter: Tensor, num_matrices: int) -> Tensor:
    """The inverse of `to_matrices`."""
    tp = num_ranks_by_row(parameter, num_matrices)
    rows = parameter.shape[0] // num_matrices
    matrices = matrices if matrices.shape[1] == rows else matrices.mT
    return matrices.unflatten(1, (tp, -1)).transpose(0, 1).flatten(0, 2)
