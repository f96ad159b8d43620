"""Condition stages of Stable Diffusion 1 and 2 and of its image variations: towers of a CLIP in the checkpoint.

Unlike the embedders of :mod:`ldm.modules.encoders.clip_embedders`, these stages return the sequence of a text's tokens,
and their weights are part of the model's state dict. Weights that are neither in the checkpoint nor on this machine
are reported when a condition is computed, see :class:`~ldm.modules.weights.NeedsWeights`.

Legend: B batch, S tokens, D width.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.modules.encoders.base import ConditionStageBase, TextStage
from ldm.modules.encoders.clip_embedders import ImagePreprocessing
from ldm.modules.encoders.clip_loading import (
    ClipSource,
    build_clip,
    find_clip,
    import_open_clip,
    load_tokenizer,
    read_weights,
)
from ldm.modules.encoders.clip_text import TextTransformer, find_text_tower, text_tower_weights
from ldm.modules.encoders.tokenizer import BPE_VOCABULARY, WORDS_FILE, TextTokens, WordTokenizer
from ldm.modules.weights import NeedsWeights
from ldm.util import ConfigError, UserError

# Weights of the text tower beside its layers.
_TEXT_WEIGHTS = ("positional_embedding", "text_projection", "logit_scale", "token_embedding", "ln_final")
_SMALL = {"layers": 1, "width": 64, "patch_size": 16, "image_size": 16}  # stands in for a tower that is removed


def fill(module: NeedsWeights, source: ClipSource, select: Callable[..., dict[str, Tensor]] = dict) -> None:
    """Give a tower that was built on the meta device its weights, or zeros if they are missing.

    Args:
        module: condition stage with one child, the tower.
        source: files of the CLIP.
        select: function from the state dict of the weight file to that of the tower.

    Raises:
        UserError: the file is damaged or contains another architecture.
    """
    (tower,) = module.children()
    own = tower.to_empty(device=torch.get_default_device()).state_dict()
    if source.weights is None:
        state = {key: torch.zeros_like(value) for key, value in own.items()}
        advice = "Or set model.params.ckpt_path to a checkpoint that contains the weights."
        module.missing_weights = f"{type(module).__name__}: {source.missing}\n{advice}"
    else:
        state = select(read_weights(source.weights))
    try:
        tower.load_state_dict({key: value for key, value in state.items() if key in own})
    except RuntimeError as error:
        reason = " ".join(str(error).split("\n")[:2])
        raise UserError(
            f"{source.weights}: expected weights of the CLIP {source.name!r}, got {reason}. The file is damaged or "
            "belongs to another model; copy the right one."
        ) from error


class SequenceEmbedder(NeedsWeights, TextStage):
    """Base class of the text stages: tokens and the checks of options and texts.

    Args:
        source: files of the CLIP.
        max_length: S, maximal number of tokens, including start and end; at most the context length of the CLIP.
        layer: one of ``LAYERS``.

    Raises:
        ConfigError: an option is unknown, or the CLIP has another vocabulary than its tokenizer.
    """

    LAYERS = ("last", "penultimate")

    def __init__(self, source: ClipSource, max_length: int, layer: str) -> None:
        super().__init__()
        if layer not in self.LAYERS:
            raise ConfigError(
                f"cond_stage_config.params.layer: expected {', '.join(self.LAYERS)}, got {layer!r}. Choose one of them."
            )
        config = source.model_cfg["text_cfg"]
        self.source, self.layer = source, layer
        self.max_length = min(max_length, config.get("context_length", 77))
        words = None if source.folder is None else source.folder / WORDS_FILE
        has_words = words is not None and words.is_file()
        expected, found = BPE_VOCABULARY, config.get("vocab_size", BPE_VOCABULARY)
        if has_words:
            expected = WordTokenizer.load(words).vocab_size
        if found != expected:
            raise ConfigError(
                f"{source.name}: expected a text tower of {expected} tokens ({words if has_words else 'byte pairs'}), "
                f"got vocab_size {found}. Choose a CLIP with the tokenizer of OpenAI's, or add its {WORDS_FILE}."
            )

    @functools.cached_property
    def tokens(self) -> TextTokens:
        """Function from texts to token ids (B, S), loaded with the first text."""
        return TextTokens(load_tokenizer(self.source), self.max_length)

    def forward(self, texts: Sequence[str]) -> Tensor:
        """Map B texts to (B, S, D).

        Raises:
            UserError: ``texts`` is not a list of texts, or the weights are missing.
        """
        if isinstance(texts, (str, Tensor)) or not all(isinstance(text, str) for text in texts) or not len(texts):
            raise UserError(
                f"{type(self).__name__}: expected a list of texts, got {type(texts).__name__}. Set "
                "model.params.cond_stage_key to the entry of the batch that holds the texts."
            )
        self.require_weights()
        return self.embed(self.tokens(list(texts)).to(next(self.parameters()).device))

    def embed(self, tokens: Tensor) -> Tensor:
        """Map token ids (B, S) int64, padded with zeros, to (B, S, D)."""
        raise NotImplementedError


class FrozenCLIPEmbedder(SequenceEmbedder):
    """Text tower of OpenAI's CLIP as in Stable Diffusion 1: the last hidden states of all tokens.

    Args:
        version: see :func:`~ldm.modules.encoders.clip_text.find_text_tower`.
        device: accepted from old configs and ignored; the module moves with its parent.
        max_length: see :class:`SequenceEmbedder`.
        freeze: exclude the weights from training.
        layer: ``last``, or ``penultimate`` for the layer before it, both with the final normalization; ``hidden`` for
            the output of a layer without it; ``pooled`` for the last hidden state of the end token alone, (B, 1, D).
        layer_idx: with ``hidden``, index of the layer: 0 for the embeddings, -1 for the last one.
        weights: weight file or folder; None: search by name.
        allow_download: download missing weights.

    Attributes:
        width: D.
    """

    LAYERS = ("last", "penultimate", "hidden", "pooled")

    def __init__(
        self,
        version: str = "openai/clip-vit-large-patch14",
        device: Any = None,
        max_length: int = 77,
        freeze: bool = True,
        layer: str = "last",
        layer_idx: int | None = None,
        weights: str | os.PathLike | None = None,
        allow_download: bool = False,
    ) -> None:
        source, config = find_text_tower(str(version), weights, allow_download)
        super().__init__(source, max_length, layer)
        num_layers = config["num_hidden_layers"]
        if layer == "hidden" and (layer_idx is None or not -num_layers - 1 <= layer_idx <= num_layers):
            raise ConfigError(
                f"cond_stage_config.params.layer_idx: expected -{num_layers + 1} to {num_layers} with `layer: hidden`, "
                f"got {layer_idx}. Set the index of the layer."
            )
        self.layer_idx, self.width = layer_idx, config["hidden_size"]
        with torch.device("meta"):
            self.transformer = nn.ModuleDict({"text_model": TextTransformer(config)})
        fill(self, source, text_tower_weights)
        if freeze:
            self.requires_grad_(False)

    def embed(self, tokens: Tensor) -> Tensor:
        """See the base class; tokens after the end are replaced by the end token, which pads in transformers."""
        end = tokens.argmax(dim=1, keepdim=True)  # (B, 1), the largest id
        is_padding = torch.arange(tokens.shape[1], device=tokens.device) > end
        tower = self.transformer["text_model"]
        hidden = tower(torch.where(is_padding, tokens.gather(1, end), tokens))
        if self.layer == "hidden":
            return hidden[self.layer_idx]
        h = tower.final_layer_norm(hidden[-2 if self.layer == "penultimate" else -1])
        return h[torch.arange(len(h), device=h.device)[:, None], end] if self.layer == "pooled" else h


class FrozenOpenCLIPEmbedder(SequenceEmbedder):
    """Text tower of open_clip as in Stable Diffusion 2: the normalized last hidden states of all tokens.

    Args:
        arch: open_clip model, or folder with ``open_clip_config.json`` and optionally weights.
        version: tag of the weights, or weight file.
        device: accepted from old configs and ignored; the module moves with its parent.
        max_length: see :class:`SequenceEmbedder`.
        freeze: exclude the weights from training.
        layer: ``last``, or ``penultimate`` to leave out the last layer.
        weights: weight file or folder; None: search by name.
        allow_download: download missing weights.

    Attributes:
        width: D.
    """

    unused_weights = ("model.text_projection", "model.logit_scale")

    def __init__(
        self,
        arch: str = "ViT-H-14",
        version: str | None = "laion2b_s32b_b79k",
        device: Any = None,
        max_length: int = 77,
        freeze: bool = True,
        layer: str = "last",
        weights: str | os.PathLike | None = None,
        allow_download: bool = False,
    ) -> None:
        name = str(arch)
        if version is not None and not Path(name).expanduser().is_dir():
            if Path(version).is_file():
                weights = weights or version
            else:
                name = f"{name}:{version}"
        source = find_clip(name, weights, allow_download, is_optional=True)
        super().__init__(source, max_length, layer)
        self.model = build_tower(source, vision_cfg=_SMALL)
        del self.model.visual
        fill(self, source)
        self.width = self.model.positional_embedding.shape[1]
        if freeze:
            self.requires_grad_(False)

    def embed(self, tokens: Tensor) -> Tensor:
        """See the base class."""
        h = self.model.token_embedding(tokens) + self.model.positional_embedding[: tokens.shape[1]]
        mask = torch.full((tokens.shape[1],) * 2, float("-inf"), device=h.device).triu(1)
        layers = self.model.transformer.resblocks
        for layer in layers[: len(layers) - (self.layer == "penultimate")]:
            h = layer(h, attn_mask=mask)
        return self.model.ln_final(h)


class FrozenCLIPImageEmbedder(NeedsWeights, ImagePreprocessing, ConditionStageBase):
    """Image tower of a CLIP as in Stable Diffusion image variations: one token of the projected embedding.

    The spelling differs from that of :class:`~ldm.modules.encoders.clip_embedders.FrozenClipImageEmbedder` of LDM.

    Args:
        model: name or folder of the CLIP (:mod:`ldm.modules.encoders.clip_loading`).
        jit: accepted from old configs and ignored.
        device: accepted from old configs and ignored; the module moves with its parent.
        antialias: apply a low-pass filter when shrinking images.
        weights: weight file or folder; None: search by name.
        allow_download: download missing weights.

    Attributes:
        width: D.
    """

    unused_weights = tuple(f"model.{name}" for name in _TEXT_WEIGHTS)

    def __init__(
        self,
        model: str = "ViT-L/14",
        jit: bool = False,
        device: Any = None,
        antialias: bool = False,
        weights: str | os.PathLike | None = None,
        allow_download: bool = False,
    ) -> None:
        super().__init__()
        source = find_clip(str(model), weights, allow_download, is_optional=True)
        self.model = build_tower(source)
        del self.model.transformer  # published checkpoints contain the other weights of the text tower
        fill(self, source)
        self.set_preprocessing(self.model.visual.image_size, source, antialias)
        self.width = source.model_cfg["embed_dim"]

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``x`` (B, 3, H, W) in [-1, 1] to embeddings, float32 (B, D), not normalized.

        Raises:
            UserError: the weights are missing.
        """
        self.require_weights()
        return self.embed_images(self.model.visual, x)

    def encode(self, x: Tensor) -> Tensor:
        """Map images ``x`` (B, 3, H, W) in [-1, 1] to one token each, (B, 1, D)."""
        return self(x)[:, None]


def build_tower(source: ClipSource, **changes: Any) -> nn.Module:
    """Return a CLIP on the meta device, with ``changes`` of the model config, without its constant mask."""
    with torch.device("meta"):
        clip = build_clip({**source.model_cfg, **changes})
    if not isinstance(clip, import_open_clip().CLIP):
        raise ConfigError(
            f"{source.name}: expected a CLIP with both towers at its top level, got open_clip's {type(clip).__name__}. "
            "Choose another model."
        )
    clip.attn_mask = None
    return clip
