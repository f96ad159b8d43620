"""Base classes of the condition stages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def sent_to(device: torch.device, tensor: Tensor) -> Tensor:
    """Return a tensor on a device; a copy from the CPU does not wait for the device."""
    is_copied = device.type == "cuda" and tensor.device.type == "cpu"
    return (tensor.pin_memory() if is_copied else tensor).to(device, non_blocking=True)


class ConditionStageBase(nn.Module):
    """Module that turns an entry of a batch into a condition.

    Attributes:
        takes_texts: the stage implements ``encode_texts(texts)`` and ``unconditional(count)``.
        takes_classes: the stage implements ``encode_classes(labels)``, ``unconditional(count)`` and ``num_classes``.
        width: width of the tokens or of the vector, if it is known.
    """

    takes_texts = False
    takes_classes = False
    width: int | None = None

    def encode(self, *inputs: Any) -> Tensor:
        """Same as ``forward``."""
        return self(*inputs)


class TextStage(ConditionStageBase):
    """Condition stage for texts."""

    takes_texts = True

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Map B texts to a condition, (B, S, D) or (B, D)."""
        return self.encode(texts)

    def unconditional_input(self, count: int) -> list[str]:
        """Return the texts of no condition for guidance: ``count`` empty strings."""
        return [""] * count

    def unconditional(self, count: int) -> Tensor:
        """Return the condition of no text for guidance, of the shape of :meth:`encode_texts`."""
        return self.encode_texts(self.unconditional_input(count))
