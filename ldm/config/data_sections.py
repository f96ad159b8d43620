"""A config may put another data set in the place of the one it builds on."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ldm.config.signatures import UnknownNameError, read_signature
from ldm.legacy import resolve_target

log = logging.getLogger(__name__)


def without_foreign_params(merged: DictConfig, layer: DictConfig) -> DictConfig:
    """What was merged so far, without options of data sets that ``layer`` replaces by others which do not take them.

    So ``train: {target: ldm.data.formats.folder.ImageFolder, ...}`` can follow a config of any data set: ``split`` and
    ``seed`` stay what they were, and options of the other data set alone are left out. What the layer
    itself says is kept, and a slip in it is an error as ever.

    Args:
        merged: the layers so far.
        layer: the one that comes next.
    """
    before, after = (_sections(content) for content in (merged, layer))
    result = merged
    for name, section in after.items():
        old, new = (part.get("target") for part in (before.get(name, {}), section))
        params = before.get(name, {}).get("params")
        if not isinstance(params, dict) or not isinstance(new, str) or old in (None, new):
            continue
        foreign = _not_taken(new, params)
        if foreign:
            log.info("data.params.%s: %s does not take %s of %s: left out", name, new, ", ".join(foreign), old)
            result = result.copy() if result is merged else result
            for key in foreign:
                del result.data.params[name].params[key]
    return result


def _sections(content: DictConfig) -> dict[str, Mapping[str, Any]]:
    """The data sets below ``data.params``, as they are written."""
    node: Any = OmegaConf.to_container(content, resolve=False)
    for key in ("data", "params"):
        node = node.get(key) if isinstance(node, dict) else None
    return {name: part for name, part in node.items() if isinstance(part, dict)} if isinstance(node, dict) else {}


def _not_taken(target: str, params: Mapping[str, Any]) -> list[str]:
    """Names of params that a class does not take, as far as its source tells."""
    try:
        signature = read_signature(resolve_target(target))
    except UnknownNameError:  # told when the config is checked
        return []
    if signature is None or signature.is_open:
        return []
    return [name for name in params if name not in signature.required]
