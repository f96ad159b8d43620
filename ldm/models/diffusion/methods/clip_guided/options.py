"""Options of the CLIP-guided DDPM that the check of a config reads without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ldm.data.options import require_choice
from ldm.legacy import CLIP_WIDTHS
from ldm.modules.diffusionmodules.shapes import build_dataclass
from ldm.ranges import Count, Weight
from ldm.util import ConfigError, mismatch

KINDS = ("none", "noise", "mean", "noise_mean", "covariance", "bank")


@dataclass(frozen=True)
class GapOptions:
    """Treatment of the gap between image embeddings (training) and text embeddings (sampling).

    Attributes:
        kind: ``none``; ``noise``: noise on the image embeddings in training (LAFITE_G); ``mean``: both kinds of
            embeddings without the mean of their modality; ``noise_mean``: both (C3); ``covariance``: noise with mean
            and covariance of the gap in training; ``bank``: texts are replaced by their nearest images (kNN-Diffusion).
            All but ``none`` and ``bank`` work on embeddings of length 1, and give conditions of length sqrt(D).
        std: size of the noise relative to an embedding (``noise``, ``noise_mean``), or to the gap (``covariance``).
            None takes 0.25, and 1 for ``covariance``.
        num_images: number of images the statistics are estimated from, and rows of the bank.
        num_neighbors: number of images that replace a text (``bank``).
        texts: texts the statistics are estimated from, or a file with one text per line; None takes captions composed
            from the vocabulary of the training data.
    """

    kind: str = "none"
    std: Weight | None = None
    num_images: Count = 2048
    num_neighbors: Count = 4
    texts: Sequence[str] | str | None = None

    def __post_init__(self) -> None:
        where = "model.params.gap"
        require_choice(f"{where}.kind", self.kind, KINDS)
        if self.num_neighbors > (most := self.num_images):
            raise ConfigError(f"{where}.num_neighbors: expected at most num_images ({most}), got {self.num_neighbors}")

    @classmethod
    def from_config(cls, given: str | Mapping[str, Any] | None) -> GapOptions:
        """Return the options of ``gap: KIND`` or ``gap: {kind: KIND, ...}``; None is ``none``."""
        params = {"kind": given or "none"} if given is None or isinstance(given, str) else given
        return build_dataclass(cls, params, "model.params.gap")

    @property
    def noise(self) -> float:
        """Size of the noise."""
        return (1.0 if self.kind == "covariance" else 0.25) if self.std is None else self.std

    @property
    def scales(self) -> bool:
        """Whether the treatment works on embeddings of length 1."""
        return self.kind not in ("none", "bank")

    @property
    def needs_texts(self) -> bool:
        """Whether the statistics depend on texts."""
        return self.needs_statistics and self.kind != "bank"

    @property
    def needs_statistics(self) -> bool:
        """Whether the treatment depends on embeddings of data."""
        return self.kind in ("mean", "noise_mean", "covariance", "bank")


def require_width(network: int | None, clip: int | None, prefix: str = "") -> None:
    """Raise a ``ConfigError`` if the network's condition is not as wide as a CLIP; None is an unknown width."""
    if None not in (network, clip) and network != clip:
        raise ConfigError(
            f"{prefix}cond_stage_config.text_encoder: expected a CLIP {network} wide, as the condition of the network "
            f"(unet_config.params: c_embed_dim, or adm_in_channels of UNetModel), got one {clip} wide. Choose the CLIP "
            "that the network is trained with (--clip of generate.py, clip_model of train.py), or change the network"
        )


def _check(params: Mapping[str, Any]) -> None:
    """Check the gap, and the width of a published CLIP against that of the condition of the network."""
    GapOptions.from_config(params.get("gap"))
    stage, network = params.get("cond_stage_config") or {}, params.get("unet_config")
    for name in ("text_encoder", "image_encoder"):
        if problem := mismatch("Mapping | None", stage.get(name)):
            raise ConfigError(f"cond_stage_config.{name}: {problem}. Correct the section")
    text = stage.get("text_encoder")
    if isinstance(text, Mapping) and isinstance(network, Mapping):
        given, options = network.get("params") or {}, text.get("params") or {}
        width = given.get("c_embed_dim", given.get("adm_in_channels"))
        require_width(width, CLIP_WIDTHS.get(options.get("version", "ViT-L/14")))


CHECKS = {"CLIPGuidedDDPM": _check}  # class beside this file -> check of its params
