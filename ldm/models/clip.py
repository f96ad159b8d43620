"""Training of a small CLIP (Radford et al. 2021) on images with known attributes, instead of downloading one.

The model is open_clip's, and the output is an open_clip folder, which can be used in place of a published CLIP.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor

from ldm.data.vocabulary import UNKNOWN, AttributeVocabulary
from ldm.losses.contrastive import caption_matches, multi_positive_loss
from ldm.lr_scheduler import with_schedule
from ldm.models.attribute_accuracy import AttributeAccuracy
from ldm.models.inputs import attribute_values, batch_value, check_image_size, check_words, images_from_batch
from ldm.models.optimizers import fused
from ldm.modules.encoders import clip_loading
from ldm.modules.encoders.tokenizer import WORDS_FILE, WordTokenizer, split_words
from ldm.modules.encoders.zero_shot import attribute_hits, attribute_probabilities
from ldm.pictures.grid import CaptionedGrid
from ldm.ranges import Count, Weight
from ldm.util import ConfigError, atomic_write

MAX_LOGIT_SCALE = 100.0  # for stable training, Radford et al. 2021, section 2.5
HALF = (0.5, 0.5, 0.5)  # mean and std of pixels in [0, 1], for which the tower takes images in [-1, 1]


class AttributeCLIP(pl.LightningModule):
    """CLIP trained on captions and written to ``<run>/clip``.

    With ``pretrained`` it is a published CLIP, or one of an earlier run, with its own tokenizer, image size and pixel
    statistics, which training continues; ``lightning.trainer.max_steps: 0`` measures it without training.

    Args:
        vocabulary: words and phrasings of the attributes (``AttributeVocabulary.to_dict``): in a config
            ``${data:vocabulary}``, those of the training data.
        embed_dim: width D of the joint space.
        vision_cfg: open_clip's vision config; ``image_size`` is the side of the images.
        text_cfg: open_clip's text config; ``vocab_size`` and ``context_length`` are derived from the vocabulary.
        pretrained: instead of the three, name or folder of a CLIP (:mod:`ldm.modules.encoders.clip_loading`).
        weights: weight file of ``pretrained``, or its folder, if it is not in a cache. Nothing is downloaded.
        num_captions: number of captions used per batch, None for all. A caption matches several images, so that fewer
            captions than images reduce the time of the text tower at a small cost of accuracy.
        weight_decay: weight decay of AdamW, applied to matrices only.
        scheduler_config: learning-rate multiplier, called with the number of optimizer steps.
        image_key: entry of the batch with the images.
        monitor: logged metric that selects checkpoints.

    Attributes:
        learning_rate: set from ``base_learning_rate`` of the config.
        clip: the ``open_clip.CLIP``.
        tokenizer: tokenizer of whole words (:class:`WordTokenizer`), or that of ``pretrained``.

    Raises:
        ConfigError: neither ``pretrained`` nor the sizes of a new CLIP are given, or both.
        UserError: files of ``pretrained`` are missing or damaged.
    """

    def __init__(
        self,
        vocabulary: Mapping[str, Any],
        embed_dim: Count | None = None,
        vision_cfg: Mapping[str, Any] | None = None,
        text_cfg: Mapping[str, Any] | None = None,
        pretrained: str | None = None,
        weights: str | None = None,
        num_captions: Count | None = None,
        weight_decay: Weight = 0.05,
        scheduler_config: Mapping[str, Any] | None = None,
        image_key: str = "image",
        monitor: str | None = "val/attribute_accuracy",
    ) -> None:
        super().__init__()
        self.learning_rate = 1e-3
        self.vocabulary = AttributeVocabulary.from_dict(vocabulary)
        sizes = {"embed_dim": embed_dim, "vision_cfg": vision_cfg, "text_cfg": text_cfg}
        given = [name for name, value in sizes.items() if value is not None]
        if len(given) != (0 if pretrained else len(sizes)):
            raise ConfigError(
                f"model.params: expected {', '.join(sizes)}, or pretrained instead of them, got "
                f"{', '.join(given + ['pretrained'] * bool(pretrained)) or 'neither'}. Make it one of both"
            )
        self._source = clip_loading.find_clip(pretrained, weights) if pretrained else None
        self._build(sizes)
        self.num_captions, self.weight_decay = num_captions, weight_decay
        self.scheduler_config, self.image_key = scheduler_config, image_key
        if monitor is not None:
            self.monitor = monitor
        self.register_buffer("word_of_value", _word_table(self.vocabulary), persistent=False)
        self._vocabulary_embeddings: list[Tensor] = []
        self.accuracy = AttributeAccuracy(self.vocabulary.factor_names)

    def _build(self, sizes: Mapping[str, Any]) -> None:
        """Build a new CLIP of ``sizes``, or load the pretrained one."""
        if self._source is None:
            self.tokenizer = WordTokenizer(self.vocabulary.all_words(), longest_caption(self.vocabulary) + 2)
            derived = {"context_length": self.tokenizer.context_length, "vocab_size": self.tokenizer.vocab_size}
            config = {**sizes, "text_cfg": {**sizes["text_cfg"], **derived}}
            self.model_cfg = OmegaConf.to_container(OmegaConf.create(config), resolve=True)  # plain, as JSON requires
            self.clip, pixels = clip_loading.build_clip(self.model_cfg), {"mean": HALF, "std": HALF}
        else:
            self.tokenizer, self.model_cfg = clip_loading.load_tokenizer(self._source), self._source.model_cfg
            self.clip = clip_loading.load_clip(self._source).requires_grad_(True).train()
            pixels = self._source.preprocess_cfg
        side = self.clip.visual.image_size
        self.image_size = int(side if isinstance(side, int) else side[0])
        self.pixels_cfg = {"resize_mode": "squash", **pixels, "size": [self.image_size, self.image_size]}
        self.context_length = self.model_cfg["text_cfg"].get("context_length", 77)
        self.tokenizer(self.vocabulary.all_words(), context_length=self.context_length)  # raises for unknown words
        for name, (factor, offset) in {"mean": (2, -1), "std": (2, 0)}.items():  # of pixels in [-1, 1]
            value = torch.tensor(self.pixels_cfg[name]).view(1, 3, 1, 1) * factor + offset
            self.register_buffer(f"pixel_{name}", value, persistent=False)

    def networks_to_compile(self) -> list[torch.nn.Module]:
        """See ``ldm.training.compiling.Compilable``; texts vary in number."""
        return [self.clip.visual]

    def get_input(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the images of a batch, (B, 3, H, W) in [-1, 1].

        Raises:
            UserError: the size of the images is not that of the CLIP.
        """
        images = images_from_batch(batch, self.image_key)
        where = "model.params.vision_cfg.image_size" if self._source is None else "size of model.params.pretrained"
        check_image_size(images, self.image_size, f"model.params.{where}")
        return images

    def get_labels(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the word of each attribute of each image of a batch, (B, U) int64; ``UNKNOWN`` where not known."""
        sizes = [len(of_value) for of_value in self.vocabulary.value_to_word]
        values = attribute_values(batch, self.vocabulary.factor_names, sizes).to(self.word_of_value.device)
        words = self.word_of_value[torch.arange(values.shape[1], device=values.device), values]
        return words.where(values != UNKNOWN, UNKNOWN)

    def encode_image(self, x: Tensor) -> Tensor:
        """Map images (B, 3, H, W) in [-1, 1] to embeddings (B, D) float32 of length 1."""
        return F.normalize(self.clip.encode_image((x - self.pixel_mean) / self.pixel_std).float(), dim=-1)

    def encode_text(self, texts: list[str]) -> Tensor:
        """Map N texts to embeddings (N, D) float32 of length 1."""
        tokens = self.tokenizer(texts, context_length=self.context_length).to(self.device, non_blocking=True)
        return F.normalize(self.clip.encode_text(tokens).float(), dim=-1)

    def forward(self, x: Tensor, texts: list[str]) -> Tensor:
        """Return the scaled similarities of images (B, 3, H, W) in [-1, 1] and C texts, (B, C)."""
        images, words = self.encode_image(x), self.encode_text(texts)
        with torch.autocast(x.device.type, enabled=False):  # half precision is too coarse for logits of up to 100
            return self.clip.logit_scale.exp() * images @ words.T

    def training_step(self, batch: Mapping[str, Any], _batch_index: int) -> Tensor:
        """Return the contrastive loss over the true pairs of the batch of this process."""
        texts, mask = batch_value(batch, "text"), batch_value(batch, "caption_mask")
        labels = self.get_labels(batch)
        count = self.num_captions or len(texts)
        logits = self(self.get_input(batch), texts[:count])
        loss = multi_positive_loss(logits, *caption_matches(labels, labels[:count], mask[:count]))
        self.log("train/loss", loss.detach(), prog_bar=True)
        self.log("train/logit_scale", self.clip.logit_scale.detach().exp())
        return loss

    @torch.no_grad()
    def on_train_batch_start(self, batch: Mapping[str, Any], _batch_index: int) -> None:
        """Centre both towers of a new CLIP on the first batch before the first step.

        Random towers map all images, and all texts, to similar directions (mean cosine about 0.9 and 0.5), which slows
        the start of training: as many steps reached a mean accuracy of 0.66 with centring and 0.53 without.
        """
        if (
            self._source is not None or self.trainer.fit_loop.total_batch_idx > 0
        ):  # global_step does not change during accumulation
            return
        images, texts = self.clip.encode_image(self.get_input(batch)), batch_value(batch, "text")
        words = self.clip.encode_text(self.tokenizer(texts).to(self.device))
        norm, projection = (getattr(self.clip.visual, name, None) for name in ("ln_post", "proj"))  # None for ResNets
        towers = (images, norm, projection), (words, self.clip.ln_final, self.clip.text_projection)
        for features, norm, projection in towers:
            if norm is not None:
                mean = self.trainer.strategy.reduce(features.float().mean(dim=0), reduce_op="mean")
                norm.bias -= mean @ torch.linalg.pinv(projection.float())

    def on_train_batch_end(self, *_: Any) -> None:
        """Clamp the inverse temperature."""
        with torch.no_grad():
            self.clip.logit_scale.clamp_(max=math.log(MAX_LOGIT_SCALE))

    @torch.no_grad()
    def embed_vocabulary(self) -> list[Tensor]:
        """Return the embeddings of the canonical phrase of every word: U tensors (W_k, D)."""
        return [
            self.encode_text([self.vocabulary.phrases(k, w)[0] for w in range(len(words))])
            for k, words in enumerate(self.vocabulary.words)
        ]

    def check_data(self, data: Any) -> None:
        """See ``ldm.models.contracts.ChecksData``."""
        check_words(data, self.vocabulary)

    def on_validation_start(self) -> None:
        """Check that the validation data have the words of the model."""
        self.check_data(self.trainer.val_dataloaders)

    def on_test_start(self) -> None:
        """Check that the test data have the words of the model."""
        self.check_data(self.trainer.test_dataloaders)

    def on_validation_epoch_start(self) -> None:
        """Embed the vocabulary once for all batches."""
        self._vocabulary_embeddings = self.embed_vocabulary()

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: Mapping[str, Any], _batch_index: int) -> None:
        """Add a batch to the zero-shot accuracy of the attributes."""
        labels = self.get_labels(batch)
        hits = attribute_hits(self.encode_image(self.get_input(batch)), self._vocabulary_embeddings, labels)
        self.accuracy.update(hits, labels != UNKNOWN, batch.get("unseen"))

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Log the accuracy of each attribute, and their mean as ``val/attribute_accuracy``."""
        self.log_dict(self.accuracy.flush("val/attribute_accuracy"))

    def on_test_epoch_end(self) -> None:
        """Log the accuracy of each attribute, and their mean as ``figure/clip_accuracy``."""
        self.log_dict(self.accuracy.flush("figure/clip_accuracy"))

    def on_fit_end(self) -> None:
        """Write ``<run>/clip``."""
        if self.trainer.is_global_zero and not self.trainer.fast_dev_run:
            self.save_folder(Path(self.trainer.default_root_dir) / "clip")

    on_test_end = on_fit_end

    def save_folder(self, folder: str | Path) -> None:
        """Write the CLIP to a folder for ``open_clip.create_model("local-dir:<folder>")``.

        Every file is replaced atomically, the config last, so that a folder with a config is complete.

        Args:
            folder: created if needed; receives ``open_clip_model.safetensors``, the files of the tokenizer
                (``words.json`` of a new CLIP) and ``open_clip_config.json`` (model, mean and std of pixels in [0, 1]).
        """
        from safetensors.torch import save

        folder = Path(folder)
        weights = {name: value.detach().cpu().contiguous() for name, value in self.clip.state_dict().items()}
        with atomic_write(folder / clip_loading.WEIGHT_FILES[0], "wb") as stream:
            stream.write(save(weights, metadata={"format": "pt"}))
        if self._source is None:
            self.tokenizer.save(folder / WORDS_FILE)
        elif self._source.folder is not None:
            clip_loading.copy_tokenizer(self._source.folder, folder)
        with atomic_write(folder / clip_loading.CONFIG_FILE) as stream:
            json.dump({"model_cfg": self.model_cfg, "preprocess_cfg": self.pixels_cfg}, stream, indent=1)

    def configure_optimizers(self) -> Any:
        """Return AdamW with decay on matrices only, and the learning-rate multiplier if configured."""
        decayed = [p for p in self.clip.parameters() if p.ndim >= 2]
        others = [p for p in self.clip.parameters() if p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": self.weight_decay}, {"params": others, "weight_decay": 0.0}]
        # The contrastive loss varies quickly between batches; beta2 is below the default, as in CLIP.
        optimizer = fused(torch.optim.AdamW, groups, lr=self.learning_rate, betas=(0.9, 0.98))
        return with_schedule([optimizer], self.scheduler_config)

    @torch.no_grad()
    def log_images(self, batch: Mapping[str, Any], N: int = 8, **_: Any) -> dict[str, CaptionedGrid]:
        """Return ``zero_shot``: at most ``N`` images in rows, with the most probable word of every attribute."""
        images = self.get_input(batch)[:N].to(self.device)
        embedding, scale = self.encode_image(images), self.clip.logit_scale.exp().item()
        probabilities = attribute_probabilities(embedding, self.embed_vocabulary(), scale)
        guesses = torch.stack([p.argmax(dim=1) for p in probabilities], dim=1).tolist()
        rows = [" / ".join(words[w] for words, w in zip(self.vocabulary.words, guess)) for guess in guesses]
        return {"zero_shot": CaptionedGrid(images, rows, [], "attributes predicted by CLIP")}


def longest_caption(vocabulary: AttributeVocabulary) -> int:
    """Return the number of words of the longest caption with all attributes."""
    return sum(
        max(len(split_words(p)) for w in range(len(words)) for p in vocabulary.phrases(k, w))
        for k, words in enumerate(vocabulary.words)
    )


def _word_table(vocabulary: AttributeVocabulary) -> Tensor:
    """Return the word index of every value of every factor, (U, largest size) int64, padded with zeros."""
    words = [torch.as_tensor(words, dtype=torch.long) for words in vocabulary.value_to_word]
    return torch.nn.utils.rnn.pad_sequence(words, batch_first=True)
