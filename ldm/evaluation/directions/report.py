"""The numbers and pictures of the direction bench, from its measurements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ldm.evaluation.directions.finders import RandomRows
from ldm.evaluation.directions.measure import Bench, BenchPlan, Measured, margins
from ldm.evaluation.editing.measure import plain_number
from ldm.evaluation.units.report import caption_of
from ldm.pictures.charts import heat_map, heat_maps
from ldm.pictures.draw import draw_grid, save_png
from ldm.pictures.grid import CaptionedGrid

QUANTILE = 0.05  # of the random control, the threshold of "no effect"
_SHOWN = 6  # rows of the picture of edits without a judge


@dataclass(frozen=True)
class BenchReport:
    """Report on several finders.

    Attributes:
        plan: see ``BenchPlan``.
        factor_names: names of the F factors; empty without a judge.
        measured: numbers by finder.
        costs: ``seconds`` and ``peak_memory_bytes`` by finder.
        attributes: names of the attributes that CLIP reads, with or without a judge.
    """

    plan: BenchPlan
    factor_names: tuple[str, ...]
    measured: Mapping[str, Measured]
    costs: Mapping[str, Mapping[str, float | None]]
    attributes: Sequence[str] = ()

    @property
    def control(self) -> Measured | None:
        """The random directions."""
        return next((each for each in self.measured.values() if each.directions.finder == RandomRows.name), None)

    @property
    def threshold(self) -> float:
        """Effect below which a direction has none; NaN without a control."""
        return float("nan") if self.control is None else float(np.quantile(self.control.largest_effects, QUANTILE))

    def figures(self) -> dict[str, Any]:
        """Return the figures of ``results.json``; those of ownership are null without a judge."""
        numbers = {name: self._summary(found) for name, found in self.measured.items()}
        keys = ("owned_factors", "leakage", "mean_margin")
        flat = {f"{name}_{key}": each[key] for name, each in numbers.items() for key in keys}
        return flat | {key: {name: each[key] for name, each in numbers.items()} for key in keys[:2]}

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; NaN becomes ``None``."""
        return {
            "factor_names": list(self.factor_names),
            "selection_samples": len(self.plan.selection),
            "report_samples": len(self.plan.report),
            "strengths": list(self.plan.strengths),
            "own_threshold": self.plan.own_threshold,
            "leakage_threshold": self.plan.leakage_threshold,
            "no_effect_threshold": plain_number(self.threshold),
            "no_effect_rule": "effect at the largest strengths below the 5 % quantile of that of the random control",
            "finders": {name: self._finder(name, found) for name, found in self.measured.items()},
        }

    def _summary(self, found: Measured) -> dict[str, Any]:
        if not self.factor_names:
            return dict.fromkeys(("owned_factors", "factors", "leakage", "mean_margin", "ahead_of_random"))
        best, (change, leakage) = found.best(self.plan), found.own
        by_factor = {self.factor_names[f]: found.directions.names[k] for f, k in best.items()}
        ahead = None
        if (control := self.control) is not None:
            ahead = {
                "owned_factors": len(best) - len(control.best(self.plan)),
                "mean_margin": plain_number(found.best_margins().mean() - control.best_margins().mean()),
            }
        return {
            "owned_factors": len(best),
            "factors": by_factor,
            "leakage": plain_number(leakage[list(best.values())].mean()) if best else None,
            "mean_margin": plain_number((change - leakage).mean()),
            "ahead_of_random": ahead,
        }

    def _finder(self, name: str, found: Measured) -> dict[str, Any]:
        others = found.similarity[~np.eye(len(found.similarity), dtype=bool)]
        others = others[np.isfinite(others)]
        margin = found.best_margins() if self.factor_names else []
        return {
            "kind": found.directions.kind,
            "num_directions": len(found.directions),
            **self.costs[name],
            **self._summary(found),
            "best_margins": dict(zip(self.factor_names, map(plain_number, margin))),
            "without_effect": None if np.isnan(self.threshold) else int((found.largest_effects < self.threshold).sum()),
            "mean_similarity": plain_number(others.mean()) if others.size else None,
            "matrix": [[plain_number(value) for value in row] for row in found.matrix] if self.factor_names else None,
            "directions": [self._direction(found, k) for k in range(len(found.directions))],
            "similarity": [[plain_number(value) for value in row] for row in found.similarity],
        }

    def _direction(self, found: Measured, k: int) -> dict[str, Any]:
        has_effect = None if np.isnan(self.threshold) else bool(found.largest_effects[k] >= self.threshold)
        numbers = {
            "strength": found.strengths[k],
            "change": found.own[0][k],
            "leakage": found.own[1][k],
            "effect": found.effects[k],
            "effect_at_largest_strengths": found.largest_effects[k],
            "ssim": found.ssim[k],
            "lpips": found.lpips[k],
        }
        return {
            "name": found.directions.names[k],
            "factor": self.factor_names[found.owners[k]] if self.factor_names else None,
            "owns": bool(found.owns(self.plan)[k]) if self.factor_names else None,
            "has_effect": has_effect,
            **{key: plain_number(value) for key, value in numbers.items()},
            "clip": found.names[k].to_dict(self.attributes) if found.names else None,
        }

    def _order(self, found: Measured) -> list[int]:
        """Return directions by factor, owners and large margins first; without a judge by effect."""
        change, leakage = found.own
        if not self.factor_names:
            return np.argsort(-found.effects, kind="stable").tolist()
        return np.lexsort((leakage - change, ~found.owns(self.plan), found.owners)).tolist()

    def _caption(self, found: Measured, k: int) -> str:
        """Return ``<t3> at -2: owns object hue; CLIP: scale, small to large (0.98)``."""
        text = f"{found.directions.names[k]} at {found.strengths[k]:+g}"
        if self.factor_names:
            verb = "owns" if found.owns(self.plan)[k] else "mostly"
            text += f": {verb} {_spaced(self.factor_names[found.owners[k]])}"
        if found.largest_effects[k] < self.threshold:
            text += ", no effect"
        return f"{text}; CLIP: {caption_of(found.names[k]).partition(': ')[2]}" if found.names else text

    def _title(self, name: str) -> str:
        numbers, cost = self._summary(self.measured[name]), self.costs[name]
        seconds = "" if cost["seconds"] is None else f", found in {cost['seconds']:.0f} s"
        leakage = "" if numbers["leakage"] is None else f", leakage {numbers['leakage']:.2f}"
        owned = "" if numbers["owned_factors"] is None else f": {numbers['owned_factors']} factors owned"
        return f"{name}{owned}{leakage}{seconds}"

    def show(self, console: Console) -> None:
        """Print the matrix of each finder as a table; owners have a star."""
        for name, found in self.measured.items():
            table = Table("direction", *map(_spaced, self.factor_names), "effect", title=self._title(name), box=None)
            owns = found.owns(self.plan)
            for k in self._order(found):
                numbers = (f"{value:.2f}" for value in (*found.matrix[k], found.effects[k]))
                name_of_k = f"{found.directions.names[k]} {found.strengths[k]:+g}{' *' if owns[k] else ''}"
                table.add_row(escape(name_of_k), *numbers)
            console.print(table)

    def draw(self, bench: Bench, path: Path, pictures: Path, stamp: str, columns: int) -> None:
        """Write heat maps and an overview beside the JSON file ``path``, and edits of ``columns`` samples."""
        factors, samples = [_spaced(name) for name in self.factor_names], self.plan.report[:columns]
        for name, found in self.measured.items():
            order, best = self._order(found), list(found.best(self.plan).values())
            if self.factor_names:
                title = f"Share of images whose attribute changes\n{self._title(name)}"
                rows = [self._caption(found, k) for k in order]
                heat_map(found.matrix[order], rows, factors, title, path.with_name(f"{path.stem}_{name}.png"))
                order = best or np.argsort(-margins(found.matrix).max(axis=1)).tolist()
            shown = order[: max(_SHOWN, len(best))]
            edited = [bench.images(found.directions, k, float(found.strengths[k]), samples) for k in shown]
            images = torch.cat([bench.base[samples].cpu(), *edited])
            captions = ["base", *(self._caption(found, k) for k in shown)]
            grid = CaptionedGrid(images, captions, [], f"Edits by {self._title(name)}")
            save_png(draw_grid(grid), pictures / f"directions_{name}_{stamp}.png")
        if self.factor_names:
            margin = {"best margin of each factor": np.stack([each.best_margins() for each in self.measured.values()])}
            rows, title = [self._title(name) for name in self.measured], "Change of a factor minus that of the others"
            heat_maps(margin, rows, factors, title, path.with_name(f"{path.stem}_overview.png"))


def _spaced(name: str) -> str:
    return name.replace("_", " ")
