"""Attribute texts."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ldm.data.vocabulary import AttributeVocabulary
from ldm.data.world import world_vocabulary
from ldm.util import ConfigError


def test_canonical_texts_and_labels():
    vocabulary = world_vocabulary()
    factors = np.array([[0, 3, 7, 0, 2, 14], [9, 1, 4, 7, 0, 6]])
    assert vocabulary.texts(factors) == [
        ["red floor", "green wall", "blue object", "tiny object", "sphere", "seen from the far right"],
        ["pink floor", "orange wall", "mint object", "large object", "cube", "seen from the front"],
    ]
    assert vocabulary.word_labels(factors).tolist() == [[0, 3, 7, 0, 2, 4], [9, 1, 4, 3, 0, 2]]


def test_every_word_has_several_phrasings_that_say_it():
    vocabulary = world_vocabulary()
    for k, words in enumerate(vocabulary.words):
        for w, word in enumerate(words):
            phrases = vocabulary.phrases(k, w)
            assert len(phrases) >= 3 == len(set(phrases[:3]))
            assert all(word in phrase for phrase in phrases)


def test_random_phrasing_names_the_same_words():
    vocabulary = world_vocabulary()
    factors = np.random.RandomState(0).randint(0, 4, (50, 6))
    labels = vocabulary.word_labels(factors)
    texts = vocabulary.texts(factors, np.random.default_rng(0))
    for row, label in zip(texts, labels):
        for k, text in enumerate(row):
            assert text in vocabulary.phrases(k, label[k])
    assert texts == vocabulary.texts(factors, np.random.default_rng(0))
    assert texts != vocabulary.texts(factors, np.random.default_rng(1))


def test_words_form_a_small_closed_list():
    words = world_vocabulary().all_words()
    assert len(words) < 64 and words == sorted(set(words))
    assert {"red", "floor", "tiny", "capsule", "far", "left"} <= set(words)


def test_caption_joins_and_skips_unset_units():
    assert AttributeVocabulary.caption(["a", "b", "c"], [2, 0]) == "c, a"
    assert AttributeVocabulary.caption(["a", "", "c"]) == "a, c"


def test_json_round_trip():
    vocabulary = world_vocabulary()
    again = AttributeVocabulary.from_dict(json.loads(json.dumps(vocabulary.to_dict())))
    assert again == vocabulary


def test_messages():
    with pytest.raises(ConfigError, match="exactly one '{}'"):
        AttributeVocabulary(["a"], [["x"]], [[0]], [["no gap"]])
    with pytest.raises(ConfigError, match="positions 0 to 0"):
        AttributeVocabulary(["a"], [["x"]], [[0, 1]], [["{}"]])
    with pytest.raises(ConfigError, match=r"of one length, got \[2, 1, 1, 1\]"):
        AttributeVocabulary(["a", "b"], [["x"]], [[0]], [["{}"]])
    with pytest.raises(ConfigError, match="missing templates"):
        AttributeVocabulary.from_dict({"factor_names": [], "words": [], "value_to_word": []})
