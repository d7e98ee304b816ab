"""AdamW in one kernel, over lists of tensors that are made once, with an update that the device itself can skip."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from uvit.distributed.ops import is_known, local_grads, local_tensor


class FusedAdamW(torch.optim.AdamW):
    """torch's fused AdamW, to the bit. Its lists hold the tensors of `state`, so fill these in place.

    torch makes the lists anew at each step, which takes a launch-bound step's host longer than the launches.
    """

    def __init__(self, groups: list[dict[str, Any]], **settings: Any):
        super().__init__(groups, fused=True, **settings)
        self._lists: dict[int, tuple[list[bool], list[list[Tensor]]]] = {}  # of each group; see `_lists_of`

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None, skipped: Tensor | None = None) -> None:  # type: ignore[override]
        """`skipped`: a flag on the device. If it is set, nothing changes."""
        assert closure is None
        if skipped is not None and is_known(skipped):
            if skipped:
                return
            skipped = None
        for index, group in enumerate(self.param_groups):
            params, exp_avgs, exp_avg_sqs, steps = self._lists_of(index, group["params"])
            if not params:
                continue
            grads = local_grads(group["params"])
            if skipped is None:
                torch._foreach_add_(steps, 1)
            else:
                torch._foreach_add_(steps, [1.0 - skipped.float()] * len(steps))  # a single tensor would be read
            beta1, beta2 = group["betas"]
            torch._fused_adamw_(
                params, grads, exp_avgs, exp_avg_sqs, [], steps,
                lr=group["lr"], beta1=beta1, beta2=beta2, weight_decay=group["weight_decay"], eps=group["eps"],
                amsgrad=False, maximize=False, found_inf=None if skipped is None else skipped.float(),
            )  # fmt: skip

    def _lists_of(self, index: int, parameters: list[Tensor]) -> list[list[Tensor]]:
        """Local parameters, averages of gradients and of their squares, and steps: of those that have a gradient."""
        has_grad = [parameter.grad is not None for parameter in parameters]
        known, lists = self._lists.get(index, (None, []))
        if known != has_grad:
            used = [parameter for parameter in parameters if parameter.grad is not None]
            for parameter in used:
                if not self.state[parameter]:
                    self.state[parameter] = new_adamw_state(parameter)
            states = [self.state[parameter] for parameter in used]
            lists = [[local_tensor(parameter) for parameter in used]]
            lists += [[local_tensor(state[key]) for state in states] for key in ("exp_avg", "exp_avg_sq", "step")]
            self._lists[index] = has_grad, lists
        return lists


def new_adamw_state(parameter: Tensor) -> dict[str, Tensor]:
    """What AdamW keeps of a parameter, before the first step."""
    moments = {
        key: torch.zeros_like(parameter, memory_format=torch.preserve_format) for key in ("exp_avg", "exp_avg_sq")
    }
    return {"step": torch.zeros((), device=parameter.device), **moments}
