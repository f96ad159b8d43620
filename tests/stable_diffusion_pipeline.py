"""A small random pipeline of diffusers with the classes of Stable Diffusion 1, and its weights in CompVis layout."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import stable_diffusion_layout as layout
import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from open_clip.tokenizer import SimpleTokenizer
from stable_diffusion_configs import model
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

WIDTH, DEPTH, SIZE = 16, 2, 16  # of the text encoder; of images
TEXT = {"hidden_size": WIDTH, "num_attention_heads": 2, "num_hidden_layers": DEPTH, "intermediate_size": 64}
UNET = {"model_channels": 32, "channel_mult": [1, 2], "attention_resolutions": [2, 1], "context_dim": WIDTH}
UNET = {**UNET, "num_res_blocks": 1, "num_heads": 4}
SMALL = {"image_size": 8, "ddconfig": {"ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1, "resolution": SIZE}}
NO_SAFETY = {**dict.fromkeys(("safety_checker", "feature_extractor")), "requires_safety_checker": False}


def tokenizer(folder: Path) -> CLIPTokenizer:
    """The tokenizer of CLIP from its two files."""
    words = SimpleTokenizer()
    ends = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({ends.get(word, word): row for word, row in words.encoder.items()}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in words.bpe_ranks))
    return CLIPTokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), model_max_length=77)


def save_pipeline(folder: Path, prediction_type: str = "epsilon", **changes: Any) -> Path:
    """Write a pipeline; ``changes`` are parts of it."""
    torch.manual_seed(0)
    numbers = {"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}
    widths, levels = (32, 64), 2
    network = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=widths,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * levels,
        up_block_types=("CrossAttnUpBlock2D",) * levels,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
    )
    ends = {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "skip_prk_steps": True}
    parts = {
        "vae": AutoencoderKL(block_out_channels=widths, layers_per_block=1, sample_size=SIZE, **ends),
        "text_encoder": CLIPTextModel(CLIPTextConfig(vocab_size=49408, **TEXT, **numbers)),
        "tokenizer": tokenizer(folder.parent / f"{folder.name}_tokenizer"),
        "unet": network,
        "scheduler": PNDMScheduler(**betas, steps_offset=1, prediction_type=prediction_type),
    }
    for value in network.parameters():  # of initial weights, conditions change too little
        value.data += 0.05 * torch.randn_like(value)
    StableDiffusionPipeline(**{**parts, **NO_SAFETY, **changes}).save_pretrained(folder)
    return folder


def compvis_config(folder: Path, **params: Any) -> dict[str, Any]:
    """The ``model`` section of the same sizes; ``folder`` is written, and describes the text encoder."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"text_config": TEXT}))
    return model("FrozenCLIPEmbedder", {"version": str(folder)}, unet=UNET, **SMALL, **params)


def compvis_weights(pipeline: Any) -> dict[str, Tensor]:
    """The weights of a pipeline by the names in CompVis checkpoints."""
    first_stage, encoder = layout.autoencoder(32, (1, 2), 1), pipeline.text_encoder.state_dict()
    state = {}
    for names, prefix, rename, source in (
        (layout.unet(32, (1, 2), (0, 1), WIDTH, num_blocks=1), "model.diffusion_model", _unet, pipeline.unet),
        (first_stage, "first_stage_model", _vae, pipeline.vae),
    ):
        weights = source.state_dict()
        state |= {f"{prefix}.{name}": weights[rename(name)].reshape(shape) for name, shape in names.items()}
    state |= {f"cond_stage_model.transformer.text_model.{name}": value for name, value in encoder.items()}
    return {name.replace("text_model.text_model.", "text_model."): value for name, value in state.items()}


def _renamed(name: str, rules: dict[str, str]) -> str:
    for old, new in rules.items():
        name = re.sub(old, new, name)
    return name


_RES = {
    r"in_layers\.0": "norm1",
    r"in_layers\.2": "conv1",
    r"emb_layers\.1": "time_emb_proj",
    r"out_layers\.0": "norm2",
    r"out_layers\.3": "conv2",
    "skip_connection": "conv_shortcut",
}


def _unet(name: str) -> str:
    """Return the name in diffusers; two levels of one block each, with transformers."""
    rules = {
        r"^time_embed\.0": "time_embedding.linear_1",
        r"^time_embed\.2": "time_embedding.linear_2",
        r"^input_blocks\.0\.0": "conv_in",
        r"^out\.0": "conv_norm_out",
        r"^out\.2": "conv_out",
        r"^middle_block\.0": "mid_block.resnets.0",
        r"^middle_block\.1": "mid_block.attentions.0",
        r"^middle_block\.2": "mid_block.resnets.1",
        r"^input_blocks\.2\.0\.op": "down_blocks.0.downsamplers.0.conv",
        r"^output_blocks\.1\.2": "up_blocks.0.upsamplers.0",
    }
    parts = {"0": "resnets", "1": "attentions"}
    for number, level in ((1, 0), (3, 1)):
        rules |= {rf"^input_blocks\.{number}\.{k}": f"down_blocks.{level}.{part}.0" for k, part in parts.items()}
    for number in range(4):
        place = f"{number // 2}", f"{number % 2}"
        rules |= {rf"^output_blocks\.{number}\.{k}": f"up_blocks.{place[0]}.{p}.{place[1]}" for k, p in parts.items()}
    return _renamed(name, {**rules, **_RES})


def _vae(name: str) -> str:
    rules = {
        r"down\.(\d)\.block": r"down_blocks.\1.resnets",
        r"down\.(\d)\.downsample": r"down_blocks.\1.downsamplers.0",
        r"up\.0\.block": "up_blocks.1.resnets",
        r"up\.1\.block": "up_blocks.0.resnets",
        r"up\.1\.upsample": "up_blocks.0.upsamplers.0",
        r"mid\.block_1": "mid_block.resnets.0",
        r"mid\.block_2": "mid_block.resnets.1",
        r"mid\.attn_1\.norm": "mid_block.attentions.0.group_norm",
        r"mid\.attn_1\.proj_out": "mid_block.attentions.0.to_out.0",
        r"mid\.attn_1\.(\w)\.": r"mid_block.attentions.0.to_\1.",
        "nin_shortcut": "conv_shortcut",
        r"coder\.norm_out": "coder.conv_norm_out",
    }
    return _renamed(name, rules)
