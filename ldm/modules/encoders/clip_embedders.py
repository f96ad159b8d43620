"""Frozen towers of a CLIP: texts to embeddings, images to embeddings.

Legend: B batch, U latent units (attributes), D width of the joint space, H W pixels.

Each embedder keeps its tower only, so that a model with both embedders of one CLIP holds each weight once. Both move
with their parent module but are excluded from its checkpoints, as in published ones: their weights are loaded by name.
"""

from __future__ import annotations

import bisect
import contextlib
import logging
import os
import re
import textwrap
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.modules.encoders.base import ConditionStageBase, TextStage, sent_to
from ldm.modules.encoders.clip_loading import ClipSource, find_clip, load_clip, load_tokenizer
from ldm.modules.weights import grouped, weights_fingerprint
from ldm.ranges import Count, OptionalCount, PositiveFloat
from ldm.util import ConfigError, UserError

logger = logging.getLogger(__name__)

_SHOWN, _LONGEST = 8, 200  # texts in a warning, and characters of each
ENCODE_BATCH = 256  # texts encoded at once, which limits the memory of a large text tower


class FrozenModule(ConditionStageBase):
    """Module in evaluation mode that is excluded from state dicts.

    Checkpoints load with ``strict=True`` with or without entries of this module; such entries are ignored, with a
    warning if they are not its own weights.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_pre_hook(_keep_own_weights)

    def train(self, mode: bool = True) -> FrozenModule:
        """Keep the evaluation mode for every ``mode``."""
        return super().train(False)

    def state_dict(self, *args: Any, destination: dict | None = None, **kwargs: Any) -> dict[str, Any]:
        """Return no entries: the weights are stored in the file of the CLIP."""
        return {} if destination is None else destination

    def own_weights(self) -> dict[str, Tensor]:
        """Return the state dict that an ordinary module would have."""
        return super().state_dict()


def _keep_own_weights(module: FrozenModule, state_dict: dict[str, Any], prefix: str, *_bookkeeping: Any) -> None:
    """Replace all entries under ``prefix`` by the current weights of the module."""
    own = {prefix + key: value for key, value in module.own_weights().items()}
    found = [key for key in state_dict if key.startswith(prefix)]
    foreign = [key for key in found if key not in own]
    if foreign:
        name, shown = type(module).__name__, grouped(foreign)
        logger.warning("%s has the weights of its CLIP's files: %d others are ignored (%s)", name, len(foreign), shown)
    for key in found:
        del state_dict[key]
    state_dict.update(own)


class ClipTextStage(TextStage):
    """Base class of the text stages with a tokenizer of open_clip, which truncates long texts."""

    tokenizer: Any  # called with (texts, context_length)
    max_length: int
    _has_warned = False

    def tokenize(self, texts: list[str]) -> Tensor:
        """Map N texts to token ids, (N, max_length) int64 on the CPU; warn once if texts have more tokens."""
        with torch.device("cpu"):
            tokens, long = self.tokenizer(texts, context_length=self.max_length), self._are_too_long(texts)
            if any(long) and not self._has_warned:
                self._has_warned = True
                ends = [self._cut_off(text) for text, is_long in zip(texts, long) if is_long]
                cut = [textwrap.shorten(end, _LONGEST, placeholder=" ...") for end in ends]
                shown = ", ".join(map(repr, cut[:_SHOWN])) + (", ..." if cut[_SHOWN:] else "") + " (shown once)"
                logger.warning("texts of more than %d tokens are truncated, without %s", self.max_length, shown)
        return tokens

    def _are_too_long(self, texts: list[str]) -> list[bool]:
        """Return for each text whether its next token would not be padding."""
        last = self.tokenizer(["", *texts], context_length=self.max_length + 1)[:, -1]
        return (last[1:] != last[0]).tolist()

    def _cut_off(self, text: str) -> str:
        """Return the end of a text that is too long, from the first word that is not complete."""
        words = [word.start() for word in re.finditer(r"\S+", text)]
        starts = words if len(words) > 1 else range(len(text))
        first = bisect.bisect(starts, False, key=lambda start: self._are_too_long([text[:start]])[0])
        return text[starts[first - 1] :]


class FrozenCLIPTextEmbedder(FrozenModule, ClipTextStage):
    """Text tower of a CLIP: the projected feature of the end token, float32.

    A string is encoded once, when it is first seen, and kept as a row of a table on the device. Afterwards a batch
    costs a dictionary look-up per string and one gather, without synchronization.

    Args:
        version: name or folder of the CLIP (:mod:`ldm.modules.encoders.clip_loading`).
        device: accepted from old configs and ignored; the module moves with its parent.
        max_length: maximal number of tokens, including start and end; at most the context length of the CLIP.
        n_repeat: a flat list of texts gives (B, n_repeat, D), a sequence for the cross-attention of latent diffusion
            models; None gives (B, D), as in CLIP-DisDiff.
        normalize: scale every embedding to length 1.
        scale: factor of the result. A network learns slowly from inputs far below 1: use sqrt(D) with ``normalize``, so
            that the mean square of the entries is 1.
        max_phrases: U; a flat list of texts gives (B, U, D), one vector for each phrase of a text, which commas
            separate, and zeros for missing phrases. A small CLIP binds the words of a long text badly.
        weights: weight file or folder; None: see :mod:`ldm.modules.encoders.clip_loading`.
        allow_download: download missing weights.

    Attributes:
        width: D.
        name: the CLIP as given.
        fingerprint: identifies the CLIP, as in files of image embeddings.
        caches_texts: whether embeddings of texts are kept; False computes them anew, and gradients pass.

    Raises:
        UserError: the CLIP is missing on this machine.
        ConfigError: both ``n_repeat`` and ``max_phrases`` are set.
    """

    def __init__(
        self,
        version: str = "ViT-L/14",
        device: Any = None,
        max_length: Count = 77,
        n_repeat: OptionalCount | None = None,
        normalize: bool = True,
        max_phrases: Count | None = None,
        scale: PositiveFloat = 1.0,
        weights: str | os.PathLike | None = None,
        allow_download: bool = False,
    ) -> None:
        super().__init__()
        if n_repeat is not None and max_phrases is not None:
            raise ConfigError("cond_stage_config.params: expected n_repeat or max_phrases, got both. Remove one.")
        source = find_clip(str(version), weights, allow_download)
        self.tokenizer = load_tokenizer(source)
        self.clip = load_clip(source)
        self.name, self.fingerprint = source.name, weights_fingerprint(self.clip)
        del self.clip.visual  # unused by encode_text
        self.normalize, self.scale = normalize, scale
        self.n_repeat, self.max_phrases, self.caches_texts = n_repeat, max_phrases, True
        self.context_length = source.model_cfg["text_cfg"].get("context_length", 77)
        self.max_length = min(max_length, self.context_length)
        with torch.no_grad():
            self.width = self._embed([""]).shape[1]
        # Not buffers: each process sees other strings, and DDP would broadcast buffers. Without n_repeat, "" is an
        # unset unit, encoded as zeros; in a sequence for cross-attention it is an ordinary text.
        self._rows: dict[str, int] = {"": 0} if n_repeat is None else {}
        self._table = torch.zeros(len(self._rows), self.width)

    @property
    def logit_scale(self) -> float:
        """CLIP's learned inverse temperature ``exp(s)``, the factor from similarities to logits."""
        return self.clip.logit_scale.exp().item()

    def forward(self, texts: Sequence[Sequence[str]] | Sequence[str]) -> Tensor:
        """Embed texts.

        Args:
            texts: B lists of U strings, or B strings; without ``n_repeat``, "" is an unset unit.

        Returns:
            float32 (B, U, D) for nested lists and with ``max_phrases``, (B, D) or (B, n_repeat, D) for a flat list;
            zeros for unset units.

        Raises:
            UserError: ``texts`` is not a list, samples have different numbers of strings, or over ``max_phrases``.
        """
        if len(texts) == 0 or isinstance(texts, str):
            raise UserError(f"CLIP text embedder: expected a list of texts or a list of lists of texts, got {texts!r}")
        if isinstance(texts[0], str) and self.max_phrases is not None:
            texts = [self._phrases(text, self.max_phrases) for text in texts]
        if isinstance(texts[0], str):
            rows = self._look_up(texts) * self.scale
            return rows if self.n_repeat is None else rows[:, None].expand(-1, self.n_repeat, -1)
        num_units = {len(sample) for sample in texts}
        if len(num_units) != 1:
            raise UserError(
                "CLIP text embedder: expected the same number of attribute texts in every sample, got "
                f'{sorted(num_units)} in one batch. Use "" for an attribute without text.'
            )
        rows = self._look_up([text for sample in texts for text in sample]) * self.scale
        return rearrange(rows, "(b u) d -> b u d", b=len(texts))

    def vocabulary_embeddings(self, vocabulary: Sequence[Sequence[str]]) -> list[Tensor]:
        """Embed the W_k texts of each of U attributes: U float32 tensors (W_k, D)."""
        return [self._look_up(words) for words in vocabulary]

    @staticmethod
    def _phrases(text: str, count: int) -> list[str]:
        """Return the phrases of a text, and empty strings up to ``count``."""
        phrases = [phrase.strip() for phrase in text.split(",") if phrase.strip()]
        if len(phrases) > count:
            raise UserError(
                f"text {text!r}: expected at most {count} phrases (cond_stage_config.params.max_phrases), which commas "
                f"separate, got {len(phrases)}. Shorten the text."
            )
        return phrases + [""] * (count - len(phrases))

    def _look_up(self, texts: Sequence[str]) -> Tensor:
        if not self.caches_texts:
            return self._embed_given(texts)
        unseen = [text for text in dict.fromkeys(texts) if text not in self._rows]
        device = self.clip.logit_scale.device
        if unseen or self._table.device != device:
            # Tensors created in inference mode cannot be used in training later.
            with torch.inference_mode(False), torch.no_grad():
                parts = [unseen[start : start + ENCODE_BATCH] for start in range(0, len(unseen), ENCODE_BATCH)]
                self._table = torch.cat([self._table.to(device), *map(self._embed, parts)])
            self._rows.update(zip(unseen, range(len(self._rows), len(self._rows) + len(unseen))))
        rows = torch.tensor([self._rows[text] for text in texts])
        return self._table.index_select(0, sent_to(device, rows))

    def _embed_given(self, texts: Sequence[str]) -> Tensor:
        """Return the embeddings (N, D) of N texts, zeros for unset units; gradients pass."""
        places = [place for place, text in enumerate(texts) if text or self.n_repeat is not None]
        device = self.clip.logit_scale.device
        rows = self._embed([texts[place] for place in places]) if places else torch.zeros(0, self.width, device=device)
        return rows.new_zeros(len(texts), self.width).index_copy(0, sent_to(device, torch.tensor(places).long()), rows)

    def _embed(self, texts: list[str]) -> Tensor:
        """Run the text tower on N texts; return (N, D) float32."""
        device = self.clip.logit_scale.device
        tokens = self.tokenize(texts)
        tokens = F.pad(tokens, (0, self.context_length - tokens.shape[1])).to(device)
        with torch.autocast(device.type, enabled=False):
            embedding = self.clip.encode_text(tokens).float()
        return F.normalize(embedding, dim=-1) if self.normalize else embedding


class ImagePreprocessing(ConditionStageBase):
    """Base class of the image embedders."""

    mean: Tensor
    std: Tensor

    def set_preprocessing(self, image_size: int | Sequence[int], source: ClipSource, antialias: bool) -> None:
        """Store the input size of the tower, the statistics of its images, and whether shrinking uses a filter."""
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.image_size, self.antialias = (height, width), antialias
        for name in ("mean", "std"):
            values = torch.tensor(source.preprocess_cfg[name], dtype=torch.float32)
            self.register_buffer(name, values.reshape(1, 3, 1, 1), persistent=False)

    def preprocess(self, x: Tensor) -> Tensor:
        """Resize images ``x`` (B, 3, H, W) in [-1, 1] to the tower's input size h, w, and standardize: (B, 3, h, w)."""
        x = x.float()
        if x.shape[-2:] != self.image_size:
            x = F.interpolate(x, self.image_size, mode="bicubic", align_corners=True, antialias=self.antialias)
        return ((x + 1) / 2 - self.mean) / self.std

    def embed_images(self, tower: nn.Module, x: Tensor) -> Tensor:
        """Map images ``x`` (B, 3, H, W) in [-1, 1] to the tower's embeddings, float32 (B, D), not normalized.

        On CPUs the tower is not autocast: its attention is much slower in half precision (ViT-B/32, 8 images, both
        passes, one thread of a Xeon with AMX: 1.7 s in float32, 3.9 s in bfloat16).
        """
        images = self.preprocess(x).to(next(tower.parameters()).dtype)
        with torch.autocast("cpu", enabled=False) if x.device.type == "cpu" else contextlib.nullcontext():
            features = tower(images)
        features = features[0] if isinstance(features, tuple) else features  # CoCa also returns its tokens
        return features.float()


class FrozenClipImageEmbedder(FrozenModule, ImagePreprocessing):
    """Image tower of a CLIP; gradients pass through it to the image.

    Args:
        model: name or folder of the CLIP (:mod:`ldm.modules.encoders.clip_loading`).
        jit, device: accepted from old configs and ignored; a scripted tower gives equal results.
        antialias: apply a low-pass filter when shrinking images.
        weights, allow_download: see :class:`FrozenCLIPTextEmbedder`.

    Raises:
        UserError: the CLIP is missing on this machine.
    """

    def __init__(
        self,
        model: str = "ViT-L/14",
        jit: bool = False,
        device: Any = None,
        antialias: bool = False,
        weights: str | os.PathLike | None = None,
        allow_download: bool = False,
    ) -> None:
        super().__init__()
        source = find_clip(str(model), weights, allow_download)
        self.visual = load_clip(source).visual
        self.set_preprocessing(self.visual.image_size, source, antialias)

    def networks_to_compile(self) -> list[nn.Module]:
        """See ``ldm.training.compiling.Compilable``."""
        return [self.visual]

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``x`` (B, 3, H, W) in [-1, 1] to embeddings, float32 (B, D), not normalized."""
        return self.embed_images(self.visual, x)
