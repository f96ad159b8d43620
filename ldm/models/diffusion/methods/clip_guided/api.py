"""The network and the sampler of the CLIP-guided DDPM under the names of its reference package, for scripts.

Example::

    from ldm.models.diffusion.methods.clip_guided.api import DDPM, UNet
    from ldm.modules.encoders.modules import FrozenCLIPTextEmbedder

    ddpm = DDPM(torch.linspace(0.0001, 0.02, 400), device)
    model = UNet(400, img_ch=3, img_size=32, down_chs=(256, 256, 512), t_embed_dim=8, c_embed_dim=512)
    model.load_state_dict(torch.load("9.pth", weights_only=True)["model"])
    clip = FrozenCLIPTextEmbedder("ViT-B/32", normalize=False)
    images = ddpm.sample(model.to(device).eval(), clip(["A fish swimming", "A beautiful tree"]).to(device))
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.diffusion.conditions import Condition
from ldm.diffusion.guidance import classifier_free
from ldm.diffusion.parameterization import parameterization
from ldm.diffusion.process import DiffusionProcess
from ldm.diffusion.samplers import DDPMSampler, Sampler, StepCallback
from ldm.models.diffusion.methods.clip_guided.strengths import STRENGTHS, sample_strengths
from ldm.modules.diffusionmodules.clip_guided import UNet

__all__ = ["DDPM", "UNet"]


class DDPM(DiffusionProcess):
    """The diffusion process of given betas, and its sampler.

    Args:
        B: (T,) betas, in which linear steps are those of the reference code.
        device: of the samples.
    """

    def __init__(self, B: Tensor, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.register_schedule(B.detach().double().cpu().numpy(), 0.0, parameterization("eps"))
        self.to(device)

    def sample(
        self, model: UNet, c: Tensor, w: float = 0.0, x_T: Tensor | None = None, sampler: Sampler | None = None
    ) -> Tensor:
        """Return images (N, C, H, W) in about [-1, 1] of N conditions with the strength w; see :meth:`sample_w`."""
        return self.sample_w(model, c, (w,), x_T, sampler)[0]

    def sample_w(
        self,
        model: UNet,
        c: Tensor,
        w_tests: Sequence[float] | None = None,
        x_T: Tensor | None = None,
        sampler: Sampler | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Sample every condition under every strength w of the guidance.

        Args:
            model: the network, in evaluation mode.
            c: (N, D) CLIP embeddings, not normalized; zeros are no condition.
            w_tests: W strengths; None takes those of the reference code.
            x_T: (W N, C, H, W) standard normal noise; drawn if None.
            sampler: by default that of the reference code, over all time steps.

        Returns:
            Images and states as ``sample_strengths`` returns them.
        """
        device, strengths = self.betas.device, STRENGTHS if w_tests is None else w_tests
        chosen = sampler or DDPMSampler(variance="previous")
        shape = (len(strengths) * len(c), model.shape.img_ch, model.shape.img_size, model.shape.img_size)

        def run(x: Tensor, cond: Condition, guidance_scale: float | Tensor, callback: StepCallback) -> Tensor:
            denoise = classifier_free(lambda x, t, given: model(x, t, given.value), cond, guidance_scale)
            return chosen.sample(denoise, x, self.schedule, callback)

        with torch.no_grad():
            noise = torch.randn(shape, device=device) if x_T is None else x_T
            return sample_strengths(run, c.to(device), strengths, noise)
