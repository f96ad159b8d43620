"""Accuracy of predicted attributes, of each attribute and for held-out combinations of attributes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torchmetrics
from torch import Tensor

SEEN, UNSEEN = 0, 1
SUFFIXES = {SEEN: "_seen", UNSEEN: "_unseen"}


class AttributeAccuracy(torchmetrics.Metric):
    """Share of correct attributes, accumulated on the device; sums over all processes.

    Args:
        names: names of the U attributes.

    Example:
        >>> accuracy = AttributeAccuracy(["hue", "shape"])
        >>> accuracy.update(torch.tensor([[True, False], [True, True]]))
        >>> accuracy.figures("accuracy")
        {'accuracy': 0.75, 'accuracy_hue': 1.0, 'accuracy_shape': 0.5}
    """

    full_state_update = False

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names, self.is_grouped = tuple(names), False
        for state in ("hits", "counts"):
            self.add_state(state, torch.zeros(len(SUFFIXES), len(self.names), dtype=torch.long), "sum")

    def update(self, hits: Tensor, known: Tensor | None = None, unseen: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            hits: (B, U) bool, correct predictions.
            known: (B, U) bool, whether the true value is known; None: all are.
            unseen: (B,) bool, whether the combination of attributes was held out of training; None: none was, and no
                figures of groups are reported.
        """
        self.is_grouped |= unseen is not None
        known = torch.ones_like(hits) if known is None else known
        unseen = torch.zeros(len(hits), dtype=torch.bool, device=hits.device) if unseen is None else unseen
        for group, rows in ((SEEN, ~unseen), (UNSEEN, unseen)):
            counted = known & rows[:, None]
            self.hits[group] += (hits & counted).sum(dim=0)
            self.counts[group] += counted.sum(dim=0)

    def compute(self) -> Tensor:
        """Return the accuracy by group and attribute, (2, U); NaN where no value is known."""
        return self.hits.cpu().double() / self.counts.cpu()

    def figures(self, name: str) -> dict[str, float]:
        """Return ``name``, the mean over attributes, and ``name_<attribute>``.

        With held-out combinations these are of the held-out ones, and are repeated with the suffixes ``_unseen`` and,
        for the other images, ``_seen``. Attributes without a known value are left out.
        """
        accuracy = self.compute()
        groups = {"": UNSEEN, **{end: group for group, end in SUFFIXES.items()}} if self.is_grouped else {"": SEEN}
        figures = {}
        for suffix, group in groups.items():
            values = dict(zip(self.names, accuracy[group].tolist()))
            known = {attribute: value for attribute, value in values.items() if value == value}  # not NaN
            if known:
                figures[f"{name}{suffix}"] = sum(known.values()) / len(known)
            figures |= {f"{name}_{attribute}{suffix}": value for attribute, value in known.items()}
        return figures

    def flush(self, name: str) -> dict[str, float]:
        """Return :meth:`figures` and forget all batches."""
        figures = self.figures(name)
        self.reset()
        return figures

    def reset(self) -> None:
        """Forget all batches."""
        super().reset()
        self.is_grouped = False
