"""A callback that scores the representation during training and keeps the best checkpoint by each score."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint

from ldm.data.module import DataModuleFromConfig
from ldm.evaluation.pixel_pca import pixel_axes
from ldm.evaluation.row_encoder import RowEncoder, whole_set
from ldm.evaluation.train_scores.curve import ScoreCurve
from ldm.evaluation.units.information import name_by_information
from ldm.metrics import PROTOCOL_SEED, Metric
from ldm.metrics.protocols import select_metrics
from ldm.models.contexts import evaluating
from ldm.models.contracts import HasRepresentation, HasUnits, Preparable, ScoredOn, require
from ldm.ranges import Count, PositiveInt, Seed
from ldm.runs.records import update_results, write_json
from ldm.util import ConfigError, UserError

logger = logging.getLogger(__name__)

FULL_SCORES = "metrics_sin"  # EncDiff's folder of the scores of scalar units


class ScoreWhileTraining(Checkpoint):
    """Scores the representation of any model with ``encode_representation`` every so many training steps.

    Metrics draw their images from the whole data set, as in the published protocols, and only these are encoded. Scores
    are logged (``val/factor_vae_score``, ``val/dci_disentanglement``, ``val/mig``, ``val/<metric>``) and written to
    ``<run>/scores.csv`` and ``<run>/scores.png``; ``<run>/checkpoints/best_<metric>.ckpt`` is the checkpoint with the
    best score, and ``results.json`` contains the best and the last scores. Lightning calls ``Checkpoint`` callbacks
    last, so that a kept checkpoint contains the whole step.

    Args:
        every_n_train_steps: interval in steps; the last step of training is always scored. ``None`` scores at every
            validation, or at the end of every epoch if there are no validation data.
        metrics: names of metrics (``ldm.metrics.METRICS``).
        protocol: numbers of samples (``ldm.metrics.protocols``).
        settings: metric -> keyword arguments that differ from the protocol's: ``{factor_vae: {num_train: 500}}``.
        final_protocol: also score the last step by this protocol, into ``<run>/metrics_sin/<step>.json``.
        split: whose data set is scored: ``validation`` or ``train``.
        batch_size: images encoded at once.
        keep_best: keep the checkpoint with the best value of each score.
        baseline: also score, once, a PCA of the pixels with as many components as units.
        seed: seed of the metrics' draws; 0 in the published protocols.

    Raises:
        ConfigError: an option is out of range, or a metric or protocol is unknown.
    """

    def __init__(
        self,
        every_n_train_steps: PositiveInt | None = None,
        metrics: Sequence[str] = ("factor_vae", "dci", "mig"),
        protocol: str = "fast",
        settings: Mapping[str, Mapping[str, Any]] | None = None,
        final_protocol: str | None = None,
        split: str = "validation",
        batch_size: Count = 512,
        keep_best: bool = True,
        baseline: bool = False,
        seed: Seed = PROTOCOL_SEED,
    ) -> None:
        if split not in ("validation", "train"):
            raise ConfigError(f"split: expected 'validation' or 'train', got {split!r}")
        self.every_n_train_steps, self.split, self.batch_size = every_n_train_steps, split, batch_size
        self.metrics = _adjusted(select_metrics(protocol, list(metrics)), settings or {})
        self.final_metrics = None if final_protocol is None else select_metrics(final_protocol, list(metrics))
        self.keep_best, self.with_baseline, self.seed = keep_best, baseline, seed
        self.best: dict[str, dict[str, float]] = {}
        self.baseline: dict[str, float] = {}
        self._scored_step = 0
        self._dataset: Any = None
        self._curve = ScoreCurve(Path(), self.metrics)
        self._resumed_at = self._started = 0.0

    @property
    def logged_names(self) -> list[str]:
        """Names of the logged scores, known before the first one."""
        return [f"val/{metric.logged}" for metric in self.metrics.values()]

    def state_dict(self) -> dict[str, Any]:
        """Return the state kept in checkpoints: the best scores, and the baseline's."""
        return {"best": self.best, "baseline": self.baseline}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state of a checkpoint."""
        names = "best", "baseline"
        self.best, self.baseline = ({k: v for k, v in state_dict[n].items() if k in self.metrics} for n in names)

    def check_run(self, data: Any, model: pl.LightningModule) -> None:
        """Choose the data set; raise a ``UserError`` without representation, or with unknown or other factors."""
        require(model, HasRepresentation, "lightning.callbacks: ScoreWhileTraining")
        datasets = data.datasets if isinstance(data, DataModuleFromConfig) else {}
        self._dataset = datasets.get(self.split, datasets.get("train"))
        space = whole_set(self._dataset).space
        expected = model.eval_space if isinstance(model, ScoredOn) else None
        if expected is not None and tuple(expected.factors_num_values) != tuple(space.factors_num_values):
            raise UserError(
                f"model.params.eval_name: expected the factors of the data set, {space}, got {expected}. Name the data "
                "set's factors, or remove eval_name"
            )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check before the first step that scores can be computed, and prepare the representation."""
        self.check_run(trainer.datamodule, pl_module)
        if isinstance(pl_module, Preparable):
            pl_module.prepare_representation(self._dataset)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Continue the curve of an earlier part of the run."""
        self._scored_step = trainer.global_step
        self._curve = ScoreCurve(Path(trainer.default_root_dir), self.metrics)
        self._curve.continue_from(trainer.global_step)
        self._resumed_at, self._started = self._curve.seconds, time.monotonic()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Score on schedule, once per step."""
        if self.every_n_train_steps is not None and trainer.global_step % self.every_n_train_steps == 0:
            self._score_and_log(trainer, pl_module, on_step=True, on_epoch=False)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Score at every validation, if there is no schedule in steps."""
        if self.every_n_train_steps is None and not trainer.sanity_checking:
            self._score_and_log(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Score at every epoch, if there is neither a schedule in steps nor a validation."""
        if self.every_n_train_steps is None and not trainer.enable_validation:
            self._score_and_log(trainer, pl_module)

    def _score_and_log(self, trainer: pl.Trainer, pl_module: pl.LightningModule, **when: bool) -> None:
        """Score a step once, and log the scores for callbacks that monitor them and for the progress bar."""
        if trainer.global_step != self._scored_step:
            pl_module.log_dict(self._score(trainer, pl_module), logger=False, batch_size=1, **when)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Score the last step, also by the final protocol, and record the best and the last scores."""
        if trainer.fast_dev_run or not trainer.global_step:
            return
        if self._scored_step != trainer.global_step:
            self._score(trainer, pl_module)
        if not trainer.is_global_zero or not self._curve.rows:
            return
        run_dir, last = Path(trainer.default_root_dir), self._curve.rows[-1]
        figures = {f"{name}_fast_pixel_pca": score for name, score in self.baseline.items()}
        for name, best in self.best.items():
            figures |= {f"{name}_fast_best": best["score"], f"{name}_fast_best_step": int(best["step"])}
            figures[f"{name}_fast_last"] = last[name]
            logger.info("best %s at step %d", self._text({name: best["score"]}), best["step"])
        update_results(run_dir, **figures)
        if self.final_metrics is not None:
            results = self._measure(pl_module, self.final_metrics)
            path = run_dir / FULL_SCORES / f"{trainer.global_step}.json"
            write_json(path, {self.final_metrics[name].key: result for name, result in results.items()})
            logger.info("wrote the scores of the last step by the final protocol: %s", path)

    def _score(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, float]:
        """Score, write and log; return the scores by their logged names, equal in all processes."""
        step, started = trainer.global_step, time.monotonic()
        scores: dict[str, float] | None = None
        if trainer.is_global_zero:
            scores = self._figures(self._measure(pl_module, self.metrics))
        scores = trainer.strategy.broadcast(scores)
        seconds = time.monotonic() - started
        self._started += seconds  # the curve's time is that of training without scoring
        self._scored_step = step
        improved = [name for name, score in scores.items() if self._is_best(name, score)]
        self.best |= {name: {"score": scores[name], "step": step} for name in improved}
        logged = {f"val/{self.metrics[name].logged}": score for name, score in scores.items()}
        if trainer.is_global_zero:
            for run_logger in trainer.loggers:
                run_logger.log_metrics(logged, step=step)
            self._curve.add(step, self._resumed_at + time.monotonic() - self._started, scores)
            self._curve.draw(self.baseline, "PCA of pixels")
            best = self._text({name: entry["score"] for name, entry in self.best.items()})
            logger.info("step %d: %s (best so far: %s; scored in %.0f s)", step, self._text(scores), best, seconds)
        if self.keep_best:
            for name in improved:
                trainer.save_checkpoint(Path(trainer.default_root_dir) / "checkpoints" / f"best_{name}.ckpt")
        return logged

    def _is_best(self, name: str, score: float) -> bool:
        if name not in self.best:
            return not math.isnan(score)
        earlier = self.best[name]["score"]
        return score > earlier if self.metrics[name].higher_is_better else score < earlier

    def _measure(self, pl_module: pl.LightningModule, metrics: Mapping[str, Metric]) -> dict[str, dict[str, float]]:
        """Return the result of every metric; name the model's units, and score the baseline the first time."""
        device = pl_module.device
        with evaluating(pl_module, device), torch.autocast(device.type, enabled=False):
            rows = RowEncoder(pl_module, self._dataset, self.batch_size, device)
            results = self._results(rows, metrics)
            if isinstance(pl_module, HasUnits):
                pl_module.unit_names = name_by_information(rows, self.seed)
        if self.with_baseline and not self.baseline:
            num_units = rows(np.array([0])).shape[1]
            pixels = pixel_axes(self._dataset, num_units, self.seed)
            self.baseline = self._figures(self._results(RowEncoder(pixels, self._dataset, self.batch_size), metrics))
            logger.info("PCA of the pixels with %d components: %s", num_units, self._text(self.baseline))
        return results

    def _results(self, rows: RowEncoder, metrics: Mapping[str, Metric]) -> dict[str, dict[str, float]]:
        return {
            name: metric.function(rows, rows.space, np.random.RandomState(self.seed), **metric.protocol)
            for name, metric in metrics.items()
        }

    def _figures(self, results: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
        """Return the value of each metric that tables show."""
        return {name: float(result[self.metrics[name].figure]) for name, result in results.items()}

    def _text(self, scores: Mapping[str, float]) -> str:
        return ", ".join(f"{self.metrics[name].heading} {score:.3f}" for name, score in scores.items())


def _adjusted(metrics: Mapping[str, Metric], settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Metric]:
    """Return the metrics with some keyword arguments replaced."""
    adjusted = dict(metrics)
    for name, arguments in settings.items():
        if name not in metrics:
            raise ConfigError(f"settings: expected one of {', '.join(metrics)}, got {name!r}")
        adjusted[name] = replace(metrics[name], protocol={**metrics[name].protocol, **arguments})
    return adjusted
