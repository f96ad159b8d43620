"""Condition stage of the CLIP-guided DDPM: embeddings of images in training, of texts in sampling.

Dimensions: B batch, D width of the joint space, H W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.data.formats.clip_embeddings import EmbeddingTable
from ldm.errors import NotPreparedError
from ldm.losses.modality_gap import add_gap_noise, add_noise, gap_statistics, nearest_images, remove_mean
from ldm.models.diffusion.methods.clip_guided.options import GapOptions
from ldm.modules.encoders.base import TextStage
from ldm.util import ConfigError, UserError, instantiate_from_config


@runtime_checkable
class CLIPTower(Protocol):
    """Text tower of a CLIP with a fingerprint (``FrozenCLIPTextEmbedder``)."""

    name: str
    fingerprint: str
    width: int
    normalize: bool  # whether embeddings have length 1
    n_repeat: int | None  # length of a sequence of equal embeddings; None for one vector


class CLIPStage(TextStage):
    """Frozen towers of a CLIP, and the treatment of the gap between their outputs.

    Args:
        text_encoder: ``{target, params}`` of the text tower; needed to sample from texts.
        image_encoder: ``{target, params}`` of the image tower; needed for data without embeddings.
        normalize: scale embeddings to length 1.
        gap: treatment of the gap.
        phrase_separator: separator of the phrases of a text (","), of which each is embedded alone, and the mean is
            taken; None embeds whole texts.

    Attributes:
        is_fitted: the treatment has its statistics, or needs none.

    Raises:
        ConfigError: the treatment needs a text encoder, and there is none.
    """

    def __init__(
        self,
        text_encoder: Mapping[str, Any] | None = None,
        image_encoder: Mapping[str, Any] | None = None,
        normalize: bool = False,
        gap: GapOptions | None = None,
        phrase_separator: str | None = None,
    ) -> None:
        super().__init__()
        self.phrase_separator = phrase_separator
        self.text_encoder = None if text_encoder is None else instantiate_from_config(text_encoder)
        self.image_encoder = None if image_encoder is None else instantiate_from_config(image_encoder)
        if isinstance(self.text_encoder, CLIPTower):
            # Lengths are treated here, in the same way for both towers; the condition is a vector, not a sequence.
            self.text_encoder.normalize, self.text_encoder.n_repeat = False, None
        self.gap = gap or GapOptions()
        self.normalize = normalize or self.gap.scales
        self.takes_texts = self.text_encoder is not None
        self.width = self.text_encoder.width if self.takes_texts else None
        self.is_fitted = not self.gap.needs_statistics
        if self.gap.needs_statistics:
            self._add_statistics()
            self.register_load_state_dict_pre_hook(_note_statistics)

    def _add_statistics(self) -> None:
        width, kind = self.width, self.gap.kind
        if width is None:
            where = "model.params.cond_stage_config.text_encoder"
            raise ConfigError(f"{where}: expected the text tower, which gap {kind!r} needs, got none. Set it")
        shapes = {"covariance": {"gap_mean": (width,), "gap_root": (width, width)}}
        shapes["bank"] = {"bank": (self.gap.num_images, width)}
        for name, shape in shapes.get(kind, {"image_mean": (width,), "text_mean": (width,)}).items():
            self.register_buffer(name, torch.zeros(shape))
        self.register_buffer("num_fitted", torch.tensor(0))

    @torch.no_grad()
    def fit(self, images: Tensor, texts: Tensor | None = None) -> None:
        """Estimate the statistics of the treatment from untreated embeddings (N, D) and (M, D).

        ``texts`` may be None for ``bank``.

        Raises:
            UserError: there are fewer images than ``num_neighbors``.
        """
        images = self._scaled(images)
        if self.gap.kind == "bank":
            if len(images) < (least := self.gap.num_neighbors):
                raise UserError(f"model.params.gap.num_neighbors: expected at most {len(images)} (images), got {least}")
            images = images[: len(self.bank)]
            self.bank.zero_()[: len(images)] = images
        elif self.gap.kind == "covariance":
            for buffer, value in zip((self.gap_mean, self.gap_root), gap_statistics(images, self._scaled(texts))):
                buffer.copy_(value)
        else:
            self.image_mean.copy_(images.mean(0))
            self.text_mean.copy_(self._scaled(texts).mean(0))
        self.num_fitted.fill_(len(images))
        self.is_fitted = True

    def _scaled(self, embeddings: Tensor) -> Tensor:
        return F.normalize(embeddings.float(), dim=-1) if self.normalize else embeddings.float()

    def _lengthened(self, treated: Tensor) -> Tensor:
        """Scale vectors of length 1 to length sqrt(D): a network learns slowly from inputs far below 1."""
        return treated * treated.shape[-1] ** 0.5 if self.gap.scales else treated

    def _require_statistics(self) -> None:
        if not self.is_fitted:
            raise NotPreparedError(
                f"model.params.gap: expected the statistics of {self.gap.kind!r}, which training estimates from the "
                "data, got none. Load a checkpoint that was trained with it, or call fit_gap"
            )

    def condition(self, embeddings: Tensor, is_training: bool = False) -> Tensor:
        """Return the condition (B, D) of image embeddings (B, D), with noise in training if the treatment adds some."""
        self._require_statistics()
        kind, treated = self.gap.kind, self._scaled(embeddings)
        if kind in ("mean", "noise_mean"):
            treated = remove_mean(treated, self.image_mean)
        if is_training and kind in ("noise", "noise_mean"):
            treated = add_noise(treated, self.gap.noise)
        if kind == "covariance":
            treated = add_gap_noise(treated, self.gap_mean, self.gap_root, self.gap.noise if is_training else 0.0)
        return self._lengthened(treated)

    def require_clip(self, table: EmbeddingTable, cond_width: int | None) -> None:
        """Raise a ``UserError`` unless a file has the embeddings of this CLIP; without one, compare the widths.

        ``cond_width`` is the width of the network's condition; None if it is unknown.
        """
        text = self.text_encoder
        if isinstance(text, CLIPTower):
            table.require_clip(text.name, text.fingerprint, text.width)
        elif cond_width not in (None, table.width):
            raise UserError(
                f"{table.path}: expected embeddings {cond_width} wide, as the condition of the network "
                f"(model.params.unet_config.params: c_embed_dim, or adm_in_channels of UNetModel), got {table.width}. "
                "Make them match"
            )

    def embed_images(self, images: Tensor) -> Tensor:
        """Return the untreated embeddings (B, D) of images (B, 3, H, W) in [-1, 1]."""
        with torch.no_grad():
            return self._tower("image_encoder")(images)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Return the untreated embeddings (B, D) of B texts; for phrases their mean direction and mean length."""
        encode, separator = self._tower("text_encoder").encode, self.phrase_separator
        if separator is None:
            return encode(list(texts))
        phrases = [[part.strip() for part in text.split(separator) if part.strip()] or [""] for text in texts]
        embedded = encode([phrase for parts in phrases for phrase in parts]).split([len(parts) for parts in phrases])
        directions = torch.stack([F.normalize(parts, dim=-1).mean(dim=0) for parts in embedded])
        lengths = torch.stack([parts.norm(dim=-1).mean() for parts in embedded])
        return lengths[:, None] * F.normalize(directions, dim=-1)

    def _tower(self, name: str) -> Any:
        tower = dict(self.named_children()).get(name)
        if tower is None:
            raise UserError(f"CLIP: expected model.params.cond_stage_config.{name}, got none. Set it")
        return tower

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Return the condition (B, D) of B texts; zeros, which is no condition, for empty ones."""
        self._require_statistics()
        texts = [text.strip() for text in texts]
        treated = self._scaled(self.embed_texts(texts))
        if self.gap.kind in ("mean", "noise_mean"):
            treated = remove_mean(treated, self.text_mean)
        elif self.gap.kind == "bank":
            treated = nearest_images(treated, self.bank, self.gap.num_neighbors)
        is_given = torch.tensor([bool(text.strip(f" {self.phrase_separator or ''}")) for text in texts])
        return self._lengthened(treated) * is_given.to(treated.device, non_blocking=True)[:, None]


def _note_statistics(module: CLIPStage, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Record whether a state dict contains the statistics of this treatment; others are estimated anew."""
    names = [name for name, _ in module.named_buffers(recurse=False)]
    count = state.get(f"{prefix}num_fitted")
    least = module.gap.num_neighbors if module.gap.kind == "bank" else 1
    if all(f"{prefix}{name}" in state for name in names) and int(count) >= least:
        module.is_fitted = True
