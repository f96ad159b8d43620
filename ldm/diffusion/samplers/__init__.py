"""Samplers by name; one module for each.

In YAML a sampler is ``{target: ldm.diffusion.samplers.DDIMSampler, params: {num_steps: 50}}`` or a name below; on
command lines it is ``--sampler NAME``. A class in a file of the user's own is selected by its dotted path.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from ldm.diffusion.samplers.base import (
    Denoiser,
    Hooks,
    Inpainting,
    Sampler,
    SamplerState,
    SamplerStep,
    StepCallback,
    spaced_timesteps,
)
from ldm.diffusion.samplers.ddim import DDIMSampler
from ldm.diffusion.samplers.ddpm import DDPMSampler
from ldm.diffusion.samplers.dpm_solver import DPMSolverSampler
from ldm.diffusion.samplers.plms import PLMSSampler
from ldm.util import ConfigError, did_you_mean, get_obj_from_str, instantiate_from_config

__all__ = [
    "SAMPLERS",
    "DDIMSampler",
    "DDPMSampler",
    "DPMSolverSampler",
    "Denoiser",
    "Hooks",
    "Inpainting",
    "PLMSSampler",
    "Sampler",
    "SamplerState",
    "SamplerStep",
    "StepCallback",
    "build_sampler",
    "named_sampler",
    "spaced_timesteps",
]

SAMPLERS: dict[str, type[Sampler]] = {"ddim": DDIMSampler, "ddpm": DDPMSampler}
SAMPLERS |= {"plms": PLMSSampler, "dpm_solver": DPMSolverSampler}


def build_sampler(given: Sampler | Mapping[str, Any] | str) -> Sampler:
    """Return the sampler that an option describes.

    Args:
        given: a sampler, a ``{target, params}`` mapping, or a name as for :func:`named_sampler`.

    Raises:
        ConfigError: the name is unknown, or the target is not a sampler.
    """
    built = named_sampler(given) if isinstance(given, str) else given
    built = instantiate_from_config(built) if isinstance(built, Mapping) else built
    if not isinstance(built, Sampler):
        raise ConfigError(
            f"sampler: expected a subclass of ldm.diffusion.samplers.Sampler, got {built!r}. Correct the target"
        )
    return built


def named_sampler(name: str, **options: Any) -> Sampler:
    """Return a sampler by name.

    Args:
        name: a key of ``SAMPLERS``, or the dotted path of a class.
        **options: its arguments; those that are ``None`` keep their defaults.

    Raises:
        ConfigError: the name is unknown or not that of a sampler, or the sampler does not take an option.

    Example:
        >>> named_sampler("ddim", num_steps=20, eta=None).num_steps
        20
    """
    if name not in SAMPLERS and "." not in name:
        known = ", ".join(SAMPLERS)
        raise ConfigError(f"sampler: expected one of {known}, got {name!r}.{did_you_mean(name, SAMPLERS)}")
    kind = SAMPLERS[name] if name in SAMPLERS else get_obj_from_str(name)
    if not (inspect.isclass(kind) and issubclass(kind, Sampler)):
        raise ConfigError(f"sampler: expected a subclass of ldm.diffusion.samplers.Sampler, got {name}. Correct it")
    given = {key: value for key, value in options.items() if value is not None}
    known = inspect.signature(kind).parameters
    if foreign := [key for key in given if key not in known]:
        raise ConfigError(
            f"sampler {name}: unexpected option {foreign[0]!r}. Accepted: {', '.join(known) or 'no options'}"
        )
    return kind(**given)
