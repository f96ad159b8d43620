"""One representation file on its way to a score file, job by job.

Each finished job is a file of its own, ``records/<step>/<job>.json``: its result, and the protocol, data set, versions
and seed behind it. When no job of the step is left they become one file, ``records/<step>.json``, beside the score file
``<step>.json``, which holds the metrics' own dicts alone. So nothing that was computed is lost or computed twice,
whenever a command is stopped.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ldm.metrics import DEFAULT_PROTOCOL, METRICS, PROTOCOL_SEED, Metric
from ldm.scoring.factors import Factors
from ldm.scoring.files import LatentFile, write_json
from ldm.scoring.jobs import Part, information

logger = logging.getLogger(__name__)

RECORDS = "records"
INFORMATION = Metric("", information, "", seconds=lambda units, values: 0.2)  # of the record alone, no score
INFORMATION_NAME = "information"
PREPARE_VALUES_PER_SECOND = 3e7


@dataclass(frozen=True)
class Setting:
    """How scores are taken.

    Attributes:
        metrics: by name, with the protocol's arguments.
        protocol: its name.
        seed: of every metric's random generator.
        information: whether the record also holds what each unit tells of each factor, for reports.
        pictured: metrics whose parts a report draws: they are wanted in the record even if the score is known.
    """

    metrics: Mapping[str, Metric]
    protocol: str = DEFAULT_PROTOCOL
    seed: int = PROTOCOL_SEED
    information: bool = False
    pictured: tuple[str, ...] = ()


@dataclass
class ScoreTask:
    """One representation file, scored with one seed by one protocol.

    Args:
        latents: head of the file.
        factors: of its data set.
        dataset: what is known about the data set, for the record.
        setting: how it is scored.
        target: the score file.
        is_own: whether the score file is written by this task alone: what it holds is then trusted only as far as the
            record vouches for it. A run's score files may come from elsewhere and are never scored again.
        record: the file of the record; None takes ``record_file(target)``.
    """

    latents: LatentFile
    factors: Factors
    dataset: dict[str, Any]
    setting: Setting
    target: Path
    is_own: bool = False
    record: Path | None = None
    parts: dict[str, Part] = field(init=False)

    def __post_init__(self) -> None:
        metrics = {INFORMATION_NAME: INFORMATION, **self.setting.metrics}
        self.parts = {part.name: part for name, metric in metrics.items() for part in self._parts_of(name, metric)}
        self.record = self.record or record_file(self.target)
        status = self.latents.path.stat()
        self._origin = {  # the numbers that results are of
            "latents": [self.latents.path.name, status.st_size, status.st_mtime_ns],
            "factors": dict(zip(self.factors.names, self.factors.sizes)),
            "table": self.factors.digest,
            "seed": self.setting.seed,
        }
        self._scores = _read_json(self.target) if self.target.is_file() and not self.is_own else {}
        self._kept = self._kept_entries()

    @property
    def label(self) -> str:
        """What messages call it."""
        if self.is_own:
            return self.latents.path.name
        return f"{self.latents.run_dir.resolve().name}: step {self.latents.num_samples}"

    @property
    def prepare_seconds(self) -> float:
        """Estimated cost of reducing the latents."""
        return 1.0 + float(np.prod(self.latents.shape, dtype=np.float64)) / PREPARE_VALUES_PER_SECOND

    @property
    def missing(self) -> list[Part]:
        """Parts still to be computed; none once every metric stands in the score file."""
        wanted = [
            name
            for name, metric in self.setting.metrics.items()
            if metric.key not in self._scores or name in self.setting.pictured
        ]
        names = {part.name for name in wanted for part in self._parts_of(name, self.setting.metrics[name])}
        if self.setting.information and (names - self._kept.keys() or self.setting.pictured):
            names.add(INFORMATION_NAME)
        return [part for part in self.parts.values() if part.name in names and part.name not in self._kept]

    @property
    def is_done(self) -> bool:
        """Whether the score file holds every metric, and nothing of an interrupted command is left over."""
        is_written = all(metric.key in self._scores for metric in self.setting.metrics.values())
        return is_written and not self.missing and not self._parts_folder.is_dir()

    def add(self, name: str, outcome: Mapping[str, Any]) -> None:
        """Keep a part's outcome on disk."""
        part = self.parts[name]
        about = {"name": name, "protocol": self.setting.protocol, "dataset": self.dataset}
        self._kept[name] = {**about, **self._identity(part), **outcome}
        try:
            write_json(self._part_file(name), self._kept[name])
        except FileNotFoundError:  # another command has just finished this step and taken the folder away
            write_json(self._part_file(name), self._kept[name])

    def finish(self) -> bool:
        """Write record and score file from all parts there are; True if the score file is new or has become longer.

        A metric that stands in the score file already stays as it is.
        """
        joined = {
            metric.key: self._joined(name, metric)
            for name, metric in self.setting.metrics.items()
            if all(part.name in self._kept for part in self._parts_of(name, metric))
        }
        content = _in_order({**joined, **self._scores})
        if self._kept != read_record_file(self.record):
            write_json(self.record, {"parts": self._kept})
        is_new = content.keys() != self._scores.keys()
        if is_new:
            write_json(self.target, content)
            self._scores = content
        shutil.rmtree(self._parts_folder, ignore_errors=True)
        return is_new

    def _joined(self, name: str, metric: Metric) -> dict[str, Any]:
        results = [self._kept[part.name]["result"] for part in self._parts_of(name, metric)]
        return results[0] if metric.join is None else metric.join(results)

    def _parts_of(self, name: str, metric: Metric) -> list[Part]:
        units, sizes, arguments = self.latents.shape[1], self.factors.sizes, dict(metric.protocol)
        if not metric.reduce:
            units = int(np.prod(self.latents.shape[1:]))
        if metric.part is None:
            return [Part(name, metric.function, None, arguments, metric.seconds(units, max(sizes)), metric.reduce)]
        return [
            Part(f"{name}/{factor}", metric.part, factor, arguments, metric.seconds(units, size), metric.reduce)
            for factor, size in enumerate(sizes)
        ]

    def _identity(self, part: Part) -> dict[str, Any]:
        """What a result depends on; kept results of anything else are not taken up."""
        return {**self._origin, "arguments": _as_json(part.arguments)}

    @property
    def _parts_folder(self) -> Path:
        return self.record.with_suffix("")

    def _part_file(self, name: str) -> Path:
        return self._parts_folder / f"{name.replace('/', '-')}.json"

    def _kept_entries(self) -> dict[str, dict[str, Any]]:
        """Results of earlier commands, from the record and from the files of single jobs; by name."""
        entries = read_record_file(self.record)
        for path in self._parts_folder.glob("*.json"):
            entry = _read_json(path)
            if "name" in entry:
                entries[entry["name"]] = entry
        return {name: entry for name, entry in entries.items() if self._is_valid(name, entry)}

    def _is_valid(self, name: str, entry: Mapping[str, Any]) -> bool:
        """Whether a kept result is of this file, these factors and, as far as it is asked for here, these arguments."""
        identity = self._identity(self.parts[name]) if name in self.parts else self._origin
        return all(entry.get(key) == value for key, value in identity.items())


def record_file(target: Path) -> Path:
    """The record that belongs to a score file."""
    return target.parent / RECORDS / f"{target.stem}.json"


def read_record(target: Path) -> dict[str, dict[str, Any]]:
    """What was written about each part of a score file: ``{part: {"result", "seed", "protocol", "dataset", ...}}``."""
    return read_record_file(record_file(target))


def read_record_file(path: Path) -> dict[str, dict[str, Any]]:
    """The parts in a record; empty where there is none."""
    parts = _read_json(path).get("parts", {}) if path.is_file() else {}
    return parts if isinstance(parts, dict) else {}


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON mapping; empty, and a warning, for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as err:
        logger.warning("%s is no JSON (%s): its results are computed anew", path, err)
        return {}
    return content if isinstance(content, dict) else {}


def _as_json(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments as they are read back: tuples become lists."""
    return json.loads(json.dumps(arguments, default=float))


def _in_order(content: dict[str, Any]) -> dict[str, Any]:
    """Keys as the registry lists the metrics, so that equal scores are equal files."""
    places = {metric.key: place for place, metric in enumerate(METRICS.values())}
    return dict(sorted(content.items(), key=lambda entry: places.get(entry[0], len(places))))
