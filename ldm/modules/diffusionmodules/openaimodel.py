"""The diffusion U-Net and the parts its relatives are built of (Dhariwal & Nichol 2021).

Legend: B batch, C channels, H W space, E = 4 * model_channels width of the timestep embedding.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor, nn

from ldm.modules.attention import SpatialTransformer
from ldm.modules.diffusionmodules.blocks import AttentionBlock, Downsample, ResBlock, TimestepEmbedSequential, Upsample
from ldm.modules.diffusionmodules.util import conv_nd, normalization, timestep_embedding, zero_module
from ldm.util import ConfigError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class UNetConfig:
    """Size and kind of a U-Net; the ``params`` of its ``unet_config``."""

    image_size: int  # height and width of the input; the network itself takes any size
    in_channels: int
    model_channels: int  # base width, a multiple of 32
    out_channels: int
    num_res_blocks: int  # per level in the encoder; the decoder has one more
    attention_resolutions: Sequence[int]  # downsampling rates (1, 2, 4, ...) whose blocks have attention
    dropout: float = 0.0
    channel_mult: Sequence[int] = (1, 2, 4, 8)  # width of each level in units of model_channels
    conv_resample: bool = True  # convolve when resampling; only without resblock_updown
    dims: int = 2  # axes of the picture: 1, 2 or 3
    num_classes: int | None = None  # learn an embedding per class label
    use_checkpoint: bool = False  # recompute activations in the backward pass: less memory, more time
    use_fp16: bool = False  # accepted from older configs and ignored: the trainer's precision decides
    num_heads: int = -1  # attention heads; -1: given by num_head_channels
    num_head_channels: int = -1  # width of a head; -1: given by num_heads
    num_heads_upsample: int = -1  # heads in the decoder; -1: as num_heads
    use_scale_shift_norm: bool = False  # embeddings scale and shift features instead of being added
    resblock_updown: bool = False  # residual blocks resample instead of single layers
    use_new_attention_order: bool = False  # layout of the attention projection, see AttentionBlock
    use_spatial_transformer: bool = False  # transformers with cross-attention instead of attention blocks
    transformer_depth: int = 1
    context_dim: int | None = None  # width of the tokens the transformers attend to
    self_attention_resolutions: Sequence[int] | None = None  # rates whose transformers attend to the picture too
    n_embed: int | None = None  # predict indices among so many codes instead of a picture
    legacy: bool = True  # how the number of heads is found, see num_heads_at

    def __post_init__(self) -> None:
        if self.num_heads == -1 and self.num_head_channels == -1:
            raise ConfigError("unet_config.params: give `num_heads` or `num_head_channels`; both are -1.")
        if (self.context_dim is not None) != self.use_spatial_transformer:
            raise ConfigError(
                f"unet_config.params: `context_dim` ({self.context_dim}) and `use_spatial_transformer` "
                f"({self.use_spatial_transformer}) need each other: set both or none."
            )
        if self.self_attention_resolutions is not None and not self.use_spatial_transformer:
            raise ConfigError(
                "unet_config.params: `self_attention_resolutions` says which spatial transformers have self-attention, "
                "but `use_spatial_transformer` is false: leave it out, or turn them on."
            )
        if self.use_fp16:
            logger.warning("`use_fp16` is ignored: choose the trainer's `precision` instead.")

    @classmethod
    def from_params(cls, params: dict[str, Any]) -> UNetConfig:
        """Check the keys of the params and build the description.

        Raises:
            ConfigError: a key is unknown, or a required one is missing.
        """
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(params) - known)
        if unknown:
            raise ConfigError(f"unknown keys in unet_config.params: {unknown}; expected some of {sorted(known)}.")
        try:
            return cls(**params)
        except TypeError as error:
            raise ConfigError(f"unet_config.params is incomplete: {error}; found {sorted(params)}.") from error

    @property
    def embed_dim(self) -> int:
        """Width E of the timestep embedding."""
        return 4 * self.model_channels

    @property
    def widths(self) -> list[int]:
        """Channels of each level, finest first."""
        return [mult * self.model_channels for mult in self.channel_mult]

    def num_heads_at(self, channels: int, is_decoder: bool) -> int:
        """Attention heads over so many channels; ``legacy`` alone lets the decoder differ."""
        if self.num_head_channels != -1:
            num_heads, rest = divmod(channels, self.num_head_channels)
            if num_heads == 0 or (rest and not self.use_spatial_transformer):
                raise ConfigError(
                    f"`num_head_channels` {self.num_head_channels} does not divide a layer of {channels} channels."
                )
            return num_heads
        if is_decoder and self.legacy and not self.use_spatial_transformer and self.num_heads_upsample != -1:
            return self.num_heads_upsample
        return self.num_heads

    def res_block(
        self, channels: int, out_channels: int, cond_channels: int | None = None, up: bool = False, down: bool = False
    ) -> ResBlock:
        """A residual block of this network."""
        return ResBlock(
            channels,
            self.embed_dim,
            out_channels,
            self.dropout,
            cond_channels,
            self.dims,
            self.use_scale_shift_norm,
            self.use_checkpoint,
            up,
            down,
        )

    def attention(self, channels: int, rate: int, is_decoder: bool = False) -> nn.Module:
        """An attention block or a spatial transformer of this network, at a downsampling rate."""
        num_heads = self.num_heads_at(channels, is_decoder)
        if not self.use_spatial_transformer:
            return AttentionBlock(channels, num_heads, self.use_checkpoint, self.use_new_attention_order)
        wanted = self.self_attention_resolutions
        has_own_width = self.num_head_channels != -1 and not self.legacy
        return SpatialTransformer(
            channels,
            num_heads,
            self.num_head_channels if has_own_width else channels // num_heads,
            self.transformer_depth,
            context_dim=self.context_dim,
            use_checkpoint=self.use_checkpoint,
            use_self_attention=wanted is None or rate in wanted,
        )


def build_encoder(config: UNetConfig) -> tuple[nn.ModuleList, list[int]]:
    """The encoder's blocks and the channels each of them leaves for the decoder."""
    channels = config.model_channels
    stem = conv_nd(config.dims, config.in_channels, channels, 3, padding=1)
    blocks = nn.ModuleList([TimestepEmbedSequential(stem)])
    skip_channels = [channels]
    for level, width in enumerate(config.widths):
        for _ in range(config.num_res_blocks):
            layers = [config.res_block(channels, width)]
            channels = width
            if 2**level in config.attention_resolutions:
                layers.append(config.attention(channels, 2**level))
            blocks.append(TimestepEmbedSequential(*layers))
            skip_channels.append(channels)
        if level != len(config.widths) - 1:
            if config.resblock_updown:
                layer: nn.Module = config.res_block(channels, channels, down=True)
            else:
                layer = Downsample(channels, config.conv_resample, config.dims)
            blocks.append(TimestepEmbedSequential(layer))
            skip_channels.append(channels)
    return blocks, skip_channels


def build_middle(config: UNetConfig, cond_channels: int | None = None) -> TimestepEmbedSequential:
    """Block, attention, block at the coarsest level; blocks take a second embedding with ``cond_channels``."""
    channels = config.widths[-1]
    return TimestepEmbedSequential(
        config.res_block(channels, channels, cond_channels),
        config.attention(channels, 2 ** (len(config.widths) - 1)),
        config.res_block(channels, channels, cond_channels),
    )


def build_decoder(config: UNetConfig, skip_channels: Sequence[int], cond_channels: int | None = None) -> nn.ModuleList:
    """The decoder's blocks, coarsest first; blocks take a second embedding with ``cond_channels``."""
    remaining = list(skip_channels)
    channels = config.widths[-1]
    blocks = nn.ModuleList()
    for level, width in reversed(list(enumerate(config.widths))):
        for index in range(config.num_res_blocks + 1):
            layers = [config.res_block(channels + remaining.pop(), width, cond_channels)]
            channels = width
            if 2**level in config.attention_resolutions:
                layers.append(config.attention(channels, 2**level, is_decoder=True))
            if level and index == config.num_res_blocks:
                if config.resblock_updown:
                    layers.append(config.res_block(channels, channels, cond_channels, up=True))
                else:
                    layers.append(Upsample(channels, config.conv_resample, config.dims))
            blocks.append(TimestepEmbedSequential(*layers))
    return blocks


def build_head(config: UNetConfig) -> nn.Sequential:
    """Normalisation, activation and the last convolution, which starts at zero."""
    channels = config.widths[0]
    convolution = conv_nd(config.dims, channels, config.out_channels, 3, padding=1)
    return nn.Sequential(normalization(channels), nn.SiLU(), zero_module(convolution))


class UNetModel(nn.Module):
    """Noise prediction from a noisy picture and its timestep.

    Args:
        params: keywords of :class:`UNetConfig`.

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
        self.config = config
        self.time_embed = nn.Sequential(
            nn.Linear(config.model_channels, config.embed_dim), nn.SiLU(), nn.Linear(config.embed_dim, config.embed_dim)
        )
        if config.num_classes is not None:
            self.label_emb = nn.Embedding(config.num_classes, config.embed_dim)
        self.input_blocks, self.skip_channels = build_encoder(config)
        self.middle_block = build_middle(config)
        self.output_blocks = build_decoder(config, self.skip_channels)
        self.out = build_head(config)
        if config.n_embed is not None:
            self.id_predictor = nn.Sequential(
                normalization(config.widths[0]), conv_nd(config.dims, config.widths[0], config.n_embed, 1)
            )

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        """Predict.

        Args:
            x: (B, in_channels, H, W) noisy picture.
            timesteps: (B,) steps.
            context: (B, S, context_dim) tokens, only with spatial transformers.
            y: (B,) class labels, only with ``num_classes``.

        Returns:
            (B, out_channels, H, W), or (B, n_embed, H, W) logits with ``n_embed``.
        """
        h, skips, emb = self.encode(x, timesteps, context, y)
        return self.decode(h, skips, emb, context)

    def encode(
        self, x: Tensor, timesteps: Tensor, context: Tensor | None = None, y: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        """The encoder half: coarsest features, what each block leaves for the decoder, and the embedding (B, E)."""
        if (y is not None) != (self.config.num_classes is not None):
            raise ValueError(
                f"class labels y are {'given' if y is not None else 'missing'}, but unet_config.params.num_classes "
                f"is {self.config.num_classes}: give both or none."
            )
        steps = timestep_embedding(timesteps, self.config.model_channels)
        emb = self.time_embed(steps.to(self.time_embed[0].weight.dtype))
        if y is not None:
            emb = emb + self.label_emb(y)
        h, skips = x, []
        for block in self.input_blocks:
            h = block(h, emb, context)
            skips.append(h)
        return h, skips, emb

    def decode(self, h: Tensor, skips: list[Tensor], emb: Tensor, context: Tensor | None = None) -> Tensor:
        """The decoder half on what :meth:`encode` returned."""
        h = self.middle_block(h, emb, context)
        for block, skip in zip(self.output_blocks, reversed(skips)):
            h = block(h, emb, context, skip=skip)
        return self.id_predictor(h) if self.config.n_embed is not None else self.out(h)
