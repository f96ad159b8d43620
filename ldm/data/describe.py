"""Properties of a data set that models take their sizes and words from (``${data:KEY}`` in a config)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ldm.data.traits import missing_vocabulary_of, unwrap, vocabulary_of
from ldm.util import ConfigError, did_you_mean


def _vocabulary(dataset: Any) -> dict[str, Any]:
    vocabulary = vocabulary_of(dataset)
    if vocabulary is None and (reason := missing_vocabulary_of(dataset)):
        raise ConfigError(f"expected a data set with a vocabulary. {reason}")
    if vocabulary is None:
        raise ConfigError(
            f"expected a data set with attributes, got {type(unwrap(dataset)).__name__} without. Give it a table "
            "(attributes:), or use a method that needs none, such as DisDiff or EncDiff"
        )
    return vocabulary.to_dict()


def _side(dataset: Any) -> int:
    item = dataset[0] if len(dataset) else None
    shape = np.shape(item["image"]) if isinstance(item, Mapping) and "image" in item else ()
    if len(shape) not in (2, 3) or shape[0] != shape[1]:
        raise ConfigError(
            f"expected square images of shape (H, W, C) as the entry 'image' of items, got "
            f"{tuple(shape) or (list(item) if isinstance(item, Mapping) else item)}. Set the size in the model"
        )
    return int(shape[0])


PROPERTIES: dict[str, Callable[[Any], Any]] = {
    "image_size": _side,  # H = W in pixels
    "vocabulary": _vocabulary,  # AttributeVocabulary.to_dict()
    "num_attributes": lambda dataset: len(_vocabulary(dataset)["factor_names"]),  # U
    "num_images": len,
}


def describe(dataset: Any, key: str) -> Any:
    """Return one of ``PROPERTIES`` of a data set.

    Raises:
        ConfigError: the key is unknown, or the data set does not have the property.
    """
    if key not in PROPERTIES:
        raise ConfigError(f"expected one of {', '.join(PROPERTIES)}, got {key!r}.{did_you_mean(key, PROPERTIES)}")
    return PROPERTIES[key](dataset)
