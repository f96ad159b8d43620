"""CLIP-DisDiff: the gradient of a frozen diffusion model, split into one part per text attribute.

A frozen latent diffusion model predicts x_0 (or the noise) of a noisy latent. For every attribute k of a sample's text
a decoder adds a sub-gradient g_k that depends on the noisy latent and on that attribute's CLIP embedding alone. Their
sum is trained to turn the unconditional prediction into one that fits the image (PDAE, Zhang et al. 2022); the
disentangling loss (DisDiff, Yang et al. 2023) asks that g_k moves the decoded prediction towards text k in CLIP's
image space, and nowhere else.

Dimensions: B batch, U units (attributes), D width of a text embedding, C, H, W the latent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ldm.diffusion.schedule import extract
from ldm.losses.disentangling import (
    clip_logits_aligned,
    clip_logits_reference,
    clip_logits_sampled,
    disentangling_loss,
)
from ldm.models.diffusion.latent_diffusion import LatentDiffusion, freeze
from ldm.models.diffusion.swap_pictures import clip_disdiff_pictures
from ldm.models.inputs import batch_value, images_from_batch
from ldm.models.pictures import CaptionedGrid
from ldm.modules.diffusionmodules.openaimodel_shift import ShiftOutput
from ldm.modules.encoders.readout import AttributeReadout
from ldm.util import ConfigError, UserError, instantiate_from_config

DIS_MODES = ("aligned", "sampled", "reference")


class UnitText(NamedTuple):
    """A condition: ``codes`` (B, U, D) text embeddings, ``mask`` (B, U) bool, False where a unit is left unset.

    ``only`` (B,) int64 keeps one unit's gradient per sample; None keeps all. ``guidance`` scales the sub-gradients.
    """

    codes: Tensor
    mask: Tensor
    only: Tensor | None = None
    guidance: float = 1.0

    def first(self, count: int | None) -> UnitText:
        """The first ``count`` samples, None for all."""
        only = None if self.only is None else self.only[:count]
        return self._replace(codes=self.codes[:count], mask=self.mask[:count], only=only)


class CLIPDisDiff(LatentDiffusion):
    """A latent diffusion model whose gradient is split into one sub-gradient per text attribute."""

    def __init__(
        self,
        unet_config: Mapping[str, Any],
        cond_stage_config: Mapping[str, Any],
        cond_stage_key: str = "text",
        dis_loss_flag: bool = True,
        dis_loss_type: str = "Z",
        dis_weight: float = 0.05,
        dis_mode: str = "aligned",
        dis_batch_size: int | None = None,
        unset_prob: float = 0.0,
        detach_flag: bool = False,
        vocabulary_config: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Build the model.

        Args:
            unet_config: the shift U-Net; its ``ckpt_path`` names the base model.
            cond_stage_config: ``{text_encoder: {target, params}, image_encoder: {target, params}}``.
            cond_stage_key: entry of the batch with U strings per sample; an empty string leaves the unit unset.
            dis_loss_flag: use the disentangling loss.
            dis_loss_type: it is weighted by the squared change of the latent (``Z``) or of the image (``IM``).
            dis_weight: constant factor of that weight.
            dis_mode: ``aligned`` decodes every unit's edit; ``sampled`` only that of the drawn unit, at 1/U of the
                cost; ``reference`` repeats the CLIP-DisDiff code, its defects included.
            dis_batch_size: compute the disentangling loss on so many samples of the batch; None on all.
            unset_prob: probability to leave a unit unset while training, drawn for each unit and sample.
            detach_flag: quantise and detach the edited images (an ablation: the loss then trains nothing).
            vocabulary_config: attribute words of the data set by which units are read from images; without it the
                test data set's own vocabulary, and without that the representation is the text itself.
            **kwargs: see ``LatentDiffusion`` and ``DDPM``.

        Raises:
            ConfigError: an option has an unknown value.
        """
        if dis_mode not in DIS_MODES:
            raise ConfigError(f"model.params.dis_mode '{dis_mode}' is unknown; choose one of {', '.join(DIS_MODES)}")
        if dis_loss_type not in ("Z", "IM"):
            raise ConfigError(f"model.params.dis_loss_type '{dis_loss_type}' is unknown; choose 'Z' or 'IM'")
        kwargs["conditioning_key"] = None  # the shift U-Net takes the text itself
        super().__init__(
            unet_config=unet_config, cond_stage_config=cond_stage_config, cond_stage_key=cond_stage_key, **kwargs
        )
        self.model.conditioning_key = None
        self.dis_loss_flag, self.dis_loss_type, self.dis_weight = dis_loss_flag, dis_loss_type, dis_weight
        self.dis_mode, self.dis_batch_size, self.detach_flag = dis_mode, dis_batch_size, detach_flag
        self.unset_prob = unset_prob
        self.latent_unit = self.model.diffusion_model.latent_unit
        self._check_options()
        base_scale = getattr(self.model.diffusion_model, "scale_factor", None)
        if base_scale is not None:
            self.scale_factor.copy_(base_scale)
            self.restarted_from_ckpt = True
        self.vocabulary = instantiate_from_config(vocabulary_config) if vocabulary_config else None
        self._readout: AttributeReadout | None = None

    def _check_options(self) -> None:
        where = "model.params"
        if not self.model.diffusion_model.is_separate:
            raise ConfigError(
                f"{where}.unet_config.params.seprate_decoder must be true: CLIP-DisDiff needs one gradient per unit"
            )
        if self.dis_batch_size is not None and self.dis_batch_size < 1:
            raise ConfigError(f"{where}.dis_batch_size is {self.dis_batch_size}; expected at least 1, or null for all")
        if not 0.0 <= self.unset_prob < 1.0:
            raise ConfigError(f"{where}.unset_prob is {self.unset_prob}; expected a probability in [0, 1)")
        if self.cond_stage_trainable:
            raise ConfigError(f"{where}.cond_stage_trainable must be false: CLIP is frozen")

    def build_cond_stage(self, config: Mapping[str, Any]) -> nn.Module:
        """The frozen text and image encoders of CLIP."""
        missing = {"text_encoder", "image_encoder"} - set(config)
        if missing:
            raise ConfigError(
                f"model.params.cond_stage_config needs text_encoder and image_encoder, found {', '.join(config)}"
            )
        return freeze(nn.ModuleDict({name: instantiate_from_config(part) for name, part in config.items()}))

    def trained_parameters(self) -> list[nn.Parameter]:
        """The sub-gradient decoder, in the order of the family's checkpoints."""
        parameters = list(self.model.diffusion_model.trainable_parameters())
        return [*parameters, self.logvar] if self.learn_logvar else parameters

    def encode_text(self, texts: Sequence[Sequence[str]]) -> UnitText:
        """Embed U strings per sample.

        Raises:
            UserError: a sample has not ``latent_unit`` strings.
        """
        for row, strings in enumerate(texts):
            if isinstance(strings, str) or len(strings) != self.latent_unit:
                count = "one string" if isinstance(strings, str) else f"{len(strings)} attributes"
                raise UserError(
                    f"sample {row} of the batch has {count} ({strings!r}), but latent_unit is {self.latent_unit}: give "
                    "each image that many attributes (an empty one leaves a unit unset), or change "
                    "model.params.unet_config.params.latent_unit"
                )
        codes = self.cond_stage_model["text_encoder"].encode([list(strings) for strings in texts])
        mask = torch.tensor([[bool(string) for string in strings] for strings in texts])
        return UnitText(codes, mask.to(codes.device, non_blocking=True))

    def get_condition(self, batch: Mapping[str, Any]) -> UnitText:
        """The batch's text, embedded."""
        return self.encode_text(batch_value(batch, self.cond_stage_key))

    def gradients(self, x_noisy: Tensor, t: Tensor, cond: UnitText) -> ShiftOutput:
        """Base prediction (B, C, H, W) and all sub-gradients (B, U, C, H, W)."""
        return self.model(x_noisy, t, context=cond.codes, unit_mask=cond.mask, sampled_index=cond.only)

    def gradient_scale(self, t: Tensor, like: Tensor, training: bool = False) -> Tensor:
        """The factor of a sub-gradient in the prediction, (B, 1, 1, 1).

        For eps it is PDAE's: -sqrt(1 - abar) when sampling, and the posterior's ``shift_coef`` in the training loss.
        For x0 the sub-gradient is measured in units of the clean latent and fades with the noise: sqrt(1 - abar).
        """
        if self.parameterization == "x0":
            return extract(self.sqrt_one_minus_alphas_cumprod, t, like)
        return extract(self.shift_coef if training else self.ddim_coef, t, like)

    def apply_model(self, x_noisy: Tensor, t: Tensor, cond: UnitText | None) -> Tensor:
        """The conditional prediction: base plus all (or the one asked for) sub-gradients, as samplers need it."""
        if cond is None:
            return self.model.diffusion_model.base_prediction(x_noisy, t)
        out = self.gradients(x_noisy, t, cond)
        return out.pred + cond.guidance * self.gradient_scale(t, out.pred) * out.out_grad

    def p_losses(self, x_start: Tensor, cond: UnitText, t: Tensor, noise: Tensor | None = None) -> tuple[Tensor, dict]:
        """Reconstruction loss of the summed prediction, plus the disentangling loss."""
        noise = torch.randn_like(x_start) if noise is None else noise
        if self.training and self.unset_prob > 0:
            keep = torch.rand(cond.mask.shape, device=cond.mask.device) >= self.unset_prob
            cond = cond._replace(mask=cond.mask & keep)
        x_noisy = self.q_sample(x_start, t, noise)
        out = self.gradients(x_noisy, t, cond)
        prediction = out.pred + self.gradient_scale(t, out.pred, training=True) * out.out_grad
        added = self.dis_loss(x_noisy, t, out, cond) if self.dis_loss_flag else None
        return self.weigh_losses(prediction, noise if self.parameterization == "eps" else x_start, t, added)

    def dis_loss(
        self, x_t: Tensor, t: Tensor, out: ShiftOutput, cond: UnitText, unit: Tensor | None = None
    ) -> Tensor:
        """The disentangling loss of each sample, weight included.

        Args:
            x_t: (B, C, H, W) noisy latent.
            t: (B,) time steps.
            out: base prediction and sub-gradients at x_t.
            cond: the text.
            unit: (B,) the unit to tell apart; drawn uniformly among the set ones if None.

        Returns:
            (b,) with b = min(B, dis_batch_size).
        """
        count = self.dis_batch_size
        x_t, t, cond = x_t[:count], t[:count], cond.first(count)
        pred, unit_grad = out.pred[:count], out.unit_grad[:count]
        if unit is None:
            weight = cond.mask.float() + 1e-6
            # An exponential race instead of torch.multinomial, which checks its weights on the host.
            unit = (weight / torch.empty_like(weight).exponential_()).argmax(dim=1)
        edited = self._edits(pred, unit_grad, t, unit)  # (b, E, C, H, W)
        with torch.no_grad():
            z_before = self.start_from_prediction(x_t, t, pred)
            image_before = self.decode_first_stage(z_before, force_not_quantize=not self.detach_flag)
            seen_before = self.cond_stage_model["image_encoder"](image_before)
        edits = edited.shape[1]
        x_repeated, t_repeated = x_t.repeat_interleave(edits, 0), t.repeat_interleave(edits)
        z_after = self.start_from_prediction(x_repeated, t_repeated, edited.flatten(0, 1))
        image_after = self.decode_first_stage(z_after, force_not_quantize=not self.detach_flag)
        if self.detach_flag:
            image_after = image_after.detach()
        seen_after = self.cond_stage_model["image_encoder"](image_after).unflatten(0, (-1, edits))  # (b, E, D)
        variant, invariant = self._logits(seen_before, seen_after, cond.codes.detach())
        change = z_before - self._drawn(z_after, unit, edits)
        if self.dis_loss_type == "IM":
            change = image_before - self._drawn(image_after, unit, edits)
        weight = change.detach().square().flatten(1).mean(1) * self.dis_weight
        return disentangling_loss(variant, invariant, unit, weight)

    def _edits(self, pred: Tensor, unit_grad: Tensor, t: Tensor, unit: Tensor) -> Tensor:
        """Predictions with one sub-gradient added: (b, U, C, H, W), or (b, 1, C, H, W) of the drawn unit."""
        if self.dis_mode == "sampled":
            unit_grad = unit_grad[torch.arange(len(unit), device=unit.device), unit].unsqueeze(1)
        scale = self.gradient_scale(t, pred)
        return pred.unsqueeze(1) + scale.unsqueeze(1) * unit_grad

    def _logits(self, before: Tensor, after: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        if self.dis_mode == "sampled":
            return clip_logits_sampled(before, after[:, 0], text)
        return (clip_logits_reference if self.dis_mode == "reference" else clip_logits_aligned)(before, after, text)

    def _drawn(self, values: Tensor, unit: Tensor, edits: int) -> Tensor:
        """Rows of the drawn unit from (b * edits, ...); the reference code takes the last unit's by mistake."""
        values = values.unflatten(0, (-1, edits))
        if edits == 1 or self.dis_mode == "reference":
            return values[:, -1]
        return values[torch.arange(len(unit), device=unit.device), unit]

    @torch.no_grad()
    def sample_edit(
        self,
        texts: Sequence[Sequence[str]],
        x_T: Tensor,
        num_steps: int = 50,
        eta: float = 0.0,
        guidance_scale: float = 1.0,
        only: Tensor | None = None,
    ) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] for U strings per sample, from noise x_T (B, C, H, W).

        ``guidance_scale`` multiplies the sub-gradients, 1 as trained; ``only`` (B,) adds one unit's gradient alone.
        """
        cond = self.encode_text(texts)._replace(only=only, guidance=guidance_scale)
        return self.decode_first_stage(self.sample(x_T, cond, num_steps, eta)).clamp(-1, 1)

    @torch.no_grad()
    def encode_representation(self, batch: Mapping[str, Any]) -> Tensor:
        """U units per image, (B, U, R): read from the image through CLIP, or its text where there is no vocabulary."""
        if self._readout is None:
            return self.get_condition(batch).codes
        images = images_from_batch(batch, self.first_stage_key)
        return self._readout(self.cond_stage_model["image_encoder"](images))

    def on_fit_start(self) -> None:
        """Embed the whole vocabulary now, where it is known: always the same strings in the same batches.

        Embedded as they come, strings would differ in the last bit from a resumed run's, which meets others first.
        """
        datasets = getattr(self.trainer.datamodule, "datasets", {})
        vocabulary = self.vocabulary or getattr(datasets.get("train"), "vocabulary", None)
        if vocabulary is not None:
            counts = [len(words) for words in vocabulary.words]
            phrases = [vocabulary.phrases(k, w) for k, count in enumerate(counts) for w in range(count)]
            self.cond_stage_model["text_encoder"].vocabulary_embeddings(phrases)

    def on_test_start(self) -> None:
        """Prepare the read-out from the vocabulary of the config or of the test data set."""
        vocabulary = self.vocabulary or test_vocabulary(self.trainer)
        self._readout = None
        if vocabulary is not None:
            encoder = self.cond_stage_model["text_encoder"]
            counts = [len(words) for words in vocabulary.words]
            texts = [[vocabulary.phrases(k, w)[0] for w in range(count)] for k, count in enumerate(counts)]
            self._readout = AttributeReadout(encoder.vocabulary_embeddings(texts), encoder.logit_scale)

    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """The representation of the batch, for whoever writes it down."""
        return self.encode_representation(batch)

    @torch.no_grad()
    def log_images(
        self, batch: Mapping[str, Any], split: str = "train", **options: Any
    ) -> dict[str, Tensor | CaptionedGrid]:
        """Pictures by name; ``options`` are those of ``clip_disdiff_pictures``."""
        with self.ema_scope():
            return clip_disdiff_pictures(self, batch, **options)


def test_vocabulary(trainer: Any) -> Any:
    """The attribute vocabulary of the test data set, None if it has none."""
    loader = trainer.test_dataloaders
    return getattr(getattr(loader, "dataset", None), "vocabulary", None)
