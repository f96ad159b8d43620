"""LPIPS on AlexNet against torchmetrics', with the same random weights in torchvision's layout."""

from __future__ import annotations

import pytest
import torch

from ldm.modules.lpips import AlexLPIPS
from ldm.util import UserError


@pytest.fixture
def weights(tmp_path):
    from torchvision.models import alexnet

    torch.manual_seed(0)
    convolutions = alexnet(weights=None).features.state_dict()
    path = tmp_path / "alexnet-owt-7be5be79.pth"
    torch.save({f"features.{name}": value for name, value in convolutions.items()}, path)
    return path


def test_equals_torchmetrics(weights):
    from torchmetrics.functional.image import lpips as theirs

    network = theirs._LPIPS(net="alex", pnet_rand=True).eval()
    state = torch.load(weights, weights_only=True)
    for key in network.net.state_dict():
        network.net.state_dict()[key].copy_(state[f"features.{key.split('.', 1)[1]}"])
    first, second = (torch.rand(2, 3, 64, 64) * 2 - 1 for _ in range(2))
    found = AlexLPIPS(weights)(first, second)
    assert found.shape == (2, 1, 1, 1)
    assert torch.allclose(found, network(first, second), rtol=1e-4, atol=1e-6)
    assert AlexLPIPS(weights)(first, first).abs().max() == 0


def test_weights_are_found_or_asked_for(weights, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("ALEXNET_WEIGHTS", raising=False)
    with pytest.raises(UserError, match="Put alexnet-owt-7be5be79.pth .*ALEXNET_WEIGHTS"):
        AlexLPIPS()
    monkeypatch.setenv("ALEXNET_WEIGHTS", str(tmp_path))
    found, given = AlexLPIPS().state_dict(), AlexLPIPS(weights).state_dict()
    assert found.keys() == given.keys() and all(torch.equal(found[name], given[name]) for name in given)


def test_other_weights_are_told(tmp_path):
    torch.save({"conv.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="other.pth: expected torchvision's AlexNet .* without features.0.weight"):
        AlexLPIPS(tmp_path / "other.pth")
