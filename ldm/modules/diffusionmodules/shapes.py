"""Architectures of the U-Nets and of the autoencoders' networks, as configs describe them.

They need no torch, so that the check of a config applies the same rules as the networks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar

from ldm.legacy import translate_ddconfig
from ldm.ranges import Count, Fraction, Size
from ldm.util import ConfigError, mismatch

NUM_GROUPS = 32  # of the group normalizations
FLOAT_CONDITION = "sequential"  # value of ``num_classes`` for conditions that are float vectors
SMALL_GROUPS = 8  # of those at the finest level of the CLIP-guided U-Net
Config = TypeVar("Config")


def build_dataclass(kind: type[Config], params: Mapping[str, Any], where: str) -> Config:
    """Build a dataclass from a section of a config.

    Raises:
        ConfigError: a key is unknown or missing, or a value does not fit its annotation or is refused by the dataclass.
    """
    known = [field.name for field in fields(kind)]
    unknown = sorted(set(params) - set(known))
    if unknown:
        raise ConfigError(f"{where}: unknown keys {unknown}. Use only {', '.join(known)}.")
    for field in fields(kind):
        value = params.get(field.name)
        if value is not None and (problem := mismatch(str(field.type), value)):
            raise ConfigError(f"{where}.{field.name}: {problem}.")
    try:
        return kind(**params)
    except TypeError as error:
        raise ConfigError(f"{where}: {error}. Got the keys {sorted(params)}.") from error


def most_discriminator_layers(side: int) -> int:
    """Return the most downsamplings of a discriminator, whose last two layers need 3 pixels, of images of a side."""
    return (side // 3).bit_length() - 1


def require_groups(channels: int, where: str) -> None:
    """Raise a ``ConfigError`` if a number of channels cannot be normalized in groups."""
    if channels % NUM_GROUPS:
        raise ConfigError(
            f"{where}: expected a multiple of {NUM_GROUPS} channels, got {channels}. Change the base width "
            "(`model_channels` or `ch`) or the channel multipliers."
        )


@dataclass(frozen=True)
class AutoencoderShape:
    """The ``ddconfig`` of an autoencoder, shared by its encoder and its decoder.

    Images may have any height and width that :attr:`factor` divides. ``resolution`` places attention only, as in LDM: a
    level has it where its feature map, for images of ``resolution`` pixels, has a height or width in
    ``attn_resolutions``. With ``patch_size`` p the image is first folded into patches (pixel-unshuffle), so that the
    networks work at 1 / p of its size.
    """

    ch: Size  # base width
    out_ch: Size  # channels of the decoder's output
    resolution: Size | Sequence[Size]  # height and width, or [height, width], for which attention is placed, pixels
    in_channels: Size  # channels of the encoder's input
    z_channels: Size  # latent channels
    num_res_blocks: Count  # per level in the encoder; the decoder has one more
    attn_resolutions: Sequence[Count] = ()  # feature-map resolutions with attention
    ch_mult: Sequence[Count] = (1, 2, 4, 8)  # width of each level in units of ch
    double_z: bool = True  # the encoder returns mean and log-variance
    dropout: Fraction = 0.0
    resamp_with_conv: bool = True  # use a convolution for down- and upsampling
    attn_type: Literal["vanilla", "none"] = "vanilla"  # none also removes the attention of the middle
    tanh_out: bool = False  # apply tanh to the decoder's output
    patch_size: Count = 1  # side of the patches folded into channels; 1 disables the folding

    def __post_init__(self) -> None:
        if not self.ch_mult:
            raise ConfigError("ddconfig.ch_mult: expected at least one level, got []. Add one.")
        if len(self.sides) > 2 or not all(isinstance(side, int) and side >= self.factor for side in self.sides):
            raise ConfigError(
                f"ddconfig.resolution: expected a number or [height, width], at least {self.factor} pixels, got "
                f"{self.resolution!r}."
            )
        for width in (1, *self.ch_mult):
            require_groups(self.ch * width, "ddconfig.ch")

    @classmethod
    def from_config(cls, ddconfig: Mapping[str, Any]) -> AutoencoderShape:
        """Read a config's section; see :func:`build_dataclass` and :func:`translate_ddconfig` for the errors."""
        return build_dataclass(cls, translate_ddconfig(ddconfig, [field.name for field in fields(cls)]), "ddconfig")

    @property
    def sides(self) -> tuple[int, ...]:
        """The numbers of ``resolution``."""
        return tuple(self.resolution) if isinstance(self.resolution, Sequence) else (self.resolution,)

    @property
    def factor(self) -> int:
        """Height of an image over that of its latent: ``patch_size``, times 2 for each downsampling."""
        return self.patch_size * 2 ** (len(self.ch_mult) - 1)

    def has_attention(self, level: int, is_decoder: bool = False) -> bool:
        """Return whether each block of a level is followed by attention; level 0 is the finest.

        The decoder counts from the latent's size, which differs where :attr:`factor` does not divide ``resolution``.
        """
        finest = [side // self.factor * 2 ** (len(self.ch_mult) - 1) for side in self.sides] if is_decoder else None
        sizes = {side // 2**level for side in finest or (side // self.patch_size for side in self.sides)}
        return self.attn_type != "none" and not sizes.isdisjoint(self.attn_resolutions)


@dataclass(frozen=True)
class UNetConfig:
    """Architecture of a U-Net: the ``params`` of a ``unet_config``."""

    image_size: Size | Sequence[Size]  # height and width of the input, for reference: the network takes any size
    in_channels: Size
    model_channels: Size  # base width, a multiple of 32
    out_channels: Size
    num_res_blocks: Count | Sequence[Count]  # per level in the encoder, one number or a list; the decoder has one more
    attention_resolutions: Sequence[Count]  # downsampling rates (1, 2, 4, ...) with attention
    dropout: Fraction = 0.0
    channel_mult: Sequence[Count] = (1, 2, 4, 8)  # width of each level in units of model_channels
    conv_resample: bool = True  # convolve when resampling; unused with resblock_updown
    dims: Literal[1, 2, 3] = 2  # spatial axes of the input: 1, 2 or 3
    num_classes: Count | str | None = None  # classes of the labels y, or "sequential": y is a float vector
    adm_in_channels: Count | None = None  # width of the float vectors y, with num_classes: sequential
    use_checkpoint: bool = False  # recompute activations in the backward pass: less memory, more time
    use_fp16: bool = False  # accepted from older configs and ignored in favour of the trainer's precision
    use_bf16: bool = False  # likewise
    num_heads: Count | Literal[-1] = -1  # attention heads; -1: derived from num_head_channels
    num_head_channels: Count | Literal[-1] = -1  # width of a head; -1: derived from num_heads
    num_heads_upsample: Count | Literal[-1] = -1  # attention heads in the decoder; -1: num_heads
    use_scale_shift_norm: bool = False  # embeddings scale and shift features instead of being added
    resblock_updown: bool = False  # residual blocks resample instead of single layers
    use_new_attention_order: bool = False  # layout of the attention projection, see AttentionBlock
    use_spatial_transformer: bool = False  # transformers with cross-attention instead of self-attention
    transformer_depth: Count = 1
    context_dim: Count | None = None  # width of the tokens of cross-attention
    use_linear_in_transformer: bool = False  # linear layers instead of 1x1 convolutions around transformers
    disable_self_attentions: Sequence[bool] | None = None  # per level: the first attention attends to the tokens too
    disable_middle_self_attn: bool = False  # likewise in the middle
    self_attention_resolutions: Sequence[Count] | None = None  # rates with self-attention in transformers; None: all
    n_embed: Count | None = None  # number of codes to predict logits for, instead of a picture
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
        if not self.channel_mult:
            raise ConfigError("unet_config.params.channel_mult: expected at least one level, got []. Add one.")
        for name in ("num_res_blocks", "disable_self_attentions"):
            value = vars(self)[name]
            if isinstance(value, Sequence) and len(value) != len(self.channel_mult):
                raise ConfigError(
                    f"unet_config.params.{name}: expected one entry for each of the {len(self.channel_mult)} levels of "
                    f"`channel_mult`, got {list(value)}. Make the lengths match."
                )
        for level, width in enumerate(self.widths):
            require_groups(width, "unet_config.params.model_channels")
            if 2**level in self.attention_resolutions or level == len(self.widths) - 1:
                self.num_heads_at(width, is_decoder=False)

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


@dataclass(frozen=True)
class CLIPGuidedShape:
    """Architecture of the U-Net of the CLIP-guided DDPM, see ``clip_guided.UNet``."""

    T: Count
    img_ch: Size = 3
    img_size: Size = 32
    down_chs: Sequence[Size] = (256, 256, 512)
    t_embed_dim: Size = 8
    c_embed_dim: Size = 512
    arch: Literal["package", "dli"] = "package"

    def __post_init__(self) -> None:
        where = "unet_config.params"
        if self.arch not in ("package", "dli"):
            raise ConfigError(f"{where}.arch: expected 'package' or 'dli', got {self.arch!r}.")
        if self.img_size < 4 or self.img_size % 4:
            raise ConfigError(f"{where}.img_size: expected a multiple of 4, got {self.img_size}.")
        if len(self.down_chs) != 3 or any(c % NUM_GROUPS for c in self.down_chs):
            expected = f"three numbers of channels, multiples of {NUM_GROUPS}"
            raise ConfigError(f"{where}.down_chs: expected {expected}, got {list(self.down_chs)}.")
        if self.t_embed_dim < 4 or self.t_embed_dim % 2:
            raise ConfigError(f"{where}.t_embed_dim: expected an even number of at least 4, got {self.t_embed_dim}.")
