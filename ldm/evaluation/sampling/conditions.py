"""What samples are drawn under: nothing, LDM's condition, the units of real images, or texts.

A model of units says so by its methods (``encode_units`` and ``decode_units``, or ``sample_edit`` for texts); all
others have LDM's condition or none.

Dims: B samples of a batch, U units, C h w the latent, H W the image.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ldm.models.diffusion.base import DDPM
from ldm.models.inputs import batch_value, images_from_batch
from ldm.modules.encoders.bert import BERTEmbedder
from ldm.modules.encoders.clip_embedders import FrozenCLIPTextEmbedder
from ldm.modules.encoders.labels import ClassEmbedder
from ldm.util import ConfigError, UserError

_TEXT_STAGES = (BERTEmbedder, FrozenCLIPTextEmbedder)


@dataclass(frozen=True)
class Request:
    """What to sample.

    Attributes:
        count: N; with ``swap`` the number of columns.
        batch_size: samples at once.
        num_steps: DDIM steps; None samples all time steps by DDPM.
        eta: DDIM's; 0 deterministic, 1 as noisy as DDPM.
        seed: of the noise and of the images the conditions come from.
        unit: add this unit's gradient alone (from 0); None adds all.
        swap: show what each unit does: a row per unit, in which every sample takes that unit of the first one.
        texts: U strings per sample for models of units, one for text-conditional ones, in turn; empty: the data's.
        classes: a class per sample for class-conditional models, in turn; empty takes those of the data.
        guidance: factor of a text model's sub-gradients; for LDM's conditions, of the step from no condition to the
            condition (classifier-free guidance, Ho & Salimans 2022). 1 is neither.
    """

    count: int = 16
    batch_size: int = 10
    num_steps: int | None = 50
    eta: float = 1.0
    seed: int = 23
    unit: int | None = None
    swap: bool = False
    texts: tuple[tuple[str, ...], ...] = ()
    classes: tuple[int, ...] = ()
    guidance: float = 1.0

    def __post_init__(self) -> None:
        for name in ("count", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected at least 1")
        if self.eta < 0:
            raise ConfigError(f"eta is {self.eta}; expected 0 (deterministic) or more, 1 is as noisy as DDPM")


class Source(Protocol):
    """What a model samples under."""

    units: int

    def condition(self, batch: Mapping[str, Any] | None, rows: slice) -> Any:
        """The condition of a batch of data, or of those rows of the whole where no data are needed."""

    def decode(self, cond: Any, x_T: Tensor, only: Tensor | None) -> Tensor:
        """Images (B, 3, H, W) from noise (B, C, h, w)."""

    def swap(self, cond: Any, unit: int) -> Any:
        """The condition with one unit of the first sample in all."""


class FromCondition:
    """LDM: nothing, or what its condition stage makes of the data, of texts or of classes."""

    units = 0

    def __init__(self, model: DDPM, request: Request) -> None:
        self.model, self.request = model, request
        self.stage = getattr(model, "cond_stage_model", None)
        self.given = self._given()
        self.needs_data = self.stage is not None and not self.given
        if request.guidance != 1 and not (self._takes_texts() or isinstance(self.stage, ClassEmbedder)):
            raise UserError(
                f"{type(model).__name__} has no condition on texts or classes to be guided to: leave out "
                "--guidance_scale"
            )

    def _takes_texts(self) -> bool:
        return isinstance(self.stage, _TEXT_STAGES) and getattr(self.stage, "use_tokenizer", True)

    def _given(self) -> tuple[str, ...] | tuple[int, ...]:
        """The request's texts or classes, if they are what the condition stage takes."""
        texts, classes = self.request.texts, self.request.classes
        if texts and not self._takes_texts():
            raise UserError(f"{type(self.model).__name__} does not sample from texts here: leave out --text")
        if any(len(strings) != 1 for strings in texts):
            raise UserError("this model takes one text per sample: leave out the | in --text")
        if classes and not isinstance(self.stage, ClassEmbedder):
            raise UserError(f"{type(self.model).__name__} does not sample from classes here: leave out --class")
        for label in classes:
            if not 0 <= label < self.stage.embedding.num_embeddings:
                raise UserError(f"--class {label}: the model knows 0 to {self.stage.embedding.num_embeddings - 1}")
        return classes or tuple(strings[0] for strings in texts)

    def condition(self, batch: Mapping[str, Any] | None, rows: slice) -> Any:
        """See ``Source``."""
        if batch is not None:
            return self.model.get_condition(batch)
        if not self.given:
            return None
        inputs = [self.given[row % len(self.given)] for row in range(rows.start, rows.stop)]
        is_classes = isinstance(self.stage, ClassEmbedder)
        return self.stage(torch.tensor(inputs, device=self.model.device) if is_classes else inputs)

    def decode(self, cond: Any, x_T: Tensor, only: Tensor | None) -> Tensor:
        """See ``Source``."""
        steps, eta, scale = self.request.num_steps, self.request.eta, self.request.guidance
        guidance: dict[str, Any] = {}
        if scale != 1:
            none = self.stage(self.stage.unconditional_input(len(x_T)))
            guidance = {"unconditional_guidance_scale": scale, "unconditional_conditioning": none}
        return self.model.decode_first_stage(self.model.sample(x_T, cond, steps, eta, **guidance))

    def swap(self, cond: Any, unit: int) -> Any:
        """There are no units to swap."""
        raise UserError(f"{type(self.model).__name__} has no units to swap")


class FromCodes:
    """DisDiff, EncDiff: the codes of real images."""

    needs_data = True

    def __init__(self, model: Any, request: Request) -> None:
        self.model, self.request, self.units = model, request, model.latent_unit
        if request.guidance != 1:
            raise UserError(f"{type(model).__name__} samples from codes, unguided: leave out --guidance_scale")

    def condition(self, batch: Mapping[str, Any] | None, rows: slice) -> Tensor:
        """See ``Source``: (B, U) or (B, U, D)."""
        return self.model.encode_units(images_from_batch(batch, self.model.first_stage_key))

    def decode(self, cond: Tensor, x_T: Tensor, only: Tensor | None) -> Tensor:
        """See ``Source``."""
        return self.model.decode_units(cond, x_T, self.request.num_steps, self.request.eta, only)

    def swap(self, cond: Tensor, unit: int) -> Tensor:
        """See ``Source``."""
        swapped = cond.clone()
        swapped[:, unit] = cond[0, unit]
        return swapped


class FromTexts:
    """CLIP-DisDiff: texts of the request or of the data."""

    def __init__(self, model: Any, request: Request) -> None:
        self.model, self.request, self.units = model, request, model.latent_unit
        self.needs_data = not request.texts
        for strings in request.texts:
            if len(strings) != self.units:
                raise UserError(
                    f"the text {' | '.join(strings)!r} has {len(strings)} attributes, the model {self.units} units: "
                    "give one for each, separated by |; an empty one leaves a unit unset"
                )

    def condition(self, batch: Mapping[str, Any] | None, rows: slice) -> list[list[str]]:
        """See ``Source``: B lists of U strings."""
        if batch is not None:
            return [list(strings) for strings in batch_value(batch, self.model.cond_stage_key)]
        texts = self.request.texts
        return [list(texts[row % len(texts)]) for row in range(rows.start, rows.stop)]

    def decode(self, cond: list[list[str]], x_T: Tensor, only: Tensor | None) -> Tensor:
        """See ``Source``."""
        steps, eta = self.request.num_steps, self.request.eta
        return self.model.sample_edit(cond, x_T, steps, eta, self.request.guidance, only)

    def swap(self, cond: list[list[str]], unit: int) -> list[list[str]]:
        """See ``Source``."""
        return [strings[:unit] + [cond[0][unit]] + strings[unit + 1 :] for strings in cond]


def source_of(model: DDPM, request: Request) -> FromCondition | FromCodes | FromTexts:
    """What a model samples under.

    Raises:
        UserError: the request asks for units, texts, classes or guidance of a model that has none, or for a unit or
            a class there is not.
    """
    kinds = {"decode_units": FromCodes, "sample_edit": FromTexts}
    kind = next((kind for method, kind in kinds.items() if hasattr(model, method)), FromCondition)
    if request.texts and kind is FromCodes:
        raise UserError(f"{type(model).__name__} does not sample from texts: leave out --text")
    if request.classes and kind is not FromCondition:
        raise UserError(f"{type(model).__name__} does not sample from classes: leave out --class")
    source = kind(model, request)
    if (request.unit is not None or request.swap) and not source.units:
        raise UserError(f"{type(model).__name__} has no units: leave out --unit and --swap")
    if request.unit is not None and not 0 <= request.unit < source.units:
        raise UserError(f"--unit {request.unit + 1}: the model has units 1 to {source.units}")
    return source


def split_text(word: str) -> tuple[str, ...]:
    """``"red floor | small object"`` -> one text per unit."""
    return tuple(part.strip() for part in word.split("|"))
