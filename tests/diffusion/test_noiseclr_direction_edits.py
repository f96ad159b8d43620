"""Edits along directions: step windows, several edits, strengths by sample, negative conditions, shifts."""

import numpy as np
import pytest
import torch

from ldm.diffusion.conditions import TensorCondition
from ldm.diffusion.directions import Edit, edited_by_conditions, edited_by_shifts, step_weights, strengths_at
from ldm.util import ConfigError

T, B = 12, 2
TIMESTEPS = np.array([1, 4, 7, 10])


def predict(x, t, cond, shift):
    """Not linear in the condition (B, 3)."""
    moved = torch.tanh(cond.value)[..., None, None] * (1 + t.reshape(-1, 1, 1, 1) / T)
    return 0.5 * x + moved + (0 if shift is None else shift.reshape(-1, 3, 1, 1) ** 2)


def condition(seed):
    return TensorCondition(torch.randn(B, 3, generator=torch.Generator().manual_seed(seed)))


X = torch.randn(B, 3, 4, 4, generator=torch.Generator().manual_seed(9))
NULL, COND, NEGATIVE, FIRST, SECOND = (condition(seed) for seed in range(5))


def at(t, cond, shift=None):
    return predict(X, torch.full((B,), t), cond, shift)


def test_windows_of_steps():
    edits = [Edit(0, 2.0), Edit(1, -1.0, 0, 0), Edit(2, 3.0, 1, 2), Edit(3, 4.0, 3), Edit(4, 5.0, 2, 99)]
    visited = step_weights(edits, TIMESTEPS, T)[:, torch.from_numpy(TIMESTEPS)].flip(1)  # noisiest first
    expected = [[2, 2, 2, 2], [-1, 0, 0, 0], [0, 3, 3, 0], [0, 0, 0, 4], [0, 0, 5, 5]]
    assert visited.tolist() == expected
    between = step_weights(edits, TIMESTEPS, T)  # solvers visit other time steps too
    assert between[1].tolist() == [0.0] * 10 + [-1.0] * 2 and between[3].tolist() == [4.0] * 4 + [0.0] * 8
    assert step_weights([], TIMESTEPS, T).shape == (0, T)


@pytest.mark.parametrize(("strength", "start", "end"), [(1.0, -1, None), (1.0, 3, 2), (float("nan"), 0, None)])
def test_edits_that_make_no_sense(strength, start, end):
    with pytest.raises(ConfigError, match="edit: expected"):
        Edit(0, strength, start, end)


@pytest.mark.parametrize("t", [1, 7, 10])
def test_several_edits_with_guidance_and_a_negative_condition(t):
    weights = step_weights([Edit(0, 2.0, 0, 1), Edit(1, -3.0)], TIMESTEPS, T)
    denoise = edited_by_conditions(predict, COND, NULL, [FIRST, SECOND], weights, 7.5, NEGATIVE)
    changes = (2.0 if t >= 7 else 0.0) * (at(t, FIRST) - at(t, NULL)) - 3.0 * (at(t, SECOND) - at(t, NULL))
    expected = at(t, NEGATIVE) + 7.5 * (at(t, COND) - at(t, NEGATIVE)) + changes
    torch.testing.assert_close(denoise(X, torch.full((B,), t)), expected)
    plain = edited_by_conditions(predict, COND, NULL, [FIRST, SECOND], weights, 7.5)(X, torch.full((B,), t))
    torch.testing.assert_close(plain, at(t, NULL) + 7.5 * (at(t, COND) - at(t, NULL)) + changes)
    unguided = edited_by_conditions(predict, COND, NULL, [FIRST, SECOND], weights, 1.0, NEGATIVE)
    torch.testing.assert_close(unguided(X, torch.full((B,), t)), at(t, COND) + changes)
    without = edited_by_conditions(predict, None, NULL, [FIRST, SECOND], weights)(X, torch.full((B,), t))
    torch.testing.assert_close(without, at(t, NULL) + changes)


@pytest.mark.parametrize("kind", ["conditions", "shifts"])
def test_a_negative_condition_that_differs_between_steps(kind):
    def negative(t):
        return TensorCondition(NEGATIVE.value * t[:, None])

    weights, t = step_weights([Edit(0, 2.0)], TIMESTEPS, T), torch.full((B,), 7)
    if kind == "conditions":
        build = lambda lower: edited_by_conditions(predict, COND, NULL, [FIRST], weights, 3.0, lower)  # noqa: E731
    else:
        shift = torch.tensor([0.1, 0.2, 0.3]).expand(1, B, 3)
        build = lambda lower: edited_by_shifts(predict, COND, NULL, shift, weights, 3.0, lower)  # noqa: E731
    torch.testing.assert_close(build(negative)(X, t), build(negative(t))(X, t))
    assert not torch.equal(build(negative)(X, t), build(negative)(X, torch.full((B,), 4)))


def test_strengths_that_differ_between_samples():
    weights = torch.stack([torch.full((B, T), 2.0), torch.tensor([0.0, -1.0])[:, None].expand(B, T)])
    assert strengths_at(weights, torch.tensor([3, 5])).tolist() == [[2.0, 2.0], [0.0, -1.0]]
    result = edited_by_conditions(predict, None, NULL, [FIRST, SECOND], weights)(X, torch.full((B,), 4))
    first, second = at(4, FIRST) - at(4, NULL), at(4, SECOND) - at(4, NULL)
    torch.testing.assert_close(result[0], (at(4, NULL) + 2 * first)[0])
    torch.testing.assert_close(result[1], (at(4, NULL) + 2 * first - second)[1])


def test_shifts_of_the_bottleneck():
    weights, t = step_weights([Edit(0, 2), Edit(1, -1)], TIMESTEPS, T), torch.full((B,), 4)
    shifts = torch.tensor([[[0.1, 0.2, 0.3], [0.5, 0.0, 0.4]], [[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]]])  # (E, B, N)
    moved = 2 * shifts[0] - shifts[1]
    torch.testing.assert_close(edited_by_shifts(predict, None, NULL, shifts, weights)(X, t), at(4, NULL, moved))
    guided = at(4, NULL, moved) + 3 * (at(4, COND, moved) - at(4, NULL, moved))
    torch.testing.assert_close(edited_by_shifts(predict, COND, NULL, shifts, weights, 3.0)(X, t), guided)


@pytest.mark.parametrize("cond", [None, COND])
def test_no_edits_change_nothing(cond):
    empty, t = torch.zeros(0, T), torch.full((B,), 4)
    expected = at(4, NULL if cond is None else cond)
    torch.testing.assert_close(edited_by_conditions(predict, cond, NULL, [], empty)(X, t), expected)
    torch.testing.assert_close(edited_by_shifts(predict, cond, NULL, torch.zeros(0, B, 3), empty)(X, t), expected)
