"""One run from its plan to its record: build, train, test, write down how it ended."""

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
from pytorch_lightning.utilities.model_helpers import is_overridden

from ldm.config.build import build
from ldm.config.loading import save_config
from ldm.runs.folder import RunFolder, collect_versions, git_state, new_run_folder, now_text, utc_now
from ldm.training.callbacks.results import PREFIX
from ldm.training.callbacks.setup import SetupCallback
from ldm.training.plan import Plan, scale_learning_rate
from ldm.training.trainer import build_trainer, choose_devices
from ldm.util import ConfigError, Interrupted, UserError

logger = logging.getLogger(__name__)

# Tells the processes Lightning starts for further devices which folder the first one made.
_RUN_DIR_VARIABLE = "LDM_RUN_DIR"


def run(plan: Plan) -> RunFolder:
    """Build, train and test; the run folder is made only when everything could be built.

    Returns:
        The run's folder.

    Raises:
        ConfigError, UserError: with a message for the user.
        Interrupted: stopped by a signal after saving.
    """
    pl.seed_everything(plan.seed, workers=True, verbose=False)
    devices = choose_devices(plan.settings.arguments)
    if plan.settings.dropped:
        logger.warning("Trainer arguments without meaning today are ignored: %s", ", ".join(plan.settings.dropped))
    model = build(plan.config, "model")
    if plan.options.train and plan.resume is None and plan.settings.resume_from_checkpoint is None:
        require_weights(model)
    rate, formula = scale_learning_rate(plan, devices.count)
    if rate is not None:
        model.learning_rate = rate
    logger.info("learning rate %s", formula)
    data = build(plan.config, "data")
    folder, stamp = _open_folder(plan)
    _save_configs(plan, folder, stamp, formula)
    record = _record(plan, formula)
    earlier = float(plan.resume.record.get("seconds") or 0.0) if plan.resume else 0.0
    setup = SetupCallback(str(folder.path), record, plan.config.content, earlier)
    trainer = build_trainer(
        plan.settings,
        devices,
        plan.config.section("lightning"),
        model,
        folder,
        plan.seed,
        [setup],
        has_validation=bool(plan.trains_on.get("validation")),
        project=plan.options.project,
        offline=plan.options.debug,
    )
    with _log_file(folder):
        logger.info("run folder %s", folder.path)
        _fit_and_test(plan, trainer, model, data, setup)
    return folder


def require_weights(model: torch.nn.Module) -> None:
    """Ask every part that was built without the pretrained weights it needs, before anything is written.

    Raises:
        UserError: weights are missing; says where they belong.
    """
    for module in model.modules():
        if hasattr(module, "require_weights"):
            module.require_weights()


def _is_child() -> bool:
    """Whether this process serves a further device; such a one writes no files."""
    return int(os.environ.get("LOCAL_RANK", 0)) > 0


def _open_folder(plan: Plan) -> tuple[RunFolder, str]:
    """Return the run's folder and the time in the names of its configs."""
    stamp = now_text()
    if _is_child() and _RUN_DIR_VARIABLE in os.environ:
        folder = RunFolder(Path(os.environ[_RUN_DIR_VARIABLE]))
    elif plan.resume is not None:
        folder = plan.resume.folder
    else:
        folder = new_run_folder(plan.options.log_root, plan.name, stamp)
    os.environ[_RUN_DIR_VARIABLE] = str(folder.path)
    return folder, stamp


def _save_configs(plan: Plan, folder: RunFolder, stamp: str, formula: str) -> None:
    """Write the resolved config as LDM does: model and data in one file, lightning in the other."""
    if _is_child() or not plan.options.train:
        return
    content = dict(plan.config.content)
    lightning = content.pop("lightning", None) or {}
    save_config(folder.configs / f"{stamp}-project.yaml", content, f"learning rate {formula}")
    save_config(folder.configs / f"{stamp}-lightning.yaml", {"lightning": lightning})


def _record(plan: Plan, formula: str) -> dict[str, Any]:
    """Return what ``run.json`` and every checkpoint say about the run."""
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
    """Also write our log messages to the run's ``log.txt``."""
    if _is_child():
        yield
        return
    handler = logging.FileHandler(folder.path / "log.txt", encoding="utf-8")
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
    """Train, test if there is something to test on, and record how it ended."""
    checkpoint = str(plan.resume.checkpoint) if plan.resume else plan.settings.resume_from_checkpoint
    status = "failed"
    try:
        if plan.options.train:
            trainer.fit(model, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        if not plan.options.no_test and plan.trains_on.get("test") and is_overridden("test_step", model):
            loaded = None if plan.options.train else checkpoint
            trainer.test(model, datamodule=data, ckpt_path=loaded, weights_only=True, verbose=False)
            _log_figures(trainer)
        elif not plan.options.train:
            raise UserError("nothing to do: no -t, and the config has no data.params.test or the model no test_step")
        status = "finished"
    except (Interrupted, KeyboardInterrupt):
        status = "interrupted"
        raise
    except SystemExit as error:  # Lightning's answer to a second Ctrl-C
        status = "interrupted"
        raise KeyboardInterrupt from error
    except MisconfigurationException as error:
        raise ConfigError(f"Lightning cannot run this config: {error}") from error
    except KeyError as error:  # Lightning's way to say that a checkpoint cannot be continued
        if "checkpoint contains only the model" not in str(error):
            raise
        raise UserError(
            f"{checkpoint} holds weights without the state of a training, so no run can be continued from it. Start "
            f"one from the weights: python main.py --base CONFIG.yaml -t model.params.ckpt_path={checkpoint}"
        ) from error
    except torch.OutOfMemoryError as error:
        raise UserError(_memory_advice(plan, error)) from error
    finally:
        if trainer.is_global_zero and plan.options.train:
            setup.close(status)


def _log_figures(trainer: pl.Trainer) -> None:
    """Say what a test pass measured."""
    metrics = trainer.callback_metrics
    figures = {name.removeprefix(PREFIX): value for name, value in metrics.items() if name.startswith(PREFIX)}
    shown = "  ".join(f"{name} {value:.4g}" for name, value in (figures or metrics).items())
    if shown:
        logger.info("test: %s", shown)


def _memory_advice(plan: Plan, error: Exception) -> str:
    """Say which knobs there are and where they stand."""
    batch = plan.trains_on.get("batch_size")
    arguments = plan.settings.arguments
    return (
        f"out of memory ({str(error).splitlines()[0]}). Now: data.params.batch_size={batch}, "
        f"accumulate_grad_batches={arguments.get('accumulate_grad_batches', 1)}, "
        f"precision={arguments.get('precision', '32-true')}. Halve the batch size and double "
        "--accumulate_grad_batches for the same result, or try --precision bf16-mixed"
    )
