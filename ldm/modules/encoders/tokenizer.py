"""A tokenizer of whole words for a closed vocabulary.

The byte-pair vocabulary of CLIP has 49,408 entries: at width 128 its embedding alone would be thirty times the
rest of a small text tower. A world that is described by a few dozen words needs only those words.
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
    """Lower-case words of ``text``; spaces and the punctuation between phrases only separate them."""
    return _WORD.findall(text.lower())


class WordTokenizer:
    """Maps every word of a fixed list to one id, with the calling convention of open_clip's tokenizers.

    Ids: 0 is padding, ``1 .. W`` are the words in the given order, ``W + 1`` starts and ``W + 2`` ends a text.
    The end is the largest id on purpose: open_clip pools a text at the position of its largest id
    (``text_cfg.pool_type: argmax``).

    Args:
        words: the words, without repetition, in any case.
        context_length: number of ids per text, start and end included.

    Example:
        >>> WordTokenizer(["red", "floor"], context_length=5)(["red floor"]).tolist()
        [[3, 1, 2, 4, 0]]
    """

    def __init__(self, words: Sequence[str], context_length: int = 20) -> None:
        self.words = [word.lower() for word in words]
        if len(set(self.words)) != len(self.words) or not self.words:
            raise ValueError(f"expected a list of distinct words, got {list(words)!r}")
        if context_length < 3:
            raise ValueError(f"context_length must hold start, a word and end (3), got {context_length}")
        self.context_length = context_length
        self.sot_token_id = len(self.words) + 1
        self.eot_token_id = len(self.words) + 2
        self.vocab_size = len(self.words) + 3
        self._ids = {word: index for index, word in enumerate(self.words, start=1)}

    def encode(self, text: str) -> list[int]:
        """Ids of the words of ``text``, without start, end and padding.

        Raises:
            UserError: a word that is not in the list; the message names the nearest known words.
        """
        return [self._id(word, text) for word in split_words(text)]

    def _id(self, word: str, text: str) -> int:
        found = self._ids.get(word)
        if found is not None:
            return found
        near = difflib.get_close_matches(word, self.words, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known words: {', '.join(self.words)}"
        raise UserError(f"the text {text!r} has the word {word!r}, which this CLIP was not trained on; {hint}")

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> Tensor:
        """Token ids of texts; a text that is too long is cut and keeps its end token.

        Args:
            texts: one text or N texts.
            context_length: overrides the tokenizer's own length.

        Returns:
            int64 tensor (N, context_length).
        """
        texts = [texts] if isinstance(texts, str) else texts
        length = context_length or self.context_length
        rows = torch.zeros(len(texts), length, dtype=torch.long)
        for row, text in zip(rows, texts):
            ids = [self.sot_token_id, *self.encode(text)[: length - 2], self.eot_token_id]
            row[: len(ids)] = torch.tensor(ids)
        return rows

    def save(self, path: str | os.PathLike) -> None:
        """Write the word list and length as JSON (atomically)."""
        with atomic_write(path) as stream:
            json.dump({"words": self.words, "context_length": self.context_length}, stream, indent=1)

    @classmethod
    def load(cls, path: str | os.PathLike) -> WordTokenizer:
        """Read a tokenizer written by :meth:`save`.

        Raises:
            UserError: the file is not such a JSON file.
        """
        try:
            stored = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(stored["words"], stored["context_length"])
        except (OSError, ValueError, KeyError, TypeError) as err:
            raise UserError(
                f"{path} is no word list: expected JSON with 'words' and 'context_length' ({err}); "
                "copy the file from the run that trained this CLIP, or train it again"
            ) from err
