"""The edit score on disk: numbers as JSON, the matrix as a heat map, the edits as a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ldm.evaluation.editing.measure import EditResult
from ldm.evaluation.test_pass import Progress
from ldm.pictures.draw import draw_grid, heat_map, save_png
from ldm.pictures.grid import CaptionedGrid
from ldm.runs.folder import update_results
from ldm.util import atomic_write


@dataclass(frozen=True)
class JudgeRecord:
    """Which judge gave the verdicts, and how far it can be trusted.

    Attributes:
        path: Its checkpoint.
        accuracy: (F,) share of right words on real images it was not trained on.
        num_images: How many of them.
    """

    path: str
    accuracy: np.ndarray
    num_images: int


def edit_report(
    result: EditResult, judge: JudgeRecord, progress: Progress, sampler: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything about one edit score as plain JSON values; NaN becomes null.

    Args:
        result: The score.
        judge: The judge behind it.
        progress: How far the model was trained.
        sampler: Settings of the sampler and the seed.
    """

    def by_name(values: np.ndarray) -> dict[str, float | None]:
        return {name: _number(value) for name, value in zip(result.factor_names, values)}

    return {
        "edit_accuracy": _number(result.edit_accuracy),
        "edit_leakage": _number(result.edit_leakage),
        "accuracy": by_name(result.accuracy),
        "leakage": by_name(result.leakage),
        "chance": by_name(result.chance),
        "base_accuracy": by_name(result.base_accuracy),
        "value_leakage": by_name(result.value_leakage),
        "factor_names": list(result.factor_names),
        "matrix": [[_number(value) for value in row] for row in result.matrix],
        "value_changes": [[_number(value) for value in row] for row in result.value_changes],
        "num_samples": result.num_samples,
        "sampler": dict(sampler),
        "epoch": progress.epoch,
        "step": progress.step,
        "judge": {
            "path": judge.path,
            "accuracy": _number(judge.accuracy.mean()),
            "accuracy_by_factor": by_name(judge.accuracy),
            "num_images": judge.num_images,
        },
    }


def _number(value: float) -> float | None:
    return None if math.isnan(value) else round(float(value), 6)


def write_edit_score(
    run_dir: Path,
    result: EditResult,
    judge: JudgeRecord,
    grid: CaptionedGrid,
    progress: Progress,
    sampler: Mapping[str, Any],
) -> Path:
    """Write all files of one edit score and its figures in ``results.json``.

    Returns:
        ``<run>/edit_score/<step>.json``; beside it lies the heat map ``<step>.png``, and the picture is
        ``<run>/images/test/edit_grid_gs-<step>_e-<epoch>_b-000000.png``.
    """
    report = edit_report(result, judge, progress, sampler)
    path = run_dir / "edit_score" / f"{progress.step}.json"
    with atomic_write(path) as stream:
        json.dump(report, stream, indent=2)
        stream.write("\n")

    names = [name.replace("_", " ") for name in result.factor_names]
    title = (
        f"Edit accuracy {result.edit_accuracy:.2f} (diagonal), leakage {result.edit_leakage:.2f} (elsewhere)\n"
        f"rows: attribute changed, columns: factor judged; {result.num_samples} samples, step {progress.step:,}\n"
        f"the judge itself is right on {judge.accuracy.mean():.3f} of unseen real images"
    )
    heat_map(result.matrix, names, names, title, path.with_suffix(".png"))
    picture = f"edit_grid_gs-{progress.step:06d}_e-{progress.epoch:06d}_b-000000.png"
    save_png(draw_grid(grid), run_dir / "images" / "test" / picture)
    update_results(
        run_dir,
        edit_accuracy=report["edit_accuracy"],
        edit_leakage=report["edit_leakage"],
        judge_accuracy=report["judge"]["accuracy"],
    )
    return path
