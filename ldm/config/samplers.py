"""Samplers and noise schedule of a config, compared with each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ldm.config.loading import Config
from ldm.config.signatures import find_signature
from ldm.diffusion.sampler_names import SAMPLER_CLASSES
from ldm.legacy import resolve_target, sampling_options
from ldm.util import ConfigError, did_you_mean, mismatch


def check_samplers(config: Config) -> None:
    """Check names of samplers, and numbers of their steps against the time steps of the model.

    Raises:
        ConfigError: a sampler does not exist or has more steps than the model, or options of the schedule disagree.
    """
    section = config.section("model")
    target, params = resolve_target(str(section.get("target"))), section.get("params") or {}
    if not target.startswith("ldm."):
        return
    signature = find_signature(target)
    num_timesteps = None
    if signature is not None and "timesteps" in signature.required:
        _check_schedule(config, params)
        betas = params.get("given_betas")
        num_timesteps = params.get("timesteps", 1000) if betas is None else len(betas)
    for key, options in _places(config, params):
        given = options.get("sampler")
        if isinstance(given, str) and given not in SAMPLER_CLASSES and "." not in given:
            known = f"{', '.join(SAMPLER_CLASSES)} or a dotted path"
            hint = did_you_mean(given, SAMPLER_CLASSES) or " Correct the name"
            raise config.error(f"{key}.sampler", f"expected {known}, got {given!r}.{hint}")
        steps = {} if key == "model.params" else {name: options.get(name) for name in ("ddim_steps", "num_steps")}
        try:
            sampling_options({} if key == "model.params" else options)
        except ConfigError as error:
            raise config.error(key, str(error).removeprefix("sampling: ")) from error
        if isinstance(given, Mapping) and resolve_target(str(given.get("target"))).startswith("ldm."):
            steps["sampler.params.num_steps"] = (given.get("params") or {}).get("num_steps")
        for name, count in steps.items():
            if problem := mismatch("SamplerSteps | None", count):
                raise config.error(f"{key}.{name}", f"{problem}. Correct the value")
            if num_timesteps is not None and count is not None and count > num_timesteps:
                expected = f"expected 2 to {num_timesteps} (the model's timesteps)"
                raise config.error(f"{key}.{name}", f"{expected}, got {count}. Use fewer steps")


def _places(config: Config, params: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the options that may contain a sampler, with their keys."""
    yield "model.params", params
    for name, entry in (config.section("lightning").get("callbacks") or {}).items():
        if entry is not None and resolve_target(str(entry.get("target", "ldm."))).startswith("ldm."):
            options = entry.get("params") or {}
            yield f"lightning.callbacks.{name}.params", options
            if isinstance(pictures := options.get("log_images_kwargs"), Mapping):
                yield f"lightning.callbacks.{name}.params.log_images_kwargs", pictures


def _check_schedule(config: Config, params: Mapping[str, Any]) -> None:
    betas, timesteps = params.get("given_betas"), params.get("timesteps")
    if betas is not None:
        if timesteps not in (None, len(betas)):
            message = f"expected {timesteps} entries (timesteps), got {len(betas)}. Make them match"
            raise config.error("model.params.given_betas", message)
    elif params.get("beta_schedule") != "cosine":
        start, end = params.get("linear_start", 1e-4), params.get("linear_end", 2e-2)
        if start > end:
            message = f"expected at most {end} (linear_end), got {start}. Noise grows with the time step"
            raise config.error("model.params.linear_start", message)
