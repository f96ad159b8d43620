"""Denoising diffusion on pixels: what every diffusion model here is made of (DDPM, Ho et al. 2020)."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from ldm.diffusion.process import DiffusionProcess
from ldm.diffusion.samplers import Denoiser, Inpainting, StepCallback, ddim_sample, ddpm_sample
from ldm.diffusion.schedule import make_beta_schedule
from ldm.models.averaging import AverageWeights
from ldm.models.checkpoints import load_into, strip_prefix
from ldm.models.diffusion.pictures import latent_diffusion_pictures
from ldm.models.inputs import images_from_batch
from ldm.modules.diffusionmodules.wrapper import DiffusionWrapper
from ldm.modules.ema import LitEma
from ldm.modules.weights import EMA_PREFIX
from ldm.pictures.grid import CaptionedGrid
from ldm.util import ConfigError, UserError, instantiate_from_config

logger = logging.getLogger(__name__)


class DDPM(DiffusionProcess, pl.LightningModule):
    """A denoising network trained to predict the noise (or the clean image) at a random noise level."""

    def __init__(
        self,
        unet_config: Mapping[str, Any],
        timesteps: int = 1000,
        beta_schedule: str = "linear",
        loss_type: str = "l2",
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        load_only_unet: bool = False,
        monitor: str | None = "val/loss",
        use_ema: bool = True,
        ema_decay: float = 0.9999,
        first_stage_key: str = "image",
        image_size: int = 256,
        channels: int = 3,
        log_every_t: int = 100,
        clip_denoised: bool = True,
        linear_start: float = 1e-4,
        linear_end: float = 2e-2,
        cosine_s: float = 8e-3,
        given_betas: Sequence[float] | None = None,
        original_elbo_weight: float = 0.0,
        v_posterior: float = 0.0,
        l_simple_weight: float = 1.0,
        conditioning_key: str | None = None,
        parameterization: str = "eps",
        scheduler_config: Mapping[str, Any] | None = None,
        learn_logvar: bool = False,
        logvar_init: float = 0.0,
        noise_bias: float = 1.0,
    ) -> None:
        """Build network, schedule and moving average. Names and defaults are LDM's.

        Args:
            unet_config: ``{target, params}`` of the network.
            timesteps: T.
            beta_schedule: see ``make_beta_schedule``, with linear_start, linear_end, cosine_s; or ``given_betas``.
            loss_type: ``l1`` or ``l2``.
            ckpt_path: weights to start from, without the keys that start with one of ``ignore_keys``.
            load_only_unet: take only the network from ``ckpt_path``.
            monitor: logged metric by which checkpoints are kept.
            use_ema: keep a moving average of the network, of decay ``ema_decay``.
            first_stage_key: entry of the batch that holds the images.
            image_size: height and width of what is denoised.
            channels: channels of what is denoised.
            log_every_t: distance of the time steps in pictures of the process.
            clip_denoised: clamp x0 estimates to [-1, 1] while sampling by DDPM (pixels only).
            original_elbo_weight: weight of the variational bound.
            v_posterior: see ``schedule_buffers``.
            l_simple_weight: weight of the simple loss.
            conditioning_key: see ``DiffusionWrapper``.
            parameterization: the network predicts ``eps`` or ``x0``.
            scheduler_config: learning-rate multiplier, called with the number of optimizer steps.
            learn_logvar: learn one log variance per time step, starting at ``logvar_init``.
            noise_bias: time steps are drawn for training as T u^(1 / noise_bias) with u uniform: 1 is the papers'
                uniform draw; above 1 noisy steps are drawn more often, at which a condition matters most.

        Raises:
            ConfigError: an option has an unknown value.
        """
        super().__init__()
        if loss_type not in ("l1", "l2"):
            raise ConfigError(f"model.params.loss_type '{loss_type}' is unknown; choose 'l1' or 'l2'")
        if noise_bias <= 0:
            raise ConfigError(f"model.params.noise_bias is {noise_bias}; expected a positive number, 1 for uniform")
        self.learning_rate = 1e-4
        self.noise_bias = noise_bias
        self.loss_type = loss_type
        self.first_stage_key, self.image_size, self.channels = first_stage_key, image_size, channels
        self.log_every_t, self.clip_denoised = log_every_t, clip_denoised
        self.l_simple_weight, self.original_elbo_weight = l_simple_weight, original_elbo_weight
        self.scheduler_config = scheduler_config
        self.model = DiffusionWrapper(unet_config, conditioning_key)
        self.use_ema = use_ema
        if use_ema:
            self.model_ema = LitEma(self.model, decay=ema_decay)
        if monitor is not None:
            self.monitor = monitor
        betas = make_beta_schedule(beta_schedule, timesteps, linear_start, linear_end, cosine_s)
        betas = betas if given_betas is None else np.asarray(given_betas, dtype=np.float64)
        self.register_schedule(betas, v_posterior, parameterization)
        logvar = torch.full((self.num_timesteps,), float(logvar_init))
        self.learn_logvar = learn_logvar
        if learn_logvar:
            self.logvar = nn.Parameter(logvar)
        else:
            self.register_buffer("logvar", logvar, persistent=False)
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys, load_only_unet)

    def init_from_ckpt(self, path: str, ignore_keys: Sequence[str] = (), only_unet: bool = False) -> None:
        """Load weights from ``path``; see ``load_into`` for what is reported and refused."""
        if only_unet:
            loaded = load_into(self.model, path, ignore_keys, transform=lambda state: strip_prefix(state, "model."))
        else:
            loaded = load_into(self, path, ignore_keys, transform=self._without_foreign_average)
        if self.use_ema and f"{EMA_PREFIX}num_updates" not in loaded:
            self.model_ema.restart(self.model)  # the average of weights that are no longer there means nothing

    def _without_foreign_average(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """``state`` without its average, if that is not one of exactly the weights this model averages."""
        average = {key for key in state if key.startswith(EMA_PREFIX)}
        wanted = {EMA_PREFIX + name for name in self.model_ema.state_dict()} if self.use_ema else average
        if not average or wanted <= average:
            return state
        logger.warning("the checkpoint averages other weights than this model: a new average is started")
        return {key: value for key, value in state.items() if key not in average}

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what is denoised."""
        return self.channels, self.image_size, self.image_size

    @contextlib.contextmanager
    def ema_scope(self) -> Iterator[None]:
        """Within it, the averaged weights are in place of the trained ones; without an average it does nothing."""
        if not self.use_ema:
            yield
            return
        self.model_ema.store(self.model.parameters())
        self.model_ema.copy_to(self.model)
        try:
            yield
        finally:
            self.model_ema.restore(self.model.parameters())

    def get_loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Per-sample mean of |target - prediction| (l1) or its square (l2), (B,)."""
        difference = target - prediction
        return (difference.abs() if self.loss_type == "l1" else difference.square()).flatten(1).mean(1)

    def apply_model(self, x_noisy: Tensor, t: Tensor, cond: Any) -> Tensor:
        """The network's output for a condition as ``get_condition`` gives it, (B, C, H, W)."""
        if cond is None:
            return self.model(x_noisy, t)
        if isinstance(cond, dict):  # of a condition stage that serves several ways at once (hybrid)
            return self.model(x_noisy, t, **cond)
        key = "c_concat" if self.model.conditioning_key == "concat" else "c_crossattn"
        return self.model(x_noisy, t, **{key: cond if isinstance(cond, list) else [cond]})

    def p_losses(self, x_start: Tensor, cond: Any, t: Tensor, noise: Tensor | None = None) -> tuple[Tensor, dict]:
        """Loss at time steps t (B,) for clean x_start (B, C, H, W); see ``weigh_losses`` for the result."""
        noise = torch.randn_like(x_start) if noise is None else noise
        prediction = self.apply_model(self.q_sample(x_start, t, noise), t, cond)
        return self.weigh_losses(prediction, noise if self.parameterization == "eps" else x_start, t)

    def weigh_losses(
        self, prediction: Tensor, target: Tensor, t: Tensor, added: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Simple loss, variational bound and a method's own term into one number (LDM, get_loss and p_losses).

        Args:
            prediction: (B, C, H, W).
            target: (B, C, H, W).
            t: (B,) time steps.
            added: (B,) loss of the method, its weight included.

        Returns:
            the loss (), and the terms by name.
        """
        simple = self.get_loss(prediction, target)
        logvar = self.logvar[t]
        loss = self.l_simple_weight * (simple / torch.exp(logvar) + logvar).mean()
        bound = (self.lvlb_weights[t] * simple).mean()
        terms = {"loss_simple": simple.mean(), "loss_vlb": bound}
        if self.learn_logvar:
            terms |= {"loss_gamma": (simple / torch.exp(logvar) + logvar).mean(), "logvar": self.logvar.mean()}
        if added is not None:
            terms["loss_dis"] = added.mean()
            loss = loss + added.mean()
        loss = loss + self.original_elbo_weight * bound
        return loss, terms | {"loss": loss}

    def get_input(self, batch: Mapping[str, Any]) -> Tensor:
        """What is denoised, (B, C, H, W)."""
        return images_from_batch(batch, self.first_stage_key)

    def get_condition(self, batch: Mapping[str, Any]) -> Any:
        """The condition of a batch, None if there is none."""
        return None

    def condition_at(self, batch: Mapping[str, Any], t: Tensor) -> Any:
        """The condition of a batch as training sees it at time steps t (B,)."""
        return self.get_condition(batch)

    def draw_timesteps(self, count: int) -> Tensor:
        """(count,) int64 time steps: in training see ``noise_bias``, else uniform."""
        if self.noise_bias == 1 or not self.training:
            return torch.randint(0, self.num_timesteps, (count,), device=self.device)
        share = torch.rand(count, device=self.device) ** (1 / self.noise_bias)
        return (share * self.num_timesteps).long().clamp(max=self.num_timesteps - 1)

    def shared_step(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor], int]:
        """Loss at drawn time steps, its terms, and the batch size."""
        x = self.get_input(batch)
        t = self.draw_timesteps(len(x))
        loss, terms = self.p_losses(x, self.condition_at(batch, t), t)
        return loss, terms, len(x)

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """One step; logs ``train/*``."""
        loss, terms, size = self.shared_step(batch)
        self.log_dict({f"train/{k}": v.detach() for k, v in terms.items() if k != "loss"}, batch_size=size)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=size)
        # Tensors on the CPU stay there; numbers would be copied to the device, which waits for it.
        self.log("train/epoch_num", torch.tensor(float(self.current_epoch)), batch_size=size)
        self.log("train/step_num", torch.tensor(float(self.global_step)), batch_size=size)
        return loss

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Logs ``val/*`` of the trained weights and ``val/*_ema`` of the averaged ones."""
        _, terms, size = self.shared_step(batch)
        self.log_dict({f"val/{k}": v for k, v in terms.items()}, batch_size=size, sync_dist=True)
        if self.use_ema:
            with self.ema_scope():
                _, terms, _ = self.shared_step(batch)
            self.log_dict({f"val/{k}_ema": v for k, v in terms.items()}, batch_size=size, sync_dist=True)

    def configure_callbacks(self) -> list[pl.Callback]:
        """The averaged weights move along with training."""
        return [AverageWeights(self.model_ema, self.model)] if self.use_ema else []

    def trained_parameters(self) -> list[nn.Parameter]:
        """What the optimizer gets; frozen weights are not among it."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        return [*parameters, self.logvar] if self.learn_logvar else parameters

    def configure_optimizers(self) -> Any:
        """AdamW with torch's defaults (weight decay 0.01), and the learning-rate multiplier if one is configured."""
        # On a CPU one fused kernel takes the place of a dozen small ones per tensor; beside it Lightning refuses to
        # clip gradients in mixed precision.
        is_mixed = self._trainer is not None and "mixed" in str(self._trainer.precision)
        fused = True if self.device.type == "cpu" and not is_mixed else None
        optimizer = torch.optim.AdamW(self.trained_parameters(), lr=self.learning_rate, fused=fused)
        if self.scheduler_config is None:
            return optimizer
        factor = instantiate_from_config(self.scheduler_config)
        return [optimizer], [{"scheduler": LambdaLR(optimizer, factor), "interval": "step"}]

    def denoiser(
        self, cond: Any, unconditional_guidance_scale: float = 1.0, unconditional_conditioning: Tensor | None = None
    ) -> Denoiser:
        """The function samplers call: noise in x_t under a condition, guided as ``sample`` says."""
        guided = unconditional_guidance_scale != 1 and unconditional_conditioning is not None
        if guided and not isinstance(cond, Tensor):
            raise UserError(f"guidance needs a condition of one tensor; found {type(cond).__name__}")
        both = torch.cat([unconditional_conditioning, cond]) if guided else None

        def predict(x: Tensor, t: Tensor) -> Tensor:
            if both is None:
                return self.apply_model(x, t, cond)
            without, under = self.apply_model(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
            return without + unconditional_guidance_scale * (under - without)

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            prediction = predict(x, t)
            if self.parameterization == "eps":
                return prediction
            return self.predict_noise_from_start(x, t, prediction)

        return denoise

    def sample(
        self,
        x_T: Tensor,
        cond: Any = None,
        num_steps: int | None = None,
        eta: float = 1.0,
        quantize_denoised: bool = False,
        inpainting: Inpainting | None = None,
        callback: StepCallback | None = None,
        **guidance: Any,
    ) -> Tensor:
        """From noise to a sample.

        Args:
            x_T: (B, C, H, W) standard normal.
            cond: the condition, of B samples.
            num_steps: DDIM steps; None samples all T by DDPM.
            eta: DDIM's; 0 deterministic, 1 as noisy as DDPM.
            quantize_denoised: put each estimate of x_0 on the codebook.
            inpainting: what to keep of which latent.
            callback: called after each step.
            **guidance: LDM's ``unconditional_guidance_scale`` s and ``unconditional_conditioning`` (of cond's shape):
                the noise is e_none + s (e_cond - e_none), classifier-free guidance (Ho & Salimans 2022).

        Returns:
            (B, C, H, W).

        Raises:
            UserError: guidance with a condition that is not one tensor.
        """
        common = {
            "quantize_x0": self.quantize_latent if quantize_denoised else None,
            "inpainting": inpainting,
            "callback": callback,
        }
        if num_steps is not None:
            return ddim_sample(self.denoiser(cond, **guidance), x_T, self.alphas_cumprod, num_steps, eta, **common)
        buffers = {name: getattr(self, name) for name in self.schedule_names}
        return ddpm_sample(self.denoiser(cond, **guidance), x_T, buffers, clip_denoised=self.clip_denoised, **common)

    def quantize_latent(self, z: Tensor) -> Tensor:
        """z on the codebook of the first stage; here there is none."""
        return z

    def decode_first_stage(self, z: Tensor, force_not_quantize: bool = False) -> Tensor:
        """What is denoised, as images; here the same."""
        return z

    @torch.no_grad()
    def log_images(
        self, batch: Mapping[str, Any], split: str = "train", **options: Any
    ) -> dict[str, Tensor | CaptionedGrid]:
        """Pictures by name; ``options`` are those of ``latent_diffusion_pictures``."""
        with self.ema_scope():
            return latent_diffusion_pictures(self, batch, **options)
