"""Figures of the test pass in ``results.json``."""

from __future__ import annotations

from pytorch_lightning import Callback, LightningModule, Trainer

from ldm.runs.records import update_results

_PREFIX = "figure/"


class ResultsWriter(Callback):
    """Writes every metric logged as ``figure/<name>`` to the ``results.json`` of the run, as ``<name>``."""

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Merge the figures of the test pass into the file."""
        figures = figures_of(trainer)
        if figures and trainer.is_global_zero:
            update_results(trainer.default_root_dir, **figures)


def figures_of(trainer: Trainer) -> dict[str, float]:
    """Return the metrics that were logged as ``figure/<name>``, by name."""
    metrics = trainer.callback_metrics.items()
    return {name.removeprefix(_PREFIX): float(value) for name, value in metrics if name.startswith(_PREFIX)}
