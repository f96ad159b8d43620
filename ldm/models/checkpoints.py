"""Weights from a file into a model: what did not fit is said."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from ldm.modules.weights import read_state_dict
from ldm.util import UserError

logger = logging.getLogger(__name__)

_SHOWN = 4  # keys named in a message; the rest is counted


def strip_prefix(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries that start with ``prefix``, without it."""
    return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}


def load_into(
    module: nn.Module,
    path: str | Path,
    ignore_keys: Sequence[str] = (),
    transform: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] | None = None,
) -> set[str]:
    """Load a checkpoint into ``module``; missing and unexpected keys are logged, wrong shapes are an error.

    Args:
        module: where to.
        path: checkpoint file.
        ignore_keys: prefixes of keys not to load.
        transform: maps the file's state dict onto the module's names.

    Returns:
        the names of the weights that were loaded.

    Raises:
        UserError: the file cannot be read, shapes differ, or nothing in it fits.
    """
    state = read_state_dict(path)
    state = dict(transform(state) if transform else state)
    state = {key: value for key, value in state.items() if not key.startswith(tuple(ignore_keys))}
    # The constants of a noise schedule are no weights: the model itself says what becomes of them.
    constants = set(getattr(module, "schedule_names", ()))
    own = {key: value for key, value in module.state_dict().items() if key not in constants}
    wrong = [key for key, value in state.items() if key in own and own[key].shape != value.shape]
    if wrong:
        listed = "; ".join(f"{k}: found {tuple(state[k].shape)}, wanted {tuple(own[k].shape)}" for k in wrong[:_SHOWN])
        more = f"; and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise UserError(
            f"{path}: {len(wrong)} weights have another shape than the config asks for ({listed}{more}). Use the "
            "config the checkpoint was trained with, or name the keys in ignore_keys"
        )
    if not own.keys() & state.keys():
        raise UserError(
            f"{path}: none of its {len(state)} weights (such as {', '.join(list(state)[:3])}) belongs to "
            f"{type(module).__name__} (such as {', '.join(list(own)[:3])}): it is a checkpoint of another model"
        )
    missing, unexpected = module.load_state_dict(state, strict=False)
    logger.info("loaded %s: %d weights, %d missing, %d unexpected", path, len(state), len(missing), len(unexpected))
    for name, keys in (("missing", missing), ("unexpected", unexpected)):
        if keys:
            logger.warning("%s: %d %s keys, such as %s", path, len(keys), name, ", ".join(keys[:_SHOWN]))
    return set(state) - set(unexpected)
