"""A run: build model, data and Trainer, train, test, and record the outcome."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from ldm.config.loading import save_config
from ldm.data.module import DataModuleFromConfig
from ldm.models.diffusion.latent import has_test_pass
from ldm.modules.weights import NeedsWeights
from ldm.runs.disk import full_message, is_full, remove_leftovers, require_writable
from ldm.runs.folder import RunFolder, new_run_folder, now_text
from ldm.runs.lock import exclusive
from ldm.runs.records import RUN_FILE, collect_versions, git_state, utc_now, write_json
from ldm.training.callbacks.results import figures_of
from ldm.training.callbacks.setup import SetupCallback
from ldm.training.compiling import compilation_advice
from ldm.training.loggers import MetricsCSVLogger
from ldm.training.plan import Plan, scale_learning_rate
from ldm.training.preflight import preflight
from ldm.training.resume import explain_misfit
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
    stamp = now_text()
    with _run_folder(plan, stamp) as folder, _log_file(folder) as log:
        earlier = float(plan.resume.record.get("seconds") or 0.0) if plan.resume else 0.0
        about = (str(folder.path), _record(plan, formula), plan.config.content, earlier)
        setup = SetupCallback(*about, on_begin=lambda: _begin(plan, folder, stamp, formula, log))
        trainer = build_trainer(plan, devices, model, folder, [setup])
        is_first = trainer.is_global_zero
        if plan.options.train and not _is_child():
            preflight(plan, trainer, model, data)
        is_owner = is_first and plan.options.train  # a test pass may read a run that is trained
        lock = exclusive(folder.path / ".lock", f"training of {folder.path}") if is_owner else contextlib.nullcontext()
        with lock:
            if is_owner:
                remove_leftovers(folder.path)
            logger.info("run folder %s", folder.path)
            _fit_and_test(plan, trainer, model, data, setup)
    return folder


def _is_child() -> bool:
    """Return whether this process is one for a further device, which writes no files."""
    return int(os.environ.get("LOCAL_RANK", 0)) > 0


@contextlib.contextmanager
def _run_folder(plan: Plan, stamp: str) -> Iterator[RunFolder]:
    """Open the folder of the run; that of a new run is created, and removed if the run fails before its first step."""
    new: list[Path] = []
    if _is_child() and _RUN_DIR_VARIABLE in os.environ:
        folder = RunFolder(Path(os.environ[_RUN_DIR_VARIABLE]))
    elif plan.resume is not None:
        folder = plan.resume.folder
        copy = f"Change the permissions, or continue a copy: cp -r {folder.path} OTHER; python main.py -r OTHER -t"
        require_writable(folder.path, copy)
    else:
        root = Path(plan.options.log_root)
        above = [path for path in (root, *root.parents) if not path.exists()]
        folder = new_run_folder(root, plan.name, stamp)
        new = [folder.path, *above]
    os.environ[_RUN_DIR_VARIABLE] = str(folder.path)
    try:
        yield folder
    except BaseException:
        if new and not folder.configs.is_dir():
            shutil.rmtree(folder.path, ignore_errors=True)
            with contextlib.suppress(OSError):  # not empty: another run has begun there
                for path in new[1:]:
                    path.rmdir()
        raise


def _begin(plan: Plan, folder: RunFolder, stamp: str, formula: str, log: MemoryHandler) -> None:
    """Write what the folder has of a new part of the run: the resolved config as in LDM, the record, the log.

    Model and data are in one config file, lightning in another.
    """
    content = {key: value for key, value in plan.config.content.items() if key != "lightning"}
    save_config(folder.configs / f"{stamp}-project.yaml", content, f"learning rate {formula}")
    save_config(folder.configs / f"{stamp}-lightning.yaml", {"lightning": plan.config.section("lightning")})
    if plan.resume is not None:
        write_json(folder.path / RUN_FILE, plan.resume.record)  # replaces a damaged file
    log.capacity = 0
    log.flush()


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
def _log_file(folder: RunFolder) -> Iterator[MemoryHandler]:
    """Also write log messages of ``ldm`` to the run's ``log.txt``, from the first step on."""
    file = logging.NullHandler() if _is_child() else None
    file = file or logging.FileHandler(folder.path / "log.txt", encoding="utf-8", delay=True)
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handler = MemoryHandler(sys.maxsize, sys.maxsize, file, flushOnClose=False)
    package = logging.getLogger("ldm")
    package.addHandler(handler)
    try:
        yield handler
        handler.flush()
    finally:
        package.removeHandler(handler)
        handler.close()
        file.close()


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
    except OSError as error:
        if not is_full(error):
            raise
        path = trainer.default_root_dir
        raise UserError(full_message(error, [path], f"then continue with: python main.py -r {path} -t")) from error
    except RuntimeError as error:
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise UserError(compilation_advice(error)) from error
        if checkpoint is None or "loading state_dict" not in str(error):
            raise
        raise explain_misfit(error, checkpoint, plan.config.section("model")) from error
    finally:
        if trainer.is_global_zero and plan.options.train:
            setup.close(status)
            for run_logger in trainer.loggers if setup.has_begun else ():
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
