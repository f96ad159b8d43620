"""Vocabularies in files."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ldm.data.vocabulary import read_vocabulary
from ldm.util import ConfigError, UserError


def test_words_and_templates(tmp_path):
    path = tmp_path / "words.yaml"
    path.write_text('hair: [dark hair, fair hair]\nsize: {words: [1, 2.5], templates: ["{} cm", "of {} cm"]}\n')
    vocabulary = read_vocabulary(path)
    assert vocabulary.texts(np.array([[1, 0]])) == [["fair hair", "1 cm"]]
    assert vocabulary.phrases(1, 1) == ["2.5 cm", "of 2.5 cm"]
    (tmp_path / "words.json").write_text(json.dumps({"mood": {"words": ["calm", "wild"]}}))
    assert read_vocabulary(str(tmp_path / "words.json")).words == [["calm", "wild"]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[a, b]", r"words.yaml: expected attributes and their words.*got \['a', 'b'\]"),
        ("", "words.yaml: expected attributes and their words"),
        ("mood: [calm]", "words.yaml: mood.words: expected a list of 2 or more"),
        ("mood: calm", "mood.words: .*got 'calm'"),
        ("mood: null", "mood.words: .*got None"),
        ("mood: [calm, calm]", "mood.words: expected .* different texts"),
        ("mood: [yes, no]", "mood.words: .*Quote yes and no"),
        ("mood: [[a], [b]]", "mood.words"),
        ("mood: 5", "mood.words: .*got 5"),
        ("mood: {words: [a, b], template: ['{}']}", "mood: expected the keys words and templates, got template"),
        ("mood: {words: [a, b], templates: []}", "mood.templates: expected a list of 1 or more"),
        ("mood: {words: [a, b], templates: [no place]}", "words.yaml: vocabulary: expected templates of 'mood'"),
        ("mood: {templates: ['{}']}", "mood.words: .*got None"),
    ],
)
def test_malformed_entries(tmp_path, content, message):
    path = tmp_path / "words.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_vocabulary(path)


@pytest.mark.parametrize("content", [None, "mood: [calm", b"\xff\xfe\x00"])
def test_files_that_cannot_be_read(tmp_path, content):
    path = tmp_path / "words.yaml"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match="words.yaml: expected a (complete )?YAML or JSON file"):
        read_vocabulary(path)
