"""DPM-Solver++ (2M) with a damped second-order term: the default scheduler, `dpmsolver++`.

A multistep solver extrapolates along a line through its last two predictions of x_0. At high guidance the flow is
stiff: the predictions oscillate from step to step, and extrapolation amplifies the oscillation. The cosine of the angle
between the last two changes of the prediction detects it: in an oscillation it is -1.
"""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin  # noqa: F401  # diffusers recognises schedulers by it
from torch import Tensor

# Karras' grid from the pure noise of zero terminal SNR, sigma 4096, would have nearly half its steps where there is
# nothing to see yet. One step leads from there to the sigma at which Stable Diffusion's own schedule begins.
SECOND_SIGMA = 14.6


class LimitedDPMSolverScheduler(DPMSolverMultistepScheduler):
    """Multiplies the second-order term of each image by min(1, 1 + cosine): 1 on a smooth flow, 0 in an oscillation.

    Module and class keep their names, because the model_index.json of existing pipeline folders contains them.
    """

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        super().set_timesteps(*args, **kwargs)
        self.last_change: Tensor | None = None
        steps = self.num_inference_steps
        if self.config.use_flow_sigmas:  # in even steps from pure noise; diffusers begins at 0.999
            level = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
            shift = self.config.flow_shift
            self.sigmas = (shift * level / (1 + (shift - 1) * level)).float()
            self.timesteps = (1000 * self.sigmas[:-1]).to(self.timesteps.device)  # type: ignore[has-type]
        elif self.config.rescale_betas_zero_snr and self.config.use_karras_sigmas:
            all_sigmas = ((1 - self.alphas_cumprod) / self.alphas_cumprod) ** 0.5
            roots = torch.linspace(SECOND_SIGMA ** (1 / 7), all_sigmas[0].item() ** (1 / 7), steps - 1)
            self.sigmas = torch.cat([all_sigmas[-1:], roots**7, torch.zeros(1)])
            known = self._sigma_to_t(self.sigmas[:-1].numpy(), all_sigmas.log().numpy())
            self.timesteps = torch.from_numpy(known).round().long().to(self.timesteps.device)

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
        factor = (1 + cosine).clamp(max=1).view(-1, 1, 1, 1)
        return torch.lerp(first_order, second, factor)
