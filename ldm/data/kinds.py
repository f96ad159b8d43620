"""Data sets by a short name, for command lines: what to build, and what is read from disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ldm.data.factors import cars3d, dsprites, factor_space, mpi3d, shapes3d, smallnorb
from ldm.data.formats.image_sources import ImageSource
from ldm.util import ConfigError, UserError, did_you_mean, instantiate_from_config


@dataclass(frozen=True)
class Kind:
    """A data set on disk.

    Attributes:
        target: dotted path of its class.
        open_source: gives its images where they can be converted.
        arrays: what belongs beside the images in a converted HDF5 file, by name.
    """

    target: str
    open_source: Callable[..., ImageSource] | None = None
    arrays: Callable[[], Mapping[str, np.ndarray]] = dict


def _shapes3d_source(path: str | None) -> ImageSource:
    source, values = shapes3d.open_source(path)
    if values is not None:
        raise UserError(
            f"{source.path} holds a part of 3dshapes, which its labels tell: it is read as it is, there is "
            "nothing to convert"
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


def kind_of(name: str) -> Kind:
    """The data set of a short name.

    Raises:
        ConfigError: unknown; the message lists the known ones.
    """
    if name not in KINDS:
        raise ConfigError(f"unknown data set {name!r}; known: {', '.join(KINDS)}.{did_you_mean(name, KINDS)}")
    return KINDS[name]


def build_kind(name: str, options: Mapping[str, Any]) -> Any:
    """Build a data set by its short name.

    Raises:
        ConfigError: unknown name or options.
        UserError: files missing or damaged.
    """
    return instantiate_from_config({"target": kind_of(name).target, "params": dict(options)})
