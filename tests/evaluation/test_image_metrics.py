"""Reconstruction scores and the encoder's pass of TAD."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from ldm.evaluation.images.metrics import ReconstructionScores, image_distances, image_tad
from ldm.metrics.tad import CELEBA_ATTRIBUTES
from ldm.util import UserError


def pictures(seed: int, num: int = 4, size: int = 32) -> torch.Tensor:
    return torch.rand(num, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def plain_ssim(first: np.ndarray, second: np.ndarray) -> float:
    """SSIM of one channel in [0, 1], window by window (Wang et al., 2004), edges mirrored."""
    first, second = (np.pad(image, 5, mode="reflect") for image in (first, second))
    position = np.arange(11) - 5
    line = np.exp(-(position**2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2
    values = []
    for top in range(first.shape[0] - 10):
        for left in range(first.shape[1] - 10):
            x, y = (image[top : top + 11, left : left + 11] for image in (first, second))
            mx, my = (window * x).sum(), (window * y).sum()
            vx, vy = (window * x * x).sum() - mx**2, (window * y * y).sum() - my**2
            cov = (window * x * y).sum() - mx * my
            values.append((2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4)))
    return float(np.mean(values))


def test_distances_of_each_image():
    images = pictures(0)
    others = (images + 0.2 * torch.randn(images.shape, generator=torch.Generator().manual_seed(1))).clamp(-1, 1)
    others[0] = images[0]
    found = image_distances(images, others)
    assert found["ssim"][0].item() == pytest.approx(1.0) and found["mse"][0] == 0 and found["psnr"][0] == 100
    error = ((images[1] - others[1]) / 2).square().mean().item()
    assert found["mse"][1].item() == pytest.approx(error, rel=1e-5)
    assert found["psnr"][1].item() == pytest.approx(-10 * math.log10(error), rel=1e-5)


def test_ssim_slides_over_height_and_width():
    images, others = pictures(0, num=1, size=16), pictures(3, num=1, size=16)
    first, second = ((part[0].double().numpy() + 1) / 2 for part in (images, others))
    expected = np.mean([plain_ssim(a, b) for a, b in zip(first, second)])
    assert image_distances(images, others)["ssim"].item() == pytest.approx(expected, abs=1e-4)


def test_means_over_batches_of_any_size():
    images, others = pictures(0, num=5), pictures(1, num=5)
    whole, parts = ReconstructionScores(), ReconstructionScores()
    whole.add(images, others)
    parts.add(images[:2], others[:2])
    parts.add(images[2:], others[2:])
    assert parts.result() == pytest.approx(whole.result())
    assert set(whole.result()) == {"psnr", "ssim", "mse"}


def test_reconstructions_are_cut_to_the_range():
    images = torch.ones(1, 3, 16, 16)
    scores = ReconstructionScores()
    scores.add(images, images * 1.5)
    assert scores.result()["mse"] == 0


def test_lpips_where_it_is_asked_for():
    class Mean(nn.Module):
        def forward(self, first, second):
            return (first - second).abs().mean(dim=(1, 2, 3), keepdim=True)

    scores = ReconstructionScores(Mean())
    scores.add(pictures(0), pictures(1))
    assert scores.result()["lpips"] == pytest.approx((pictures(0) - pictures(1)).abs().mean().item(), rel=1e-5)


def test_what_cannot_be_compared():
    scores = ReconstructionScores()
    with pytest.raises(UserError, match="reconstructions: expected at least one"):
        scores.result()
    with pytest.raises(UserError, match=r"\(4, 3, 32, 32\) and reconstructions of \(3, 3, 32, 32\)"):
        scores.add(pictures(0), pictures(0, num=3))
    with pytest.raises(UserError, match="at least 11 pixels"):
        scores.add(pictures(0, size=8), pictures(0, size=8))


class Brightness(nn.Module):
    """Units of brightness: of all, and of the upper half; noise in training, like dropout."""

    latent_unit, latent_shape, unit_names = 2, (1, 1, 1), None

    def decode_units(self, codes, x_T, sampler=None, only=None):
        raise NotImplementedError

    def encode_units(self, images):
        codes = torch.stack(
            [images.mean(dim=(1, 2, 3)), images[:, :, : images.shape[2] // 2].mean(dim=(1, 2, 3))], dim=1
        )
        return (codes + torch.randn_like(codes) * self.training)[:, :, None]


@pytest.fixture
def labelled() -> tuple[list[torch.Tensor], np.ndarray]:
    brightness = np.random.default_rng(0).uniform(-0.7, 0.7, size=60)
    labels = np.column_stack([brightness > 0, np.arange(60) % 2]).astype(int)
    images = 0.3 * pictures(2, num=60, size=16)
    images[:, :, 8:] += torch.tensor(brightness, dtype=torch.float32).view(-1, 1, 1, 1)  # the lower half
    return list(images.split(16)), labels


def test_tad_needs_images(labelled):
    with pytest.raises(UserError, match="at least one image"):
        image_tad(Brightness(), [], labelled[1])


def test_tad_encodes_in_eval_mode(labelled):
    model = Brightness().train()
    found = image_tad(model, *labelled)
    assert found["captured"] == [0] and found["tad_score"] > 0.3
    assert model.training
    assert image_tad(model, *labelled, tad_range="unit")["tad_score"] == pytest.approx(found["tad_score"], abs=0.1)


def test_forty_attributes_are_celebas(labelled):
    labels = np.repeat(labelled[1][:, 1:], 40, axis=1)
    labels[:, 31] = labelled[1][:, 0]
    assert len(CELEBA_ATTRIBUTES) == len(set(CELEBA_ATTRIBUTES)) == 40
    assert image_tad(Brightness(), labelled[0], labels, max_redundancy=1.0)["captured"] == ["Smiling"]


def test_tad_needs_units_and_a_range(labelled):
    with pytest.raises(UserError, match="Identity, which lacks decode_units, encode_units"):
        image_tad(nn.Identity(), *labelled)
    with pytest.raises(UserError, match="got 'bytes'"):
        image_tad(Brightness(), *labelled, tad_range="bytes")
