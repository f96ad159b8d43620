"""The prompt score at the end of the test pass: numbers as JSON, and pictures of samples from texts."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch

from ldm.data.traits import unwrap
from ldm.diffusion.samplers import DDIMSampler, Sampler, build_sampler
from ldm.evaluation.editing.editor import judged_vocabulary
from ldm.evaluation.editing.measure import plain_number
from ldm.evaluation.prompts.measure import PromptResult, joint_figures, plan_prompts, prompt_score
from ldm.evaluation.prompts.pictures import PromptPictures, accuracy_map
from ldm.evaluation.prompts.samplers import PromptSamplers
from ldm.evaluation.sampling.request import describe_sampler
from ldm.evaluation.test_pass import SampleScore
from ldm.models.contexts import averaged
from ldm.models.contracts import SampledFromTexts, require
from ldm.models.judge import load_judge
from ldm.ranges import Count, Finite, Seed
from ldm.runs.records import write_json
from ldm.util import ConfigError

logger = logging.getLogger(__name__)


class PromptScore(SampleScore):
    """Measures how often the attributes of a text prompt come true in the samples.

    See ``ldm.evaluation.prompts.measure`` for the protocol and ``ldm.models.contracts.SampledFromTexts`` for the models
    it is computed for. Prompts are those of images of the test data set. The files are
    ``<run>/prompt_score/<step>.json`` and ``<step>.png`` (accuracy by attribute and strength), and in
    ``<run>/images/test`` samples by strength (``prompts``), their denoising (``denoising``, a GIF) and the similarity
    of texts and samples (``similarity``).

    ``results.json`` receives ``prompt_accuracy``, its parts ``prompt_accuracy_<factor>`` and ``prompt_distance``, all
    at the strength ``guidance``. For models of a joint space of texts and images also ``prompt_accuracy_from_images``,
    sampled under the images of the prompts, and the figures of ``joint_figures``.

    Args:
        judge: checkpoint or run folder of an ``AttributeJudge`` trained on images of the same size.
        guidance: w of the figures, chosen before the test.
        strengths: w of the table; -1 leaves the prompt out.
        num_prompts: prompts, N; None takes half of the images, at most 256.
        batch_size: images sampled at once.
        sampler: see ``build_sampler``; by default DDIM with 50 steps and eta 0.
        seed: seed of prompts and noise.
        rows: prompts in the pictures.
        template: text of the prompts with names of factors, such as "a {scale} {object_hue} {shape}"; by default the
            canonical phrases of all attributes.

    Raises:
        ConfigError: ``guidance`` is not one of the strengths.
    """

    def __init__(
        self,
        judge: str,
        guidance: Finite = 1.0,
        strengths: Sequence[Finite] = (-1.0, 0.0, 0.5, 1.0, 2.0, 4.0),
        num_prompts: Count | None = 256,
        batch_size: Count = 64,
        sampler: Sampler | Mapping[str, Any] | str | None = None,
        seed: Seed = 0,
        rows: Count = 6,
        template: str | None = None,
    ) -> None:
        if guidance not in strengths:
            raise ConfigError(f"PromptScore.guidance: expected one of strengths {list(strengths)}, got {guidance}")
        self.judge_path, self.guidance, self.strengths = str(judge), guidance, tuple(strengths)
        self.num_prompts, self.batch_size, self.seed, self.rows = num_prompts, batch_size, seed, rows
        self.template = template
        self.sampler = DDIMSampler() if sampler is None else build_sampler(sampler)

    def check(self, dataset: Any, model: pl.LightningModule) -> None:
        """Load the judge and draw the prompts.

        Raises:
            UserError: the judge is missing or expects images of another size, the data set has no words or too few
                images, or the model is not sampled from texts.
        """
        dataset = unwrap(dataset)
        self._judge = load_judge(self.judge_path)
        judged_vocabulary(dataset, self._judge, "prompt score")
        require(model, SampledFromTexts, "prompt score")
        self._plan = plan_prompts(dataset, model.latent_shape, self.num_prompts, self.seed, self.template)
        with torch.no_grad():
            model.condition_from_texts(self._plan.texts[:1])  # raises if the model has no text encoder

    @torch.no_grad()
    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Sample, judge and write, in the first process only."""
        if trainer.fast_dev_run or not trainer.is_global_zero:
            return
        judge, plan = self._judge.to(pl_module.device), self._plan
        samplers = PromptSamplers(pl_module, plan, self.sampler)
        progress, run_dir = self.progress(trainer), self.run_dir(trainer)
        settings = {"plan": plan, "batch_size": self.batch_size, "device": pl_module.device}
        with averaged(pl_module):
            result = prompt_score(samplers.from_texts, judge, strengths=self.strengths, **settings)
            figures = self._figures(result)
            if samplers.embeds_images:
                own = prompt_score(samplers.from_images, judge, strengths=[self.guidance], **settings)
                figures["prompt_accuracy_from_images"] = plain_number(own.accuracy.mean())
                figures |= joint_figures(pl_module, plan, self.batch_size)
            stamp = f"gs-{progress.step:06d}_e-{progress.epoch:06d}_b-000000"
            draw = PromptPictures(pl_module, samplers, run_dir / "images" / "test", stamp, self.rows)
            draw.all(judge, self.strengths, self.guidance)
        path = run_dir / "prompt_score" / f"{progress.step}.json"
        sampler = {**describe_sampler(self.sampler), "guidance": self.guidance, "seed": self.seed}
        record = {"figures": figures, "sampler": sampler, "judge": self.judge_path, "template": self.template}
        write_json(path, {**result.to_dict(), **record, **progress._asdict()})
        self.publish(trainer, **figures)
        accuracy_map(result, progress.step, path.with_suffix(".png"))
        logger.info("prompt accuracy %.3f at w = %g: %s", figures["prompt_accuracy"], self.guidance, path)

    def _figures(self, result: PromptResult) -> dict[str, float | None]:
        row = self.strengths.index(self.guidance)
        accuracy = dict(zip(result.factor_names, map(plain_number, result.accuracy[row])))
        return {
            "prompt_accuracy": plain_number(result.accuracy[row].mean()),
            **{f"prompt_accuracy_{name}": value for name, value in accuracy.items()},
            "prompt_distance": plain_number(result.distance[row]),
        }
