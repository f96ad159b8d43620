"""Edits of generated and real images along latent directions.

Legend: B images of a batch, C h w the latent, H W the image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.diffusion.conditions import Condition
from ldm.diffusion.directions import Edit, Negative
from ldm.diffusion.inversion import invert, null_text
from ldm.diffusion.noise import fixed_noise, seeded_noise
from ldm.diffusion.samplers import DDIMSampler, Sampler
from ldm.models.diffusion.methods.noiseclr.denoiser import FrozenDenoiser
from ldm.models.diffusion.methods.noiseclr.directions import DirectionSet
from ldm.util import UserError

GUIDANCE_SCALE, NUM_STEPS = 7.5, 50  # defaults of the reference code


class Start(NamedTuple):
    """Noise that images are sampled from, and everything beside edits that they depend on.

    Attributes:
        x_T: (B, C, h, w) noise.
        cond: condition of the B images; None for no condition.
        guidance_scale: of classifier-free guidance; 1 for none.
        negative: negative condition of guidance.
        seed: of the noise that stochastic samplers add.
    """

    x_T: Tensor
    cond: Condition | None = None
    guidance_scale: float = 1.0
    negative: Negative = None
    seed: int = 0


class Editor:
    """Samples images of a frozen denoiser under edits.

    Args:
        denoiser: the denoiser, on its device.
        directions: directions of this denoiser.
        sampler: by default DDIM with 50 steps, at most as many as the schedule has.
        on_step: called whenever the denoiser has predicted the noise in a batch.

    Raises:
        UserError: the directions belong to another denoiser.
    """

    def __init__(
        self,
        denoiser: FrozenDenoiser,
        directions: DirectionSet,
        sampler: Sampler | None = None,
        on_step: Callable[[], None] = lambda: None,
    ) -> None:
        directions.check(denoiser)
        self.denoiser, self.directions, self._on_step = denoiser, directions, on_step
        self.num_timesteps = denoiser.schedule.num_timesteps
        self.sampler = DDIMSampler(min(NUM_STEPS, self.num_timesteps)) if sampler is None else sampler
        self.device = denoiser.schedule.betas.device
        with torch.no_grad():
            images = denoiser.decode(torch.zeros(1, *denoiser.latent_shape, device=self.device))
        self.image_size: tuple[int, int] = (images.shape[-2], images.shape[-1])

    def edit(self, name: str, strength: float, start: int = 0, end: int | None = None) -> Edit:
        """Return the edit by a direction with this name, or with this number from 1.

        Raises:
            UserError: there is no such direction, or the sampler has no step ``start``.
        """
        num_steps = len(self.sampler.timesteps(self.num_timesteps))
        if start >= num_steps:
            raise UserError(
                f"edit by {name}: expected a first step of 0 to {num_steps - 1}, got {start}. Start earlier, or use "
                "more steps"
            )
        return Edit(self.directions.index_of(name), strength, start, end)

    def noise(self, count: int, seed: int = 0) -> Tensor:
        """Return standard normal noise (B, C, h, w), the same on every device."""
        return seeded_noise(count, self.denoiser.latent_shape, seed).to(self.device)

    def generated(
        self,
        x_T: Tensor,
        texts: Sequence[str] = (),
        guidance_scale: float | None = None,
        negative_text: str | None = None,
        seed: int = 0,
    ) -> Start:
        """Return the start of generated images.

        Args:
            x_T: (B, C, h, w) noise.
            texts: one for each image, used in turn; none for no condition.
            guidance_scale: by default 7.5 with texts.
            negative_text: text that guidance leads away from.
            seed: see ``Start``.

        Raises:
            UserError: the model takes no texts.
        """
        count = len(x_T)
        cond = self._condition(texts, count)
        negative = None if negative_text is None else self._condition([negative_text], count)
        scale = (GUIDANCE_SCALE if guidance_scale is None else guidance_scale) if texts else 1.0
        return Start(x_T, cond, scale, negative, seed)

    def inverted(
        self,
        images: Tensor,
        texts: Sequence[str] = (),
        guidance_scale: float | None = None,
        use_null_text: bool = False,
    ) -> Start:
        """Return the start from which real images are sampled again: their noise by DDIM inversion.

        Args:
            images: (B, 3, H, W) in [-1, 1].
            texts: descriptions of the images, used in turn; none for no condition.
            guidance_scale: with ``use_null_text``, 7.5 by default; else there is no guidance.
            use_null_text: learn null conditions with which guided sampling gives the images again.

        Raises:
            UserError: the sampler is not DDIM without noise, or null-text optimisation lacks texts or guidance.
        """
        if type(self.sampler) is not DDIMSampler or self.sampler.eta > 0:
            raise UserError(
                "real images: expected the sampler ddim with eta 0, which inversion is made for, got "
                f"{type(self.sampler).__name__} (eta {vars(self.sampler).get('eta', 'none')}). Use ddim with eta 0"
            )
        scale = (GUIDANCE_SCALE if guidance_scale is None else guidance_scale) if use_null_text else 1.0
        if use_null_text and (not texts or scale == 1):
            raise UserError(
                "null-text optimisation: expected texts that describe the images, and a guidance scale other than 1, "
                f"got {len(texts)} texts and scale {scale:g}. Give --text, or leave out --null_text"
            )
        denoiser, count = self.denoiser, len(images)
        cond, null = self._condition(texts, count), denoiser.null(count)
        timesteps = self.sampler.timesteps(self.num_timesteps)

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            self._on_step()
            return denoiser.predict_eps(x, t, null if cond is None else cond)

        states = invert(denoise, denoiser.encode(images.to(self.device)), denoiser.schedule, timesteps)
        negative: Negative = None
        if use_null_text and cond is not None:
            options = {"guidance_scale": scale, "on_step": self._on_step}
            negative = null_text(denoiser.predict_eps, cond, null, states, denoiser.schedule, timesteps, **options)
        return Start(states[-1], cond, scale, negative)

    @torch.no_grad()
    def images(self, start: Start, edits: Sequence[Edit] = ()) -> Tensor:
        """Return images (B, 3, H, W) in [-1, 1] on the CPU, with these edits together."""
        denoise = self.directions.edited(
            self.denoiser, edits, self.sampler, len(start.x_T), start.cond, start.guidance_scale, start.negative
        )

        def counted(x: Tensor, t: Tensor) -> Tensor:
            self._on_step()
            return denoise(x, t)

        with fixed_noise(start.seed, self.device):
            z = self.sampler.sample(counted, start.x_T, self.denoiser.schedule)
        return self.denoiser.decode(z).clamp(-1, 1).float().cpu()

    def _condition(self, texts: Sequence[str], count: int) -> Condition | None:
        return self.denoiser.condition_from_texts([texts[i % len(texts)] for i in range(count)]) if texts else None
