"""Trust report: how much scores vary over replicates, what baselines and changed units score, which runs differ."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ldm.metrics.registry import ALL_METRICS
from ldm.metrics.representation import MOST_UNITS
from ldm.metrics.trust import RANDOM, REPLICATE, SHARE, VARIANTS, difference_of_means, interval
from ldm.runs.records import write_json
from ldm.scoring import files
from ldm.scoring.plan import Setting, trust_settings
from ldm.scoring.table import Row, by_experiment
from ldm.scoring.text_table import TextTable

MOST_PAIRS = 20  # pairs that are listed


@dataclass(frozen=True)
class Trust:
    """Replicates and variants of one score."""

    row: Row  # the checkpoint
    label: str  # of the checkpoint, in tables
    name: str  # of the metric
    figure: float
    replicates: dict[int, float]  # by seed
    variants: dict[str, float]  # by the keys of ``VARIANTS``
    is_resampled: bool  # whether replicates use bootstrap samples of the rows

    @property
    def interval(self) -> tuple[float, float] | None:
        """Interval of 95 % from the replicates; None if fewer than two were computed."""
        values = list(self.replicates.values())
        if len(values) < 2:
            return None
        low, high = interval(self.figure, values)
        is_share = all(0 <= value <= 1 for value in (self.figure, *values))
        return (max(low, 0.0), min(high, 1.0)) if is_share else (low, high)

    @property
    def is_chance(self) -> bool:
        """Whether random codes are as good within the interval."""
        bounds, chance = self.interval, self.variants.get(RANDOM)
        if bounds is None or chance is None:
            return False
        return bounds[0] <= chance if ALL_METRICS[self.name].higher_is_better else bounds[1] >= chance

    def difference(self, other: Trust) -> tuple[float, float] | None:
        """Return the interval of this figure minus another, from the differences of replicates of equal seeds."""
        seeds = self.replicates.keys() & other.replicates.keys()
        differences = [self.replicates[seed] - other.replicates[seed] for seed in sorted(seeds)]
        return interval(self.figure - other.figure, differences) if len(differences) > 1 else None


def collect_trust(row: Row, target: Path, setting: Setting, num_replicates: int) -> list[Trust]:
    """Return what was computed about the scores of a checkpoint, and write its summary.

    Args:
        row: the checkpoint.
        target: its score file, beside which the folder ``trust`` lies.
        setting: settings of the score.
        num_replicates: number of replicates that were planned.
    """
    folder = files.trust_folder(target)
    found: dict[tuple[str, int], dict[str, float]] = {}
    is_resampled = False
    for each in trust_settings(setting, num_replicates, MOST_UNITS):
        path = folder / each.variant_file
        if path.is_file():
            found[each.variant, each.seed] = files.figures_of(files.read_score_file(path))
            record = files.read_record(files.record_file(path)).values()
            is_resampled |= any(entry.get("is_resampled", False) for entry in record)
    trusts = []
    figures = row.by_seed.get(setting.seed, {})
    for name in (name for name in setting.metrics if name in figures):
        values = {key: scores[name] for key, scores in found.items() if name in scores}
        replicates = {seed: value for (variant, seed), value in values.items() if variant == REPLICATE}
        variants = {variant: value for (variant, _), value in values.items() if variant in VARIANTS}
        label = row.run if row.step == 0 else f"{row.run} @ {row.step}"
        trusts.append(Trust(row, label, name, figures[name], replicates, variants, is_resampled))
    if trusts:
        write_json(folder.with_suffix(".json"), {ALL_METRICS[trust.name].key: _summary(trust) for trust in trusts})
    return trusts


def _summary(trust: Trust) -> dict[str, object]:
    return {
        "figure": trust.figure,
        "interval": trust.interval,
        "rows": "bootstrap" if trust.is_resampled else "all",
        "replicates": list(trust.replicates.values()),
        **trust.variants,
    }


def trust_table(trusts: Sequence[Trust], protocol: str) -> TextTable:
    """Return the table of scores with their intervals, baselines and changed units, and notes on small differences."""
    shown = [name for name in VARIANTS if any(name in trust.variants for trust in trusts)]
    rows = []
    for trust in trusts:
        variants = [f"{trust.variants[name]:.3f}" if name in trust.variants else "" for name in shown]
        heading = ALL_METRICS[trust.name].heading
        rows.append((trust.label, [trust.label, heading, f"{trust.figure:.3f}", _range(trust.interval), *variants]))
    headings = ["run", "score", "value", f"{SHARE:.0%} interval", *(VARIANTS[name].heading for name in shown)]
    return TextTable("How far the scores can be trusted", headings, rows, _notes(trusts, protocol), 2)


def _range(bounds: tuple[float, float] | None) -> str:
    return "" if bounds is None else f"{bounds[0]:.3f} to {bounds[1]:.3f}"


def _notes(trusts: Sequence[Trust], protocol: str) -> list[str]:
    counts = sorted({len(trust.replicates) for trust in trusts})
    count = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    resampled = {trust.is_resampled for trust in trusts}
    rows = " and, for tables of factors, bootstrap samples of the rows" if True in resampled else ""
    notes = [
        f"interval: {count} replicates of protocol {protocol} with other seeds of the metrics' random draws{rows}. "
        "Noise of training is not included: compare several training seeds.",
        "random codes: standard normal, as many as units. PCA of the latents: as many principal components as units. "
        "Columns to the right of it: the same units, changed.",
    ]
    notes += [
        f"{ALL_METRICS[trust.name].heading} of {trust.label} ({trust.figure:.3f}) is not better than that of random "
        f"codes ({trust.variants[RANDOM]:.3f}), within the noise."
        for trust in trusts
        if trust.is_chance
    ]
    pairs = [*_experiment_notes(trusts), *_run_notes(trusts)]
    notes += pairs[:MOST_PAIRS]
    notes += [f"{len(pairs) - MOST_PAIRS} more pairs differ by less than the noise"] if len(pairs) > MOST_PAIRS else []
    if not pairs and len({trust.label for trust in trusts}) > 1:
        notes.append("All pairs of runs differ by more than the noise.")
    return notes


def _less_than_noise(name: str, first: tuple[str, float], second: tuple[str, float], bounds: Sequence[float]) -> str:
    """Return the sentence about two (label, figure) that differ by less than the noise."""
    figures = f"{first[0]} ({first[1]:.3f}) and {second[0]} ({second[1]:.3f})"
    difference = f"{SHARE:.0%} interval of the difference: {_range(bounds)}"
    return f"{ALL_METRICS[name].heading}: {figures} differ by less than the noise ({difference})"


def _run_notes(trusts: Sequence[Trust]) -> list[str]:
    """Return notes on pairs of runs of the same data set; one note for all of them if no pair differs."""
    groups: dict[tuple[str, str | None], list[Trust]] = {}
    for trust in trusts:
        groups.setdefault((trust.name, trust.row.dataset), []).append(trust)
    notes = []
    for (name, dataset), group in groups.items():
        found = []
        for one, other in itertools.combinations(group, 2):
            bounds = one.difference(other)
            if bounds is not None and bounds[0] <= 0 <= bounds[1]:
                found.append(_less_than_noise(name, (one.label, one.figure), (other.label, other.figure), bounds))
        if len(found) == len(group) * (len(group) - 1) / 2 > 1:
            on = f" of {dataset}" if dataset else ""
            found = [f"{ALL_METRICS[name].heading}: all {len(group)} runs{on} differ by less than the noise"]
        notes += found
    return notes


def _experiment_notes(trusts: Sequence[Trust]) -> list[str]:
    """Return notes on experiments with several runs: Welch's interval of the difference of their means."""
    experiments = by_experiment({trust.row.run_dir: trust.row for trust in trusts}.values())
    notes = []
    for (first, rows), (second, others) in itertools.combinations(experiments.items(), 2):
        for name in dict.fromkeys(trust.name for trust in trusts) if rows[0].dataset == others[0].dataset else ():
            values = [
                [trust.figure for trust in trusts if trust.name == name and trust.row in group]
                for group in (rows, others)
            ]
            if min(map(len, values)) < 2:
                continue
            bounds = difference_of_means(*values)
            if bounds[0] <= 0 <= bounds[1]:
                means = [
                    (f"mean of {len(found)} runs of {label}", float(np.mean(found)))
                    for label, found in zip((first, second), values)
                ]
                notes.append(_less_than_noise(name, *means, bounds))
    return notes
