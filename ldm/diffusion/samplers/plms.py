"""Pseudo linear multistep sampling (PLMS; Liu et al. 2022, "Pseudo Numerical Methods for Diffusion Models")."""

from __future__ import annotations

from torch import Tensor

from ldm.diffusion.samplers.base import SamplerState
from ldm.diffusion.samplers.ddim import DDIMSampler
from ldm.ranges import NumSteps, Spacing

# Adams-Bashforth coefficients of the newest noise estimates, newest first, and their divisor.
_COEFFICIENTS = {2: ((3, -1), 2), 3: ((23, -16, 5), 12), 4: ((55, -59, 37, -9), 24)}


class PLMSSampler(DDIMSampler):
    """PLMS: DDIM's deterministic step with a combination of the four newest noise estimates (Eq. 9 and 12).

    The first step evaluates the network twice, as in LDM's ``PLMSSampler`` (one step of Heun's method).

    Args:
        num_steps: S, the number of steps aimed at.
        spacing: ``uniform`` or ``quad``, see ``spaced_timesteps``.
    """

    def __init__(self, num_steps: NumSteps = 50, spacing: Spacing = "uniform") -> None:
        super().__init__(num_steps, eta=0.0, spacing=spacing)

    def num_evaluations(self, num_timesteps: int) -> int:
        return super().num_evaluations(num_timesteps) + 1

    def combine(self, state: SamplerState) -> Tensor:
        newest_first = [state.eps, *(eps for _, eps, _ in reversed(state.earlier))]
        if len(newest_first) == 1:
            state.x0 = self.estimate_x0(state)
            ahead = state.denoise(self.step(state), state.batch_of(state.t_prev if not state.is_last else state.t))
            return (state.eps + ahead) / 2
        factors, divisor = _COEFFICIENTS[len(newest_first)]
        total = factors[0] * newest_first[0]
        for factor, eps in zip(factors[1:], newest_first[1:]):
            total = total + factor * eps
        return total / divisor
