"""MPI3D: a robot arm holding an object, drawn, rendered or photographed (Gondal et al., 2019).

Layout of the published files: ``images`` (1036800, 64, 64, 3) uint8 in an .npz; the complex set has 460,800 images.
"""

from __future__ import annotations

from typing import Any

from ldm.data.factors import factor_space
from ldm.data.factors.stored import StoredFactors
from ldm.data.factors.words import factor_words
from ldm.data.formats.image_sources import ImageArray
from ldm.data.options import require_choice
from ldm.data.paths import AnyPath, array_names, find_source
from ldm.ranges import Size

# variant -> names of its file, the published one first
_FILES = {
    "toy": ("mpi3d_toy",),
    "realistic": ("mpi3d_realistic",),
    "real": ("mpi3d_real",),
    "complex": ("mpi3d_real_complex", "real3d_complicated_shapes_ordered", "mpi3d_complex"),
}


def open_source(path: AnyPath | None = None, variant: str = "toy") -> ImageArray:
    """Return the images of one of the four variants; a converted file is preferred to the published one."""
    require_choice("variant", variant, _FILES)
    candidates = array_names(_FILES[variant], ["", "mpi3d/", f"mpi3d_{variant}/", f"mpi_{variant}/"])
    next_step = f"download {_FILES[variant][0]}.npz (github.com/rr-learning/disentanglement_dataset)"
    return ImageArray(find_source(f"MPI3D {variant}", path, candidates, next_step))


class MPI3D(StoredFactors):
    """MPI3D (see ``FactorDataset`` for items and further options).

    Uncompressed .npz files are mapped; compressed ones are unpacked once, to the cache or, with
    ``scripts/dataset.py convert``, to another file.

    Args:
        path: the .npz, .npy or .h5 file or its folder; None takes ``DATA_ROOT``.
        variant: "toy", "realistic", "real" or "complex".
        size: side of the images in pixels: 64, or 32 (means of 2 x 2 pixels).

    Raises:
        ConfigError: the variant is unknown.
        UserError: the file is missing or damaged, or its layout or number of images is wrong.
    """

    def __init__(self, path: AnyPath | None = None, variant: str = "toy", size: Size = 64, **options: Any) -> None:
        source = open_source(path, variant)
        published = "mpi3d_complex" if variant == "complex" else "mpi3d"
        space, vocabulary = factor_space(published).named(f"mpi3d_{variant}"), factor_words(published)
        super().__init__(space=space, source=source, size=size, vocabulary=vocabulary, **options)
