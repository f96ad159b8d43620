"""Optimizer states of reference checkpoints, mapped to the parameters of today's models.

The references keep parameters in their optimizers that are frozen, EncDiff has one set of tensors per unit where this
package has one tensor for all units, and LDM does not train the variance of an autoencoder's loss.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

logger = logging.getLogger(__name__)

Shape = tuple[int, ...]


def fit_optimizer_state(optimizer: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
    """Map a saved optimizer state; a hook for ``Optimizer.register_load_state_dict_pre_hook``.

    Args:
        optimizer: the optimizer that loads the state.
        saved: its state dict from a checkpoint.

    Returns:
        ``saved`` if it fits, a mapped state dict if a mapping exists, or else, with a warning, the state of
        ``optimizer`` itself, so that it starts anew.
    """
    groups = saved["param_groups"]
    ours = [[tuple(parameter.shape) for parameter in group["params"]] for group in optimizer.param_groups]
    if len(groups) == len(ours):
        if all(_is_equal(group["params"], saved["state"], shapes) for group, shapes in zip(groups, ours)):
            return saved
        mapped = [_map_group(group["params"], saved["state"], shapes) for group, shapes in zip(groups, ours)]
        if all(states is not None for states in mapped):
            return _renumbered(groups, mapped, ours)
    found, expected = (sum(map(len, sizes)) for sizes in ([group["params"] for group in groups], ours))
    message = "the optimizer state of the checkpoint does not fit this model (%d tensors, expected %d)"
    logger.warning(f"{message}: training continues from its weights with a new optimizer state", found, expected)
    return optimizer.state_dict()


def _is_equal(indices: Sequence[int], states: Mapping[int, Any], shapes: Sequence[Shape]) -> bool:
    """Return whether saved states belong to parameters of these shapes, in this order."""
    if len(indices) != len(shapes):
        return False
    saved = ((_shape(states[index]), shape) for index, shape in zip(indices, shapes) if index in states)
    return all(found in (None, shape) for found, shape in saved)


def _map_group(indices: Sequence[int], states: Mapping[int, Any], shapes: Sequence[Shape]) -> list[Any] | None:
    """Return the states of the first parameters of these shapes; None if there is no mapping.

    Frozen parameters have no saved state and are skipped. A run of parameters of shapes (U, ...) takes the states of U
    runs of parameters without that dimension. Parameters at the end without saved states start anew.
    """
    saved = [states[index] for index in indices if index in states]
    mapped: list[Any] = []
    while saved and len(mapped) < len(shapes):
        if _shape(saved[0]) == shapes[len(mapped)]:
            mapped.append(saved.pop(0))
            continue
        block = _stacked_block(saved, shapes[len(mapped) :])
        if not block:
            return None
        saved = saved[len(block) * shapes[len(mapped)][0] :]
        mapped += block
    return None if saved else mapped


def _stacked_block(saved: Sequence[dict[str, Any]], shapes: Sequence[Shape]) -> list[dict[str, Any]]:
    """Return the states of the longest run of leading parameters whose U slices are saved one unit after another."""
    units = shapes[0][0] if shapes[0] else 0
    length = next((i for i, shape in enumerate(shapes) if shape[:1] != (units,)), len(shapes))
    found = [_shape(state) for state in saved[: length * units]]
    for size in range(length, 0, -1):
        if units and found[: size * units] == [shape[1:] for shape in shapes[:size]] * units:
            return [_stack(saved[position : size * units : size]) for position in range(size)]
    return []


def _stack(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return one state for several of equal shapes, along a new first dimension; counts of steps are equal."""
    return {
        key: torch.stack([state[key] for state in states]) if isinstance(value, Tensor) and value.ndim else value
        for key, value in states[0].items()
    }


def _shape(state: Mapping[str, Any]) -> Shape | None:
    """Return the shape of the parameter of a state; None if the state does not contain it."""
    return next((tuple(value.shape) for value in state.values() if isinstance(value, Tensor) and value.ndim), None)


def _renumbered(
    groups: Sequence[dict[str, Any]], mapped: Sequence[list[dict[str, Any]]], ours: Sequence[Sequence[Shape]]
) -> dict[str, Any]:
    """Return a state dict with consecutive numbers of parameters, some of which may have no state."""
    states, numbered, numbers = {}, [], itertools.count()
    for group, own, shapes in zip(groups, mapped, ours):
        indices = list(itertools.islice(numbers, len(shapes)))
        states.update(zip(indices, own))
        numbered.append({**group, "params": indices})
    return {"state": states, "param_groups": numbered}
