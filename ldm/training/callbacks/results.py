"""Figures of a run that its model measured in a test pass."""

from __future__ import annotations

import pytorch_lightning as pl

from ldm.runs.folder import update_results

PREFIX = "figure/"


class ResultsWriter(pl.Callback):
    """Keeps every metric a model logs as ``figure/<name>`` in the run's ``results.json``, as ``<name>``."""

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Merge the figures of the finished test pass into the run's."""
        figures = {
            name.removeprefix(PREFIX): float(value)
            for name, value in trainer.callback_metrics.items()
            if name.startswith(PREFIX)
        }
        if figures and trainer.is_global_zero:
            update_results(trainer.default_root_dir, **figures)
