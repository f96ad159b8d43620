"""Names and shapes in Stable Diffusion checkpoints, written out by rule from the published files.

Sizes are arguments, so that checkpoints of reduced width have the same layout. Each function returns name -> shape.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from stand_ins import LDM_SCHEDULE
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]


def under(prefix: str, shapes: Shapes) -> Shapes:
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}


def layer(name: str, *weight: int, bias: bool = True) -> Shapes:
    """Weight and bias of a convolution, a linear layer or, with one number, a normalization."""
    return {f"{name}.weight": weight} | ({f"{name}.bias": weight[:1]} if bias else {})


def res_block(given: int, width: int, embedding: int) -> Shapes:
    shapes = layer("in_layers.0", given) | layer("in_layers.2", width, given, 3, 3)
    shapes |= layer("emb_layers.1", width, embedding)
    shapes |= layer("out_layers.0", width) | layer("out_layers.3", width, width, 3, 3)
    return shapes | (layer("skip_connection", width, given, 1, 1) if given != width else {})


def transformer(width: int, context: int, is_linear: bool, disabled: bool = False) -> Shapes:
    end = () if is_linear else (1, 1)
    shapes = layer("norm", width) | layer("proj_in", width, width, *end) | layer("proj_out", width, width, *end)
    block: Shapes = {}
    for name, source in (("attn1", context if disabled else width), ("attn2", context)):
        block |= layer(f"{name}.to_q", width, width, bias=False) | layer(f"{name}.to_out.0", width, width)
        block |= layer(f"{name}.to_k", width, source, bias=False) | layer(f"{name}.to_v", width, source, bias=False)
    block |= layer("ff.net.0.proj", 8 * width, width) | layer("ff.net.2", width, 4 * width)
    for number in (1, 2, 3):
        block |= layer(f"norm{number}", width)
    return shapes | under("transformer_blocks.0", block)


def unet(
    channels: int,
    mult: Sequence[int],
    levels: Sequence[int],
    context: int,
    in_channels: int = 4,
    is_linear: bool = False,
    num_blocks: int = 2,
    disabled: Sequence[bool] = (),
) -> Shapes:
    """U-Net with transformers at ``levels`` and in the middle; ``disabled`` are levels without self-attention."""
    embedding, widths = 4 * channels, [factor * channels for factor in mult]
    disabled = disabled or [False] * len(mult)
    shapes = layer("time_embed.0", embedding, channels) | layer("time_embed.2", embedding, embedding)
    shapes |= layer("input_blocks.0.0", channels, in_channels, 3, 3)
    skips, width, number = [channels], channels, 1
    for level, wide in enumerate(widths):
        for _ in range(num_blocks):
            shapes |= under(f"input_blocks.{number}.0", res_block(width, wide, embedding))
            width = wide
            if level in levels:
                shapes |= under(f"input_blocks.{number}.1", transformer(width, context, is_linear, disabled[level]))
            skips.append(width)
            number += 1
        if level < len(widths) - 1:
            shapes |= layer(f"input_blocks.{number}.0.op", width, width, 3, 3)
            skips.append(width)
            number += 1
    shapes |= under("middle_block.0", res_block(width, width, embedding))
    shapes |= under("middle_block.1", transformer(width, context, is_linear))
    shapes |= under("middle_block.2", res_block(width, width, embedding))
    number = 0
    for level, wide in reversed(list(enumerate(widths))):
        for index in range(num_blocks + 1):
            shapes |= under(f"output_blocks.{number}.0", res_block(width + skips.pop(), wide, embedding))
            width, place = wide, 1
            if level in levels:
                shapes |= under(f"output_blocks.{number}.1", transformer(width, context, is_linear, disabled[level]))
                place = 2
            if level and index == num_blocks:
                shapes |= layer(f"output_blocks.{number}.{place}.conv", width, width, 3, 3)
            number += 1
    return shapes | layer("out.0", channels) | layer("out.2", 4, channels, 3, 3)


def _auto_block(given: int, width: int) -> Shapes:
    shapes = layer("norm1", given) | layer("conv1", width, given, 3, 3)
    shapes |= layer("norm2", width) | layer("conv2", width, width, 3, 3)
    return shapes | (layer("nin_shortcut", width, given, 1, 1) if given != width else {})


def _auto_middle(width: int) -> Shapes:
    shapes = under("mid.block_1", _auto_block(width, width)) | under("mid.block_2", _auto_block(width, width))
    shapes |= layer("mid.attn_1.norm", width)
    for name in ("q", "k", "v", "proj_out"):
        shapes |= layer(f"mid.attn_1.{name}", width, width, 1, 1)
    return shapes


def autoencoder(channels: int, mult: Sequence[int], num_blocks: int = 2, latent: int = 4) -> Shapes:
    """KL autoencoder without attention outside of the middle."""
    widths = [factor * channels for factor in mult]
    encoder, width = layer("conv_in", channels, 3, 3, 3), channels
    for level, wide in enumerate(widths):
        for index in range(num_blocks):
            encoder |= under(f"down.{level}.block.{index}", _auto_block(width, wide))
            width = wide
        if level < len(widths) - 1:
            encoder |= layer(f"down.{level}.downsample.conv", width, width, 3, 3)
    encoder |= _auto_middle(width) | layer("norm_out", width) | layer("conv_out", 2 * latent, width, 3, 3)
    decoder = layer("conv_in", width, latent, 3, 3) | _auto_middle(width)
    for level, wide in reversed(list(enumerate(widths))):
        for index in range(num_blocks + 1):
            decoder |= under(f"up.{level}.block.{index}", _auto_block(width, wide))
            width = wide
        if level:
            decoder |= layer(f"up.{level}.upsample.conv", width, width, 3, 3)
    decoder |= layer("norm_out", width) | layer("conv_out", 3, width, 3, 3)
    ends = layer("quant_conv", 2 * latent, 2 * latent, 1, 1) | layer("post_quant_conv", latent, latent, 1, 1)
    return under("encoder", encoder) | under("decoder", decoder) | ends


def clip_of_transformers(width: int, depth: int, vocabulary: int = 49408, length: int = 77) -> Shapes:
    """Text tower in Stable Diffusion 1."""
    shapes: Shapes = {"embeddings.position_ids": (1, length)}
    shapes |= layer("embeddings.token_embedding", vocabulary, width, bias=False)
    shapes |= layer("embeddings.position_embedding", length, width, bias=False)
    for number in range(depth):
        block = layer("layer_norm1", width) | layer("layer_norm2", width)
        block |= layer("mlp.fc1", 4 * width, width) | layer("mlp.fc2", width, 4 * width)
        for name in ("q", "k", "v", "out"):
            block |= layer(f"self_attn.{name}_proj", width, width)
        shapes |= under(f"encoder.layers.{number}", block)
    return under("transformer.text_model", shapes | layer("final_layer_norm", width))


def _blocks(width: int, depth: int) -> Shapes:
    block = layer("ln_1", width) | layer("ln_2", width) | layer("attn.out_proj", width, width)
    block |= {"attn.in_proj_weight": (3 * width, width), "attn.in_proj_bias": (3 * width,)}
    block |= layer("mlp.c_fc", 4 * width, width) | layer("mlp.c_proj", width, 4 * width)
    return {key: shape for number in range(depth) for key, shape in under(f"resblocks.{number}", block).items()}


def clip_of_open_clip(width: int, depth: int, vocabulary: int = 49408, length: int = 77, joint: int = 0) -> Shapes:
    """Text tower in Stable Diffusion 2; without layers (depth 0) what is left of it in image variations."""
    shapes: Shapes = {"positional_embedding": (length, width), "text_projection": (width, joint or width)}
    shapes |= {"logit_scale": (), "token_embedding.weight": (vocabulary, width)} | layer("ln_final", width)
    return under("model", shapes | under("transformer", _blocks(width, depth)))


def clip_images(width: int, depth: int, joint: int, patch: int, size: int) -> Shapes:
    """Image tower in image variations."""
    positions = (size // patch) ** 2 + 1
    shapes: Shapes = {"class_embedding": (width,), "positional_embedding": (positions, width), "proj": (width, joint)}
    shapes |= layer("conv1", width, 3, patch, patch, bias=False) | layer("ln_pre", width) | layer("ln_post", width)
    return under("model.visual", shapes | under("transformer", _blocks(width, depth)))


def checkpoint(
    network: Shapes, first_stage: Shapes, stage: Shapes, steps: int = 1000, has_average: bool = False
) -> Shapes:
    """A whole checkpoint, with the averaged network or without."""
    shapes: Shapes = {name: (steps,) for name in LDM_SCHEDULE} | under("model.diffusion_model", network)
    shapes |= under("first_stage_model", first_stage) | under("cond_stage_model", stage)
    if has_average:
        shapes |= {"model_ema.decay": (), "model_ema.num_updates": ()}
        shapes |= {f"model_ema.diffusion_model{key.replace('.', '')}": shape for key, shape in network.items()}
    return shapes


def random_weights(shapes: Shapes, seed: int = 0) -> dict[str, Tensor]:
    """Small random values; ``position_ids`` are numbers, and vectors of normalizations are near one."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=generator) * 0.05
        is_scale = name.endswith("weight") and len(shape) == 1
        state[name] = value + 1 if is_scale else value
        if name.endswith("position_ids"):
            state[name] = torch.arange(shape[1])[None]
    return state
