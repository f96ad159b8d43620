"""Check a whole config before anything heavy is imported: keys, targets, arguments, files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm.config.loading import Config
from ldm.config.signatures import Signature, UnknownNameError, is_installed, read_signature
from ldm.config.trainer_args import KNOWN_ARGS
from ldm.legacy import ALIASES, OLD_MODULES, translate
from ldm.util import ConfigError, UserError, did_you_mean

TOP_LEVEL = ("base", "model", "data", "lightning")
LIGHTNING_KEYS = ("trainer", "callbacks", "logger", "modelcheckpoint", "scale_lr")
LOGGER_NAMES = ("csv", "testtube", "tensorboard", "wandb")
SECTION_KEYS = {"model": ("base_learning_rate", "target", "params"), "data": ("target", "params")}
CHECKPOINT_KEY = "ckpt_path"
_EXAMPLES = {
    "model": ", e.g. ldm.models.diffusion.methods.clip_disdiff.model.CLIPDisDiff",
    "data": ", e.g. ldm.data.module.DataModuleFromConfig",
}


def validate(config: Config, check_files: bool = True, sections: Sequence[str] = ("model", "data")) -> None:
    """Raise for the first thing in a config that cannot be.

    Args:
        config: the merged config.
        check_files: whether checkpoints named by ``ckpt_path`` have to exist already.
        sections: which of ``model`` and ``data`` are needed; the other one is neither asked for nor looked at.

    Raises:
        ConfigError: a key, target or argument does not exist, or a required one is missing.
        UserError: a checkpoint file does not exist.
    """
    _check_keys(config, "", config.content, TOP_LEVEL)
    for section in sections:
        if section not in config.content:
            raise ConfigError(
                f"{' + '.join(config.files)}: the section `{section}` is missing; a config needs "
                "`model: {base_learning_rate, target, params}` and `data: {target, params}`"
            )
        _check_object(config, section, config.content[section], is_certain=True)
    for section in sections:
        _check_keys(config, section, config.section(section), SECTION_KEYS[section])
    _check_lightning(config)
    for section in sections:
        _check_nested(config, f"{section}.params", config.section(section).get("params"))
    if check_files:
        _check_checkpoints(config)


def _where(config: Config, key: str) -> str:
    return f"{config.origin(key)}: {key}"


def _check_keys(config: Config, prefix: str, content: Any, known: Iterable[str]) -> None:
    """Raise for a key of a mapping that is not among the known ones."""
    known = tuple(known)
    if not isinstance(content, Mapping):
        raise ConfigError(f"{_where(config, prefix)}: expected a mapping with {', '.join(known)}, found {content!r}")
    for key in content:
        if key not in known:
            dotted = f"{prefix}.{key}" if prefix else str(key)
            shown = "" if len(known) > 12 else f" Known here: {', '.join(known)}"
            raise ConfigError(f"{_where(config, dotted)}: unknown key {key!r}.{did_you_mean(key, known)}{shown}")


def _check_lightning(config: Config) -> None:
    lightning = config.section("lightning")
    _check_keys(config, "lightning", lightning, LIGHTNING_KEYS)
    _check_keys(config, "lightning.trainer", lightning.get("trainer") or {}, sorted(KNOWN_ARGS))
    checkpoint = lightning.get("modelcheckpoint") or {}
    _check_keys(config, "lightning.modelcheckpoint", checkpoint, ("target", "params"))
    callbacks = lightning.get("callbacks") or {}
    if not isinstance(callbacks, Mapping):
        raise ConfigError(
            f"{_where(config, 'lightning.callbacks')}: expected a mapping name -> {{target, params}}, "
            f"found {callbacks!r}"
        )
    for name, callback in callbacks.items():
        key = f"lightning.callbacks.{name}"
        if callback is not None:
            _check_keys(config, key, callback, ("target", "params"))
        if callback and callback.get("target"):
            # Parameters merge over a default of the same name, so a required one may be absent here.
            _check_object(config, key, callback, is_certain=True, check_required=False)
    logger = lightning.get("logger")
    if isinstance(logger, Mapping):
        _check_object(config, "lightning.logger", logger, is_certain=True)
    elif logger not in (None, *LOGGER_NAMES):
        raise ConfigError(
            f"{_where(config, 'lightning.logger')}: expected one of {', '.join(LOGGER_NAMES)} or "
            f"{{target, params}}, found {logger!r}.{did_you_mean(logger, LOGGER_NAMES)}"
        )


def _check_nested(config: Config, key: str, value: Any) -> None:
    """Check every ``{target, params}`` below a value."""
    if isinstance(value, Mapping):
        if "target" in value or set(value) == {"params"}:
            _check_object(config, key, value, is_certain="target" not in value)
        for name, item in value.items():
            _check_nested(config, f"{key}.{name}", item)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _check_nested(config, f"{key}.{index}", item)


def _check_object(config: Config, key: str, described: Any, is_certain: bool, check_required: bool = True) -> None:
    """Check one ``{target, params}``: the target exists and takes these params."""
    if not isinstance(described, Mapping):
        raise ConfigError(f"{_where(config, key)}: expected a mapping with target and params, found {described!r}")
    target = described.get("target")
    if not isinstance(target, str):
        if is_certain or target is not None:
            raise ConfigError(
                f"{_where(config, key)}: `target` is missing (package.module.Class{_EXAMPLES.get(key, '')}); found "
                f"only {', '.join(map(str, described)) or 'nothing'}. Add it, or merge the file that has it with -b"
            )
        return
    params = described.get("params") or {}
    if not isinstance(params, Mapping):
        raise ConfigError(f"{_where(config, key + '.params')}: expected a mapping, found {params!r}")
    today, params = translate(target, params)
    signature = _look_up(config, key, target, today)
    if signature is not None:
        _check_params(config, key, target, params, signature, check_required)


def _look_up(config: Config, key: str, target: str, today: str) -> Signature | None:
    module = today.rpartition(".")[0]
    try:
        if module in OLD_MODULES:
            raise UnknownNameError(f"the old {module}.py had no such name", list(ALIASES))
        if not is_installed(today):
            raise ConfigError(
                f"{_where(config, key + '.target')}: {target!r}: there is no package {today.partition('.')[0]!r}. "
                "Known families: latent-diffusion, DisDiff, CLIP-DisDiff, EncDiff (targets that start with ldm., "
                "taming. or main.); a class of your own must be importable from here"
            )
        return read_signature(today)
    except UnknownNameError as error:
        hint = did_you_mean(target, [*error.known, *ALIASES])
        raise ConfigError(f"{_where(config, key + '.target')}: {target!r}: {error}.{hint}") from error


def _check_params(
    config: Config, key: str, target: str, params: Mapping, signature: Signature, check_required: bool
) -> None:
    for name in params:
        if name not in signature.required and not signature.is_open:
            hint = did_you_mean(name, signature.required)
            accepted = ", ".join(signature.required) or "no arguments"
            raise ConfigError(
                f"{_where(config, f'{key}.params.{name}')}: {target} takes no {name!r}.{hint} Accepted: {accepted}"
            )
    missing = [name for name, need in signature.required.items() if need and name not in params]
    if missing and check_required:
        raise ConfigError(
            f"{_where(config, f'{key}.params')}: {target} needs {', '.join(map(repr, missing))}; "
            f"add {key}.params.{missing[0]}"
        )


def _check_checkpoints(config: Config) -> None:
    for key, value in iterate(config.content):
        if key.rpartition(".")[2] == CHECKPOINT_KEY and isinstance(value, str) and not Path(value).exists():
            folder = Path(value).parent
            while not folder.is_dir():
                folder = folder.parent
            near = sorted(str(path) for path in folder.glob("*"))[:5]
            listing = f" In {folder}/ there are: {', '.join(near)}" if near else f" {folder}/ is empty"
            raise UserError(
                f"{_where(config, key)}: the checkpoint {value} does not exist.{listing}. Give another path, "
                f"or null to start without one ({key}=null)"
            )


def iterate(content: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Yield ``(dotted key, value)`` of every scalar in nested mappings and lists."""
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(content, Mapping):
        items = content.items()
    elif isinstance(content, list):
        items = enumerate(content)
    for name, value in items:
        key = f"{prefix}.{name}" if prefix else str(name)
        if isinstance(value, (Mapping, list)):
            yield from iterate(value, key)
        else:
            yield key, value
