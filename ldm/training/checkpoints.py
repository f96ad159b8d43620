"""Checkpoint callbacks of a run, and the direction of monitored metrics."""

from __future__ import annotations

import datetime
import logging
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl

from ldm.config.validation import CHECKPOINT
from ldm.legacy import translate
from ldm.runs.folder import RunFolder
from ldm.training.callbacks.last_checkpoint import LastCheckpoint
from ldm.util import instantiate_from_config

logger = logging.getLogger(__name__)

_STEP_MONITOR = "train/step_num"
_WORDS = {"min": ("loss", "error", "mse", "lpips", "fid"), "max": ("psnr", "ssim", "accuracy", "score", "_num")}


def direction_of(monitor: str) -> str:
    """Return "max" or "min": the direction in which a monitored metric improves.

    Disentanglement scores have it in the registry of metrics. Losses and errors improve downwards; PSNR, accuracies,
    scores, ``epoch_num`` and ``step_num`` upwards. For other names the result is "min", with a log line.
    """
    from ldm.metrics.registry import monitor_direction

    guesses = (mode for mode, words in _WORDS.items() if any(word in monitor.lower() for word in words))
    direction = monitor_direction(monitor) or next(guesses, None)
    if direction is None:
        logger.info("the direction of %s is unknown: checkpoints of its smallest values are kept. Set `mode`", monitor)
    return direction or "min"


def build_callback(config: Mapping[str, Any]) -> pl.Callback:
    """Build the callback of a config; Lightning's ``ModelCheckpoint`` is replaced by this package's."""
    today, params = translate(str(config.get("target")), config.get("params") or {})
    if today == CHECKPOINT:
        config = {"target": "ldm.training.callbacks.model_checkpoint.ModelCheckpoint", "params": params}
    return instantiate_from_config(config, "callback")


def with_direction(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a callback with a monitor, ``mode`` included."""
    if params.get("monitor") and "mode" not in params:
        return {**params, "mode": direction_of(params["monitor"])}
    return dict(params)


def build_checkpoints(
    config: Mapping[str, Any] | None, model: pl.LightningModule, folder: RunFolder, has_validation: bool
) -> list[pl.Callback]:
    """Return the callbacks that write ``last.ckpt`` and the numbered checkpoints.

    ``every_n_train_steps`` and ``train_time_interval`` of ``lightning.modelcheckpoint.params`` set the interval of
    ``last.ckpt``. Numbered files are written at the end of epochs, unless ``filename`` contains ``{step}``.
    """
    given = dict((config or {}).get("params") or {})
    monitor = given.pop("monitor", getattr(model, "monitor", None))
    if monitor and monitor.startswith("val") and not has_validation:
        logger.warning("%s is monitored, but there are no validation data: the newest checkpoint is kept", monitor)
        monitor = None
    params = {"dirpath": str(folder.checkpoints), "filename": "{epoch:06}", "verbose": False, **given}
    if monitor == _STEP_MONITOR:
        params = {**params, "filename": "{step:09}", "every_n_train_steps": 2000, **given}
    elif monitor:
        params = with_direction({"save_top_k": 3, **params, "monitor": monitor})
    steps = params.get("every_n_train_steps") or None
    interval = params.pop("train_time_interval", None)
    if "{step" not in params["filename"]:
        params.pop("every_n_train_steps", None)
    last = LastCheckpoint(str(folder.last), steps, *([] if interval is None else [_seconds(interval)]))
    keeps_last = params.pop("save_last", True)
    target = (config or {}).get("target", CHECKPOINT)
    numbered = build_callback({"target": target, "params": {**params, "monitor": monitor, "save_last": False}})
    return [numbered, last] if keeps_last else [numbered]


def _seconds(interval: Any) -> float:
    """Parse a time interval: seconds, ``{minutes: 5}``, ``"HH:MM:SS"`` or ``"DD:HH:MM:SS"``."""
    if isinstance(interval, Mapping):
        return datetime.timedelta(**interval).total_seconds()
    if isinstance(interval, str) and ":" in interval:
        parts = [float(part) for part in interval.split(":")]
        return sum(part * unit for part, unit in zip(reversed(parts), (1, 60, 3600, 86400)))
    return float(interval)
