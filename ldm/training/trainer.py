"""The Lightning Trainer a config describes: devices, loggers, callbacks, checkpoints."""

from __future__ import annotations

import datetime
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy

from ldm.config.trainer_args import TrainerSettings
from ldm.runs.checkpoint_io import AtomicCheckpointIO
from ldm.runs.folder import RunFolder
from ldm.training.callbacks.last_checkpoint import LastCheckpoint
from ldm.training.callbacks.non_finite import NonFiniteGuard
from ldm.training.callbacks.speed_bar import SpeedBar
from ldm.training.callbacks.step_seed import StepSeed
from ldm.training.loggers import build_loggers
from ldm.util import ConfigError, instantiate_from_config

logger = logging.getLogger(__name__)

_STEP_MONITOR = "train/step_num"
_MAX_METRICS = re.compile(r"(epoch|step)_num|score|psnr|accuracy")


@dataclass
class Devices:
    """Where training runs, decided once so that the learning rate and the Trainer agree.

    Attributes:
        accelerator: cpu, gpu, mps, tpu or auto.
        devices: a count, indices, or ``"auto"``.
        count: how many devices that is, over all nodes.
    """

    accelerator: str
    devices: Any
    count: int


def choose_devices(arguments: Mapping[str, Any]) -> Devices:
    """Decide the device from Trainer arguments; one device unless more are asked for.

    A GPU asked for on a machine without one is replaced by the CPU, with one warning.
    """
    accelerator = str(arguments.get("accelerator", "auto"))
    devices = arguments.get("devices", "auto")
    if accelerator in ("gpu", "cuda") and not (torch.cuda.is_available() or torch.backends.mps.is_available()):
        logger.warning("a GPU was asked for, but torch finds none on this machine: training on the CPU")
        accelerator, devices = "cpu", 1
    if accelerator == "auto":
        accelerator = "gpu" if torch.cuda.is_available() or torch.backends.mps.is_available() else "cpu"
    if devices in ("auto", None):
        devices = 1
    if str(devices) == "-1":
        count = max(1, torch.cuda.device_count()) if accelerator in ("gpu", "cuda") else 1
    else:
        count = len(devices) if isinstance(devices, (list, tuple)) else int(devices)
    return Devices(accelerator, devices, count * int(arguments.get("num_nodes") or 1))


def build_trainer(
    settings: TrainerSettings,
    devices: Devices,
    lightning: Mapping[str, Any],
    model: pl.LightningModule,
    folder: RunFolder,
    seed: int,
    extra_callbacks: list[pl.Callback],
    has_validation: bool = True,
    **wandb: Any,
) -> pl.Trainer:
    """Build the Trainer.

    Args:
        settings: translated Trainer arguments.
        devices: where to run.
        lightning: the config's ``lightning`` section.
        model: decides the monitored metric and whether optimisation is manual.
        folder: the run's folder.
        seed: the run's seed.
        extra_callbacks: callbacks of the caller.
        has_validation: whether there are validation data to compute a ``val/...`` metric from.
        **wandb: arguments for Weights & Biases.

    Raises:
        ConfigError: Lightning refuses the arguments.
    """
    arguments = dict(settings.arguments)
    _adapt_to_manual_optimisation(arguments, model)
    arguments.update(accelerator=devices.accelerator, devices=devices.devices)
    if devices.count > 1 and arguments.get("strategy", "auto") in ("auto", "ddp", None):
        unused = not model.automatic_optimization or bool(getattr(model, "find_unused_parameters", False))
        arguments["strategy"] = DDPStrategy(find_unused_parameters=unused)
    callbacks = [StepSeed(seed), *extra_callbacks]
    if arguments.get("enable_checkpointing", True):
        callbacks += [NonFiniteGuard(str(folder.checkpoints))]
        callbacks += build_checkpoints(lightning.get("modelcheckpoint"), model, folder, has_validation)
    callbacks += build_callbacks(lightning.get("callbacks") or {}, folder)
    if arguments.get("enable_progress_bar", True):
        callbacks.append(SpeedBar(refresh_rate=settings.refresh_rate or 1))
    arguments.setdefault("enable_model_summary", False)
    arguments.setdefault("use_distributed_sampler", False)
    arguments["default_root_dir"] = str(folder.path)
    arguments["callbacks"] = callbacks
    arguments["logger"] = build_loggers(lightning.get("logger"), folder, settings.flush_every, **wandb)
    arguments["plugins"] = [*_as_list(arguments.get("plugins")), AtomicCheckpointIO()]
    try:
        return pl.Trainer(**arguments)
    except (TypeError, ValueError, pl.utilities.exceptions.MisconfigurationException) as error:
        raise ConfigError(f"lightning.trainer: Lightning refuses these arguments: {error}") from error


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def _adapt_to_manual_optimisation(arguments: dict[str, Any], model: pl.LightningModule) -> None:
    """Hand accumulation and clipping to a module that steps its optimizers itself; Lightning forbids both then."""
    if model.automatic_optimization:
        return
    for name in ("accumulate_grad_batches", "gradient_clip_val"):
        value = arguments.pop(name, None)
        if value in (None, 0, 1) and name == "accumulate_grad_batches" or value is None:
            continue
        if not hasattr(model, name):
            raise ConfigError(
                f"lightning.trainer.{name}: {type(model).__name__} steps its optimizers itself and has no {name}; "
                "leave the key out"
            )
        setattr(model, name, value)


def build_checkpoints(
    config: Mapping[str, Any] | None, model: pl.LightningModule, folder: RunFolder, has_validation: bool
) -> list[pl.Callback]:
    """Return the callbacks that write ``last.ckpt`` and the numbered checkpoints.

    ``every_n_train_steps`` and ``train_time_interval`` of ``lightning.modelcheckpoint.params`` say how fresh
    ``last.ckpt`` is kept. Numbered files follow the epochs, unless ``filename`` carries ``{step}``.
    """
    params = dict((config or {}).get("params") or {})
    if "period" in params:  # its name in Lightning 1.4
        params["every_n_epochs"] = params.pop("period")
    monitor = params.pop("monitor", getattr(model, "monitor", None))
    if monitor and monitor.startswith("val") and not has_validation:
        logger.warning("%s is monitored, but there are no validation data: keeping the newest checkpoint", monitor)
        monitor = None
    params = {"dirpath": str(folder.checkpoints), "filename": "{epoch:06}", "verbose": False, **params}
    if monitor == _STEP_MONITOR:
        params = {**params, "filename": "{step:09}", "every_n_train_steps": 2000, **_steps_given(config)}
    elif monitor:
        params = {"save_top_k": 3, "mode": "max" if _MAX_METRICS.search(monitor) else "min", **params}
    steps = params.get("every_n_train_steps")
    interval = params.pop("train_time_interval", None)
    if "{step" not in params["filename"]:
        params.pop("every_n_train_steps", None)
    last = LastCheckpoint(str(folder.last), steps, *([] if interval is None else [_seconds(interval)]))
    keeps_last = params.pop("save_last", True)
    numbered = instantiate_from_config(
        {
            "target": (config or {}).get("target", "pytorch_lightning.callbacks.ModelCheckpoint"),
            "params": {**params, "monitor": monitor, "save_last": False},
        }
    )
    return [numbered, last] if keeps_last else [numbered]


def _steps_given(config: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return what a config's ``params`` say about steps and file names."""
    params = (config or {}).get("params") or {}
    return {key: params[key] for key in ("filename", "every_n_train_steps") if key in params}


def _seconds(interval: Any) -> float:
    """Read a time interval: seconds, ``{minutes: 5}``, or ``"HH:MM:SS"``."""
    if isinstance(interval, Mapping):
        return datetime.timedelta(**interval).total_seconds()
    if isinstance(interval, str) and ":" in interval:
        parts = [float(part) for part in interval.split(":")]
        return sum(part * 60**power for power, part in enumerate(reversed(parts)))
    return float(interval)


def default_callbacks() -> dict[str, dict[str, Any]]:
    """Return the callbacks every run has, by the names under which a config may change them."""
    return {
        "image_logger": {
            "target": "ldm.training.callbacks.image_logger.ImageLogger",
            "params": {"batch_frequency": 750, "max_images": 4, "clamp": True},
        },
        "learning_rate_logger": {
            "target": "pytorch_lightning.callbacks.LearningRateMonitor",
            "params": {"logging_interval": "step"},
        },
        "cuda_callback": {"target": "ldm.training.callbacks.cuda.CUDACallback", "params": {}},
        "results_writer": {"target": "ldm.training.callbacks.results.ResultsWriter", "params": {}},
        "representation_writer": {"target": "ldm.evaluation.representation.RepresentationWriter", "params": {}},
    }


def _named_defaults(folder: RunFolder) -> dict[str, dict[str, Any]]:
    """Return defaults of callbacks that exist only when a config names them."""
    return {
        "metrics_over_trainsteps_checkpoint": {
            "target": "pytorch_lightning.callbacks.ModelCheckpoint",
            "params": {
                "dirpath": str(folder.checkpoints / "trainstep_checkpoints"),
                "filename": "{epoch:06}-{step:09}",
                "verbose": True,
                "save_top_k": -1,
                "every_n_train_steps": 10000,
                "save_weights_only": True,
            },
        }
    }


def build_callbacks(config: Mapping[str, Any], folder: RunFolder) -> list[pl.Callback]:
    """Merge ``lightning.callbacks`` over the defaults by name and build them; ``null`` leaves one out.

    Raises:
        ConfigError: an entry that is no default has no target, or its arguments do not fit.
    """
    merged: dict[str, Any] = default_callbacks()
    optional = _named_defaults(folder)
    for name, entry in config.items():
        if entry is None:
            merged.pop(name, None)
            continue
        base = merged.get(name) or optional.get(name) or {}
        merged[name] = {**base, **entry, "params": {**base.get("params", {}), **(entry.get("params") or {})}}
    callbacks = []
    for name, entry in merged.items():
        if str(entry.get("target", "")).rpartition(".")[2] == "SetupCallback":
            continue  # every run has its own, made by the command line
        if str(entry.get("target", "")).rpartition(".")[2] == "ModelCheckpoint":  # Lightning would choose another place
            entry = {**entry, "params": {"dirpath": str(folder.checkpoints), **(entry.get("params") or {})}}
        try:
            callbacks.append(instantiate_from_config(entry))
        except ConfigError as error:
            raise ConfigError(f"lightning.callbacks.{name}: {error}") from error
    return callbacks
