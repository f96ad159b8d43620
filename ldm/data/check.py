"""Looking through a whole data set: what it holds, and everything in it that cannot be read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ldm.util import UserError

MOST_PROBLEMS = 20
QUICK = 200
_BATCH = 64


@dataclass
class CheckReport:
    """What a data set holds.

    Attributes:
        facts: (what, value) for people.
        problems: messages of what could not be read, at most ``MOST_PROBLEMS``.
        checked: images looked at.
    """

    facts: list[tuple[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    checked: int = 0


def check_dataset(
    dataset: Any, is_quick: bool = False, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> CheckReport:
    """Read every image (and text) of a data set.

    Args:
        dataset: an ``ImageDataset``.
        is_quick: look at 200 images, evenly spread, instead of all.
        on_progress: called with the number of images read and to be read.

    Returns:
        What was found; damaged images are listed, and the others read on.
    """
    report = CheckReport(_static_facts(dataset))
    step = max(1, len(dataset) // QUICK) if is_quick else 1
    positions = np.arange(0, len(dataset), step)
    low, high, shapes = 255, 0, set()
    for start in range(0, len(positions), _BATCH):
        for batch in _read(dataset, positions[start : start + _BATCH].tolist(), report):
            pixels = batch["image"].numpy()
            low, high = min(low, int(pixels.min())), max(high, int(pixels.max()))
            shapes.add(pixels.shape[1:])
        report.checked = min(start + _BATCH, len(positions))
        on_progress(report.checked, len(positions))
        if len(report.problems) >= MOST_PROBLEMS:
            report.problems.append("further images were not looked at")
            break
    if shapes:
        report.facts.append(("image", f"{' x '.join(map(str, shapes.pop()))} uint8, values {low} to {high}"))
    return report


def _read(dataset: Any, positions: list[int], report: CheckReport) -> list[dict[str, Any]]:
    """The batch; image by image where one of them cannot be read."""
    try:
        return [dataset.__getitems__(positions)]
    except UserError as err:
        if len(positions) == 1:
            if str(err) not in report.problems:
                report.problems.append(str(err))
            return []
    batches = []
    for position in positions:
        if len(report.problems) < MOST_PROBLEMS:
            batches += _read(dataset, [position], report)
    return batches


def _static_facts(dataset: Any) -> list[tuple[str, str]]:
    facts = [("data set", type(dataset).__name__), ("images", f"{len(dataset):,}")]
    path = getattr(dataset, "path", None) or getattr(getattr(dataset, "reader", None), "path", None)
    if path is not None:
        facts.insert(1, ("source", str(path)))
    space = dataset.position_space
    if space is not None:
        pairs = zip(space.all_names, space.all_sizes)
        facts.append(("factors", ", ".join(f"{name} {size}" for name, size in pairs)))
        hidden = [name for k, name in enumerate(space.all_names) if k not in space.latent]
        if hidden:
            facts.append(("not to be recovered", ", ".join(hidden)))
        if space.size != len(dataset):
            facts.append(("metrics", f"not from this selection: its factors make {space.size:,} images"))
    if dataset.vocabulary is not None:
        pairs = zip(dataset.vocabulary.factor_names, dataset.vocabulary.words)
        facts.append(("words", ", ".join(f"{name} {len(words)}" for name, words in pairs)))
    if len(dataset):
        text = _first_text(dataset)
        if text is not None:
            facts.append(("text of image 0", str(text)))
    return facts


def _first_text(dataset: Any) -> Any:
    try:
        return dataset[0].get("text")
    except UserError:  # told where all images are read
        return None
