"""Samplers and noise schedule of a config, compared with each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ldm.config.loading import Config
from ldm.config.signatures import find_signature
from ldm.legacy import resolve_target, sampling_options
from ldm.util import ConfigError, mismatch


def check_samplers(config: Config) -> None:
    """Raise a ``ConfigError`` for unknown samplers, too many steps, or a schedule that contradicts itself."""
    section = config.section("model")
    target, params = resolve_target(str(section.get("target"))), section.get("params") or {}
    signature, limit = find_signature(target), None
    if target.startswith("ldm.") and signature is not None and "timesteps" in signature.required:
        _check_schedule(config, params)
        betas = params.get("given_betas")
        limit = params.get("timesteps", 1000) if betas is None else len(betas)
    places = {"model.params": params if target.startswith("ldm.") else {}}
    for name, entry in (config.section("lightning").get("callbacks") or {}).items():
        if entry is not None and resolve_target(str(entry.get("target", "ldm."))).startswith("ldm."):
            key, options = f"lightning.callbacks.{name}.params", entry.get("params") or {}
            places |= {key: options, f"{key}.log_images_kwargs": options.get("log_images_kwargs") or {}}
    for key, options in places.items():
        given = options.get("sampler")
        if isinstance(given, str) and "." not in given and (problem := mismatch("SamplerName", given)):
            raise config.error(f"{key}.sampler", f"{problem}. Use one of them, or the dotted path of a class")
        try:
            given = given if key == "model.params" else sampling_options(options).get("sampler")
        except ConfigError as error:
            raise config.error(key, str(error).removeprefix("sampling: ")) from error
        if isinstance(given, Mapping) and resolve_target(str(given.get("target"))).startswith("ldm."):
            name = next((old for old in ("ddim_steps", "num_steps") if old in options), "sampler.params.num_steps")
            count = (given.get("params") or {}).get("num_steps")
            if isinstance(count, int) and not 2 <= count <= (limit or count):
                message = f"expected 2 to {limit} (the model's timesteps), got {count}. Change the number of steps"
                raise config.error(f"{key}.{name}", message)


def _check_schedule(config: Config, params: Mapping[str, Any]) -> None:
    betas, steps = params.get("given_betas"), params.get("timesteps")
    start, end = params.get("linear_start", 1e-4), params.get("linear_end", 2e-2)
    if betas is not None and steps not in (None, len(betas)):
        message = f"expected {steps} entries (timesteps), got {len(betas)}. Make them match"
        raise config.error("model.params.given_betas", message)
    if betas is None and params.get("beta_schedule") != "cosine" and start > end:
        message = f"expected at most {end} (linear_end), got {start}. Noise grows with the time step"
        raise config.error("model.params.linear_start", message)
