"""The tokenizer of whole words."""

import pytest

from ldm.data.world import world_vocabulary
from ldm.modules.encoders.tokenizer import WordTokenizer
from ldm.util import UserError


def test_ids_start_end_and_padding():
    tokenizer = WordTokenizer(["red", "floor", "left"], context_length=6)
    assert tokenizer("Red floor, left").tolist() == [[4, 1, 2, 3, 5, 0]]
    assert tokenizer.eot_token_id == tokenizer.vocab_size - 1
    assert tokenizer([""]).tolist() == [[4, 5, 0, 0, 0, 0]]


def test_end_is_the_largest_id_where_open_clip_pools():
    vocabulary = world_vocabulary()
    tokenizer = WordTokenizer(vocabulary.all_words(), context_length=30)
    texts = [p for k, words in enumerate(vocabulary.words) for w in range(len(words)) for p in vocabulary.phrases(k, w)]
    tokens = tokenizer(texts)
    lengths = [len(text.split()) + 1 for text in texts]
    assert tokens.argmax(dim=1).tolist() == lengths
    assert tokens.max() < tokenizer.vocab_size


def test_long_texts_keep_their_end():
    tokenizer = WordTokenizer(["red", "floor"], context_length=4)
    assert tokenizer(["red floor red floor"]).tolist() == [[3, 1, 2, 4]]
    assert tokenizer(["red floor red floor"], context_length=3).tolist() == [[3, 1, 4]]


def test_unknown_word_names_near_ones():
    tokenizer = WordTokenizer(["orange", "floor"])
    with pytest.raises(UserError, match="'ornage'.*'orange'"):
        tokenizer(["ornage floor"])
    with pytest.raises(UserError, match="Use these words: orange, floor"):
        tokenizer(["xyz"])


def test_round_trip_and_damage(tmp_path):
    tokenizer = WordTokenizer(["red", "floor"], context_length=7)
    tokenizer.save(tmp_path / "words.json")
    loaded = WordTokenizer.load(tmp_path / "words.json")
    assert loaded.words == tokenizer.words and loaded.context_length == 7
    (tmp_path / "words.json").write_text('{"words": 3}')
    with pytest.raises(UserError, match="expected a word list"):
        WordTokenizer.load(tmp_path / "words.json")


def test_wrong_arguments():
    with pytest.raises(ValueError, match="distinct"):
        WordTokenizer(["red", "Red"])
    with pytest.raises(ValueError, match="context_length"):
        WordTokenizer(["red"], context_length=2)
