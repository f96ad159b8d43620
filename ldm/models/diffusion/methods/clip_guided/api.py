"""Network and sampler of the CLIP-guided DDPM under the names of its reference package; example in docs/methods.md."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ldm.diffusion.samplers import DDPMSampler, Sampler
from ldm.models.diffusion.methods.clip_guided.model import STRENGTHS, CLIPGuidedDDPM
from ldm.modules.diffusionmodules.clip_guided import UNet

__all__ = ["DDPM", "UNet"]


class DDPM:
    """The diffusion process of betas ``B``, (T,), which samples on ``device``."""

    def __init__(self, B: Tensor, device: torch.device | str = "cpu") -> None:
        self.betas, self.device = B.double().tolist(), torch.device(device)

    def sample(
        self, model: UNet, c: Tensor, w: float = 0.0, x_T: Tensor | None = None, sampler: Sampler | None = None
    ) -> Tensor:
        """Return images (N, C, H, W) in about [-1, 1] of N conditions; see :meth:`sample_w`."""
        return self.sample_w(model, c, (w,), x_T, sampler)[0]

    def sample_w(
        self,
        model: UNet,
        c: Tensor,
        w_tests: Sequence[float] | None = None,
        x_T: Tensor | None = None,
        sampler: Sampler | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Sample conditions ``c`` (N, D), CLIP embeddings that are not normalized, with a network in evaluation mode.

        Without a sampler, that of the reference code is used. For other arguments and the results see
        ``CLIPGuidedDDPM.sample_w``.
        """
        network = {"target": f"{__name__}.given", "params": {"network": model}}
        sizes = {"channels": model.shape.img_ch, "image_size": model.shape.img_size, "given_betas": self.betas}
        process = CLIPGuidedDDPM(unet_config=network, use_ema=False, monitor=None, **sizes).to(self.device)
        chosen = sampler or DDPMSampler(variance="previous")
        return process.sample_w(c, STRENGTHS if w_tests is None else w_tests, x_T, chosen)


def given(network: nn.Module) -> nn.Module:
    """Return a network that is already built, as the target of a ``unet_config``."""
    return network
