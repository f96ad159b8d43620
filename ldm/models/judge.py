"""A factor judge: reads the factor values off an image, so that generated images can be scored.

It is trained on real images of a data set with ground-truth factors and never sees a generated one; light blur,
noise and brightness changes keep it from leaning on details that only real images have.

Dims: B batch, H W space, F factors, V_k values of factor k.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional

from ldm.data.factors import factor_space
from ldm.lr_scheduler import LambdaWarmUpCosineScheduler
from ldm.models.inputs import check_image_size, images_from_batch
from ldm.util import ConfigError, UserError

WARM_UP_SHARE = 0.05  # of all optimizer steps


class JudgeNetwork(nn.Module):
    """Strided convolutions down to 4 x 4, one hidden layer, one linear head per factor.

    Args:
        sizes: V_k, the number of values of each of the F factors.
        image_size: H = W in pixels, a power of two, at least 16.
        channels: Width of the first convolution; it doubles with each halving of the side, up to four times.
        hidden: Width of the hidden layer.
    """

    def __init__(self, sizes: Sequence[int], image_size: int, channels: int, hidden: int) -> None:
        super().__init__()
        halvings = int(math.log2(image_size)) - 2
        if image_size < 16 or 4 * 2**halvings != image_size:
            raise ConfigError(f"FactorJudge: image_size must be a power of two of at least 16, found {image_size}.")
        widths = [3] + [channels * min(2**level, 4) for level in range(halvings)]
        layers: list[nn.Module] = []
        for level in range(halvings):
            layers += self._block(widths[level], widths[level + 1], stride=2)
        layers += self._block(widths[-1], widths[-1], stride=1)
        self.features = nn.Sequential(*layers, nn.Flatten(), nn.Linear(widths[-1] * 16, hidden), nn.ReLU())
        self.heads = nn.ModuleList(nn.Linear(hidden, size) for size in sizes)

    @staticmethod
    def _block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Logits (B, V_k) of each factor. ``images``: (B, 3, H, W) float in [-1, 1]."""
        features = self.features(images)  # (B, hidden)
        return [head(features) for head in self.heads]


def soften(images: Tensor) -> Tensor:
    """Blur, brightness and noise of random strength for each image, mild as in samples of a diffusion model.

    Args:
        images: (B, 3, H, W) float in [-1, 1].

    Returns:
        (B, 3, H, W) float, clipped to [-1, 1]. Draws from torch's global generator of the images' device.
    """
    shape = (len(images), 1, 1, 1)

    def strength(low: float, high: float) -> Tensor:
        return torch.empty(shape, device=images.device).uniform_(low, high)

    kernel = torch.tensor([0.25, 0.5, 0.25], device=images.device, dtype=images.dtype)
    kernel = (kernel[:, None] * kernel).expand(3, 1, 3, 3)
    padded = functional.pad(images, (1, 1, 1, 1), mode="replicate")
    images = images.lerp(functional.conv2d(padded, kernel, groups=3), strength(0.0, 1.0))
    images = images * strength(0.9, 1.1) + strength(-0.1, 0.1)
    return (images + strength(0.0, 0.1) * torch.randn_like(images)).clamp(-1, 1)


class FactorJudge(pl.LightningModule):
    """Classifies every factor of an image.

    Args:
        space: Name of the factor space (``ldm.data.factors.factor_space``) whose values are to be told apart.
        image_size: H = W of the images in pixels.
        channels: Width of the network's first layer.
        hidden: Width of its last but one layer.
        weight_decay: AdamW's.
        image_key: Key of the images in a batch.

    Attributes:
        learning_rate: AdamW's peak rate; the config's ``base_learning_rate`` sets it.

    Example:
        >>> judge = FactorJudge(space="shapes3d", image_size=32)
        >>> judge.predict_values(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 6])
    """

    def __init__(
        self,
        space: str = "shapes3d",
        image_size: int = 32,
        channels: int = 32,
        hidden: int = 256,
        weight_decay: float = 0.05,
        image_key: str = "image",
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.space = factor_space(space)
        self.network = JudgeNetwork(self.space.factors_num_values, image_size, channels, hidden)
        self.image_size, self.weight_decay, self.image_key = image_size, weight_decay, image_key
        self.learning_rate = 3e-3

    def get_input(self, batch: Mapping[str, Any]) -> Tensor:
        """Images (B, 3, H, W) float in [-1, 1]; ``UserError`` if they have another size than the network's."""
        images = images_from_batch(batch, self.image_key)
        check_image_size(images, self.image_size, "model.params.image_size")
        return images

    @torch.no_grad()
    def predict_values(self, images: Tensor) -> Tensor:
        """The most probable value of each factor.

        Args:
            images: (B, 3, H, W) float in [-1, 1].

        Returns:
            (B, F) int64.

        Raises:
            ValueError: The images have another size than the judge was trained on.
        """
        if images.shape[1:] != (3, self.image_size, self.image_size):
            raise ValueError(
                f"The judge reads images of shape (B, 3, {self.image_size}, {self.image_size}), found "
                f"{tuple(images.shape)}. Train a judge on images of that size."
            )
        return torch.stack([logits.argmax(dim=1) for logits in self.network(images)], dim=1)

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Sum of the factors' cross-entropies on softened images."""
        logits = self.network(soften(self.get_input(batch)))
        losses = [functional.cross_entropy(logit, batch["factors"][:, k]) for k, logit in enumerate(logits)]
        loss = torch.stack(losses).sum()
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["factors"]))
        return loss

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Share of right values, mean over factors."""
        hits = self.predict_values(self.get_input(batch)) == batch["factors"]
        self.log("val/value_accuracy", hits.float().mean(), batch_size=len(hits), prog_bar=True, sync_dist=True)

    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Shares of right attribute words and of right values, mean over factors and for each factor."""
        values, factors = self.predict_values(self.get_input(batch)), batch["factors"]
        words, asked = self._words(values), self._words(factors)
        figures = {
            "figure/judge_accuracy": (words == asked).mean(),
            "figure/judge_value_accuracy": (values == factors).float().mean(),
        }
        for k, name in enumerate(self.space.factor_names):
            figures[f"test/word_accuracy/{name}"] = (words[:, k] == asked[:, k]).mean()
            figures[f"test/value_accuracy/{name}"] = (values[:, k] == factors[:, k]).float().mean()
        options = {"dtype": torch.float32, "device": self.device}
        figures = {name: torch.as_tensor(value, **options) for name, value in figures.items()}
        self.log_dict(figures, on_epoch=True, batch_size=len(values), sync_dist=True)

    def _words(self, values: Tensor) -> np.ndarray:
        """Word numbers (B, F) by the vocabulary of the data set under test; the values where it has none."""
        vocabulary = getattr(self.trainer.test_dataloaders.dataset, "vocabulary", None)
        values = values.cpu().numpy()
        return values if vocabulary is None else vocabulary.word_labels(values)

    @torch.no_grad()
    def log_images(self, batch: Mapping[str, Any], N: int = 16, **options: Any) -> dict[str, Tensor]:
        """The first ``N`` images as they are and as the judge is trained on them; other options do nothing."""
        images = self.get_input(batch)[:N]
        return {"inputs": images, "softened": soften(images)}

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW, a short linear warm-up and one cosine down to zero at the last step."""
        steps = self.trainer.estimated_stepping_batches
        if math.isinf(steps):
            raise ConfigError("FactorJudge's cosine needs an end: set lightning.trainer.max_steps or max_epochs.")
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay)
        factor = LambdaWarmUpCosineScheduler(
            warm_up_steps=max(1, round(WARM_UP_SHARE * steps)),
            lr_min=0.0,
            lr_max=1.0,
            lr_start=0.05,
            max_decay_steps=max(2, int(steps)),
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def load_judge(path: str | Path) -> FactorJudge:
    """Load a trained judge, frozen and in evaluation mode, on the CPU.

    Args:
        path: A checkpoint file, or a run folder, whose ``checkpoints/last.ckpt`` is taken.

    Raises:
        UserError: No such file, a damaged one, or not a judge's checkpoint.
    """
    path = Path(path)
    path = path / "checkpoints" / "last.ckpt" if path.is_dir() else path
    if not path.is_file():
        raise UserError(
            f"No factor judge at {path}. Train one: python main.py --base "
            "configs/quickstart/world.yaml configs/quickstart/judge.yaml -t -n judge"
        )
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        judge = FactorJudge(**checkpoint["hyper_parameters"])
        judge.load_state_dict(checkpoint["state_dict"])
    except (KeyError, TypeError, RuntimeError, EOFError, OSError, pickle.UnpicklingError) as err:
        raise UserError(f"{path} is not a checkpoint of a FactorJudge: {err}") from err
    return judge.eval().requires_grad_(False)
