"""A small CLIP trained on images with known attributes, so that nothing has to be downloaded.

Radford et al. 2021 (contrastive language-image pre-training), on open_clip's own model class: what this stage writes
is an ordinary open_clip folder, and everything that reads a published CLIP reads it too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from ldm.data.vocabulary import AttributeVocabulary, world_vocabulary
from ldm.losses.contrastive import caption_matches, multi_positive_loss
from ldm.models.inputs import batch_value, images_from_batch
from ldm.modules.encoders.clip_loading import CONFIG_FILE, WEIGHT_FILES, build_clip
from ldm.modules.encoders.tokenizer import WORDS_FILE, WordTokenizer, split_words
from ldm.modules.encoders.zero_shot import attribute_hits, attribute_probabilities
from ldm.pictures.grid import CaptionedGrid
from ldm.util import UserError, atomic_write, instantiate_from_config

MAX_LOGIT_SCALE = 100.0  # Radford et al. 2021, section 2.5: keeps the training stable
HALF = (0.5, 0.5, 0.5)  # mean and std of pixels in [0, 1]: images in [-1, 1] enter the tower as they are


class WorldCLIP(pl.LightningModule):
    """Trains a CLIP on captions; its folder is ``<run>/clip``.

    Args:
        embed_dim: D, width of the common space.
        vision_cfg: open_clip's vision config (``image_size`` is the side of the images).
        text_cfg: open_clip's text config; ``vocab_size`` and ``context_length`` follow from the vocabulary.
        vocabulary: words and phrasings of the attributes (``AttributeVocabulary.to_dict``); None: the world's.
        num_captions: captions read per batch, the first ones; None reads all. A caption fits several images, so
            fewer captions than images cost little accuracy and save text-tower time.
        weight_decay: AdamW's, on matrices only (not on biases, gains and the temperature).
        scheduler_config: learning-rate multiplier, called with the number of optimizer steps.
        image_key: entry of the batch that holds the images.
        monitor: logged metric by which checkpoints are kept.

    Attributes:
        learning_rate: set by the command line from ``base_learning_rate``.
        clip: the ``open_clip.CLIP``.
        tokenizer: whole words (:class:`WordTokenizer`).
    """

    def __init__(
        self,
        embed_dim: int,
        vision_cfg: Mapping[str, Any],
        text_cfg: Mapping[str, Any],
        vocabulary: Mapping[str, Any] | None = None,
        num_captions: int | None = None,
        weight_decay: float = 0.05,
        scheduler_config: Mapping[str, Any] | None = None,
        image_key: str = "image",
        monitor: str | None = "val/attribute_accuracy",
    ) -> None:
        super().__init__()
        self.learning_rate = 1e-3
        self.vocabulary = AttributeVocabulary.from_dict(vocabulary) if vocabulary else world_vocabulary()
        self.tokenizer = WordTokenizer(self.vocabulary.all_words(), longest_caption(self.vocabulary) + 2)
        self.model_cfg = {
            "embed_dim": embed_dim,
            "vision_cfg": _plain(vision_cfg),
            "text_cfg": {
                **_plain(text_cfg),
                "context_length": self.tokenizer.context_length,
                "vocab_size": self.tokenizer.vocab_size,
            },
        }
        self.clip = build_clip(self.model_cfg)
        self.num_captions, self.weight_decay = num_captions, weight_decay
        self.scheduler_config, self.image_key = scheduler_config, image_key
        if monitor is not None:
            self.monitor = monitor
        self.register_buffer("word_of_value", _word_table(self.vocabulary), persistent=False)
        self._vocabulary_embeddings: list[Tensor] = []

    def get_input(self, batch: Mapping[str, Any]) -> Tensor:
        """Images of a batch, (B, 3, H, W) in [-1, 1].

        Raises:
            UserError: the images are not of ``vision_cfg.image_size``.
        """
        images = images_from_batch(batch, self.image_key)
        size = self.model_cfg["vision_cfg"]["image_size"]
        if images.shape[-2:] != (size, size):
            raise UserError(
                f"images of {images.shape[-2]} x {images.shape[-1]} pixels, but this CLIP reads {size} x {size}: set "
                f"the data set's size to {size} or model.params.vision_cfg.image_size to the images'"
            )
        return images

    def get_labels(self, batch: Mapping[str, Any]) -> Tensor:
        """Word number of each attribute of each image of a batch, (B, U) int64."""
        factors = batch_value(batch, "factors").to(self.word_of_value.device)
        return self.word_of_value[torch.arange(factors.shape[1], device=factors.device), factors]

    def encode_image(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> embeddings (B, D) float32 of length 1."""
        return F.normalize(self.clip.encode_image(x).float(), dim=-1)

    def encode_text(self, texts: list[str]) -> Tensor:
        """N texts -> embeddings (N, D) float32 of length 1."""
        tokens = self.tokenizer(texts).to(self.device, non_blocking=True)
        return F.normalize(self.clip.encode_text(tokens).float(), dim=-1)

    def forward(self, x: Tensor, texts: list[str]) -> Tensor:
        """Scaled similarities of images (B, 3, H, W) in [-1, 1] and C texts, (B, C)."""
        images, words = self.encode_image(x), self.encode_text(texts)
        with torch.autocast(x.device.type, enabled=False):  # logits of up to 100 need more than eight bits
            return self.clip.logit_scale.exp() * images @ words.T

    def training_step(self, batch: Mapping[str, Any], _batch_index: int) -> Tensor:
        """Contrastive loss over all true pairs of the batch (of this process)."""
        texts, mask = batch_value(batch, "text"), batch_value(batch, "caption_mask")
        labels = self.get_labels(batch)
        count = self.num_captions or len(texts)
        logits = self(self.get_input(batch), texts[:count])
        loss = multi_positive_loss(logits, caption_matches(labels, labels[:count], mask[:count]))
        self.log("train/loss", loss.detach(), prog_bar=True)
        self.log("train/logit_scale", self.clip.logit_scale.detach().exp())
        return loss

    @torch.no_grad()
    def on_train_batch_start(self, batch: Mapping[str, Any], _batch_index: int) -> None:
        """Before the first step, centre both towers on the first batch.

        Random towers give all images, and all texts, nearly one direction (mean cosine about 0.9 and 0.5). Their
        similarities then hardly differ and training crawls along a plateau: centred, the same number of steps
        reached .66 instead of .53 mean accuracy.
        """
        if self.trainer.fit_loop.total_batch_idx > 0:  # not global_step, which stands still while accumulating
            return
        images, texts = self.clip.encode_image(self.get_input(batch)), batch_value(batch, "text")
        words = self.clip.encode_text(self.tokenizer(texts).to(self.device))
        for features, norm, projection in (
            (images, getattr(self.clip.visual, "ln_post", None), getattr(self.clip.visual, "proj", None)),
            (words, self.clip.ln_final, self.clip.text_projection),
        ):
            if norm is not None:  # a ResNet's tower has none
                mean = self.trainer.strategy.reduce(features.float().mean(dim=0), reduce_op="mean")
                norm.bias -= mean @ torch.linalg.pinv(projection.float())

    def on_train_batch_end(self, *_: Any) -> None:
        """Keep the inverse temperature within its limit."""
        with torch.no_grad():
            self.clip.logit_scale.clamp_(max=math.log(MAX_LOGIT_SCALE))

    @torch.no_grad()
    def embed_vocabulary(self) -> list[Tensor]:
        """Embeddings of the canonical phrase of every word: U tensors (W_k, D)."""
        return [
            self.encode_text([self.vocabulary.phrases(k, w)[0] for w in range(len(words))])
            for k, words in enumerate(self.vocabulary.words)
        ]

    def on_validation_epoch_start(self) -> None:
        """Embed the vocabulary once for all batches."""
        self._vocabulary_embeddings = self.embed_vocabulary()

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: Mapping[str, Any], _batch_index: int) -> None:
        """Zero-shot accuracy of each attribute, and their mean as ``val/attribute_accuracy``."""
        accuracy, count = self._accuracy(batch)
        names = [f"val/accuracy_{name}" for name in self.vocabulary.factor_names]
        self.log_dict(dict(zip(names, accuracy)), batch_size=count, sync_dist=True)
        self.log("val/attribute_accuracy", accuracy.mean(), prog_bar=True, batch_size=count, sync_dist=True)

    def test_step(self, batch: Mapping[str, Any], _batch_index: int) -> None:
        """The same as figures of the run: ``figure/clip_accuracy`` and one per attribute."""
        accuracy, count = self._accuracy(batch)
        names = [f"figure/clip_accuracy_{name}" for name in self.vocabulary.factor_names]
        self.log_dict(dict(zip(names, accuracy)), batch_size=count, sync_dist=True)
        self.log("figure/clip_accuracy", accuracy.mean(), batch_size=count, sync_dist=True)

    def _accuracy(self, batch: Mapping[str, Any]) -> tuple[Tensor, int]:
        """Share of images whose attribute is read rightly, (U,), and the number of images."""
        embedding = self.encode_image(self.get_input(batch))
        hits = attribute_hits(embedding, self._vocabulary_embeddings, self.get_labels(batch))
        return hits.float().mean(dim=0), len(hits)

    def on_fit_end(self) -> None:
        """Write ``<run>/clip``."""
        self._save_in_run()

    def on_test_end(self) -> None:
        """Write ``<run>/clip`` with the weights that were tested."""
        self._save_in_run()

    def _save_in_run(self) -> None:
        if self.trainer.is_global_zero and not self.trainer.fast_dev_run:
            self.save_folder(Path(self.trainer.default_root_dir) / "clip")

    def save_folder(self, folder: str | Path) -> None:
        """Write this CLIP as a folder that ``open_clip.create_model("local-dir:<folder>")`` loads.

        Every file is replaced atomically, the config last: a folder with a config is a whole CLIP.

        Args:
            folder: made if needed. Gets ``open_clip_model.safetensors``, ``words.json`` (the tokenizer) and
                ``open_clip_config.json`` (model, and mean and std of its pixels in [0, 1]).
        """
        from safetensors.torch import save

        folder = Path(folder)
        weights = {name: value.detach().cpu().contiguous() for name, value in self.clip.state_dict().items()}
        with atomic_write(folder / WEIGHT_FILES[0], "wb") as stream:
            stream.write(save(weights, metadata={"format": "pt"}))
        self.tokenizer.save(folder / WORDS_FILE)
        size = self.model_cfg["vision_cfg"]["image_size"]
        pixels = {"mean": HALF, "std": HALF, "size": [size, size], "resize_mode": "squash"}
        with atomic_write(folder / CONFIG_FILE) as stream:
            json.dump({"model_cfg": self.model_cfg, "preprocess_cfg": pixels}, stream, indent=1)

    def configure_optimizers(self) -> Any:
        """AdamW with decay on matrices only, and the learning-rate multiplier if one is configured."""
        decayed = [p for p in self.clip.parameters() if p.ndim >= 2]
        others = [p for p in self.clip.parameters() if p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": self.weight_decay}, {"params": others, "weight_decay": 0.0}]
        # A contrastive loss changes quickly with the other texts of a batch; CLIP, too, averages squares over less.
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, betas=(0.9, 0.98))
        if self.scheduler_config is None:
            return optimizer
        factor = instantiate_from_config(self.scheduler_config)
        return [optimizer], [{"scheduler": LambdaLR(optimizer, factor), "interval": "step"}]

    @torch.no_grad()
    def log_images(self, batch: Mapping[str, Any], N: int = 8, **_: Any) -> dict[str, CaptionedGrid]:
        """Images with the words this CLIP reads off them.

        Args:
            batch: a batch with images.
            N: at most so many images.

        Returns:
            ``zero_shot``: one image per row, captioned with the likeliest word of every attribute.
        """
        images = self.get_input(batch)[:N].to(self.device)
        probabilities = attribute_probabilities(
            self.encode_image(images), self.embed_vocabulary(), self.clip.logit_scale.exp().item()
        )
        guesses = torch.stack([p.argmax(dim=1) for p in probabilities], dim=1).tolist()
        rows = [" / ".join(words[w] for words, w in zip(self.vocabulary.words, guess)) for guess in guesses]
        return {"zero_shot": CaptionedGrid(images, rows, [], "attributes read by CLIP")}


def longest_caption(vocabulary: AttributeVocabulary) -> int:
    """Number of words of the longest caption that names every attribute."""
    return sum(
        max(len(split_words(p)) for w in range(len(words)) for p in vocabulary.phrases(k, w))
        for k, words in enumerate(vocabulary.words)
    )


def _word_table(vocabulary: AttributeVocabulary) -> Tensor:
    """Word number of every value of every factor, (U, largest size) int64, padded with zeros."""
    width = max(map(len, vocabulary.value_to_word))
    table = np.zeros((vocabulary.num_units, width), dtype=np.int64)
    for row, words in zip(table, vocabulary.value_to_word):
        row[: len(words)] = words
    return torch.from_numpy(table)


def _plain(config: Any) -> Any:
    """Plain dicts and lists of an OmegaConf section, which JSON and open_clip can take."""
    if isinstance(config, Mapping):
        return {str(key): _plain(config[key]) for key in config}
    if isinstance(config, (str, bytes)) or not hasattr(config, "__iter__"):
        return config
    return [_plain(value) for value in config]
