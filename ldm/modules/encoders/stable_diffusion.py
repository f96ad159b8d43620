"""Condition stages of Stable Diffusion 1 and 2 and of its image variations: towers of a CLIP, stored in checkpoints.

Text stages return the sequence of a text's tokens. Weights that are neither on this machine nor in a checkpoint are
reported when a condition is computed, see :class:`~ldm.modules.weights.NeedsWeights`.

Legend: B batch, S tokens, D width.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.data.options import require_choice
from ldm.modules.diffusionmodules.util import attend_multi_head
from ldm.modules.encoders import clip_loading
from ldm.modules.encoders.base import sent_to
from ldm.modules.encoders.clip_embedders import ClipTextStage, ImagePreprocessing
from ldm.modules.encoders.clip_loading import ClipSource, find_clip
from ldm.modules.weights import NeedsWeights
from ldm.ranges import Count
from ldm.util import ConfigError, UserError

_HUB_CONFIG, _HUB_WEIGHTS = "config.json", ("model.safetensors", "pytorch_model.bin")  # files of transformers
# OpenAI's models on the Hugging Face hub, and the names under which OpenAI and open_clip distribute them.
_HUB_NAMES = {
    "openai/clip-vit-large-patch14": "ViT-L/14",
    "openai/clip-vit-large-patch14-336": "ViT-L/14@336px",
    "openai/clip-vit-base-patch32": "ViT-B/32",
    "openai/clip-vit-base-patch16": "ViT-B/16",
}
# Keys of the text config of open_clip -> those of transformers, and their defaults there.
_HUB_TEXT = {
    "width": ("hidden_size", 512),
    "heads": ("num_attention_heads", 8),
    "layers": ("num_hidden_layers", 12),
    "vocab_size": ("vocab_size", 49408),
    "context_length": ("max_position_embeddings", 77),
}
# Parts of the names of text weights: open_clip -> transformers.
_RENAMED = {
    "token_embedding": "embeddings.token_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final": "final_layer_norm",
    "transformer.resblocks": "encoder.layers",
    "ln_": "layer_norm",
    "attn.": "self_attn.",
    "c_fc": "fc1",
    "c_proj": "fc2",
}
# Text weights of open_clip beside the layers.
_TEXT_WEIGHTS = ("positional_embedding", "text_projection", "logit_scale", "token_embedding", "ln_final")
_SMALL = {"layers": 1, "width": 64, "patch_size": 16, "image_size": 16}  # image tower that is removed


class TextLayer(nn.Module):
    """Causal self-attention and feed-forward, each pre-normalized and residual."""

    def __init__(self, width: int, num_heads: int, hidden: Count, quick_gelu: bool) -> None:
        super().__init__()
        self.num_heads, self.quick_gelu = num_heads, quick_gelu
        self.self_attn = nn.ModuleDict({f"{name}_proj": nn.Linear(width, width) for name in ("k", "v", "q", "out")})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)})
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (B, S, D) to (B, S, D)."""
        h = self.layer_norm1(x)
        q, k, v = (self.self_attn[f"{name}_proj"](h) for name in "qkv")
        x = x + self.self_attn["out_proj"](attend_multi_head(q, k, v, self.num_heads, is_causal=True))
        h = self.mlp["fc1"](self.layer_norm2(x))
        return x + self.mlp["fc2"](h * torch.sigmoid(1.702 * h) if self.quick_gelu else F.gelu(h))


class TextTransformer(nn.Module):
    """Text tower in the layout of transformers' ``CLIPTextModel``; the argument is a model config of open_clip."""

    def __init__(self, model_cfg: Mapping[str, Any]) -> None:
        super().__init__()
        text = {"width": 512, "heads": 8, "layers": 12, "mlp_ratio": 4.0, **model_cfg["text_cfg"]}
        width, self.length = text["width"], text.get("context_length", 77)
        tables = {"token": text.get("vocab_size", 49408), "position": self.length}
        self.embeddings = nn.ModuleDict({f"{k}_embedding": nn.Embedding(n, width) for k, n in tables.items()})
        self.embeddings.register_buffer("position_ids", torch.arange(self.length)[None])
        options = width, text["heads"], round(width * text["mlp_ratio"]), bool(model_cfg.get("quick_gelu"))
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(TextLayer(*options) for _ in range(text["layers"]))})
        self.final_layer_norm = nn.LayerNorm(width)
        self.register_load_state_dict_pre_hook(_add_position_ids)

    def forward(self, tokens: Tensor) -> list[Tensor]:
        """Map ``tokens`` (B, S) int64 to the embeddings and all layers' outputs, not normalized, (B, S, D) each."""
        position = self.embeddings["position_embedding"].weight[: tokens.shape[1]]
        hidden = [self.embeddings["token_embedding"](tokens) + position]
        for layer in self.encoder["layers"]:
            hidden.append(layer(hidden[-1]))
        return hidden


def _add_position_ids(module: TextTransformer, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Add the constant ``position_ids``, which only older checkpoints contain, to a state dict with the weights."""
    if f"{prefix}final_layer_norm.weight" in state:
        state[f"{prefix}embeddings.position_ids"] = torch.arange(module.length)[None]


def find_text_tower(name: str, weights: str | os.PathLike | None, allow_download: bool) -> ClipSource:
    """Resolve a name or folder to local files, as :func:`find_clip`, but also in the layout of transformers.

    ``name`` may also be a folder with ``config.json`` and optionally weights, a model in the Hugging Face cache
    (``owner/model``), or one of OpenAI's by its name there. Without ``weights``, missing ones are accepted.
    """
    path = Path(name).expanduser() / _HUB_CONFIG
    if not path.parent.is_dir() and re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        path = clip_loading.hub_file(name, _HUB_CONFIG)
    folder = path.parent
    if not path.is_file() or (folder / clip_loading.CONFIG_FILE).is_file():
        return find_clip(_HUB_NAMES.get(name, name), weights, allow_download, is_optional=True)
    found, missing = clip_loading.search_weights(name, [weights or folder], _HUB_WEIGHTS)
    if missing and weights is not None:
        raise UserError(missing)
    content = clip_loading.read_config(path)
    text = content.get("text_config") or content
    text_cfg = {ours: text.get(theirs, default) for ours, (theirs, default) in _HUB_TEXT.items()}
    text_cfg["mlp_ratio"] = text.get("intermediate_size", 2048) / text_cfg["width"]
    activation = text.get("hidden_act", "quick_gelu")
    if activation not in ("quick_gelu", "gelu"):
        raise UserError(f"{path}: expected hidden_act quick_gelu or gelu, got {activation!r}. Choose another CLIP.")
    model_cfg = {"text_cfg": text_cfg, "quick_gelu": activation == "quick_gelu"}
    return ClipSource(name, "ViT-L-14", model_cfg, {}, found, folder, missing)  # all of OpenAI's share a tokenizer


def text_tower_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the entries of :class:`TextTransformer` in a CLIP of transformers or of open_clip."""
    if any(key.startswith("text_model.") for key in state):
        return dict(state)
    found = {}
    for key, value in state.items():
        if not key.startswith("visual."):
            for old, new in _RENAMED.items():
                key = key.replace(old, new)
            is_joint = "in_proj_" in key
            parts = zip("qkv", value.chunk(3)) if is_joint else [("", value)]
            found |= {f"text_model.{key.replace('in_proj_', f'{name}_proj.')}": part for name, part in parts}
    return found


def fill(module: NeedsWeights, source: ClipSource, select: Callable[..., Mapping[str, Tensor]] = dict) -> None:
    """Give the tower, which is the child of a stage and on the meta device, ``select(weights)``, or zeros."""
    (tower,) = module.children()
    if source.weights is None:
        advice = "Or set model.params.ckpt_path to a checkpoint that contains the weights."
        module.missing_weights = f"{type(module).__name__}: {source.missing}\n{advice}"
        zeros = {key: torch.zeros(value.shape) for key, value in tower.state_dict().items()}
        tower.load_state_dict(zeros, assign=True)
    else:
        own = tower.to_empty(device=torch.get_default_device()).state_dict()
        with clip_loading.report_damage(source):
            state = select(clip_loading.read_weights(source.weights, [*own, "ln_final.weight", "positional_embedding"]))
            tower.load_state_dict({key: value for key, value in state.items() if key in own})


def build_tower(source: ClipSource, **changes: Any) -> nn.Module:
    """Return a CLIP on the meta device, with ``changes`` of the model config, without its constant mask."""
    with torch.device("meta"):
        clip = clip_loading.build_clip({**source.model_cfg, **changes})
    if not isinstance(clip, clip_loading.import_open_clip().CLIP):
        raise ConfigError(f"{source.name}: expected open_clip's CLIP, got {type(clip).__name__}. Choose another model.")
    clip.attn_mask = None
    return clip


class SequenceEmbedder(NeedsWeights, ClipTextStage):
    """Base class of the text stages; ``max_length`` is S, at most the context length of the CLIP."""

    LAYERS: tuple[str, ...] = ("last", "penultimate")
    embed: Callable[[Tensor], Tensor]  # from token ids (B, S), padded with zeros, to (B, S, D)

    def __init__(self, source: ClipSource, max_length: Count, layer: str) -> None:
        super().__init__()
        require_choice("cond_stage_config.params.layer", layer, self.LAYERS)
        text = source.model_cfg["text_cfg"]
        self.layer, self.width, vocab_size = layer, text.get("width", 512), text.get("vocab_size", 49408)
        self.tokenizer = clip_loading.load_tokenizer(source)
        self.max_length = min(max_length, text.get("context_length", 77))
        end = int(self.tokenize([""]).max())
        if end >= vocab_size:
            advice = "Add the words.json of the CLIP to its folder, or choose another CLIP."
            raise ConfigError(f"{source.name}: expected vocab_size above {end}, got {vocab_size}. {advice}")

    def forward(self, texts: Sequence[str]) -> Tensor:
        """Map B texts to (B, S, D).

        Raises:
            UserError: ``texts`` is not a list of texts, or the weights are missing.
        """
        if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
            advice = "Set model.params.cond_stage_key to the entry of the batch that holds the texts."
            raise UserError(f"{type(self).__name__}: expected a list of texts, got {type(texts).__name__}. {advice}")
        self.require_weights()
        return self.embed(sent_to(next(self.parameters()).device, self.tokenize(list(texts))))


class FrozenCLIPEmbedder(SequenceEmbedder):
    """Text tower of OpenAI's CLIP as in Stable Diffusion 1: the last hidden states of all tokens.

    Args:
        version: see :func:`find_text_tower`, as ``weights`` and ``allow_download``.
        device: accepted from old configs and ignored; the module moves with its parent.
        max_length: number of tokens S, including start and end.
        freeze: exclude the weights from training.
        layer: ``last``, or ``penultimate`` for the layer before it, both normalized; ``hidden`` for the output of a
            layer, not normalized; ``pooled`` for the last hidden state of the end token alone, (B, 1, D).
        layer_idx: with ``hidden``, index of the layer: 0 for the embeddings, -1 for the last one.
    """

    LAYERS = ("last", "penultimate", "hidden", "pooled")

    def __init__(
        self,
        version: str = "openai/clip-vit-large-patch14",
        device: Any = None,
        max_length: Count = 77,
        freeze: bool = True,
        layer: Literal["last", "penultimate", "hidden", "pooled"] = "last",
        layer_idx: int | None = None,
        weights: str | os.PathLike | None = None,
        allow_download: bool = False,
    ) -> None:
        source = find_text_tower(str(version), weights, allow_download)
        super().__init__(source, max_length, layer)
        with torch.device("meta"):
            tower = TextTransformer(source.model_cfg)
        depth, self.layer_idx = len(tower.encoder["layers"]), layer_idx
        if layer == "hidden" and (layer_idx is None or not -depth - 1 <= layer_idx <= depth):
            expected = f"expected {-depth - 1} to {depth} with `layer: hidden`"
            raise ConfigError(f"cond_stage_config.params.layer_idx: {expected}, got {layer_idx}. Set the index.")
        self.transformer = nn.ModuleDict({"text_model": tower})
        fill(self, source, text_tower_weights)
        self.requires_grad_(not freeze)

    def embed(self, tokens: Tensor) -> Tensor:
        """Map token ids (B, S) to (B, S, D); padding is replaced by the end token, as in transformers."""
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
        device, max_length, freeze, weights, allow_download: see :class:`FrozenCLIPEmbedder`.
        layer: ``last``, or ``penultimate`` to leave out the last layer.
    """

    unused_weights = ("model.text_projection", "model.logit_scale")

    def __init__(
        self,
        arch: str = "ViT-H-14",
        version: str | None = "laion2b_s32b_b79k",
        device: Any = None,
        max_length: Count = 77,
        freeze: bool = True,
        layer: Literal["last", "penultimate"] = "last",
        weights: str | os.PathLike | None = None,
        allow_download: bool = False,
    ) -> None:
        name = str(arch)
        if version is not None and Path(version).is_file():
            weights = weights or version
        elif version is not None and not Path(name).expanduser().is_dir():
            name = f"{name}:{version}"
        source = find_clip(name, weights, allow_download, is_optional=True)
        super().__init__(source, max_length, layer)
        self.model = build_tower(source, vision_cfg=_SMALL)
        del self.model.visual
        fill(self, source)
        self.requires_grad_(not freeze)

    def embed(self, tokens: Tensor) -> Tensor:
        """Map token ids (B, S), padded with zeros, to (B, S, D)."""
        h = self.model.token_embedding(tokens) + self.model.positional_embedding[: tokens.shape[1]]
        mask = torch.full((tokens.shape[1],) * 2, float("-inf"), device=h.device).triu(1)
        layers = self.model.transformer.resblocks
        for layer in layers[: len(layers) - (self.layer == "penultimate")]:
            h = layer(h, attn_mask=mask)
        return self.model.ln_final(h)


class FrozenCLIPImageEmbedder(NeedsWeights, ImagePreprocessing):
    """Image tower of a CLIP as in Stable Diffusion image variations: one token, the projected embedding.

    Args:
        model, antialias, weights, allow_download: see ``FrozenClipImageEmbedder`` of LDM, which is spelled differently.
        jit, device: accepted from old configs and ignored.
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
        self.requires_grad_(False)
        self.model.visual.requires_grad_(True)  # not frozen by itself, in spite of its name
        self.set_preprocessing(self.model.visual.image_size, source, antialias)
        self.width = source.model_cfg["embed_dim"]

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``x`` (B, 3, H, W) in [-1, 1] to embeddings, float32 (B, D), not normalized."""
        self.require_weights()
        return self.embed_images(self.model.visual, x)

    def encode(self, x: Tensor) -> Tensor:
        """Map images ``x`` (B, 3, H, W) in [-1, 1] to one token each, (B, 1, D)."""
        return self(x)[:, None]
