"""Spaces of ground-truth factors: row index <-> factor values, and the sampling that metrics use.

Rows of a factor data set are in mixed-radix order: the first factor varies slowest. Sampling makes the same draws as
disentanglement_lib, so that scores published with that library can be reproduced.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ldm.data.options import require_choice
from ldm.util import ConfigError

logger = logging.getLogger(__name__)


class Subspace(NamedTuple):
    """Part of a factor space: all combinations of some values of each factor."""

    space: FactorSpace
    rows: np.ndarray  # (space.size,) int64, ascending: row i of ``space`` is row rows[i] of the whole
    values: dict[str, list[int]]  # the kept values of every factor, numbered as in the whole


class FactorSpace:
    """All combinations of some discrete factors.

    Args:
        names: names of the A factors of the file, the slowest-varying first.
        sizes: number of values of each factor.
        latent: positions of the F factors that metrics try to recover; None means all. The others (the instance of
            SmallNORB) are drawn at random whenever a row is needed.
        name: name of the data set in tables of scores; "" if it has none.

    Raises:
        ConfigError: the lengths differ, or a size is below 1.

    Example:
        >>> space = FactorSpace(("hue", "shape"), (10, 4))
        >>> space.index_of(np.array([[2, 3]]))
        array([11])
        >>> space.factors_of(np.array([11]))
        array([[2, 3]])
    """

    def __init__(
        self, names: Sequence[str], sizes: Sequence[int], latent: Sequence[int] | None = None, name: str = ""
    ) -> None:
        if len(names) != len(sizes) or not names:
            raise ConfigError(f"FactorSpace: expected one size per factor, got {len(names)} names, {len(sizes)} sizes.")
        if any(int(size) < 1 for size in sizes):
            raise ConfigError(f"FactorSpace: every size must be at least 1, got {tuple(sizes)}.")
        self.name = name
        self.all_names = tuple(names)
        self.all_sizes = tuple(int(size) for size in sizes)
        self.latent = tuple(range(len(names))) if latent is None else tuple(latent)
        self._observation = tuple(i for i in range(len(names)) if i not in self.latent)

    @property
    def factor_names(self) -> tuple[str, ...]:
        """Names of the F latent factors."""
        return tuple(self.all_names[i] for i in self.latent)

    @property
    def factors_num_values(self) -> tuple[int, ...]:
        """Number of values of each of the F latent factors."""
        return tuple(self.all_sizes[i] for i in self.latent)

    @property
    def num_factors(self) -> int:
        """F, the number of latent factors."""
        return len(self.latent)

    @property
    def size(self) -> int:
        """Number of rows: the product of all sizes."""
        return int(np.prod(self.all_sizes, dtype=np.int64))

    @property
    def product_sizes(self) -> tuple[int, ...] | None:
        """``factors_num_values`` if rows follow from the latent factors without a draw; else None."""
        draws = any(self.all_sizes[i] > 1 for i in self._observation)  # a single value needs no draw
        return None if draws else self.factors_num_values

    def index_of(self, factors: np.ndarray) -> np.ndarray:
        """Return the row of each factor combination.

        Args:
            factors: (n, A) int; A = F unless the space has factors that are not latent.

        Returns:
            (n,) int64 in [0, size).

        Raises:
            ValueError: the number of columns is wrong, or a value is out of range.
        """
        factors = np.asarray(factors)
        if factors.ndim != 2 or factors.shape[1] != len(self.all_sizes):
            raise ValueError(
                f"index_of: expected factors of shape (n, {len(self.all_sizes)}) for {self.all_names}, "
                f"got {factors.shape}."
            )
        bad = (factors < 0) | (factors >= np.asarray(self.all_sizes))
        if bad.any():
            row, column = np.argwhere(bad)[0]
            raise ValueError(
                f"index_of: expected {self.all_names[column]} in 0 to {self.all_sizes[column] - 1}, "
                f"got {factors[row, column]} in row {row}."
            )
        return np.ravel_multi_index(tuple(factors.T.astype(np.int64)), self.all_sizes)

    def factors_of(self, index: np.ndarray) -> np.ndarray:
        """Return the latent factor values of each row.

        Args:
            index: (n,) int in [0, size).

        Returns:
            (n, F) int64.

        Raises:
            ValueError: a row is out of range.
        """
        index = np.asarray(index, dtype=np.int64)
        if index.size and (index.min() < 0 or index.max() >= self.size):
            raise ValueError(f"factors_of: expected rows in 0 to {self.size - 1}, got {index.min()} to {index.max()}.")
        values = np.unravel_index(index, self.all_sizes)
        return np.stack([values[k] for k in self.latent], axis=1)

    def sample_factors(self, num: int, random_state: np.random.RandomState) -> np.ndarray:
        """Draw ``num`` combinations of the latent factors, factor by factor: (num, F) int64."""
        columns = [random_state.randint(self.all_sizes[i], size=num) for i in self.latent]
        return np.stack(columns, axis=1).astype(np.int64)

    def sample_observations_from_factors(self, factors: np.ndarray, random_state: np.random.RandomState) -> np.ndarray:
        """Return rows (n,) int64 with the latent ``factors`` (n, F); draw the factors that are not latent."""
        values = np.zeros((len(factors), len(self.all_sizes)), dtype=np.int64)
        values[:, list(self.latent)] = factors
        for i in self._observation:
            values[:, i] = random_state.randint(self.all_sizes[i], size=len(factors))
        return self.index_of(values)

    def sample(self, num: int, random_state: np.random.RandomState) -> tuple[np.ndarray, np.ndarray]:
        """Draw latent factors (num, F) and rows (num,) with these factors."""
        factors = self.sample_factors(num, random_state)
        return factors, self.sample_observations_from_factors(factors, random_state)

    def named(self, name: str) -> FactorSpace:
        """Return a copy with another name."""
        return FactorSpace(self.all_names, self.all_sizes, self.latent, name)

    def restrict(
        self, keep: Mapping[str, int | Sequence[int]], available: Mapping[str, Sequence[int]] | None = None
    ) -> Subspace:
        """Return the space of some values of each factor, a full product that metrics can draw from.

        A factor with one value left is not latent any more. A named space that loses values is named ``<name>_part``,
        because its scores are not comparable with those of the whole.

        Args:
            keep: factor name -> number of values to keep, evenly spread (value i of n is value i * size // n of the
                whole), or list of values. Other factors keep all values.
            available: factor name -> values in the files, where these do not contain all.

        Raises:
            ConfigError: a factor or value is unknown, or no factor has two values left.

        Example:
            >>> part = FactorSpace(("hue", "shape"), (10, 4)).restrict({"hue": 2, "shape": [0, 3]})
            >>> part.space, part.rows
            (FactorSpace(hue=2, shape=2), array([ 0,  3, 20, 23]))
        """
        if not isinstance(keep, Mapping):
            raise ConfigError(f"keep: expected a mapping such as {{{self.all_names[0]}: 2}}, got {keep!r}.")
        for name in keep:
            require_choice("keep", name, self.all_names)
        values = {}
        for name, size in zip(self.all_names, self.all_sizes):
            known = sorted((available or {}).get(name, range(size)))
            values[name] = _chosen(name, known, keep.get(name, len(known)))
        rows = np.ravel_multi_index(np.ix_(*values.values()), self.all_sizes).ravel()
        sizes = [len(chosen) for chosen in values.values()]
        latent = [k for k in self.latent if sizes[k] > 1 or sizes[k] == self.all_sizes[k]]
        if not latent:
            raise ConfigError("keep: expected a factor with at least two values left, got none. Keep more values.")
        name = f"{self.name}_part" if self.name and len(rows) < self.size else self.name
        return Subspace(FactorSpace(self.all_names, sizes, latent, name), rows, values)

    def without_constant(self) -> FactorSpace:
        """Return the space without latent factors of a single value, with a warning; they would lower FactorVAE."""
        latent = tuple(k for k in self.latent if self.all_sizes[k] > 1)
        if latent in ((), self.latent):
            return self
        constant = [self.all_names[k] for k in self.latent if k not in latent]
        logger.warning("factors: %s left out, with a single value in all images", ", ".join(constant))
        return FactorSpace(self.all_names, self.all_sizes, latent, self.name)

    def to_dict(self) -> dict[str, Any]:
        """Return name and factors in plain types, ready for JSON."""
        parts = {"names": self.all_names, "sizes": self.all_sizes, "latent": self.latent}
        return {"name": self.name, **{key: list(values) for key, values in parts.items()}}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> FactorSpace:
        """Return the space of a dict written by ``to_dict``; "name" is optional."""
        missing = [key for key in ("names", "sizes", "latent") if key not in state]
        if missing:
            raise ConfigError(f"factor space: {', '.join(missing)} missing, got only the keys {sorted(state)}.")
        return cls(state["names"], state["sizes"], state["latent"], state.get("name", ""))

    def __repr__(self) -> str:
        pairs = ", ".join(f"{name}={size}" for name, size in zip(self.all_names, self.all_sizes))
        return f"FactorSpace({pairs})"


def _chosen(name: str, available: Sequence[int], kept: int | Sequence[int]) -> list[int]:
    """Return the values of one factor that ``keep`` selects, in ascending order."""
    if isinstance(kept, int) and not isinstance(kept, bool):
        if not 1 <= kept <= len(available):
            raise ConfigError(f"keep.{name}: expected 1 to {len(available)} values, got {kept}.")
        return [available[i * len(available) // kept] for i in range(kept)]
    if isinstance(kept, (str, bytes)) or not isinstance(kept, Sequence) or not kept:
        raise ConfigError(f"keep.{name}: expected a number of values, or a list of values; got {kept!r}.")
    if len(set(kept)) != len(kept) or not set(kept) <= set(available):
        raise ConfigError(f"keep.{name}: expected different values of {list(available)}, got {list(kept)}.")
    return sorted(kept)


_MPI3D = "object_color object_shape object_size camera_height background_color horizontal_axis vertical_axis"
# name -> factor names, sizes, latent factors (None: all)
_PUBLISHED: dict[str, tuple[str, tuple[int, ...], tuple[int, ...] | None]] = {
    "shapes3d": ("floor_hue wall_hue object_hue scale shape orientation", (10, 10, 10, 8, 4, 15), None),
    "mpi3d": (_MPI3D, (6, 6, 2, 3, 3, 40, 40), None),
    "mpi3d_complex": (_MPI3D, (4, 4, 2, 3, 3, 40, 40), None),
    "cars3d": ("elevation azimuth object", (4, 24, 183), None),
    "dsprites": ("color shape scale orientation x_position y_position", (1, 3, 6, 40, 32, 32), (1, 2, 3, 4, 5)),
    "smallnorb": ("category instance elevation azimuth lighting", (5, 10, 9, 18, 6), (0, 2, 3, 4)),
}
_SPACES = {name: FactorSpace(names.split(), *rest, name) for name, (names, *rest) in _PUBLISHED.items()}


def factor_space(name: str) -> FactorSpace:
    """Return the factor space of a published data set.

    Args:
        name: "shapes3d" (also that of the embedded world), "mpi3d" (toy, realistic, real), "mpi3d_complex",
            "cars3d", "dsprites" or "smallnorb" (rows sorted by factor); a ``ConfigError`` lists these.
    """
    require_choice("space", name, _SPACES)
    return _SPACES[name]
