"""Replacement of the data set of a config by another one."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ldm.config.signatures import find_signature
from ldm.legacy import resolve_target

logger = logging.getLogger(__name__)

# Options that name attributes of one data set, and options that apply to training images only.
OF_ATTRIBUTES = frozenset(
    "attributes bins caption_weights columns factors keep label name num_attributes several split_column templates "
    "words_from".split()
)
OF_TRAINING = ("augment", "do_augment", "repeat", "unset_prob")


def with_all_sections(merged: DictConfig, layer: DictConfig) -> DictConfig:
    """Return a layer that replaces the training data, with the same data in the sections that it does not name.

    Validation and test data thus do not remain those of the data set that was replaced. They keep their own ``split``
    and other options (``without_foreign_params``); validation data without one get the split "validation".

    Args:
        merged: the layers so far.
        layer: the next layer.
    """
    before, after = (_sections(content) for content in (merged, layer))
    train, old = after.get("train", {}), before.get("train", {}).get("target")
    if not _is_replaced(before.get("train", {}), train):
        return layer
    named = OmegaConf.select(layer, "data.params")  # also sections that are null
    left = [name for name, part in before.items() if name not in named and part.get("target") == old]
    params = {key: value for key, value in _params(train).items() if key not in (*OF_TRAINING, "split")}
    for name in left:
        signature = find_signature(resolve_target(train["target"]))
        is_split = signature is not None and "split" in signature.required and name == "validation"
        own = {"split": name} if is_split and "split" not in _params(before[name]) else {}
        section = {"target": train["target"], "params": {**params, **own}}
        layer = OmegaConf.merge(layer, {"data": {"params": {name: section}}})
        logger.info("data.params.%s: replaced by %s, as data.params.train", name, train["target"])
    return layer


def _is_replaced(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Return whether a section describes another data set than before: another class, or another path."""
    if not isinstance(new.get("target"), str) or old.get("target") is None:
        return False
    paths = [_params(section).get("path") for section in (old, new)]
    return old["target"] != new["target"] or (None not in paths and paths[0] != paths[1])


def _params(section: Mapping[str, Any]) -> dict[str, Any]:
    params = section.get("params")
    return params if isinstance(params, dict) else {}


def without_foreign_params(merged: DictConfig, layer: DictConfig) -> DictConfig:
    """Return the merged config without options that the data sets of the next layer do not accept.

    ``train: {target: ldm.data.formats.folder.ImageFolder, ...}`` can therefore follow a config of any data set:
    ``split`` and ``seed`` keep their values, and options specific to the other data set are removed, as are those that
    name its attributes, unless the layer sets the ``target`` alone. Options of the layer itself are kept, so that a
    misspelt one is reported.

    Args:
        merged: the layers so far.
        layer: the next layer.
    """
    before, after = (_sections(content) for content in (merged, layer))
    result = merged
    for name, section in after.items():
        old, params = before.get(name, {}), _params(before.get(name, {}))
        if not params or not _is_replaced(old, section):
            continue
        new, named = section["target"], OF_ATTRIBUTES if _params(section) else ()
        signature = None if new == old["target"] else find_signature(resolve_target(new))
        is_open = signature is None or signature.is_open
        foreign = [key for key in params if key in named or not (is_open or key in signature.required)]
        if foreign:
            logger.info("data.params.%s: %s of %s ignored for %s", name, ", ".join(foreign), old["target"], new)
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
