"""Groups of the flat options of LDM's configs, and checks of options that need no torch.

LDM writes all options of a model side by side below ``model.params``. :func:`group_options` is the translation of
these flat keys into the dataclasses of this module, which the models keep.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np

from ldm.data.factors import FactorSpace, factor_space
from ldm.diffusion.schedule import make_beta_schedule
from ldm.ranges import Count, Finite, Fraction, NonNegativeFloat, PositiveFloat, PositiveFraction, Size, Weight
from ldm.util import ConfigError, did_you_mean, mismatch


@dataclass(frozen=True)
class ScheduleOptions:
    """Noise schedule.

    Attributes:
        timesteps: T.
        beta_schedule: see ``make_beta_schedule``, with linear_start, linear_end, cosine_s.
        given_betas: (T,) betas in place of a named schedule.
        v_posterior: see ``NoiseSchedule.from_betas``.
    """

    timesteps: Count = 1000
    beta_schedule: Literal["linear", "cosine", "sqrt_linear", "sqrt"] = "linear"
    linear_start: Fraction = 1e-4
    linear_end: PositiveFraction = 2e-2
    cosine_s: NonNegativeFloat = 8e-3
    given_betas: Sequence[Fraction] | None = None
    v_posterior: Fraction = 0.0

    def __post_init__(self) -> None:
        count = self.timesteps if self.given_betas is None else len(self.given_betas)
        if count < 2:
            raise ConfigError(f"model.params.timesteps: expected at least 2, got {count}. LDM uses 1000")

    def betas(self) -> np.ndarray:
        """Return the betas, (T,) float64."""
        if self.given_betas is not None:
            return np.asarray(self.given_betas, dtype=np.float64)
        return make_beta_schedule(self.beta_schedule, self.timesteps, self.linear_start, self.linear_end, self.cosine_s)


@dataclass(frozen=True)
class LossOptions:
    """Training loss.

    Attributes:
        loss_type: ``l1`` or ``l2``.
        l_simple_weight: weight of the simple loss.
        original_elbo_weight: weight of the variational bound.
        learn_logvar: learn one log variance per time step, starting at ``logvar_init``.
        logvar_init: initial log variance.
        noise_bias: time steps are drawn as T u^(1 / noise_bias) with u uniform: 1 is the papers' uniform draw; above 1
            noisy steps, at which a condition matters most, are drawn more often.
        cond_drop_prob: probability to train a sample without its condition, which classifier-free guidance needs. A
            condition stage of classes then uses its last class for none: set ``n_classes`` to one more than the data.
        drop_per_element: drop each element of a condition vector by itself, with that probability, instead of whole
            samples (the CLIP-guided DDPM's reference code).
    """

    loss_type: Literal["l1", "l2"] = "l2"
    l_simple_weight: Weight = 1.0
    original_elbo_weight: Weight = 0.0
    learn_logvar: bool = False
    logvar_init: Finite = 0.0
    noise_bias: Finite = 1.0
    cond_drop_prob: Fraction = 0.0
    drop_per_element: bool = False

    def __post_init__(self) -> None:
        if self.loss_type not in ("l1", "l2"):
            raise ConfigError(f"model.params.loss_type: expected 'l1' or 'l2', got {self.loss_type!r}")
        if self.noise_bias <= 0:
            raise ConfigError(
                f"model.params.noise_bias: expected a positive number (1 is uniform), got {self.noise_bias}"
            )
        if not 0 <= self.cond_drop_prob <= 1:
            raise ConfigError(f"model.params.cond_drop_prob: expected a probability, got {self.cond_drop_prob}")


@dataclass(frozen=True)
class InputOptions:
    """Size, range and parameterization of the denoised tensor.

    Attributes:
        first_stage_key: entry of the batch that holds the images.
        image_size: size of what is denoised, one number or [height, width]. Latent models take it from the data.
        channels: channels of what is denoised.
        clip_denoised: clamp x0 estimates to [-1, 1] while sampling by DDPM; for pixels only.
        parameterization: the network predicts ``eps``, ``x0`` or ``v``.
        log_every_t: distance of the time steps in pictures of the process.
    """

    first_stage_key: str = "image"
    image_size: Size | Sequence[Size] = 256
    channels: Size = 3
    clip_denoised: bool = True
    parameterization: Literal["eps", "x0", "v"] = "eps"
    log_every_t: PositiveFloat = 100

    def __post_init__(self) -> None:
        if len(self.size) != 2 or not all(isinstance(side, int) and side > 0 for side in self.size):
            raise ConfigError(
                f"model.params.image_size: expected a positive number or [height, width], got {self.image_size!r}"
            )

    @property
    def size(self) -> tuple[int, ...]:
        """Height and width of what is denoised, according to the config."""
        return tuple(self.image_size) if isinstance(self.image_size, Sequence) else (self.image_size, self.image_size)


@dataclass(frozen=True)
class WeightOptions:
    """Initial weights and moving average.

    Attributes:
        ckpt_path: weights to start from, without the keys that start with one of ``ignore_keys``.
        ignore_keys: prefixes of keys not to load.
        load_only_unet: load only the network from ``ckpt_path``.
        use_ema: keep a moving average of the network.
        ema_decay: its decay.
    """

    ckpt_path: str | None = None
    ignore_keys: Sequence[str] = ()
    load_only_unet: bool = False
    use_ema: bool = True
    ema_decay: Fraction = 0.9999


def group_options(flat: Mapping[str, Any], *groups: type) -> tuple[Any, ...]:
    """Return one instance of each group, from flat options.

    Args:
        flat: options by name.
        *groups: dataclasses with distinct field names. The check of a config reads their fields from a call
            ``group_options(params, A, B)`` with the ``**params`` of a constructor.

    Raises:
        ConfigError: no group has an option; the nearest name is suggested.
    """
    known = {field.name: group for group in groups for field in fields(group)}
    for name in flat:
        if name not in known:
            raise ConfigError(
                f"model.params: unexpected key {name!r}.{did_you_mean(name, known)} Accepted: {', '.join(known)}"
            )
    return tuple(group(**{name: value for name, value in flat.items() if known[name] is group}) for group in groups)


_CLIP_SIZES = dict.fromkeys("width head_width heads patch_size context_length vocab_size".split(), "Count | None")
_CLIP_SIZES |= dict.fromkeys(("layers", "image_size"), "Count | Sequence[Count]")


def check_judge(params: Mapping[str, Any]) -> None:
    """Raise a ``ConfigError`` for params of an ``AttributeJudge`` that it cannot be built from."""
    space, image_size = params.get("space"), params.get("image_size", 32)
    if (params.get("vocabulary") is None) == (space is None):
        raise ConfigError(
            f"space: expected a vocabulary or a space, got {'neither' if space is None else 'both'}. Set "
            "model.params.vocabulary: ${data:vocabulary}, and remove space"
        )
    if space is not None:
        factor_space(space) if isinstance(space, str) else FactorSpace(**space)
    if isinstance(image_size, int) and image_size < 8:
        raise ConfigError(f"image_size: expected at least 8 pixels, got {image_size}.")


def check_clip(params: Mapping[str, Any]) -> None:
    """Raise a ``ConfigError`` for sizes of the networks of an ``AttributeCLIP`` that are not positive integers."""
    for name in ("vision_cfg", "text_cfg"):
        for key, value in (params.get(name) or {}).items():
            expected = "Count" if (name, key) == ("text_cfg", "layers") else _CLIP_SIZES.get(key, "Any")
            if problem := mismatch(expected, value):
                raise ConfigError(f"{name}.{key}: {problem}. Correct the value")
    text, vision = ({**(params.get(name) or {})} for name in ("text_cfg", "vision_cfg"))
    side, patch = vision.get("image_size", 224), vision.get("patch_size") or 1
    for key, value, total in (
        ("text_cfg.heads", 1 if "hf_model_name" in text else text.get("heads") or 8, text.get("width") or 512),
        ("vision_cfg.patch_size", 1 if isinstance(vision.get("layers"), Sequence) else patch, side),
    ):
        if isinstance(total, int) and total % value:
            raise ConfigError(f"{key}: expected a divisor of {total}, got {value}. Change one of them")


# Class of a module of this package -> check of its params, for the check of a config.
CHECKS = {"AttributeJudge": check_judge, "AttributeCLIP": check_clip}
