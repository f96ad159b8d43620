"""Text tower of a CLIP in the layout of transformers' ``CLIPTextModel``, as stored in Stable Diffusion 1 checkpoints.

The tower is described by a folder of that library (``config.json``), or by any name or folder of
:mod:`ldm.modules.encoders.clip_loading`, whose weights are converted. The package transformers is not needed.

Legend: N texts, S tokens, D width.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.diffusionmodules.util import attend_multi_head
from ldm.modules.encoders.clip_loading import CONFIG_FILE, ClipSource, find_clip, find_in_folder, hub_file
from ldm.util import ConfigError, UserError

HUB_CONFIG_FILE = "config.json"
HUB_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
TOKENIZER_MODEL = "ViT-L-14"  # model of open_clip with the tokenizer of OpenAI's CLIPs

# OpenAI's models on the Hugging Face hub: their other name, under which open_clip and OpenAI distribute them.
_HUB_NAMES = {
    "openai/clip-vit-large-patch14": "ViT-L/14",
    "openai/clip-vit-large-patch14-336": "ViT-L/14@336px",
    "openai/clip-vit-base-patch32": "ViT-B/32",
    "openai/clip-vit-base-patch16": "ViT-B/16",
}
_TEXT_DEFAULTS = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "num_hidden_layers": 12,
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
}
# Parts of names: open_clip -> transformers.
_RENAMED = {
    "token_embedding": "embeddings.token_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final": "final_layer_norm",
    "transformer.resblocks": "encoder.layers",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn": "self_attn",
    "c_fc": "fc1",
    "c_proj": "fc2",
}


def quick_gelu(x: Tensor) -> Tensor:
    """Return OpenAI's approximation of GELU, ``x sigmoid(1.702 x)``."""
    return x * torch.sigmoid(1.702 * x)


_ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu}


class TextLayer(nn.Module):
    """Causal self-attention and feed-forward, each pre-normalized and residual."""

    def __init__(self, width: int, hidden: int, num_heads: int, activation: str) -> None:
        super().__init__()
        self.num_heads, self.activation = num_heads, _ACTIVATIONS[activation]
        names = ("k_proj", "v_proj", "q_proj", "out_proj")
        self.self_attn = nn.ModuleDict({name: nn.Linear(width, width) for name in names})
        self.layer_norm1 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)})
        self.layer_norm2 = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (N, S, D) to (N, S, D)."""
        h = self.layer_norm1(x)
        q, k, v = (self.self_attn[name](h) for name in ("q_proj", "k_proj", "v_proj"))
        x = x + self.self_attn["out_proj"](attend_multi_head(q, k, v, self.num_heads, is_causal=True))
        return x + self.mlp["fc2"](self.activation(self.mlp["fc1"](self.layer_norm2(x))))


class TextEmbeddings(nn.Module):
    """Sum of token and position embeddings. The buffer ``position_ids`` is contained in older checkpoints only."""

    def __init__(self, vocab_size: int, length: int, width: int) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.position_embedding = nn.Embedding(length, width)
        self.register_buffer("position_ids", torch.arange(length)[None])
        self.register_load_state_dict_pre_hook(_add_position_ids)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map ``tokens`` (N, S) int64 to (N, S, D)."""
        return self.token_embedding(tokens) + self.position_embedding.weight[: tokens.shape[1]]


def _add_position_ids(module: TextEmbeddings, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Replace ``position_ids``, which are constant, in a state dict with the weights."""
    if f"{prefix}token_embedding.weight" in state:
        state[f"{prefix}position_ids"] = torch.arange(module.position_embedding.num_embeddings)[None]


class TextTransformer(nn.Module):
    """Text tower; the arguments are the names of ``_TEXT_DEFAULTS``, as in ``config.json``."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        width, hidden = config["hidden_size"], config["intermediate_size"]
        if config["hidden_act"] not in _ACTIVATIONS:
            raise ConfigError(
                f"CLIP text tower: expected the activation {' or '.join(_ACTIVATIONS)} (hidden_act), got "
                f"{config['hidden_act']!r}. Choose another CLIP."
            )
        options = width, hidden, config["num_attention_heads"], config["hidden_act"]
        self.embeddings = TextEmbeddings(config["vocab_size"], config["max_position_embeddings"], width)
        layers = nn.ModuleList(TextLayer(*options) for _ in range(config["num_hidden_layers"]))
        self.encoder = nn.ModuleDict({"layers": layers})
        self.final_layer_norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> list[Tensor]:
        """Map ``tokens`` (N, S) int64 to embeddings and outputs of all layers, not normalized, each (N, S, D)."""
        hidden = [self.embeddings(tokens)]
        for layer in self.encoder["layers"]:
            hidden.append(layer(hidden[-1]))
        return hidden


def find_text_tower(
    name: str, weights: str | os.PathLike | None = None, allow_download: bool = False
) -> tuple[ClipSource, dict[str, Any]]:
    """Resolve a name or folder to local files and to the arguments of :class:`TextTransformer`.

    Args:
        name: folder with ``config.json`` and optionally weights; a model of OpenAI on the Hugging Face hub, or any
            model in its cache (``owner/model``); or see :mod:`ldm.modules.encoders.clip_loading`.
        weights: weight file, or folder that contains it; None: search, and accept that there is none.
        allow_download: download missing weights.

    Raises:
        UserError: the name is unknown, or ``weights`` is wrong.
    """
    path = Path(name).expanduser() / HUB_CONFIG_FILE
    if not path.parent.is_dir() and name.count("/") == 1:
        path = hub_file(name, HUB_CONFIG_FILE)
    if not path.is_file() or (path.parent / CONFIG_FILE).is_file():
        source = find_clip(_HUB_NAMES.get(name, name), weights, allow_download, is_optional=True)
        return source, _text_config(source.model_cfg)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        config = {**_TEXT_DEFAULTS, **(content.get("text_config") or content)}
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{path}: expected the config of a CLIP, got {error}. Copy the file again.") from error
    found, missing = find_in_folder(path.parent, weights, HUB_WEIGHT_FILES, is_optional=weights is None)
    if found is None and name in _HUB_NAMES:  # the config is cached, but the weights may be elsewhere
        return find_clip(_HUB_NAMES[name], None, allow_download, is_optional=True), config
    model_cfg = {"text_cfg": {"vocab_size": config["vocab_size"], "context_length": config["max_position_embeddings"]}}
    return ClipSource(name, TOKENIZER_MODEL, model_cfg, {}, found, path.parent, missing), config


def _text_config(model_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of :class:`TextTransformer` of a model of open_clip."""
    text, default = model_cfg["text_cfg"], _TEXT_DEFAULTS
    width = text.get("width", default["hidden_size"])
    return {
        "hidden_size": width,
        "intermediate_size": int(width * text.get("mlp_ratio", 4)),
        "num_attention_heads": text.get("heads", default["num_attention_heads"]),
        "num_hidden_layers": text.get("layers", default["num_hidden_layers"]),
        "vocab_size": text.get("vocab_size", default["vocab_size"]),
        "max_position_embeddings": text.get("context_length", default["max_position_embeddings"]),
        "hidden_act": "quick_gelu" if model_cfg.get("quick_gelu") else "gelu",
    }


def text_tower_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the entries of the text tower of a CLIP, of transformers or of open_clip, by transformers' names."""
    if any(key.startswith("text_model.") for key in state):
        return {key: value for key, value in state.items() if key.startswith("text_model.")}
    found = {}
    for key, value in state.items():
        if key.startswith(("token_embedding.", "positional_embedding", "ln_final.", "transformer.resblocks.")):
            for old, new in _RENAMED.items():
                key = key.replace(old, new)
            if "in_proj_" in key:
                parts = zip("qkv", value.chunk(3))
                found |= {f"text_model.{key.replace('in_proj_', f'{letter}_proj.')}": part for letter, part in parts}
            else:
                found[f"text_model.{key}"] = value
    return found
