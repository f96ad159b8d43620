"""Validation of a whole config without heavy imports: keys, targets, arguments, files."""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from ldm import lr_scheduler
from ldm.config.loading import Config
from ldm.config.samplers import check_samplers
from ldm.config.signatures import (
    Signature,
    UnknownNameError,
    find_misfit,
    find_signature,
    find_source,
    is_installed,
    lacks_name,
    read_signature,
)
from ldm.config.sizes import check_sizes
from ldm.config.suggestions import advice_for_missing
from ldm.config.targets import find_refused
from ldm.config.trainer_args import KNOWN_ARGS, misfit_of
from ldm.legacy import LIST_KEYS, NOT_SHIPPED_CLASS, OLD_MODULES, resolve_target, translate
from ldm.models.first_stages import DOUBLE_Z, check_first_stage
from ldm.modules.diffusionmodules.shapes import AutoencoderShape, CLIPGuidedShape, UNetConfig, build_dataclass
from ldm.util import BuildError, ConfigError, UserError, did_you_mean, mismatch

logger = logging.getLogger(__name__)

TOP_LEVEL = ("base", "model", "data", "lightning")
LIGHTNING_VALUES = {  # keys beside the trainer -> annotation of their values
    **dict.fromkeys(("scale_lr", "find_unused_parameters"), "bool"),
    "compile": "bool | Literal['regional']",
    "compile_mode": "Literal['default', 'reduce-overhead', 'max-autotune']",
}
LIGHTNING_KEYS = ("trainer", "callbacks", "logger", "modelcheckpoint", *LIGHTNING_VALUES)
OBJECT_KEYS = ("target", "params")
CHECKPOINT = "pytorch_lightning.callbacks.ModelCheckpoint"
# Callbacks of every run by name, and one that a config enables by name; a config may change their params alone.
CALLBACKS = {
    "image_logger": "ldm.training.callbacks.image_logger.ImageLogger",
    "learning_rate_logger": "pytorch_lightning.callbacks.LearningRateMonitor",
    "cuda_callback": "ldm.training.callbacks.cuda.CUDACallback",
    "results_writer": "ldm.training.callbacks.results.ResultsWriter",
    "representation_writer": "ldm.evaluation.representation.RepresentationWriter",
    "latent_cache": "ldm.training.callbacks.latent_cache.LatentCache",
    "metrics_over_trainsteps_checkpoint": CHECKPOINT,
}
LOGGER_NAMES = ("csv", "testtube", "tensorboard", "wandb")
SECTION_KEYS = {"model": ("base_learning_rate", "target", "params"), "data": ("target", "params", "fingerprint")}
_AUTOENCODERS, _UNETS = "ldm.models.autoencoder.", "ldm.modules.diffusionmodules.openaimodel"
_SCHEDULERS = "ldm.lr_scheduler.Lambda"
CHECKPOINT_KEY = "ckpt_path"
_RUN_KEY = "denoiser_config.params.run"
# Condition stages: the option that sets or selects the width of their tokens, and the width of its defaults.
_STAGES = "ldm.modules.encoders.modules."
_WIDTHS: dict[str, tuple[str, dict[str | None, int]]] = {
    **{f"{_STAGES}{name}": ("n_embed", {}) for name in ("BERTEmbedder", "TransformerEmbedder")},
    f"{_STAGES}ClassEmbedder": ("embed_dim", {}),
    f"{_STAGES}FrozenCLIPEmbedder": ("version", dict.fromkeys((None, "openai/clip-vit-large-patch14"), 768)),
    f"{_STAGES}FrozenOpenCLIPEmbedder": ("arch", dict.fromkeys((None, "ViT-H-14"), 1024)),
}
_ATTENDING = ("crossattn", "hybrid", "crossattn-adm", "hybrid-adm")  # values of conditioning_key
# Functions that draw the pictures of models, and options beside their arguments.
_PICTURE_KEY = "log_images_kwargs"
_PICTURES = (
    *("diffusion.pictures.latent_diffusion_pictures", "diffusion.unit_pictures.unit_pictures"),
    *("diffusion.methods.encdiff.pictures.encdiff_pictures", "diffusion.methods.noiseclr.pictures.direction_grid"),
)
_PICTURE_OPTIONS = {
    **dict.fromkeys(("N", "n_row", "points", "num_images", "num_directions"), "Count"),
    **dict.fromkeys(("ddim_steps", "num_steps"), "NumSteps | None"),
    **dict.fromkeys(("ddim_eta", "eta"), "Eta | None"),
    **dict.fromkeys(("unconditional_guidance_scale", "guidance_scale", "strength"), "Finite"),
    **dict.fromkeys(("use_ema_scope", "only_inputs", "plot_ema"), "bool"),
    "split": "str",
}
# Keys of mappings that have a target.
_OBJECTS = re.compile(
    r".*\.(lossconfig|(unet|first_stage|denoiser)_config)|data\.params\.(train|validation|test|predict)"
)
_DOTTED = re.compile(r"[A-Za-z_]\w*(\.\w+)+")
_EXAMPLES = {
    "model": ", e.g. ldm.models.diffusion.methods.clip_disdiff.model.CLIPDisDiff",
    "data": ", e.g. ldm.data.module.DataModuleFromConfig",
}


def validate(config: Config, check_files: bool = True, sections: Sequence[str] = ("model", "data")) -> None:
    """Raise for the first error in a config.

    Args:
        config: the merged config.
        check_files: whether checkpoints named by ``ckpt_path`` have to exist.
        sections: the required sections of ``model`` and ``data``; others are not checked.

    Raises:
        ConfigError: a key, target or argument does not exist, or a required one is missing.
        UserError: a checkpoint file does not exist.
    """
    check_keys(config, "", config.content, TOP_LEVEL)
    for key, problem in find_refused(config.content):
        raise config.error(key, problem)
    for section in sections:
        if section not in config.content:
            raise ConfigError(
                f"{' + '.join(config.files)}: the section `{section}` is missing. Add `{section}: {{target, params}}`"
            )
        check_keys(config, section, config.content[section], SECTION_KEYS[section])
        described = config.section(section)
        if isinstance(described.get("target"), str):
            is_ours = resolve_target(described["target"]).startswith("ldm.")
            _check_nested(config, f"{section}.params", described.get("params"), is_ours)
        _check_object(config, section, described, is_certain=True)
    check_values(config, "model", config.section("model"), {"base_learning_rate": "LearningRate | None"})
    _check_lightning(config)
    _check_width(config)
    check_sizes(config)
    check_samplers(config)
    _check_holdout(config)
    if check_files:
        _check_paths(config)


def check_keys(config: Config, prefix: str, content: Any, known: Iterable[str], required: Iterable[str] = ()) -> None:
    """Raise for unknown and missing keys of a mapping.

    Raises:
        ConfigError: it is not a mapping, contains another key than ``known``, or lacks one of ``required``.
    """
    known = tuple(known)
    if not isinstance(content, Mapping):
        raise config.error(prefix, f"expected a mapping with {', '.join(known)}, got {content!r}")
    for key in content:
        if key not in known:
            shown = "" if len(known) > 12 else f" Accepted: {', '.join(known)}"
            places = {**SECTION_KEYS, "lightning": LIGHTNING_KEYS} if not prefix else {}
            shown = next((f" Move it to {place}.{key}" for place, keys in places.items() if key in keys), shown)
            dotted = f"{prefix}.{key}" if prefix else str(key)
            raise config.error(dotted, f"unknown key {key!r}.{did_you_mean(key, known)}{shown}")
    for key in required:
        if not content.get(key):
            raise config.error(f"{prefix}.{key}" if prefix else key, f"{key!r} is missing. Add it")


def check_values(config: Config, prefix: str, content: Mapping[str, Any], annotations: Mapping[str, str]) -> None:
    """Compare the values of a section with annotations by key.

    Raises:
        ConfigError: a value does not fit.
    """
    for name, annotation in annotations.items():
        if name in content and (problem := mismatch(annotation, content[name])):
            raise config.error(f"{prefix}.{name}".removeprefix("."), f"{problem}. Correct the value")


def _check_lightning(config: Config) -> None:
    lightning = config.section("lightning")
    check_keys(config, "lightning", lightning, LIGHTNING_KEYS)
    check_values(config, "lightning", lightning, LIGHTNING_VALUES)
    trainer = lightning.get("trainer") or {}
    check_keys(config, "lightning.trainer", trainer, sorted(KNOWN_ARGS))
    for name, value in trainer.items():
        if problem := misfit_of(name, value):
            raise config.error(f"lightning.trainer.{name}", problem)
    accumulated = trainer.get("accumulate_grad_batches") or 1
    if lightning.get("compile") and lightning.get("compile_mode", "default") != "default" and accumulated > 1:
        expected = (
            f"expected default with accumulate_grad_batches={accumulated}, because CUDA graphs overwrite gradients"
        )
        raise config.error("lightning.compile_mode", f"{expected}, got {lightning['compile_mode']}. Change one of them")
    callbacks = lightning.get("callbacks") or {}
    if not isinstance(callbacks, Mapping):
        raise config.error("lightning.callbacks", f"expected a mapping name -> {{target, params}}, got {callbacks!r}")
    described = {f"callbacks.{name}": (CALLBACKS.get(name), entry) for name, entry in callbacks.items()}
    for name, (target, entry) in {
        **described,
        "modelcheckpoint": (CHECKPOINT, lightning.get("modelcheckpoint")),
    }.items():
        if entry is None:
            continue
        key = f"lightning.{name}"
        check_keys(config, key, entry, OBJECT_KEYS)
        # Parameters are merged over defaults of the same name, so required ones may be missing here.
        entry = entry if "target" in entry or target is None else {"target": target, **entry}
        _check_nested(config, f"{key}.params", entry.get("params"))
        _check_object(config, key, entry, is_certain=True, check_required=False)
        _check_pictures(config, f"{key}.params.{_PICTURE_KEY}", (entry.get("params") or {}).get(_PICTURE_KEY))
    logger = lightning.get("logger")
    if isinstance(logger, Mapping):
        _check_object(config, "lightning.logger", logger, is_certain=True)
    elif logger not in (None, *LOGGER_NAMES):
        known = f"{', '.join(LOGGER_NAMES)} or {{target, params}}"
        hint = did_you_mean(logger, LOGGER_NAMES)
        raise config.error("lightning.logger", f"expected one of {known}, got {logger!r}.{hint}")


def _check_pictures(config: Config, key: str, options: Any) -> None:
    """Check the options of the pictures of a model; those of all models of this package are accepted."""
    target = str(config.section("model").get("target"))
    if not isinstance(options, Mapping) or not resolve_target(target).startswith("ldm."):
        return
    found = [find_signature(f"ldm.models.{name}") or Signature({}) for name in _PICTURES]
    known = Signature(dict.fromkeys(_PICTURE_OPTIONS, False), annotations=_PICTURE_OPTIONS).after(*found)
    if misfit := find_misfit("log_images", options, known, check_required=False):
        raise config.error(f"{key}.{misfit.name}", misfit.message)


def _check_nested(config: Config, key: str, value: Any, is_ours: bool = True) -> None:
    """Check every ``{target, params}`` below a value; classes of others may accept further keys beside these."""
    if isinstance(value, Mapping):
        near = [str(name) for name in value if name not in OBJECT_KEYS and did_you_mean(name, OBJECT_KEYS)]
        is_object = isinstance(value.get("target"), str) or "params" in value
        is_slip = near and (is_object or any(_DOTTED.fullmatch(str(value[name])) for name in near))
        if is_slip or (is_object and is_ours):
            check_keys(config, key, value, OBJECT_KEYS)
        target, params = value.get("target"), value.get("params")
        if is_object and not isinstance(params, (Mapping, type(None))):
            raise config.error(f"{key}.params", f"expected a mapping, got {params!r}")
        is_ours = is_ours and not (isinstance(target, str) and not resolve_target(target).startswith("ldm."))
        for name, item in value.items():
            _check_nested(config, f"{key}.{name}", item, is_ours)
        is_section = is_ours and bool(_OBJECTS.fullmatch(key)) and bool(value or key.startswith("data."))
        is_certain = "target" not in value and (set(value) == {"params"} or is_section)
        if "target" in value or is_certain:
            _check_object(config, key, value, is_certain)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _check_nested(config, f"{key}.{index}", item, is_ours)
    elif value is None and key == "data.params.train":
        _check_object(config, key, value, is_certain=True)


def _check_object(config: Config, key: str, described: Any, is_certain: bool, check_required: bool = True) -> None:
    """Check that the target of one ``{target, params}`` exists and accepts the params."""
    if not isinstance(described, Mapping):
        raise config.error(key, f"expected a mapping with target and params, got {described!r}")
    target = described.get("target")
    if not isinstance(target, str):
        if is_certain or target is not None:
            found = ", ".join(map(str, described)) or "nothing"
            raise config.error(
                key,
                f"expected a `target` (package.module.Class{_EXAMPLES.get(key, '')}), got only {found}. Add it, or "
                "merge the file that contains it with -b",
            )
        return
    params = described.get("params") or {}
    if not isinstance(params, Mapping):
        raise config.error(f"{key}.params", f"expected a mapping, got {params!r}")
    try:
        today, params = translate(target, params)
    except BuildError as error:
        raise config.error(f"{key}.{error.key}", error.args[0]) from error
    if today == NOT_SHIPPED_CLASS:
        config.pending.append(f"{key}: {target} does not come with this package; training needs {params['instead']}")
    misfit = find_misfit(target, params, _look_up(config, f"{key}.target", target, today), check_required)
    if misfit is not None:
        raise config.error(".".join(filter(None, (key, "params", misfit.name))), misfit.message)
    _check_networks(config, f"{key}.params", today, params)


def _check_networks(config: Config, key: str, today: str, params: Mapping[str, Any]) -> None:
    """Check the networks and the loss of an autoencoder, a U-Net, or the options of a method, without building them."""
    try:
        if today.startswith(_AUTOENCODERS) and isinstance(params.get("ddconfig"), Mapping):
            AutoencoderShape.from_config(params["ddconfig"])
            if (name := today.removeprefix(_AUTOENCODERS)) in DOUBLE_Z:
                check_first_stage(name, params)
        elif today.startswith(_UNETS) and today.endswith(".UNetModel"):
            known = [field.name for field in fields(UNetConfig)]
            shape = UNetConfig.from_params({name: params[name] for name in known if name in params})
            rates = {2**level for level in range(len(shape.channel_mult))}
            if shape.attention_resolutions and rates.isdisjoint(shape.attention_resolutions):
                message = (
                    f"{key}.attention_resolutions: no level has attention: expected some of {sorted(rates)}, got %s"
                )
                logger.warning(message, list(shape.attention_resolutions))
        elif today == "ldm.modules.diffusionmodules.clip_guided.UNet":
            build_dataclass(CLIPGuidedShape, params, "unet_config.params")
        elif today.startswith(_SCHEDULERS):
            vars(lr_scheduler)[today.rpartition(".")[2]](**params)
        _check_of(today)(params)
    except ConfigError as error:
        message = f".{error}".replace(".unet_config.params", "", 1).replace(".model.params", "", 1)
        option = message.partition(":")[0].partition(",")[0]  # ".name", as messages begin
        raise ConfigError(f"{config.origin(key + option)}: {key}{message}") from error


def _check_of(today: str) -> Callable[[Mapping[str, Any]], None]:
    """Return the check of a model's params in the ``options.py`` of its folder, which needs no torch."""
    folder, _, name = today.rpartition(".")
    options = f"{folder.rpartition('.')[0]}.options"
    if not today.startswith("ldm.models.") or find_source(options) is None:
        return lambda params: None
    return vars(importlib.import_module(options))["CHECKS"].get(name, lambda params: None)


def _check_width(config: Config) -> None:
    """Compare the width of a condition stage's tokens, where the config shows it, with that of the network.

    A width that follows from the name of a CLIP is only reported: its files may be missing, and such a model can still
    be built to compare the weights of a checkpoint.
    """
    params = config.section("model").get("params") or {}
    parts = [params.get(name) for name in ("cond_stage_config", "unet_config")]
    if not all(isinstance(part, Mapping) for part in parts) or params.get("conditioning_key") not in _ATTENDING:
        return
    stage, network = (part.get("params") or {} for part in parts)
    option, widths = _WIDTHS.get(parts[0].get("target"), ("", {}))
    given = stage.get(option)
    found, expected = widths.get(given, given), network.get("context_dim")
    if isinstance(found, int) and isinstance(expected, int) and found != expected:
        key = "model.params.unet_config.params.context_dim"
        message = f"expected {found}, the width of cond_stage_config ({parts[0]['target']}), got {expected}"
        if found == given:
            raise config.error(key, f"{message}. Make them match")
        logger.warning("%s: %s. Training and sampling need equal widths", key, message)


def _check_holdout(config: Config) -> None:
    """Compare the combinations held out of training with those that other sections of the same data call unseen."""
    sections = config.section("data").get("params") or {}
    train = sections.get("train")
    for name in ("validation", "test"):
        part = sections.get(name)
        if isinstance(train, Mapping) and isinstance(part, Mapping) and train.get("target") == part.get("target"):
            expected, found = ((one.get("params") or {}).get("holdout") or 0 for one in (train, part))
            is_part = (part.get("params") or {}).get("split") in ("validation", "evaluation")
            if found != expected and (found or is_part):  # a test set without holdout may be the whole set
                message = f"expected {expected}, as in data.params.train, got {found}. Make them match"
                raise config.error(f"data.params.{name}.params.holdout", message)


def _look_up(config: Config, key: str, target: str, today: str) -> Signature | None:
    module = today.rpartition(".")[0]
    try:
        if module in OLD_MODULES:
            raise UnknownNameError(f"{module}.py of the references has no such name")
        if not is_installed(today):
            raise config.error(
                key,
                f"{target!r}: there is no package {today.partition('.')[0]!r}. Known families: latent-diffusion, "
                "DisDiff, CLIP-DisDiff, EncDiff (targets that start with ldm., taming. or main.). Your own classes "
                "must be importable from the current folder",
            )
        signature = read_signature(today)
        if signature is None and lacks_name(today):
            raise UnknownNameError(f"module {module} has no {today.rpartition('.')[2]}")
        return signature
    except UnknownNameError as error:
        raise config.error(key, f"{target!r}: {error}.{advice_for_missing(target, today)}") from error


def _check_paths(config: Config) -> None:
    """Raise for the first checkpoint, run or list of images that does not exist."""
    kinds = {CHECKPOINT_KEY: "checkpoint", _RUN_KEY: "run", **dict.fromkeys(LIST_KEYS, "list of images")}
    for key, value in _scalars(config.content):
        kind = next((kind for name, kind in kinds.items() if f".{key}".endswith(f".{name}")), None)
        if kind and isinstance(value, str) and not Path(value).expanduser().exists():
            folder = next(parent for parent in Path(value).expanduser().parents if parent.is_dir())
            near = sorted(str(path) for path in folder.glob("*"))[:5]
            listing = f" {folder}/ contains: {', '.join(near)}" if near else f" {folder}/ is empty"
            without = f", or null to start without one ({key}=null)" if kind == "checkpoint" else ""
            raise UserError(
                f"{config.origin(key)}: {key}: the {kind} {value} does not exist.{listing}. Set another path{without}"
            )


def _scalars(content: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield ``(dotted key, value)`` for every scalar in nested mappings and lists."""
    if isinstance(content, list):
        content = dict(enumerate(content))
    if not isinstance(content, Mapping):
        yield prefix.removesuffix("."), content
        return
    for name, value in content.items():
        yield from _scalars(value, f"{prefix}{name}.")
