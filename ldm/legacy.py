"""The one room that knows the past: names of the reference repositories and what they are called today.

Nothing else in the package spells an old name; without this file only old configs stop loading.
"""

from __future__ import annotations

_PL = "pytorch_lightning"
_CALLBACKS = "ldm.training.callbacks"
_LPIPS_LOSS = "ldm.modules.losses.vqperceptual.VQLPIPSWithDiscriminator"

# What lived in the reference's main.py (and EncDiff's main_val.py).
_MAIN = {
    "DataModuleFromConfig": "ldm.data.module.DataModuleFromConfig",
    "WrappedDataset": "ldm.data.module.WrappedDataset",
    "ImageLogger": f"{_CALLBACKS}.image_logger.ImageLogger",
    "SetupCallback": f"{_CALLBACKS}.setup.SetupCallback",
    "CUDACallback": f"{_CALLBACKS}.cuda.CUDACallback",
    "LearningRateMonitor": f"{_PL}.callbacks.LearningRateMonitor",
}

# Modules of the references that hold nothing but the names above; any other name in them is a slip.
OLD_MODULES = ("main", "main_val")

# Old dotted path -> today's dotted path.
ALIASES: dict[str, str] = {
    **{f"{module}.{name}": today for module in OLD_MODULES for name, today in _MAIN.items()},
    "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator": _LPIPS_LOSS,
    "ldm.modules.losses.VQLPIPSWithDiscriminator": _LPIPS_LOSS,
    f"{_PL}.loggers.TestTubeLogger": "ldm.training.loggers.MetricsCSVLogger",
    f"{_PL}.loggers.test_tube.TestTubeLogger": "ldm.training.loggers.MetricsCSVLogger",
}

# Whole packages that moved: prefix -> prefix. The Lightning distribution has two import names for one code.
PREFIXES: dict[str, str] = {"lightning.pytorch.": f"{_PL}."}


def resolve_target(path: str) -> str:
    """Translate a ``target`` string of LDM, DisDiff, CLIP-DisDiff or EncDiff to today's dotted path.

    Args:
        path: dotted path as written in a config.

    Returns:
        Today's dotted path; ``path`` itself when it needs no translation.
    """
    if path in ALIASES:
        return ALIASES[path]
    for old, today in PREFIXES.items():
        if path.startswith(old):
            return today + path[len(old) :]
    return path
