"""The edit score at the end of the test pass: numbers as JSON, the matrix as a heat map, the edits as a picture."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from torch import Tensor

from ldm.data.collate import collate
from ldm.data.traits import unwrap, vocabulary_of
from ldm.diffusion.samplers import DDIMSampler, Sampler, build_sampler
from ldm.evaluation.editing.measure import EditResult, edit_grid, edit_score, judge_accuracy, plain_number, plan_edits
from ldm.evaluation.sampling.request import describe_sampler
from ldm.evaluation.test_pass import Progress, TestPassCallback
from ldm.models.contexts import averaged
from ldm.models.contracts import Editable, require
from ldm.models.judge import load_judge
from ldm.pictures.charts import heat_map
from ldm.pictures.draw import draw_grid, save_png
from ldm.pictures.grid import CaptionedGrid
from ldm.runs.records import update_results, write_json
from ldm.util import UserError

logger = logging.getLogger(__name__)

_REMOVE = "or remove the EditScore callback from lightning.callbacks"


class EditScore(TestPassCallback):
    """Measures whether changing one attribute's text changes that attribute and no other.

    See ``ldm.evaluation.editing.measure`` for the protocol and ``ldm.models.contracts.Editable`` for the models it is
    computed for. The words of the attributes come from the test data set's vocabulary. The files are
    ``<run>/edit_score/<step>.json`` and ``<step>.png``, and
    ``<run>/images/test/edit_grid_gs-<step>_e-<epoch>_b-000000.png``.

    Args:
        judge: checkpoint or run folder of a ``AttributeJudge`` trained on images of the same size.
        num_samples: base images, N; (1 + U) * N images are sampled.
        batch_size: images sampled at once.
        sampler: see ``build_sampler``; by default DDIM with 50 steps and eta 0, which adds no noise.
        guidance_scale: passed to ``sample_edit``; 1 as trained.
        seed: seed of texts, requested words and noise.
        columns: samples in the picture.
    """

    def __init__(
        self,
        judge: str,
        num_samples: int = 256,
        batch_size: int = 64,
        sampler: Sampler | Mapping[str, Any] | str | None = None,
        guidance_scale: float = 1.0,
        seed: int = 0,
        columns: int = 8,
    ) -> None:
        self.judge_path, self.num_samples, self.batch_size = str(judge), num_samples, batch_size
        self.sampler = DDIMSampler() if sampler is None else build_sampler(sampler)
        self.guidance_scale, self.seed, self.columns = guidance_scale, seed, columns

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check before the long test pass that the score can be computed.

        Raises:
            UserError: the judge is missing or expects images of another size, the data set has no words or not one
                factor per unit, or the model is not editable.
        """
        dataset = self.test_loader(trainer).dataset
        vocabulary, name = vocabulary_of(dataset), type(unwrap(dataset)).__name__
        if vocabulary is None:
            raise UserError(
                f"edit score: expected a test data set with a vocabulary, got {name}. Set data.params.test to a "
                f"data set with words, {_REMOVE}"
            )
        require(pl_module, Editable, "edit score")
        self._judge = load_judge(self.judge_path)
        self._judge.get_input(collate([dataset[0]]))  # raises if the sizes differ
        if pl_module.latent_unit != vocabulary.num_units:
            raise UserError(
                f"edit score: expected one unit per attribute, got latent_unit {pl_module.latent_unit} and "
                f"{vocabulary.num_units} attributes of the test data set {name}. Make them match, {_REMOVE}"
            )

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Sample, judge and write, in the first process only."""
        if trainer.fast_dev_run or not trainer.is_global_zero:
            return
        dataset, device = unwrap(self.test_loader(trainer).dataset), pl_module.device
        judge = self._judge.to(device)
        plan = plan_edits(dataset.vocabulary, pl_module.latent_shape, self.num_samples, self.seed)

        def edit(texts: list[list[str]], x_T: Tensor) -> Tensor:
            return pl_module.sample_edit(texts, x_T, self.sampler, self.guidance_scale)

        accuracy, num_images = judge_accuracy(judge.predict_values, dataset, self.batch_size, device)
        with averaged(pl_module):
            grid = edit_grid(edit, plan, self.columns, device)
            result = edit_score(edit, judge.predict_values, plan, self.batch_size, device)
        record = {
            "path": self.judge_path,
            "accuracy": plain_number(accuracy.mean()),
            "accuracy_by_factor": dict(zip(result.factor_names, map(plain_number, accuracy))),
            "num_images": num_images,
        }
        self._write(self.run_dir(trainer), result, grid, self.progress(trainer), record)

    def _write(
        self, run_dir: Path, result: EditResult, grid: CaptionedGrid, progress: Progress, judge: Mapping[str, Any]
    ) -> None:
        """Write the numbers, the matrix as a heat map, the picture of the edits, and figures in ``results.json``."""
        path = run_dir / "edit_score" / f"{progress.step}.json"
        report = result.to_dict()
        settings = {**describe_sampler(self.sampler), "guidance_scale": self.guidance_scale, "seed": self.seed}
        write_json(path, {**report, "sampler": settings, **progress._asdict(), "judge": judge})
        names = [name.replace("_", " ") for name in result.factor_names]
        title = (
            f"Edit accuracy {result.edit_accuracy:.2f} (diagonal), leakage {result.edit_leakage:.2f} (elsewhere)\n"
            f"rows: attribute changed, columns: factor judged; {result.num_samples} samples, step {progress.step:,}\n"
            f"accuracy of the judge on unseen real images: {judge['accuracy']:.3f}"
        )
        heat_map(result.matrix, names, names, title, path.with_suffix(".png"))
        picture = f"edit_grid_gs-{progress.step:06d}_e-{progress.epoch:06d}_b-000000.png"
        save_png(draw_grid(grid), run_dir / "images" / "test" / picture)
        accuracy, leakage = report["edit_accuracy"], report["edit_leakage"]
        update_results(run_dir, edit_accuracy=accuracy, edit_leakage=leakage, judge_accuracy=judge["accuracy"])
        scores = result.edit_accuracy, result.edit_leakage, judge["accuracy"]
        logger.info("edit accuracy %.3f, leakage %.3f (judge %.3f): %s", *scores, path)
