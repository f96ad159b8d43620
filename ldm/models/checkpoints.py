"""Loading of checkpoint weights into a model, with a report of missing and unexpected keys."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from ldm.modules.weights import grouped, read_state_dict
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
    parts: Sequence[str] = ("",),
) -> set[str]:
    """Load a checkpoint into ``module``; missing and unexpected keys are logged.

    Args:
        module: module to load into.
        path: checkpoint file.
        ignore_keys: prefixes of keys that are not loaded.
        transform: function from the state dict of the file to names of the module.
        ignored_buffers: keys of the module that do not identify a matching checkpoint and whose shapes may differ, such
            as the constants of a noise schedule; the module itself handles them in ``load_state_dict``.
        parts: prefixes under which a file may contain the module, before ``transform``; further prefixes, which
            wrappers such as ``torch.compile`` added, are recognized and removed.

    Returns:
        Names of the loaded weights.

    Raises:
        UserError: the file cannot be read, shapes differ, or no key matches.
    """
    own = {key: value for key, value in module.state_dict().items() if key not in ignored_buffers}
    found = read_state_dict(path, [part + key for part in parts for key in own])
    found = dict(transform(found) if transform else found)
    state = {key: value for key, value in found.items() if not key.startswith(tuple(ignore_keys))}
    wrong = [key for key, value in state.items() if key in own and own[key].shape != value.shape]
    if wrong:
        shapes = [f"{k}: expected {tuple(own[k].shape)}, got {tuple(state[k].shape)}" for k in wrong[:_SHOWN]]
        more = f"; and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise UserError(
            f"{path}: {len(wrong)} weights have other shapes than the config ({'; '.join(shapes)}{more}). Use the "
            "config that the checkpoint was trained with, or add the keys to ignore_keys."
        )
    weights = {key for key, value in own.items() if value.ndim} or own.keys()  # scalars do not identify a model
    if not weights & state.keys():
        ignored = f", {len(found) - len(state)} of them excluded by ignore_keys" if len(found) > len(state) else ""
        raise UserError(
            f"{path}: expected weights of {type(module).__name__} (such as {', '.join(list(own)[:3])}), got "
            f"{len(found)} weights of another model (such as {', '.join(list(found)[:3])}){ignored}. Use a checkpoint "
            "of this model."
        )
    missing, unexpected = map(sorted, module.load_state_dict(state, strict=False))
    logger.info("loaded %s: %d weights, %d missing, %d unexpected", path, len(state), len(missing), len(unexpected))
    where, num_loaded = f"{path}, loaded into {type(module).__name__}", len(weights & state.keys())
    if 2 * num_loaded < len(weights):
        message = "%s: ONLY %d OF %d WEIGHTS FIT. Check that this is the right file"
        logger.warning(message, where, num_loaded, len(weights))
    if missing := [key for key in missing if key not in found]:  # others were excluded by ignore_keys
        logger.warning("%s: %s are missing in the file", where, grouped(missing))
    if unexpected:
        logger.warning("%s: %s were not used", where, grouped(unexpected))
    return set(state) - set(unexpected)
