"""Data and a text stage of a user, for models whose condition is a text, a mask, a depth map or a small image."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from script_modules import load_script
from stand_ins import PLAIN_UNET
from torch import Tensor, nn

import main as front_door

TEXTS = {"use_spatial_transformer": True, "context_dim": 8}
TRAINING = {
    "trainer": {"max_steps": 2, "accelerator": "cpu", "num_sanity_val_steps": 0},
    "callbacks": {
        "image_logger": {
            "target": "main.ImageLogger",
            "params": {"batch_frequency": 1, "max_images": 2, "log_images_kwargs": {"ddim_steps": 2}},
        }
    },
}


class Pictures:
    """LDM's convention: float arrays (H, W, C) in [-1, 1], and entries of several tasks."""

    def __init__(self, size: int | tuple[int, int] = 32, low: int = 4, length: int = 4) -> None:
        self.size = (size, size) if isinstance(size, int) else tuple(size)
        self.low, self.length = low, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = np.random.default_rng(index)
        image = generator.uniform(-1, 1, (*self.size, 3)).astype(np.float32)
        mask = np.zeros((*self.size, 1), np.float32)
        mask[: self.size[0] // 2] = 1
        return {
            "image": image,
            "jpg": image,
            "mask": mask,
            "masked_image": image * (1 - mask),
            "lr": image[:: self.low, :: self.low],
            "midas_in": generator.uniform(0, 9, self.size).astype(np.float32),
            "txt": ("a red cube", "a hill")[index % 2],
        }


class OwnWords(nn.Module):
    """A text stage without a base class of the package: one fixed direction for each of three words."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.width = width
        self.scale = nn.Parameter(torch.ones(1))

    def encode(self, texts: list[str]) -> Tensor:
        """(B, 3, width)."""
        return self.scale * torch.stack([self._sequence(text) for text in texts])

    def _sequence(self, text: str) -> Tensor:
        words = (text.split() + ["", "", ""])[:3]
        seeds = [zlib.crc32(f"{word} {place}".encode()) for place, word in enumerate(words)]
        return torch.stack([torch.randn(self.width, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


class WordsAndVector(OwnWords):
    """A text stage that also returns a vector for each text."""

    def encode(self, texts: list[str]) -> dict[str, Tensor]:
        """A sequence (B, 3, width) and a vector (B, 3)."""
        words = super().encode(texts)
        return {"c_crossattn": words, "c_adm": words[:, 0, :3]}


def first_stage(kind: str = "kl", factor: int = 4, channels: int = 4, resolution: Any = 16) -> dict[str, Any]:
    """Config of an autoencoder with a downsampling of ``factor``, as LDM writes it."""
    ddconfig = {
        "double_z": kind == "kl",
        "z_channels": channels,
        "resolution": resolution,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 32,
        "ch_mult": [1] * factor.bit_length(),
        "num_res_blocks": 1,
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    params = {"embed_dim": channels, "ddconfig": ddconfig, "lossconfig": {"target": "torch.nn.Identity"}}
    if kind == "kl":
        return {"target": "ldm.models.autoencoder.AutoencoderKL", "params": params}
    return {"target": "ldm.models.autoencoder.VQModelInterface", "params": {**params, "n_embed": 16}}


def diffusion(name: str = "LatentDiffusion", unet: dict[str, Any] | None = None, **params: Any) -> dict[str, Any]:
    """Config of a diffusion model on latents of 8 x 8."""
    defaults = {
        "timesteps": 10,
        "image_size": 8,
        "channels": 4,
        "monitor": None,
        "first_stage_key": "jpg",
        "first_stage_config": first_stage(),
        "cond_stage_config": "__is_unconditional__",
    }
    network = {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": {**PLAIN_UNET, **(unet or {})}}
    target = f"ldm.models.diffusion.ddpm.{name}"
    return {"base_learning_rate": 1e-4, "target": target, "params": {**defaults, "unet_config": network, **params}}


def data(**params: Any) -> dict[str, Any]:
    """Config of the data."""
    pictures = {"target": "condition_parts.Pictures", "params": params}
    sections = {"batch_size": 2, "num_workers": 0, "train": pictures, "validation": pictures}
    return {"target": "main.DataModuleFromConfig", "params": sections}


def batch(count: int = 2, **params: Any) -> dict[str, Any]:
    """A collated batch."""
    from ldm.data.collate import collate

    pictures = Pictures(**params)
    return collate([pictures[index] for index in range(count)])


def train(folder: Path, model: dict[str, Any], sections: dict[str, Any]) -> Path | None:
    """Train two steps by ``main.py`` with the logger of images; the run folder, or None after an error."""
    config = {"model": model, "data": sections, "lightning": TRAINING}
    (folder / "c.yaml").write_text(yaml.safe_dump(config))
    words = ["--base", str(folder / "c.yaml"), "-l", str(folder / "logs")]
    assert front_door.main(words) == 0
    return None if front_door.main([*words, "-t", "--no-test"]) else next((folder / "logs").iterdir())


def drawn(run: Path) -> set[str]:
    """Names of the pictures of the training."""
    return {path.name.partition("_gs-")[0] for path in (run / "images" / "train").iterdir()}


def sampled(capsys: Any, path: Path, *words: str) -> tuple[int, ...] | str:
    """The shape of what ``sample_diffusion.py`` writes in two steps, or its error."""
    capsys.readouterr()
    code = load_script("sample_diffusion").main(["-r", str(path), "-c", "2", "--device", "cpu", *words])
    output = capsys.readouterr()
    if code:
        return output.err
    return np.load(next(line for line in output.out.splitlines() if line.endswith(".npz")))["arr_0"].shape
