"""Conditions of a denoiser: one class per kind, each with a null condition, dropout and batching.

A condition is a batch of inputs that the network is conditioned on. ``null()`` is the same batch without any condition
(for classifier-free guidance), ``drop(mask)`` removes the condition of some samples (for training with condition
dropout), ``first(n)`` takes the first samples.

Dimensions: B batch, U units, D width of a unit's code.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self, cast

import torch
from torch import Tensor

from ldm.util import ConfigError, UserError

EmptyValue = Callable[[], Tensor]
"""Returns the value of one sample without a condition, (1, ...)."""


class Condition(ABC):
    """A batch of conditions."""

    @abstractmethod
    def null(self) -> Self:
        """Return the batch without any condition.

        Raises:
            UserError: this kind of condition has no null condition.
        """

    @abstractmethod
    def drop(self, mask: Tensor) -> Self:
        """Return the batch without the condition of the samples where ``mask`` (B,) bool is true."""

    @abstractmethod
    def first(self, count: int | None) -> Self:
        """Return the first ``count`` samples; all for ``None``."""

    @abstractmethod
    def joined(self, other: Self) -> Self:
        """Return both batches as one, ``self`` first."""

    @abstractmethod
    def inputs(self, conditioning_key: str | None) -> dict[str, Any]:
        """Return the arguments of ``DiffusionWrapper.forward`` beside x and t."""


@dataclass(frozen=True)
class TensorCondition(Condition):
    """One tensor per sample: a sequence of tokens, a map, a vector, or a class.

    Attributes:
        value: (B, ...).
        empty: value without a condition; ``None`` takes zeros, which integers do not have.
    """

    value: Tensor
    empty: EmptyValue | None = None

    def null(self) -> TensorCondition:
        if self.empty is not None:
            empty = self.empty().to(self.value)
            if empty.shape[1:] != self.value.shape[1:]:
                raise UserError(
                    f"condition: expected an empty condition of shape {tuple(self.value.shape[1:])}, like the others, "
                    f"got {tuple(empty.shape[1:])}. Let the condition stage pad all texts to one length"
                )
            return replace(self, value=empty.expand_as(self.value))
        if not self.value.is_floating_point():
            raise UserError(
                "condition: expected a condition stage with a null class, got integer classes without one. Use "
                "ldm.modules.encoders.modules.ClassEmbedder, or leave out guidance and cond_drop_prob"
            )
        return replace(self, value=torch.zeros_like(self.value))

    def drop(self, mask: Tensor) -> TensorCondition:
        """See ``Condition``; a mask of the shape of ``value`` removes single elements."""
        if mask.shape != self.value.shape:
            mask = mask.reshape(-1, *[1] * (self.value.ndim - 1))
        return replace(self, value=torch.where(mask, self.null().value, self.value))

    def first(self, count: int | None) -> TensorCondition:
        return replace(self, value=self.value[:count])

    def joined(self, other: TensorCondition) -> TensorCondition:
        return replace(self, value=torch.cat([self.value, other.value]))

    def inputs(self, conditioning_key: str | None) -> dict[str, Any]:
        return PartsCondition({None: (self,)}).inputs(conditioning_key)


@dataclass(frozen=True)
class PartsCondition(Condition):
    """Several tensors, such as two sequences of tokens, or a map and tokens.

    Guidance and dropout replace the tokens, if there are any; maps (such as the masked image of inpainting) and vectors
    are kept, as in Stable Diffusion.

    Attributes:
        parts: place in the network -> tensors; ``c_concat``, ``c_crossattn`` (tokens), ``c_adm`` (one vector per
            sample), or None for the place that ``conditioning_key`` selects.
    """

    parts: Mapping[str | None, tuple[TensorCondition, ...]]

    def null(self) -> PartsCondition:
        return self._replaced(lambda part: part.null())

    def drop(self, mask: Tensor) -> PartsCondition:
        return self._replaced(lambda part: part.drop(mask))

    def first(self, count: int | None) -> PartsCondition:
        return PartsCondition({k: tuple(part.first(count) for part in parts) for k, parts in self.parts.items()})

    def joined(self, other: PartsCondition) -> PartsCondition:
        pairs = {k: zip(parts, other.parts[k], strict=True) for k, parts in self.parts.items()}
        return PartsCondition({k: tuple(own.joined(part) for own, part in both) for k, both in pairs.items()})

    def inputs(self, conditioning_key: str | None) -> dict[str, Any]:
        place = "c_concat" if conditioning_key == "concat" else "c_crossattn"
        values = {k or place: [part.value for part in parts] for k, parts in self.parts.items()}
        return {k: value[0] if k == "c_adm" else value for k, value in values.items()}

    def _replaced(self, change: Callable[[TensorCondition], TensorCondition]) -> PartsCondition:
        stay = set(self.parts) - {"c_crossattn"} if "c_crossattn" in self.parts else ()
        changed = {k: parts if k in stay else tuple(map(change, parts)) for k, parts in self.parts.items()}
        return PartsCondition(changed)


@dataclass(frozen=True)
class UnitCodes(Condition):
    """Codes of the units of a shift U-Net.

    Attributes:
        codes: (B, U, D).
        mask: (B, U) bool, false where a unit is left unset; ``None`` sets all.
        only: (B,) int64, the one unit whose sub-gradient is added in each sample; ``None`` adds all.
        guidance: factor of the sub-gradients: one number, or one for each unit, (U,) or (B, U); 1 as trained.
    """

    codes: Tensor
    mask: Tensor | None = None
    only: Tensor | None = None
    guidance: float | Tensor = 1.0

    def null(self) -> UnitCodes:
        """Return all units unset, which gives the base model's prediction."""
        return replace(self, mask=torch.zeros_like(self._mask()))

    def drop(self, mask: Tensor) -> UnitCodes:
        return replace(self, mask=self._mask() & ~mask.unsqueeze(1))

    def first(self, count: int | None) -> UnitCodes:
        mask, only = (None if value is None else value[:count] for value in (self.mask, self.only))
        guidance = self._factors()[:count] if isinstance(self.guidance, Tensor) else self.guidance
        return replace(self, codes=self.codes[:count], mask=mask, only=only, guidance=guidance)

    def joined(self, other: UnitCodes) -> UnitCodes:
        if (self.only is None) != (other.only is None):
            raise UserError("units: expected `only` in both conditions or in neither, got it in one. Set it in both")
        mask = None if self.mask is None and other.mask is None else torch.cat([self._mask(), other._mask()])
        only = None if self.only is None or other.only is None else torch.cat([self.only, other.only])
        is_same = not isinstance(self.guidance, Tensor) and self.guidance is other.guidance
        guidance = self.guidance if is_same else torch.cat([self._factors(), other._factors()])
        codes = torch.cat([self.codes, other.codes])
        return replace(self, codes=codes, mask=mask, only=only, guidance=guidance)

    def inputs(self, conditioning_key: str | None) -> dict[str, Any]:
        return {"context": self.codes, "unit_mask": self.mask, "sampled_index": self.only}

    def swapped(self, unit: int) -> UnitCodes:
        """Return the batch in which every sample has that unit of the first sample."""
        codes, mask = self.codes.clone(), None if self.mask is None else self.mask.clone()
        for values in (codes, mask):
            if values is not None:
                values[:, unit] = values[0, unit].clone()
        return replace(self, codes=codes, mask=mask)

    def _factors(self) -> Tensor:
        """Return the factor of each unit, (B, U)."""
        return torch.as_tensor(self.guidance, device=self.codes.device).expand(self.codes.shape[:2])

    def _mask(self) -> Tensor:
        if self.mask is not None:
            return self.mask
        return torch.ones(self.codes.shape[:2], dtype=torch.bool, device=self.codes.device)


def as_condition(value: Any, empty: EmptyValue | None = None) -> Condition | None:
    """Return the condition that a condition stage's output stands for.

    Args:
        value: a tensor, a list of tensors, a mapping with ``c_concat``, ``c_crossattn`` and ``c_adm``, a condition, or
            ``None``.
        empty: value of a tensor without a condition, see :class:`TensorCondition`.

    Raises:
        ConfigError: another type.
    """
    if value is None or isinstance(value, Condition):
        return value
    if isinstance(value, Tensor):
        return TensorCondition(value, empty)
    if isinstance(value, (list, tuple)) and all(isinstance(part, Tensor) for part in value):
        own_empty = empty if len(value) == 1 else None
        return PartsCondition({None: tuple(TensorCondition(part, own_empty) for part in value)})
    if isinstance(value, Mapping):
        lists = {place: part if isinstance(part, (list, tuple)) else [part] for place, part in value.items()}
        empties = {place: empty if place == "c_crossattn" else None for place in lists}
        found = {place: cast("PartsCondition", as_condition(parts, empties[place])) for place, parts in lists.items()}
        return PartsCondition({place: each.parts[None] for place, each in found.items()})
    raise ConfigError(
        f"condition: expected tensors or a list or mapping of them from the condition stage, got {type(value).__name__}"
    )
