"""The text stage of LDM's text-to-image and layout models: a transformer encoder trained from scratch on BERT's tokens.

The state dict is that of the x-transformers layout LDM was trained with: ``transformer.token_emb``,
``transformer.pos_emb.emb``, ``transformer.attn_layers.layers.<i>.{0 norm, 1 attention or feed-forward}``,
``transformer.norm``, ``transformer.to_logits``.

Legend: B batch, S tokens, D width.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.modules.diffusionmodules.util import attend
from ldm.modules.encoders.tokenizer import WORDS_FILE, WordTokenizer
from ldm.util import ConfigError, UserError

NUM_HEADS, HEAD_WIDTH = 8, 64  # fixed in the family; the width of the heads does not follow D
INIT_DEVIATION = 0.02
BERT_TOKENIZER = "bert-base-uncased"

Tokenize = Callable[[Sequence[str]], Tensor]


class SelfAttention(nn.Module):
    """Multi-head attention among tokens, without a mask: padding takes part, as in LDM."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = NUM_HEADS * HEAD_WIDTH
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_k = nn.Linear(width, inner, bias=False)
        self.to_v = nn.Linear(width, inner, bias=False)
        self.to_out = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, S, D) -> (B, S, D)."""
        layers = (self.to_q, self.to_k, self.to_v)
        q, k, v = (layer(x).unflatten(-1, (NUM_HEADS, -1)).transpose(1, 2) for layer in layers)  # (B, heads, S, 64)
        return self.to_out(attend(q, k, v).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two layers with a hidden width of 4 D."""

    def __init__(self, width: int) -> None:
        super().__init__()
        entry = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU())
        self.net = nn.Sequential(entry, nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, S, D) -> (B, S, D)."""
        return self.net(x)


class EncoderLayers(nn.Module):
    """Attention and feed-forward in turn, each normalised before and residual."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        kinds = (SelfAttention, FeedForward) * depth
        self.layers = nn.ModuleList(nn.ModuleList([nn.LayerNorm(width), kind(width)]) for kind in kinds)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, S, D) -> (B, S, D)."""
        for norm, block in self.layers:
            x = x + block(norm(x))
        return x


class LearnedPositions(nn.Module):
    """A learned vector for each place in a sequence."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.emb = nn.Embedding(length, width)
        nn.init.normal_(self.emb.weight, std=INIT_DEVIATION)

    def forward(self, count: int) -> Tensor:
        """The first ``count`` vectors, (count, D)."""
        return self.emb.weight[:count]


class Transformer(nn.Module):
    """Token ids to embeddings.

    Args:
        vocab_size: number of token ids.
        max_seq_len: most tokens of a sequence.
        width: D.
        depth: pairs of attention and feed-forward.
        dropout: of the token embeddings.
    """

    def __init__(self, vocab_size: int, max_seq_len: int, width: int, depth: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.max_seq_len = max_seq_len
        self.token_emb = nn.Embedding(vocab_size, width)
        nn.init.normal_(self.token_emb.weight, std=INIT_DEVIATION)
        self.pos_emb = LearnedPositions(max_seq_len, width)
        self.emb_dropout = nn.Dropout(dropout)
        self.attn_layers = EncoderLayers(width, depth)
        self.norm = nn.LayerNorm(width)
        # Never run, but a part of every checkpoint; frozen, so that no process waits for its gradient.
        self.to_logits = nn.Linear(width, vocab_size).requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Embed.

        Args:
            tokens: (B, S) int64, S at most ``max_seq_len``.

        Returns:
            (B, S, D).

        Raises:
            UserError: the sequence is too long.
        """
        if tokens.shape[1] > self.max_seq_len:
            raise UserError(
                f"sequences of {tokens.shape[1]} tokens, but cond_stage_config.params.max_seq_len is "
                f"{self.max_seq_len}: shorten them or raise it"
            )
        tokens = tokens.to(self.token_emb.weight.device)
        x = self.token_emb(tokens) + self.pos_emb(tokens.shape[1])
        return self.norm(self.attn_layers(self.emb_dropout(x)))


class TransformerEmbedder(nn.Module):
    """The transformer over ready tokens.

    Args:
        n_embed: width D.
        n_layer: depth.
        vocab_size: number of token ids.
        max_seq_len: most tokens of a sequence.
        device: accepted for old configs and not used: the module lives where its parent is moved.
    """

    def __init__(self, n_embed: int, n_layer: int, vocab_size: int, max_seq_len: int = 77, device: Any = None) -> None:
        super().__init__()
        self.transformer = Transformer(vocab_size, max_seq_len, n_embed, n_layer)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: (B, S) int64 -> (B, S, D)."""
        return self.transformer(tokens)

    def encode(self, tokens: Tensor) -> Tensor:
        """Same as :meth:`forward`."""
        return self(tokens)


class BERTEmbedder(nn.Module):
    """Texts, or ready tokens, to a sequence of embeddings for cross-attention.

    Args:
        n_embed: width D.
        n_layer: depth.
        vocab_size: number of token ids.
        max_seq_len: tokens of a text: longer ones are cut, shorter ones padded.
        device: accepted for old configs and not used: the module lives where its parent is moved.
        use_tokenizer: the batch holds texts; False: token ids.
        embedding_dropout: of the token embeddings.
        tokenizer: name or folder of a BERT tokenizer for the package transformers; or a folder with ``words.json``, or
            that file, of our own word tokenizer. It is looked for when the first text comes.
        allow_download: fetch a tokenizer that is not on this machine.
    """

    def __init__(
        self,
        n_embed: int,
        n_layer: int,
        vocab_size: int = 30522,
        max_seq_len: int = 77,
        device: Any = None,
        use_tokenizer: bool = True,
        embedding_dropout: float = 0.0,
        tokenizer: str | os.PathLike = BERT_TOKENIZER,
        allow_download: bool = False,
    ) -> None:
        super().__init__()
        self.use_tokenizer, self.tokenizer, self.allow_download = use_tokenizer, tokenizer, allow_download
        self.vocab_size, self.max_seq_len = vocab_size, max_seq_len
        self._tokenize: Tokenize | None = None
        self.transformer = Transformer(vocab_size, max_seq_len, n_embed, n_layer, embedding_dropout)

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Texts -> (B, max_seq_len) int64.

        Raises:
            UserError: the tokenizer, or its package, is not on this machine.
            ConfigError: it knows more tokens than ``vocab_size``.
        """
        if self._tokenize is None:
            self._tokenize, size = load_tokenizer(self.tokenizer, self.max_seq_len, self.allow_download)
            if size > self.vocab_size:
                raise ConfigError(
                    f"cond_stage_config.params.vocab_size is {self.vocab_size}, but the tokenizer {self.tokenizer} has "
                    f"{size} tokens: set vocab_size to at least that"
                )
        return self._tokenize(list(texts))

    def forward(self, texts: Sequence[str] | Tensor) -> Tensor:
        """B texts, or (B, S) int64 tokens without a tokenizer -> (B, S, D)."""
        return self.transformer(self.tokenize(texts) if self.use_tokenizer else texts)

    def encode(self, texts: Sequence[str] | Tensor) -> Tensor:
        """Same as :meth:`forward`."""
        return self(texts)

    def unconditional_input(self, count: int) -> list[str]:
        """Texts that say nothing, in models trained for guidance."""
        return [""] * count


def load_tokenizer(name: str | os.PathLike, length: int, allow_download: bool = False) -> tuple[Tokenize, int]:
    """A function from texts to (B, length) int64 ids, and the number of ids.

    Raises:
        UserError: the tokenizer or the package transformers is not on this machine.
    """
    words = Path(name) / WORDS_FILE if Path(name).is_dir() else Path(name)
    if words.is_file() and words.name == WORDS_FILE:
        own = WordTokenizer.load(words)
        return (lambda texts: own(texts, length)), own.vocab_size
    try:
        from transformers import BertTokenizerFast
    except ImportError as error:
        raise UserError(
            f"the tokenizer {name} of BERTEmbedder needs the package transformers: pip install -e .[bert]; or name a "
            f"folder with {WORDS_FILE} in cond_stage_config.params.tokenizer, or set use_tokenizer: false and let the "
            "data set deliver tokens"
        ) from error
    try:
        bert = BertTokenizerFast.from_pretrained(str(name), local_files_only=not allow_download)
    except (OSError, ValueError) as error:
        raise UserError(
            f"the tokenizer {name} is not on this machine ({str(error).partition(chr(10))[0]}). Download it once where "
            "there is a network (allow_download: true), or give its folder in cond_stage_config.params.tokenizer"
        ) from error

    def tokenize(texts: Sequence[str]) -> Tensor:
        ids = bert(texts, truncation=True, max_length=length, padding="max_length")["input_ids"]
        return torch.tensor(ids)

    return tokenize, len(bert)
