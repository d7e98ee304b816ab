"""DPM-Solver++ (2M) that extrapolates only as far as the course of its predictions is steady.

A multistep solver draws a line through the last two predictions of x_0 and goes on along it. Where guidance is large
the flow is stiff: predictions swing to and fro from step to step, and the line feeds the swing. The cosine of the angle
between the last two changes tells: it is -1 in a swing.
"""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin  # noqa: F401  # by which diffusers knows what this is
from torch import Tensor


class LimitedDPMSolverScheduler(DPMSolverMultistepScheduler):
    """Of a step's second order each picture gets the share 1 + cosine, at most 1: all of it where nothing swings."""

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        super().set_timesteps(*args, **kwargs)
        self.last_change: Tensor | None = None

    def multistep_dpm_solver_second_order_update(
        self, model_output_list: list[Tensor], *args: Any, sample: Any = None, **kwargs: Any
    ) -> Tensor:
        change = model_output_list[-1] - model_output_list[-2]
        last, self.last_change = self.last_change, change
        first_order = self.dpm_solver_first_order_update(model_output_list[-1], *args, sample=sample, **kwargs)
        if last is None:
            return first_order
        second = super().multistep_dpm_solver_second_order_update(model_output_list, *args, sample=sample, **kwargs)
        cosine = F.cosine_similarity(change.flatten(1).float(), last.flatten(1).float())
        share = (1 + cosine).clamp(max=1).view(-1, 1, 1, 1)
        return torch.lerp(first_order, second, share)
