"""The interface of all samplers, and the loop they share.

A sampler turns noise into a sample with a denoiser, a function ``(x (B, C, H, W), t (B,) int64) -> eps (B, C, H, W)``.
Conditions and guidance are part of the denoiser; a sampler depends on the schedule alone. A new sampler implements
:meth:`Sampler.step`, which is one update from x_t to x_{t'}, and is selected in YAML by ``{target, params}``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ldm.data.options import require_choice
from ldm.diffusion.schedule import NoiseSchedule
from ldm.ranges import Count, NumSteps, Spacing, Weight
from ldm.util import ConfigError

Denoiser = Callable[[Tensor, Tensor], Tensor]
StepCallback = Callable[["SamplerStep"], None]


class SamplerStep(NamedTuple):
    """Argument of a callback after each step.

    Attributes:
        position: number of steps that remain.
        timestep: t that was visited.
        x: (B, C, H, W) the new state.
        pred_x0: (B, C, H, W) estimate of the clean sample.
    """

    position: int
    timestep: int
    x: Tensor
    pred_x0: Tensor


class Inpainting(NamedTuple):
    """Region to keep: where ``mask`` (B, 1, H, W) is one, the sample follows the noised ``x0`` (B, C, H, W)."""

    mask: Tensor
    x0: Tensor


@dataclass(frozen=True)
class Hooks:
    """Changes to the state of a sampler while it runs.

    Attributes:
        quantize_x0: maps the x0 estimate of each step onto a codebook.
        inpainting: region of a given image to keep.
    """

    quantize_x0: Callable[[Tensor], Tensor] | None = None
    inpainting: Inpainting | None = None


@dataclass
class SamplerState:
    """State of one run of a sampler, as :meth:`Sampler.step` receives it.

    Attributes:
        schedule: constants of the noise schedule.
        denoise: the denoiser.
        timesteps: (S,) visited time steps, ascending.
        x: (B, C, H, W) x_t.
        position: index of t in ``timesteps``; steps run from S - 1 down to 0.
        eps: noise estimate at (x, t).
        x0: estimate of the clean sample at (x, t).
        earlier: up to three earlier steps as (t, eps, x0), newest last; ``eps`` as the network predicted it.
        hooks: quantization and inpainting.
    """

    schedule: NoiseSchedule
    denoise: Denoiser
    timesteps: np.ndarray
    x: Tensor
    position: int = 0
    eps: Tensor = field(default_factory=lambda: torch.empty(0))
    x0: Tensor = field(default_factory=lambda: torch.empty(0))
    earlier: list[tuple[int, Tensor, Tensor]] = field(default_factory=list)
    hooks: Hooks = field(default_factory=Hooks)

    @property
    def t(self) -> int:
        """The time step of ``x``."""
        return int(self.timesteps[self.position])

    @property
    def t_prev(self) -> int:
        """The time step to go to; 0 after the last visited one, as in LDM."""
        return int(self.timesteps[self.position - 1]) if self.position else 0

    @property
    def is_last(self) -> bool:
        """Whether this is the last step."""
        return self.position == 0

    @property
    def abar(self) -> Tensor:
        """Cumulative alpha at ``t``, ()."""
        return self.schedule.alphas_cumprod[self.t]

    @property
    def abar_prev(self) -> Tensor:
        """Cumulative alpha at ``t_prev``, ()."""
        return self.schedule.alphas_cumprod[self.t_prev]

    def batch_of(self, t: int) -> Tensor:
        """Return ``t`` for every sample, (B,) int64."""
        return torch.full((len(self.x),), t, device=self.x.device, dtype=torch.long)


class Sampler:
    """A way from noise to a sample; a subclass implements :meth:`step`, or replaces :meth:`sample`.

    Args:
        num_steps: S, the number of steps; ``None`` visits all time steps of the schedule.
        spacing: ``uniform`` or ``quad``, see :func:`spaced_timesteps`.
        temperature: factor of the noise that a stochastic step adds.
    """

    num_steps: Count | None = 50
    spacing: str = "uniform"
    temperature: float = 1.0

    def __init__(
        self, num_steps: NumSteps | None = 50, spacing: Spacing = "uniform", temperature: Weight = 1.0
    ) -> None:
        self.num_steps, self.spacing, self.temperature = num_steps, spacing, temperature

    @property
    def takes_hooks(self) -> bool:
        """Whether :meth:`sample` supports quantization and inpainting; a subclass may replace it without them."""
        return "hooks" in inspect.signature(self.sample).parameters

    def step(self, state: SamplerState) -> Tensor:
        """Return x at ``state.t_prev``, (B, C, H, W)."""
        raise NotImplementedError(f"{type(self).__name__}: expected a method step(state) or sample(...)")

    def timesteps(self, num_timesteps: int) -> np.ndarray:
        """Return the visited time steps of a schedule with T = ``num_timesteps``, (S,) int64 ascending.

        Raises:
            ConfigError: more steps than time steps, or an unknown spacing.
        """
        if self.num_steps is None:
            return np.arange(num_timesteps)
        return spaced_timesteps(self.num_steps, num_timesteps, self.spacing)

    def num_evaluations(self, num_timesteps: int) -> int:
        """Return how often one sample calls the denoiser."""
        return len(self.timesteps(num_timesteps))

    def check(self, schedule: NoiseSchedule, timesteps: np.ndarray) -> None:
        """Raise a ``ConfigError`` if the options do not fit the schedule."""

    def predict_x0(self, state: SamplerState) -> Tensor:
        """Return the estimate of the clean sample for ``state.eps``."""
        return (state.x - torch.sqrt(1 - state.abar) * state.eps) / torch.sqrt(state.abar)

    def estimate_x0(self, state: SamplerState) -> Tensor:
        """Return :meth:`predict_x0`, on the codebook if the hooks ask for it."""
        x0 = self.predict_x0(state)
        return x0 if state.hooks.quantize_x0 is None else state.hooks.quantize_x0(x0)

    def combine(self, state: SamplerState) -> Tensor:
        """Return the noise estimate to use; multistep samplers combine it with earlier ones."""
        return state.eps

    @torch.no_grad()
    def sample(
        self,
        denoise: Denoiser,
        x_T: Tensor,
        schedule: NoiseSchedule,
        callback: StepCallback | None = None,
        hooks: Hooks | None = None,
    ) -> Tensor:
        """Sample.

        Args:
            denoise: see the module's documentation.
            x_T: (B, C, H, W) standard normal noise.
            schedule: the schedule the denoiser was trained with, on the device of ``x_T``.
            callback: called after each step.
            hooks: quantization and inpainting.

        Returns:
            (B, C, H, W).

        Raises:
            ConfigError: the options do not fit the schedule.
        """
        hooks = hooks or Hooks()
        state = SamplerState(schedule, denoise, self.timesteps(schedule.num_timesteps), x_T, hooks=hooks)
        self.check(schedule, state.timesteps)
        for position in reversed(range(len(state.timesteps))):
            state.position = position
            if hooks.inpainting is not None:
                state.x = _keep_known(state.x, hooks.inpainting, state.abar)
            predicted = state.eps = denoise(state.x, state.batch_of(state.t))
            state.eps = self.combine(state)
            state.x0 = self.estimate_x0(state)
            state.x = self.step(state)
            state.earlier = [*state.earlier[-2:], (state.t, predicted, state.x0)]
            if callback is not None:
                callback(SamplerStep(state.position, state.t, state.x, state.x0))
        return state.x


def spaced_timesteps(num_steps: Count, num_timesteps: int, spacing: str = "uniform") -> np.ndarray:
    """Return a subsequence of the time steps (Song et al. 2021, section 4.2, with LDM's offset of 1).

    ``uniform`` has a distance of T // S and so may hold more than S entries, as in LDM; entries beyond T - 1 are
    dropped. ``quad`` visits early time steps more densely, and may hold fewer.

    Returns:
        int64, ascending.

    Raises:
        ConfigError: more steps than time steps, or an unknown spacing.
    """
    if not 2 <= num_steps <= num_timesteps:  # LDM's spacing of one step would visit t = 1 alone
        raise ConfigError(
            f"sampler: expected num_steps between 2 and {num_timesteps} (the model's timesteps), got {num_steps}. "
            "Change sampler.params.num_steps, or -c on command lines"
        )
    require_choice("sampler.params.spacing", spacing, ("uniform", "quad"))
    if spacing == "uniform":
        steps = np.arange(0, num_timesteps, num_timesteps // num_steps) + 1
    else:
        steps = (np.linspace(0, np.sqrt(num_timesteps * 0.8), num_steps) ** 2).astype(np.int64) + 1
    return np.unique(steps[steps < num_timesteps])


def _keep_known(x: Tensor, inpainting: Inpainting, abar: Tensor) -> Tensor:
    """Replace the known part of x_t by the given image noised to the same level."""
    known = torch.sqrt(abar) * inpainting.x0 + torch.sqrt(1 - abar) * torch.randn_like(x)
    return known * inpainting.mask + (1 - inpainting.mask) * x
