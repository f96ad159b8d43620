"""Modules of this package that moved: prefixes of dotted paths in configs of earlier versions, and today's prefixes."""

from __future__ import annotations

_FACTORS = ("cars3d", "dsprites", "mpi3d", "shapes3d", "smallnorb")
_FORMATS = ("celeba", "folder", "h5_text", "lmdb_sets", "lmdb_text")
_METHODS = ("disdiff", "clip_disdiff", "encdiff")

MOVED: dict[str, str] = {
    **{f"ldm.data.{name}.": f"ldm.data.factors.{name}." for name in _FACTORS},
    **{f"ldm.data.{name}.": f"ldm.data.formats.{name}." for name in _FORMATS},
    **{f"ldm.models.diffusion.{name}.": f"ldm.models.diffusion.methods.{name}.model." for name in _METHODS},
    "ldm.models.diffusion.pixel_diffusion.": "ldm.models.diffusion.base.",
    "ldm.models.diffusion.latent_diffusion.": "ldm.models.diffusion.latent.",
    "ldm.models.diffusion.unit_diffusion.": "ldm.models.diffusion.units.",
    "ldm.evaluation.edit.": "ldm.evaluation.editing.callback.",
}
