"""Tokenizer of whole words for a closed vocabulary.

It replaces CLIP's byte-pair vocabulary of 49,408 entries, whose embedding would be thirty times as large as the rest of
a text tower of width 128, for data sets that are described by a few dozen words.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ldm.util import UserError, atomic_write

WORDS_FILE = "words.json"
_WORD = re.compile(r"\w+")


def split_words(text: str) -> list[str]:
    """Return the lower-case words of ``text``, which are separated by spaces and punctuation."""
    return _WORD.findall(text.lower())


class WordTokenizer:
    """Tokenizer with one id per word and the calling convention of open_clip's tokenizers.

    Ids: 0 is padding, ``1 .. W`` are the words in the given order, ``W + 1`` is the start and ``W + 2`` the end of a
    text. The end is the largest id because open_clip pools a text at its largest id (``text_cfg.pool_type: argmax``).

    Args:
        words: distinct words, in upper or lower case.
        context_length: number of ids per text, including start and end.

    Raises:
        ValueError: ``words`` are empty or not distinct, or ``context_length`` is below 3.

    Example:
        >>> WordTokenizer(["red", "floor"], context_length=5)(["red floor"]).tolist()
        [[3, 1, 2, 4, 0]]
    """

    def __init__(self, words: Sequence[str], context_length: int = 20) -> None:
        self.words = [word.lower() for word in words]
        if len(set(self.words)) != len(self.words) or not self.words:
            raise ValueError(f"words: expected a list of distinct words, got {list(words)!r}.")
        if context_length < 3:
            raise ValueError(f"context_length: expected at least 3 (start, a word, end), got {context_length}.")
        self.context_length = context_length
        self.sot_token_id = len(self.words) + 1
        self.eot_token_id = len(self.words) + 2
        self.vocab_size = len(self.words) + 3
        self._ids = {word: index for index, word in enumerate(self.words, start=1)}

    def encode(self, text: str) -> list[int]:
        """Return the ids of the words of ``text``, without start, end and padding.

        Raises:
            UserError: a word is not in the vocabulary; the message names similar words.
        """
        words = split_words(text)
        unknown = [word for word in words if word not in self._ids]
        if not unknown:
            return [self._ids[word] for word in words]
        word = unknown[0]
        near = difflib.get_close_matches(word, self.words, n=3, cutoff=0.5)
        hint = f"Did you mean {' or '.join(map(repr, near))}?" if near else f"Use these words: {', '.join(self.words)}."
        raise UserError(f"text {text!r}: expected words of the CLIP's vocabulary, got {word!r}. {hint}")

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> Tensor:
        """Map one text or N texts to (N, context_length) int64, by default with the length of the constructor.

        A text that is too long is truncated and keeps its end token.
        """
        texts = [texts] if isinstance(texts, str) else texts
        length = context_length or self.context_length
        rows = torch.zeros(len(texts), length, dtype=torch.long)
        for row, text in zip(rows, texts):
            ids = [self.sot_token_id, *self.encode(text)[: length - 2], self.eot_token_id]
            row[: len(ids)] = torch.tensor(ids)
        return rows

    def save(self, path: str | os.PathLike) -> None:
        """Write the words and the context length to a JSON file, atomically."""
        with atomic_write(path) as stream:
            json.dump({"words": self.words, "context_length": self.context_length}, stream, indent=1)

    @classmethod
    def load(cls, path: str | os.PathLike) -> WordTokenizer:
        """Read a tokenizer written by :meth:`save`.

        Raises:
            UserError: the file is missing or has another format.
        """
        try:
            stored = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(stored["words"], stored["context_length"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}: expected a word list, JSON with 'words' and 'context_length' ({error}). Copy the file from "
                "the run that trained the CLIP, or train it again."
            ) from error
