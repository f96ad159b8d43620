"""The prompt score at the end of the test pass: numbers as JSON, and pictures of samples from texts."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from ldm.data.collate import collate
from ldm.data.dataset import FactorDataset
from ldm.data.traits import unwrap
from ldm.diffusion.samplers import DDIMSampler, Sampler, build_sampler
from ldm.evaluation.editing.measure import plain_number
from ldm.evaluation.prompts.measure import PromptPlan, PromptResult, TextSampler, plan_prompts, prompt_score
from ldm.evaluation.sampling.request import describe_sampler
from ldm.evaluation.test_pass import TestPassCallback
from ldm.losses.modality_gap import modality_gap
from ldm.models.contexts import averaged
from ldm.models.contracts import HasJointSpace, SampledFromTexts, require
from ldm.models.inputs import images_from_batch
from ldm.models.judge import FactorJudge, load_judge
from ldm.pictures.animation import save_gif
from ldm.pictures.charts import heat_map, heat_maps
from ldm.pictures.draw import draw_grid, save_png
from ldm.pictures.grid import CaptionedGrid
from ldm.runs.records import update_results, write_json
from ldm.util import ConfigError, UserError

logger = logging.getLogger(__name__)

_REMOVE = "or remove the PromptScore callback from lightning.callbacks"


class PromptScore(TestPassCallback):
    """Measures how often the attributes of a text prompt come true in the samples.

    See ``ldm.evaluation.prompts.measure`` for the protocol and ``ldm.models.contracts.SampledFromTexts`` for the models
    it is computed for. Prompts are those of images of the test data set, on which no stage should be trained. The files
    are ``<run>/prompt_score/<step>.json`` and ``<step>.png`` (accuracy by attribute and strength), and in
    ``<run>/images/test`` samples by strength (``prompts``) and the similarity of texts and samples (``similarity``).

    ``results.json`` receives ``prompt_accuracy``, its parts ``prompt_accuracy_<factor>`` and ``prompt_distance``, all
    at the strength ``guidance``, and for models of a joint space of texts and images the distance of the two means
    without and with the treatment of the model, ``modality_gap_before`` and ``modality_gap``.

    Args:
        judge: checkpoint or run folder of a ``FactorJudge`` trained on images of the same size.
        guidance: w of the figures, chosen before the test.
        strengths: w of the table; -1 leaves the prompt out.
        num_prompts: prompts, N.
        batch_size: images sampled at once.
        sampler: see ``build_sampler``; by default DDIM with 50 steps and eta 0.
        seed: seed of prompts and noise.
        rows: prompts in the pictures.

    Raises:
        ConfigError: ``guidance`` is not one of the strengths.
    """

    def __init__(
        self,
        judge: str,
        guidance: float = 1.0,
        strengths: Sequence[float] = (-1.0, 0.0, 0.5, 1.0, 2.0, 4.0),
        num_prompts: int = 256,
        batch_size: int = 64,
        sampler: Sampler | Mapping[str, Any] | str | None = None,
        seed: int = 0,
        rows: int = 6,
    ) -> None:
        if guidance not in strengths:
            raise ConfigError(f"PromptScore.guidance: expected one of strengths {list(strengths)}, got {guidance}")
        self.judge_path, self.guidance, self.strengths = str(judge), guidance, tuple(strengths)
        self.num_prompts, self.batch_size, self.seed, self.rows = num_prompts, batch_size, seed, rows
        self.sampler = DDIMSampler() if sampler is None else build_sampler(sampler)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check before the test pass that the score can be computed.

        Raises:
            UserError: the judge is missing or expects images of another size, the data set has no words or too few
                images, or the model is not sampled from texts.
        """
        dataset = unwrap(self.test_loader(trainer).dataset)
        if not isinstance(dataset, FactorDataset) or dataset.vocabulary is None:
            raise UserError(
                f"prompt score: expected a test data set of factors with a vocabulary, got {type(dataset).__name__}. "
                f"Set data.params.test to a data set with words, {_REMOVE}"
            )
        require(pl_module, SampledFromTexts, "prompt score")
        self._judge = load_judge(self.judge_path)
        self._judge.get_input(collate([dataset[0]]))  # raises if the sizes differ
        self._plan = plan_prompts(dataset, pl_module.latent_shape, self.num_prompts, self.seed)

    @torch.no_grad()
    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Sample, judge and write, in the first process only."""
        if trainer.fast_dev_run or not trainer.is_global_zero:
            return
        device, plan = pl_module.device, self._plan
        judge = self._judge.to(device)

        def sample(texts: list[str], x_T: Tensor, w: float) -> Tensor:
            cond = pl_module.condition_from_texts(texts)
            return pl_module.decode_first_stage(pl_module.sample(x_T, cond, self.sampler, guidance_scale=1 + w))

        with averaged(pl_module):
            result = prompt_score(sample, judge, plan, self.strengths, self.batch_size, device)
            shown = [sample(plan.texts[: self.rows], plan.noise[: self.rows].to(device), w) for w in self.strengths]
        progress, run_dir = self.progress(trainer), self.run_dir(trainer)
        save_gif(self._denoising(pl_module), run_dir / "images" / "test" / f"denoising_gs-{progress.step:06d}.gif")
        gap = _modality_gap(pl_module, plan) if _embeds_images(pl_module) else {}
        path = run_dir / "prompt_score" / f"{progress.step}.json"
        settings = {**describe_sampler(self.sampler), "guidance": self.guidance, "seed": self.seed}
        record = {**result.to_dict(), **gap, "sampler": settings, "judge": self.judge_path, **progress._asdict()}
        write_json(path, record)
        update_results(run_dir, **self._figures(result), **gap)
        _accuracy_map(result, progress.step, path.with_suffix(".png"))
        stamp = f"gs-{progress.step:06d}_e-{progress.epoch:06d}_b-000000.png"
        images = torch.stack(shown, dim=1)  # (rows, W, 3, H, W)
        columns = ["no prompt" if w == -1 else f"w = {w:g}" for w in self.strengths]
        grid = CaptionedGrid(images.flatten(0, 1).cpu(), plan.texts[: self.rows], columns, "samples from texts")
        save_png(draw_grid(grid), run_dir / "images" / "test" / f"prompts_{stamp}")
        chosen = images[:, self.strengths.index(self.guidance)]
        _similarity_map(pl_module, judge, plan, chosen, run_dir / "images" / "test" / f"similarity_{stamp}")
        logger.info("prompt accuracy %.3f at w = %g: %s", self._figures(result)["prompt_accuracy"], self.guidance, path)

    def _denoising(self, model: SampledFromTexts) -> list[CaptionedGrid]:
        """Return the prompts' samples after each step of the sampler: the state, and the estimate of the image."""
        texts, device = self._plan.texts[: self.rows], model.device
        states: list[Tensor] = []
        with averaged(model):
            model.sample(
                self._plan.noise[: self.rows].to(device),
                model.condition_from_texts(texts),
                self.sampler,
                guidance_scale=1 + self.guidance,
                callback=lambda step: states.append(torch.stack([step.x, step.pred_x0], dim=1).flatten(0, 1)),
            )
            frames = [model.decode_first_stage(state).cpu() for state in states]
        return [CaptionedGrid(frame, texts, ["state", "estimate"], f"w = {self.guidance:g}") for frame in frames]

    def _figures(self, result: PromptResult) -> dict[str, float | None]:
        row = self.strengths.index(self.guidance)
        accuracy = dict(zip(result.factor_names, map(plain_number, result.accuracy[row])))
        return {
            "prompt_accuracy": plain_number(result.accuracy[row].mean()),
            **{f"prompt_accuracy_{name}": value for name, value in accuracy.items()},
            "prompt_distance": plain_number(result.distance[row]),
        }


def _accuracy_map(result: PromptResult, step: int, path: Path) -> None:
    names = [name.replace("_", " ") for name in result.factor_names]
    chance, real = result.chance.mean(), result.real_accuracy.mean()
    columns = [f"w = {w:g}\ndistance {distance:.1f}" for w, distance in zip(result.strengths, result.distance)]
    title = (
        f"Share of {result.num_prompts} prompts whose attribute came true, step {step:,}\n"
        f"chance {chance:.2f}; the judge on real images {real:.3f}, their distance {result.real_distance:.1f}"
    )
    matrix = np.concatenate([result.accuracy.T, result.accuracy.mean(axis=1)[None]])
    heat_map(matrix, [*names, "mean"], columns, title, path)


def _embeds_images(model: Any) -> bool:
    return isinstance(model, HasJointSpace) and model.embeds_images


def _modality_gap(model: Any, plan: PromptPlan) -> dict[str, float]:
    """Return distance of the means and mean cosine of pairs, of embeddings as they are and as the model treats them."""
    figures, shown = {}, images_from_batch({"image": plan.images.to(model.device)})
    for suffix, is_treated in (("_before", False), ("", True)):
        images, texts = model.joint_embeddings(shown, plan.texts, is_treated)
        figures[f"modality_gap{suffix}"] = modality_gap(images, texts)
        figures[f"pair_cosine{suffix}"] = torch.cosine_similarity(images, texts).mean().item()
    return figures


def _similarity_map(model: Any, judge: FactorJudge, plan: PromptPlan, images: Tensor, path: Path) -> None:
    """Draw the similarity of every prompt and every sample (rows, 3, H, W): of CLIP, and by the judge."""
    texts = plan.texts[: len(images)]
    judged = plan.vocabulary.word_labels(judge.predict_values(images).cpu().numpy())
    panels = {"judge: share of attributes": (plan.words[: len(images), None] == judged).mean(axis=2)}
    if _embeds_images(model):
        seen, said = model.joint_embeddings(images, texts)
        cosine = torch.cosine_similarity(said[:, None], seen[None], dim=-1).cpu().numpy()
        panels = {"CLIP: cosine": cosine.clip(min=0)} | panels
    columns = [f"sample {number + 1}" for number in range(len(images))]
    heat_maps(panels, texts, columns, "Similarity of texts and samples; the diagonal belongs together", path)
