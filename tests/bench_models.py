"""A denoiser whose rows paint known regions of the image, and its judge."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ldm.data.vocabulary import AttributeVocabulary
from ldm.diffusion.conditions import TensorCondition
from ldm.diffusion.schedule import NoiseSchedule, make_beta_schedule
from ldm.models.diffusion.methods.noiseclr.denoiser import FrozenDenoiser
from ldm.modules.diffusionmodules.util import attend, run_checkpointed
from ldm.util import UserError

FEATURES, FACTORS = 16, 4
VOCABULARY = AttributeVocabulary(
    [f"region_{k}" for k in range(FACTORS)], [["low", "high"]] * FACTORS, [[0, 1]] * FACTORS, [["{}"]] * FACTORS
)


def images_of(count):
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(7)) * 2 - 1


class Toy(FrozenDenoiser):
    """Predicts noise from 16 features of a latent (1, 4, 4), and adds the condition (4,) to its four quarters.

    Images are the latents, enlarged; factor k is the mean of quarter k, low or high.
    """

    latent_shape = (1, 4, 4)
    row_space, row_width = "condition", FACTORS

    def __init__(self, seed=0, attends=False, use_checkpoint=False, takes_texts=False):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.first, self.bottleneck, self.last = nn.Linear(16, FEATURES), nn.Identity(), nn.Linear(FEATURES, 16)
        for weight in self.parameters():
            weight.data = torch.randn(weight.shape, generator=generator) / 4
        self.requires_grad_(False)
        self.attends, self.use_checkpoint, self.takes_texts = attends, use_checkpoint, takes_texts
        self.num_samples = 0  # latents that the network has seen
        self.constants = NoiseSchedule.from_betas(make_beta_schedule("linear", 20))

    schedule = property(lambda self: self.constants)

    def initial_rows(self, count, words=()):
        return torch.randn(count, self.row_width)

    def conditions(self, rows):
        return TensorCondition(rows)

    def null(self, count):
        return TensorCondition(torch.zeros(count, FACTORS))

    def condition_from_texts(self, texts):
        if not self.takes_texts:
            raise UserError("toy: expected no texts")
        return TensorCondition(torch.zeros(len(texts), FACTORS))

    def _decoded(self, features):
        features = torch.tanh(features)
        if self.attends:
            tokens = features.unflatten(1, (1, 4, 4))
            features = features + attend(tokens, tokens, tokens).flatten(1)
        return self.last(features)

    def _predict_eps(self, x, t, cond):
        self.num_samples += len(x)
        features = self.bottleneck(self.first(x.flatten(1)) * (1 + t[:, None] / 20))
        eps = run_checkpointed(self._decoded, self.use_checkpoint, features).reshape(x.shape)
        quarters = cond.value.reshape(-1, 1, 2, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
        return 0.1 * eps - quarters

    def encode(self, images, sample=False):
        return F.adaptive_avg_pool2d(images.mean(dim=1, keepdim=True), 4)

    def decode(self, z):
        return torch.tanh(z).repeat_interleave(4, 2).repeat_interleave(4, 3).expand(-1, 3, -1, -1)

    def network(self):
        return nn.ModuleList([self.first, self.last])


def judge(images):
    """Return 1 where a quarter is brighter than 0, (B, 4) int64."""
    return (F.adaptive_avg_pool2d(images[:, :1], 2).flatten(1) > 0).long()
