"""Small condition stages of latent diffusion models: class labels, and images resized to the latent.

Legend: B batch, C channels, H W space.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.data.options import require_choice
from ldm.modules.encoders.base import ConditionStageBase
from ldm.ranges import Count, Finite, OptionalCount, Size
from ldm.util import UserError

_METHODS = ("nearest", "linear", "bilinear", "trilinear", "bicubic", "area")
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def class_labels(labels: Any, num_classes: int, where: str) -> Tensor:
    """Return an entry ``where`` of a batch as (B,) int64; raise a ``UserError`` unless it has classes in [0, N).

    Values on an accelerator are not read, because that waits for the device; batches are checked on the CPU before they
    are moved (``LatentDiffusion.on_before_batch_transfer``).
    """
    is_valid = isinstance(labels, Tensor) and labels.ndim == 1 and labels.dtype in _INTEGERS
    wrong = labels
    if is_valid:
        has_values = type(labels) is Tensor and labels.device.type == "cpu"  # subclasses trace shapes only
        wrong = labels[(labels < 0) | (labels >= num_classes)] if has_values else ()
        if not len(wrong):
            return labels.long()
    values = wrong.tolist() if isinstance(wrong, Tensor) else wrong
    found = values[0] if isinstance(values, (list, tuple)) and values else values
    raise UserError(
        f"{where}: expected one integer class in [0, {num_classes}) for each image, got {found!r}. Let the data set "
        "return an int, or set n_classes (num_classes of a U-Net) to the number of its classes"
    )


class ClassEmbedder(ConditionStageBase):
    """Learned vector per class, as a sequence of one token for cross-attention (Rombach et al. 2022).

    Args:
        embed_dim: width of a vector.
        n_classes: number of classes; the last one stands for no class in models with classifier-free guidance.
        key: entry of the batch with the labels.
    """

    takes_classes = True

    def __init__(self, embed_dim: Count, n_classes: Count = 1000, key: str = "class") -> None:
        super().__init__()
        self.key, self.num_classes, self.null_class = key, n_classes, n_classes - 1
        self.embedding = nn.Embedding(n_classes, embed_dim)

    def forward(self, batch: Mapping[str, Any] | Tensor, key: str | None = None) -> Tensor:
        """Map ``batch[key]``, or the labels themselves, to (B, 1, embed_dim); see :meth:`labels_of`."""
        return self.embedding(self.labels_of(batch, key)[:, None])

    def labels_of(self, batch: Any, key: str | None = None) -> Tensor:
        """Return the labels of a batch, or the labels themselves, as (B,) int64.

        Raises:
            UserError: the batch has no entry ``key`` (by default that of the constructor), or see :func:`class_labels`.
        """
        if not isinstance(batch, Mapping):
            return class_labels(batch, self.num_classes, "class")
        key = key or self.key
        if key not in batch:
            raise UserError(
                f"ClassEmbedder: expected labels in batch['{key}'], got a batch with only {', '.join(sorted(batch))}. "
                "Set cond_stage_config.params.key, or choose a data set with labels."
            )
        return class_labels(batch[key], self.num_classes, f"batch['{key}']")

    def encode_classes(self, labels: Tensor) -> Tensor:
        """Embed ``labels`` (B,) int64 in [0, num_classes) as (B, 1, embed_dim)."""
        return self(labels)

    def unconditional_input(self, count: int) -> Tensor:
        """Return the labels of no class for guidance, (count,): in LDM the last class."""
        return torch.full((count,), self.null_class, device=self.embedding.weight.device)

    def unconditional(self, count: int) -> Tensor:
        """Return the condition of no class for guidance, (count, 1, embed_dim)."""
        return self.encode_classes(self.unconditional_input(count))


class SpatialRescaler(ConditionStageBase):
    """Repeated resizing of an image or a map, followed by an optional 1x1 convolution.

    Args:
        n_stages: number of resizings.
        method: interpolation mode of torch.
        multiplier: factor of height and width of each resizing.
        in_channels: channels of the input.
        out_channels: channels of the output; None omits the convolution.
        bias: use a bias in the convolution.

    Raises:
        ConfigError: ``method`` is unknown.
    """

    def __init__(
        self,
        n_stages: OptionalCount = 1,
        method: str = "bilinear",
        multiplier: Finite = 0.5,
        in_channels: Size = 3,
        out_channels: Size | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__()
        require_choice("SpatialRescaler.method", method, _METHODS)
        self.n_stages, self.method, self.multiplier = n_stages, method, multiplier
        self.channel_mapper = None if out_channels is None else nn.Conv2d(in_channels, out_channels, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (B, C, H, W) to (B, C', H m^n, W m^n) with m = ``multiplier`` and n = ``n_stages``."""
        expected = None if self.channel_mapper is None else self.channel_mapper.in_channels
        if expected not in (None, x.shape[1]):
            raise UserError(
                f"SpatialRescaler: expected {expected} channels (in_channels), got {x.shape[1]}. "
                "Set cond_stage_config.params.in_channels to the channels of the data"
            )
        for _ in range(self.n_stages):
            x = F.interpolate(x, scale_factor=self.multiplier, mode=self.method)
        return x if self.channel_mapper is None else self.channel_mapper(x)
