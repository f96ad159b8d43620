"""Ground-truth factors of variation: row index <-> factor values, and the samplers the metrics draw from.

Rows of a factor data set stand in mixed-radix order: the first factor turns slowest. Sampling makes the very
calls to ``RandomState.randint`` that disentanglement_lib makes, in the same order, so that scores published
with that library can be repeated draw for draw.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ldm.util import ConfigError, did_you_mean


class Subspace(NamedTuple):
    """Chosen values of a factor space: all their combinations, and where these stand in the whole."""

    space: FactorSpace
    rows: np.ndarray  # (space.size,) int64, rising: row i of ``space`` is this row of the whole
    values: dict[str, list[int]]  # the chosen values of every factor, in the numbers of the whole


class FactorSpace:
    """All combinations of some discrete factors.

    Args:
        names: names of the ``A`` factors of the file, the slowest-turning first.
        sizes: number of values of each of them.
        latent: positions of the ``F`` factors that are to be recovered; None means all. The others (the instance
            of SmallNORB) are drawn at random whenever a row is needed.

    Example:
        >>> space = FactorSpace(("hue", "shape"), (10, 4))
        >>> space.index_of(np.array([[2, 3]]))
        array([11])
        >>> space.factors_of(np.array([11]))
        array([[2, 3]])
    """

    def __init__(self, names: Sequence[str], sizes: Sequence[int], latent: Sequence[int] | None = None) -> None:
        if len(names) != len(sizes) or not names:
            raise ConfigError(f"FactorSpace: {len(names)} names but {len(sizes)} sizes; give one size per factor")
        if any(int(size) < 1 for size in sizes):
            raise ConfigError(f"FactorSpace: every size must be at least 1, found {tuple(sizes)}")
        self.all_names = tuple(names)
        self.all_sizes = tuple(int(size) for size in sizes)
        self.latent = tuple(range(len(names))) if latent is None else tuple(latent)
        self._bases = np.cumprod((1, *self.all_sizes[:0:-1]), dtype=np.int64)[::-1]
        self._observation = tuple(i for i in range(len(names)) if i not in self.latent)

    @property
    def factor_names(self) -> tuple[str, ...]:
        """Names of the F latent factors."""
        return tuple(self.all_names[i] for i in self.latent)

    @property
    def factors_num_values(self) -> tuple[int, ...]:
        """Number of values of each latent factor."""
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
        """``factors_num_values`` if looking up a row draws nothing, so that draws can be made in bulk; else None."""
        draws = any(self.all_sizes[i] > 1 for i in self._observation)  # one value takes no draw
        return None if draws else self.factors_num_values

    def index_of(self, factors: np.ndarray) -> np.ndarray:
        """Row of each factor combination.

        Args:
            factors: (n, A) int; A = F unless the space has factors that are not latent.

        Returns:
            (n,) int64 in [0, size).

        Raises:
            ValueError: wrong number of columns, or a value outside its factor.
        """
        factors = np.asarray(factors)
        if factors.ndim != 2 or factors.shape[1] != len(self.all_sizes):
            raise ValueError(
                f"index_of: expected factors of shape (n, {len(self.all_sizes)}) for "
                f"{self.all_names}, found {factors.shape}"
            )
        bad = (factors < 0) | (factors >= np.asarray(self.all_sizes))
        if bad.any():
            row, column = np.argwhere(bad)[0]
            raise ValueError(
                f"index_of: {self.all_names[column]} = {factors[row, column]} in row {row}, "
                f"expected 0 to {self.all_sizes[column] - 1}"
            )
        return factors.astype(np.int64) @ self._bases

    def factors_of(self, index: np.ndarray) -> np.ndarray:
        """Latent factor values of each row.

        Args:
            index: (n,) int in [0, size).

        Returns:
            (n, F) int64.

        Raises:
            ValueError: a row outside the space.
        """
        index = np.asarray(index, dtype=np.int64)
        if index.size and (index.min() < 0 or index.max() >= self.size):
            raise ValueError(f"factors_of: rows must lie in 0 to {self.size - 1}, found {index.min()} to {index.max()}")
        values = index[:, None] // self._bases % np.asarray(self.all_sizes)
        return values[:, list(self.latent)]

    def sample_factors(self, num: int, random_state: np.random.RandomState) -> np.ndarray:
        """Draw ``num`` combinations of the latent factors, factor after factor: (num, F) int64."""
        columns = [random_state.randint(self.all_sizes[i], size=num) for i in self.latent]
        return np.stack(columns, axis=1).astype(np.int64)

    def sample_observations_from_factors(self, factors: np.ndarray, random_state: np.random.RandomState) -> np.ndarray:
        """Rows (n,) int64 showing the latent ``factors`` (n, F); factors that are not latent are drawn now."""
        values = np.zeros((len(factors), len(self.all_sizes)), dtype=np.int64)
        values[:, list(self.latent)] = factors
        for i in self._observation:
            values[:, i] = random_state.randint(self.all_sizes[i], size=len(factors))
        return self.index_of(values)

    def sample(self, num: int, random_state: np.random.RandomState) -> tuple[np.ndarray, np.ndarray]:
        """Draw latent factors (num, F) and rows (num,) that show them."""
        factors = self.sample_factors(num, random_state)
        return factors, self.sample_observations_from_factors(factors, random_state)

    def sample_observations(self, num: int, random_state: np.random.RandomState) -> np.ndarray:
        """Draw rows (num,) alone."""
        return self.sample(num, random_state)[1]

    def restrict(
        self, keep: Mapping[str, int | Sequence[int]], available: Mapping[str, Sequence[int]] | None = None
    ) -> Subspace:
        """A smaller space of some values of each factor; still a full product, so that metrics can draw from it.

        A factor with one value left is no longer among those to be recovered.

        Args:
            keep: factor name -> how many of its values to keep, evenly spread (number i of n is the value at
                i * size // n), or which values. Factors that are not named keep all.
            available: factor name -> the values there are, where not all are.

        Raises:
            ConfigError: an unknown factor, a number or a value that it does not have, or nothing left to vary.

        Example:
            >>> part = FactorSpace(("hue", "shape"), (10, 4)).restrict({"hue": 2, "shape": [0, 3]})
            >>> part.space, part.rows
            (FactorSpace(hue=2, shape=2), array([ 0,  3, 20, 23]))
        """
        if not isinstance(keep, Mapping):
            raise ConfigError(f"keep: expected a mapping such as {{{self.all_names[0]}: 2}}, found {keep!r}")
        for name in keep:
            if name not in self.all_names:
                raise ConfigError(
                    f"keep: there is no factor {name!r}.{did_you_mean(name, self.all_names)} "
                    f"Known: {', '.join(self.all_names)}"
                )
        values, rows = {}, np.zeros(1, dtype=np.int64)
        for name, size, base in zip(self.all_names, self.all_sizes, self._bases.tolist()):
            there = sorted((available or {}).get(name, range(size)))
            values[name] = _chosen(name, there, keep.get(name, len(there)))
            rows = (rows[:, None] + np.asarray(values[name], dtype=np.int64) * base).ravel()
        sizes = [len(chosen) for chosen in values.values()]
        latent = [k for k in self.latent if sizes[k] > 1 or sizes[k] == self.all_sizes[k]]
        if not latent:
            raise ConfigError("keep: no factor has two values left; metrics need some variation to recover")
        return Subspace(FactorSpace(self.all_names, sizes, latent), rows, values)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, ready for JSON."""
        return {"names": list(self.all_names), "sizes": list(self.all_sizes), "latent": list(self.latent)}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> FactorSpace:
        """The inverse of ``to_dict``.

        Raises:
            ConfigError: a key is missing or the lists do not fit each other.
        """
        missing = [key for key in ("names", "sizes", "latent") if key not in state]
        if missing:
            raise ConfigError(f"factor space: {', '.join(missing)} missing; found the keys {sorted(state)}")
        return cls(state["names"], state["sizes"], state["latent"])

    def __repr__(self) -> str:
        pairs = ", ".join(f"{name}={size}" for name, size in zip(self.all_names, self.all_sizes))
        return f"FactorSpace({pairs})"


def _chosen(name: str, available: Sequence[int], kept: int | Sequence[int]) -> list[int]:
    """The values of one factor that ``keep`` asks for, rising."""
    if isinstance(kept, int) and not isinstance(kept, bool):
        if not 1 <= kept <= len(available):
            raise ConfigError(f"keep: {name} has {len(available)} values, cannot keep {kept}")
        return [available[i * len(available) // kept] for i in range(kept)]
    if isinstance(kept, (str, bytes)) or not isinstance(kept, Sequence) or not kept:
        raise ConfigError(f"keep: {name}: expected how many values to keep, or a list of values; found {kept!r}")
    wrong = [value for value in kept if value not in available]
    if wrong or len(set(kept)) != len(kept):
        raise ConfigError(f"keep: {name}: {wrong or list(kept)} must be different values of {list(available)}")
    return sorted(kept)


_MPI3D = (
    "object_color",
    "object_shape",
    "object_size",
    "camera_height",
    "background_color",
    "horizontal_axis",
    "vertical_axis",
)

_SPACES: dict[str, FactorSpace] = {
    "shapes3d": FactorSpace(
        ("floor_hue", "wall_hue", "object_hue", "scale", "shape", "orientation"), (10, 10, 10, 8, 4, 15)
    ),
    "mpi3d": FactorSpace(_MPI3D, (6, 6, 2, 3, 3, 40, 40)),
    "mpi3d_complex": FactorSpace(_MPI3D, (4, 4, 2, 3, 3, 40, 40)),
    "cars3d": FactorSpace(("elevation", "azimuth", "object"), (4, 24, 183)),
    "dsprites": FactorSpace(
        ("color", "shape", "scale", "orientation", "x_position", "y_position"),
        (1, 3, 6, 40, 32, 32),
        latent=(1, 2, 3, 4, 5),
    ),
    "smallnorb": FactorSpace(
        ("category", "instance", "elevation", "azimuth", "lighting"), (5, 10, 9, 18, 6), latent=(0, 2, 3, 4)
    ),
}


def factor_space(name: str) -> FactorSpace:
    """The factor space of a well-known data set.

    Args:
        name: "shapes3d" (also that of the embedded world), "mpi3d" (toy, realistic, real), "mpi3d_complex",
            "cars3d", "dsprites" or "smallnorb" (its rows sorted by factor).

    Raises:
        ConfigError: unknown name; the message lists the known ones and the nearest.
    """
    if name in _SPACES:
        return _SPACES[name]
    hint = did_you_mean(str(name).lower(), _SPACES)
    raise ConfigError(f"unknown factor space {name!r}; known: {', '.join(_SPACES)}.{hint}")
