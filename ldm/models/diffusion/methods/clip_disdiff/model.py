"""CLIP-DisDiff: the gradient of a frozen diffusion model, split into one part per text attribute.

A frozen latent diffusion model predicts x_0 (or the noise) of a noisy latent. For every attribute k of a sample's text
a decoder adds a sub-gradient g_k that depends on the noisy latent and on that attribute's CLIP embedding alone. Their
sum is trained to turn the unconditional prediction into one that fits the image (PDAE, Zhang et al. 2022); the
disentangling loss (DisDiff, Yang et al. 2023) requires that g_k moves the decoded prediction towards text k in CLIP's
image space, and nowhere else.

Dimensions: B batch, U units (attributes), D width of a text embedding, C, H, W the latent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ldm.data.module import DataModuleFromConfig
from ldm.data.traits import vocabulary_of
from ldm.diffusion.conditions import UnitCodes
from ldm.diffusion.samplers import Sampler
from ldm.losses.disentangling import clip_logits_aligned, clip_logits_reference, clip_logits_sampled, disentangling_loss
from ldm.models.diffusion.pictures import INPUTS_AND_SAMPLES
from ldm.models.diffusion.unit_pictures import unit_pictures
from ldm.models.diffusion.units import UnitDiffusion
from ldm.models.inputs import batch_value, images_from_batch
from ldm.modules.diffusionmodules.openaimodel_shift import ShiftOutput
from ldm.modules.encoders.readout import AttributeReadout
from ldm.pictures.grid import CaptionedGrid
from ldm.ranges import Fraction
from ldm.util import ConfigError, UserError, instantiate_from_config

DIS_MODES = ("aligned", "sampled", "reference")


class CLIPDisDiff(UnitDiffusion):
    """A latent diffusion model whose gradient is split into one sub-gradient per text attribute."""

    picture_steps_and_eta = (50, 0.0)

    def __init__(
        self,
        cond_stage_config: Mapping[str, Any],
        cond_stage_key: str = "text",
        dis_mode: str = "aligned",
        unset_prob: Fraction = 0.0,
        vocabulary_config: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Build the model.

        Args:
            cond_stage_config: ``{text_encoder: {target, params}, image_encoder: {target, params}}``.
            cond_stage_key: entry of the batch with U strings per sample; an empty string leaves the unit unset.
            dis_mode: ``aligned`` decodes every unit's edit; ``sampled`` only that of the drawn unit, at 1/U of the
                cost; ``reference`` reproduces the CLIP-DisDiff code, including its defects.
            unset_prob: probability to leave a unit unset while training, drawn for each unit and sample.
            vocabulary_config: attribute words of the data set by which units are read from images; without it the
                test data set's own vocabulary, and without that the representation is the text itself.
            **kwargs: see ``UnitDiffusion``, ``LatentDiffusion`` and ``DDPM``.

        Raises:
            ConfigError: an option has an unknown value.
        """
        if dis_mode not in DIS_MODES:
            raise ConfigError(f"model.params.dis_mode: expected one of {', '.join(DIS_MODES)}, got {dis_mode!r}")
        super().__init__(cond_stage_config=cond_stage_config, cond_stage_key=cond_stage_key, **kwargs)
        self.dis_mode, self.unset_prob = dis_mode, unset_prob
        self._check_options()
        self.vocabulary = instantiate_from_config(vocabulary_config) if vocabulary_config else None
        self._readout: AttributeReadout | None = None

    def _check_options(self) -> None:
        where = "model.params"
        if not self.model.diffusion_model.is_separate:
            raise ConfigError(
                f"{where}.unet_config.params.seprate_decoder: expected true (one gradient per unit), got false"
            )
        if not 0.0 <= self.unset_prob < 1.0:
            raise ConfigError(f"{where}.unset_prob: expected a probability in [0, 1), got {self.unset_prob}")
        if self.cond_stage_trainable:
            raise ConfigError(f"{where}.cond_stage_trainable: expected false (CLIP is frozen), got true")

    def build_cond_stage(self, config: Mapping[str, Any]) -> nn.Module:
        """Return the frozen text and image encoders of CLIP."""
        missing = {"text_encoder", "image_encoder"} - set(config)
        if missing:
            raise ConfigError(
                f"model.params.cond_stage_config: expected text_encoder and image_encoder, got {', '.join(config)}"
            )
        return nn.ModuleDict({name: instantiate_from_config(part) for name, part in config.items()})

    def encode_text(self, texts: Sequence[Sequence[str]]) -> UnitCodes:
        """Return the codes of U strings per sample; an empty string leaves its unit unset.

        Raises:
            UserError: the number of strings of a sample differs from ``latent_unit``.
        """
        for row, strings in enumerate(texts):
            if isinstance(strings, str) or len(strings) != self.latent_unit:
                count = "one string" if isinstance(strings, str) else f"{len(strings)} attributes"
                raise UserError(
                    f"batch: expected {self.latent_unit} attributes per image (latent_unit), got {count} in sample "
                    f"{row} ({strings!r}). Change the data set (an empty attribute leaves a unit unset) or "
                    "model.params.unet_config.params.latent_unit"
                )
        codes = self.cond_stage_model["text_encoder"].encode([list(strings) for strings in texts])
        mask = torch.tensor([[bool(string) for string in strings] for strings in texts])
        return UnitCodes(codes, mask.to(codes.device, non_blocking=True))

    def get_condition(self, batch: Mapping[str, Any]) -> UnitCodes:
        """Return the embeddings of the batch's texts."""
        return self.encode_text(batch_value(batch, self.cond_stage_key))

    @property
    def needs_images(self) -> bool:
        """See the base class: the disentangling loss compares decoded predictions."""
        return type(self) is not CLIPDisDiff

    def condition_in_training(self, cond: UnitCodes) -> UnitCodes:
        """Return the condition with some units left unset at random (``unset_prob``) in training."""
        if not self.training or self.unset_prob == 0:
            return cond
        keep = torch.rand(cond.mask.shape, device=cond.mask.device) >= self.unset_prob
        return replace(cond, mask=cond.mask & keep)

    def dis_loss(self, x_t: Tensor, t: Tensor, out: ShiftOutput, cond: UnitCodes, unit: Tensor | None = None) -> Tensor:
        """See ``UnitMethod``; the unit is drawn uniformly among the set ones."""
        count = self.dis_batch_size
        x_t, t, cond = x_t[:count], t[:count], cond.first(count)
        pred, unit_grad = out.pred[:count], out.unit_grad[:count]
        if unit is None:
            weight = cond.mask.float() + 1e-6
            # An exponential race instead of torch.multinomial, which checks its weights on the host.
            unit = (weight / torch.empty_like(weight).exponential_()).argmax(dim=1)
        unit = unit[:count]
        edited = self._edits(pred, unit_grad, t, unit)  # (b, E, C, H, W)
        with torch.no_grad():
            z_before, image_before = self.decode_prediction(x_t, t, pred)
            seen_before = self.cond_stage_model["image_encoder"](image_before)
        edits = edited.shape[1]
        x_repeated, t_repeated = x_t.repeat_interleave(edits, 0), t.repeat_interleave(edits)
        z_after, image_after = self.decode_prediction(x_repeated, t_repeated, edited.flatten(0, 1))
        if self.detach_flag:
            image_after = image_after.detach()
        seen_after = self.cond_stage_model["image_encoder"](image_after).unflatten(0, (-1, edits))  # (b, E, D)
        variant, invariant = self._logits(seen_before, seen_after, cond.codes.detach())
        z_change = z_before - self._drawn(z_after, unit, edits)
        weight = self.change_weight(z_change, image_before - self._drawn(image_after, unit, edits))
        return disentangling_loss(variant, invariant, unit, weight)

    def _edits(self, pred: Tensor, unit_grad: Tensor, t: Tensor, unit: Tensor) -> Tensor:
        """Return predictions with one sub-gradient added: (b, U, C, H, W), or (b, 1, C, H, W) of the drawn unit."""
        if self.dis_mode == "sampled":
            unit_grad = unit_grad[torch.arange(len(unit), device=unit.device), unit].unsqueeze(1)
        scale = self.gradient_scale(t, pred)
        return pred.unsqueeze(1) + scale.unsqueeze(1) * unit_grad

    def _logits(self, before: Tensor, after: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        if self.dis_mode == "sampled":
            return clip_logits_sampled(before, after[:, 0], text)
        return (clip_logits_reference if self.dis_mode == "reference" else clip_logits_aligned)(before, after, text)

    def _drawn(self, values: Tensor, unit: Tensor, edits: int) -> Tensor:
        """Return the rows of the drawn unit of (b * edits, ...); the reference code uses the last unit by mistake."""
        values = values.unflatten(0, (-1, edits))
        if edits == 1 or self.dis_mode == "reference":
            return values[:, -1]
        return values[torch.arange(len(unit), device=unit.device), unit]

    @torch.no_grad()
    def sample_edit(
        self,
        texts: Sequence[Sequence[str]],
        x_T: Tensor,
        sampler: Sampler | None = None,
        guidance_scale: float | Tensor = 1.0,
        only: Tensor | None = None,
    ) -> Tensor:
        """Return images of texts.

        Args:
            texts: U strings per sample; an empty one leaves its unit unset.
            x_T: (B, C, H, W) standard normal noise.
            sampler: DDIM with 50 steps and eta 0 by default.
            guidance_scale: factor of the sub-gradients, 1 as trained; one number, or one per unit, (U,) or (B, U).
            only: (B,) int64, the one unit whose gradient is added in each sample; ``None`` adds all.

        Returns:
            (B, 3, H, W) in [-1, 1].
        """
        cond = replace(self.encode_text(texts), only=only, guidance=guidance_scale)
        return self.decode_condition(cond, x_T, sampler)

    @torch.no_grad()
    def encode_representation(self, batch: Mapping[str, Any]) -> Tensor:
        """Return U units per image, (B, U, R): read from the image through CLIP; its texts without a vocabulary."""
        if self._readout is None:
            return self.get_condition(batch).codes
        images = images_from_batch(batch, self.first_stage_key)
        return self._readout(self.cond_stage_model["image_encoder"](images))

    def on_fit_start(self) -> None:
        """Embed the whole vocabulary before the first step, always in the same batches.

        Embeddings depend in the last bit on their batch; in the order of appearance a resumed run's would differ.
        """
        data = self.trainer.datamodule
        train = data.datasets.get("train") if isinstance(data, DataModuleFromConfig) else None
        vocabulary = self.vocabulary or vocabulary_of(train)
        if vocabulary is not None:
            counts = [len(words) for words in vocabulary.words]
            phrases = [vocabulary.phrases(k, w) for k, count in enumerate(counts) for w in range(count)]
            self.cond_stage_model["text_encoder"].vocabulary_embeddings(phrases)

    def prepare_representation(self, dataset: Any) -> None:
        """Prepare the zero-shot read-out from the vocabulary of the config or of the data set."""
        self._readout = None
        vocabulary = self.vocabulary or vocabulary_of(dataset)
        if vocabulary is not None:
            encoder = self.cond_stage_model["text_encoder"]
            counts = [len(words) for words in vocabulary.words]
            texts = [[vocabulary.phrases(k, w)[0] for w in range(count)] for k, count in enumerate(counts)]
            self._readout = AttributeReadout(encoder.vocabulary_embeddings(texts), encoder.logit_scale)

    def unit_captions(self, batch: Mapping[str, Any]) -> tuple[list[str], list[str]]:
        """Return the first sample's attributes, and every sample's text."""
        texts = batch_value(batch, self.cond_stage_key)
        units = [f"unit {unit + 1}: {string or 'unset'}" for unit, string in enumerate(texts[0])]
        return units, ["\n".join(strings) for strings in texts]

    def draw_pictures(self, batch: Mapping[str, Any], **options: Any) -> dict[str, Tensor | CaptionedGrid]:
        """Return pictures by name; ``options`` are those of ``unit_pictures``, by default swapped texts."""
        return unit_pictures(self, batch, **{"plot_swapped_concepts": True, **INPUTS_AND_SAMPLES, **options})
