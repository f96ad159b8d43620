"""Figures that papers published, to stand beside ours. ``published.json`` holds them, each with its source."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ldm.scoring.spaces import PART, WORLD

FILE = Path(__file__).with_name("published.json")

# our data set -> the data sets whose published figures are shown beside it, other than itself
_NEAR = {
    WORLD: ("shapes3d",),  # the same factors, other images
    "mpi3d_toy": ("mpi3d",),  # papers that do not say which MPI3D
    "mpi3d_realistic": ("mpi3d",),
}


@dataclass(frozen=True)
class Source:
    """Where figures were read.

    Attributes:
        text: authors, title, table.
        url: of the paper.
        note: what to know before comparing.
    """

    text: str
    url: str
    note: str


@dataclass(frozen=True)
class PublishedRow:
    """A line of a published table.

    Attributes:
        method: its name.
        kind: "VAE", "transformer" or "diffusion".
        dataset: as ``score_spaces.describe_dataset`` names data sets; "mpi3d" where the variant is not told.
        source: key of ``published_sources``.
        figures: metric -> (mean, deviation over runs).
    """

    method: str
    kind: str
    dataset: str
    source: str
    figures: dict[str, tuple[float, float]]


@functools.lru_cache(maxsize=1)
def published_rows() -> tuple[PublishedRow, ...]:
    """All published figures, weakest kind of method first."""
    about = ("method", "kind", "dataset", "source")
    return tuple(
        PublishedRow(*(row[key] for key in about), {key: tuple(row[key]) for key in row if key not in about})
        for row in _content()["rows"]
    )


@functools.lru_cache(maxsize=1)
def published_sources() -> dict[str, Source]:
    """Sources by key."""
    return {key: Source(**source) for key, source in _content()["sources"].items()}


def _content() -> dict:
    return json.loads(FILE.read_text(encoding="utf-8"))


def published_beside(datasets: Iterable[str | None], figures: Iterable[str]) -> list[PublishedRow]:
    """The rows on the given data sets, or the nearest there are, that hold at least one of the figures."""
    whole = [dataset.removesuffix(PART) for dataset in dict.fromkeys(datasets) if dataset]
    wanted = [name for dataset in whole for name in (dataset, *_NEAR.get(dataset, ()))]
    shown = set(figures)
    return [
        row
        for name in dict.fromkeys(wanted)
        for row in published_rows()
        if row.dataset == name and shown & row.figures.keys()
    ]
