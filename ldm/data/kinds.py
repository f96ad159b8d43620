"""Data sets by a short name, for command lines: the class of each, and its images if they can be converted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ldm.data.factors import cars3d, dsprites, factor_space, mpi3d, shapes3d, smallnorb
from ldm.data.formats.image_sources import ImageSource
from ldm.data.options import require_choice
from ldm.util import UserError, instantiate_from_config


@dataclass(frozen=True)
class Kind:
    """Data set that has a short name."""

    target: str  # dotted path of its class
    open_source: Callable[..., ImageSource] | None = None  # opens its images, if they can be converted
    arrays: Callable[[], Mapping[str, np.ndarray]] = dict  # other arrays of a converted HDF5 file by name


def _shapes3d_source(path: str | None) -> ImageSource:
    source, values = shapes3d.open_source(path)
    if values is not None:
        raise UserError(
            f"{source.path}: expected all {factor_space('shapes3d').size} images, got a part of 3dshapes. A part is "
            "read without conversion."
        )
    return source


def _shapes3d_labels() -> dict[str, np.ndarray]:
    return {"labels": shapes3d.labels_of(np.arange(factor_space("shapes3d").size))}


KINDS: dict[str, Kind] = {
    "shapes3d": Kind("ldm.data.factors.shapes3d.Shapes3D", _shapes3d_source, _shapes3d_labels),
    "mpi3d": Kind("ldm.data.factors.mpi3d.MPI3D", mpi3d.open_source),
    "cars3d": Kind("ldm.data.factors.cars3d.Cars3D", cars3d.open_source),
    "dsprites": Kind("ldm.data.factors.dsprites.DSprites", dsprites.open_source),
    "smallnorb": Kind("ldm.data.factors.smallnorb.SmallNORB", smallnorb.open_source),
    "world": Kind("ldm.data.world.World3D"),
    "celeba": Kind("ldm.data.formats.celeba.CelebA"),
    "ffhq": Kind("ldm.data.formats.lmdb_sets.FFHQ"),
    "lsun": Kind("ldm.data.formats.lmdb_sets.LSUN"),
    "lmdb": Kind("ldm.data.formats.lmdb_text.LMDBImages"),
    "text-lmdb": Kind("ldm.data.formats.lmdb_text.LMDBTextImages"),
    "array": Kind("ldm.data.formats.h5_text.ArrayImages"),
    "text-h5": Kind("ldm.data.formats.h5_text.H5TextImages"),
    "folder": Kind("ldm.data.formats.folder.ImageFolder"),
}


def build_kind(name: str, options: Mapping[str, Any]) -> Any:
    """Return the data set of a short name.

    Raises:
        ConfigError: the name or an option is unknown.
        UserError: files are missing or damaged.
    """
    require_choice("data set", name, KINDS)
    return instantiate_from_config({"target": KINDS[name].target, "params": dict(options)})
