"""Schedules of a config that have no effect because the run is too short."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_WARM_UP = "warm_up_steps"
_START = "_start"


def late_schedules(model: Mapping[str, Any], num_steps: float) -> list[str]:
    """Return a message for each schedule of a model that starts after the last step, or warms up beyond it.

    Args:
        model: the ``model`` section of a config.
        num_steps: steps of the whole run.
    """
    advice = "Train longer (lightning.trainer.max_epochs, max_steps) or lower the value"
    return [
        f"{key}: {'warm-up ends' if key.endswith(_WARM_UP) else 'starts'} at step {step}, but the run ends at step "
        f"{num_steps:.0f}. {advice}"
        for key, step in _steps_of(model, "model")
        if step >= num_steps
    ]


def _steps_of(content: Any, prefix: str) -> Iterator[tuple[str, int]]:
    """Yield dotted key and step of every schedule: ``disc_start``, other integers named ``*_start``, warm-ups."""
    if isinstance(content, list):
        content = dict(enumerate(content))
    for name, value in content.items() if isinstance(content, Mapping) else ():
        key = f"{prefix}.{name}"
        if name == _WARM_UP:
            first = value[0] if isinstance(value, list) and value else value  # of the first cycle
            if isinstance(first, (int, float)):
                yield key, int(first)
        elif str(name).endswith(_START) and type(value) is int:
            term = str(name).removesuffix(_START)
            if content.get(f"{term}_weight") != 0 and content.get(f"{term}_factor") != 0:
                yield key, value
        else:
            yield from _steps_of(value, key)
