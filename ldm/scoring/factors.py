"""Factors of the data set behind a representation: from its file, the run's config, the command line, or a table."""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ldm.data.factors import FactorSpace, factor_space
from ldm.legacy import translate
from ldm.metrics import FactorTable
from ldm.metrics.common import FactorSampler, MetricError
from ldm.metrics.sampling.continuous import MOST_BINS, discretize
from ldm.scoring.arrays import array_source, incomplete_if_unreadable, open_array
from ldm.scoring.files import LatentFile, checksum
from ldm.scoring.tables import open_table
from ldm.util import ConfigError, UserError, did_you_mean

logger = logging.getLogger(__name__)

WORLD = "world3d"  # twin of Shapes3D: the same factors but other images, so scores are not comparable
SUBSET = "_part"  # suffix of a data set restricted to some values of its factors
SAME_ROWS, DISJOINT_ROWS = "the same images (published protocol)", "disjoint halves of the rows"
TABLES = (".csv", ".tsv", ".parquet")
_TABLE_NAMES = ("factors", "labels", "factor_values", "latents_classes")  # accepted names of a table in a file
_FACTOR_SETS, _WORLD_SETS = "ldm.data.factors.", "ldm.data.world."
_NO_VARIANT = ("path", "test", "split", "text", "phrasing", "repeat", "do_augment", "seed")  # do not change the images

Bins = tuple[str, int | list[float]]  # way of ``discretize``, and number of bins or inner edges


@dataclass(frozen=True)
class Factors:
    """Factors of a data set, in a form that is cheap to send to workers: a factor space, or a stored table."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]  # number of values of each factor
    space: FactorSpace | None = None  # all combinations, row i being combination i
    table: Path | None = None  # file of ``FactorTable.save``, written by this command
    digest: str | None = None  # checksum of the table's file, and how it was read
    details: dict[str, Any] = field(default_factory=dict)  # for the record: bins, rows that were left out
    rows: str = SAME_ROWS  # where training and test codes come from

    @classmethod
    def of_space(cls, space: FactorSpace) -> Factors:
        """Return all combinations of a space, without its constant factors."""
        space = space.without_constant()
        return cls(space.factor_names, space.factors_num_values, space)

    def describe(self, name: str | None, variant: Mapping[str, Any]) -> dict[str, Any]:
        """Return the description of a data set with these factors, as it is stored beside scores."""
        about = {"name": name, "variant": dict(variant), "factors": dict(zip(self.names, self.sizes))}
        return {**about, **self.details, "training_and_test_codes": self.rows}

    def sampler(self) -> FactorSampler:
        """Return the sampler that metrics draw from; a table is read once per process."""
        return self.space if self.space is not None else _table_sampler(self.table)


@functools.lru_cache(maxsize=2)
def _table_sampler(path: Path) -> FactorSampler:
    return FactorTable.load(path)


def factors_from_table(
    path: Path, shape: tuple[int, ...], target: Path, missing: str = "error", bins: Mapping[str, Bins] | None = None
) -> Factors:
    """Read a table of factors, one row per image, and store it for the workers.

    Args:
        path: ``.npy``, ``.npz``, ``.h5``, ``.csv`` or ``.parquet``: (N, F) numbers or words.
        shape: shape of the latents, (N, ...).
        target: ``.npz`` file to write.
        missing: "error", or "drop" to leave out rows without a value of a factor.
        bins: arguments of ``discretize`` for factors that are continuous, by name.

    Raises:
        UserError: the number of rows differs, a column is not a discrete factor, or ``bins`` names no column.
    """
    with incomplete_if_unreadable(path):
        content = checksum(path)  # before the file is read: a change meanwhile is noticed
    columns = _read_columns(path, target.parent, shape[0])
    num_rows, bins = len(next(iter(columns.values()))), bins or {}
    if num_rows != shape[0]:
        is_turned = len(columns) == shape[0] or num_rows in shape[1:]
        hint = ". One of the files seems to have the images in its columns: transpose it" if is_turned else ""
        raise UserError(
            f"{path}: expected {shape[0]} rows, one per image and in the order of the latents, got {num_rows}{hint}"
        )
    described = {}
    try:
        for name, choice in bins.items():
            if name not in columns:
                raise UserError(
                    f"--bins: expected a column of {path} ({', '.join(columns)}), got {name!r}."
                    f"{did_you_mean(name, columns)}"
                )
            columns[name], described[name] = _binned(name, columns[name], choice)
        table = FactorTable(columns, missing=missing)
    except MetricError as error:
        raise UserError(f"{path}: {error}") from error
    for name, size in zip(table.factor_names, table.factors_num_values):
        if size > MOST_BINS:
            raise UserError(
                f"{path}: expected a discrete factor with at most {MOST_BINS} values, but {name} has {size} values "
                f"in {num_rows} rows. Divide it into bins (--bins {name}=10), or remove the column."
            )
    details: dict[str, Any] = {"bins": described} if described else {}
    if table.num_left_out:
        logger.warning("%s: %d of %d rows left out, without a value of a factor", path, table.num_left_out, num_rows)
        details["rows_left_out"] = table.num_left_out
    rows = DISJOINT_ROWS if table.product_sizes is None else SAME_ROWS
    table.save(target)
    digest = hashlib.blake2b(f"{content} {missing} {sorted(bins.items())}".encode()).hexdigest()
    return Factors(table.factor_names, table.factors_num_values, None, target, digest, details, rows)


def _binned(name: str, column: np.ndarray, choice: Bins) -> tuple[np.ndarray, str]:
    """Return the bin of each value (values that are not finite remain), and the name of the discretization."""
    if column.dtype.kind not in "fiu":
        raise MetricError(f"--bins {name}: expected a column of numbers, got values of type {column.dtype}.")
    known = np.isfinite(column)
    binned = np.where(known, 0.0, column)  # FactorTable reports infinite and missing values with their rows
    try:
        binned[known], described = discretize(column[known], *choice)
    except MetricError as error:
        raise MetricError(f"--bins {name}: {error}") from error
    return binned, described


def parse_bins(choices: Sequence[str]) -> dict[str, Bins]:
    """Parse ``NAME=10``, ``NAME=equal_frequency:10`` and ``NAME=0,0.5,1`` (inner edges of the bins).

    Raises:
        UserError: a choice has another form.
    """
    found: dict[str, Bins] = {}
    for number, choice in enumerate(choices, 1):
        name, equals, text = choice.rpartition("=")
        how, _, numbers = text.rpartition(":")
        how = how or ("edges" if "," in numbers else "equal_width")
        try:
            found[name] = how, [float(edge) for edge in numbers.split(",")] if how == "edges" else int(numbers)
        except ValueError:
            equals = ""
        if not equals or not name or len(found) < number:
            raise UserError(
                "--bins: expected NAME=10, NAME=equal_frequency:10 or NAME=0,0.5,1 (edges), once for each name; got "
                f"{choice!r}."
            )
    return found


def _read_columns(path: Path, folder: Path, num_images: int) -> dict[str, np.ndarray]:
    with incomplete_if_unreadable(path):
        if path.suffix.lower() in TABLES:
            return open_table(path, "factor", num_images).values()
        rows = open_array(array_source(path, _TABLE_NAMES, "fiubUSMm"), folder / "table")
    if rows.ndim != 2 or 0 in rows.shape:
        raise UserError(f"{path}: expected an array of shape (images, factors), got {rows.shape}")
    return {f"factor {number}": column for number, column in enumerate(rows.T)}


def space_of(latents: LatentFile, named: str | None = None) -> FactorSpace:
    """Return the factor space of a representation file, checked against its number of images.

    The space stored in the file is used if there is one; otherwise ``named``; otherwise the data set in the run's
    config; otherwise the factor sizes stored in the file.

    Args:
        latents: header of the file.
        named: name of a published factor space (``-d``).

    Raises:
        UserError: no source gives a space, sources disagree, or the number of images differs.
        ConfigError: ``named`` is unknown.
    """
    configured = _space_of_target(_configured_dataset(latents.run_dir)[0])
    if named and configured and named != configured:
        raise UserError(
            f"{latents.path}: expected the data set of the run's config, {configured}, got -d {named}. Remove -d, or "
            "score the runs of each data set separately."
        )
    if latents.space is not None:
        space = latents.space
        if named and factor_space(named).all_names != space.all_names:
            raise UserError(
                f"{latents.path}: the file has the factors {', '.join(space.all_names)}, but -d {named} has the "
                f"factors {', '.join(factor_space(named).all_names)}. Remove -d."
            )
    elif named or configured:
        space, source = factor_space(named or configured), "-d" if named else "the config of the run"
        if latents.factor_sizes not in (None, space.factors_num_values):
            raise UserError(
                f"{latents.path}: the file has factors of sizes {latents.factor_sizes}, but {source} is "
                f"{named or configured} with sizes {space.factors_num_values}. Encode the checkpoint again from the "
                f"right data set{', or remove -d' if named else ''}."
            )
    elif latents.factor_sizes is not None:
        names = latents.factor_names or tuple(f"factor {number}" for number in range(len(latents.factor_sizes)))
        try:
            space = FactorSpace(names, latents.factor_sizes)
        except ConfigError as error:
            raise UserError(f"{latents.path}: {error} Encode that checkpoint again.") from error
    else:
        raise UserError(
            f"{latents.path}: the factors of its images are not stored in the file, and the run has no config "
            "(configs/*-project.yaml) with a known data set. Name the data set with -d, for example -d shapes3d."
        )
    if latents.shape[0] != space.size:
        sizes = " x ".join(str(size) for size in space.all_sizes)
        raise UserError(
            f"{latents.path}: expected {space.size} images ({sizes}: {', '.join(space.all_names)}), got "
            f"{latents.shape[0]}. {_length_hint(latents.shape[0], space.size)}"
        )
    return space


def _length_hint(found: int, expected: int) -> str:
    if found > expected and found % expected == 0:
        return (
            f"Every image occurs {found // expected} times: encode the test set without repeats "
            "(data.params.test.params.test: true)."
        )
    return (
        "Encode the whole data set in order, each image once (no limit, split or shuffling in data.params.test). To "
        "use fewer images, keep some values of the factors: data.params.test.params.keep.shape=2."
    )


def _configured_dataset(run_dir: Path) -> tuple[str, Mapping[str, Any]]:
    """Return today's class path and the options of the data set in a run's newest config; empty if there is none.

    Raises:
        UserError: a config is not valid YAML.
    """
    for path in sorted((run_dir / "configs").glob("*-project.yaml"), reverse=True):
        try:
            node = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            message = " ".join(str(error).split())
            raise UserError(f"{path}: not a valid YAML file ({message}). Restore or delete it.") from error
        for key in ("data", "params"):
            node = node.get(key) if isinstance(node, dict) else None
        for split in ("test", "validation", "train") if isinstance(node, dict) else ():
            dataset = node.get(split)
            if isinstance(dataset, dict) and dataset.get("target"):
                options = dataset.get("params")
                return translate(str(dataset["target"]))[0], options if isinstance(options, dict) else {}
    return "", {}


def _space_of_target(target: str) -> str | None:
    """Return the name of the factor space of a data set's class, if it is one of the published sets."""
    if target.startswith(_WORLD_SETS):
        return "shapes3d"
    return target.removeprefix(_FACTOR_SETS).split(".")[0] if target.startswith(_FACTOR_SETS) else None


def describe_dataset(run_dir: Path, space: FactorSpace, named: str | None = None) -> dict[str, Any]:
    """Return the description of a data set that is stored beside scores.

    Args:
        run_dir: a run; its saved config names class and options.
        space: the factors.
        named: data set named by the user (``-d``).

    Returns:
        ``name`` ("shapes3d", "mpi3d_toy", "world3d", the name of a user's factor space, or None if it is
        unnamed), ``variant`` (options that change the images) and ``factors`` (name -> number of values).
    """
    target, options = _configured_dataset(run_dir)
    name = _space_of_target(target) or named or space.name or None
    if target.startswith(_WORLD_SETS):
        name = WORLD
    elif name == "mpi3d" and target:
        name = f"mpi3d_{options.get('variant', 'toy')}"  # the references have the toy set only
    if name and options.get("keep"):
        name += SUBSET
    variant = {key: value for key, value in options.items() if key not in _NO_VARIANT}
    return Factors.of_space(space).describe(name, variant)
