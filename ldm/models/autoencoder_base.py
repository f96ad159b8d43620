"""Base class of the autoencoders: training, validation and pictures (Esser et al. 2021; Rombach et al. 2022)."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.core.optimizer import LightningOptimizer, do_nothing_closure
from pytorch_lightning.plugins.precision import MixedPrecision
from torch import Tensor, nn

from ldm.lr_scheduler import with_schedule
from ldm.models.averaging import AverageWeights
from ldm.models.checkpoints import load_into, strip_prefix
from ldm.models.inputs import images_from_batch
from ldm.models.optimizers import fused
from ldm.modules.diffusionmodules.model import Decoder, Encoder
from ldm.modules.ema import LitEma
from ldm.ranges import Weight
from ldm.util import UserError, instantiate_from_config

Log = dict[str, Tensor]


class Autoencoder(pl.LightningModule):
    """Encoder, decoder and loss; a subclass implements the bottleneck between them.

    Optimization is manual, with two optimizers that alternate on each batch; gradients are therefore accumulated here,
    over ``accumulate_grad_batches`` batches. A step of both optimizers counts as one ``global_step``, so that
    ``max_steps`` and ``disc_start`` have the meaning of LDM.

    Attributes:
        has_codebook: the latent is quantized, ``quantize`` is a module and ``decode`` takes ``force_not_quantize``.
    """

    has_codebook = False

    def __init__(
        self,
        ddconfig: Mapping[str, Any],
        lossconfig: Mapping[str, Any],
        image_key: str = "image",
        monitor: str | None = None,
        scheduler_config: Mapping[str, Any] | None = None,
        lr_g_factor: Weight = 1.0,
        use_ema: bool = False,
    ) -> None:
        """Build encoder, decoder and loss.

        Args:
            ddconfig: arguments of ``Encoder`` and ``Decoder``.
            lossconfig: ``{target, params}`` of the loss; ``torch.nn.Identity`` for a frozen first stage.
            image_key: entry of the batch with the images.
            monitor: logged metric that selects checkpoints.
            scheduler_config: learning-rate multiplier, called with the number of optimizer steps.
            lr_g_factor: ratio of the autoencoder's learning rate to the discriminator's.
            use_ema: keep a moving average of all weights.
        """
        super().__init__()
        self.automatic_optimization = False
        self.learning_rate = 4.5e-6
        self.accumulate_grad_batches = 1
        self.gradient_clip_val: float | None = None
        self.image_key, self.lr_g_factor, self.scheduler_config = image_key, lr_g_factor, scheduler_config
        self.encoder, self.decoder = Encoder(**ddconfig), Decoder(**ddconfig)
        self.loss = instantiate_from_config(lossconfig, "module")
        self.use_ema = use_ema
        if monitor is not None:
            self.monitor = monitor

    def start_from(self, ckpt_path: str | None, ignore_keys: Sequence[str]) -> None:
        """Load weights, if any, and create the moving average; subclasses call it at the end of their constructor.

        Args:
            ckpt_path: checkpoint of an autoencoder, or of a latent diffusion model that contains one; None for none.
            ignore_keys: prefixes of keys that are not loaded.

        Raises:
            UserError: see ``load_into``.
        """
        if ckpt_path is not None:
            if not self.loss.state_dict():  # such as the loss of a frozen first stage
                ignore_keys = [*ignore_keys, "loss."]
            load_into(self, ckpt_path, ignore_keys, self.fitting_weights, parts=("", "first_stage_model."))
        if self.use_ema:
            self.model_ema = LitEma(self)

    def fitting_weights(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the weights of a file under the names of this model."""
        return strip_prefix(state, "first_stage_model.") or state

    @property
    def discriminator(self) -> nn.Module | None:
        """Discriminator of the loss, None for a loss without one."""
        return getattr(self.loss, "discriminator", None)

    def networks_to_compile(self) -> list[nn.Module]:
        """See ``ldm.training.compiling.Compilable``.

        Losses are balanced at the last layer: from there on, parts of the graph are run backwards on their own, which
        compiled code cannot do.
        """
        return [self.encoder, self.decoder.mid, *self.decoder.up]

    def reconstruct(self, x: Tensor) -> tuple[Tensor, Any]:
        """Return the reconstruction of images (B, 3, H, W) in [-1, 1], and the bottleneck's input to the loss."""
        raise NotImplementedError(f"{type(self).__name__} must implement reconstruct()")

    def loss_terms(
        self, x: Tensor, reconstruction: Tensor, bottleneck: Any, optimizer_idx: int, split: str
    ) -> tuple[Tensor, Log]:
        """Return the loss of the autoencoder (0) or of the discriminator (1), and values to log."""
        raise NotImplementedError(f"{type(self).__name__} must implement loss_terms()")

    def generator_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the autoencoder's optimizer, in the order of LDM's checkpoints."""
        parts = [self.encoder, self.decoder, self.quant_conv, self.post_quant_conv]
        if self.has_codebook:
            parts.insert(2, self.quantize)
        return [parameter for part in parts for parameter in part.parameters()]

    def encode_features(self, x: Tensor) -> Tensor:
        """Map images (B, 3, H, W) in [-1, 1] to the input of the bottleneck, (B, C, h, w).

        Raises:
            UserError: the images have other channels, or the downsampling does not divide their height and width.
        """
        factor, (channels, height, width) = self.encoder.shape.factor, x.shape[-3:]
        if channels != (expected := self.encoder.shape.in_channels):
            raise UserError(
                f"autoencoder: expected images of {expected} channels (ddconfig.in_channels), got "
                f"height x width x channels {height} x {width} x {channels}. Let the data set return such images"
            )
        if height % factor or width % factor:
            raise UserError(
                f"autoencoder: expected images whose height and width are multiples of {factor} (see ddconfig.ch_mult, "
                f"patch_size), got {height} x {width}. Resize or crop them (data.params.*.params.size)"
            )
        return self.quant_conv(self.encoder(x))

    def decode(self, z: Tensor) -> Tensor:
        """Map the output of the bottleneck (B, C, h, w) to images (B, 3, H, W), approximately in [-1, 1]."""
        return self.decoder(self.post_quant_conv(z))

    def get_input(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the images of a batch, (B, 3, H, W) in [-1, 1]."""
        return images_from_batch(batch, self.image_key)

    def get_last_layer(self) -> nn.Parameter:
        """Return the weight at which the gradients of adversarial and reconstruction loss are balanced."""
        return self.decoder.conv_out.weight

    @property
    def training_steps_done(self) -> int:
        """Number of completed training steps, for ``disc_start``; 0 without a trainer."""
        return 0 if self._trainer is None else self.trainer.global_step

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Update the autoencoder, then the discriminator, if any; return the loss of the autoencoder."""
        x = self.get_input(batch)
        reconstruction, bottleneck = self.reconstruct(x)
        optimizers = _as_list(self.optimizers())
        update = (batch_idx + 1) % self.accumulate_grad_batches == 0 or self.trainer.is_last_batch
        losses = []
        for index, optimizer in enumerate(optimizers):
            self.toggle_optimizer(optimizer)
            loss, log = self.loss_terms(x, reconstruction, bottleneck, index, "train")
            self.manual_backward(loss / self.accumulate_grad_batches)
            if update:
                self._update(optimizer, is_last=optimizer is optimizers[-1])
            self.untoggle_optimizer(optimizer)
            self.log_dict(log, prog_bar=False, batch_size=len(x))
            losses.append(loss.detach())
        if update:
            for scheduler in _as_list(self.lr_schedulers()):
                scheduler.step()
        self.log("train/loss", losses[0], prog_bar=True, batch_size=len(x))
        self.log("train/psnr", psnr(reconstruction.detach(), x).mean(), prog_bar=True, batch_size=len(x))
        # For monitors only; as a CPU tensor: a number would be copied to the device, which synchronizes.
        self.log("train/epoch_num", torch.tensor(float(self.current_epoch)), batch_size=len(x), logger=False)
        return losses[0]

    def _update(self, optimizer: LightningOptimizer, is_last: bool) -> None:
        """Step one of the optimizers of this batch; only the last one counts and changes the scale of the gradients."""
        scaler = self._grad_scaler
        if scaler is None:
            self.clip_gradients(optimizer, self.gradient_clip_val)
            if not is_last:
                _leave_uncounted(optimizer)
            optimizer.step()
        elif is_last:
            optimizer.step()
        else:  # Lightning would change the scale before the gradients of the last optimizer are complete
            scaler.unscale_(optimizer.optimizer)
            self.on_before_optimizer_step(optimizer.optimizer)
            scaler.step(optimizer.optimizer)
        optimizer.zero_grad()

    @property
    def _grad_scaler(self) -> torch.amp.GradScaler | None:
        """Scaler of the gradients in 16-mixed precision."""
        plugin = self.trainer.precision_plugin
        return plugin.scaler if isinstance(plugin, MixedPrecision) else None

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip scaled gradients; Lightning has unscaled them."""
        if self._grad_scaler is not None:
            self.clip_gradients(optimizer, self.gradient_clip_val)

    def configure_callbacks(self) -> list[pl.Callback]:
        """Return the callback that updates the averaged weights, with ``use_ema``."""
        return [AverageWeights(self.model_ema, self)] if self.use_ema else []

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Log the losses ``val/*`` and ``val/psnr`` of the averaged weights, or of the trained ones without average."""
        x = self.get_input(batch)
        with self.ema_scope():
            reconstruction, bottleneck = self.reconstruct(x)
            for index in range(1 if self.discriminator is None else 2):
                _, log = self.loss_terms(x, reconstruction, bottleneck, index, "val")
                self.log_dict(log, batch_size=len(x), sync_dist=True)
        self.log("val/psnr", psnr(reconstruction, x).mean(), prog_bar=True, batch_size=len(x), sync_dist=True)

    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Log ``figure/psnr``, the mean over images of the peak signal-to-noise ratio in dB."""
        x = self.get_input(batch)
        with self.ema_scope():
            reconstruction, _ = self.reconstruct(x)
        self.log("figure/psnr", psnr(reconstruction, x).mean(), batch_size=len(x), sync_dist=True)

    def configure_optimizers(self) -> Any:
        """Return Adam(0.5, 0.9) for the autoencoder and, if the loss has one, for the discriminator."""
        rates = {"betas": (0.5, 0.9)}
        generator = self.generator_parameters()
        optimizers = [fused(torch.optim.Adam, generator, lr=self.lr_g_factor * self.learning_rate, **rates)]
        if self.discriminator is not None:
            optimizers.append(fused(torch.optim.Adam, self.discriminator.parameters(), lr=self.learning_rate, **rates))
        return with_schedule(optimizers, self.scheduler_config)

    def ema_scope(self, context: str | None = None) -> contextlib.AbstractContextManager[None]:
        """Return a context that uses the averaged weights, or the trained ones without any; ``context`` is unused."""
        return self.model_ema.applied_to(self) if self.use_ema else contextlib.nullcontext()

    @torch.no_grad()
    def log_images(self, batch: Mapping[str, Any], N: int = 8, **_: Any) -> dict[str, Tensor]:
        """Return ``inputs`` and ``reconstructions``, (n, 3, H, W) in [-1, 1] with n at most ``N``."""
        x = self.get_input(batch)[:N].to(self.device)
        with self.ema_scope():
            return {"inputs": x, "reconstructions": self.reconstruct(x)[0].clamp(-1, 1)}


def _as_list(parts: Any) -> list[Any]:
    """Return Lightning's optimizers or schedulers, which are None, a single one or a list, as a list."""
    return [] if parts is None else parts if isinstance(parts, list) else [parts]


def _leave_uncounted(optimizer: LightningOptimizer) -> None:
    """Exclude the optimizer's step of this batch from ``global_step``, Lightning's total over all optimizers.

    Lightning has no public option for it, and sets both hooks again for every batch.
    """
    optimizer._on_before_step = optimizer._on_after_step = do_nothing_closure


def psnr(reconstruction: Tensor, images: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio of each image in dB, (B,), of images in [-1, 1] clamped to [0, 1]."""
    first, second = ((x.clamp(-1, 1) + 1) / 2 for x in (reconstruction, images))
    error = F.mse_loss(first, second, reduction="none").flatten(1).mean(1)
    return -10 * torch.log10(error.clamp_min(1e-10))
