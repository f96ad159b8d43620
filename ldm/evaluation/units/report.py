"""The names of units on disk: JSON, a heat map of all effects, and a picture of every unit over its range."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.data.vocabulary import AttributeVocabulary
from ldm.evaluation.units.names import UnitName, agreement
from ldm.pictures.draw import draw_grid, heat_map, save_png
from ldm.pictures.grid import CaptionedGrid
from ldm.util import atomic_write

FOLDER = "unit_names"


def caption_of(name: UnitName) -> str:
    """``unit 3: object hue, red to blue (0.98)``."""
    if not name.name:
        return f"unit {name.unit + 1}: no name"
    words = name.words[0] if name.words[0] == name.words[1] else " to ".join(name.words)
    return f"unit {name.unit + 1}: {name.name.replace('_', ' ')}, {words} ({name.confidence:.2f})"


def write_names(
    run_dir: Path,
    step: int,
    names: Sequence[UnitName],
    vocabulary: AttributeVocabulary,
    paths: Sequence[Tensor],
    points: int,
    settings: Mapping[str, Any],
) -> Path:
    """Write all files.

    Args:
        run_dir: the run's folder.
        step: optimizer steps of the weights.
        names: one per unit.
        vocabulary: the attributes.
        paths, points: see ``traverse_units``.
        settings: how the names were found, kept in the JSON.

    Returns:
        ``<run>/unit_names/<step>.json``; beside it ``<step>_effects.png`` and ``<step>_units.png``.
    """
    checks = sorted({check for name in names for check in name.checks})
    counts = {check: agreement(names, check) for check in checks}
    content = {
        "step": step,
        "attributes": list(vocabulary.factor_names),
        "units": [name.to_dict(vocabulary.factor_names) for name in names],
        "agreement": {check: {"same": same, "named_by_both": both} for check, (same, both) in counts.items()},
        **settings,
    }
    path = run_dir / FOLDER / f"{step}.json"
    with atomic_write(path) as stream:
        json.dump(content, stream, indent=2)
        stream.write("\n")
    title = "What CLIP sees change when a unit moves over its range"
    for check, (same, both) in counts.items():
        title += f"\n{check.replace('_', ' ')}: the same name for {same} of {both} units"
    attributes = [name.replace("_", " ") for name in vocabulary.factor_names]
    effects = np.stack([name.effects for name in names])
    heat_map(effects, [caption_of(name) for name in names], attributes, title, path.with_name(f"{step}_effects.png"))
    save_png(draw_grid(units_grid(names, paths, points)), path.with_name(f"{step}_units.png"))
    return path


def units_grid(names: Sequence[UnitName], paths: Sequence[Tensor], points: int) -> CaptionedGrid:
    """The first base image, each row another unit over its range; named units first, attribute by attribute."""
    order = sorted(names, key=lambda name: (not name.name, name.name, name.unit))
    images = torch.cat([paths[name.unit][:points] for name in order])
    rows, columns = [caption_of(name) for name in order], ["low", *[""] * (points - 2), "high"]
    return CaptionedGrid(images, rows, columns, "every unit over its range, named by CLIP")
