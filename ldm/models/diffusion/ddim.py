"""The path from which scripts import LDM's DDIMSampler."""

from ldm.legacy.samplers import DDIMSampler as DDIMSampler
