"""Configs of NoiseCLR's reference code, translated; a config is a Python file of assignments, or YAML."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.legacy.reference_keys import known_values
from ldm.util import ConfigError

_MODEL, _DATA, _TRAINER = "model.params", "data.params", "lightning.trainer"
_DENOISER, _IMAGES = f"{_MODEL}.denoiser_config.params", f"{_DATA}.train.params"
_KEYS = {
    "pretrained_model": f"{_DENOISER}.pretrained_model",
    "tokenizer_name": f"{_DENOISER}.tokenizer",
    "gradient_checkpointing": f"{_DENOISER}.use_checkpoint",
    "placeholder_token_count": f"{_MODEL}.num_directions",
    "tokens_per_iter": f"{_MODEL}.directions_per_iteration",
    "temperature": f"{_MODEL}.temperature",
    "normalize_word": f"{_MODEL}.normalize_rows",
    "adam_weight_decay": f"{_MODEL}.weight_decay",
    "adam_epsilon": f"{_MODEL}.eps",
    "train_data_dir": f"{_IMAGES}.path",
    "resolution": f"{_IMAGES}.image_size",
    "repeats": f"{_IMAGES}.repeat",
    "train_batch_size": f"{_DATA}.batch_size",
    "num_train_iters": f"{_TRAINER}.max_steps",
    "gradient_accumulation_steps": f"{_TRAINER}.accumulate_grad_batches",
}
# Defaults of keys that are not translated one by one.
_OTHERS = {
    "initializer_tokens": "",
    "center_crop": False,
    "learning_rate": 1e-3,
    "scale_lr": True,
    "lr_scheduler": "constant",
    "lr_warmup_steps": 500,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "mixed_precision": "no",
    "save_steps": 100,
    "checkpointing_steps": 100,
    "seed": None,
    "output_dir": None,
    "resume_from_checkpoint": None,
    "resume_dir": None,
}
# Keys without effect -> reason, or replacement.
_IGNORED = {
    "enable_xformers_memory_efficient_attention": "attention of torch needs no xformers",
    "logging_dir": "logs are in the run folder",
    "subtract_uncond": "the prediction without a condition is always subtracted, as in the reference code",
    "validation_step": "draw directions with scripts/edit.py",
}
_SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts")
_PRECISIONS = {"no": "32-true", "fp16": "16-mixed", "bf16": "bf16-mixed"}


def read_assignments(path: str) -> dict[str, Any]:
    """Return the names that a Python file assigns literals to; it is parsed and never executed.

    Raises:
        ConfigError: the file is missing, or contains anything else than such assignments.
    """
    try:
        lines = ast.parse(Path(path).read_text(encoding="utf-8"), path).body
    except OSError as error:
        raise ConfigError(f"{path}: expected a config, got none ({error.strerror}). Correct the path") from error
    except (SyntaxError, ValueError) as error:
        raise ConfigError(f"{path}: expected Python, got invalid syntax ({error}). Correct the file") from error
    values: dict[str, Any] = {}
    for line in lines:
        try:
            match line:
                case ast.Assign(targets=[ast.Name(name)], value=value) | ast.AnnAssign(
                    ast.Name(name), value=ast.expr() as value
                ):
                    values[name] = ast.literal_eval(value)
                case ast.Expr(ast.Constant()):
                    pass
                case _:
                    raise ValueError("another statement")
        except ValueError as error:
            raise ConfigError(
                f"{path}: line {line.lineno}: expected NAME = a number, text, list, True, False or None, got "
                f"{ast.unparse(line).partition(chr(10))[0]!r}. Configs are not executed; write the value"
            ) from error
    return values


def training_words(config: Any, source: str) -> tuple[list[str], dict[str, str]]:
    """Return the words of ``main.py`` for a config of the reference code.

    Warm-up and decay of ``lr_scheduler`` are in optimizer steps. The reference code counts those of ``lr_warmup_steps``
    and ``num_train_iters`` times ``gradient_accumulation_steps``, so that a decay ends after training does.

    Args:
        config: its values by key.
        source: name of the file, for messages.

    Returns:
        ``key=value`` overrides of configs/directions/stable_diffusion.yaml, and flags with their values.

    Raises:
        ConfigError: it is not a mapping, a key is unknown, or a value is not supported.
    """
    if not isinstance(config, Mapping):
        raise ConfigError(f"{source}: expected a mapping of keys (pretrained_model, ...), got {config!r}")
    given = known_values(config.items(), (*_KEYS, *_OTHERS), _IGNORED, source)
    values = {"train_batch_size": 6, "num_train_iters": 1000, **_OTHERS, **given}
    counts = ["train_batch_size", "num_train_iters", "save_steps", "checkpointing_steps", "lr_warmup_steps"]
    for key in (*counts, "learning_rate"):
        kind, least = (int, int(key != "lr_warmup_steps")) if key in counts else ((int, float), 0)
        if not isinstance(values[key], kind) or values[key] < least:
            raise ConfigError(f"{source}: {key}: expected a number of at least {least}, got {values[key]!r}")
    for key, choices in (("mixed_precision", _PRECISIONS), ("lr_scheduler", _SCHEDULERS)):
        if values[key] not in choices:
            raise ConfigError(f"{source}: {key}: expected one of {', '.join(choices)}, got {values[key]!r}")
    found = {_KEYS[key]: value for key, value in given.items() if key in _KEYS}
    words = values["initializer_tokens"] or ""
    words = words.split(",") if isinstance(words, str) else words
    found[f"{_MODEL}.initializer_tokens"] = [word.strip() for word in words if word.strip()]
    found[f"{_MODEL}.betas"] = [values["adam_beta1"], values["adam_beta2"]]
    found[f"{_MODEL}.scheduler_config"] = _schedule(values)
    found[f"{_IMAGES}.fit"] = "crop" if values["center_crop"] else "stretch"
    # The scaled rate of this package is a multiple of the batch size, too.
    rate, is_scaled = values["learning_rate"], bool(values["scale_lr"])
    found["model.base_learning_rate"] = rate / values["train_batch_size"] if is_scaled else rate
    found["lightning.scale_lr"] = is_scaled
    every = min(values["save_steps"], values["checkpointing_steps"])  # checkpoints and files are written together
    found["lightning.modelcheckpoint.params.every_n_train_steps"] = every
    found[f"{_TRAINER}.precision"] = _PRECISIONS[values["mixed_precision"]]
    return [f"{key}={json.dumps(value)}" for key, value in found.items()], _flags(values, source)


def _flags(values: Mapping[str, Any], source: str) -> dict[str, str]:
    """Return ``-s``, and ``-l`` and ``-n`` or ``-r``, with their values."""
    flags = {} if values["seed"] is None else {"-s": str(values["seed"])}
    if checkpoint := values["resume_from_checkpoint"]:
        if not values["resume_dir"]:
            raise ConfigError(f"{source}: resume_dir: expected the folder of a run to resume, got none. Set it")
        return flags | {"-r": str(Path(values["resume_dir"]) / ("" if checkpoint == "latest" else checkpoint))}
    if not values["output_dir"]:
        return flags | {"-n": Path(source).stem}
    folder = Path(values["output_dir"])
    return flags | {"-l": str(folder.parent), "-n": folder.name}


def _schedule(values: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the ``scheduler_config`` of ``lr_scheduler``; cosine_with_restarts has one cycle, as by default."""
    name, warm_up = values["lr_scheduler"], values["lr_warmup_steps"]
    rest = max(1, values["num_train_iters"] - warm_up)
    if name == "constant":
        return None
    if name.startswith("cosine"):
        params = {"lr_start": 0.0, "lr_max": 1.0, "lr_min": 0.0, "max_decay_steps": warm_up + rest}
        return {
            "target": "ldm.lr_scheduler.LambdaWarmUpCosineScheduler",
            "params": {"warm_up_steps": warm_up, **params},
        }
    end = 0.0 if name == "linear" else 1.0
    cycles = {"warm_up_steps": [warm_up, 0], "cycle_lengths": [warm_up, rest], "f_start": [0.0, 1.0]}
    cycles |= {"f_max": [1.0, 1.0], "f_min": [1.0, end]}
    params = cycles if warm_up else {key: value[1:] for key, value in cycles.items()}
    return {"target": "ldm.lr_scheduler.LambdaLinearScheduler", "params": params}
