"""Parameterizations of the network's output: noise, clean image, or velocity.

One class per parameterization. All maps take x (B, C, H, W) and time steps t (B,) int64. With a new class, add it to
``PARAMETERIZATIONS`` and its name to ``InputOptions``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ldm.data.options import require_choice
from ldm.diffusion.schedule import NoiseSchedule, extract


class Parameterization(ABC):
    """Training target of a network, and the conversion of its output to x_0 and to the noise."""

    name: str

    @abstractmethod
    def target(self, schedule: NoiseSchedule, x_start: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the training target for clean x_start and its noise, (B, C, H, W)."""

    @abstractmethod
    def to_x0(self, schedule: NoiseSchedule, x_t: Tensor, t: Tensor, prediction: Tensor) -> Tensor:
        """Return the estimate of x_0 that corresponds to a network output at x_t, (B, C, H, W)."""

    @abstractmethod
    def to_eps(self, schedule: NoiseSchedule, x_t: Tensor, t: Tensor, prediction: Tensor) -> Tensor:
        """Return the estimate of the noise that corresponds to a network output at x_t, (B, C, H, W)."""

    @abstractmethod
    def vlb_weights(self, schedule: NoiseSchedule) -> Tensor:
        """Return the weights that turn the simple loss into the variational bound, (T,)."""

    @abstractmethod
    def sub_gradient_scale(self, schedule: NoiseSchedule, t: Tensor, like: Tensor, training: bool) -> Tensor:
        """Return the factor of a sub-gradient in the prediction, (B, 1, 1, 1).

        Args:
            schedule: the constants.
            t: (B,) time steps.
            like: (B, C, H, W) a tensor of the prediction's shape.
            training: whether the prediction enters the training loss; PDAE uses another factor there.
        """


class Eps(Parameterization):
    """The network predicts the noise (DDPM, Ho et al. 2020)."""

    name = "eps"

    def target(self, schedule: NoiseSchedule, x_start: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return noise

    def to_x0(self, schedule: NoiseSchedule, x_t: Tensor, t: Tensor, prediction: Tensor) -> Tensor:
        return schedule.predict_start_from_noise(x_t, t, prediction)

    def to_eps(self, schedule: NoiseSchedule, x_t: Tensor, t: Tensor, prediction: Tensor) -> Tensor:
        return prediction

    def vlb_weights(self, schedule: NoiseSchedule) -> Tensor:
        abar, betas = schedule.alphas_cumprod, schedule.betas
        weights = betas**2 / (2 * schedule.posterior_variance * (1 - betas) * (1 - abar))
        return _with_finite_start(weights)

    def sub_gradient_scale(self, schedule: NoiseSchedule, t: Tensor, like: Tensor, training: bool) -> Tensor:
        """Return PDAE's factor: ``ddim_coef``, in training ``shift_coef`` (Zhang et al. 2022, Eq. 8 and 11)."""
        return extract(schedule.shift_coef if training else schedule.ddim_coef, t, like)


class X0(Parameterization):
    """The network predicts the clean image."""

    name = "x0"

    def target(self, schedule: NoiseSchedule, x_start: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return x_start

    def to_x0(self, schedule: NoiseSchedule, x_t: Tensor, t: Tensor, prediction: Tensor) -> Tensor:
        return prediction

    def to_eps(self, schedule: NoiseSchedule, x_t: Tensor, t: Tensor, prediction: Tensor) -> Tensor:
        return schedule.predict_noise_from_start(x_t, t, prediction)

    def vlb_weights(self, schedule: NoiseSchedule) -> Tensor:
        """Return LDM's weights, whose denominator is ``2 - abar`` and not ``2 (1 - abar)``."""
        abar = schedule.alphas_cumprod
        return _with_finite_start(0.5 * torch.sqrt(abar) / (2 - abar))

    def sub_gradient_scale(self, schedule: NoiseSchedule, t: Tensor, like: Tensor, training: bool) -> Tensor:
        """Return sqrt(1 - abar): the sub-gradient is in units of the clean latent and grows with the noise."""
        return extract(schedule.sqrt_one_minus_alphas_cumprod, t, like)


class Velocity(Parameterization):
    """The network predicts v = sqrt(abar) eps - sqrt(1 - abar) x_0 (Salimans & Ho 2022, Appendix D)."""

    name = "v"

    def target(self, schedule: NoiseSchedule, x_start: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        signal, deviation = self._rotation(schedule, t, x_start)
        return signal * noise - deviation * x_start

    def to_x0(self, schedule: NoiseSchedule, x_t: Tensor, t: Tensor, prediction: Tensor) -> Tensor:
        signal, deviation = self._rotation(schedule, t, x_t)
        return signal * x_t - deviation * prediction

    def to_eps(self, schedule: NoiseSchedule, x_t: Tensor, t: Tensor, prediction: Tensor) -> Tensor:
        signal, deviation = self._rotation(schedule, t, x_t)
        return signal * prediction + deviation * x_t

    def vlb_weights(self, schedule: NoiseSchedule) -> Tensor:
        """Return ones, as Stable Diffusion 2 does."""
        return torch.ones_like(schedule.betas)

    def sub_gradient_scale(self, schedule: NoiseSchedule, t: Tensor, like: Tensor, training: bool) -> Tensor:
        """Return -1, the velocity of the change that :class:`X0` makes to the clean latent."""
        return extract(-torch.ones_like(schedule.betas), t, like)

    def _rotation(self, schedule: NoiseSchedule, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        signal = extract(schedule.sqrt_alphas_cumprod, t, like)
        return signal, extract(schedule.sqrt_one_minus_alphas_cumprod, t, like)


PARAMETERIZATIONS: dict[str, Parameterization] = {kind.name: kind for kind in (Eps(), X0(), Velocity())}


def parameterization(name: str) -> Parameterization:
    """Return a parameterization by name.

    Raises:
        ConfigError: the name is unknown.
    """
    require_choice("model.params.parameterization", name, PARAMETERIZATIONS)
    return PARAMETERIZATIONS[name]


def _with_finite_start(weights: Tensor) -> Tensor:
    """Replace the first weight by the second: the posterior variance at t = 0 is zero."""
    weights[0] = weights[1]
    return weights
