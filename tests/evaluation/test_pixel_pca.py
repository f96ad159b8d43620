"""The PCA of the pixels, the baseline of scores."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_train_scores import SPACE, Grid

from ldm.evaluation.pixel_pca import pixel_axes, write_pixel_pca
from ldm.metrics.protocols import select_metrics
from ldm.scoring.files import read_latent_file
from ldm.scoring.run import Options, score_folder


def test_axes_are_the_principal_ones():
    dataset = Grid(split=None)
    fitted = pixel_axes(dataset, 3)
    pixels = dataset.images(np.arange(SPACE.size)).reshape(SPACE.size, -1) / 127.5 - 1
    centred = pixels - pixels.mean(axis=0)
    exact = np.linalg.svd(centred, full_matrices=False)[2][:3].T
    assert np.abs(np.abs((fitted.axes.numpy() * exact).sum(axis=0)) - 1).max() < 1e-4
    state = torch.get_rng_state()
    pixel_axes(dataset, 3)
    assert torch.equal(torch.get_rng_state(), state)
    codes = fitted.encode_representation({"image": torch.from_numpy(dataset.images(np.arange(5)))})
    np.testing.assert_allclose(codes, centred[:5] @ fitted.axes.numpy(), atol=1e-5)


def test_the_file_can_be_scored(tmp_path):
    path = write_pixel_pca(Grid(split="test"), 3, tmp_path / "pixel_pca")
    head = read_latent_file(path)
    assert head.shape == (SPACE.size, 3) and head.factor_names == SPACE.factor_names
    report = score_folder(Options(tmp_path, metrics=select_metrics("fast", ["mig"])))
    assert report.failures == []


def test_needs_factors():
    with pytest.raises(Exception, match="known factors"):
        pixel_axes([0, 1], 2)
