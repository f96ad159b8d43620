"""Score anyone's representation: an array of latents, and a data set's name or a table of factors."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm.data.factors import factor_space
from ldm.metrics import DEFAULT_PROTOCOL, PROTOCOL_SEED, Metric, MetricError, select_metrics
from ldm.metrics.representation import check_latents
from ldm.scoring.arrays import IncompleteFile
from ldm.scoring.factors import Factors, factors_from_table
from ldm.scoring.files import LatentFile, latent_shape, read_latent_file, write_json
from ldm.scoring.rows import Row
from ldm.scoring.run import FileTasks, ProgressListener, Report, failure_of, figures_of, run_tasks
from ldm.scoring.spaces import describe_dataset
from ldm.scoring.tasks import ScoreTask, Setting
from ldm.util import UserError

SEEDS_KEY, DEVIATION_KEY = "seeds", "deviation"  # beside the metrics' keys, where several seeds were asked for


def score_latents(
    latents: str | Path,
    dataset: str | None = None,
    factors: str | Path | None = None,
    out: str | Path | None = None,
    metrics: Mapping[str, Metric] | None = None,
    *,
    protocol: str = DEFAULT_PROTOCOL,
    seeds: Sequence[int] = (PROTOCOL_SEED,),
    num_workers: int = 1,
    scheduler: str | None = None,
    for_report: bool = False,
    on_progress: ProgressListener = lambda done, total: None,
) -> Report:
    """Score the latents of one file.

    Args:
        latents: ``.npz``, ``.npy``, ``.h5``, ``.parquet`` or ``.csv``: (N, K) codes, used as they are, or (N, U, D)
            vectors per unit, each reduced to its first principal component. Row i belongs to image i.
        dataset: name of a well-known factor space ("shapes3d", ...), whose images the rows are, in order.
        factors: a table (N, F) of each image's factors instead.
        out: the score file; None takes ``<latents>.scores.json``. What it holds is of this file alone: with one seed
            the metrics' dicts by their keys; with several their means, ``deviation`` and ``seeds``. Beside it,
            ``.record.json`` says protocol, data set and versions.
        metrics: what to score, by name; None takes the protocol's.
        protocol: name of the protocol the metrics' arguments come from.
        seeds: of every metric's random generator.
        num_workers: processes to keep busy.
        scheduler: address of a Dask scheduler, whose workers do the jobs instead.
        for_report: also compute what a report draws.
        on_progress: told the estimated seconds of work done and in all.

    Returns:
        What was written and what failed; a failing metric never stops the others.

    Raises:
        UserError: the file, or the factors, cannot be read or do not fit each other.
        ConfigError: unknown data set or protocol.

    Example:
        >>> score_latents("z.npy", "shapes3d", out="scores.json")  # doctest: +SKIP
    """
    source, target = Path(latents), score_file(latents, out)
    metrics = select_metrics(protocol) if metrics is None else metrics
    report = Report()
    try:
        head = _head(source)
    except IncompleteFile as err:
        report.failures.append(failure_of(source, err))
        return report
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".factors-", dir=target.parent) as scratch:
        drawn, about = _factors(head, dataset, factors, Path(scratch).resolve() / "factors.npy")
        tasks = [
            ScoreTask(head, drawn, about, Setting(metrics, protocol, seed, seed == seeds[0]), path, True, record)
            for seed, path, record in _files(target, seeds)
        ]
        run_tasks([FileTasks(head, tasks)], num_workers, report, scheduler, target.parent, on_progress)
    if len(seeds) > 1:
        _write_summary(target, {task.setting.seed: task.target for task in tasks})
        report.written = [target]
    return report


def score_file(latents: str | Path, out: str | Path | None) -> Path:
    """Where the scores of a file go."""
    source = Path(latents)
    return Path(out) if out else source.with_name(f"{source.stem}.scores.json")


def _files(target: Path, seeds: Sequence[int]) -> list[tuple[int, Path, Path]]:
    """Seed, score file and record of each task."""
    if len(seeds) == 1:
        return [(seeds[0], target, target.with_suffix(".record.json"))]
    folder = target.with_suffix(".seeds")
    return [(seed, folder / f"seed={seed}.json", folder / f"seed={seed}.record.json") for seed in seeds]


def record_of(target: Path, seeds: Sequence[int]) -> Path:
    """The record behind a score file, that of the first seed."""
    return _files(target, seeds)[0][2]


def _head(path: Path) -> LatentFile:
    """What the file says of itself; any array of numbers will do."""
    if path.suffix.lower() == ".npz":
        try:
            return read_latent_file(path)
        except IncompleteFile:
            raise
        except UserError:  # no file of a run
            pass
    return LatentFile(path, latent_shape(path), 0)


def _factors(
    head: LatentFile, dataset: str | None, factors: str | Path | None, target: Path
) -> tuple[Factors, dict[str, Any]]:
    """The factors of the images, and what is written about them.

    Raises:
        UserError: nothing says the factors, or they are those of another number of images.
    """
    if dataset is not None and factors is not None:
        raise UserError("give a data set (-d) or a table of factors (--factors), not both")
    if factors is not None:
        drawn = factors_from_table(Path(factors), head.shape[0], target)
        return drawn, _about(None, drawn, {"table": Path(factors).name})
    space = factor_space(dataset) if dataset is not None else head.space
    if space is None:
        raise UserError(
            f"{head.path} does not say which factors its rows show: name their data set (-d shapes3d, mpi3d, cars3d, "
            "dsprites, smallnorb), or give a table with one row of factors per image (--factors f.npy)"
        )
    try:
        check_latents(head.shape, space.size)
    except MetricError as err:
        raise UserError(f"{head.path}: {err}") from err
    drawn = Factors.of_space(space)
    return drawn, _about(dataset, drawn, {}) if dataset else describe_dataset(head.run_dir, space)


def _about(name: str | None, factors: Factors, variant: dict[str, str]) -> dict[str, Any]:
    return {"name": name, "variant": variant, "factors": dict(zip(factors.names, factors.sizes))}


def _write_summary(target: Path, files: Mapping[int, Path]) -> None:
    """Mean, deviation and all values over seeds, in one file."""
    found = {seed: json.loads(path.read_text(encoding="utf-8")) for seed, path in files.items() if path.is_file()}
    keys = dict.fromkeys(key for content in found.values() for key in content)
    means: dict[str, Any] = {}
    deviations: dict[str, Any] = {}
    for key in keys:
        results = [content[key] for content in found.values() if key in content]
        names = [name for name, value in results[0].items() if isinstance(value, (int, float))]
        means[key] = {name: statistics.fmean(result[name] for result in results) for name in names}
        if len(results) > 1:
            deviations[key] = {name: statistics.stdev(result[name] for result in results) for name in names}
    write_json(target, {**means, DEVIATION_KEY: deviations, SEEDS_KEY: {str(seed): found[seed] for seed in found}})


def single_row(latents: str | Path, target: Path, seeds: Sequence[int], dataset: str | None) -> list[Row]:
    """The file as a row of the table; nothing if it has no scores."""
    if not target.is_file():
        return []
    content = json.loads(target.read_text(encoding="utf-8"))
    by_seed = {int(seed): figures_of(found) for seed, found in content.get(SEEDS_KEY, {seeds[0]: content}).items()}
    deviations = figures_of(content.get(DEVIATION_KEY, {}))
    path = Path(latents)
    return [
        Row(path.stem, path.name, target.parent, None, 0, None, True, figures_of(content), deviations, by_seed, dataset)
    ]
