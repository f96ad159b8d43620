"""Names of the samplers of this package, for checks that need no torch."""

SAMPLER_CLASSES = {
    "ddim": "DDIMSampler",
    "ddpm": "DDPMSampler",
    "plms": "PLMSSampler",
    "dpm_solver": "DPMSolverSampler",
}
