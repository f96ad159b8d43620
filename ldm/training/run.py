"""A run: build model, data and Trainer, train, test, and record the outcome."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from ldm.config.loading import save_config
from ldm.data.module import DataModuleFromConfig
from ldm.models.diffusion.latent import has_test_pass
from ldm.modules.weights import NeedsWeights
from ldm.runs.folder import RunFolder, new_run_folder, now_text
from ldm.runs.records import collect_versions, git_state, utc_now
from ldm.training.callbacks.results import figures_of
from ldm.training.callbacks.setup import SetupCallback
from ldm.training.loggers import MetricsCSVLogger
from ldm.training.plan import Plan, scale_learning_rate
from ldm.training.preflight import preflight
from ldm.training.trainer import build_trainer, choose_devices
from ldm.util import ConfigError, Interrupted, UserError

logger = logging.getLogger(__name__)

# Passes the run folder of the first process to those that Lightning starts for further devices.
_RUN_DIR_VARIABLE = "LDM_RUN_DIR"


def run(plan: Plan) -> RunFolder:
    """Build, check, train and test; the run folder is created after the checks (``ldm.training.preflight``).

    Returns:
        The folder of the run.

    Raises:
        ConfigError, UserError: the run cannot be started or continued.
        Interrupted: stopped by a signal after saving.
    """
    pl.seed_everything(plan.seed, workers=True, verbose=False)
    devices = choose_devices(plan.settings.arguments)
    if plan.settings.dropped:
        logger.warning("ignored Trainer arguments without effect in Lightning 2: %s", ", ".join(plan.settings.dropped))
    model = plan.config.build("model")
    if plan.options.train and plan.resume is None and plan.settings.resume_from_checkpoint is None:
        for module in model.modules():
            if isinstance(module, NeedsWeights):
                module.require_weights()  # before anything is written
    rate, formula = scale_learning_rate(plan, devices.count)
    if rate is not None:
        model.learning_rate = rate
    logger.info("learning rate %s", formula)
    data = plan.config.build("data")
    if plan.options.no_test and isinstance(data, DataModuleFromConfig):
        data.dataset_configs.pop("test", None)  # callbacks check before training that the test pass can be done
    record, earlier = _record(plan, formula), float(plan.resume.record.get("seconds") or 0.0) if plan.resume else 0.0

    def trainer_of(folder: RunFolder) -> tuple[pl.Trainer, SetupCallback]:
        setup = SetupCallback(str(folder.path), record, plan.config.content, earlier)
        return build_trainer(plan, devices, model, folder, [setup]), setup

    stamp = now_text()
    chosen = _choose_folder(plan, stamp)
    trainer, setup = trainer_of(chosen)
    if plan.options.train and not _is_child():
        preflight(plan, trainer, model, data)
    folder = _open_folder(plan, chosen, stamp)
    if folder != chosen:  # created by another run in the meantime
        trainer, setup = trainer_of(folder)
    _save_configs(plan, folder, stamp, formula)
    with _log_file(folder):
        logger.info("run folder %s", folder.path)
        _fit_and_test(plan, trainer, model, data, setup)
    return folder


def _is_child() -> bool:
    """Return whether this process is one for a further device, which writes no files."""
    return int(os.environ.get("LOCAL_RANK", 0)) > 0


def _choose_folder(plan: Plan, stamp: str) -> RunFolder:
    """Return the folder of the run; nothing is created."""
    if _is_child() and _RUN_DIR_VARIABLE in os.environ:
        return RunFolder(Path(os.environ[_RUN_DIR_VARIABLE]))
    return RunFolder(Path(plan.options.log_root, f"{stamp}_{plan.name}")) if plan.resume is None else plan.resume.folder


def _open_folder(plan: Plan, chosen: RunFolder, stamp: str) -> RunFolder:
    """Create the folder of a new run, under another name if the chosen one exists."""
    if plan.resume is None and not (_is_child() and _RUN_DIR_VARIABLE in os.environ):
        chosen = new_run_folder(plan.options.log_root, plan.name, stamp)
    os.environ[_RUN_DIR_VARIABLE] = str(chosen.path)
    return chosen


def _save_configs(plan: Plan, folder: RunFolder, stamp: str, formula: str) -> None:
    """Write the resolved config as in LDM: model and data in one file, lightning in another."""
    if _is_child() or not plan.options.train:
        return
    content = {key: value for key, value in plan.config.content.items() if key != "lightning"}
    save_config(folder.configs / f"{stamp}-project.yaml", content, f"learning rate {formula}")
    save_config(folder.configs / f"{stamp}-lightning.yaml", {"lightning": plan.config.section("lightning")})


def _record(plan: Plan, formula: str) -> dict[str, Any]:
    """Return the record of the run for ``run.json`` and for every checkpoint."""
    earlier = plan.resume.record if plan.resume else {}
    return {
        "name": plan.name,
        "configs": earlier.get("configs") or list(plan.config.files),
        "seed": plan.seed,
        "versions": collect_versions(),
        "git": git_state(),
        "command": list(plan.options.command),
        "learning_rate": formula,
        "fingerprint": plan.fingerprint,
        "started": earlier.get("started") or utc_now(),
    }


@contextlib.contextmanager
def _log_file(folder: RunFolder) -> Iterator[None]:
    """Also write log messages of ``ldm`` to the run's ``log.txt``."""
    handler = logging.NullHandler() if _is_child() else logging.FileHandler(folder.path / "log.txt", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    package = logging.getLogger("ldm")
    package.addHandler(handler)
    try:
        yield
    finally:
        package.removeHandler(handler)
        handler.close()


def _fit_and_test(
    plan: Plan, trainer: pl.Trainer, model: pl.LightningModule, data: pl.LightningDataModule, setup: SetupCallback
) -> None:
    """Train, test if there are test data, and record the outcome."""
    checkpoint = str(plan.resume.checkpoint) if plan.resume else plan.settings.resume_from_checkpoint
    status = "failed"
    try:
        if plan.options.train:
            trainer.fit(model, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        if not plan.options.no_test and plan.data_params.get("test") and has_test_pass(model, trainer.callbacks):
            loaded = None if plan.options.train else checkpoint
            trainer.test(model, datamodule=data, ckpt_path=loaded, weights_only=True, verbose=False)
            figures = figures_of(trainer) or trainer.callback_metrics
            shown = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
            if shown:
                logger.info("test: %s", shown)
        elif not plan.options.train:
            raise UserError(
                "nothing to do: pass -t to train; testing needs data.params.test and a model with test_step()"
            )
        status = "finished"
    except (Interrupted, KeyboardInterrupt):
        status = "interrupted"
        raise
    except SystemExit as error:  # raised by Lightning at a second Ctrl-C
        status = "interrupted"
        raise KeyboardInterrupt from error
    except MisconfigurationException as error:
        raise ConfigError(f"lightning: {error}") from error
    except KeyError as error:  # raised by Lightning for a checkpoint without optimizer states
        if "checkpoint contains only the model" not in str(error):
            raise
        raise UserError(
            f"{checkpoint} contains weights only; cannot resume training from it. To start from the weights: "
            f"python main.py --base CONFIG.yaml -t model.params.ckpt_path={checkpoint}"
        ) from error
    except torch.OutOfMemoryError as error:
        raise UserError(_memory_advice(plan, error)) from error
    finally:
        if trainer.is_global_zero and plan.options.train:
            setup.close(status)
            for run_logger in trainer.loggers:
                if isinstance(run_logger, MetricsCSVLogger):
                    run_logger.draw_losses()


def _memory_advice(plan: Plan, error: Exception) -> str:
    """Return the settings that affect memory, with their values."""
    arguments, batch = plan.settings.arguments, plan.data_params.get("batch_size")
    return (
        f"out of memory ({str(error).splitlines()[0]}). Now: data.params.batch_size={batch}, "
        f"accumulate_grad_batches={arguments.get('accumulate_grad_batches', 1)}, "
        f"precision={arguments.get('precision', '32-true')}. Halve the batch size and double "
        "--accumulate_grad_batches for the same result, or try --precision bf16-mixed"
    )
