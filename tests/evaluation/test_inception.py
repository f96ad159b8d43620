"""FID and KID: ranges of images, the network's weights, and both distances against other implementations."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ldm.evaluation.images.distances import Moments, frechet_distance, kernel_distance
from ldm.modules.inception import Inception, to_bytes
from ldm.util import UserError

fidelity = pytest.importorskip("torch_fidelity")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of random weights in the true layout."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as Network

    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:  # it loads what it builds; here there is nothing to load yet
        patch.setattr(Network, "load_state_dict", lambda self, state: None)
        patch.setattr(torch, "load", lambda *_, **__: {})
        network = Network("random", ["2048"], feature_extractor_weights_path="none")
    path = tmp_path_factory.mktemp("inception") / "weights-inception-2015-12-05-6726825d.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def inception(weights) -> Inception:
    return Inception(weights)


def features(seed: int, num: int = 60, shift: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(num, 12)) @ rng.normal(size=(12, 12)) + shift).astype(np.float32)


def test_images_become_bytes():
    images = torch.tensor([-1.0, -0.5, 0.0, 1.0]).view(1, 1, 2, 2).expand(1, 3, 2, 2)
    assert to_bytes(images)[0, 0].flatten().tolist() == [0, 64, 128, 255]
    every = torch.arange(256).view(1, 1, 16, 16).expand(1, 3, 16, 16).to(torch.uint8)
    assert torch.equal(to_bytes(every / 127.5 - 1), every)
    assert to_bytes(every) is every
    assert to_bytes(torch.full((1, 3, 2, 2), 1.03)).max() == 255


@pytest.mark.parametrize(
    "images,message",
    [(torch.full((1, 3, 4, 4), 255.0), "got 255 to 255. Scale"), (torch.zeros(1, 4, 4, 3), r"\(B, 3, H, W\)")],
)
def test_other_ranges_and_shapes_are_refused(images, message):
    with pytest.raises(UserError, match=message):
        to_bytes(images)


def test_network_reads_signed_images_and_bytes_alike(inception):
    signed = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = inception(signed)
    assert found.shape == (2, 2048) and np.isfinite(found).all()
    assert np.array_equal(found, inception(to_bytes(signed)))


def test_distances_of_tiny_sets(inception):
    dark = [torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(n)) - 1 for n in range(2)]
    bright = [images + 1 for images in dark]
    first, second = (inception.features(batches)[:, :256] for batches in (dark, bright))
    moments = Moments.of(first)
    scale = np.trace(moments.covariance)
    assert frechet_distance(moments, moments) < 1e-6 * scale
    assert frechet_distance(moments, Moments.of(second)) > 1e-3 * scale
    assert kernel_distance(first, second, num_subsets=2)[0] > 0


def test_fid_is_torch_fidelitys():
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    first, second = features(0).astype(np.float64), features(1, num=80, shift=0.5).astype(np.float64)
    statistics = [fid_features_to_statistics(torch.from_numpy(part)) for part in (first, second)]
    expected = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(Moments.of(first), Moments.of(second)) == pytest.approx(expected, rel=1e-8)
    shifted = frechet_distance(Moments.of(first), Moments.of(first + 2.0))
    assert shifted == pytest.approx(12 * 4.0, rel=1e-6)  # equal covariances: the means alone differ


def test_kid_by_hand_and_its_subsets():
    x, y = features(0, num=5), features(1, num=5)
    kernel = lambda a, b: (float(np.dot(a.astype(float), b.astype(float))) / 12 + 1) ** 3  # noqa: E731
    pairs = [(i, j) for i in range(5) for j in range(5)]
    within = sum(kernel(part[i], part[j]) for part in (x, y) for i, j in pairs if i != j) / 20
    across = sum(kernel(x[i], y[j]) for i, j in pairs) / 25
    mean, deviation = kernel_distance(x, y, num_subsets=3)
    assert (mean, deviation) == (pytest.approx(within - 2 * across, rel=1e-9), pytest.approx(0.0, abs=1e-9))
    same, _ = kernel_distance(features(0, 400)[:200], features(0, 400)[200:], subset_size=100)
    other, _ = kernel_distance(features(0, 200), features(0, 200, shift=3.0), subset_size=100)
    assert abs(same) < 0.1 * other


def test_statistics_can_be_kept(tmp_path):
    moments = Moments.of(features(0))
    moments.write(tmp_path / "real.npz")
    again = Moments.read(tmp_path / "real.npz")
    assert np.array_equal(again.mean, moments.mean) and np.array_equal(again.covariance, moments.covariance)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "real.npz").read_bytes()[:100])
    np.savez(tmp_path / "other.npz", arr_0=np.zeros(3))
    for name in ("cut.npz", "other.npz", "absent.npz"):
        with pytest.raises(UserError, match="npz of mu and sigma"):
            Moments.read(tmp_path / name)


def test_too_few_images():
    with pytest.raises(UserError, match="FID: expected at least 2"):
        Moments.of(features(0, num=1))
    with pytest.raises(UserError, match="KID: expected at least 2"):
        kernel_distance(features(0), features(1, num=1))


def test_weights_are_found_or_asked_for(weights, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("INCEPTION_WEIGHTS", raising=False)
    with pytest.raises(UserError, match="Put weights-inception-2015-12-05-6726825d.pth .*INCEPTION_WEIGHTS"):
        Inception()
    monkeypatch.setenv("INCEPTION_WEIGHTS", str(weights.parent))
    found, given = (network._network.state_dict() for network in (Inception(), Inception(weights)))
    assert found.keys() == given.keys() and all(torch.equal(found[name], given[name]) for name in given)
    with pytest.raises(UserError, match="there is no .*elsewhere.pth"):
        Inception(tmp_path / "elsewhere.pth")


def test_other_weights_are_refused(tmp_path):
    torch.save({"conv.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="other.pth: expected FID's InceptionV3"):
        Inception(tmp_path / "other.pth")
