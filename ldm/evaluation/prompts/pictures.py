"""Pictures of the prompt score: samples by strength, steps of sampling, and similarities of texts and samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.diffusion.samplers import StepCallback
from ldm.evaluation.editing.measure import sample_from
from ldm.evaluation.prompts.measure import PromptResult
from ldm.evaluation.prompts.samplers import PromptSamplers
from ldm.models.judge import AttributeJudge
from ldm.pictures.animation import save_gif
from ldm.pictures.charts import heat_map, heat_maps
from ldm.pictures.draw import draw_grid, save_png
from ldm.pictures.grid import CaptionedGrid


@dataclass
class PromptPictures:
    """Pictures of the first ``rows`` prompts, written to a folder as ``<name>_<stamp>``."""

    model: Any  # implements ``SampledFromTexts``
    samplers: PromptSamplers
    folder: Path
    stamp: str
    rows: int

    def all(self, judge: AttributeJudge, strengths: Sequence[float], guidance: float) -> None:
        """Write all pictures; the similarities and the animation are those at the strength ``guidance``."""
        plan, shown = self.samplers.plan, slice(self.rows)
        texts, x_T = plan.texts[shown], plan.noise[shown].to(self.model.device)
        images = torch.stack([self._seeded(shown, x_T, w) for w in strengths], dim=1)  # (rows, W, 3, H, W)
        columns = ["no prompt" if w == -1 else f"w = {w:g}" for w in strengths]
        grid = CaptionedGrid(images.flatten(0, 1).cpu(), texts, columns, "samples from texts")
        save_png(draw_grid(grid), self.folder / f"prompts_{self.stamp}.png")
        states: list[Tensor] = []
        self._seeded(shown, x_T, guidance, lambda step: states.extend((step.x, step.pred_x0)))
        decoded = [self.model.decode_first_stage(state).cpu() for state in states]
        pairs = [torch.stack(pair, dim=1).flatten(0, 1) for pair in zip(decoded[::2], decoded[1::2])]
        frames = [CaptionedGrid(pair, texts, ["state", "estimate"], f"w = {guidance:g}") for pair in pairs]
        save_gif(frames, self.folder / f"denoising_{self.stamp}.gif")
        self._similarity(judge, images[:, list(strengths).index(guidance)])

    def _seeded(self, shown: slice, x_T: Tensor, w: float, callback: StepCallback | None = None) -> Tensor:
        def sample(part: slice, noise: Tensor) -> Tensor:
            return self.samplers.from_texts(part, noise, w, callback)

        return sample_from(sample, shown, x_T, self.samplers.plan.seed, "prompt score")

    def _similarity(self, judge: AttributeJudge, images: Tensor) -> None:
        """Draw the similarity of every prompt and every sample (rows, 3, H, W): of CLIP, and by the judge."""
        plan, texts = self.samplers.plan, self.samplers.plan.texts[: len(images)]
        judged = plan.vocabulary.word_labels(judge.predict_values(images).cpu().numpy())
        panels = {"judge: share of attributes": (plan.words[: len(images), None] == judged).mean(axis=2)}
        if self.samplers.embeds_images:
            of_images, of_texts = self.model.joint_embeddings(images, texts)
            cosine = torch.cosine_similarity(of_texts[:, None], of_images[None], dim=-1)
            panels = {"CLIP: cosine": cosine.cpu().numpy()} | panels
        columns = [f"sample {number + 1}" for number in range(len(images))]
        title = "Similarity of texts and samples; pairs are on the diagonal"
        heat_maps(panels, texts, columns, title, self.folder / f"similarity_{self.stamp}.png")


def accuracy_map(result: PromptResult, step: int, path: Path) -> Path:
    """Draw the accuracy by factor and strength."""
    names = [name.replace("_", " ") for name in result.factor_names]
    columns = [f"w = {w:g}\ndistance {distance:.0f}" for w, distance in zip(result.strengths, result.distance)]
    title = (
        f"Share of {result.num_prompts} prompts whose attribute came true, step {step:,}\nchance "
        f"{result.chance.mean():.2f}; judge on real images {result.real_accuracy.mean():.3f}, distance of real images "
        f"{result.real_distance:.0f}"
    )
    matrix = np.concatenate([result.accuracy.T, result.accuracy.mean(axis=1)[None]])
    return heat_map(matrix, [*names, "mean"], columns, title, path)
