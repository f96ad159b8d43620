"""Words of the embedded world's attributes."""

from __future__ import annotations

import functools

import numpy as np

from ldm.data.factors import factor_space
from ldm.data.vocabulary import AttributeVocabulary

HUES = ("red", "orange", "yellow", "green", "mint", "cyan", "azure", "blue", "purple", "pink")
SCALES = ("tiny", "small", "medium", "large")
SHAPES = ("cube", "cylinder", "sphere", "capsule")
SIDES = ("far left", "left", "front", "right", "far right")


def _hue_templates(article: str, thing: str) -> tuple[str, ...]:
    return (f"{{}} {thing}", f"the {thing} is {{}}", f"{article} {thing} in {{}}", f"{{}} coloured {thing}")


@functools.cache
def world_vocabulary() -> AttributeVocabulary:
    """Return the words of the embedded world and of 3dshapes: 10 hues each for floor, wall and object, 4 sizes,
    4 shapes, 5 viewing sides."""
    return AttributeVocabulary(
        factor_names=factor_space("shapes3d").factor_names,
        words=(HUES, HUES, HUES, SCALES, SHAPES, SIDES),
        value_to_word=(range(10), range(10), range(10), np.arange(8) // 2, range(4), np.arange(15) // 3),
        templates=(
            _hue_templates("a", "floor"),
            _hue_templates("a", "wall"),
            _hue_templates("an", "object"),
            ("{} object", "the object is {}", "{} in size"),
            ("{}", "a {}", "the shape is a {}"),
            ("seen from the {}", "viewed from the {}", "the view is from the {}"),
        ),
    )
