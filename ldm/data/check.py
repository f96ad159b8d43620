"""Check of a whole data set: a summary of its contents, and every image that cannot be read."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from ldm.data.collate import collate
from ldm.data.dataset import FactorDataset, ImageDataset
from ldm.data.formats.attribute_tables import INSTANCE
from ldm.data.formats.encoded import EncodedImages
from ldm.data.formats.picture_files import DEEP_GREY, FRAMES, first_names, inspect_picture
from ldm.data.traits import missing_vocabulary_of, position_space_of, unwrap, vocabulary_of
from ldm.data.vocabulary import UNKNOWN, AttributeVocabulary
from ldm.util import UserError

MAX_PROBLEMS = 20
QUICK = 200
_BATCH = 64
_SHOWN_WORDS = 12


@dataclass
class CheckReport:
    """Result of ``check_dataset``."""

    facts: list[tuple[str, str]] = field(default_factory=list)  # (name, value) pairs to print
    problems: list[str] = field(default_factory=list)  # the first ``MAX_PROBLEMS``: images that could not be read
    num_problems: int = 0  # number of images that could not be read
    checked: int = 0  # number of images read
    properties: dict[str, dict[str, int]] = field(default_factory=dict)  # of ``inspect_picture`` -> extent by image


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
    if kinds:
        report.facts.append(("image", f"{' or '.join(sorted(kinds))}, values {low:g} to {high:g}"))
    report.facts += map(_property, report.properties.items())
    return report


def _property(found: tuple[str, dict[str, int]]) -> tuple[str, str]:
    """Describe a property of ``inspect_picture`` of all images that have it."""
    name, extents = found
    total, most = sum(extents.values()), max(extents.values())
    text = first_names([*extents])
    if name == FRAMES:
        text = f"{total:,} in the images {text}, of which only the first frame is read"
    elif name == DEEP_GREY:
        bits = max(9, most.bit_length())
        text += f", values up to {most} of 65535"
        if bits < 16:
            text += f": probably {bits} bits, read as too dark. Set white_level: {2**bits - 1}"
    return name, text


def _read(dataset: Any, positions: list[int], report: CheckReport) -> list[dict[str, Any]]:
    """Read a batch; if one of its images cannot be read, read them one by one."""
    try:
        batches = list(DataLoader(dataset, batch_sampler=[positions], collate_fn=collate))
        images = unwrap(dataset)
        for row in np.unique(images.rows[positions]).tolist() if isinstance(images, EncodedImages) else ():
            for name, extent in inspect_picture(images.original(row), images.image_name(row)).items():
                report.properties.setdefault(name, {})[images.image_name(row)] = extent
        return batches
    except Exception as error:  # data sets of other authors raise many kinds of errors for damaged files
        if len(positions) == 1:
            report.num_problems += 1
            message = str(error) if isinstance(error, UserError) else f"image {positions[0]}: {error!r}"
            if message not in report.problems and len(report.problems) < MAX_PROBLEMS:
                report.problems.append(message)
            return []
    return [batch for position in positions for batch in _read(dataset, [position], report)]


def _facts(dataset: Any) -> list[tuple[str, str]]:
    """Describe a data set without reading all of its images."""
    images, space, vocabulary = unwrap(dataset), position_space_of(dataset), vocabulary_of(dataset)
    facts = [("data set", type(images).__name__)]
    if isinstance(images, ImageDataset) and images.path is not None:
        facts.append(("source", str(images.path)))
    facts.append(("images", f"{len(dataset):,}"))
    if isinstance(images, ImageDataset):
        facts += images.notes.items()
    if space is not None:
        pairs = zip(space.all_names, space.all_sizes)
        facts.append(("factors", ", ".join(f"{name} {size}" for name, size in pairs)))
        hidden = [name for k, name in enumerate(space.all_names) if k not in space.latent]
        if hidden:
            meaning = " (the number of an image among those of one combination)" if hidden == [INSTANCE] else ""
            facts.append(("not to be recovered", ", ".join(hidden) + meaning))
        if space.size != len(dataset):
            facts.append(("metrics", f"not for this selection: its factors make {space.size:,} images"))
    if vocabulary is not None and isinstance(images, ImageDataset):
        facts += _attributes(images, vocabulary)
    elif reason := missing_vocabulary_of(dataset):
        facts.append(("no vocabulary", reason))
    with contextlib.suppress(Exception):  # a damaged image is reported when all are read
        first = dataset[0] if len(dataset) else {}
        if "text" in first:
            facts.append(("text of image 0", str(first["text"])))
    return facts


def _attributes(images: ImageDataset, vocabulary: AttributeVocabulary) -> list[tuple[str, str]]:
    """Describe the words of a data set, its unknown entries, and its combinations of words."""
    rows = np.unique(images.rows)
    values = images.attribute_values(rows)
    labels, facts = vocabulary.word_labels(values), []
    for name, words, column in zip(vocabulary.factor_names, vocabulary.words, labels.T):
        more = f", ... ({len(words)} words)" if len(words) > _SHOWN_WORDS else ""
        unknown, absent = int((column == UNKNOWN).sum()), len(words) - len(set(column.tolist()) - {UNKNOWN})
        notes = [f"unknown for {unknown:,} images"] * (unknown > 0) + [f"{absent} words without images"] * (absent > 0)
        notes += ["the same for all images: remove the column"] * (len(words) == 1)
        facts.append((f"attribute {name}", "; ".join([", ".join(map(str, words[:_SHOWN_WORDS])) + more, *notes])))
    possible = math.prod(map(len, vocabulary.words))
    counts = Counter(row.tobytes() for row in labels[(labels != UNKNOWN).all(axis=1)])
    if counts:
        each = f"{min(counts.values()):,} to {max(counts.values()):,} images each, {possible - len(counts):,} missing"
        facts.append(("combinations", f"{len(counts):,} of {possible:,}, {each}"))
    if images.holdout:
        whole = images.attribute_values(images.rows_of(None))
        whole = whole[(whole != UNKNOWN).all(axis=1)]
        unseen = whole[images.is_unseen(whole)]
        num_held, num_all = (len({row.tobytes() for row in vocabulary.word_labels(part)}) for part in (unseen, whole))
        facts.append(("held out", f"{num_held:,} of {num_all:,} combinations, {len(unseen):,} images"))
    return facts


def shared_images(first: Any, second: Any) -> int:
    """Return how many images of the second data set are also in the first one.

    Sets with known factors count as disjoint: metrics need all of their images.
    """
    sets = [unwrap(dataset) for dataset in (first, second)]
    if not all(isinstance(one, ImageDataset) and not isinstance(one, FactorDataset) and one.path for one in sets):
        return 0
    names = [{(one.path, one.row_name(row)) for row in np.unique(one.rows).tolist()} for one in sets]
    return len(names[0] & names[1])
