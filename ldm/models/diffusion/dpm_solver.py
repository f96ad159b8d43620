"""The path from which scripts import LDM's DPMSolverSampler."""

from ldm.legacy.samplers import DPMSolverSampler as DPMSolverSampler
