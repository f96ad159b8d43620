"""Diffusion on the latents of a frozen first stage (Latent Diffusion, Rombach et al. 2022)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.models.diffusion.base import DDPM
from ldm.models.inputs import batch_value, images_from_batch
from ldm.util import ConfigError, UserError, instantiate_from_config


class LatentDiffusion(DDPM):
    """DDPM on the latents of a frozen first stage, with or without a condition."""

    def __init__(
        self,
        first_stage_config: Mapping[str, Any] | str,
        cond_stage_config: Mapping[str, Any] | str,
        num_timesteps_cond: int | None = None,
        cond_stage_key: str = "image",
        cond_stage_trainable: bool = False,
        concat_mode: bool = True,
        cond_stage_forward: str | None = None,
        conditioning_key: str | None = None,
        scale_factor: float = 1.0,
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
            cond_stage_key: entry of the batch the condition is made from; ``class_label`` hands over the whole batch.
            cond_stage_trainable: train the condition stage along.
            concat_mode: without ``conditioning_key``: concatenate (else cross-attention).
            cond_stage_forward: name of the condition stage's method, if not ``encode`` or ``forward``.
            scale_factor: the latent is multiplied by it.
            scale_by_std: set it to 1 / std of the first training batch.
            clip_denoised: latents are not clamped.
            **kwargs: see ``DDPM``.
        """
        if cond_stage_config == "__is_unconditional__":
            conditioning_key = None
        elif conditioning_key is None:
            conditioning_key = "concat" if concat_mode else "crossattn"
        super().__init__(conditioning_key=conditioning_key, clip_denoised=clip_denoised, **kwargs)
        self.cond_stage_key, self.cond_stage_trainable = cond_stage_key, cond_stage_trainable
        self.cond_stage_forward, self.scale_by_std = cond_stage_forward, scale_by_std
        self._schedule_condition(num_timesteps_cond or 1)
        self.restarted_from_ckpt = ckpt_path is not None
        self.register_buffer("scale_factor", torch.tensor(float(scale_factor)), persistent=scale_by_std)
        self.first_stage_model = freeze(instantiate_from_config(first_stage_config))
        self.cond_stage_model = self.build_cond_stage(cond_stage_config)
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys, load_only_unet)

    def _schedule_condition(self, num_levels: int) -> None:
        """Prepare the time steps at which conditions are noised, if they are."""
        if not 1 <= num_levels <= self.num_timesteps:
            raise ConfigError(
                f"model.params.num_timesteps_cond is {num_levels}; expected between 1 and timesteps "
                f"({self.num_timesteps})"
            )
        steps = None
        if num_levels > 1:
            last = self.num_timesteps - 1
            steps = torch.full((self.num_timesteps,), last)
            steps[:num_levels] = torch.linspace(0, last, num_levels).round().long()
        self.register_buffer("cond_timesteps", steps, persistent=False)

    def build_cond_stage(self, config: Mapping[str, Any] | str) -> nn.Module | None:
        """The module that turns ``batch[cond_stage_key]`` into a condition; None when there is none."""
        if config in ("__is_unconditional__", "__is_first_stage__"):
            return self.first_stage_model if config == "__is_first_stage__" else None
        module = instantiate_from_config(config)
        return module if self.cond_stage_trainable else freeze(module)

    def train(self, mode: bool = True) -> LatentDiffusion:
        """Frozen stages stay in evaluation mode whatever the rest does."""
        super().train(mode)
        self.first_stage_model.eval()
        if self.cond_stage_model is not None and not self.cond_stage_trainable:
            self.cond_stage_model.eval()
        return self

    def trained_parameters(self) -> list[nn.Parameter]:
        """Network, the condition stage where it is trained, log variances: the order of LDM's optimizer states."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        if self.cond_stage_trainable:
            parameters += self.cond_stage_model.parameters()
        return [*parameters, self.logvar] if self.learn_logvar else parameters

    @torch.no_grad()
    def on_train_batch_start(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Before the very first step, measure the latents' deviation; all processes take rank zero's."""
        first = self.current_epoch == 0 and self.global_step == 0 and batch_idx == 0
        if self.scale_by_std and first and not self.restarted_from_ckpt:
            z = self.encode_first_stage(images_from_batch(batch, self.first_stage_key)) / self.scale_factor
            self.scale_factor.fill_(self.trainer.strategy.broadcast((1.0 / z.flatten().std()).item()))

    @torch.no_grad()
    def encode_first_stage(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> scaled latent (B, C, h, w)."""
        encoded = self.first_stage_model.encode(x)
        z = encoded if isinstance(encoded, Tensor) else encoded.sample()
        if z.shape[1:] != self.latent_shape:
            raise UserError(
                f"images of {x.shape[-2]} x {x.shape[-1]} give latents of shape {tuple(z.shape[1:])}, but "
                f"model.params says channels {self.channels}, image_size {self.image_size}: change either"
            )
        return self.scale_factor * z

    def decode_first_stage(self, z: Tensor, force_not_quantize: bool = False) -> Tensor:
        """Scaled latent (B, C, h, w) -> images (B, 3, H, W); gradients pass."""
        options = {"force_not_quantize": True} if force_not_quantize and self.quantizes else {}
        return self.first_stage_model.decode(z / self.scale_factor, **options)

    @property
    def quantizes(self) -> bool:
        """Whether the first stage has a codebook."""
        return isinstance(getattr(self.first_stage_model, "quantize", None), nn.Module)

    def quantize_latent(self, z: Tensor) -> Tensor:
        """Scaled latent -> its nearest scaled codebook vectors."""
        return self.scale_factor * self.first_stage_model.quantize(z / self.scale_factor)[0] if self.quantizes else z

    def get_input(self, batch: Mapping[str, Any]) -> Tensor:
        """Scaled latents of the batch's images, (B, C, h, w)."""
        return self.encode_first_stage(images_from_batch(batch, self.first_stage_key))

    def get_condition(self, batch: Mapping[str, Any]) -> Any:
        """Output of the condition stage, or None."""
        stage = self.cond_stage_model
        if stage is None:
            return None
        method = self.cond_stage_forward or ("encode" if hasattr(stage, "encode") else "forward")
        if not hasattr(stage, method):
            raise ConfigError(f"model.params.cond_stage_forward: {type(stage).__name__} has no {method!r}")
        cond = getattr(stage, method)(self._stage_input(batch))
        return cond.mode() if hasattr(cond, "mode") and not isinstance(cond, Tensor) else cond

    def _stage_input(self, batch: Mapping[str, Any]) -> Any:
        """What the condition stage reads: images as (B, C, H, W) float, labels, tokens and texts as they are."""
        if self.cond_stage_key == "class_label" and not isinstance(self.cond_stage_model, nn.Identity):
            return batch  # LDM's class embedder picks its own entry
        value = batch_value(batch, self.cond_stage_key)
        is_map = isinstance(value, Tensor) and value.ndim == 3 and self.model.conditioning_key in ("concat", "hybrid")
        is_image = isinstance(value, Tensor) and value.ndim == 4
        return images_from_batch(batch, self.cond_stage_key) if is_image or is_map else value

    def condition_at(self, batch: Mapping[str, Any], t: Tensor) -> Any:
        """The condition of a batch, noised according to t (B,) where ``num_timesteps_cond`` asks for it."""
        cond = self.get_condition(batch)
        if self.cond_timesteps is None or cond is None:
            return cond
        if not isinstance(cond, Tensor) or not cond.is_floating_point():
            raise ConfigError(
                "model.params.num_timesteps_cond above 1 noises the condition, which must be one tensor of numbers; "
                f"{type(self.cond_stage_model).__name__} returns {type(cond).__name__}"
            )
        return self.q_sample(cond, self.cond_timesteps[t], torch.randn_like(cond))


def freeze(module: nn.Module) -> nn.Module:
    """``module`` in evaluation mode, without gradients."""
    return module.eval().requires_grad_(False)
