"""The diffusion U-Net (Dhariwal & Nichol 2021) and builders of its parts, shared with the shift U-Net.

Legend: B batch, C channels, H W space, S tokens, E = 4 * model_channels width of the timestep embedding.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ldm.modules.attention import SpatialTransformer
from ldm.modules.diffusionmodules.blocks import AttentionBlock, Downsample, InputStage, ResBlock, UNetStage, Upsample
from ldm.modules.diffusionmodules.shapes import UNetConfig
from ldm.modules.diffusionmodules.util import CONVOLUTIONS, normalization, timestep_embedding, zero_module
from ldm.util import UserError

logger = logging.getLogger(__name__)


def res_block(
    config: UNetConfig,
    channels: int,
    out_channels: int,
    cond_channels: int | None = None,
    up: bool = False,
    down: bool = False,
) -> ResBlock:
    """Return a residual block."""
    options = config.dims, config.use_scale_shift_norm, config.use_checkpoint
    return ResBlock(channels, config.embed_dim, out_channels, config.dropout, cond_channels, *options, up, down)


def attentions(config: UNetConfig, channels: int, level: int, is_decoder: bool = False) -> list[nn.Module]:
    """Return the attention that follows each residual block of a level; empty without one."""
    if 2**level not in config.attention_resolutions:
        return []
    is_disabled = config.disable_self_attentions is not None and config.disable_self_attentions[level]
    return [attention(config, channels, level, is_disabled, is_decoder)]


def attention(
    config: UNetConfig, channels: int, level: int, disable_self_attn: bool = False, is_decoder: bool = False
) -> nn.Module:
    """Return an attention block or a spatial transformer at a level."""
    num_heads = config.num_heads_at(channels, is_decoder)
    if not config.use_spatial_transformer:
        return AttentionBlock(channels, num_heads, config.use_checkpoint, config.use_new_attention_order)
    self_attention = config.self_attention_resolutions
    has_own_width = config.num_head_channels != -1 and not config.legacy
    return SpatialTransformer(
        channels,
        num_heads,
        config.num_head_channels if has_own_width else channels // num_heads,
        config.transformer_depth,
        context_dim=config.context_dim,
        use_checkpoint=config.use_checkpoint,
        use_self_attention=self_attention is None or 2**level in self_attention,
        disable_self_attn=disable_self_attn,
        use_linear=config.use_linear_in_transformer,
    )


def build_encoder(config: UNetConfig) -> tuple[nn.ModuleList, list[int]]:
    """Return the stages of the encoder and the channels of their outputs, which the decoder takes as skips."""
    channels = config.model_channels
    stem = CONVOLUTIONS[config.dims](config.in_channels, channels, 3, padding=1)
    blocks = nn.ModuleList([InputStage(stem)])
    skip_channels = [channels]
    for level, width in enumerate(config.widths):
        for _ in range(config.depth_at(level)):
            layers = [res_block(config, channels, width), *attentions(config, width, level)]
            channels = width
            blocks.append(UNetStage(*layers))
            skip_channels.append(channels)
        if level != len(config.widths) - 1:
            if config.resblock_updown:
                layer: nn.Module = res_block(config, channels, channels, down=True)
            else:
                layer = Downsample(channels, config.conv_resample, config.dims)
            blocks.append(UNetStage(layer))
            skip_channels.append(channels)
    return blocks, skip_channels


def build_middle(config: UNetConfig, cond_channels: int | None = None) -> UNetStage:
    """Return the coarsest stage; its residual blocks take a second embedding with ``cond_channels``."""
    channels = config.widths[-1]
    return UNetStage(
        res_block(config, channels, channels, cond_channels),
        attention(config, channels, len(config.widths) - 1, config.disable_middle_self_attn),
        res_block(config, channels, channels, cond_channels),
    )


def build_decoder(config: UNetConfig, skip_channels: Sequence[int], cond_channels: int | None = None) -> nn.ModuleList:
    """Return the decoder stages, coarsest first; residual blocks take a second embedding with ``cond_channels``."""
    remaining = list(skip_channels)
    channels = config.widths[-1]
    blocks = nn.ModuleList()
    for level, width in reversed(list(enumerate(config.widths))):
        for index in range(config.depth_at(level) + 1):
            layers = [res_block(config, channels + remaining.pop(), width, cond_channels)]
            layers += attentions(config, width, level, is_decoder=True)
            channels = width
            if level and index == config.depth_at(level):
                if config.resblock_updown:
                    layers.append(res_block(config, channels, channels, cond_channels, up=True))
                else:
                    layers.append(Upsample(channels, config.conv_resample, config.dims))
            blocks.append(UNetStage(*layers))
    return blocks


def build_embedding(in_channels: int, embed_dim: int) -> nn.Sequential:
    """Return a two-layer perceptron from a vector to an embedding."""
    return nn.Sequential(nn.Linear(in_channels, embed_dim), nn.SiLU(), nn.Linear(embed_dim, embed_dim))


def build_head(config: UNetConfig) -> nn.Sequential:
    """Return normalization, activation and the last convolution, which is initialized to zero."""
    channels = config.widths[0]
    convolution = CONVOLUTIONS[config.dims](channels, config.out_channels, 3, padding=1)
    return nn.Sequential(normalization(channels), nn.SiLU(), zero_module(convolution))


class UNetModel(nn.Module):
    """U-Net from a noisy picture and its timestep to a prediction of the same size; takes :class:`UNetConfig`'s fields.

    Example:
        >>> import torch
        >>> unet = UNetModel(image_size=8, in_channels=4, out_channels=4, model_channels=32, num_res_blocks=1,
        ...                  attention_resolutions=[2], channel_mult=[1, 2], num_heads=4)
        >>> unet(torch.randn(2, 4, 8, 8), torch.tensor([3, 900])).shape
        torch.Size([2, 4, 8, 8])
    """

    def __init__(self, **params: Any) -> None:
        super().__init__()
        config = UNetConfig.from_params(params)
        for name in ("use_fp16", "use_bf16"):
            if vars(config)[name]:
                logger.warning("`%s` is ignored; set the trainer's `precision` instead", name)
        self.config = config
        self.in_channels, self.image_size = config.in_channels, config.image_size  # read by LDM's scripts
        self.time_embed = build_embedding(config.model_channels, config.embed_dim)
        if config.adm_in_channels is not None:
            self.label_emb = nn.Sequential(build_embedding(config.adm_in_channels, config.embed_dim))
        elif config.num_classes is not None:
            self.label_emb = nn.Embedding(config.num_classes, config.embed_dim)
        self.input_blocks, self.skip_channels = build_encoder(config)
        self.middle_block = build_middle(config)
        self.output_blocks = build_decoder(config, self.skip_channels)
        self.out = build_head(config)
        if config.n_embed is not None:
            self.id_predictor = nn.Sequential(
                normalization(config.widths[0]), CONVOLUTIONS[config.dims](config.widths[0], config.n_embed, 1)
            )

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        """Predict.

        Args:
            x: (B, in_channels, H, W) noisy picture.
            timesteps: (B,) steps.
            context: (B, S, context_dim) tokens, with spatial transformers.
            y: (B,) integer class labels with an integer ``num_classes``, or (B, adm_in_channels) float vectors with
                ``num_classes: sequential``.

        Returns:
            (B, out_channels, H, W), or (B, n_embed, H, W) logits with ``n_embed``.

        Raises:
            UserError: ``y`` is missing, unexpected, or of the wrong shape or type.
        """
        h, skips, emb = self.encode(x, timesteps, context, y)
        return self.decode(h, skips, emb, context)

    def encode(
        self, x: Tensor, timesteps: Tensor, context: Tensor | None = None, y: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        """Run the encoder; return the coarsest features, the output of each stage and the embedding (B, E)."""
        self._check_vector(y, len(x))
        steps = timestep_embedding(timesteps, self.config.model_channels)
        emb = self.time_embed(steps.to(self.time_embed[0].weight.dtype))
        if y is not None:
            emb = emb + self.label_emb(y.to(emb.dtype) if y.is_floating_point() else y.long())
        h, skips = x, []
        for block in self.input_blocks:
            h = block(h, emb, context)
            skips.append(h)
        return h, skips, emb

    def _check_vector(self, y: Tensor | None, batch: int) -> None:
        width, num_classes = self.config.adm_in_channels, self.config.num_classes
        shape = (batch,) if width is None else (batch, width)
        if num_classes is None:
            expected, is_valid = "no y, because unet_config.params.num_classes is not set", y is None
        else:
            expected = f"{'integer labels' if width is None else 'float vectors'} y of shape {shape}"
            is_valid = y is not None and y.shape == shape and y.is_floating_point() == (width is not None)
        if not is_valid:
            found = "none" if y is None else f"{y.dtype} of shape {tuple(y.shape)}"
            raise UserError(
                f"U-Net: expected {expected}, got {found}. Make unet_config.params.num_classes "
                f"({num_classes}) and the condition (`conditioning_key: adm`) match."
            )

    def decode(self, h: Tensor, skips: list[Tensor], emb: Tensor, context: Tensor | None = None) -> Tensor:
        """Run the decoder on the outputs of :meth:`encode`."""
        h = self.middle_block(h, emb, context)
        for block, skip in zip(self.output_blocks, reversed(skips)):
            h = block(h, emb, context, skip=skip)
        return self.id_predictor(h) if self.config.n_embed is not None else self.out(h)
