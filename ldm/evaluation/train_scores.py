"""Disentanglement scores while a model trains: logged, drawn, and the best checkpoint by each kept."""

from __future__ import annotations

import json
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

from ldm.evaluation.pixel_pca import PixelPCA, pixel_axes
from ldm.evaluation.row_encoder import RowEncoder, evaluating, whole_set
from ldm.evaluation.train_scores_curve import ScoreCurve
from ldm.evaluation.units.information import name_by_information
from ldm.metrics import PROTOCOL_SEED, Metric
from ldm.metrics.protocols import select_metrics
from ldm.runs.folder import update_results
from ldm.util import ConfigError, UserError, atomic_write

logger = logging.getLogger(__name__)

LABELS = {"factor_vae": "FactorVAE", "dci": "DCI", "mig": "MIG"}
LOGGED = {"factor_vae": "val/factor_vae_score", "dci": "val/dci_disentanglement", "mig": "val/mig"}
FULL_SCORES = "metrics_sin"  # EncDiff's folder for scores of its scalars


class ScoreWhileTraining(Checkpoint):
    """Every so many steps scores the representation on images of the validation set's data set.

    The metrics say which images they need, drawn from all of the data set as the published protocols do, and only
    those are encoded. Works for every model with ``encode_representation(batch) -> (B, U) or (B, U, D)``. Scores go to
    the loggers (``val/factor_vae_score``, ``val/dci_disentanglement``, ``val/mig``, ``val/<metric>``), to
    ``<run>/scores.csv`` and ``<run>/scores.png``; ``<run>/checkpoints/best_<metric>.ckpt`` is the checkpoint of the
    best score, and ``results.json`` says the best and the last. Nothing happens outside training, so the sanity check
    of the validation set is not scored.

    Lightning runs checkpoint callbacks last, so that a kept checkpoint holds everything that belongs to its step.

    Args:
        every_n_train_steps: steps between two scores; the last step of training is always scored.
        metrics: names of metrics (``ldm.metrics.METRICS``).
        protocol: how many samples they take (``ldm.metrics.protocols``).
        settings: metric -> keyword arguments that differ from the protocol's: ``{factor_vae: {num_train: 500}}``.
        final_protocol: score the last step by this protocol too, into ``<run>/metrics_sin/<step>.json``; None does
            not.
        split: whose data set is scored: ``validation`` or ``train``.
        batch_size: images encoded at once.
        keep_best: keep a checkpoint for the best of each score.
        baseline: also score a principal component analysis of the pixels with as many components, once.
        seed: of the metrics' draws; the published protocols use 0.
    """

    def __init__(
        self,
        every_n_train_steps: int,
        metrics: Sequence[str] = ("factor_vae", "dci", "mig"),
        protocol: str = "fast",
        settings: Mapping[str, Mapping[str, Any]] | None = None,
        final_protocol: str | None = None,
        split: str = "validation",
        batch_size: int = 512,
        keep_best: bool = True,
        baseline: bool = False,
        seed: int = PROTOCOL_SEED,
    ) -> None:
        if every_n_train_steps < 1:
            raise ConfigError(f"every_n_train_steps is {every_n_train_steps}; expected at least 1")
        if split not in ("validation", "train"):
            raise ConfigError(f"split is {split!r}; expected validation or train")
        self.every_n_train_steps, self.split, self.batch_size = every_n_train_steps, split, batch_size
        self.metrics = _adjusted(select_metrics(protocol, list(metrics)), settings or {})
        self.final_metrics = None if final_protocol is None else select_metrics(final_protocol, list(metrics))
        self.keep_best, self.with_baseline, self.seed = keep_best, baseline, seed
        self.best: dict[str, dict[str, float]] = {}
        self.baseline: dict[str, float] = {}
        self._scored_step = 0
        self._dataset: Any = None
        self._curve = ScoreCurve(Path(), ())
        self._resumed_at = self._started = 0.0

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the best so far and the baseline, which needs no second computation."""
        return {"best": self.best, "baseline": self.baseline}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the best so far."""
        self.best, self.baseline = dict(state_dict["best"]), dict(state_dict["baseline"])

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find out before the first step whether scores can be taken.

        Raises:
            UserError: the model has no representation, or the data set no factors or others than the model says.
        """
        if not hasattr(pl_module, "encode_representation"):
            raise UserError(
                f"{type(pl_module).__name__} has no encode_representation, so it cannot be scored: remove "
                "ScoreWhileTraining from lightning.callbacks"
            )
        datasets = getattr(trainer.datamodule, "datasets", {})
        dataset = datasets.get(self.split, datasets.get("train"))
        space = whole_set(dataset).space
        expected = getattr(pl_module, "eval_space", None) or space
        if tuple(expected.factors_num_values) != tuple(space.factors_num_values):
            raise UserError(
                f"model.params.eval_name asks for scores on {expected}, but the data set has {space}: name the data "
                "set's factors, or leave eval_name out"
            )
        self._dataset = dataset
        if hasattr(pl_module, "prepare_representation"):
            pl_module.prepare_representation(dataset)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go on where an earlier part of the run stood."""
        self._scored_step = trainer.global_step
        self._curve = ScoreCurve(Path(trainer.default_root_dir), list(self.metrics))
        self._curve.continue_from(trainer.global_step)
        self._resumed_at, self._started = self._curve.seconds, time.monotonic()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Score on schedule, once per step."""
        step = trainer.global_step
        if step % self.every_n_train_steps == 0 and step != self._scored_step:
            logged = self._score(trainer, pl_module)
            # for callbacks that monitor a score and for the progress bar; loggers were told, at this very step
            pl_module.log_dict(logged, logger=False, on_step=True, on_epoch=False, batch_size=1)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Score the last step, by the final protocol too, and say what was best and what is last."""
        if trainer.fast_dev_run or not trainer.global_step:
            return
        if self._scored_step != trainer.global_step:
            self._score(trainer, pl_module)
        if not trainer.is_global_zero or not self._curve.rows:
            return
        run_dir, last = Path(trainer.default_root_dir), self._curve.rows[-1]
        figures = {}
        for name, best in self.best.items():
            figures |= {f"{name}_fast_best": best["score"], f"{name}_fast_best_step": int(best["step"])}
            figures[f"{name}_fast_last"] = last[name]
            logger.info("%s: best %.3f at step %d, last %.3f", _label(name), best["score"], best["step"], last[name])
        figures |= {f"{name}_fast_pixel_pca": score for name, score in self.baseline.items()}
        update_results(run_dir, **figures)
        if self.final_metrics is not None:
            content = self._measure(trainer, pl_module, self.final_metrics)
            path = run_dir / FULL_SCORES / f"{trainer.global_step}.json"
            with atomic_write(path) as stream:
                json.dump({self.final_metrics[name].key: result for name, result in content.items()}, stream, indent=1)
            logger.info("scores of the last step by the final protocol: %s", path)

    def _score(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, float]:
        """One row of scores, the same in all processes, by the names they are logged under."""
        step, started = trainer.global_step, time.monotonic()
        scores: dict[str, float] | None = None
        if trainer.is_global_zero:
            scores = self._figures(self._measure(trainer, pl_module, self.metrics))
        scores = trainer.strategy.broadcast(scores)
        taken = time.monotonic() - started
        self._started += taken  # the curve is drawn over the time of training, not of scoring
        self._scored_step = step
        improved = [name for name, score in scores.items() if self._is_best(name, score)]
        self.best |= {name: {"score": scores[name], "step": step} for name in improved}
        logged = {LOGGED.get(name, f"val/{name}"): score for name, score in scores.items()}
        if trainer.is_global_zero:
            for run_logger in trainer.loggers:
                run_logger.log_metrics(logged, step=step)
            self._write(scores, step, taken)
        if self.keep_best:
            for name in improved:
                trainer.save_checkpoint(Path(trainer.default_root_dir) / "checkpoints" / f"best_{name}.ckpt")
        return logged

    def _is_best(self, name: str, score: float) -> bool:
        if name not in self.best:
            return not math.isnan(score)
        earlier = self.best[name]["score"]
        return score > earlier if self.metrics[name].higher_is_better else score < earlier

    def _measure(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, metrics: Mapping[str, Metric]
    ) -> dict[str, dict[str, float]]:
        """Result dict of every metric."""
        device = pl_module.device
        with evaluating(pl_module, device), torch.autocast(device.type, enabled=False):
            rows = RowEncoder(pl_module, self._dataset, self.batch_size, device)
            results = self._results(rows, metrics)
            if hasattr(pl_module, "unit_names"):
                pl_module.unit_names = name_by_information(rows, self.seed)
        if self.with_baseline and not self.baseline:
            num_units = rows(np.array([0])).shape[1]
            pixels = PixelPCA(pixel_axes(self._dataset, num_units, self.seed))
            self.baseline = self._figures(self._results(RowEncoder(pixels, self._dataset, self.batch_size), metrics))
            logger.info("a PCA of the pixels with %d components: %s", num_units, _text(self.baseline))
        return results

    def _results(self, rows: RowEncoder, metrics: Mapping[str, Metric]) -> dict[str, dict[str, float]]:
        return {
            name: metric.function(rows, rows.space, np.random.RandomState(self.seed), **metric.protocol)
            for name, metric in metrics.items()
        }

    def _figures(self, results: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
        """The figure of each metric that tables show."""
        return {name: float(result[self.metrics[name].figure]) for name, result in results.items()}

    def _write(self, scores: Mapping[str, float], step: int, taken: float) -> None:
        """Write and draw one row, and say it."""
        self._curve.add(step, self._resumed_at + time.monotonic() - self._started, scores)
        self._curve.draw({name: _label(name) for name in self.metrics}, self.baseline, "PCA of pixels")
        best = ", ".join(f"{_label(name)} {entry['score']:.3f} at {entry['step']}" for name, entry in self.best.items())
        logger.info("step %d: %s (best: %s; scored in %.0f s)", step, _text(scores), best, taken)


def _adjusted(metrics: Mapping[str, Metric], settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Metric]:
    """The metrics with some keyword arguments changed."""
    for name in settings:
        if name not in metrics:
            raise ConfigError(f"settings name {name!r}, but the scores are {', '.join(metrics)}")
    return {
        name: replace(metric, protocol={**metric.protocol, **settings.get(name, {})})
        for name, metric in metrics.items()
    }


def _label(name: str) -> str:
    return LABELS.get(name, name)


def _text(scores: Mapping[str, float]) -> str:
    return ", ".join(f"{_label(name)} {score:.3f}" for name, score in scores.items())
