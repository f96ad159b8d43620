"""How autoencoders train, whatever their bottleneck is (Esser et al. 2021; Rombach et al. 2022)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from ldm.models.averaging import AverageWeights
from ldm.models.checkpoints import load_into, strip_prefix
from ldm.models.inputs import check_image_size, images_from_batch
from ldm.modules.diffusionmodules.model import Decoder, Encoder
from ldm.modules.ema import LitEma
from ldm.modules.losses import DummyLoss
from ldm.util import instantiate_from_config

Log = dict[str, Tensor]


class Autoencoder(pl.LightningModule):
    """Encoder, decoder and loss; a subclass adds the bottleneck between them and says how it enters the loss.

    Optimisation is manual (two optimizers take turns on each batch); gradient accumulation is therefore done here,
    over ``accumulate_grad_batches`` batches. A step of both optimizers is one of ``global_step``, so that ``max_steps``
    and ``disc_start`` mean what they mean in LDM.
    """

    def __init__(
        self,
        ddconfig: Mapping[str, Any],
        lossconfig: Mapping[str, Any],
        image_key: str = "image",
        monitor: str | None = None,
        scheduler_config: Mapping[str, Any] | None = None,
        lr_g_factor: float = 1.0,
        use_ema: bool = False,
    ) -> None:
        """Build encoder, decoder and loss.

        Args:
            ddconfig: arguments of ``Encoder`` and ``Decoder``.
            lossconfig: ``{target, params}`` of the loss; ``torch.nn.Identity`` for a frozen first stage.
            image_key: entry of the batch that holds the images.
            monitor: logged metric by which checkpoints are kept.
            scheduler_config: learning-rate multiplier, called with the number of optimizer steps.
            lr_g_factor: the autoencoder's learning rate over the discriminator's.
            use_ema: keep a moving average of all weights.
        """
        super().__init__()
        self.automatic_optimization = False
        self.learning_rate = 4.5e-6
        self.accumulate_grad_batches = 1
        self.gradient_clip_val: float | None = None
        self.image_key, self.lr_g_factor, self.scheduler_config = image_key, lr_g_factor, scheduler_config
        self.resolution = ddconfig["resolution"]
        self.encoder, self.decoder = Encoder(**ddconfig), Decoder(**ddconfig)
        self.loss = instantiate_from_config(lossconfig)
        self.use_ema = use_ema
        if monitor is not None:
            self.monitor = monitor

    def start_from(self, ckpt_path: str | None, ignore_keys: Sequence[str]) -> None:
        """Load weights, if any, and start the moving average: the last thing a subclass does when it is built.

        Args:
            ckpt_path: a checkpoint of an autoencoder or of a latent diffusion model that holds one; None for none.
            ignore_keys: prefixes of the state dict not to load.

        Raises:
            UserError: see ``load_into``.
        """
        if ckpt_path is not None:
            if isinstance(self.loss, (nn.Identity, DummyLoss)):  # a frozen stage has no use for a discriminator
                ignore_keys = [*ignore_keys, "loss."]
            load_into(self, ckpt_path, ignore_keys, transform=first_stage_weights)
        if self.use_ema:
            self.model_ema = LitEma(self)

    def reconstruct(self, x: Tensor) -> tuple[Tensor, Any]:
        """Images (B, 3, H, W) in [-1, 1] -> their reconstruction, and what the loss wants of the bottleneck."""
        raise NotImplementedError(f"{type(self).__name__} must say how it reconstructs")

    def loss_terms(
        self, x: Tensor, reconstruction: Tensor, bottleneck: Any, optimizer_idx: int, split: str
    ) -> tuple[Tensor, Log]:
        """Loss of the autoencoder (0) or of the discriminator (1), and what to log of it."""
        raise NotImplementedError(f"{type(self).__name__} must say how its bottleneck enters the loss")

    def generator_parameters(self) -> list[nn.Parameter]:
        """What the autoencoder's optimizer gets, in the order of the family's checkpoints."""
        raise NotImplementedError(f"{type(self).__name__} must say what is trained")

    def encode_features(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> what the bottleneck sees, (B, C, h, w).

        Raises:
            UserError: the images are not of ``ddconfig.resolution``.
        """
        check_image_size(x, self.resolution, "first-stage ddconfig.resolution")
        return self.quant_conv(self.encoder(x))

    def decode(self, z: Tensor) -> Tensor:
        """Latent behind the bottleneck (B, C, h, w) -> images (B, 3, H, W), about [-1, 1]."""
        return self.decoder(self.post_quant_conv(z))

    def get_input(self, batch: Mapping[str, Any]) -> Tensor:
        """Images of a batch, (B, 3, H, W) in [-1, 1]."""
        return images_from_batch(batch, self.image_key)

    def get_last_layer(self) -> nn.Parameter:
        """The weight whose gradient balances the adversarial against the reconstruction loss."""
        return self.decoder.conv_out.weight

    @property
    def training_steps_done(self) -> int:
        """Steps done before this one, as ``disc_start`` counts them; 0 outside of training."""
        return 0 if self._trainer is None else self.trainer.global_step

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """One step of the autoencoder, then one of the discriminator if there is one; returns the former's loss."""
        x = self.get_input(batch)
        reconstruction, bottleneck = self.reconstruct(x)
        optimizers = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        update = (batch_idx + 1) % self.accumulate_grad_batches == 0 or self.trainer.is_last_batch
        losses = []
        for index, optimizer in enumerate(optimizers):
            self.toggle_optimizer(optimizer)
            loss, log = self.loss_terms(x, reconstruction, bottleneck, index, "train")
            self.manual_backward(loss / self.accumulate_grad_batches)
            if update:
                self.clip_gradients(optimizer, self.gradient_clip_val)
                if optimizer is not optimizers[-1]:
                    _leave_uncounted(optimizer)
                optimizer.step()
                optimizer.zero_grad()
            self.untoggle_optimizer(optimizer)
            self.log_dict(log, prog_bar=False, batch_size=len(x))
            losses.append(loss.detach())
        if update:
            for scheduler in self._schedulers():
                scheduler.step()
        self.log("train/loss", losses[0], prog_bar=True, batch_size=len(x))
        self.log("train/psnr", psnr(reconstruction.detach(), x).mean(), prog_bar=True, batch_size=len(x))
        # A tensor on the CPU stays there; a number would be copied to the device, which waits for it.
        self.log("train/epoch_num", torch.tensor(float(self.current_epoch)), batch_size=len(x))
        return losses[0]

    def _schedulers(self) -> list[LambdaLR]:
        schedulers = self.lr_schedulers()
        if schedulers is None:
            return []
        return schedulers if isinstance(schedulers, list) else [schedulers]

    def configure_callbacks(self) -> list[pl.Callback]:
        """The averaged weights move along with training."""
        return [AverageWeights(self.model_ema, self)] if self.use_ema else []

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Log ``val/*`` losses, ``val/rec_loss`` and ``val/psnr`` of the averaged (if any) weights."""
        x = self.get_input(batch)
        with self.ema_scope():
            reconstruction, bottleneck = self.reconstruct(x)
            for index in range(2 if getattr(self.loss, "discriminator", None) is not None else 1):
                _, log = self.loss_terms(x, reconstruction, bottleneck, index, "val")
                self.log_dict(log, batch_size=len(x), sync_dist=True)
        self.log("val/psnr", psnr(reconstruction, x).mean(), prog_bar=True, batch_size=len(x), sync_dist=True)

    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Log ``figure/psnr``: mean over images of the peak signal-to-noise ratio, dB on [0, 1]."""
        x = self.get_input(batch)
        with self.ema_scope():
            reconstruction, _ = self.reconstruct(x)
        self.log("figure/psnr", psnr(reconstruction, x).mean(), batch_size=len(x), sync_dist=True)

    def configure_optimizers(self) -> Any:
        """Adam(0.5, 0.9) for the autoencoder and, if the loss has one, for the discriminator."""
        rates = {"betas": (0.5, 0.9)}
        generator = self.generator_parameters()
        optimizers = [torch.optim.Adam(generator, lr=self.lr_g_factor * self.learning_rate, **rates)]
        discriminator = getattr(self.loss, "discriminator", None)
        if discriminator is not None:
            optimizers.append(torch.optim.Adam(discriminator.parameters(), lr=self.learning_rate, **rates))
        if self.scheduler_config is None:
            return optimizers, []
        factor = instantiate_from_config(self.scheduler_config)
        return optimizers, [{"scheduler": LambdaLR(o, factor), "interval": "step"} for o in optimizers]

    @contextlib.contextmanager
    def ema_scope(self) -> Iterator[None]:
        """Within it, the averaged weights are in place of the trained ones; without an average it does nothing."""
        if not self.use_ema:
            yield
            return
        self.model_ema.store(self.parameters())
        self.model_ema.copy_to(self)
        try:
            yield
        finally:
            self.model_ema.restore(self.parameters())

    @torch.no_grad()
    def log_images(self, batch: Mapping[str, Any], N: int = 8, **_: Any) -> dict[str, Tensor]:
        """``inputs`` and ``reconstructions``, (n, 3, H, W) in [-1, 1] with n at most ``N``."""
        x = self.get_input(batch)[:N].to(self.device)
        with self.ema_scope():
            return {"inputs": x, "reconstructions": self.reconstruct(x)[0].clamp(-1, 1)}


def _leave_uncounted(optimizer: LightningOptimizer) -> None:
    """Keep this batch's step of the optimizer out of ``global_step``, where Lightning adds up all optimizers' steps.

    Lightning has no public switch for it; it sets both hooks anew for every batch.
    """
    optimizer._on_before_step = optimizer._on_after_step = _do_nothing


def _do_nothing() -> None:
    pass


def psnr(reconstruction: Tensor, images: Tensor) -> Tensor:
    """Peak signal-to-noise ratio per image in dB, (B,), of images in [-1, 1] mapped to [0, 1] and clamped."""
    error = (
        F.mse_loss((reconstruction.clamp(-1, 1) + 1) / 2, (images.clamp(-1, 1) + 1) / 2, reduction="none")
        .flatten(1)
        .mean(1)
    )
    return -10 * torch.log10(error.clamp_min(1e-10))


def first_stage_weights(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The first stage's part of a latent diffusion checkpoint; any other state dict unchanged."""
    return strip_prefix(state, "first_stage_model.") or state
