"""The recipe behind the golden figures: weights and inputs that anybody can rebuild, and what is compared.

Every weight is a sine of its flat index with a phase from its state-dict key, every input a sine of its
flat index, so a figure depends on nothing but the arithmetic of the network.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

GOLDEN_DIR = Path(__file__).parent / "golden"

VQ_DDCONFIG: dict[str, Any] = {
    "double_z": False,
    "z_channels": 3,
    "resolution": 64,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 2, 4],
    "num_res_blocks": 2,
    "attn_resolutions": [],
    "dropout": 0.0,
}
KL_DDCONFIG: dict[str, Any] = {**VQ_DDCONFIG, "double_z": True, "z_channels": 4}
UNET_CONFIG: dict[str, Any] = {
    "image_size": 16,
    "in_channels": 3,
    "out_channels": 3,
    "model_channels": 64,
    "num_res_blocks": 2,
    "attention_resolutions": [1, 2, 4],
    "channel_mult": [1, 2, 4, 4],
    "num_heads": 8,
    "use_scale_shift_norm": True,
    "resblock_updown": True,
}


def load_golden(name: str) -> dict[str, Any]:
    """Read ``tests/golden/<name>.json``."""
    return json.loads((GOLDEN_DIR / f"{name}.json").read_text())


@torch.no_grad()
def fill(module: nn.Module) -> nn.Module:
    """Overwrite every state-dict entry of ``module`` (keys without a prefix) and put it in eval mode."""
    for key, value in module.state_dict().items():
        if not value.is_floating_point():
            value.zero_()
            continue
        if key.endswith("running_var"):
            value.fill_(1.0)
            continue
        phase = zlib.crc32(key.encode()) % 1000
        flat_index = torch.arange(value.numel(), dtype=torch.float64)
        wave = torch.sin(0.7 * flat_index + phase).float().view(value.shape)
        if value.ndim == 1 and key.endswith("weight"):
            wave = 1 + 0.1 * wave
        elif value.ndim >= 2:
            wave = wave * (1.4 / math.sqrt(value[0].numel()))
        else:
            wave = 0.1 * wave
        value.copy_(wave)
    return module.eval()


def inp(shape: tuple[int, ...], phase: float = 0.0) -> Tensor:
    """A deterministic input: sin(0.37 i + phase) over the flat index i."""
    return torch.sin(0.37 * torch.arange(math.prod(shape), dtype=torch.float64) + phase).float().view(shape)


def stat(tensor: Tensor, at: Iterable[str | int] = ()) -> dict[str, Any]:
    """What is compared of a tensor: how many entries, their sum, their l2 norm and the entries listed."""
    values = tensor.detach().double().flatten()
    return {
        "n": values.numel(),
        "sum": values.sum().item(),
        "l2": values.norm().item(),
        "at": {str(index): values[int(index)].item() for index in at},
    }


def assert_stat(tensor: Tensor, golden: dict[str, Any], tolerance: float = 1e-5) -> None:
    """Compare ``stat(tensor)`` with a golden figure; the tolerance is relative to the l2 norm.

    Rounding errors of one sign add up in a sum that is larger than the norm: it may be off by the same share.
    """
    found = stat(tensor, golden["at"])
    margin = tolerance * golden["l2"]
    assert found["n"] == golden["n"]
    assert found["sum"] == pytest.approx(golden["sum"], abs=margin, rel=tolerance)
    assert found["l2"] == pytest.approx(golden["l2"], abs=margin, rel=0)
    assert found["at"] == pytest.approx(golden["at"], abs=margin, rel=0)
