"""Base class of all diffusion models: denoising diffusion on pixels (DDPM, Ho et al. 2020).

A model is a network, a noise schedule, a parameterization, a condition and a loss. A method subclasses
:class:`~ldm.models.diffusion.latent.LatentDiffusion` and overrides ``get_condition`` and the loss.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from ldm.diffusion.conditions import Condition, TensorCondition, as_condition
from ldm.diffusion.guidance import classifier_free
from ldm.diffusion.parameterization import parameterization
from ldm.diffusion.process import DiffusionProcess
from ldm.diffusion.samplers import DDIMSampler, DDPMSampler, Denoiser, Hooks, Sampler, StepCallback, build_sampler
from ldm.legacy import sampling_options
from ldm.legacy.model_methods import ScriptMethods
from ldm.lr_scheduler import with_schedule
from ldm.models.averaging import AverageWeights, without_foreign_average
from ldm.models.checkpoints import load_into, strip_prefix
from ldm.models.diffusion.pictures import latent_diffusion_pictures
from ldm.models.diffusion.sizes import DataSize, read_size
from ldm.models.inputs import images_from_batch
from ldm.models.optimizers import fused
from ldm.models.options import InputOptions, LossOptions, ScheduleOptions, WeightOptions, group_options
from ldm.modules.diffusionmodules.wrapper import DiffusionWrapper
from ldm.modules.ema import LitEma
from ldm.modules.weights import EMA_PREFIX, read_state_dict
from ldm.pictures.grid import CaptionedGrid
from ldm.ranges import ConditioningKey
from ldm.util import ConfigError, UserError


class DDPM(ScriptMethods, DiffusionProcess, DataSize, pl.LightningModule):
    """A denoising network that predicts the noise, the clean image or the velocity at a random noise level."""

    cond_stage_key: str | None = None
    concat_keys: Sequence[str] = ()  # entries of the batch that are concatenated to what is denoised
    picture_steps_and_eta = (200, 1.0)  # of DDIM in pictures, LDM's defaults of ddim_steps and ddim_eta

    def __init__(
        self,
        unet_config: Mapping[str, Any],
        conditioning_key: ConditioningKey | None = None,
        monitor: str | None = "val/loss",
        scheduler_config: Mapping[str, Any] | None = None,
        sampler: Sampler | Mapping[str, Any] | str | None = None,
        **options: Any,
    ) -> None:
        """Build network, schedule and moving average. Names and defaults are LDM's.

        Args:
            unet_config: ``{target, params}`` of the network.
            conditioning_key: see ``DiffusionWrapper``.
            monitor: logged metric by which checkpoints are kept.
            scheduler_config: learning-rate multiplier, called with the number of optimizer steps.
            sampler: default sampler, see ``ldm.diffusion.samplers.build_sampler``.
            **options: LDM's flat options, see ``ScheduleOptions``, ``LossOptions``, ``InputOptions`` and
                ``WeightOptions`` in ``ldm.models.options``.

        Raises:
            ConfigError: an option is unknown or has an unknown value.
        """
        super().__init__()
        schedule, self.loss_options, self.input_options, weights = group_options(
            options, ScheduleOptions, LossOptions, InputOptions, WeightOptions
        )
        self.learning_rate = 1e-4
        self.scheduler_config = scheduler_config
        self._sampler = None if sampler is None else build_sampler(sampler)
        self._frozen: list[str] = []
        self._trained: list[str] = []
        self._started_from: tuple[str, tuple[str, ...]] | None = None  # checkpoint and keys to ignore
        self.model = DiffusionWrapper(unet_config, conditioning_key)
        self.register_load_state_dict_pre_hook(read_size)
        self.use_ema = weights.use_ema
        if self.use_ema:
            self.model_ema = LitEma(self.model, decay=weights.ema_decay)
        if monitor is not None:
            self.monitor = monitor
        self.register_schedule(
            schedule.betas(), schedule.v_posterior, parameterization(self.input_options.parameterization)
        )
        logvar = torch.full((self.num_timesteps,), float(self.loss_options.logvar_init))
        if self.loss_options.learn_logvar:
            self.logvar = nn.Parameter(logvar)
        else:
            self.register_buffer("logvar", logvar, persistent=False)
        if weights.ckpt_path is not None:
            self.init_from_ckpt(weights.ckpt_path, weights.ignore_keys, weights.load_only_unet)

    @property
    def first_stage_key(self) -> str:
        """Entry of the batch that holds the images."""
        return self.input_options.first_stage_key

    # Parts -------------------------------------------------------------------------------------------------------

    def add_frozen(self, name: str, module: nn.Module | None) -> None:
        """Attach a module that never trains: without gradients, always in evaluation mode."""
        setattr(self, name, None if module is None else module.eval().requires_grad_(False))
        self._frozen.append(name)

    def add_trained(self, name: str, part: nn.Module | nn.Parameter, averaged: bool = False) -> None:
        """Attach a part that trains beside the network.

        Args:
            name: attribute under which it is kept, and prefix of its state-dict keys.
            part: module or parameter.
            averaged: include it in the moving average.
        """
        setattr(self, name, part)
        self._trained.append(name)
        self._load_part(name)
        if averaged and self.use_ema:
            self.model_ema.add(name, part)
            self._load_part(EMA_PREFIX + name)

    def _load_part(self, prefix: str) -> None:
        """Load the entries of a part that is attached after the checkpoint of ``ckpt_path`` was loaded."""
        if self._started_from is not None:
            path, ignored = self._started_from
            state = read_state_dict(path, self.state_dict()).items()
            own = {key: value for key, value in state if key.startswith(prefix) and not key.startswith(ignored)}
            self.load_state_dict(own, strict=False)

    def train(self, mode: bool = True) -> DDPM:
        """Set the training mode; frozen parts stay in evaluation mode."""
        super().train(mode)
        for name in self._frozen:
            if (module := self._modules.get(name)) is not None:
                module.eval()
        return self

    def networks_to_compile(self) -> list[nn.Module]:
        """See ``ldm.training.compiling.Compilable``."""
        return [self.model.diffusion_model]

    def network_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the network that train."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def trained_parameters(self) -> list[nn.Parameter]:
        """Return the optimizer's parameters: network, added parts, log variances; the order of LDM's checkpoints."""
        parameters = self.network_parameters()
        for name in self._trained:
            part = self._modules.get(name)
            parameters += [self._parameters[name]] if part is None else part.parameters()
        return [*parameters, self.logvar] if self.loss_options.learn_logvar else parameters

    # Weights -----------------------------------------------------------------------------------------------------

    def init_from_ckpt(self, path: str, ignore_keys: Sequence[str] = (), only_unet: bool = False) -> set[str]:
        """Load weights from ``path`` and return the names of those that were loaded; see ``load_into``."""
        self._started_from = None if only_unet else (path, tuple(ignore_keys))
        chosen = functools.partial(self.initial_state, only_unet=only_unet)
        if only_unet:
            loaded = load_into(self.model, path, ignore_keys, chosen, parts=("model.", ""))
        else:
            loaded = load_into(self, path, ignore_keys, chosen, self.schedule_names)
        self.on_weights_loaded(loaded)
        if self.use_ema and f"{EMA_PREFIX}num_updates" not in loaded:
            self.model_ema.restart(self.model)  # an average of weights that were replaced has no meaning
        return loaded

    def on_weights_loaded(self, loaded: set[str]) -> None:
        """Complete the weights after a checkpoint was loaded, before a new average is started."""

    def initial_state(self, state: Mapping[str, Tensor], only_unet: bool) -> Mapping[str, Tensor]:
        """Return the entries of a checkpoint's state dict to load; with ``only_unet`` under the network's names."""
        if only_unet:
            return strip_prefix(state, "model.") or state
        return without_foreign_average(state, self.model_ema if self.use_ema else None)

    def ema_scope(self, context: str | None = None) -> contextlib.AbstractContextManager[None]:
        """Return a context that uses the averaged weights, or the trained ones without any; ``context`` is unused."""
        return self.model_ema.applied_to(self.model) if self.use_ema else contextlib.nullcontext()

    # Training ----------------------------------------------------------------------------------------------------

    def get_input(self, batch: Mapping[str, Any]) -> Tensor:
        """Return what is denoised, (B, C, H, W)."""
        images = images_from_batch(batch, self.first_stage_key)
        return self.checked(images, images.shape[-2:])

    def get_condition(self, batch: Mapping[str, Any]) -> Condition | None:
        """Return the condition of a batch; ``None`` for an unconditional model."""
        return None

    def condition_at(self, batch: Mapping[str, Any], t: Tensor) -> Condition | None:
        """Return the condition of a batch at time steps t (B,) of a training or validation step."""
        cond = self.get_condition(batch)
        probability = self.loss_options.cond_drop_prob
        if cond is None or probability == 0 or not self.training:
            return cond
        return cond.drop(torch.rand(self._drop_shape(cond, len(t)), device=t.device) < probability)

    def _drop_shape(self, cond: Condition, count: int) -> Sequence[int]:
        """Return the shape of a mask of dropped conditions: (B,), or that of the vectors with drop_per_element."""
        if not self.loss_options.drop_per_element:
            return (count,)
        if not isinstance(cond, TensorCondition) or cond.value.ndim != 2:
            raise ConfigError("model.params.drop_per_element: expected one vector per sample as condition. Remove it")
        return cond.value.shape

    def draw_timesteps(self, count: int) -> Tensor:
        """Return (count,) int64 time steps: uniform, or in training according to ``noise_bias``."""
        bias = self.loss_options.noise_bias
        if bias == 1 or not self.training:
            return torch.randint(0, self.num_timesteps, (count,), device=self.device)
        share = torch.rand(count, device=self.device) ** (1 / bias)
        return (share * self.num_timesteps).long().clamp(max=self.num_timesteps - 1)

    def apply_model(self, x_noisy: Tensor, t: Tensor, cond: Any) -> Tensor:
        """Return the network's output (B, C, H, W) under a condition, or a value that ``as_condition`` takes."""
        condition = as_condition(cond)
        inputs = {} if condition is None else condition.inputs(self.model.conditioning_key)
        return self.model(x_noisy, t, **inputs)

    def p_losses(self, x_start: Tensor, cond: Any, t: Tensor, noise: Tensor | None = None) -> tuple[Tensor, dict]:
        """Return the loss at time steps t (B,) for clean x_start (B, C, H, W), and its terms; see ``weigh_losses``."""
        noise = torch.randn_like(x_start) if noise is None else noise
        prediction = self.apply_model(self.q_sample(x_start, t, noise), t, cond)
        return self.weigh_losses(prediction, self.parameterization.target(self.schedule, x_start, noise, t), t)

    def get_loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the per-sample mean of |target - prediction| (l1) or of its square (l2), (B,)."""
        difference = target - prediction
        is_l1 = self.loss_options.loss_type == "l1"
        return (difference.abs() if is_l1 else difference.square()).flatten(1).mean(1)

    def weigh_losses(
        self, prediction: Tensor, target: Tensor, t: Tensor, added: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum the simple loss, the variational bound and a method's own term (LDM, get_loss and p_losses).

        Args:
            prediction: (B, C, H, W).
            target: (B, C, H, W).
            t: (B,) time steps.
            added: (B,) loss of the method, its weight included.

        Returns:
            the loss (), and its terms by name.
        """
        simple = self.get_loss(prediction, target)
        logvar = self.logvar[t]
        weighted = simple / torch.exp(logvar) + logvar
        loss = self.loss_options.l_simple_weight * weighted.mean()
        bound = (self.lvlb_weights[t] * simple).mean()
        terms = {"loss_simple": simple.mean(), "loss_vlb": bound}
        if self.loss_options.learn_logvar:
            terms |= {"loss_gamma": weighted.mean(), "logvar": self.logvar.mean()}
        if added is not None:
            terms["loss_dis"] = added.mean()
            loss = loss + added.mean()
        loss = loss + self.loss_options.original_elbo_weight * bound
        return loss, terms | {"loss": loss}

    def shared_step(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor], int]:
        """Return the loss at drawn time steps, its terms, and the batch size."""
        x = self.get_input(batch)
        t = self.draw_timesteps(len(x))
        loss, terms = self.p_losses(x, self.condition_at(batch, t), t)
        return loss, terms, len(x)

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Return the loss; logs ``train/*``."""
        loss, terms, size = self.shared_step(batch)
        self.log_dict({f"train/{k}": v.detach() for k, v in terms.items() if k != "loss"}, batch_size=size)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=size)
        # For monitors only. Tensors on the CPU stay there; numbers would be copied to the device, which waits for it.
        counts = {"train/epoch_num": self.current_epoch, "train/step_num": self.global_step}
        self.log_dict({name: torch.tensor(float(n)) for name, n in counts.items()}, batch_size=size, logger=False)
        return loss

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Log ``val/*`` of the trained weights and ``val/*_ema`` of the averaged ones."""
        _, terms, size = self.shared_step(batch)
        self.log_dict({f"val/{k}": v for k, v in terms.items()}, batch_size=size, sync_dist=True)
        if self.use_ema:
            with self.ema_scope():
                _, terms, _ = self.shared_step(batch)
        if self.use_ema or str(vars(self).get("monitor")).endswith("_ema"):  # LDM logs these without an average too
            self.log_dict({f"val/{k}_ema": v for k, v in terms.items()}, batch_size=size, sync_dist=True)

    def configure_callbacks(self) -> list[pl.Callback]:
        """Return the callback that updates the averaged weights."""
        return [AverageWeights(self.model_ema, self.model)] if self.use_ema else []

    def configure_optimizers(self) -> Any:
        """Return AdamW with torch's defaults (weight decay 0.01), and the learning-rate multiplier if configured."""
        optimizer = fused(torch.optim.AdamW, self.trained_parameters(), lr=self.learning_rate)
        return with_schedule([optimizer], self.scheduler_config)

    # Sampling ----------------------------------------------------------------------------------------------------

    @property
    def default_sampler(self) -> Sampler:
        """The sampler of the config; without one, DDPM over all time steps."""
        return self._sampler or DDPMSampler(clip_denoised=self.input_options.clip_denoised)

    def choose_sampler(self, given: Sampler | Mapping[str, Any] | str | None, num_steps: int, eta: float) -> Sampler:
        """Return a given sampler, else that of the config, else DDIM with these settings (at most T steps)."""
        if given is not None:
            return build_sampler(given)
        return self._sampler or DDIMSampler(min(num_steps, self.num_timesteps), eta)

    def denoiser(self, cond: Any, guidance_scale: float | Tensor = 1.0, null: Any = None) -> Denoiser:
        """Return the function samplers call: the noise in x_t under a condition, guided as in :meth:`sample`."""
        predict = classifier_free(self.apply_model, as_condition(cond), guidance_scale, as_condition(null))

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            return self.parameterization.to_eps(self.schedule, x, t, predict(x, t))

        return denoise

    @torch.no_grad()
    def sample(
        self,
        x_T: Tensor,
        cond: Any = None,
        sampler: Sampler | None = None,
        guidance_scale: float | Tensor = 1.0,
        null: Any = None,
        callback: StepCallback | None = None,
        hooks: Hooks | None = None,
    ) -> Tensor:
        """Sample.

        Args:
            x_T: (B, C, H, W) standard normal noise.
            cond: the condition of B samples.
            sampler: by default :attr:`default_sampler`.
            guidance_scale: s of classifier-free guidance, e_null + s (e_cond - e_null); 1 for none. One number,
                or one per sample, (B,).
            null: negative condition of the guidance, such as a negative prompt; by default no condition.
            callback: called after each step.
            hooks: quantization and inpainting.

        Returns:
            (B, C, H, W).

        Raises:
            UserError: guidance of a condition that has no null condition.
            ConfigError: the sampler does not fit the schedule.
        """
        chosen = self.default_sampler if sampler is None else sampler
        if hooks is not None and not chosen.takes_hooks:
            raise UserError(
                f"sampler: expected a sampler with the argument `hooks` for quantization and inpainting, got "
                f"{type(chosen).__name__}. Override step() in place of sample(), or request neither"
            )
        extra = {} if hooks is None else {"hooks": hooks}
        denoise = self.denoiser(cond, guidance_scale, null)
        return chosen.sample(denoise, x_T, self.schedule, callback=callback, **extra)

    def quantize_latent(self, z: Tensor) -> Tensor:
        """Return z on the codebook of the first stage; unchanged without one."""
        return z

    @property
    def quantizes(self) -> bool:
        """Whether the first stage has a codebook."""
        return False

    def decode_first_stage(self, z: Tensor, force_not_quantize: bool = False) -> Tensor:
        """Decode latents to images; pixels are returned unchanged."""
        return z

    def draw_pictures(self, batch: Mapping[str, Any], **options: Any) -> dict[str, Tensor | CaptionedGrid]:
        """Return pictures by name; a method replaces them with its own."""
        return latent_diffusion_pictures(self, batch, **options)

    @torch.no_grad()
    def log_images(
        self, batch: Mapping[str, Any], split: str = "train", use_ema_scope: bool = True, **options: Any
    ) -> dict[str, Tensor | CaptionedGrid]:
        """Return pictures by name, by default of the averaged weights; ``options`` are those of ``draw_pictures``."""
        with self.ema_scope() if use_ema_scope else contextlib.nullcontext():
            return self.draw_pictures(batch, **sampling_options(options, *self.picture_steps_and_eta))
