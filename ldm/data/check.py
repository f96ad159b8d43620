"""Check of a whole data set: a summary of its contents, and every image that cannot be read."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from ldm.data.collate import collate
from ldm.data.dataset import ImageDataset
from ldm.data.traits import position_space_of, unwrap, vocabulary_of
from ldm.util import UserError

MAX_PROBLEMS = 20
QUICK = 200
_BATCH = 64


@dataclass
class CheckReport:
    """Result of ``check_dataset``."""

    facts: list[tuple[str, str]] = field(default_factory=list)  # (name, value) pairs to print
    problems: list[str] = field(default_factory=list)  # at most ``MAX_PROBLEMS``: images that could not be read
    checked: int = 0  # number of images read


def check_dataset(
    dataset: Any, is_quick: bool = False, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> CheckReport:
    """Read every image (and text) of a data set.

    Args:
        dataset: any torch data set whose items are dicts with an ``image``.
        is_quick: read 200 evenly spread images instead of all.
        on_progress: called with the number of images read and to be read.

    Returns:
        A report; damaged images are listed and do not stop the check.
    """
    report = CheckReport(_facts(dataset))
    step = max(1, len(dataset) // QUICK) if is_quick else 1
    positions = np.arange(0, len(dataset), step)
    low, high, kinds = float("inf"), float("-inf"), set()
    for start in range(0, len(positions), _BATCH):
        for batch in _read(dataset, positions[start : start + _BATCH].tolist(), report):
            pixels = batch["image"].numpy()
            low, high = min(low, pixels.min().item()), max(high, pixels.max().item())
            kinds.add(f"{' x '.join(map(str, pixels.shape[1:]))} {pixels.dtype}")
        report.checked = min(start + _BATCH, len(positions))
        on_progress(report.checked, len(positions))
        if len(report.problems) >= MAX_PROBLEMS:
            report.problems.append("further images were not read")
            break
    if kinds:
        report.facts.append(("image", f"{' or '.join(sorted(kinds))}, values {low:g} to {high:g}"))
    return report


def _read(dataset: Any, positions: list[int], report: CheckReport) -> list[dict[str, Any]]:
    """Read a batch; if one of its images cannot be read, read them one by one."""
    try:
        return list(DataLoader(dataset, batch_sampler=[positions], collate_fn=collate))
    except UserError as error:
        if len(positions) == 1:
            if str(error) not in report.problems:
                report.problems.append(str(error))
            return []
    batches = []
    for position in positions:
        if len(report.problems) < MAX_PROBLEMS:
            batches += _read(dataset, [position], report)
    return batches


def _facts(dataset: Any) -> list[tuple[str, str]]:
    """Describe a data set without reading all of its images."""
    images, space, vocabulary = unwrap(dataset), position_space_of(dataset), vocabulary_of(dataset)
    facts = [("data set", type(images).__name__)]
    if isinstance(images, ImageDataset) and images.path is not None:
        facts.append(("source", str(images.path)))
    facts.append(("images", f"{len(dataset):,}"))
    if space is not None:
        pairs = zip(space.all_names, space.all_sizes)
        facts.append(("factors", ", ".join(f"{name} {size}" for name, size in pairs)))
        hidden = [name for k, name in enumerate(space.all_names) if k not in space.latent]
        if hidden:
            facts.append(("not to be recovered", ", ".join(hidden)))
        if space.size != len(dataset):
            facts.append(("metrics", f"not for this selection: its factors make {space.size:,} images"))
    if vocabulary is not None:
        pairs = zip(vocabulary.factor_names, vocabulary.words)
        facts.append(("words", ", ".join(f"{name} {len(words)}" for name, words in pairs)))
    with contextlib.suppress(UserError):  # a damaged image is reported when all are read
        first = dataset[0] if len(dataset) else {}
        if "text" in first:
            facts.append(("text of image 0", str(first["text"])))
    return facts
