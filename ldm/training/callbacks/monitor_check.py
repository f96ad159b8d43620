"""Early check that monitored metrics are logged."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Checkpoint, EarlyStopping, ModelCheckpoint
from pytorch_lightning.utilities.model_helpers import is_overridden

from ldm.util import ConfigError, did_you_mean

logger = logging.getLogger(__name__)

_KNOWN_CODE = ("ldm.", "pytorch_lightning.", "lightning.")


@runtime_checkable
class LogsLater(Protocol):
    """A callback that logs metrics on a schedule of its own."""

    @property
    def logged_names(self) -> Sequence[str]:
        """Names of the metrics."""


class MonitorCheck(Checkpoint):
    """Raises an error for a monitored metric that is not logged.

    Metrics of the validation are checked after the sanity validation, metrics of the training after its first step. If
    the run contains code from outside this package, which can log a metric later, these checks only warn, and the end
    of the first validation or epoch decides.

    A checkpoint callback, because Lightning runs those after all others; it has to be the first of them.
    """

    def __init__(self) -> None:
        self._batches = 0  # that this process has begun

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the metrics of the sanity validation."""
        self._check(trainer, "val", _is_known(pl_module, trainer))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the metrics of a validation."""
        if not trainer.sanity_checking:
            self._check(trainer, "val")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Check the metrics of the first step, also of a resumed run."""
        self._batches += 1
        if self._batches == 2 and _is_known(pl_module, trainer):
            self._check(trainer, "train", suffixes=("_epoch",))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the metrics of an epoch, before a checkpoint is selected by them."""
        self._check(trainer, "train")

    def _check(self, trainer: Trainer, prefix: str, is_certain: bool = True, suffixes: tuple[str, ...] = ()) -> None:
        """Report monitors with a prefix that are not logged; those with one of the suffixes are logged later."""
        for message in _missing(trainer, set(trainer.callback_metrics), prefix, suffixes):
            if is_certain:
                raise ConfigError(f"{message}. Set `monitor` to a logged metric")
            deadline = "validation" if prefix == "val" else "epoch"
            logger.warning("%s. It has to be logged by the end of the first %s", message, deadline)


def check_monitors(trainer: Trainer, pl_module: LightningModule, traced: Mapping[str, set[str]]) -> None:
    """Check monitors against the metrics of steps that were traced before training.

    Metrics that a model logs outside of its steps cannot be traced; they are checked by :class:`MonitorCheck`.

    Args:
        trainer: has the callbacks.
        pl_module: the model.
        traced: "train" and "val" -> metrics that the steps log.

    Raises:
        ConfigError: a monitored metric is not logged.
    """
    if not _is_known(pl_module, trainer):
        return
    for split, names in traced.items():
        step = {"train": "train", "val": "validation"}[split]
        hooks = (f"on_{step}_epoch_end", f"on_{step}_end", f"on_{step}_batch_end")
        if not any(is_overridden(hook, pl_module) for hook in hooks):
            for message in _missing(trainer, names, split, ("_step", "_epoch")):
                raise ConfigError(f"{message}. Set `monitor` to a logged metric")


def _missing(trainer: Trainer, known: set[str], prefix: str, suffixes: tuple[str, ...]) -> Iterator[str]:
    """Yield a message for each monitor with a prefix, but no suffix, that is neither known nor logged later."""
    monitors = {each.monitor for each in trainer.callbacks if isinstance(each, (ModelCheckpoint, EarlyStopping))}
    later = [each.logged_names for each in trainer.callbacks if isinstance(each, LogsLater)]
    known = known.union(*later)
    for monitor in sorted(filter(None, monitors)):
        if monitor.startswith(prefix) and monitor not in known and not monitor.endswith(suffixes):
            names = ", ".join(sorted(name for name in known if name.startswith(prefix))) or "no metrics"
            yield f"monitor: expected a logged metric, got {monitor!r}.{did_you_mean(monitor, known)} Logged: {names}"


def _is_known(pl_module: LightningModule, trainer: Trainer) -> bool:
    """Return whether model and callbacks are of this package or of Lightning."""
    return all(type(part).__module__.startswith(_KNOWN_CODE) for part in (pl_module, *trainer.callbacks))
