"""Sampling settings of earlier configs, as pairs of numbers, translated to a ``sampler`` of ``{target, params}``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ldm.errors import ConfigError

DDIM_SAMPLER = "ldm.diffusion.samplers.DDIMSampler"
DDPM_SAMPLER = "ldm.diffusion.samplers.DDPMSampler"
_STEPS, _ETA = ("ddim_steps", "num_steps"), ("ddim_eta", "eta")


def sampling_options(options: Mapping[str, Any], num_steps: int | None = 200, eta: float = 1.0) -> dict[str, Any]:
    """Replace ``ddim_steps``, ``num_steps``, ``ddim_eta`` and ``eta`` by ``sampler``.

    Args:
        options: keyword arguments of ``log_images`` or of ``EditScore``.
        num_steps: DDIM steps where only eta is given; None means DDPM.
        eta: eta of DDIM where only the number of steps is given.

    Returns:
        The other options, and ``sampler: {target, params}`` if one of the four keys or ``sampler`` was given. A number
        of steps of None (``ddim_steps: null``) selects DDPM, which ignores eta.

    Raises:
        ConfigError: the options contain two names of one setting, or an old name beside ``sampler``.
    """
    result = {key: value for key, value in options.items() if key not in (*_STEPS, *_ETA)}
    given = [key for key in (*_STEPS, *_ETA) if key in options]
    if not given:
        return result
    if "sampler" in result:
        raise ConfigError(f"sampling: expected `sampler` or {', '.join(given)}, got both. Remove {', '.join(given)}")
    for names in (_STEPS, _ETA):
        if all(name in options for name in names):
            raise ConfigError(f"sampling: expected {' or '.join(names)}, got both. Remove one of them")
    num_steps = next((options[name] for name in _STEPS if name in options), num_steps)
    eta = next((options[name] for name in _ETA if name in options), eta)
    if num_steps is None:
        return {**result, "sampler": {"target": DDPM_SAMPLER}}
    return {**result, "sampler": {"target": DDIM_SAMPLER, "params": {"num_steps": num_steps, "eta": eta}}}
