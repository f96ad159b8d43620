"""NoiseCLR: latent directions of a frozen diffusion model, learned by contrast (Dalva & Yanardag 2024).

Each iteration noises B images to one time step, draws a direction and M others, and compares the changes that they make
to the predicted noise: one direction should change all images alike, and different directions differently.

Legend: B images, K directions, M compared directions, D width of a row, C h w the latent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.losses.directions import noiseclr_loss, unit_changes
from ldm.lr_scheduler import with_schedule
from ldm.models.diffusion.methods.noiseclr.denoiser import FrozenDenoiser
from ldm.models.diffusion.methods.noiseclr.directions import DIRECTIONS_FILE, DirectionSet
from ldm.models.diffusion.methods.noiseclr.files import token_names
from ldm.models.diffusion.methods.noiseclr.options import ContrastOptions
from ldm.models.diffusion.methods.noiseclr.pictures import direction_grid
from ldm.models.inputs import images_from_batch
from ldm.models.optimizers import fused
from ldm.pictures.grid import CaptionedGrid
from ldm.ranges import Count, OptionalCount, PositiveFloat, Share, Weight
from ldm.util import ConfigError, UserError, instantiate_from_config


class NoiseCLR(pl.LightningModule):
    """K directions of a frozen denoiser; the only weights of its checkpoints.

    Args:
        denoiser_config: ``{target, params}`` of a ``FrozenDenoiser``.
        num_directions: K.
        directions_per_iteration: M, directions that are compared with the chosen one.
        temperature: of the loss.
        initializer_tokens: words whose embeddings the rows start from, in turn; without any they are random.
        normalize_rows: start from rows of length 1 (``normalize_word`` of the reference code).
        min_timestep, max_timestep: range of the drawn time steps; by default all.
        weight_decay, betas, eps: of AdamW.
        first_stage_key: entry of the batch with the images.
        scheduler_config: learning-rate multiplier, called with the number of optimizer steps.
        monitor: logged metric by which checkpoints are kept.

    Raises:
        ConfigError: K is not above M, or an option is out of range.
    """

    def __init__(
        self,
        denoiser_config: Mapping[str, Any],
        num_directions: Count = ContrastOptions.num_directions,
        directions_per_iteration: Count = ContrastOptions.directions_per_iteration,
        temperature: PositiveFloat = ContrastOptions.temperature,
        initializer_tokens: Sequence[str] = (),
        normalize_rows: bool = False,
        min_timestep: OptionalCount = ContrastOptions.min_timestep,
        max_timestep: OptionalCount | None = ContrastOptions.max_timestep,
        weight_decay: Weight = ContrastOptions.weight_decay,
        betas: Sequence[Share] = ContrastOptions.betas,
        eps: PositiveFloat = ContrastOptions.eps,
        first_stage_key: str = "image",
        scheduler_config: Mapping[str, Any] | None = None,
        monitor: str | None = None,
    ) -> None:
        super().__init__()
        options = num_directions, directions_per_iteration, temperature, min_timestep, max_timestep
        ContrastOptions(*options, weight_decay, betas, eps)  # raises for values out of range
        self.denoiser: FrozenDenoiser = instantiate_from_config(denoiser_config)
        last = self.denoiser.schedule.num_timesteps
        self.timesteps = min_timestep, last if max_timestep is None else max_timestep
        if not min_timestep < self.timesteps[1] <= last:
            where = "model.params.min_timestep, max_timestep"
            raise ConfigError(f"{where}: expected 0 <= min < max <= {last}, got {list(self.timesteps)}")
        self.denoiser.require_new_tokens(token_names(num_directions))
        rows = self.denoiser.initial_rows(num_directions, initializer_tokens)
        self.rows = nn.Parameter(F.normalize(rows, dim=-1) if normalize_rows else rows)
        self.num_others, self.temperature = directions_per_iteration, temperature
        self.optimizer_options = {"weight_decay": weight_decay, "betas": tuple(betas), "eps": eps}
        self.first_stage_key, self.scheduler_config = first_stage_key, scheduler_config
        self.learning_rate = 1e-3
        self.register_load_state_dict_post_hook(_without_denoiser)
        if monitor is not None:
            self.monitor = monitor

    def train(self, mode: bool = True) -> NoiseCLR:
        """Set the training mode; the denoiser stays in evaluation mode."""
        super().train(mode)
        self.denoiser.eval()
        return self

    @property
    def directions(self) -> DirectionSet:
        """The learned directions."""
        return DirectionSet.of(self.denoiser, self.rows, self.denoiser.row_space, "noiseclr")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also write the directions beside the checkpoints, in the folder of the run; tokens as a ``.bin``, too."""
        if self.trainer.is_global_zero:
            directions, folder = self.directions, Path(self.trainer.default_root_dir)
            directions.save(folder / DIRECTIONS_FILE)
            if directions.kind == "token":
                directions.save(folder / "learned_embeds.bin")

    def changes(self, x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        """Return the changes of the predicted noise by rows (M, D), (M, B, C, h, w), for x (B, C, h, w) at t (B,)."""
        with torch.no_grad():
            without = self.denoiser.predict_eps(x, t, self.denoiser.null(len(x)))
        cond = self.denoiser.conditions(rows.repeat_interleave(len(x), dim=0))
        eps = self.denoiser.predict_eps(x.repeat(len(rows), 1, 1, 1), t.repeat(len(rows)), cond)
        return eps.unflatten(0, (len(rows), len(x))) - without

    def loss_at(self, x: Tensor, t: Tensor, chosen: Tensor) -> Tensor:
        """Return the loss of noised latents x (B, C, h, w) at t (B,).

        Args:
            x: noised latents of this process.
            t: equal time steps.
            chosen: (1 + M,) int64, the direction and those that it is compared with.
        """
        changes = unit_changes(self.changes(x, t, self.rows[chosen]))
        own, similarities = changes[0], torch.einsum("bn,mbn->mb", changes[0], changes[1:])
        if self._num_processes > 1:  # the images of all processes are one batch
            own, similarities = (self.all_gather(value, sync_grads=True) for value in (own, similarities))
            own = own.flatten(0, 1)
        return noiseclr_loss(own, similarities, self.temperature)

    @property
    def _num_processes(self) -> int:
        """Processes whose images are one batch: all in training; in evaluation, their last batches may differ."""
        return self.trainer.world_size if self._trainer is not None and self.trainer.training else 1

    def draw_directions(self) -> Tensor:
        """Return (1 + M,) different directions at random, the same in all processes."""
        return self._shared(torch.randperm(len(self.rows), device=self.device)[: 1 + self.num_others])

    def draw_timestep(self, count: int) -> Tensor:
        """Return one random time step for the images of all processes, (count,) int64."""
        return self._shared(torch.randint(*self.timesteps, (1,), device=self.device)).expand(count)

    def _shared(self, drawn: Tensor) -> Tensor:
        if self._num_processes > 1:
            torch.distributed.broadcast(drawn, src=0)
        return drawn

    def shared_step(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the loss of a batch at a drawn time step and drawn directions.

        Raises:
            UserError: the batches of all processes have one image.
        """
        with torch.no_grad():
            z = self.denoiser.encode(images_from_batch(batch, self.first_stage_key), sample=True)
        if len(z) * self._num_processes < 2:
            raise UserError(
                "data.params.batch_size: expected at least 2 images, because the loss compares images, got 1. Use a "
                "larger batch; lightning.trainer.accumulate_grad_batches does not change the images of one loss"
            )
        t = self.draw_timestep(len(z))
        x = self.denoiser.schedule.q_sample(z, t, torch.randn_like(z))
        return self.loss_at(x, t, self.draw_directions())

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor | None:
        """Return the loss and log ``train/loss``; None leaves a single image out, such as the last one of an epoch."""
        size = len(batch[self.first_stage_key])
        if batch_idx > 0 and size == self._num_processes == 1:
            return None
        loss = self.shared_step(batch)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=size)
        return loss

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Log ``val/loss``."""
        self._log_loss("val/loss", batch)

    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Log ``figure/test_loss``; callbacks measure the effects of the directions."""
        self._log_loss("figure/test_loss", batch)

    def _log_loss(self, name: str, batch: Mapping[str, Any]) -> None:
        """Log the loss of a batch; the last batch of a data set may be a single image, which has none."""
        if (size := len(batch[self.first_stage_key])) > 1:
            self.log(name, self.shared_step(batch), batch_size=size, sync_dist=True)

    @torch.no_grad()
    def log_images(
        self, batch: Mapping[str, Any], N: int = 4, split: str = "train", **options: Any
    ) -> dict[str, Tensor | CaptionedGrid]:
        """Return N images of the batch, and samples by direction; ``options`` are those of ``direction_grid``."""
        images = images_from_batch(batch, self.first_stage_key)[:N]
        return {"inputs": images, "directions": direction_grid(self.denoiser, self.directions, N, **options)}

    def configure_optimizers(self) -> Any:
        """Return AdamW on the rows, and the learning-rate multiplier if configured."""
        optimizer = fused(torch.optim.AdamW, [self.rows], lr=self.learning_rate, **self.optimizer_options)
        return with_schedule([optimizer], self.scheduler_config)


def _without_denoiser(_: nn.Module, keys: Any) -> None:
    """Remove the weights of the denoiser, which are in its own files, from the missing keys of a checkpoint."""
    keys.missing_keys[:] = [key for key in keys.missing_keys if not key.startswith("denoiser.")]
