"""Trainer arguments of Lightning 2 and 1.4, and the translation of the latter.

They are plain lists, so that command lines and configs are checked without importing Lightning.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ldm.util import did_you_mean, mismatch

_BATCHES, _SOME_BATCHES = "OptionalCount | Fraction | None", "PositiveInt | PositiveFraction | None"
_ACCELERATORS = "auto cpu gpu cuda mps tpu".split()
_STRATEGIES = dict.fromkeys("ddp ddp2 ddp_cpu dp".split(), "ddp") | {"ddp_spawn": "ddp_spawn", "ddp_sharded": "fsdp"}
_STRATEGY = re.compile(
    r"d?dp|ddp(2|_cpu|_sharded|(_spawn|_fork|_notebook)?(_find_unused_parameters_(true|false))?)|fsdp(_cpu_offload)?"
)
_PRECISIONS = {"16": "16-mixed", "bf16": "bf16-mixed", "32": "32-true", "64": "64-true"}
_PRECISION_NAMES = (
    *(16, 32, 64),
    *"auto 16 bf16 32 64 16-mixed bf16-mixed 16-true bf16-true 32-true 64-true".split(),
    *("transformer-engine", "transformer-engine-float16"),
)

# Arguments of pytorch_lightning.Trainer 2.6 that a config may set -> annotation of its values.
TRAINER_TYPES = {
    "accelerator": f"Literal{[*_ACCELERATORS, *_STRATEGIES]}",
    "strategy": "str",
    "devices": "Count | Literal[-1] | str | Sequence[OptionalCount] | None",
    "num_nodes": "Count",
    "precision": f"Literal{list(_PRECISION_NAMES)} | None",
    "max_epochs": "Steps | Literal[-1] | None",
    "max_steps": "Steps | Literal[-1] | None",
    **dict.fromkeys(("min_epochs", "min_steps"), "Steps | None"),
    "max_time": "str | Mapping[str, NonNegativeFloat] | None",
    "fast_dev_run": "bool | NonNegativeInt",
    "limit_train_batches": _SOME_BATCHES,
    **dict.fromkeys(("limit_val_batches", "limit_test_batches", "limit_predict_batches", "overfit_batches"), _BATCHES),
    "val_check_interval": f"str | Mapping[str, NonNegativeFloat] | {_SOME_BATCHES}",
    "check_val_every_n_epoch": "PositiveInt | None",
    "num_sanity_val_steps": "OptionalCount | Literal[-1] | None",
    "log_every_n_steps": "PositiveInt | None",
    "reload_dataloaders_every_n_epochs": "NonNegativeInt",
    "accumulate_grad_batches": "Count | None",
    "gradient_clip_val": "Weight | None",
    "gradient_clip_algorithm": "Literal['norm', 'value'] | None",
    "deterministic": "bool | Literal['warn'] | None",
    "profiler": "Literal['simple', 'advanced', 'pytorch', 'xla'] | None",
    "default_root_dir": "AnyPath | None",
    **dict.fromkeys(("logger", "plugins"), "Any"),
    **dict.fromkeys(
        """enable_checkpointing enable_progress_bar enable_model_summary benchmark inference_mode detect_anomaly
        use_distributed_sampler barebones sync_batchnorm""".split(),
        "bool | None",
    ),
    # Arguments of Lightning 1.4
    "num_processes": "Count | None",
    "progress_bar_refresh_rate": "NonNegativeInt | None",
    "flush_logs_every_n_steps": "PositiveInt | None",
    "resume_from_checkpoint": "AnyPath | None",
    "distributed_backend": f"Literal{[*_STRATEGIES]} | None",
    **dict.fromkeys(
        "checkpoint_callback terminate_on_nan replace_sampler_ddp find_unused_parameters".split(), "bool | None"
    ),
}

# Arguments of Lightning 1.4 that have a successor.
RENAMED_ARGS = frozenset(
    """gpus num_processes tpu_cores checkpoint_callback progress_bar_refresh_rate weights_summary terminate_on_nan
    replace_sampler_ddp resume_from_checkpoint reload_dataloaders_every_epoch distributed_backend
    flush_logs_every_n_steps find_unused_parameters""".split()
)

# Arguments of Lightning 1.4 without a successor: accepted, then named in one warning.
DROPPED_ARGS = frozenset(
    """amp_backend amp_level auto_lr_find auto_scale_batch_size auto_select_gpus enable_autocast ipus log_gpu_memory
    move_metrics_to_cpu multiple_trainloader_mode prepare_data_per_node process_position stochastic_weight_avg
    track_grad_norm truncated_bptt_steps weights_save_path""".split()
)

TRAINER_ARGS = frozenset(TRAINER_TYPES) - RENAMED_ARGS
KNOWN_ARGS = TRAINER_ARGS | RENAMED_ARGS | DROPPED_ARGS

_SIMPLE_RENAMES = {
    "checkpoint_callback": "enable_checkpointing",
    "terminate_on_nan": "detect_anomaly",
    "replace_sampler_ddp": "use_distributed_sampler",
}
# Lightning's form of a time, and its units as a mapping
_TIME, _UNITS = re.compile(r"\s*\d+(:\d+){3}\s*"), ("days", "hours", "minutes", "seconds", "weeks", "milliseconds")


def misfit_of(name: str, value: Any) -> str:
    """Return a message with a remedy if the Trainer does not accept a value of an argument, else an empty string."""
    annotation = TRAINER_TYPES.get(name, "Any")
    if problem := mismatch(annotation, value):
        choices = annotation.partition("[")[2].split("'")[1::2] if annotation.startswith("Literal") else ()
        return f"{problem}.{did_you_mean(value, choices) or ' Correct the value'}"
    if name == "strategy" and not _STRATEGY.fullmatch(value) and (hint := did_you_mean(value, _STRATEGIES)):
        return f"expected a strategy of Lightning, got {value!r}.{hint}"  # others may be registered by own code
    if name in ("devices", "gpus"):
        try:
            parse_gpus(value)
        except (TypeError, ValueError):
            expected = "expected device indices ('0,' or '0,1') or a count (2)"
            return "" if value == "auto" else f"{expected}, got {value!r}. Correct it"
    if name in ("max_time", "val_check_interval"):
        is_time = not isinstance(value, str) or _TIME.fullmatch(value)
        if not is_time or (isinstance(value, Mapping) and not set(value) <= set(_UNITS)):
            expected = "expected a time ('00:12:00:00', days:hours:minutes:seconds, or {hours: 12})"
            return f"{expected}, got {value!r}. Correct it"
    return ""


@dataclass
class TrainerSettings:
    """Trainer arguments of Lightning 2, and former arguments that are handled elsewhere.

    Attributes:
        arguments: keyword arguments of ``pytorch_lightning.Trainer``.
        resume_from_checkpoint: checkpoint to continue from, if given.
        refresh_rate: ``progress_bar_refresh_rate``, if given.
        flush_every: ``flush_logs_every_n_steps``, if given.
        find_unused: ``find_unused_parameters``, for several devices.
        dropped: arguments that have no effect any more.
    """

    arguments: dict[str, Any] = field(default_factory=dict)
    resume_from_checkpoint: str | None = None
    refresh_rate: int | None = None
    flush_every: int | None = None
    find_unused: bool = False
    dropped: list[str] = field(default_factory=list)


def translate_trainer_args(given: Mapping[str, Any]) -> TrainerSettings:
    """Map Trainer arguments of Lightning 1.4 or 2 to those of Lightning 2.

    Args:
        given: argument name -> value; every name is in ``KNOWN_ARGS``.

    Returns:
        The settings; new names take precedence if old and new ones are given together.
    """
    settings = TrainerSettings(
        resume_from_checkpoint=given.get("resume_from_checkpoint"),
        flush_every=given.get("flush_logs_every_n_steps"),
        find_unused=bool(given.get("find_unused_parameters")),
    )
    today = settings.arguments
    for name, value in given.items():
        if name in _SIMPLE_RENAMES:
            today[_SIMPLE_RENAMES[name]] = bool(value)
        elif name in DROPPED_ARGS:
            settings.dropped.append(name)
        elif name not in RENAMED_ARGS:
            today[name] = value
    _translate_devices(given, today)
    if "weights_summary" in given:
        today.setdefault("enable_model_summary", given["weights_summary"] not in (None, "None", False))
    if given.get("reload_dataloaders_every_epoch"):
        today.setdefault("reload_dataloaders_every_n_epochs", 1)
    rate = given.get("progress_bar_refresh_rate")
    if rate == 0:
        today.setdefault("enable_progress_bar", False)
    else:
        settings.refresh_rate = rate
    if "precision" in today:
        today["precision"] = _PRECISIONS.get(str(today["precision"]), today["precision"])
    if today.get("max_steps", 0) is None:
        today["max_steps"] = -1
    if today.get("accumulate_grad_batches", 1) is None:
        del today["accumulate_grad_batches"]
    for name in {"max_steps", "min_steps", "max_epochs", "min_epochs"} & set(today):
        today[name] = int(today[name]) if isinstance(today[name], float) else today[name]  # 1e5
    return settings


def _translate_devices(given: Mapping[str, Any], today: dict[str, Any]) -> None:
    """Translate ``gpus``, ``num_processes``, ``tpu_cores`` and strategy names given as ``accelerator``."""
    old_strategy = given.get("distributed_backend") or given.get("accelerator")
    if str(old_strategy) in _STRATEGIES:
        today.pop("accelerator", None)
        today.setdefault("strategy", _STRATEGIES[str(old_strategy)])
    if given.get("tpu_cores"):
        today.setdefault("accelerator", "tpu")
        today.setdefault("devices", given["tpu_cores"])
    if "gpus" in given:
        devices = parse_gpus(given["gpus"])
        today.setdefault("accelerator", "gpu" if devices else "cpu")
        if devices:
            today.setdefault("devices", devices)
    if (given.get("num_processes") or 1) > 1 and "devices" not in today:
        today.setdefault("accelerator", "cpu")
        today["devices"] = given["num_processes"]
    if isinstance(today.get("devices"), str) and today["devices"] not in ("auto", "-1"):
        today["devices"] = parse_gpus(today["devices"]) or "auto"


def parse_gpus(value: Any) -> list[int] | int | None:
    """Parse ``gpus`` of Lightning 1.4: ``"0,"`` and ``"0,1"`` are indices, a number is a count.

    Args:
        value: value in the config or on the command line.

    Returns:
        Device indices, a device count (-1: all), or ``None`` for the CPU.

    Raises:
        ValueError: the text is neither a number nor a list of numbers.
    """
    if value is None or value is False:
        return None
    if isinstance(value, (list, tuple)):
        return [int(index) for index in value] or None
    text = str(value).strip()
    if "," in text:
        return [int(index) for index in text.split(",") if index.strip()] or None
    return int(text) or None if text else None
