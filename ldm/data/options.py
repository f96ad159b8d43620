"""Checks of options that several data sets share."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Real
from typing import Any

from ldm.util import ConfigError, did_you_mean


def require_choice(option: str, value: Any, choices: Iterable[Any]) -> None:
    """Raise a ``ConfigError`` unless ``value`` is one of ``choices``; None is written ``null``, as in YAML."""
    choices = list(choices)
    if value not in choices:
        names = ["null" if choice is None else str(choice) for choice in choices]
        raise ConfigError(f"{option}: expected one of {', '.join(names)}; got {value!r}.{did_you_mean(value, names)}")


def require_count(option: str, value: Any, least: int = 1, or_null: bool = False) -> None:
    """Raise a ``ConfigError`` unless ``value`` is an integer of at least ``least``, or None where that is allowed."""
    if or_null and value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        null = " or null" if or_null else ""
        raise ConfigError(f"{option}: expected an integer of at least {least}{null}, got {value!r}.")


def require_share(option: str, value: Any) -> None:
    """Raise a ``ConfigError`` unless ``value`` is a number in [0, 1]."""
    if not isinstance(value, Real) or not 0.0 <= value <= 1.0:
        raise ConfigError(f"{option}: expected a number in [0, 1], got {value!r}.")
