"""The one room that knows the past: names, options and habits of the reference repositories in today's words.

Nothing else in the package spells an old name; without this file only old configs stop loading. The tables are in
``ldm.legacy.names``.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Mapping
from typing import Any

from ldm.legacy.names import (
    ALIASES,
    CARS3D_NAMES,
    CARS3D_REPEAT,
    CLIP_DISDIFF,
    CLIP_TEXT,
    CLIP_WIDTHS,
    DATA_MODULE,
    DISDIFF,
    ENCDIFF,
    LATENT_DIFFUSION,
    MEANINGLESS,
    NOT_SHIPPED,
    NOT_SHIPPED_CLASS,
    OLD_DATASETS,
    OLD_DEFAULTS,
    OLD_LATENT_DIFFUSIONS,
    OLD_MODULES,
    PREFIXES,
    RENAMED_PARAMS,
    SELF_EVIDENT,
    SHIFT_UNET,
    TOKEN_UNET,
)

__all__ = ["ALIASES", "OLD_MODULES", "mend_indentation", "resolve_target", "translate"]

_log = logging.getLogger(__name__)


def resolve_target(path: str) -> str:
    """Translate a ``target`` string of LDM, DisDiff, CLIP-DisDiff or EncDiff to today's dotted path.

    Args:
        path: dotted path as written in a config.

    Returns:
        Today's dotted path; ``path`` itself when it needs no translation. A ``LatentDiffusion`` may be one of several
        models, which only :func:`translate` can tell, from its params.
    """
    if path in ALIASES:
        return ALIASES[path]
    for old, today in PREFIXES.items():
        if path.startswith(old):
            return resolve_target(today + path[len(old) :])
    return NOT_SHIPPED_CLASS if path.startswith(tuple(NOT_SHIPPED)) else path


def translate(target: str, params: Mapping[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
    """Translate a whole ``{target, params}`` of the references.

    Options that mean nothing here are dropped, with one warning if they ask for something; options that mean another
    thing today keep their old meaning. What is not old is returned as it is.

    Args:
        target: dotted path as written in a config.
        params: its params, as plain or OmegaConf mappings.

    Returns:
        Today's dotted path and params.
    """
    params = dict(params or {})
    if target in OLD_LATENT_DIFFUSIONS:
        today, params = _diffusion_model(OLD_LATENT_DIFFUSIONS[target], params)
    elif target in OLD_DATASETS:
        return _dataset(target, params)
    else:
        today = resolve_target(target)
        if today == NOT_SHIPPED_CLASS != target:
            instead = next(advice for prefix, advice in NOT_SHIPPED.items() if target.startswith(prefix))
            return today, {"name": target, "instead": instead}
        if today == DATA_MODULE:
            params = _data_module(params)
        if today in (DISDIFF, CLIP_DISDIFF, ENCDIFF):  # written by today's name: nothing old about it
            return today, params
    for old, name in RENAMED_PARAMS.get(today, {}).items():
        if old in params:
            params.setdefault(name, params.pop(old))
    return today, _without(target, params, MEANINGLESS.get(today, ()))


def _diffusion_model(today: str, params: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Tell by its parts which model a ``LatentDiffusion`` of the references is, and give it that class' defaults."""
    network, stage = _target_of(params.get("unet_config")), params.get("cond_stage_config")
    if network == TOKEN_UNET:
        today = ENCDIFF
    elif network == SHIFT_UNET:
        has_clip = isinstance(stage, Mapping) and bool({"text_encoder", "image_encoder"} & set(stage))
        today = CLIP_DISDIFF if has_clip else DISDIFF
    elif today == DISDIFF:  # the module with the divergence, around a network without units
        today = LATENT_DIFFUSION
    params = {**OLD_DEFAULTS.get(today, {}), **params}
    if today == CLIP_DISDIFF:
        params["unet_config"] = _with_clip_width(params["unet_config"], stage.get("text_encoder"))
    elif _target_of(stage) == CLIP_TEXT:  # latent-diffusion's embedder returns a sequence, CLIP-DisDiff's does not
        params["cond_stage_config"] = {**stage, "params": {"n_repeat": 1, **(stage.get("params") or {})}}
    return today, params


def _target_of(config: Any) -> str | None:
    """Today's name of what a ``{target, params}`` describes; None for anything else."""
    target = config.get("target") if isinstance(config, Mapping) else None
    return resolve_target(target) if isinstance(target, str) else None


def _with_clip_width(network: Mapping[str, Any], text_encoder: Any) -> dict[str, Any]:
    """The shift U-Net's config with codes as wide as CLIP's embedding; the published example says 32."""
    options = (text_encoder.get("params") if isinstance(text_encoder, Mapping) else None) or {}
    width = CLIP_WIDTHS.get(options.get("version", "ViT-L/14"))
    params = dict(network.get("params") or {})
    given = params.setdefault("repre_emb_channels", width or CLIP_WIDTHS["ViT-L/14"])
    if width is not None and given != width:
        _warn_once(
            f"unet_config.params.repre_emb_channels is {given}, but this CLIP's embeddings are {width} wide: "
            f"{width} is used"
        )
        params["repre_emb_channels"] = width
    return {**network, "params": params}


def _dataset(target: str, params: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Today's class for a data set of the references."""
    old = OLD_DATASETS[target]
    params = {**old.params, **_without(target, params, old.meaningless)}
    if target in CARS3D_NAMES:
        is_test = "test" in params  # whatever its value, as in the references
        params.pop("test", None)
        params.setdefault("repeat", 1 if is_test else CARS3D_REPEAT)
    return old.today, params


def _data_module(params: dict[str, Any]) -> dict[str, Any]:
    """Sections that are looked through once do not repeat their images: scores need one row for each."""
    for section in ("validation", "test", "predict"):
        config = params.get(section)
        if isinstance(config, Mapping) and config.get("target") in CARS3D_NAMES:
            options = dict(config.get("params") or {})
            if "repeat" not in options:
                params[section] = {**config, "params": {**options, "test": True}}
    return params


def _without(target: str, params: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """``params`` without options that mean nothing; those that ask for something are named."""
    names = frozenset(names)
    asking = [key for key, value in params.items() if key in names - SELF_EVIDENT and value not in (None, False, 0)]
    if asking:
        _warn_once(f"{target}: {', '.join(asking)} mean nothing here and are ignored")
    return {name: value for name, value in params.items() if name not in names}


@functools.cache
def _warn_once(message: str) -> None:
    """Warn; a config is looked at several times in a run."""
    _log.warning("%s", message)


def mend_indentation(text: str, line: int) -> str | None:
    """Move a line of YAML one blank to the left, to where the line above begins.

    DisDiff's ``configs/autoencoder/shapes3d_kl_4_16.yaml`` cannot be read otherwise.

    Args:
        text: a YAML text that cannot be read.
        line: number of the line at fault, from 0.

    Returns:
        The text with that line moved; None if it does not begin one blank further right than the one above.
    """
    lines = text.splitlines()
    if not 0 < line < len(lines):
        return None
    above, here = (len(each) - len(each.lstrip(" ")) for each in lines[line - 1 : line + 1])
    if here != above + 1:
        return None
    return "\n".join([*lines[:line], lines[line][1:], *lines[line + 1 :]])
