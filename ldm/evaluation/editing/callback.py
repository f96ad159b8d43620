"""The edit score at the end of the test pass: numbers as JSON, the matrix as a heat map, the edits as a picture."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl

from ldm.data.traits import unwrap
from ldm.diffusion.samplers import DDIMSampler, Sampler, build_sampler
from ldm.evaluation.editing import measure
from ldm.evaluation.editing.editor import build_editor, check_needs
from ldm.evaluation.editing.truth import TruePictures
from ldm.evaluation.sampling.request import describe_sampler
from ldm.evaluation.test_pass import Progress, SampleScore
from ldm.models.contexts import averaged
from ldm.models.judge import load_judge
from ldm.pictures.charts import heat_map
from ldm.pictures.draw import draw_grid, save_png
from ldm.ranges import Count, Finite, Seed
from ldm.runs.records import write_json
from ldm.util import ConfigError

logger = logging.getLogger(__name__)

_GROUPS = {"unseen": measure.UNSEEN, "seen": measure.SEEN}
_Score = Callable[[measure.EditPlan, float], measure.EditResult]
_REFERENCES = ("edit_accuracy_ceiling", "edit_leakage_ceiling", "edit_accuracy_chance")


class EditScore(SampleScore):
    """Measures whether changing one attribute's text changes that attribute and no other.

    See ``ldm.evaluation.editing.measure`` for the protocol, and ``Editable`` and ``SampledFromTexts`` in
    ``ldm.models.contracts`` for the models it is computed for. The words of the attributes come from the test data
    set's vocabulary. The files are ``<run>/edit_score/<step>.json`` and ``<step>.png``, and
    ``<run>/images/test/edit_grid_gs-<step>_e-<epoch>_b-000000.png``.

    ``results.json`` receives ``edit_accuracy``, ``edit_leakage`` and ``all_right``, the first two also by attribute
    (``edit_accuracy_<attribute>``), their ceiling, which is the judge's score on pictures of the data set, and
    ``edit_accuracy_chance``. With held-out combinations they are those of the unseen ones, and there are figures with
    the suffixes ``_unseen`` and ``_seen``.

    Args:
        judge: checkpoint or run folder of an ``AttributeJudge`` of the same attributes and image size.
        num_samples: base images of a group, N, and edits of each unit; (1 + U) * N images are sampled.
        batch_size: images sampled at once.
        sampler: see ``build_sampler``; by default DDIM with 50 steps and eta 0, which adds no noise.
        guidance_scale: scale of the sub-gradients or of classifier-free guidance; 1 as trained. Of a list the scale
            with the largest accuracy minus leakage is taken, on other edits than those reported.
        seed: seed of texts, requested words and noise.
        columns: samples in the picture.
        num_guidance_samples: base images for the choice of the guidance scale.
        ordered: attribute -> all of its words in their order, for the share of errors between neighbouring words
            (``edit_neighbour_errors_<attribute>`` in the JSON file).
        replace: replace an earlier score of the same step. False keeps it and ``results.json``: the files of the new
            score are ``<step>-1.json``, ``<step>-2.json``, ... and ``..._b-000001.png``, ...
    """

    def __init__(
        self,
        judge: str,
        num_samples: Count = 256,
        batch_size: Count = 64,
        sampler: Sampler | Mapping[str, Any] | str | None = None,
        guidance_scale: Finite | Sequence[Finite] = 1.0,
        seed: Seed = 0,
        columns: Count = 8,
        num_guidance_samples: Count = 32,
        ordered: Mapping[str, Sequence[str]] | None = None,
        replace: bool = True,
    ) -> None:
        self.judge_path, self.num_samples, self.batch_size = str(judge), num_samples, batch_size
        self.sampler = DDIMSampler() if sampler is None else build_sampler(sampler)
        self.scales = list(guidance_scale) if isinstance(guidance_scale, Sequence) else [guidance_scale]
        if not self.scales:
            raise ConfigError("EditScore.guidance_scale: expected a number or a list of numbers, got an empty list")
        self.seed, self.columns = seed, columns
        self.num_guidance_samples, self.replace = num_guidance_samples, replace
        self.ordered = {name: list(map(str, words)) for name, words in (ordered or {}).items()}

    def check(self, dataset: Any, model: pl.LightningModule) -> None:
        """Load the judge, and see ``check_needs``."""
        self._judge = load_judge(self.judge_path)
        check_needs(dataset, model, self._judge, self.ordered)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Sample, judge and write, in the first process only."""
        if trainer.fast_dev_run or not trainer.is_global_zero:
            return
        dataset, device = unwrap(self.test_loader(trainer).dataset), pl_module.device
        truth = TruePictures(dataset, self._judge.to(device).predict_values, self.batch_size, device)
        plans = truth.plans(pl_module.latent_shape, self.num_samples, self.seed)
        plain = next(iter(plans.values()))  # of unseen combinations, if there are any

        def score(plan: measure.EditPlan, scale: float) -> measure.EditResult:
            editor = build_editor(pl_module, dataset.vocabulary, self.sampler, scale)
            return measure.edit_score(editor, truth.judge, plan, self.batch_size, device)

        with averaged(pl_module):
            guidance = self._choose(score, truth, pl_module)
            scale = guidance["guidance_scale"]
            editor = build_editor(pl_module, dataset.vocabulary, self.sampler, scale)
            true = truth.images(truth.rows(plain.words[: self.columns]))
            grid = measure.edit_grid(editor, plain, self.columns, device, true)
            results = {group: score(plan, scale) for group, plan in plans.items()}
        ceilings = {group: truth.ceiling(plan) for group, plan in plans.items()}
        run_dir, progress = self.run_dir(trainer), self.progress(trainer)
        number = 0 if self.replace else _free_number(run_dir, progress.step)
        path = _score_path(run_dir, progress.step, number)
        figures = self._write(path, results, ceilings, progress, guidance, self._judge_record(truth))
        if number == 0:
            self.publish(trainer, **figures)
        picture = f"edit_grid_gs-{progress.step:06d}_e-{progress.epoch:06d}_b-{number:06d}.png"
        save_png(draw_grid(grid), run_dir / "images" / "test" / picture)

    def _choose(self, score: _Score, truth: TruePictures, model: pl.LightningModule) -> dict[str, Any]:
        """Return the guidance scale and, of a list, the figures it was chosen by: other edits, seen combinations."""
        if len(self.scales) == 1:
            return {"guidance_scale": self.scales[0]}
        seed = int(np.random.SeedSequence([self.seed, 2]).generate_state(1)[0])
        *_, plan = truth.plans(model.latent_shape, self.num_guidance_samples, seed).values()
        best, curve = measure.choose_guidance(partial(score, plan), self.scales)
        return {"guidance_scale": best, "guidance_curve": curve}

    def _judge_record(self, truth: TruePictures) -> dict[str, Any]:
        accuracy, num_images = truth.judge_accuracy()
        return {
            "path": self.judge_path,
            "accuracy": measure.plain_number(np.nanmean(accuracy)),
            "accuracy_by_factor": dict(zip(truth.dataset.vocabulary.factor_names, map(measure.plain_number, accuracy))),
            "num_images": num_images,
        }

    def _write(
        self,
        path: Path,
        results: Mapping[str, measure.EditResult],
        ceilings: Mapping[str, measure.EditResult],
        progress: Progress,
        guidance: Mapping[str, Any],
        judge: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Write the numbers and the matrix as a heat map; return the figures for ``results.json``."""
        settings = {**describe_sampler(self.sampler), **guidance, "seed": self.seed}
        reports = {group: self._report(result, ceilings[group]) for group, result in results.items()}
        group, result = next(iter(results.items()))
        groups = {name: reports[suffix] for name, suffix in _GROUPS.items() if suffix in reports}
        record = {**reports[group], **({"groups": groups} if groups else {})}
        write_json(path, {**record, "sampler": settings, **progress._asdict(), "judge": judge})
        names = [name.replace("_", " ") for name in result.factor_names]
        best = ceilings[group]
        held_out = ", held-out combinations" if group == measure.UNSEEN else ""
        title = (
            f"Edit accuracy {result.edit_accuracy:.2f} (diagonal), leakage {_shown(result.edit_leakage)} (elsewhere)"
            f"{held_out}\n"
            f"pictures of the data set: {_shown(best.edit_accuracy)}, {_shown(best.edit_leakage)}; chance "
            f"{result.chance.mean():.2f}\n"
            f"rows: attribute changed, columns: factor judged; {result.num_samples} samples, step {progress.step:,}\n"
            f"accuracy of the judge on {judge['num_images']} images not trained on: {_shown(judge['accuracy'])}"
        )
        heat_map(result.matrix, names, names, title, path.with_suffix(".png"))
        figures = {name: record[name] for name in _REFERENCES}
        for suffix, each in {"": result, **results}.items():
            figures |= each.figures(suffix)
        scores = map(_shown, (result.edit_accuracy, result.edit_leakage, judge["accuracy"]))
        logger.info("edit accuracy %s, leakage %s (judge %s): %s", *scores, path)
        return {**figures, "judge_accuracy": judge["accuracy"]}

    def _report(self, result: measure.EditResult, ceiling: measure.EditResult) -> dict[str, Any]:
        """Return the figures of a group, with those of the data set's own pictures and of chance."""
        figures = ceiling.to_dict()
        kept = ("edit_accuracy", "edit_leakage", "all_right", "accuracy", "leakage", "num_samples", "num_edits")
        return {
            **result.to_dict(self.ordered),
            "ceiling": {name: figures[name] for name in kept},
            "edit_accuracy_ceiling": figures["edit_accuracy"],
            "edit_leakage_ceiling": figures["edit_leakage"],
            "edit_accuracy_chance": measure.plain_number(result.chance.mean()),
        }


def _score_path(run_dir: Path, step: int, number: int) -> Path:
    return run_dir / "edit_score" / (f"{step}-{number}.json" if number else f"{step}.json")


def _free_number(run_dir: Path, step: int) -> int:
    return next(number for number in count() if not _score_path(run_dir, step, number).exists())


def _shown(figure: float | None) -> str:
    """Return a figure as text; "none" for NaN and ``None``."""
    return "none" if figure is None or np.isnan(figure) else f"{figure:.3f}"
