"""Guidance: stronger conditions while sampling.

Classifier-free guidance (Ho & Salimans 2022) works for every :class:`~ldm.diffusion.conditions.Condition`; the
guidance of single units works for the sub-gradients of the shift U-Net (PDAE, Zhang et al. 2022).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ldm.diffusion.conditions import Condition
from ldm.util import UserError

Predictor = Callable[[Tensor, Tensor, Any], Tensor]
"""(x (B, C, H, W), t (B,), condition) -> prediction (B, C, H, W)."""


def classifier_free(
    predict: Predictor, cond: Condition | None, scale: float | Tensor, null: Condition | None = None
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the guided prediction e_null + scale (e_cond - e_null) as a function of x and t.

    Both predictions come from one call of the network with a batch of 2 B.

    Args:
        predict: the network.
        cond: the condition, B samples.
        scale: one number, or one per sample, (B,). The number 1 is the condition itself, and costs one prediction per
            step. The convention (1 + w) e_cond - w e_null is that of ``scale = 1 + w``.
        null: the negative condition, such as a negative prompt; by default ``cond.null()``.

    Raises:
        UserError: a scale other than 1 without a condition, or with one that has no null condition.
    """
    if not isinstance(scale, Tensor) and scale == 1:
        return lambda x, t: predict(x, t, cond)
    if cond is None:
        raise UserError(
            f"guidance scale {scale}: expected a model with a condition, got an unconditional one. Set it to 1"
        )
    both = (cond.null() if null is None else null).joined(cond)

    def guided(x: Tensor, t: Tensor) -> Tensor:
        without, under = predict(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        factor = scale.to(x).reshape(-1, *[1] * (x.ndim - 1)) if isinstance(scale, Tensor) else scale
        return without + factor * (under - without)

    return guided


def add_units(pred: Tensor, total: Tensor, unit_grad: Tensor, scale: Tensor, guidance: float | Tensor) -> Tensor:
    """Return the base prediction plus the guided sub-gradients.

    Args:
        pred: (B, C, H, W) base prediction.
        total: (B, C, H, W) sum of the sub-gradients.
        unit_grad: (B, U, C, H, W) sub-gradients; read only where ``guidance`` differs between units.
        scale: (B, 1, 1, 1) factor of a sub-gradient in the prediction.
        guidance: one factor for all units, or one for each, (U,) or (B, U).

    Returns:
        (B, C, H, W).
    """
    if isinstance(guidance, Tensor):
        weights = guidance.to(unit_grad).expand(unit_grad.shape[:2])
        return pred + scale * torch.einsum("bu,buchw->bchw", weights, unit_grad)
    return pred + guidance * scale * total
