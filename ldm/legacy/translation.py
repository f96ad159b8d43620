"""Translation of targets and params of the reference repositories.

Old names occur only in this package; the tables are in ``ldm.legacy.names``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from ldm.errors import BuildError, ConfigError, report_once
from ldm.legacy import names
from ldm.legacy.sampling import sampling_options


def resolve_target(path: str) -> str:
    """Return today's dotted path of a ``target`` of LDM, DisDiff, CLIP-DisDiff or EncDiff.

    Args:
        path: dotted path in a config.

    Returns:
        Today's dotted path; ``path`` itself if it is not an old one. A ``LatentDiffusion`` may be one of several
        models; :func:`translate` selects it by its params.
    """
    if path in names.ALIASES:
        return names.ALIASES[path]
    for old, today in names.PREFIXES.items():
        if path.startswith(old):
            return resolve_target(today + path[len(old) :])
    return names.NOT_SHIPPED_CLASS if path.startswith(tuple(names.NOT_SHIPPED)) else path


def translate(target: str, params: Mapping[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
    """Translate a ``{target, params}`` of the references.

    Options without effect are dropped, with one warning if they are set; options whose meaning changed keep the old
    one. Other targets and params are returned unchanged.

    Args:
        target: dotted path in a config.
        params: its params.

    Returns:
        Today's dotted path and params.

    Raises:
        BuildError: the class, or an option that changes the result, is not supported.
    """
    params = dict(params or {})
    refusal = next((advice for name, advice in names.REFUSED.items() if target.startswith(name)), None)
    if refusal is not None:
        raise BuildError(f"{target}: {refusal}", target)
    if target in names.OLD_LATENT_DIFFUSIONS:
        today, params = _diffusion_model(names.OLD_LATENT_DIFFUSIONS[target], params)
    elif target in names.OLD_DATASETS:
        return _dataset(target, params)
    else:
        today = resolve_target(target)
        params = {**names.EARLIER_DEFAULTS.get(target, {}), **params}
        if today == names.NOT_SHIPPED_CLASS != target:
            instead = next(advice for prefix, advice in names.NOT_SHIPPED.items() if target.startswith(prefix))
            return today, {"name": target, "instead": instead}
        if today == names.DATA_MODULE:
            params = _data_module(params)
        if today == names.EDIT_SCORE:
            params = sampling_options(params, num_steps=50, eta=0.0)
        if today in (names.DISDIFF, names.CLIP_DISDIFF, names.ENCDIFF):  # already today's name
            return today, params
    for old, name in names.RENAMED_PARAMS.get(today, {}).items():
        if old in params:
            params.setdefault(name, params.pop(old))
    params |= _stable_diffusion_options(target, params)
    return today, _without(target, params, names.MEANINGLESS.get(today, ()))


def old_params(target: str) -> tuple[set[str], bool]:
    """Return the options of the references that a class of today accepts, and whether it accepts any."""
    options = {*names.MEANINGLESS.get(target, ()), *names.RENAMED_PARAMS.get(target, ()), "ucg_training", "reset_ema"}
    return options, target in (*names.OLD_LATENT_DIFFUSIONS, names.EDIT_SCORE)


def old_prefixes() -> tuple[str, ...]:
    """Return the beginnings of targets that have another name today, or whose data set is not included."""
    return (*names.PREFIXES, *names.NOT_SHIPPED)


def _diffusion_model(today: str, params: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Select the class of a ``LatentDiffusion`` of the references by its parts, and add the defaults of that class."""
    network, stage = _target_of(params.get("unet_config")), params.get("cond_stage_config")
    if network == names.TOKEN_UNET:
        today = names.ENCDIFF
    elif network == names.SHIFT_UNET:
        has_clip = isinstance(stage, Mapping) and bool({"text_encoder", "image_encoder"} & set(stage))
        today = names.CLIP_DISDIFF if has_clip else names.DISDIFF
    elif today == names.DISDIFF:  # a network without units
        today = names.LATENT_DIFFUSION
    if all(params.get(name) for name in names.CONTRASTIVE):
        message = (
            "the contrastive loss of this fork of EncDiff is not supported, and its projections and critic would be "
            "missing. Set use_mcl: false to train without it, or to sample from a checkpoint that was trained with it"
        )
        raise BuildError(message, today, "params.use_mcl")
    params = {**names.OLD_DEFAULTS.get(today, {}), **params}
    if today == names.CLIP_DISDIFF:
        params["unet_config"] = _with_clip_width(params["unet_config"], stage.get("text_encoder"))
    elif _target_of(stage) == names.CLIP_TEXT:  # latent-diffusion's embedder returns a sequence, this one does not
        given = stage.get("params") or {}
        added = {} if "max_phrases" in given else {"n_repeat": 1}
        params["cond_stage_config"] = {**stage, "params": {**added, **given}}
    return today, params


def _stable_diffusion_options(target: str, params: dict[str, Any]) -> dict[str, Any]:
    """Take ``ucg_training`` and ``reset_ema`` out of ``params`` and return the options that replace them."""
    result: dict[str, Any] = {}
    if params.pop("reset_ema", False):
        result["ignore_keys"] = [*params.get("ignore_keys", ()), "model_ema."]
    if dropped := params.pop("ucg_training", None):
        key = params.get("cond_stage_key", "image")
        options = dropped.get(key) or {}
        if len(dropped) > 1 or "p" not in options or options.get("val"):
            message = f"expected {{{key}: {{p: probability, val: ''}}}}, got {dict(dropped)}. Use cond_drop_prob"
            raise BuildError(message, target, "params.ucg_training")
        result["cond_drop_prob"] = float(options["p"])
    return result


def _target_of(config: Any) -> str | None:
    """Return today's target of a ``{target, params}``; None for anything else."""
    target = config.get("target") if isinstance(config, Mapping) else None
    return resolve_target(target) if isinstance(target, str) else None


def _with_clip_width(network: Mapping[str, Any], text_encoder: Any) -> dict[str, Any]:
    """Return the config of the shift U-Net with codes as wide as CLIP's embedding; the published example sets 32."""
    options = (text_encoder.get("params") if isinstance(text_encoder, Mapping) else None) or {}
    width = names.CLIP_WIDTHS.get(options.get("version", "ViT-L/14"))
    params = dict(network.get("params") or {})
    given = params.setdefault("repre_emb_channels", width or names.CLIP_WIDTHS["ViT-L/14"])
    if width is not None and given != width:
        report_once(
            f"unet_config.params.repre_emb_channels: expected the width of CLIP's embeddings ({width}), got {given}; "
            f"{width} is used"
        )
        params["repre_emb_channels"] = width
    return {**network, "params": params}


def _dataset(target: str, params: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return today's class and params of a data set of the references."""
    old = names.OLD_DATASETS[target]
    params = {**old.params, **_without(target, params, old.meaningless)}
    if target in names.CARS3D_NAMES:
        params.setdefault("repeat", 1 if "test" in params else names.CARS3D_REPEAT)  # with any value of `test`
        params.pop("test", None)
    return old.today, params


def _data_module(params: dict[str, Any]) -> dict[str, Any]:
    """Remove the repetition of images from evaluation sections: scores need one row per image."""
    for section in ("validation", "test", "predict"):
        config = params.get(section)
        if isinstance(config, Mapping) and config.get("target") in names.CARS3D_NAMES:
            options = config.get("params") or {}
            if "repeat" not in options:
                params[section] = {**config, "params": {**options, "test": True}}
    return params


def _without(target: str, params: Mapping[str, Any], meaningless: Iterable[str]) -> dict[str, Any]:
    """Return ``params`` without options that have no effect; a warning names those that are set."""
    dropped = {key: value for key, value in params.items() if key in meaningless}
    asking = [key for key, value in dropped.items() if key not in names.SELF_EVIDENT and value not in (None, False, 0)]
    if asking:
        report_once(f"{target}: {', '.join(asking)} ignored, without effect here")
    return {name: value for name, value in params.items() if name not in dropped}


def translate_ddconfig(ddconfig: Mapping[str, Any], known: Iterable[str]) -> dict[str, Any]:
    """Return a ``ddconfig`` with the keys known today; others, which LDM ignores, are named in a warning.

    Raises:
        ConfigError: a key is probably misspelt, or its value changes the network in a way that is not supported.
    """
    result, known = {}, list(known)
    for key, value in ddconfig.items():
        near = difflib.get_close_matches(key, known, n=1)
        if key in known:
            result[key] = names.ATTENTION_TYPES.get(value, value) if key == "attn_type" else value
        elif key in names.REFUSED_NETWORKS and value:
            raise ConfigError(f"ddconfig.{key}: expected false, got {value!r}. {names.REFUSED_NETWORKS[key]}")
        elif near and key not in names.REFUSED_NETWORKS:
            raise ConfigError(f"ddconfig.{key}: unknown key. Did you mean {near[0]!r}? Accepted: {', '.join(known)}")
        elif value:
            report_once(f"ddconfig: {key} ignored, without effect in LDM and here")
    return result


def mend_indentation(text: str, line: int) -> str | None:
    """Move a line of YAML one space to the left, to the indentation of the line above.

    DisDiff's ``configs/autoencoder/shapes3d_kl_4_16.yaml`` is not valid YAML without it.

    Args:
        text: invalid YAML.
        line: number of the invalid line, from 0.

    Returns:
        The text with that line moved; None if it is not indented one space further than the line above.
    """
    lines = text.splitlines()
    if not 0 < line < len(lines):
        return None
    above, here = (len(each) - len(each.lstrip(" ")) for each in lines[line - 1 : line + 1])
    lines[line] = lines[line][1:]
    return "\n".join(lines) if here == above + 1 else None
