"""Sampling request of a command line, its sampler, and the description of a sampler in records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ldm.diffusion.samplers import SAMPLERS, DDIMSampler, Sampler, named_sampler
from ldm.util import ConfigError


@dataclass(frozen=True)
class Request:
    """Samples to draw.

    Raises:
        ConfigError: a number is out of range.
    """

    count: int = 16  # N; with ``swap`` the number of columns
    batch_size: int = 10  # samples at once
    sampler: Sampler = field(default_factory=lambda: DDIMSampler(eta=1.0))
    seed: int = 23  # seed of the noise and of the images that conditions come from
    unit: int | None = None  # add this unit's gradient only (from 0); ``None`` adds all
    swap: bool = False  # draw one row per unit, in which every sample takes that unit of the first one
    texts: tuple[tuple[str, ...], ...] = ()  # one per sample, or one per unit, used in turn; empty takes the data's
    classes: tuple[int, ...] = ()  # one per sample, used in turn; empty takes the data's
    negative_text: str | None = None  # negative prompt of guidance; None uses the null condition
    size: tuple[int, int] | None = None  # height and width in pixels; None takes the data's or the model's
    guidance: float = 1.0  # scale of classifier-free guidance, or of the sub-gradients of text units; 1 for none

    def __post_init__(self) -> None:
        sizes = ("--size", min(self.size or (1,)))
        for name, number in (("-n", self.count), ("--batch_size", self.batch_size), sizes):
            if number < 1:
                raise ConfigError(f"{name}: expected at least 1, got {number}")
        if self.texts and self.classes:
            raise ConfigError("--class: expected either --text or --class, got both. Remove one")
        if self.negative_text is not None and self.guidance == 1:
            raise ConfigError("--negative_text: expected a --guidance_scale other than 1, got 1. Set it, e.g. to 7.5")

    def uses(self, flag: str) -> bool:
        """Return whether an option of the command line was given."""
        given = {"--text": self.texts, "--class": self.classes, "--guidance_scale": self.guidance != 1}
        given |= {"--negative_text": self.negative_text is not None, "--swap": self.swap}
        return bool({**given, "--unit": self.unit is not None}[flag])

    def record(self) -> dict[str, Any]:
        """Return plain values for ``sampling.json``."""
        settings = describe_sampler(self.sampler)
        name = settings.pop("name")
        return {**settings, **vars(self), "sampler": name}


def split_text(word: str) -> tuple[str, ...]:
    """Split ``"red floor | small object"`` into one text per unit."""
    return tuple(part.strip() for part in word.split("|"))


def choose_sampler(name: str | None, defaults: Mapping[str, Any], **options: Any) -> Sampler:
    """Return the sampler that a command line selects.

    Args:
        name: see ``named_sampler``; ``None`` is DDIM.
        defaults: default settings of DDIM; other samplers have their own.
        **options: settings given on the command line; ``None`` where not given.

    Raises:
        ConfigError: the name is unknown, or the sampler does not take an option.
    """
    given = {key: value for key, value in options.items() if value is not None}
    if name in (None, "ddim"):
        return named_sampler("ddim", **{**defaults, **given})
    return named_sampler(name, **given)


def describe_sampler(sampler: Sampler) -> dict[str, Any]:
    """Return ``name`` and settings (``num_steps``, ``eta``, ...) of a sampler as plain values."""
    kind = type(sampler)
    names = {known: name for name, known in SAMPLERS.items()}
    plain = (bool, int, float, str, type(None))
    settings = {key: value for key, value in vars(sampler).items() if isinstance(value, plain) and key[0] != "_"}
    return {"name": names.get(kind, f"{kind.__module__}.{kind.__qualname__}"), **settings}
