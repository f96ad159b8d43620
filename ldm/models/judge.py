"""Judge: a classifier of the attributes of images, for scoring generated images.

It is trained on real images of a data set with known attributes only; random blur, noise and brightness reduce its
reliance on details that generated images lack.

Legend: B batch, H W space, U attributes (of a factor data set: its factors), V_k values of attribute k.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ldm.data.factors import FactorSpace, factor_space
from ldm.data.traits import vocabulary_of
from ldm.data.vocabulary import UNKNOWN, AttributeVocabulary
from ldm.errors import reason_of
from ldm.lr_scheduler import LambdaWarmUpCosineScheduler
from ldm.models.attribute_accuracy import AttributeAccuracy
from ldm.models.inputs import attribute_values, check_image_size, check_words, images_from_batch
from ldm.models.optimizers import fused
from ldm.models.options import check_judge
from ldm.modules.weights import without_wrappers
from ldm.ranges import Count, Size, Weight
from ldm.util import ConfigError, UserError

WARM_UP_SHARE = 0.05  # of all optimizer steps


class JudgeNetwork(nn.Module):
    """Strided convolutions down to 4 x 4, one hidden layer, one linear head per factor.

    Args:
        sizes: number of values V_k of each of the F factors.
        image_size: H = W in pixels, at least 8.
        channels: channels of the first convolution, doubled with each halving of the side up to four times.
        hidden: width of the hidden layer.
    """

    def __init__(self, sizes: Sequence[int], image_size: Size, channels: Size, hidden: Count) -> None:
        super().__init__()
        halvings = int(math.log2(image_size)) - 2
        widths = [3] + [channels * min(2**level, 4) for level in range(halvings)]
        layers: list[nn.Module] = []
        for level in range(halvings):
            layers += self._block(widths[level], widths[level + 1], stride=2)
        layers += self._block(widths[-1], widths[-1], stride=1)
        if 4 * 2**halvings != image_size:
            layers.append(nn.AdaptiveAvgPool2d(4))
        self.features = nn.Sequential(*layers, nn.Flatten(), nn.Linear(widths[-1] * 16, hidden), nn.ReLU())
        self.heads = nn.ModuleList(nn.Linear(hidden, size) for size in sizes)

    @staticmethod
    def _block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the logits of each factor, (B, V_k), of images (B, 3, H, W) in [-1, 1]."""
        features = self.features(images)  # (B, hidden)
        return [head(features) for head in self.heads]


def soften(images: Tensor) -> Tensor:
    """Apply blur, brightness and noise of random strength to each image, as mild as in samples of a diffusion model.

    Images are (B, 3, H, W), clamped to [-1, 1]. Random numbers are drawn from the global generator of the device.
    """
    shape = (len(images), 1, 1, 1)

    def strength(low: float, high: float) -> Tensor:
        return torch.empty(shape, device=images.device).uniform_(low, high)

    kernel = torch.tensor([0.25, 0.5, 0.25], device=images.device, dtype=images.dtype)
    kernel = (kernel[:, None] * kernel).expand(3, 1, 3, 3)
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    # Convolutions are narrower in mixed precision.
    images = images.lerp(F.conv2d(padded, kernel, groups=3).to(images.dtype), strength(0.0, 1.0))
    images = images * strength(0.9, 1.1) + strength(-0.1, 0.1)
    return (images + strength(0.0, 0.1) * torch.randn_like(images)).clamp(-1, 1)


class AttributeJudge(pl.LightningModule):
    """Classifier of every attribute of an image.

    Args:
        vocabulary: the attributes, their values and words (``AttributeVocabulary.to_dict``): in a config
            ``${data:vocabulary}``, those of the training data.
        space: instead of a vocabulary, the factors of the data set: a name for ``ldm.data.factors.factor_space``, or
            the arguments of a ``FactorSpace`` (names and sizes).
        image_size: H = W of the images in pixels.
        channels: channels of the first layer.
        hidden: width of the hidden layer.
        weight_decay: weight decay of AdamW.
        image_key: entry of the batch with the images.

    Attributes:
        learning_rate: peak learning rate, set from ``base_learning_rate`` of the config.

    Raises:
        ConfigError: neither or both of ``vocabulary`` and ``space`` are given, or the images are too small.

    Example:
        >>> judge = AttributeJudge(space="shapes3d", image_size=32)
        >>> judge.predict_values(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 6])
    """

    def __init__(
        self,
        vocabulary: Mapping[str, Any] | None = None,
        space: str | Mapping[str, Any] | None = None,
        image_size: Size = 32,
        channels: Size = 32,
        hidden: Count = 256,
        weight_decay: Weight = 0.05,
        image_key: str = "image",
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        check_judge({"vocabulary": vocabulary, "space": space, "image_size": image_size})
        self.vocabulary = None if vocabulary is None else AttributeVocabulary.from_dict(vocabulary)
        self._words_of = self.vocabulary
        self.names, self.sizes = _attributes(self.vocabulary, space)
        self.network = JudgeNetwork(self.sizes, image_size, channels, hidden)
        self.word_accuracy, self.value_accuracy = AttributeAccuracy(self.names), AttributeAccuracy(self.names)
        self.image_size, self.weight_decay, self.image_key = image_size, weight_decay, image_key
        self.learning_rate = 3e-3

    def networks_to_compile(self) -> list[nn.Module]:
        """See ``ldm.training.compiling.Compilable``."""
        return [self.network]

    def get_labels(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the values of the attributes of a batch, (B, U) int64, ``UNKNOWN`` where not known."""
        return attribute_values(batch, self.names, self.sizes)

    def get_input(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the images of a batch, (B, 3, H, W) in [-1, 1], of the size of the network."""
        images = images_from_batch(batch, self.image_key)
        check_image_size(images, self.image_size, "model.params.image_size")
        return images

    @torch.no_grad()
    def predict_values(self, images: Tensor) -> Tensor:
        """Return the most probable value of each factor, (B, F) int64, of images (B, 3, H, W) in [-1, 1].

        Raises:
            ValueError: the size of the images is not ``image_size``.
        """
        if images.shape[1:] != (3, self.image_size, self.image_size):
            raise ValueError(
                f"AttributeJudge: expected images of shape (B, 3, {self.image_size}, {self.image_size}), got "
                f"{tuple(images.shape)}. Use a judge trained on images of that size."
            )
        return torch.stack([logits.argmax(dim=1) for logits in self.network(images)], dim=1)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Return the last hidden layer, (B, ``hidden``), of images (B, 3, H, W) in [-1, 1]."""
        return self.network.features(images)

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Return the sum of the cross-entropies of all attributes on softened images; unknown values are left out."""
        values = self.get_labels(batch)
        logits = self.network(soften(self.get_input(batch)))
        sums = [F.cross_entropy(*pair, ignore_index=UNKNOWN, reduction="sum") for pair in zip(logits, values.T)]
        loss = (torch.stack(sums) / (values != UNKNOWN).sum(dim=0).clamp(min=1)).sum()
        self.log("train/loss", loss, prog_bar=True, batch_size=len(values))
        return loss

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Add a batch to the accuracy of values and of words."""
        true, unseen = self.get_labels(batch), batch.get("unseen")
        values = self.predict_values(self.get_input(batch))
        self.value_accuracy.update(values == true, true != UNKNOWN, unseen)
        self.word_accuracy.update(self._words(values) == self._words(true), true != UNKNOWN, unseen)

    test_step = validation_step

    def check_data(self, data: Any) -> None:
        """See ``ldm.models.contracts.ChecksData``."""
        check_words(data, self.vocabulary)

    def on_validation_start(self) -> None:
        """Check that the validation data have the words of the judge."""
        self.check_data(self.trainer.val_dataloaders)

    def on_test_start(self) -> None:
        """Take the words of the test data set if the judge has none of its own."""
        loader = self.trainer.test_dataloaders
        self.check_data(loader)
        self._words_of = self.vocabulary or (vocabulary_of(loader.dataset) if isinstance(loader, DataLoader) else None)

    def on_validation_epoch_end(self) -> None:
        """Log the share of correct values, of all attributes and of each attribute."""
        self.log_dict(self.value_accuracy.flush("val/value_accuracy"))
        self.word_accuracy.reset()

    def on_test_epoch_end(self) -> None:
        """Log the shares of correct words and of correct values, of all attributes and of each attribute."""
        self.log_dict(self.value_accuracy.flush("figure/judge_value_accuracy"))
        self.log_dict(self.word_accuracy.flush("figure/judge_accuracy"))

    def _words(self, values: Tensor) -> Tensor:
        """Return the words (B, U) of values; without a vocabulary the values."""
        if self._words_of is None:
            return values
        return torch.from_numpy(self._words_of.word_labels(values.cpu().numpy())).to(values.device)

    @torch.no_grad()
    def log_images(self, batch: Mapping[str, Any], N: int = 16, **options: Any) -> dict[str, Tensor]:
        """Return the first ``N`` images and their softened versions; other options are ignored."""
        images = self.get_input(batch)[:N]
        return {"inputs": images, "softened": soften(images)}

    def configure_optimizers(self) -> dict[str, Any]:
        """Return AdamW with a short linear warm-up and a cosine decay to zero at the last step."""
        steps = self.trainer.estimated_stepping_batches
        if math.isinf(steps):
            raise ConfigError(
                "AttributeJudge: expected a limit of steps. Set lightning.trainer.max_steps or max_epochs."
            )
        options = {"lr": self.learning_rate, "weight_decay": self.weight_decay}
        optimizer = fused(torch.optim.AdamW, self.parameters(), **options)
        warm_up = max(1, round(WARM_UP_SHARE * steps))
        rates = {"lr_min": 0.0, "lr_max": 1.0, "lr_start": 0.05}
        factor = LambdaWarmUpCosineScheduler(warm_up, max_decay_steps=max(2, int(steps)), **rates)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _attributes(
    vocabulary: AttributeVocabulary | None, space: str | Mapping[str, Any] | None
) -> tuple[tuple[str, ...], list[int]]:
    """Return the name and the number of values of each attribute."""
    if vocabulary is not None:
        return vocabulary.factor_names, [len(of_value) for of_value in vocabulary.value_to_word]
    factors = factor_space(space) if isinstance(space, str) else FactorSpace(**space)
    return factors.factor_names, list(factors.factors_num_values)


def load_judge(path: str | Path) -> AttributeJudge:
    """Load a trained judge on the CPU, frozen and in evaluation mode.

    Args:
        path: checkpoint file, or run folder, of which ``checkpoints/last.ckpt`` is loaded.

    Raises:
        UserError: the file is missing, damaged or not a checkpoint of a judge.
    """
    path = Path(path)
    path = path / "checkpoints" / "last.ckpt" if path.is_dir() else path
    if not path.is_file():
        raise UserError(
            f"{path}: expected a checkpoint of a factor judge, got no such file. Train one on the same data: "
            "python main.py --base DATA.yaml configs/quickstart/judge.yaml -t -n judge"
        )
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        judge = AttributeJudge(**checkpoint["hyper_parameters"])
        judge.load_state_dict(without_wrappers(checkpoint["state_dict"], judge.state_dict(), path))
    except (KeyError, TypeError, RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        message = f"{path}: expected a checkpoint of an AttributeJudge ({reason_of(error)}). Train one or copy it."
        raise UserError(message) from error
    return judge.eval().requires_grad_(False)
