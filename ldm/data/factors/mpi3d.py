"""MPI3D: a robot arm holding an object, drawn, rendered or photographed (Gondal et al., 2019).

Layout of the published files: ``images`` (1036800, 64, 64, 3) uint8 in an .npz; the complex set has 460,800.
"""

from __future__ import annotations

import os
from typing import Any

from ldm.data.factors import factor_space
from ldm.data.factors.stored import StoredFactors
from ldm.data.formats.image_sources import ImageArray
from ldm.data.places import find_source
from ldm.util import ConfigError

# variant -> names of its file, the published one first
_FILES = {
    "toy": ("mpi3d_toy",),
    "realistic": ("mpi3d_realistic",),
    "real": ("mpi3d_real",),
    "complex": ("mpi3d_real_complex", "real3d_complicated_shapes_ordered", "mpi3d_complex"),
}


def open_source(path: str | os.PathLike | None = None, variant: str = "toy") -> ImageArray:
    """The images of one of the four sets; a converted file is preferred to the published one.

    Raises:
        ConfigError: an unknown variant.
        UserError: file missing, damaged or of another layout.
    """
    if variant not in _FILES:
        raise ConfigError(f"unknown variant {variant!r} of MPI3D; known: {', '.join(_FILES)}")
    folders = ("", "mpi3d/", f"mpi3d_{variant}/", f"mpi_{variant}/")
    places = [
        f"{folder}{name}{suffix}"
        for suffix in (".npy", ".h5", ".npz")
        for folder in folders
        for name in _FILES[variant]
    ]
    found = find_source(
        f"MPI3D {variant}",
        path,
        places,
        f"download {_FILES[variant][0]}.npz (github.com/rr-learning/disentanglement_dataset)",
    )
    return ImageArray(found)


class MPI3D(StoredFactors):
    """MPI3D (see ``FactorDataset`` for what an item holds and for the other options).

    Uncompressed .npz files are mapped as they are; compressed ones are unpacked once, to the cache or, with
    ``scripts/dataset.py convert``, to a file of one's own.

    Args:
        path: the .npz, .npy or .h5 file or its folder; None takes the folder in the variable ``DATA_ROOT``.
        variant: "toy", "realistic", "real" or "complex".
        size: side of the images in pixels: 64, or 32 (means of 2 x 2 pixels).

    Raises:
        ConfigError: an unknown variant.
        UserError: file missing, damaged, or of another layout or number of images.
    """

    def __init__(
        self, path: str | os.PathLike | None = None, variant: str = "toy", size: int = 64, **options: Any
    ) -> None:
        source = open_source(path, variant)
        space = factor_space("mpi3d_complex" if variant == "complex" else "mpi3d")
        super().__init__(space=space, source=source, size=size, **options)
