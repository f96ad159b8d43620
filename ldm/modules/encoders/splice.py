"""Replacement of one token's embedding in a text encoder by a vector that is given, or learned.

Legend: M texts, S tokens, D width of the token embeddings.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ldm.modules.encoders.tokenizer import WordTokenizer
from ldm.util import UserError

_SINGLE_TOKENS = ("*", "a", "object", "the")  # words that are one token in common vocabularies


@runtime_checkable
class CachesTexts(Protocol):
    """A text encoder that keeps the embeddings of texts (``FrozenCLIPTextEmbedder``)."""

    caches_texts: bool


class TokenSplice:
    """Encodes texts of one placeholder token whose embedding is given.

    Args:
        encoder: text encoder, or a module that contains one, with one table of token embeddings.
        encode: maps texts to a condition; its calls within :meth:`encode_rows` see the given embeddings.

    Attributes:
        table: the token embeddings, (V, D).
        width: D.

    Raises:
        UserError: the encoder has no table of token embeddings, or no word that is one token.
    """

    def __init__(self, encoder: nn.Module, encode: Callable[[Sequence[str]], Tensor]) -> None:
        tables = [module for module in encoder.modules() if isinstance(module, nn.Embedding)]
        if not tables:
            raise UserError(
                f"directions: expected a text encoder with a table of token embeddings, got {type(encoder).__name__}. "
                "Set row_space: condition, which learns conditions directly"
            )
        self.table = max(tables, key=lambda table: table.num_embeddings)
        self.width = self.table.embedding_dim
        self._encode = encode
        self._caches = [module for module in encoder.modules() if isinstance(module, CachesTexts)]
        self.word, self.position = self._find_word(encoder)

    def encode_rows(self, rows: Tensor) -> Tensor:
        """Return the encodings of M texts of the placeholder token with embeddings ``rows`` (M, D); gradients pass."""

        def replace(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            before, after = output[:, : self.position], output[:, self.position + 1 :]
            return torch.cat([before, rows[:, None].to(output), after], dim=1)

        with self._hooked(replace):
            return self._encode([self.word] * len(rows))

    def initial_rows(self, count: int, words: Sequence[str] = ()) -> Tensor:
        """Return rows (count, D): the embeddings of words in turn, or random with the statistics of the table."""
        if words:
            return torch.stack([self.row_of(words[index % len(words)]) for index in range(count)])
        table = self.table.weight.detach().float().cpu()
        return table.mean(0) + table.std(0) * torch.randn(count, self.width)

    def row_of(self, word: str) -> Tensor:
        """Return the embedding (D,) of the token of a word.

        Raises:
            UserError: the word is not one token.
        """
        ids, other = self._ids([word])[0], self._ids([self.word])[0]
        if (ids != other).sum() != 1 and word != self.word:
            raise UserError(f"initializer: expected a word that is one token, got {word!r}. Choose another word")
        return self.table.weight[ids[self.position]].detach().clone()

    def _find_word(self, encoder: nn.Module) -> tuple[str, int]:
        tokenizers = [vars(module).get("tokenizer") for module in encoder.modules()]
        words = [word for each in tokenizers if isinstance(each, WordTokenizer) for word in each.words]
        for word in (*words[:1], *_SINGLE_TOKENS):
            with contextlib.suppress(UserError):
                once, twice, thrice = (self._ids([" ".join([word] * count)])[0] for count in (1, 2, 3))
                end = _first_difference(once, twice)
                if _first_difference(twice, thrice) - end == 1:
                    return word, end - 1
        raise UserError(
            f"directions: expected a text encoder with a word that is one token, got {type(encoder).__name__}. Set "
            "row_space: condition, which learns conditions directly"
        )

    @torch.no_grad()
    def _ids(self, texts: Sequence[str]) -> Tensor:
        """Return the token ids (M, S) that the table receives for texts."""
        seen: list[Tensor] = []
        with self._hooked(lambda _, inputs, output: seen.append(inputs[0])):
            self._encode(texts)
        return seen[0]

    @contextlib.contextmanager
    def _hooked(self, hook: Callable[..., Any]) -> Iterator[None]:
        handle = self.table.register_forward_hook(hook)
        for module in self._caches:
            module.caches_texts = False
        try:
            yield
        finally:
            handle.remove()
            for module in self._caches:
                module.caches_texts = True


def _first_difference(first: Tensor, second: Tensor) -> int:
    """Return the first position at which two rows of ids differ; their length if they do not."""
    return int(torch.cat([first != second, torch.ones_like(first[:1], dtype=torch.bool)]).int().argmax())
