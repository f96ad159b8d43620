"""Attribute texts: which words name the values of each factor, and how they may be put into phrases.

One unit of text per factor ("red floor", "small object", ...). Several values may share a word (eight sizes are
told in four words), and every word may be phrased in several ways, so that a text encoder learns the word and
not the wording.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ldm.util import ConfigError

HUES = ("red", "orange", "yellow", "green", "mint", "cyan", "azure", "blue", "purple", "pink")
SCALES = ("tiny", "small", "medium", "large")
SHAPES = ("cube", "cylinder", "sphere", "capsule")
SIDES = ("far left", "left", "front", "right", "far right")


class AttributeVocabulary:
    """Words and phrasings of F factors; U = F text units.

    Args:
        factor_names: the F names.
        words: for each factor its attribute words.
        value_to_word: for each factor an int sequence (size_k,), the position in ``words[k]`` of each value.
        templates: for each factor its phrasings, each with one ``{}`` for the word; the first is canonical.

    Raises:
        ConfigError: lengths that do not agree, a template without ``{}``, a word position out of range.

    Example:
        >>> vocabulary = world_vocabulary()
        >>> vocabulary.texts(np.array([[0, 3, 7, 0, 2, 14]]))[0][:3]
        ['red floor', 'green wall', 'blue object']
    """

    def __init__(
        self,
        factor_names: Sequence[str],
        words: Sequence[Sequence[str]],
        value_to_word: Sequence[Sequence[int]],
        templates: Sequence[Sequence[str]],
    ) -> None:
        counts = {len(factor_names), len(words), len(value_to_word), len(templates)}
        if len(counts) != 1:
            raise ConfigError(
                f"vocabulary: {len(factor_names)} factor names, {len(words)} word lists, {len(value_to_word)} "
                f"value maps and {len(templates)} template lists; give one of each per factor"
            )
        self.factor_names = tuple(factor_names)
        self.words = [list(ws) for ws in words]
        self.value_to_word = [np.asarray(v, dtype=np.int64) for v in value_to_word]
        self.templates = [list(ts) for ts in templates]
        for k, name in enumerate(self.factor_names):
            self._check_factor(k, name)
        self._phrases = [
            [[t.format(w) for t in self.templates[k]] for w in self.words[k]] for k in range(self.num_units)
        ]

    def _check_factor(self, k: int, name: str) -> None:
        if not self.templates[k] or any(t.count("{}") != 1 for t in self.templates[k]):
            raise ConfigError(
                f"vocabulary: every template of {name!r} needs exactly one '{{}}' for the word, "
                f"found {self.templates[k]}"
            )
        positions = self.value_to_word[k]
        if not positions.size or positions.min() < 0 or positions.max() >= len(self.words[k]):
            raise ConfigError(
                f"vocabulary: value_to_word of {name!r} must hold positions 0 to "
                f"{len(self.words[k]) - 1}, found {positions.tolist()}"
            )

    @property
    def num_units(self) -> int:
        """U, the number of attribute texts per image: one per factor."""
        return len(self.factor_names)

    def phrases(self, k: int, word: int) -> list[str]:
        """All phrasings of word number ``word`` of factor ``k``, the canonical one first."""
        return list(self._phrases[k][word])

    def word_labels(self, factors: np.ndarray) -> np.ndarray:
        """Word number of every factor value: factors (n, F) int -> (n, F) int64."""
        factors = np.asarray(factors)
        return np.stack([self.value_to_word[k][factors[:, k]] for k in range(self.num_units)], axis=1)

    def texts(self, factors: np.ndarray, rng: np.random.Generator | None = None) -> list[list[str]]:
        """The U attribute texts of each image.

        Args:
            factors: (n, F) int factor values.
            rng: draws a phrasing for each text; None gives the canonical ones.

        Returns:
            n lists of U strings.
        """
        labels = self.word_labels(factors)
        counts = np.array([len(ts) for ts in self.templates])
        if rng is None:
            chosen = np.zeros_like(labels)
        else:
            chosen = (rng.random(labels.shape) * counts).astype(np.int64)
        return [
            [by_word[w][c] for by_word, w, c in zip(self._phrases, word_row, choice_row)]
            for word_row, choice_row in zip(labels.tolist(), chosen.tolist())
        ]

    @staticmethod
    def caption(texts: Sequence[str], units: Sequence[int] | None = None) -> str:
        """One sentence naming the attributes ``units`` (all when None) in that order, joined by ", ".

        Args:
            texts: the U attribute texts of one image.
            units: positions in ``texts``; empty texts (units left unset) are skipped.
        """
        chosen = texts if units is None else [texts[u] for u in units]
        return ", ".join(text for text in chosen if text)

    def all_words(self) -> list[str]:
        """Every single word that any phrase can contain, sorted; punctuation is not a word."""
        phrases = (p for by_word in self._phrases for ps in by_word for p in ps)
        return sorted({word for phrase in phrases for word in re.findall(r"\w+", phrase.lower())})

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, ready for JSON."""
        return {
            "factor_names": list(self.factor_names),
            "words": [list(ws) for ws in self.words],
            "value_to_word": [v.tolist() for v in self.value_to_word],
            "templates": [list(ts) for ts in self.templates],
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> AttributeVocabulary:
        """The inverse of ``to_dict``.

        Raises:
            ConfigError: a key is missing.
        """
        keys = ("factor_names", "words", "value_to_word", "templates")
        missing = [key for key in keys if key not in state]
        if missing:
            raise ConfigError(f"vocabulary: missing {', '.join(missing)}; found the keys {sorted(state)}")
        return cls(*(state[key] for key in keys))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AttributeVocabulary) and self.to_dict() == other.to_dict()

    __hash__ = None


def _hue_templates(article: str, thing: str) -> tuple[str, ...]:
    return (f"{{}} {thing}", f"the {thing} is {{}}", f"{article} {thing} in {{}}", f"{{}} coloured {thing}")


@functools.cache
def world_vocabulary() -> AttributeVocabulary:
    """Words of the embedded world and of 3dshapes: 10 hues each for floor, wall and object, 4 sizes, 4 shapes,
    5 viewing sides."""
    return AttributeVocabulary(
        factor_names=("floor_hue", "wall_hue", "object_hue", "scale", "shape", "orientation"),
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
