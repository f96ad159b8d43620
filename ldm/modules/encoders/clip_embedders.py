"""The two frozen halves of a CLIP: texts to embeddings, images to embeddings.

Dims: B batch, U latent units (attributes), D width of CLIP's common space, H W pixels.

Each embedder keeps only the tower it needs, so a model that uses both halves of one CLIP holds it once. Both are
ordinary registered modules (they move with their parent) but no part of its checkpoints: their weights are found
again by name, and the published CLIP-DisDiff checkpoints do not have them either.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.encoders.clip_loading import find_clip, load_clip, load_tokenizer
from ldm.util import UserError

_log = logging.getLogger(__name__)

ENCODE_BATCH = 256  # unseen texts encoded at once: bounds the memory of a large text tower


class FrozenModule(nn.Module):
    """A module that stays in eval mode, takes no gradient itself and keeps out of state dicts.

    Loading a checkpoint passes with ``strict=True`` whether or not it has entries under this module's prefix;
    such entries are ignored.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_pre_hook(_keep_own_weights)

    def train(self, mode: bool = True) -> FrozenModule:
        """Stay in eval mode whatever the parent does."""
        return super().train(False)

    def state_dict(self, *args: Any, destination: dict | None = None, **kwargs: Any) -> dict[str, Any]:
        """Add nothing: the weights belong to the CLIP's own file."""
        return {} if destination is None else destination

    def own_weights(self) -> dict[str, Tensor]:
        """What an ordinary module's ``state_dict`` would hold."""
        return super().state_dict()


def _keep_own_weights(module: FrozenModule, state_dict: dict[str, Any], prefix: str, *_bookkeeping: Any) -> None:
    """Answer every question of ``load_state_dict`` below ``prefix`` with what the module already holds."""
    for key in [key for key in state_dict if key.startswith(prefix)]:
        del state_dict[key]
    state_dict.update({prefix + key: value for key, value in module.own_weights().items()})


class FrozenCLIPTextEmbedder(FrozenModule):
    """CLIP's text tower over attribute strings: the projected feature of the end token, float32.

    A string is encoded once, when it is first seen, and kept as a row of a table on the device. Afterwards a batch
    costs a dictionary look-up per string and one gather, without waiting for the device.

    Args:
        version: CLIP name or folder (:mod:`ldm.modules.encoders.clip_loading`).
        device: accepted for old configs and not used: the module lives where its parent is moved.
        max_length: most tokens of a text that are read, start and end included; the model's own context
            length is the upper limit.
        n_repeat: a flat list gives (B, n_repeat, D), the sequence that latent-diffusion's cross-attention reads; None
            gives (B, D), as CLIP-DisDiff has it.
        normalize: scale every embedding to length 1.
        weights: weight file or folder; None: see :mod:`ldm.modules.encoders.clip_loading`.
        allow_download: fetch missing weights.

    Attributes:
        width: D, the width of an embedding.

    Raises:
        UserError: the CLIP is not on this machine.
    """

    def __init__(
        self,
        version: str = "ViT-L/14",
        device: Any = None,
        max_length: int = 77,
        n_repeat: int | None = None,
        normalize: bool = True,
        weights: str | os.PathLike | None = None,
        allow_download: bool = False,
    ) -> None:
        super().__init__()
        source = find_clip(str(version), weights, allow_download)
        self.tokenizer = load_tokenizer(source)
        self.clip = load_clip(source)
        del self.clip.visual  # encode_text does not need it, and the image embedder has its own
        self.normalize = normalize
        self.n_repeat = n_repeat
        self.context_length = source.model_cfg["text_cfg"].get("context_length", 77)
        self.max_length = min(max_length, self.context_length)
        self._has_warned = False
        self.width = self._embed([""]).shape[1]
        # Plain attributes, not buffers: processes see different strings, and DDP would broadcast a buffer.
        # "" marks a unit left unset: a row of zeros. In a sequence for cross-attention it is a text like any other.
        self._rows: dict[str, int] = {"": 0} if n_repeat is None else {}
        self._table = torch.zeros(len(self._rows), self.width)

    @property
    def logit_scale(self) -> float:
        """CLIP's learned inverse temperature, ``exp(s)``; similarities times it are logits."""
        return self.clip.logit_scale.exp().item()

    def forward(self, texts: Sequence[Sequence[str]] | Sequence[str]) -> Tensor:
        """Same as :meth:`encode`."""
        return self.encode(texts)

    def encode(self, texts: Sequence[Sequence[str]] | Sequence[str]) -> Tensor:
        """Embed texts.

        Args:
            texts: B lists of U strings ("" = unit left unset), or B strings.

        Returns:
            float32 (B, U, D) for nested lists, (B, D) or (B, n_repeat, D) for a flat list; without ``n_repeat`` ""
            gives zeros.

        Raises:
            UserError: samples have different numbers of strings.
        """
        if len(texts) == 0 or isinstance(texts, str):
            raise UserError(f"expected a list of texts or a list of lists of texts, got {texts!r}")
        if isinstance(texts[0], str):
            flat = self._look_up(texts)
            return flat if self.n_repeat is None else flat[:, None].expand(-1, self.n_repeat, -1)
        num_units = {len(sample) for sample in texts}
        if len(num_units) != 1:
            raise UserError(
                f"every sample needs the same number of attribute texts, got {sorted(num_units)} in one batch; "
                'write "" for an attribute that is not stated'
            )
        rows = self._look_up([text for sample in texts for text in sample])  # (B*U, D)
        return rows.reshape(len(texts), num_units.pop(), -1)

    def unconditional_input(self, count: int) -> list[str]:
        """Texts that say nothing, in models trained for guidance."""
        return [""] * count

    def vocabulary_embeddings(self, vocabulary: Sequence[Sequence[str]]) -> list[Tensor]:
        """Embeddings of each attribute's possible texts.

        Args:
            vocabulary: for each of U attributes its W_k texts.

        Returns:
            U float32 tensors (W_k, D).
        """
        return [self._look_up(words) for words in vocabulary]

    def _look_up(self, texts: Sequence[str]) -> Tensor:
        unseen = [text for text in dict.fromkeys(texts) if text not in self._rows]
        device = self.clip.logit_scale.device
        if unseen or self._table.device != device:
            self._learn(unseen, device)
        rows = torch.tensor([self._rows[text] for text in texts], pin_memory=device.type == "cuda")
        return self._table.index_select(0, rows.to(device, non_blocking=True))

    def _learn(self, unseen: list[str], device: torch.device) -> None:
        """Add a row to the table for each new text."""
        # Rows made under inference mode could not take part in a later training step.
        with torch.inference_mode(False):
            parts = [unseen[start : start + ENCODE_BATCH] for start in range(0, len(unseen), ENCODE_BATCH)]
            self._table = torch.cat([self._table.to(device), *map(self._embed, parts)])
        self._rows.update(zip(unseen, range(len(self._rows), len(self._rows) + len(unseen))))

    @torch.no_grad()
    def _embed(self, texts: list[str]) -> Tensor:
        """The text tower itself, (N, D) float32."""
        self._warn_of_truncation(texts)
        device = self.clip.logit_scale.device
        tokens = self.tokenizer(texts, context_length=self.max_length)
        tokens = F.pad(tokens, (0, self.context_length - tokens.shape[1])).to(device)
        with torch.autocast(device.type, enabled=False):
            embedding = self.clip.encode_text(tokens).float()
        return F.normalize(embedding, dim=-1) if self.normalize else embedding

    def _warn_of_truncation(self, texts: list[str]) -> None:
        encode = getattr(self.tokenizer, "encode", None)
        if self._has_warned or encode is None:
            return
        for text in texts:
            if len(encode(text)) + 2 > self.max_length:
                self._has_warned = True
                _log.warning(
                    "a text has %d tokens and CLIP reads %d, so its end is cut off (said once): %.80r",
                    len(encode(text)) + 2,
                    self.max_length,
                    text,
                )
                return


class FrozenClipImageEmbedder(FrozenModule):
    """CLIP's image tower; gradients pass through it to the image.

    Args:
        model: CLIP name or folder (:mod:`ldm.modules.encoders.clip_loading`).
        jit: accepted for old configs and not used: a scripted tower gives the same numbers.
        device: accepted for old configs and not used: the module lives where its parent is moved.
        antialias: low-pass filter when the image has to shrink.
        weights: weight file or folder; None: see :mod:`ldm.modules.encoders.clip_loading`.
        allow_download: fetch missing weights.

    Raises:
        UserError: the CLIP is not on this machine.
    """

    mean: Tensor
    std: Tensor

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
        size = self.visual.image_size
        self.image_size: tuple[int, int] = (size, size) if isinstance(size, int) else tuple(size)
        self.antialias = antialias
        for name in ("mean", "std"):
            values = torch.tensor(source.preprocess_cfg[name], dtype=torch.float32)
            self.register_buffer(name, values.reshape(1, 3, 1, 1))

    def preprocess(self, x: Tensor) -> Tensor:
        """Resize to the tower's input and standardise as the model was trained.

        Args:
            x: (B, 3, H, W) in [-1, 1].

        Returns:
            float32 (B, 3, h, w), h and w being the tower's input size.
        """
        x = x.float()
        if x.shape[-2:] != self.image_size:
            x = F.interpolate(x, self.image_size, mode="bicubic", align_corners=True, antialias=self.antialias)
        return ((x + 1) / 2 - self.mean) / self.std

    def forward(self, x: Tensor) -> Tensor:
        """Embed images.

        Args:
            x: (B, 3, H, W) in [-1, 1].

        Returns:
            float32 (B, D), not normalised.
        """
        features = self.visual(self.preprocess(x).to(next(self.visual.parameters()).dtype))
        features = features[0] if isinstance(features, tuple) else features  # CoCa also returns its tokens
        return features.float()
