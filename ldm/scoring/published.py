"""Published figures that are shown beside ours; ``published.json`` holds them, each with its source."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.scoring.factors import SUBSET, WORLD

FILE = Path(__file__).with_name("published.json")

# data set -> other data sets whose published figures are shown beside it
_RELATED = {
    WORLD: ("shapes3d",),  # the same factors, other images
    "mpi3d_toy": ("mpi3d",),  # papers that do not name the variant of MPI3D
    "mpi3d_realistic": ("mpi3d",),
}


@dataclass(frozen=True)
class PublishedRow:
    """A row of a published table."""

    method: str
    dataset: str  # as named by ``describe_dataset``; "mpi3d" if the variant is not published
    source: str  # key of ``published_sources``
    figures: dict[str, tuple[float, float]]  # metric -> (mean, deviation over runs)


@functools.lru_cache(maxsize=1)
def _content() -> dict[str, Any]:
    return json.loads(FILE.read_text(encoding="utf-8"))


def published_rows() -> tuple[PublishedRow, ...]:
    """Return all published figures, in the order of the file."""
    about = ("method", "dataset", "source")
    return tuple(
        PublishedRow(*map(row.get, about), {key: tuple(row[key]) for key in row.keys() - {*about, "kind"}})
        for row in _content()["rows"]
    )


def published_sources() -> dict[str, str]:
    """Return authors, title, address and notes of each source, by key."""
    return {key: f"{entry['text']}; {entry['url']}. {entry['note']}" for key, entry in _content()["sources"].items()}


def published_beside(datasets: Iterable[str | None], figures: Iterable[str]) -> list[PublishedRow]:
    """Return the rows of the given or related data sets that hold at least one of the figures."""
    whole = [dataset.removesuffix(SUBSET) for dataset in dict.fromkeys(datasets) if dataset]
    wanted = [name for dataset in whole for name in (dataset, *_RELATED.get(dataset, ()))]
    shown = set(figures)
    return [
        row
        for name in dict.fromkeys(wanted)
        for row in published_rows()
        if row.dataset == name and shown & row.figures.keys()
    ]
