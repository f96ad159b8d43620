"""Options of pictures (``log_images_kwargs``), compared with the signatures of the functions that draw them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytorch_lightning as pl

from ldm.diffusion.samplers import build_sampler
from ldm.legacy import sampling_options
from ldm.models.diffusion.pictures import OPTIONS_ELSEWHERE, latent_diffusion_pictures
from ldm.util import ConfigError, did_you_mean, mismatch

_NOT_OPTIONS = ("self", "model", "batch", "split")


def check_picture_options(model: pl.LightningModule, options: Mapping[str, Any]) -> None:
    """Raise a ``ConfigError`` for an option that no function of a model's pictures takes, or an unfit value.

    Names are compared if all of these functions are of this package and list their options.
    """
    functions = list(dict.fromkeys(_functions(model)))
    parameters = {}
    for function in functions:
        parameters |= {name: each for name, each in inspect.signature(function).parameters.items()}
    open_names = [name for name, each in parameters.items() if each.kind == each.VAR_KEYWORD]
    known = [name for name in parameters if name not in (*_NOT_OPTIONS, *open_names)]
    is_listed = not open_names or latent_diffusion_pictures in functions
    is_listed &= all(function.__module__.startswith("ldm.") for function in functions)
    given = sampling_options(options)
    if given.get("sampler") is not None:
        build_sampler(given["sampler"])
    for name, value in given.items():
        if name in known:
            if misfit := mismatch(str(parameters[name].annotation), value):
                raise ConfigError(f"{name}: {misfit}. Correct the value")
        elif is_listed and name not in (*OPTIONS_ELSEWHERE, "split"):
            found = f"got an unknown one.{did_you_mean(name, known)} Accepted: {', '.join(known)}"
            raise ConfigError(f"{name}: expected an option of the pictures of {type(model).__name__}, {found}")


def _functions(model: pl.LightningModule) -> Iterator[Callable[..., Any]]:
    """Yield the methods of a model that draw, base classes first, and the functions of this package that they call."""
    for kind in reversed(type(model).__mro__):
        for name in ("log_images", "draw_pictures"):
            if name in vars(kind):
                yield from _with_called(inspect.unwrap(vars(kind)[name]))


def _with_called(function: Any) -> Iterator[Callable[..., Any]]:
    for name in function.__code__.co_names:
        if name.endswith("_pictures") and inspect.isfunction(called := function.__globals__.get(name)):
            if "model" in inspect.signature(called).parameters:
                yield from _with_called(called)
    yield function
