"""Conditions of samples: none, LDM's conditions, the units of real images, or texts per unit.

Dimensions: B samples of a batch, U units, C h w the latent, H W the image.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.diffusion.conditions import PartsCondition
from ldm.evaluation.sampling.request import Request
from ldm.models.contracts import ClassStage, ConditionStage, Editable, HasUnits
from ldm.models.inputs import batch_value, images_from_batch
from ldm.util import UserError

GUIDED = ("--text", "--class", "--guidance_scale", "--negative_text")  # flags for models with LDM's conditions


class Source(ABC):
    """The conditions of one request, and the images they give.

    Attributes:
        origin: what the model samples from, for messages.
        units: U; 0 without units.
        needs_data: whether conditions are read from batches of a data set.

    Raises:
        UserError: the model does not fit the request.
    """

    origin = ""
    units = 0
    needs_data = True

    def __init__(self, model: Any, request: Request) -> None:
        self.model, self.request, self.name = model, request, type(model).__name__

    def refuse(self, *flags: str) -> None:
        """Raise a ``UserError`` if the request uses one of these flags of the command line."""
        for flag in flags:
            if self.request.uses(flag):
                raise UserError(f"{flag}: {self.name} samples from {self.origin}. Remove the option")

    @abstractmethod
    def condition(self, batch: Mapping[str, Any] | None, rows: slice) -> Any:
        """Return the condition of a batch of data; of these rows of the request if ``needs_data`` is false."""

    @abstractmethod
    def decode(self, cond: Any, x_T: Tensor, only: Tensor | None) -> Tensor:
        """Return images (B, 3, H, W) of noise (B, C, h, w); ``only`` (B,) is the one unit to use."""

    def without_data(self) -> None:
        """Choose conditions for a config without a data set; raise a ``UserError`` if they have to come from data."""
        raise UserError(f"{self.name} samples from {self.origin}, but the config has no `data`. Add one with --base")


class FromCondition(Source):
    """No condition, or LDM's: read from the data, or given as texts or classes."""

    def __init__(self, model: Any, request: Request) -> None:
        super().__init__(model, request)
        self.needs_data = model.model.conditioning_key is not None
        condition = "a condition without units" + ", with maps of the data" * model.model.concatenates
        self.origin = condition if self.needs_data else "noise without a condition"
        self.refuse("--unit", "--swap", *(() if self.needs_data else GUIDED))
        if any(len(strings) != 1 for strings in request.texts):
            raise UserError(f"--text: {self.name} takes one text per sample, got several separated by |")
        self.given: list[Any] = [strings[0] for strings in request.texts] or list(request.classes)
        if self.given and not model.model.concatenates:
            self.needs_data = False
            self.condition(None, slice(0, len(self.given)))  # raises if the condition stage does not take them

    def without_data(self) -> None:
        """Draw classes at random for a model of classes; use the empty text for a model of texts."""
        stage = None if self.model.model.concatenates else dict(self.model.named_children()).get("cond_stage_model")
        if isinstance(stage, ClassStage) and stage.takes_classes:
            draws = np.random.default_rng(self.request.seed)
            classes = [label for label in range(stage.num_classes) if label != stage.null_class]
            self.given = draws.choice(classes, size=self.request.count).tolist()
        elif isinstance(stage, ConditionStage) and stage.takes_texts:
            self.given = [""]
        else:
            super().without_data()
        self.needs_data = False

    def condition(self, batch: Mapping[str, Any] | None, rows: slice) -> Any:
        """Return the condition, and the negative one of ``negative_text``; see the base class."""
        values = [self.given[row % len(self.given)] for row in range(rows.start, rows.stop)] if self.given else []
        if not values:
            cond = None if batch is None else self.model.get_condition(batch)
        elif isinstance(values[0], str):
            cond = self.model.condition_from_texts(values, batch)
        else:
            cond = self.model.condition_from_classes(torch.tensor(values, device=self.model.device), batch)
        if (negative := self.request.negative_text) is None:
            return cond, None
        null = self.model.condition_from_texts([negative] * (rows.stop - rows.start), batch)
        if (
            isinstance(null, PartsCondition) and "c_crossattn" in null.parts
        ):  # maps and noise levels are those of the condition
            null = PartsCondition({**cond.parts, "c_crossattn": null.parts["c_crossattn"]})
        return cond, null

    def decode(self, cond: Any, x_T: Tensor, only: Tensor | None) -> Tensor:
        """See the base class."""
        options = {"guidance_scale": self.request.guidance, "null": cond[1]}
        return self.model.decode_first_stage(self.model.sample(x_T, cond[0], self.request.sampler, **options))


class FromCodes(Source):
    """The codes (B, U) or (B, U, D) of real images, for models with units (DisDiff, EncDiff)."""

    origin = "the units of images"

    def __init__(self, model: HasUnits, request: Request) -> None:
        super().__init__(model, request)
        self.units = model.latent_unit
        self.refuse(*GUIDED)

    def condition(self, batch: Mapping[str, Any] | None, rows: slice) -> Tensor:
        """See the base class."""
        return self.model.encode_units(images_from_batch(batch, self.model.first_stage_key))

    def decode(self, cond: Tensor, x_T: Tensor, only: Tensor | None) -> Tensor:
        """See the base class."""
        return self.model.decode_units(cond, x_T, self.request.sampler, only)

    def swap(self, cond: Tensor, first: Tensor, unit: int) -> Tensor:
        """Return ``cond`` with one unit of the first sample of ``first`` in all samples."""
        swapped = cond.clone()
        swapped[:, unit] = first[0, unit]
        return swapped


class FromTexts(Source):
    """U texts per sample, of the request or of the data, for models of text units (CLIP-DisDiff)."""

    origin = "one text per unit"

    def __init__(self, model: Editable, request: Request) -> None:
        super().__init__(model, request)
        self.units, self.needs_data = model.latent_unit, not request.texts
        self.refuse("--class", "--negative_text")
        for strings in request.texts:
            if len(strings) != self.units:
                raise UserError(
                    f"--text: expected {self.units} attributes separated by |, one per unit, got {len(strings)} in "
                    f"{' | '.join(strings)!r}. An empty one leaves its unit unset"
                )

    def condition(self, batch: Mapping[str, Any] | None, rows: slice) -> list[list[str]]:
        """See the base class."""
        if batch is not None:
            return [list(strings) for strings in batch_value(batch, self.model.cond_stage_key)]
        texts = self.request.texts
        return [list(texts[row % len(texts)]) for row in range(rows.start, rows.stop)]

    def decode(self, cond: list[list[str]], x_T: Tensor, only: Tensor | None) -> Tensor:
        """See the base class."""
        return self.model.sample_edit(cond, x_T, self.request.sampler, self.request.guidance, only)

    def swap(self, cond: list[list[str]], first: list[list[str]], unit: int) -> list[list[str]]:
        return [[*strings[:unit], first[0][unit], *strings[unit + 1 :]] for strings in cond]


def source_of(model: Any, request: Request) -> Source:
    """Return the conditions of a request.

    Raises:
        UserError: the request asks for units, texts, classes or guidance that the model does not have.
    """
    kind = FromCodes if isinstance(model, HasUnits) else FromTexts if isinstance(model, Editable) else FromCondition
    source = kind(model, request)
    if request.unit is not None and not 0 <= request.unit < source.units:
        raise UserError(f"--unit: expected 1 to {source.units}, got {request.unit + 1}")
    return source
