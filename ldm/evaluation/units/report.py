"""The files of named units: JSON, a heat map of all effects, and a picture of every unit over its range."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.data.vocabulary import AttributeVocabulary
from ldm.evaluation.units.names import UnitName, agreement
from ldm.pictures.charts import heat_map
from ldm.pictures.draw import draw_grid, save_png
from ldm.pictures.grid import CaptionedGrid
from ldm.runs.records import write_json


def caption_of(name: UnitName) -> str:
    """Return a caption such as ``unit 3: object hue, red to blue (0.98)``."""
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
    """Write ``<run>/unit_names/<step>.json``, ``<step>_effects.png`` and ``<step>_units.png``; return the first path.

    Args:
        run_dir: the run folder.
        step: optimizer steps of the weights.
        names: one per unit.
        vocabulary: the attributes.
        paths, points: see ``traverse_units``.
        settings: settings to keep in the JSON.
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
    path = run_dir / "unit_names" / f"{step}.json"
    write_json(path, content)
    title = "Effect of each unit on each attribute, by CLIP"
    for check, (same, both) in counts.items():
        title += f"\n{check.replace('_', ' ')}: the same name for {same} of {both} units"
    attributes = [name.replace("_", " ") for name in vocabulary.factor_names]
    effects = np.stack([name.effects for name in names])
    heat_map(effects, [caption_of(name) for name in names], attributes, title, path.with_name(f"{step}_effects.png"))
    order = sorted(names, key=lambda name: (not name.name, name.name, name.unit))  # named units first, by attribute
    images = torch.cat([paths[name.unit][:points] for name in order])  # of the first base image
    rows, columns = [caption_of(name) for name in order], ["low", *[""] * (points - 2), "high"]
    grid = CaptionedGrid(images, rows, columns, "every unit over its range, named by CLIP")
    save_png(draw_grid(grid), path.with_name(f"{step}_units.png"))
    return path
