"""Text stage of LDM's text-to-image and layout models: a transformer encoder of BERT tokens, trained from scratch.

The state dict has the layout of x-transformers, as in LDM's checkpoints: ``transformer.token_emb``,
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

from ldm.modules.attention import CrossAttention
from ldm.modules.diffusionmodules.util import sequence_in
from ldm.modules.encoders.base import ConditionStageBase, TextStage, sent_to
from ldm.modules.encoders.tokenizer import WORDS_FILE, WordTokenizer
from ldm.ranges import Count, Fraction
from ldm.util import ConfigError, UserError

NUM_HEADS, HEAD_WIDTH = 8, 64  # fixed in LDM, independent of D
INIT_DEVIATION = 0.02
BERT_TOKENIZER = "bert-base-uncased"

Tokenize = Callable[[Sequence[str]], Tensor]


class SelfAttention(CrossAttention):
    """Multi-head self-attention without a mask: padding tokens are attended to, as in LDM."""

    def __init__(self, width: int) -> None:
        super().__init__(width, heads=NUM_HEADS, dim_head=HEAD_WIDTH)
        self.to_out = self.to_out[0]  # without dropout, whose name is not in LDM's checkpoints


def feed_forward(width: int) -> nn.Sequential:
    """Return a two-layer perceptron with a hidden width of 4 D."""
    entry = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU())
    return sequence_in("net", entry, nn.Identity(), nn.Linear(4 * width, width))


class Transformer(nn.Module):
    """Transformer encoder from token ids to embeddings.

    Args:
        vocab_size: number of token ids.
        max_seq_len: maximal number of tokens.
        width: D.
        depth: number of pairs of attention and feed-forward blocks.
        dropout: dropout probability of the token embeddings.
    """

    def __init__(
        self, vocab_size: Count, max_seq_len: Count, width: int, depth: Count, dropout: Fraction = 0.0
    ) -> None:
        super().__init__()
        self.max_seq_len = max_seq_len
        self.token_emb = nn.Embedding(vocab_size, width)
        nn.init.normal_(self.token_emb.weight, std=INIT_DEVIATION)
        self.pos_emb = nn.ModuleDict({"emb": nn.Embedding(max_seq_len, width)})
        nn.init.normal_(self.pos_emb["emb"].weight, std=INIT_DEVIATION)
        self.emb_dropout = nn.Dropout(dropout)
        blocks = (block(width) for block in (SelfAttention, feed_forward) * depth)
        layers = nn.ModuleList(nn.ModuleList([nn.LayerNorm(width), block]) for block in blocks)
        self.attn_layers = nn.ModuleDict({"layers": layers})
        self.norm = nn.LayerNorm(width)
        # Unused, but contained in checkpoints; frozen, because DDP waits for the gradients of trainable parameters.
        self.to_logits = nn.Linear(width, vocab_size).requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map ``tokens`` (B, S) int64, S at most ``max_seq_len``, to (B, S, D).

        Raises:
            UserError: the sequence is too long.
        """
        if tokens.shape[1] > self.max_seq_len:
            raise UserError(
                f"cond_stage_config.params.max_seq_len: expected sequences of at most {self.max_seq_len} tokens, got "
                f"{tokens.shape[1]}. Shorten them, or increase max_seq_len."
            )
        tokens = sent_to(self.token_emb.weight.device, tokens)
        x = self.emb_dropout(self.token_emb(tokens) + self.pos_emb["emb"].weight[: tokens.shape[1]])
        for norm, block in self.attn_layers["layers"]:
            x = x + block(norm(x))
        return self.norm(x)


class TransformerEmbedder(ConditionStageBase):
    """Transformer encoder of token ids.

    Args:
        n_embed: width D.
        n_layer: depth.
        vocab_size: number of token ids.
        max_seq_len: maximal number of tokens.
        device: accepted from old configs and ignored; the module moves with its parent.
    """

    def __init__(
        self, n_embed: Count, n_layer: Count, vocab_size: Count, max_seq_len: Count = 77, device: Any = None
    ) -> None:
        super().__init__()
        self.transformer = Transformer(vocab_size, max_seq_len, n_embed, n_layer)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map ``tokens`` (B, S) int64 to (B, S, D)."""
        return self.transformer(tokens)


class BERTEmbedder(TextStage):
    """Transformer encoder of texts, or of token ids, to a sequence of embeddings for cross-attention.

    Args:
        n_embed: width D.
        n_layer: depth.
        vocab_size: number of token ids.
        max_seq_len: tokens of a text; longer texts are truncated, shorter ones are padded.
        device: accepted from old configs and ignored; the module moves with its parent.
        use_tokenizer: the batch contains texts; False: token ids.
        embedding_dropout: dropout probability of the token embeddings.
        tokenizer: name or folder of a BERT tokenizer of transformers; or ``words.json`` or its folder, for a
            :class:`WordTokenizer`. It is loaded with the first text.
        allow_download: download a tokenizer that is missing on this machine.
    """

    def __init__(
        self,
        n_embed: Count,
        n_layer: Count,
        vocab_size: Count = 30522,
        max_seq_len: Count = 77,
        device: Any = None,
        use_tokenizer: bool = True,
        embedding_dropout: Fraction = 0.0,
        tokenizer: str | os.PathLike = BERT_TOKENIZER,
        allow_download: bool = False,
    ) -> None:
        super().__init__()
        self.takes_texts = self.use_tokenizer = use_tokenizer
        self.tokenizer, self.allow_download = tokenizer, allow_download
        self.vocab_size, self.max_seq_len = vocab_size, max_seq_len
        self._tokenize: Tokenize | None = None
        self.width = n_embed
        self.transformer = Transformer(vocab_size, max_seq_len, n_embed, n_layer, embedding_dropout)

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Return the token ids of texts, (B, max_seq_len) int64.

        Raises:
            UserError: the tokenizer or its package is missing on this machine.
            ConfigError: the tokenizer has more than ``vocab_size`` tokens.
        """
        if self._tokenize is None:
            self._tokenize, size = load_tokenizer(self.tokenizer, self.max_seq_len, self.allow_download)
            if size > self.vocab_size:
                raise ConfigError(
                    f"cond_stage_config.params.vocab_size: expected at least {size}, the number of tokens of "
                    f"{self.tokenizer}, got {self.vocab_size}. Increase it."
                )
        return self._tokenize(list(texts))

    def forward(self, texts: Sequence[str] | Tensor) -> Tensor:
        """Map B texts, or without a tokenizer token ids (B, S) int64, to (B, S, D)."""
        return self.transformer(self.tokenize(texts) if self.takes_texts else texts)

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Map B texts to (B, max_seq_len, D).

        Raises:
            ConfigError: the stage has no tokenizer.
        """
        if not self.takes_texts:
            raise ConfigError(
                "cond_stage_config.params.use_tokenizer: expected true for texts, got false. Set it to true."
            )
        return self(texts)


def load_tokenizer(name: str | os.PathLike, length: int, allow_download: bool = False) -> tuple[Tokenize, int]:
    """Return a function from texts to (B, length) int64 token ids, and the number of token ids.

    ``name`` and ``allow_download`` are arguments of :class:`BERTEmbedder`.

    Raises:
        UserError: the tokenizer or the package transformers is missing on this machine.
    """
    words = Path(name) / WORDS_FILE if Path(name).is_dir() else Path(name)
    if words.is_file() and words.name == WORDS_FILE:
        own = WordTokenizer.load(words)
        return (lambda texts: own(texts, length)), own.vocab_size
    try:
        from transformers import BertTokenizerFast
    except ImportError as error:
        raise UserError(
            f"BERTEmbedder: expected the package transformers for the tokenizer {name}. Run: pip install -e .[bert]; "
            f"or set cond_stage_config.params.tokenizer to a folder with {WORDS_FILE}; or set use_tokenizer: false "
            "if the data set returns tokens."
        ) from error
    try:
        bert = BertTokenizerFast.from_pretrained(str(name), local_files_only=not allow_download)
    except (OSError, ValueError) as error:
        raise UserError(
            f"BERTEmbedder: the tokenizer {name} is missing on this machine ({str(error).partition(chr(10))[0]}). "
            "Download it with allow_download: true, or set cond_stage_config.params.tokenizer to its folder."
        ) from error

    options = {"truncation": True, "max_length": length, "padding": "max_length"}
    return (lambda texts: torch.tensor(bert(texts, **options)["input_ids"])), len(bert)
