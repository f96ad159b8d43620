"""Factor spaces: golden draws and rows, round trips, messages."""

from __future__ import annotations

import numpy as np
import pytest

from ldm.data.factors import FactorSpace, factor_space
from ldm.util import ConfigError


def test_draws_equal_the_published_library():
    """RandomState(0), three draws, as disentanglement_lib makes them for Shapes3D."""
    drawn = factor_space("shapes3d").sample_factors(3, np.random.RandomState(0))
    assert drawn.tolist() == [[5, 3, 3, 4, 0, 10], [0, 7, 5, 7, 0, 1], [3, 9, 2, 6, 0, 6]]


@pytest.mark.parametrize(
    "name, factors, row",
    [
        ("shapes3d", (1, 1, 1, 1, 1, 1), 48000 + 4800 + 480 + 60 + 15 + 1),
        ("cars3d", (1, 2, 3), 4761),
        ("cars3d", (3, 23, 182), 17567),
        ("mpi3d", (1, 1, 1, 1, 1, 1, 1), 172800 + 28800 + 14400 + 4800 + 1600 + 40 + 1),
    ],
)
def test_rows(name, factors, row):
    space = factor_space(name)
    assert space.index_of(np.array([factors])).tolist() == [row]
    assert space.factors_of(np.array([row])).tolist() == [list(factors)]


@pytest.mark.parametrize(
    "name, size, factors",
    [
        ("shapes3d", 480_000, 6),
        ("mpi3d", 1_036_800, 7),
        ("cars3d", 17_568, 3),
        ("dsprites", 737_280, 5),
        ("smallnorb", 48_600, 4),
    ],
)
def test_sizes_and_round_trip(name, size, factors):
    space = factor_space(name)
    assert space.size == size and space.num_factors == factors == len(space.factor_names)
    latent, rows = space.sample(200, np.random.RandomState(1))
    assert (space.factors_of(rows) == latent).all()
    assert rows.dtype == np.int64 and rows.max() < size
    again = space.sample(200, np.random.RandomState(1))[1]
    assert (again == rows).all()


def test_a_factor_that_is_not_latent_is_drawn_after_the_others():
    space = FactorSpace(("a", "instance", "b"), (3, 10, 4), latent=(0, 2))
    state = np.random.RandomState(4)
    a, b, instance = (state.randint(n, size=5) for n in (3, 4, 10))
    factors, rows = space.sample(5, np.random.RandomState(4))
    assert factors.tolist() == np.stack([a, b], 1).tolist()
    assert rows.tolist() == (a * 40 + instance * 4 + b).tolist()


def test_messages():
    with pytest.raises(ConfigError, match="Did you mean 'shapes3d'"):
        factor_space("shape3d")
    with pytest.raises(ValueError, match="expected wall_hue in 0 to 9, got 10 in row 0"):
        factor_space("shapes3d").index_of(np.array([[0, 10, 0, 0, 0, 0]]))
    with pytest.raises(ValueError, match="expected factors of shape"):
        factor_space("shapes3d").index_of(np.zeros((2, 5), int))
    with pytest.raises(ValueError, match="0 to 479999"):
        factor_space("shapes3d").factors_of(np.array([480_000]))
    with pytest.raises(ConfigError, match="one size per factor"):
        FactorSpace(("a",), (2, 3))
