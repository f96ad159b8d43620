"""DPM-Solver++(2M) (Lu et al. 2022, "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Models")."""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.diffusion.samplers.base import Sampler, SamplerState
from ldm.ranges import NumSteps, Spacing


class DPMSolverSampler(Sampler):
    """The second-order multistep solver of the data prediction (Algorithm 2); 15 to 25 steps are usually enough.

    The first step is of first order, and the last one ends at the x0 estimate.

    Args:
        num_steps: S, the number of steps aimed at.
        spacing: ``uniform`` or ``quad``, see ``spaced_timesteps``.
    """

    def __init__(self, num_steps: NumSteps = 20, spacing: Spacing = "uniform") -> None:
        super().__init__(num_steps, spacing)

    def step(self, state: SamplerState) -> Tensor:
        if state.is_last:
            return state.x0
        h = _half_log_snr(state.abar_prev) - _half_log_snr(state.abar)
        x0 = state.x0
        if state.earlier:
            t_last, _, x0_last = state.earlier[-1]
            h_last = _half_log_snr(state.abar) - _half_log_snr(state.schedule.alphas_cumprod[t_last])
            x0 = x0 + (x0 - x0_last) * h / (2 * h_last)
        ratio = torch.sqrt((1 - state.abar_prev) / (1 - state.abar))
        return ratio * state.x - torch.sqrt(state.abar_prev) * torch.expm1(-h) * x0


def _half_log_snr(abar: Tensor) -> Tensor:
    """Return lambda = log(sqrt(abar) / sqrt(1 - abar))."""
    return 0.5 * (torch.log(abar) - torch.log1p(-abar))
