"""The Lightning Trainer of a run: devices, loggers and callbacks."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.accelerators import AcceleratorRegistry
from pytorch_lightning.strategies import DDPStrategy

from ldm.legacy import translate
from ldm.runs.checkpoint_io import AtomicCheckpointIO
from ldm.runs.folder import RunFolder
from ldm.training.accumulation import AccumulationWindows, WindowLoop
from ldm.training.allocator import keep_freed_memory
from ldm.training.callbacks.defaults import build_callbacks, monitors_of, scores_for
from ldm.training.callbacks.monitor_check import MonitorCheck
from ldm.training.callbacks.non_finite import NonFiniteGuard
from ldm.training.callbacks.speed_bar import SpeedBar
from ldm.training.callbacks.step_seed import StepSeed
from ldm.training.checkpoints import build_checkpoints
from ldm.training.compiling import compiling_callbacks
from ldm.training.loggers import build_loggers
from ldm.training.plan import Plan
from ldm.training.resume import ChangedSettings
from ldm.util import ConfigError

logger = logging.getLogger(__name__)


@dataclass
class Devices:
    """Devices of a run, used by both the learning rate and the Trainer.

    Attributes:
        accelerator: cpu, gpu, mps, tpu or auto.
        devices: a count, indices, or ``"auto"``.
        count: number of devices of all nodes.
    """

    accelerator: str
    devices: Any
    count: int


def choose_devices(arguments: Mapping[str, Any]) -> Devices:
    """Select devices from Trainer arguments; one device unless more are requested.

    If a GPU is requested on a machine without one, the CPU is used, with one warning.

    Raises:
        ConfigError: another accelerator, or more GPUs than there are, are requested.
    """
    accelerator = str(arguments.get("accelerator", "auto"))
    devices = arguments.get("devices", "auto")
    has_gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
    if accelerator in ("gpu", "cuda") and not has_gpu:
        logger.warning("a GPU is requested, but torch finds none: training on the CPU")
        accelerator, devices = "cpu", 1
    is_known = accelerator in AcceleratorRegistry
    if is_known and not AcceleratorRegistry[accelerator]["accelerator"].is_available():
        message = f"expected an accelerator of this machine, got {accelerator!r}. Use cpu or gpu"
        raise ConfigError(f"lightning.trainer.accelerator: {message}")
    if accelerator == "auto":
        accelerator = "gpu" if has_gpu else "cpu"
    if devices in ("auto", None):
        devices = 1
    if str(devices) == "-1":
        count = max(1, torch.cuda.device_count()) if accelerator in ("gpu", "cuda") else 1
    else:
        count = len(devices) if isinstance(devices, (list, tuple)) else int(devices)
        wanted = max(devices) + 1 if isinstance(devices, (list, tuple)) else count
        if accelerator in ("gpu", "cuda") and wanted > (most := torch.cuda.device_count() or 1):
            message = f"expected at most {most} GPUs, those of this machine, got {devices}. Request fewer"
            raise ConfigError(f"lightning.trainer.devices: {message}")
    return Devices(accelerator, devices, count * int(arguments.get("num_nodes") or 1))


def choose_precision(arguments: Mapping[str, Any], devices: Devices) -> str:
    """Return ``precision`` of Trainer arguments; ``auto`` is bf16-mixed where the hardware computes in bfloat16."""
    given = str(arguments.get("precision") or "32-true")
    if given != "auto":
        return given
    if devices.accelerator in ("gpu", "cuda"):
        is_fast = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    else:
        is_fast = devices.accelerator == "cpu" and _cpu_has_bfloat16()
    chosen = "bf16-mixed" if is_fast else "32-true"
    logger.info("precision %s (auto)", chosen)
    return chosen


def _cpu_has_bfloat16() -> bool:
    """Return whether the processor multiplies bfloat16 matrices; False if torch does not report it."""
    try:
        found = torch.cpu.get_capabilities()
    except AttributeError:  # before torch 2.11
        return False
    return bool(found.get("amx_bf16") or found.get("avx512_bf16"))


def build_trainer(
    plan: Plan, devices: Devices, model: pl.LightningModule, folder: RunFolder, callbacks: Sequence[pl.Callback] = ()
) -> pl.Trainer:
    """Build the Trainer.

    Args:
        plan: Trainer arguments, config and seed of the run.
        devices: where to run.
        model: sets the monitored metric, and whether optimization is manual.
        folder: the run's folder.
        callbacks: callbacks of the caller.

    Raises:
        ConfigError: Lightning rejects the arguments.
    """
    settings, lightning, described = plan.settings, plan.config.section("lightning"), plan.config.section("model")
    arguments = dict(settings.arguments)
    windows = AccumulationWindows(int(arguments.get("accumulate_grad_batches") or 1))
    _adapt_to_manual_optimization(arguments, model)
    arguments.update(accelerator=devices.accelerator, devices=devices.devices)
    arguments["precision"] = choose_precision(arguments, devices)
    if devices.accelerator in ("gpu", "cuda"):  # sizes are fixed: the fastest convolutions are searched once
        arguments.setdefault("benchmark", not arguments.get("deterministic"))
    elif devices.accelerator == "cpu":
        keep_freed_memory()
    if devices.count > 1 and arguments.get("strategy", "auto") in ("auto", "ddp", None):
        find_unused = settings.find_unused or not model.automatic_optimization
        arguments["strategy"] = DDPStrategy(find_unused_parameters=find_unused)
    callbacks = [StepSeed(plan.seed), *compiling_callbacks(lightning), windows, ChangedSettings(plan), *callbacks]
    scores, checkpoints = None, []
    if arguments.get("enable_checkpointing", True):
        callbacks += [NonFiniteGuard(str(folder.checkpoints)), MonitorCheck()]
        _, params = translate(described["target"], described.get("params"))
        scores = scores_for(monitors_of(lightning, model), params.get("eval_name"))
        has_validation = bool(plan.data_params.get("validation"))
        checkpoints = build_checkpoints(lightning.get("modelcheckpoint"), model, folder, has_validation)
    callbacks += build_callbacks(lightning.get("callbacks") or {}, folder, scores)
    callbacks += checkpoints  # last: some are selected by scores that the callbacks above log
    if arguments.get("enable_progress_bar", True):
        callbacks.append(SpeedBar(refresh_rate=settings.refresh_rate or 1))
    arguments.setdefault("enable_model_summary", False)
    arguments.setdefault("use_distributed_sampler", False)
    arguments["default_root_dir"] = str(folder.path)
    arguments["callbacks"] = callbacks
    wandb = {"project": plan.options.project, "offline": plan.options.debug}
    arguments["logger"] = build_loggers(lightning.get("logger"), folder, settings.flush_every, **wandb)
    plugins = arguments.get("plugins") or []
    arguments["plugins"] = [*(plugins if isinstance(plugins, (list, tuple)) else [plugins]), AtomicCheckpointIO()]
    try:
        trainer = pl.Trainer(**arguments)
    except (TypeError, ValueError, pl.utilities.exceptions.MisconfigurationException) as error:
        raise ConfigError(f"lightning.trainer: invalid arguments: {error}") from error
    loop = trainer.fit_loop.epoch_loop
    trainer.fit_loop.epoch_loop = WindowLoop(trainer, loop.min_steps, loop.max_steps)
    return trainer


def _adapt_to_manual_optimization(arguments: dict[str, Any], model: pl.LightningModule) -> None:
    """Pass accumulation and clipping to a module with manual optimization; Lightning does not support both."""
    if model.automatic_optimization:
        return
    for name in ("accumulate_grad_batches", "gradient_clip_val"):
        value = arguments.pop(name, None)
        if value is None or (name == "accumulate_grad_batches" and value in (0, 1)):
            continue
        if not hasattr(model, name):
            raise ConfigError(
                f"lightning.trainer.{name}: {type(model).__name__} uses manual optimization and has no {name}. Remove "
                "the key"
            )
        setattr(model, name, value)
