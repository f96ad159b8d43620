"""Checks of a run before it trains or writes anything: data, shapes, callbacks, memory and disk."""

from ldm.training.preflight.check import preflight

__all__ = ["preflight"]
