"""The path from which scripts import LDM's PLMSSampler."""

from ldm.legacy.samplers import PLMSSampler as PLMSSampler
