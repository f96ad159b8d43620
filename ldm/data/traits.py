"""Optional attributes of any torch data set, for code that does not know its class: factor space, vocabulary, memory.

``ImageDataset`` declares all of them; a user's own data set sets those that apply to it.
"""

from __future__ import annotations

from typing import Any

from ldm.data.dataset import WrappedDataset
from ldm.data.factors import FactorSpace
from ldm.data.vocabulary import AttributeVocabulary


def unwrap(dataset: Any) -> Any:
    """Return the data set inside a ``WrappedDataset``; any other object is returned as it is."""
    return dataset.data if isinstance(dataset, WrappedDataset) else dataset


def _trait(dataset: Any, name: str) -> Any:
    return getattr(unwrap(dataset), name, None)


def vocabulary_of(dataset: Any) -> AttributeVocabulary | None:
    """Return the words and phrases of a data set's attributes; None if it has none."""
    return _trait(dataset, "vocabulary")


def missing_vocabulary_of(dataset: Any) -> str:
    """Return the reason why the attributes of a data set make no vocabulary, without a full stop; "" if it has none."""
    return _trait(dataset, "missing_vocabulary") or ""


def space_of(dataset: Any) -> FactorSpace | None:
    """Return the factor space of the whole data set; None if its factors are not known.

    A space without a name gets that of the data set's class.
    """
    return _named(_trait(dataset, "space"), dataset)


def position_space_of(dataset: Any) -> FactorSpace | None:
    """Return the factor space whose row i is the image at position i; ``space_of`` unless a part was selected."""
    return _named(_trait(dataset, "position_space"), dataset) or space_of(dataset)


def is_in_memory(dataset: Any) -> bool:
    """Return whether reading images costs so little that loader processes would only slow it down."""
    return bool(_trait(dataset, "in_memory"))


def _named(space: FactorSpace | None, dataset: Any) -> FactorSpace | None:
    return space.named(type(unwrap(dataset)).__name__) if space is not None and not space.name else space
