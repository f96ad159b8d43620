"""The diffusion U-Net (Dhariwal & Nichol 2021) and builders of its parts, shared with the shift U-Net.

Legend: B batch, C channels, H W space, S tokens, E = 4 * model_channels width of the timestep embedding.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ldm.modules.attention import SpatialTransformer
from ldm.modules.diffusionmodules.blocks import AttentionBlock, Downsample, InputStage, ResBlock, UNetStage, Upsample
from ldm.modules.diffusionmodules.util import (
    CONVOLUTIONS,
    build_dataclass,
    normalization,
    timestep_embedding,
    zero_module,
)
from ldm.util import ConfigError, UserError

logger = logging.getLogger(__name__)

FLOAT_CONDITION = "sequential"  # value of ``num_classes`` for conditions that are float vectors


@dataclass(frozen=True)
class UNetConfig:
    """Architecture of a U-Net: the ``params`` of a ``unet_config``."""

    image_size: int | Sequence[int]  # height and width of the input, for reference: the network takes any size
    in_channels: int
    model_channels: int  # base width, a multiple of 32
    out_channels: int
    num_res_blocks: int | Sequence[int]  # per level in the encoder, one number or a list; the decoder has one more
    attention_resolutions: Sequence[int]  # downsampling rates (1, 2, 4, ...) with attention
    dropout: float = 0.0
    channel_mult: Sequence[int] = (1, 2, 4, 8)  # width of each level in units of model_channels
    conv_resample: bool = True  # convolve when resampling; unused with resblock_updown
    dims: int = 2  # spatial axes of the input: 1, 2 or 3
    num_classes: int | str | None = None  # classes of the labels y, or "sequential": y is a float vector
    adm_in_channels: int | None = None  # width of the float vectors y, with num_classes: sequential
    use_checkpoint: bool = False  # recompute activations in the backward pass: less memory, more time
    use_fp16: bool = False  # accepted from older configs and ignored in favour of the trainer's precision
    use_bf16: bool = False  # likewise
    num_heads: int = -1  # attention heads; -1: derived from num_head_channels
    num_head_channels: int = -1  # width of a head; -1: derived from num_heads
    num_heads_upsample: int = -1  # attention heads in the decoder; -1: num_heads
    use_scale_shift_norm: bool = False  # embeddings scale and shift features instead of being added
    resblock_updown: bool = False  # residual blocks resample instead of single layers
    use_new_attention_order: bool = False  # layout of the attention projection, see AttentionBlock
    use_spatial_transformer: bool = False  # transformers with cross-attention instead of self-attention
    transformer_depth: int = 1
    context_dim: int | None = None  # width of the tokens of cross-attention
    use_linear_in_transformer: bool = False  # linear layers instead of 1x1 convolutions around transformers
    disable_self_attentions: Sequence[bool] | None = None  # per level: the first attention attends to the tokens too
    disable_middle_self_attn: bool = False  # likewise in the middle
    self_attention_resolutions: Sequence[int] | None = None  # rates with self-attention in transformers; None: all
    n_embed: int | None = None  # number of codes to predict logits for, instead of a picture
    legacy: bool = True  # selects the rule of num_heads_at

    def __post_init__(self) -> None:
        if self.num_heads == -1 and self.num_head_channels == -1:
            raise ConfigError("unet_config.params: expected `num_heads` or `num_head_channels`, got neither. Set one.")
        if (self.context_dim is not None) != self.use_spatial_transformer:
            raise ConfigError(
                "unet_config.params: expected both or neither of `context_dim` and `use_spatial_transformer`, got "
                f"{self.context_dim} and {self.use_spatial_transformer}. Set both to use cross-attention."
            )
        if self.self_attention_resolutions is not None and not self.use_spatial_transformer:
            raise ConfigError(
                "unet_config.params.self_attention_resolutions: expected `use_spatial_transformer: true`, got false. "
                "Enable the transformers or remove the key."
            )
        is_word = isinstance(self.num_classes, str)
        if (is_word and self.num_classes != FLOAT_CONDITION) or is_word != (self.adm_in_channels is not None):
            raise ConfigError(
                "unet_config.params.num_classes: expected a number of classes without `adm_in_channels`, or "
                f"{FLOAT_CONDITION!r} with it, got {self.num_classes!r} and adm_in_channels {self.adm_in_channels}. "
                "Set `adm_in_channels` to the width of the condition vectors, or remove it."
            )
        for name in ("num_res_blocks", "disable_self_attentions"):
            value = vars(self)[name]
            if isinstance(value, Sequence) and len(value) != len(self.channel_mult):
                raise ConfigError(
                    f"unet_config.params.{name}: expected one entry for each of the {len(self.channel_mult)} levels of "
                    f"`channel_mult`, got {list(value)}. Make the lengths match."
                )
        if self.dims not in CONVOLUTIONS:
            raise ConfigError(f"unet_config.params.dims: expected 1, 2 or 3, got {self.dims}. Use 2 for images.")
        for name in ("use_fp16", "use_bf16"):
            if vars(self)[name]:
                logger.warning("`%s` is ignored; set the trainer's `precision` instead", name)

    @classmethod
    def from_params(cls, params: dict[str, Any]) -> UNetConfig:
        """Build the architecture; see :func:`build_dataclass`."""
        return build_dataclass(cls, params, "unet_config.params")

    @property
    def embed_dim(self) -> int:
        """Width E of the timestep embedding."""
        return 4 * self.model_channels

    @property
    def widths(self) -> list[int]:
        """Channels of each level, finest first."""
        return [mult * self.model_channels for mult in self.channel_mult]

    def depth_at(self, level: int) -> int:
        """Return the number of residual blocks of a level of the encoder."""
        return self.num_res_blocks if isinstance(self.num_res_blocks, int) else self.num_res_blocks[level]

    def num_heads_at(self, channels: int, is_decoder: bool) -> int:
        """Return the number of attention heads; with ``legacy``, the decoder may have ``num_heads_upsample``."""
        if self.num_head_channels != -1:
            num_heads, rest = divmod(channels, self.num_head_channels)
            if num_heads == 0 or (rest and not self.use_spatial_transformer):
                raise ConfigError(
                    f"unet_config.params.num_head_channels: {self.num_head_channels} does not divide a layer of "
                    f"{channels} channels. Choose a divisor of every level's channels."
                )
            return num_heads
        if is_decoder and self.legacy and not self.use_spatial_transformer and self.num_heads_upsample != -1:
            return self.num_heads_upsample
        return self.num_heads

    def res_block(
        self, channels: int, out_channels: int, cond_channels: int | None = None, up: bool = False, down: bool = False
    ) -> ResBlock:
        """Return a residual block."""
        options = self.dims, self.use_scale_shift_norm, self.use_checkpoint
        return ResBlock(channels, self.embed_dim, out_channels, self.dropout, cond_channels, *options, up, down)

    def attentions(self, channels: int, level: int, is_decoder: bool = False) -> list[nn.Module]:
        """Return the attention that follows each residual block of a level; empty without one."""
        if 2**level not in self.attention_resolutions:
            return []
        is_disabled = self.disable_self_attentions is not None and self.disable_self_attentions[level]
        return [self.attention(channels, level, is_disabled, is_decoder)]

    def attention(
        self, channels: int, level: int, disable_self_attn: bool = False, is_decoder: bool = False
    ) -> nn.Module:
        """Return an attention block or a spatial transformer at a level."""
        num_heads = self.num_heads_at(channels, is_decoder)
        if not self.use_spatial_transformer:
            return AttentionBlock(channels, num_heads, self.use_checkpoint, self.use_new_attention_order)
        self_attention = self.self_attention_resolutions
        has_own_width = self.num_head_channels != -1 and not self.legacy
        return SpatialTransformer(
            channels,
            num_heads,
            self.num_head_channels if has_own_width else channels // num_heads,
            self.transformer_depth,
            context_dim=self.context_dim,
            use_checkpoint=self.use_checkpoint,
            use_self_attention=self_attention is None or 2**level in self_attention,
            disable_self_attn=disable_self_attn,
            use_linear=self.use_linear_in_transformer,
        )


def build_encoder(config: UNetConfig) -> tuple[nn.ModuleList, list[int]]:
    """Return the stages of the encoder and the channels of their outputs, which the decoder takes as skips."""
    channels = config.model_channels
    stem = CONVOLUTIONS[config.dims](config.in_channels, channels, 3, padding=1)
    blocks = nn.ModuleList([InputStage(stem)])
    skip_channels = [channels]
    for level, width in enumerate(config.widths):
        for _ in range(config.depth_at(level)):
            layers = [config.res_block(channels, width), *config.attentions(width, level)]
            channels = width
            blocks.append(UNetStage(*layers))
            skip_channels.append(channels)
        if level != len(config.widths) - 1:
            if config.resblock_updown:
                layer: nn.Module = config.res_block(channels, channels, down=True)
            else:
                layer = Downsample(channels, config.conv_resample, config.dims)
            blocks.append(UNetStage(layer))
            skip_channels.append(channels)
    return blocks, skip_channels


def build_middle(config: UNetConfig, cond_channels: int | None = None) -> UNetStage:
    """Return the coarsest stage; its residual blocks take a second embedding with ``cond_channels``."""
    channels = config.widths[-1]
    return UNetStage(
        config.res_block(channels, channels, cond_channels),
        config.attention(channels, len(config.widths) - 1, config.disable_middle_self_attn),
        config.res_block(channels, channels, cond_channels),
    )


def build_decoder(config: UNetConfig, skip_channels: Sequence[int], cond_channels: int | None = None) -> nn.ModuleList:
    """Return the decoder stages, coarsest first; residual blocks take a second embedding with ``cond_channels``."""
    remaining = list(skip_channels)
    channels = config.widths[-1]
    blocks = nn.ModuleList()
    for level, width in reversed(list(enumerate(config.widths))):
        for index in range(config.depth_at(level) + 1):
            layers = [config.res_block(channels + remaining.pop(), width, cond_channels)]
            layers += config.attentions(width, level, is_decoder=True)
            channels = width
            if level and index == config.depth_at(level):
                if config.resblock_updown:
                    layers.append(config.res_block(channels, channels, cond_channels, up=True))
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
