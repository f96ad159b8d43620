"""Loading of checkpoint weights into a model, with a report of missing and unexpected keys."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from ldm.modules.weights import group_keys, read_state_dict
from ldm.util import UserError

logger = logging.getLogger(__name__)

_SHOWN = 4  # keys listed in a message


def strip_prefix(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the entries whose keys start with ``prefix``, without the prefix."""
    return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}


def load_into(
    module: nn.Module,
    path: str | Path,
    ignore_keys: Sequence[str] = (),
    transform: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] | None = None,
    ignored_buffers: Collection[str] = (),
) -> set[str]:
    """Load a checkpoint into ``module``; missing and unexpected keys are logged.

    Args:
        module: module to load into.
        path: checkpoint file.
        ignore_keys: prefixes of keys that are not loaded.
        transform: function from the state dict of the file to names of the module.
        ignored_buffers: keys of the module that do not identify a matching checkpoint and whose shapes may differ, such
            as the constants of a noise schedule; the module itself handles them in ``load_state_dict``.

    Returns:
        Names of the loaded weights.

    Raises:
        UserError: the file cannot be read, shapes differ, or no key matches.
    """
    state = read_state_dict(path)
    state = dict(transform(state) if transform else state)
    state = {key: value for key, value in state.items() if not key.startswith(tuple(ignore_keys))}
    own = {key: value for key, value in module.state_dict().items() if key not in ignored_buffers}
    wrong = [key for key, value in state.items() if key in own and own[key].shape != value.shape]
    if wrong:
        shapes = [f"{k}: expected {tuple(own[k].shape)}, got {tuple(state[k].shape)}" for k in wrong[:_SHOWN]]
        more = f"; and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise UserError(
            f"{path}: {len(wrong)} weights have other shapes than the config ({'; '.join(shapes)}{more}). Use the "
            "config that the checkpoint was trained with, or add the keys to ignore_keys."
        )
    if not own.keys() & state.keys():
        raise UserError(
            f"{path}: expected weights of {type(module).__name__} (such as {', '.join(list(own)[:3])}), got "
            f"{len(state)} weights of another model (such as {', '.join(list(state)[:3])}). Use a checkpoint of this "
            "model."
        )
    missing, _ = module.load_state_dict(state, strict=False)
    dropped = set(state) - set(module.state_dict())
    logger.info("loaded %s: %d weights, %d missing, %d unexpected", path, len(state), len(missing), len(dropped))
    for name, keys in (("missing", missing), ("unexpected", [key for key in state if key in dropped])):
        if keys:
            shown = ", ".join(keys[:_SHOWN])
            logger.warning("%s: %d %s keys (%s), such as %s", path, len(keys), name, group_keys(keys), shown)
    return set(state) - dropped
