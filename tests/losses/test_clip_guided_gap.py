"""Treatments of the gap between CLIP's embeddings of images and texts."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ldm.losses.modality_gap import add_gap_noise, add_noise, gap_statistics, modality_gap, nearest_images, remove_mean


def clouds(count=200, width=8, seed=0):
    """Images and their texts, moved by a constant and a little noise, of length 1."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, width, generator=generator)
    texts = images + 2 * torch.eye(width)[0] + 0.1 * torch.randn(count, width, generator=generator)
    return F.normalize(images, dim=-1), F.normalize(texts, dim=-1)


def test_noise_has_the_size_of_the_equation():
    images, _ = clouds()
    torch.manual_seed(3)
    noisy = add_noise(images, 0.5)
    torch.manual_seed(3)
    eps = torch.randn_like(images)
    expected = images + 0.5 * eps / eps.norm(dim=1, keepdim=True)
    torch.testing.assert_close(noisy, expected / expected.norm(dim=1, keepdim=True))
    torch.testing.assert_close(add_noise(images, 0.0), images)


def test_removed_means_close_the_gap():
    images, texts = clouds()
    before = modality_gap(images, texts)
    after = modality_gap(remove_mean(images, images.mean(0)), remove_mean(texts, texts.mean(0)))
    assert before > 0.3 and after < 0.2 * before


def test_statistics_of_pairs_that_are_found():
    images, texts = clouds(width=4)
    mean, root = gap_statistics(images, texts)
    near = (remove_mean(texts, texts.mean(0)) @ remove_mean(images, images.mean(0)).T).argmax(1)
    gap = (texts - images[near]).double()
    torch.testing.assert_close(mean.double(), gap.mean(0), rtol=1e-4, atol=1e-5)
    covariance = (gap - gap.mean(0)).T @ (gap - gap.mean(0)) / len(gap)
    torch.testing.assert_close((root @ root.T).double(), covariance, rtol=1e-3, atol=1e-5)
    torch.manual_seed(0)
    moved = add_gap_noise(images, mean, root, 1.0)
    assert modality_gap(moved, texts) < 0.5 * modality_gap(images, texts)
    torch.testing.assert_close(add_gap_noise(images, mean, root, 0.0), F.normalize(images + mean, dim=-1))


def test_nearest_images_of_a_bank_that_is_not_full():
    bank = torch.zeros(6, 3)
    bank[:3] = torch.tensor([[2.0, 0, 0], [0, 3.0, 0], [1.0, 1.0, 0]])
    texts = torch.tensor([[1.0, 0.1, 0], [-1.0, -1.0, 0.1]])
    torch.testing.assert_close(nearest_images(texts, bank, 1)[0], bank[0])
    torch.testing.assert_close(nearest_images(texts, bank, 2)[0], (bank[0] + bank[2]) / 2)
    assert nearest_images(texts, bank, 1)[1].norm() > 0  # rows of zeros would be nearer
