"""The path from which scripts import LDM's DDIMSampler."""

from ldm.legacy.samplers import DDIMSampler

__all__ = ["DDIMSampler"]
