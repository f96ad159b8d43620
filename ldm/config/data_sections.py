"""Replacement of the data set of a config by another one."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ldm.config.signatures import find_signature
from ldm.legacy import resolve_target

logger = logging.getLogger(__name__)


def without_foreign_params(merged: DictConfig, layer: DictConfig) -> DictConfig:
    """Return the merged config without options that the data sets of the next layer do not accept.

    ``train: {target: ldm.data.formats.folder.ImageFolder, ...}`` can therefore follow a config of any data set:
    ``split`` and ``seed`` keep their values, and options specific to the other data set are removed. Options of the
    layer itself are kept, so that a misspelt one is reported.

    Args:
        merged: the layers so far.
        layer: the next layer.
    """
    before, after = (_sections(content) for content in (merged, layer))
    result = merged
    for name, section in after.items():
        old, new = (part.get("target") for part in (before.get(name, {}), section))
        params = before.get(name, {}).get("params")
        if not isinstance(params, dict) or not isinstance(new, str) or old in (None, new):
            continue
        signature = find_signature(resolve_target(new))
        is_open = signature is None or signature.is_open
        foreign = [] if is_open else [key for key in params if key not in signature.required]
        if foreign:
            logger.info("data.params.%s: %s does not accept %s of %s; ignored", name, new, ", ".join(foreign), old)
            result = result.copy()
            for key in foreign:
                del result.data.params[name].params[key]
    return result


def _sections(content: DictConfig) -> dict[str, Mapping[str, Any]]:
    """Return the unresolved data sets below ``data.params``."""
    node: Any = OmegaConf.to_container(content, resolve=False)
    for key in ("data", "params"):
        node = node.get(key) if isinstance(node, dict) else None
    return {name: part for name, part in node.items() if isinstance(part, dict)} if isinstance(node, dict) else {}
