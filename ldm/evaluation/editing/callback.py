"""The edit score at the end of the test pass."""

from __future__ import annotations

import contextlib
import logging
from typing import Any

import pytorch_lightning as pl

from ldm.data.collate import collate
from ldm.evaluation.editing.measure import edit_grid, edit_score, judge_accuracy, plan_edits
from ldm.evaluation.editing.report import JudgeRecord, write_edit_score
from ldm.evaluation.test_pass import TestPassCallback
from ldm.models.judge import load_judge
from ldm.util import UserError

log = logging.getLogger(__name__)


class EditScore(TestPassCallback):
    """Measures whether changing one attribute's text changes that attribute and nothing else.

    ``ldm.evaluation.editing.measure`` describes the protocol. Works for any model that has ``sample_edit(texts, x_T,
    num_steps, eta, guidance_scale) -> (B, 3, H, W) in [-1, 1]`` and ``latent_shape``; ``ema_scope``, where there is
    one, puts the averaged weights in place. The attributes' words come from the test data set's vocabulary.

    Args:
        judge: Checkpoint or run folder of a ``FactorJudge`` trained on images of the same size.
        num_samples: Base images, N; (1 + U) * N images are sampled.
        batch_size: Images sampled at once.
        num_steps: DDIM steps.
        eta: DDIM's; 0 samples without further noise.
        guidance_scale: Handed to ``sample_edit``; 1 as trained.
        seed: Of texts, asked words and noise.
        columns: Samples shown in the picture.
    """

    def __init__(
        self,
        judge: str,
        num_samples: int = 256,
        batch_size: int = 64,
        num_steps: int = 50,
        eta: float = 0.0,
        guidance_scale: float = 1.0,
        seed: int = 0,
        columns: int = 8,
    ) -> None:
        self.judge_path, self.num_samples, self.batch_size = str(judge), num_samples, batch_size
        self.seed, self.columns = seed, columns
        self.options: dict[str, Any] = {"num_steps": num_steps, "eta": eta, "guidance_scale": guidance_scale}

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find out before the long test pass whether the score can be taken.

        Raises:
            UserError: The judge is missing or wants images of another size, the data set has no words or not one
                factor per unit, or the model cannot edit.
        """
        dataset = self.test_loader(trainer).dataset
        if getattr(dataset, "vocabulary", None) is None:
            raise UserError(
                f"The edit score needs words for the factors, but the test data set {type(dataset).__name__} has no "
                "vocabulary. Remove the EditScore callback from lightning.callbacks, or test on a data set with words."
            )
        if not hasattr(pl_module, "sample_edit"):
            raise UserError(
                f"The edit score changes texts, but {type(pl_module).__name__} has no sample_edit. Remove the "
                "EditScore callback from lightning.callbacks."
            )
        self._judge = load_judge(self.judge_path)
        self._judge.get_input(collate([dataset[0]]))  # the sizes fit, or it says so now
        if getattr(pl_module, "latent_unit", units := dataset.vocabulary.num_units) != units:
            raise UserError(
                f"The edit score changes one text per unit: the model has latent_unit {pl_module.latent_unit}, but the "
                f"test data set {type(dataset).__name__} has words for {units} factors."
            )

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Sample, judge and write; on the first process alone."""
        if trainer.fast_dev_run or not trainer.is_global_zero:
            return
        dataset, device = self.test_loader(trainer).dataset, pl_module.device
        judge = self._judge.to(device)
        plan = plan_edits(dataset.vocabulary, pl_module.latent_shape, self.num_samples, self.seed)

        def sampler(texts, x_T):
            return pl_module.sample_edit(texts, x_T, **self.options)

        accuracy, num_images = judge_accuracy(judge, dataset, dataset.vocabulary, self.batch_size, device)
        with getattr(pl_module, "ema_scope", contextlib.nullcontext)():
            grid = edit_grid(sampler, plan, self.columns, device)
            result = edit_score(sampler, judge, plan, self.batch_size, device)
        path = write_edit_score(
            self.run_dir(trainer),
            result,
            JudgeRecord(self.judge_path, accuracy, num_images),
            grid,
            self.progress(trainer),
            {**self.options, "seed": self.seed},
        )
        log.info(
            "Edit accuracy %.3f, leakage %.3f (judge %.3f): %s",
            result.edit_accuracy,
            result.edit_leakage,
            accuracy.mean(),
            path,
        )
