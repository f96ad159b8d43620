"""Diffusion on the latents of a frozen first stage (Latent Diffusion, Rombach et al. 2022)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ldm.diffusion.conditions import Condition, PartsCondition, TensorCondition, as_condition
from ldm.models.contracts import (
    ClassStage,
    ConditionStage,
    FirstStage,
    HasRepresentation,
    LabelStage,
    ScoresSamples,
    require,
)
from ldm.models.diffusion.base import DDPM
from ldm.models.inputs import batch_value, images_from_batch, mask_from_batch
from ldm.models.stored_latents import StoredLatents
from ldm.modules.encoders.labels import class_labels
from ldm.ranges import ConditioningKey, Count, PositiveFloat
from ldm.util import ConfigError, UserError, instantiate_from_config


class LatentDiffusion(DDPM):
    """DDPM on the latents of a frozen first stage, with or without a condition."""

    lowest_of_masks = -1.0  # value of concatenated masks outside of the part to fill
    stored_latents: StoredLatents | None = None  # encodings of the training images, set by a callback

    def __init__(
        self,
        first_stage_config: Mapping[str, Any] | Literal["__is_first_stage__", "__is_unconditional__"],
        cond_stage_config: Mapping[str, Any] | Literal["__is_first_stage__", "__is_unconditional__"],
        num_timesteps_cond: Count | None = None,
        cond_stage_key: str = "image",
        cond_stage_trainable: bool = False,
        concat_mode: bool = True,
        cond_stage_forward: str | None = None,
        conditioning_key: ConditioningKey | None = None,
        scale_factor: PositiveFloat = 1.0,
        scale_by_std: bool = False,
        clip_denoised: bool = False,
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        load_only_unet: bool = False,
        **kwargs: Any,
    ) -> None:
        """Build first stage and condition stage beside the network.

        Args:
            first_stage_config: ``{target, params}`` of the autoencoder.
            cond_stage_config: ``{target, params}``, ``__is_unconditional__`` or ``__is_first_stage__``.
            num_timesteps_cond: above 1, the condition is noised in training, with that many levels of noise over the
                first time steps and full noise after them (LDM's ``shorten_cond_schedule``).
            cond_stage_key: entry of the batch the condition is made from; ``class_label`` passes the whole batch.
            cond_stage_trainable: train the condition stage as well.
            concat_mode: without ``conditioning_key``: concatenate (else cross-attention).
            cond_stage_forward: name of the condition stage's method, if not ``encode`` or ``forward``.
            scale_factor: factor of the latent.
            scale_by_std: set ``scale_factor`` to 1 / std of the first training batch, unless a checkpoint holds it.
            clip_denoised: clamp x0 estimates to [-1, 1] while sampling by DDPM; latents are not bounded.
            ckpt_path: see ``WeightOptions``, as ``ignore_keys`` and ``load_only_unet``.
            **kwargs: see ``DDPM``.
        """
        if cond_stage_config == "__is_unconditional__" and not self.concat_keys:
            conditioning_key = None
        elif conditioning_key is None:
            conditioning_key = "concat" if concat_mode else "crossattn"
        super().__init__(conditioning_key=conditioning_key, clip_denoised=clip_denoised, **kwargs)
        self.cond_stage_key, self.cond_stage_trainable = cond_stage_key, cond_stage_trainable
        self.scale_by_std = scale_by_std
        self._schedule_condition(num_timesteps_cond or 1)
        self._has_scale = False  # whether scale_factor came from a checkpoint
        self.register_buffer("scale_factor", torch.tensor(float(scale_factor)), persistent=scale_by_std)
        self.add_frozen("first_stage_model", instantiate_from_config(first_stage_config))
        require(self.first_stage_model, FirstStage, "model.params.first_stage_config", ConfigError)
        stage = self.build_cond_stage(cond_stage_config)
        if cond_stage_trainable and stage is not None:
            self.add_trained("cond_stage_model", stage)
        else:
            self.add_frozen("cond_stage_model", stage)
        self._encode_condition = None if stage is None else _condition_method(stage, cond_stage_forward)
        self._empty: Tensor | None = None
        if type(self).get_condition is LatentDiffusion.get_condition:  # else a method with a condition of its own
            self._check_condition(stage)
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys, load_only_unet)

    def _check_condition(self, stage: nn.Module | None) -> None:
        """Raise a ``ConfigError`` for options that the condition does not fit; LDM's inpainting is recognized."""
        network, channels = self.model, self.input_options.channels
        if self.loss_options.cond_drop_prob and stage is None:
            raise ConfigError("model.params.cond_drop_prob: expected a model with a condition. Remove the key")
        if network.attends and stage is None:
            raise ConfigError(
                f"model.params.conditioning_key: expected a condition stage for {network.conditioning_key!r}, got "
                "none. Set cond_stage_config, or conditioning_key: concat"
            )
        least = channels * 2 if stage is self.first_stage_model else channels + 1
        if network.concatenates and network.in_channels is not None and network.in_channels < least:
            raise ConfigError(
                f"model.params.unet_config.params.in_channels: expected at least {least}, because conditions are "
                f"concatenated to the {channels} channels that are denoised, got {network.in_channels}. Make them match"
            )
        if stage is self.first_stage_model and not network.attends and (network.in_channels or 0) > least:
            self.concat_keys = ("mask",)

    def _schedule_condition(self, num_levels: int) -> None:
        """Prepare the time steps at which conditions are noised, if they are."""
        if not 1 <= num_levels <= self.num_timesteps:
            raise ConfigError(
                f"model.params.num_timesteps_cond: expected 1 to {self.num_timesteps} (timesteps), got {num_levels}"
            )
        steps = None
        if num_levels > 1:
            last = self.num_timesteps - 1
            steps = torch.full((self.num_timesteps,), last)
            steps[:num_levels] = torch.linspace(0, last, num_levels).round().long()
        self.register_buffer("cond_timesteps", steps, persistent=False)

    def build_cond_stage(self, config: Mapping[str, Any] | str) -> nn.Module | None:
        """Return the module that turns ``batch[cond_stage_key]`` into a condition; ``None`` without a condition."""
        if config == "__is_first_stage__":
            return self.first_stage_model
        return instantiate_from_config(config)

    def init_from_ckpt(self, path: str, ignore_keys: Sequence[str] = (), only_unet: bool = False) -> set[str]:
        """See the base class; ``scale_by_std`` measures nothing where the whole model, or a scale, was loaded."""
        self._has_scale = self._has_scale or not only_unet
        return super().init_from_ckpt(path, ignore_keys, only_unet)

    def initial_state(self, state: Mapping[str, Tensor], only_unet: bool) -> Mapping[str, Tensor]:
        """See the base class; the scale of the latents that the network was trained on is taken from the file."""
        if only_unet and self.scale_by_std and "scale_factor" in state:
            self.scale_factor.copy_(state["scale_factor"])
            self._has_scale = True
        return super().initial_state(state, only_unet)

    @torch.no_grad()
    def on_train_batch_start(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Measure the latents' deviation before the very first step; all processes use that of rank zero."""
        first = self.current_epoch == 0 and self.global_step == 0 and batch_idx == 0
        if self.scale_by_std and first and not self._has_scale:
            z = self.encode_batch(batch) / self.scale_factor
            self.scale_factor.fill_(self.trainer.strategy.broadcast((1.0 / z.flatten().std()).item()))

    @torch.no_grad()
    def encode_first_stage(self, x: Tensor) -> Tensor:
        """Return the scaled latents (B, C, h, w) of images (B, 3, H, W) in [-1, 1]."""
        return self._scaled(self.first_stage_model.encode(x), x.shape[-2:])

    @torch.no_grad()
    def encode_batch(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the scaled latents of the batch's images, (B, C, h, w), from stored encodings if there are any."""
        stored = None if self.stored_latents is None else self.stored_latents.of(batch)
        if stored is not None:
            return self._scaled(stored, self.stored_latents.image_size)
        return self.encode_first_stage(images_from_batch(batch, self.first_stage_key))

    @property
    def needs_images(self) -> bool:
        """Whether training steps need images whose latents are stored; a method that needs none overrides it."""
        is_condition = self._encode_condition is not None and self.cond_stage_key == self.first_stage_key
        return type(self) is not LatentDiffusion or is_condition or bool(self.concat_keys)

    def _scaled(self, encoded: Any, pixels: Sequence[int]) -> Tensor:
        """Return scaled latents from the output of the first stage for images of H x W pixels."""
        z = encoded if isinstance(encoded, Tensor) else encoded.sample()
        return self.scale_factor * self.checked(z, pixels)

    def decode_first_stage(self, z: Tensor, force_not_quantize: bool = False) -> Tensor:
        """Return images (B, 3, H, W) of scaled latents (B, C, h, w); gradients pass."""
        options = {"force_not_quantize": True} if force_not_quantize and self.quantizes else {}
        return self.first_stage_model.decode(z / self.scale_factor, **options)

    @property
    def quantizes(self) -> bool:
        """Whether the first stage has a codebook."""
        return "quantize" in dict(self.first_stage_model.named_children())

    def quantize_latent(self, z: Tensor) -> Tensor:
        """Return the nearest scaled codebook vectors of a scaled latent."""
        return self.scale_factor * self.first_stage_model.quantize(z / self.scale_factor)[0] if self.quantizes else z

    def get_input(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the scaled latents of the batch's images, (B, C, h, w)."""
        return self.encode_batch(batch)

    # Conditions --------------------------------------------------------------------------------------------------

    def get_condition(self, batch: Mapping[str, Any]) -> Condition | None:
        """Return what the condition stage makes of a batch, completed; ``None`` for an unconditional model."""
        if self._encode_condition is None:
            return self.complete_condition(None, batch)
        self.check_labels(batch)
        value = self._stage_input(batch)
        is_text = isinstance(value, (list, tuple)) and all(isinstance(text, str) for text in value)
        return self.complete_condition(self._condition(self._encode_condition(value), is_text), batch)

    def complete_condition(self, cond: Condition | None, batch: Mapping[str, Any]) -> Condition | None:
        """Add the entries ``concat_keys`` of a batch, which stay in guidance and dropout of a condition by tokens."""
        if not self.concat_keys:
            return cond
        place = "c_crossattn" if self.model.attends else "c_concat"
        own = {} if cond is None else {None: (cond,)} if isinstance(cond, TensorCondition) else cond.parts
        parts = {each or place: values for each, values in own.items()}
        maps = tuple(TensorCondition(self.concatenated(batch, key)) for key in self.concat_keys)
        return PartsCondition({**parts, "c_concat": (*parts.get("c_concat", ()), *maps)})

    def concatenated(self, batch: Mapping[str, Any], key: str) -> Tensor:
        """Return an entry of a batch in the size of the latent, (B, c, h, w): a mask, 1 in the part to fill."""
        return F.interpolate(mask_from_batch(batch, key, self.lowest_of_masks), self.size_of_latents(batch))

    def check_labels(self, batch: Mapping[str, Any]) -> None:
        """Raise a ``UserError`` for class labels that the model does not have."""
        stage, key, num_classes = self.cond_stage_model, self.cond_stage_key, self.model.num_classes
        if isinstance(stage, LabelStage):
            stage.labels_of(batch, None if key == "class_label" else key)
        elif num_classes is not None and isinstance(stage, nn.Identity):
            class_labels(batch_value(batch, key), num_classes, f"batch['{key}']")

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Check class labels while they are on the CPU, which does not wait for the device."""
        if isinstance(batch, Mapping):
            self.check_labels(batch)
        return batch

    def condition_from_texts(self, texts: Sequence[str], batch: Mapping[str, Any] | None = None) -> Condition | None:
        """Return the condition of one text per sample; ``batch`` contains the maps of models that take some.

        Raises:
            UserError: the condition stage does not take texts.
        """
        stage = self.cond_stage_model
        if isinstance(stage, ConditionStage) and stage.takes_texts:
            encoded = stage.encode_texts(texts)
        else:  # a stage without a contract of this package is tried
            try:
                encoded = self._encode_condition(list(texts))
                encoded = encoded if isinstance(encoded, Mapping) else encoded.unflatten(0, (len(texts),))
            except Exception as error:
                raise UserError(
                    "sampling from texts: expected a condition stage that encodes a list of texts as a tensor (B, S, "
                    f"D), got {type(stage).__name__} ({type(error).__name__}: {error}). Use conditions of the data"
                ) from error
        return self.complete_condition(self._condition(encoded, is_text=True), batch or {})

    def condition_from_classes(self, labels: Tensor, batch: Mapping[str, Any] | None = None) -> Condition | None:
        """Return the condition of one class per sample, (B,) int64; for ``batch`` see ``condition_from_texts``.

        Raises:
            UserError: the condition stage does not take classes, or has no class of that number.
        """
        require(self.cond_stage_model, ClassStage, "sampling from classes")
        count = self.cond_stage_model.num_classes
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < count:
            raise UserError(f"class: expected 0 to {count - 1}, got {labels.tolist()}")
        encoded = self.cond_stage_model.encode_classes(labels.to(self.device))
        return self.complete_condition(self._condition(encoded), batch or {})

    def _condition(self, encoded: Any, is_text: bool = False) -> Condition | None:
        """Wrap the condition stage's output; a distribution gives its mode."""
        if not isinstance(encoded, (Tensor, Condition, list, tuple, Mapping)):
            encoded = encoded.mode()
        return as_condition(encoded, self._unconditional if is_text or self._has_empty() else None)

    def _has_empty(self) -> bool:
        """Return whether the stage implements ``unconditional``."""
        stage = self.cond_stage_model
        return (isinstance(stage, ConditionStage) and stage.takes_texts) or (
            isinstance(stage, ClassStage) and stage.takes_classes
        )

    def _unconditional(self) -> Tensor:
        """Return the stage's value without a condition, (1, ...); that of a frozen stage is computed once."""
        if self._empty is not None and self._empty.device == self.device:
            return self._empty
        empty = self.cond_stage_model.unconditional(1) if self._has_empty() else self._encode_condition([""])
        empty = empty["c_crossattn"] if isinstance(empty, Mapping) else empty
        empty = empty[0] if isinstance(empty, (list, tuple)) else empty
        self._empty = None if self.cond_stage_trainable else empty
        return empty

    def _stage_input(self, batch: Mapping[str, Any]) -> Any:
        """Return the input of the condition stage: images as (B, C, H, W) float, other entries unchanged."""
        if self.cond_stage_key == "class_label" and not isinstance(self.cond_stage_model, nn.Identity):
            return batch  # LDM's class embedder picks its own entry
        value = batch_value(batch, self.cond_stage_key)
        is_map = isinstance(value, Tensor) and value.ndim == 3 and self.model.conditioning_key in ("concat", "hybrid")
        is_image = isinstance(value, Tensor) and value.ndim == 4
        return images_from_batch(batch, self.cond_stage_key) if is_image or is_map else value

    def condition_at(self, batch: Mapping[str, Any], t: Tensor) -> Condition | None:
        """See the base class; noised according to t (B,) where ``num_timesteps_cond`` asks for it."""
        cond = super().condition_at(batch, t)
        if self.cond_timesteps is None or cond is None:
            return cond
        if not isinstance(cond, TensorCondition) or not cond.value.is_floating_point():
            raise ConfigError(
                "model.params.num_timesteps_cond: expected a condition of one float tensor, which can be noised, got "
                f"the {type(cond).__name__} of {type(self.cond_stage_model).__name__}. Leave the key out"
            )
        noise = torch.randn_like(cond.value)
        return TensorCondition(self.q_sample(cond.value, self.cond_timesteps[t], noise), cond.empty)

    # Test --------------------------------------------------------------------------------------------------------

    def prepare_representation(self, dataset: Any) -> None:
        """Prepare :meth:`encode_representation` for the images of a data set, before a test pass or scores."""

    def on_test_start(self) -> None:
        """Prepare the representation of the test data set."""
        loader = self.trainer.test_dataloaders
        if isinstance(loader, DataLoader):
            self.prepare_representation(loader.dataset)

    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor | None:
        """Return the representation of the batch, which callbacks write and score; ``None`` for a model without."""
        return self.encode_representation(batch) if isinstance(self, HasRepresentation) else None


def _condition_method(stage: nn.Module, name: str | None) -> Callable[[Any], Any]:
    """Return the method of a condition stage that encodes an entry of a batch: by default ``encode`` or ``forward``."""
    found = getattr(stage, name or "encode", None)
    if found is None and name is not None:
        expected = f"expected a method of {type(stage).__name__}"
        raise ConfigError(f"model.params.cond_stage_forward: {expected}, got {name!r}. Correct the name")
    return found or stage.__call__


def has_test_pass(model: pl.LightningModule, callbacks: Sequence[pl.Callback] = ()) -> bool:
    """Return whether a model has a representation of test data, a ``test_step`` of its own, or samples to be scored."""
    if any(isinstance(callback, ScoresSamples) for callback in callbacks):
        return True
    if type(model).test_step is LatentDiffusion.test_step:
        return isinstance(model, HasRepresentation)
    return is_overridden("test_step", model)
