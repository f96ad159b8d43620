"""Attribute texts: the words of each factor's values, and the phrases that contain them.

Each factor gives one text unit ("red hat", "small hat", ...). Several values may share a word, and a word may be
phrased in several ways, so that a text encoder learns the word and not the wording.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ldm.data.rows import readable
from ldm.util import ConfigError, instantiate_from_config

UNKNOWN = -1  # value, and word, of an attribute that is not known for an image


class AttributeVocabulary:
    """Words and phrases of F factors; U = F text units.

    Args:
        factor_names: names of the F factors.
        words: attribute words of each factor.
        value_to_word: for each factor k, position in ``words[k]`` of each of its values, (size_k,) int.
        templates: phrases of each factor, each with one ``{}`` for the word; the first one is canonical.

    Raises:
        ConfigError: the lengths differ, a template does not have one ``{}``, or a word position is out of range.

    Example:
        >>> vocabulary = AttributeVocabulary(
        ...     ["size", "shape"], [["small", "large"], ["cube", "ball"]], [[0, 0, 1], [0, 1]], [["{} thing"], ["a {}"]]
        ... )
        >>> vocabulary.texts(np.array([[1, 0], [2, 1]]))
        [['small thing', 'a cube'], ['large thing', 'a ball']]
    """

    def __init__(
        self,
        factor_names: Sequence[str],
        words: Sequence[Sequence[str]],
        value_to_word: Sequence[Sequence[int]],
        templates: Sequence[Sequence[str]],
    ) -> None:
        counts = [len(factor_names), len(words), len(value_to_word), len(templates)]
        if len(set(counts)) != 1:
            raise ConfigError(
                f"vocabulary: expected factor_names, words, value_to_word and templates of one length, got {counts}."
            )
        self.factor_names = tuple(factor_names)
        self.words = [list(ws) for ws in words]
        self.value_to_word = [np.asarray(v, dtype=np.int64) for v in value_to_word]
        self.templates = [list(ts) for ts in templates]
        for k, name in enumerate(self.factor_names):
            self._check_factor(k, name)
        pairs = zip(self.words, self.templates)
        self._phrases = [[[t.replace("{}", str(w)) for t in own] for w in words] for words, own in pairs]

    def _check_factor(self, k: int, name: str) -> None:
        if not self.templates[k] or any(t.count("{}") != 1 for t in self.templates[k]):
            raise ConfigError(
                f"vocabulary: expected templates of {name!r} with exactly one '{{}}' each, got {self.templates[k]}."
            )
        positions = self.value_to_word[k]
        if not positions.size or positions.min() < 0 or positions.max() >= len(self.words[k]):
            raise ConfigError(
                f"vocabulary: expected value_to_word of {name!r} with positions 0 to {len(self.words[k]) - 1}, "
                f"got {positions.tolist()}."
            )

    @property
    def num_units(self) -> int:
        """U, the number of attribute texts per image: one per factor."""
        return len(self.factor_names)

    def phrases(self, k: int, word: int) -> list[str]:
        """Return all phrases of word number ``word`` of factor ``k``, the canonical one first."""
        return list(self._phrases[k][word])

    def word_labels(self, values: np.ndarray) -> np.ndarray:
        """Return the word number of every value: (n, U) int -> (n, U) int64; ``UNKNOWN`` remains ``UNKNOWN``."""
        values = np.asarray(values)
        words = [of_value[values[:, k]] for k, of_value in enumerate(self.value_to_word)]
        return np.where(values == UNKNOWN, UNKNOWN, np.stack(words, axis=1))

    def texts(self, values: np.ndarray, rng: np.random.Generator | None = None) -> list[list[str]]:
        """Return the U attribute texts of each image.

        Args:
            values: (n, U) int values of the attributes.
            rng: generator that chooses a phrase for each text, unless every factor has one; None: the canonical ones.

        Returns:
            n lists of U strings; "" for an unknown attribute.
        """
        labels = self.word_labels(values)
        chosen = np.zeros_like(labels)
        if rng is not None and max(map(len, self.templates)) > 1:
            chosen = (rng.random(labels.shape) * [len(ts) for ts in self.templates]).astype(np.int64)
        return [
            ["" if w == UNKNOWN else by_word[w][c] for by_word, w, c in zip(self._phrases, word_row, choice_row)]
            for word_row, choice_row in zip(labels.tolist(), chosen.tolist())
        ]

    @staticmethod
    def caption(texts: Sequence[str], units: Sequence[int] | None = None) -> str:
        """Return one sentence of the attributes ``units`` (all when None) in that order, joined by ", ".

        Args:
            texts: the U attribute texts of one image.
            units: positions in ``texts``; empty texts (unset units) are skipped.
        """
        chosen = texts if units is None else [texts[u] for u in units]
        return ", ".join(text for text in chosen if text)

    def all_words(self) -> list[str]:
        """Return every single word of all phrases, sorted and without punctuation."""
        phrases = (p for by_word in self._phrases for ps in by_word for p in ps)
        return sorted({word for phrase in phrases for word in re.findall(r"\w+", phrase.lower())})

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists, ready for JSON."""
        return {
            "factor_names": list(self.factor_names),
            "words": [list(ws) for ws in self.words],
            "value_to_word": [v.tolist() for v in self.value_to_word],
            "templates": [list(ts) for ts in self.templates],
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> AttributeVocabulary:
        """Return the vocabulary of a dict written by ``to_dict``, or of the ``{target}`` of a function."""
        if "target" in state:
            return instantiate_from_config(state)
        keys = ("factor_names", "words", "value_to_word", "templates")
        missing = [key for key in keys if key not in state]
        if missing:
            raise ConfigError(f"vocabulary: expected the keys {', '.join(keys)}; missing {', '.join(missing)}.")
        return cls(*(state[key] for key in keys))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AttributeVocabulary) and self.to_dict() == other.to_dict()

    __hash__ = None


def read_vocabulary(path: str | Path) -> AttributeVocabulary:
    """Read the words of attributes from a YAML or JSON file; each word is a value.

    Args:
        path: a file such as ``{hair: [dark hair, fair hair], size: {words: [small, large], templates: ["{} thing"]}}``.

    Raises:
        UserError: the file is missing or damaged.
        ConfigError: an entry is malformed; the message names its key.
    """
    with readable(Path(path), "YAML or JSON", yaml.YAMLError):
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8-sig"))
    if not isinstance(content, dict) or not content:
        raise ConfigError(f"{path}: expected attributes and their words, as in {{hair: [dark, fair]}}, got {content!r}")
    names, words, templates = [], [], []
    for name, entry in content.items():
        entry = entry if isinstance(entry, dict) else {"words": entry}
        if unknown := sorted(map(str, set(entry) - {"words", "templates"})):
            raise ConfigError(f"{path}: {name}: expected the keys words and templates, got {', '.join(unknown)}")
        names.append(str(name))
        words.append(_texts(entry.get("words"), f"{path}: {name}.words", least=2))
        templates.append(_texts(entry.get("templates", ["{}"]), f"{path}: {name}.templates"))
    try:
        return AttributeVocabulary(names, words, [range(len(own)) for own in words], templates)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _texts(entry: Any, where: str, least: int = 1) -> list[str]:
    """Return different texts or numbers of a list; YAML's booleans are no words."""
    texts = [str(text) for text in entry if type(text) in (str, int, float)] if isinstance(entry, list) else []
    if len(set(texts) - {""}) < max(least, len(entry or ()) if texts else 0):
        raise ConfigError(
            f"{where}: expected a list of {least} or more different texts, got {entry!r}. Quote yes and no"
        )
    return texts
