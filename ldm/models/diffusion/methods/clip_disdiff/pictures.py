"""Pictures of CLIP-DisDiff: swaps of texts on noise that stays the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ldm.models.diffusion.unit_pictures import Pictures, unit_pictures

_DEFAULTS: dict[str, Any] = {
    "plot_swapped_concepts": True,
    "plot_diffusion_rows": False,
    "plot_progressive_rows": False,
    "quantize_denoised": False,
    "inpaint": False,
}


def text_pictures(model: Any, batch: Mapping[str, Any], **options: Any) -> Pictures:
    """Return pictures by name; ``options`` are those of ``unit_pictures``, with defaults for texts.

    The deterministic sampler keeps in place what a text does not change; of LDM's pictures only those asked for are
    drawn.
    """
    return unit_pictures(model, batch, **{**_DEFAULTS, **options})
