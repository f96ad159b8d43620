"""Factors of the data set behind a representation: from its file, the run's config, the command line, or a table."""

from __future__ import annotations

import csv
import functools
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ldm.data.factors import FactorSpace, factor_space
from ldm.legacy import translate
from ldm.metrics import FactorTable
from ldm.metrics.common import FactorSampler, MetricError
from ldm.scoring.arrays import array_source, incomplete_if_unreadable, is_number, open_array, parquet_file
from ldm.scoring.files import LatentFile
from ldm.util import ConfigError, UserError

WORLD = "world3d"  # twin of Shapes3D: the same factors but other images, so scores are not comparable
SUBSET = "_part"  # suffix of a data set restricted to some values of its factors
MAX_VALUES = 1000  # distinct values of a factor; columns with more are continuous quantities
_TABLE_NAMES = ("factors", "labels", "factor_values", "latents_classes")  # accepted names of a table in a file
_FACTOR_SETS, _WORLD_SETS = "ldm.data.factors.", "ldm.data.world."
_NO_VARIANT = ("path", "test", "split", "text", "phrasing", "repeat", "do_augment", "seed")  # do not change the images


@dataclass(frozen=True)
class Factors:
    """Factors of a data set, in a form that is cheap to send to workers: a factor space, or a stored table."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]  # number of values of each factor
    space: FactorSpace | None = None  # all combinations, row i being combination i
    table: Path | None = None  # .npy file of codes (N, F), row i being image i
    digest: int | None = None  # checksum of the table

    @classmethod
    def of_space(cls, space: FactorSpace) -> Factors:
        """Return all combinations of a space, without its constant factors."""
        space = space.without_constant()
        return cls(space.factor_names, space.factors_num_values, space)

    def describe(self, name: str | None, variant: Mapping[str, Any]) -> dict[str, Any]:
        """Return the description of a data set with these factors, as it is stored beside scores."""
        return {"name": name, "variant": dict(variant), "factors": dict(zip(self.names, self.sizes))}

    def sampler(self) -> FactorSampler:
        """Return the sampler that metrics draw from; a table is read once per process."""
        return self.space if self.space is not None else _table_sampler(self.table, self.names)


@functools.lru_cache(maxsize=2)
def _table_sampler(path: Path, names: tuple[str, ...]) -> FactorSampler:
    return FactorTable(np.load(path), names)


def factors_from_table(path: Path, num_images: int, target: Path) -> Factors:
    """Read a table of factors, one row per image, and store it as codes for the workers.

    Args:
        path: ``.npy``, ``.npz``, ``.h5``, ``.csv`` or ``.parquet``: (N, F) numbers, or words in tables.
        num_images: N of the latents.
        target: ``.npy`` file to write.

    Raises:
        UserError: the number of rows differs, or a column is not a discrete factor.
    """
    columns = _read_columns(path, target.parent)
    numbers = [
        values if values.dtype.kind in "fiub" else np.unique(values, return_inverse=True)[1].reshape(-1)
        for values in columns.values()
    ]
    codes = np.stack(numbers, axis=1)
    if len(codes) != num_images:
        raise UserError(
            f"{path}: expected {num_images} rows, one per image and in the order of the latents, got {len(codes)}"
        )
    try:
        table = FactorTable(codes, tuple(columns))
    except MetricError as error:
        raise UserError(f"{path}: {error}") from error
    for name, size in zip(table.factor_names, table.factors_num_values):
        if size > MAX_VALUES:
            raise UserError(
                f"{path}: expected a discrete factor with at most {MAX_VALUES} values, but {name} has {size} values "
                f"in {num_images} rows. Divide it into bins, or remove the column."
            )
    np.save(target, codes)
    digest = zlib.crc32(np.ascontiguousarray(codes).data)
    return Factors(table.factor_names, table.factors_num_values, table=target, digest=digest)


def _read_columns(path: Path, folder: Path) -> dict[str, np.ndarray]:
    with incomplete_if_unreadable(path):
        if path.suffix.lower() == ".csv":
            return _csv_columns(path)
        if path.suffix.lower() == ".parquet":
            table = parquet_file(path).read()
            return {name: table[name].to_numpy() for name in table.column_names}
        rows = open_array(array_source(path, _TABLE_NAMES), folder / "table")
    if rows.ndim != 2 or 0 in rows.shape:
        raise UserError(f"{path}: expected an array of shape (images, factors), got {rows.shape}")
    return {f"factor {number}": column for number, column in enumerate(rows.T)}


def _csv_columns(path: Path) -> dict[str, np.ndarray]:
    """Read the columns of a CSV file; its first line is the header unless it consists of numbers."""
    with path.open(newline="", encoding="utf-8") as stream:
        lines = [line for line in csv.reader(stream) if line]
    widths = {len(line) for line in lines}
    if len(widths) > 1:
        raise UserError(
            f"{path}: expected lines with equal numbers of fields, got {min(widths)} to {max(widths)} fields. Complete "
            "lines that were cut off."
        )
    names: Sequence[str] = [word.strip() for word in lines[0]] if lines else []
    if all(map(is_number, names)):
        names = [f"factor {number}" for number in range(len(names))]
    else:
        lines = lines[1:]
    if not lines:
        raise UserError(f"{path}: expected one row of factors per image, got none. Write the file again.")
    if len(set(names)) < len(names):
        raise UserError(f"{path}: expected columns with different names, got {', '.join(names)}. Rename them.")
    columns = [np.array(column) for column in zip(*lines)]
    return {
        name: column.astype(np.float64) if all(map(is_number, np.unique(column))) else column
        for name, column in zip(names, columns)
    }


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
