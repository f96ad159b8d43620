"""Words of the attributes of the published factor sets, from their publications.

Sources: MPI3D, Gondal et al. (2019), table of the factors; Cars3D, Reed et al. (2015): 24 rotations in steps of 15
degrees, 4 elevations, 183 cars; dSprites, Matthey et al. (2017); SmallNORB, LeCun et al. (2004): elevations of 30 to 70
degrees in steps of 5, azimuths in steps of 20. Values whose direction is not published have numbers as words.
"""

from __future__ import annotations

from collections.abc import Sequence

from ldm.data.factors import factor_space
from ldm.data.vocabulary import AttributeVocabulary

# One row per factor: words, which share its values evenly and in order, and templates.
_Rows = dict[str, tuple[Sequence[str], Sequence[str]]]

_NUMBERS = [str(number) for number in range(1, 184)]
_COLOUR = ("{} object", "the object is {}", "an object in {}")
_SHAPE = ("{}", "a {}", "the shape is a {}")
_HEIGHTS = ("top", "upper part", "lower part", "bottom")
_MPI3D_SCENE: _Rows = {
    "object_size": (("small", "large"), ("{} object", "the object is {}", "{} in size")),
    "camera_height": (("top", "center", "bottom"), ("camera at the {}", "seen from the {}")),
    "background_color": (("purple", "sea green", "salmon"), ("{} background", "the background is {}")),
    "horizontal_axis": (_NUMBERS[:5], ("horizontal position {}", "horizontal axis at {}")),
    "vertical_axis": (_NUMBERS[:5], ("vertical position {}", "vertical axis at {}")),
}
_WORDS: dict[str, _Rows] = {
    "mpi3d": {
        "object_color": (("white", "green", "red", "blue", "brown", "olive"), _COLOUR),
        "object_shape": (("cone", "cube", "cylinder", "hexagonal prism", "pyramid", "sphere"), _SHAPE),
        **_MPI3D_SCENE,
    },
    "mpi3d_complex": {
        "object_color": (("yellow", "green", "olive", "red"), _COLOUR),
        "object_shape": (("coffee cup", "tennis ball", "croissant", "beer cup"), _SHAPE),
        **_MPI3D_SCENE,
    },
    "cars3d": {
        "elevation": (_NUMBERS[:4], ("elevation {}", "seen from elevation {}")),
        "azimuth": ([str(15 * step) for step in range(24)], ("turned by {} degrees", "azimuth {} degrees")),
        "object": (_NUMBERS, ("car {}", "car number {}")),
    },
    "dsprites": {
        "shape": (("square", "ellipse", "heart"), _SHAPE),
        "scale": (("small", "medium", "large"), ("{} shape", "the shape is {}", "{} in size")),
        "orientation": ([str(45 * step) for step in range(8)], ("turned by {} degrees", "orientation {} degrees")),
        "x_position": (("far left", "left", "right", "far right"), ("on the {}", "the shape is on the {}")),
        "y_position": (_HEIGHTS, ("at the {}", "the shape is at the {}")),
    },
    "smallnorb": {
        "category": (("four-legged animal", "human figure", "airplane", "truck", "car"), _SHAPE),
        "elevation": (
            [str(30 + 5 * step) for step in range(9)],
            ("elevation {} degrees", "seen from {} degrees above"),
        ),
        "azimuth": ([str(20 * step) for step in range(18)], ("turned by {} degrees", "azimuth {} degrees")),
        "lighting": (_NUMBERS[:6], ("lighting {}", "lighting condition {}")),
    },
}


def factor_words(name: str) -> AttributeVocabulary:
    """Return the words of a published factor set, one attribute per latent factor.

    Args:
        name: name of its factor space: "mpi3d", "mpi3d_complex", "cars3d", "dsprites" or "smallnorb".
    """
    space, rows = factor_space(name), _WORDS[name]
    values = [
        [value * len(rows[factor][0]) // size for value in range(size)]
        for factor, size in zip(space.factor_names, space.factors_num_values)
    ]
    words, templates = zip(*(rows[factor] for factor in space.factor_names))
    return AttributeVocabulary(space.factor_names, words, values, templates)
