"""Functions that scripts import from LDM's ``ldm.util`` and ``ldm.modules.diffusionmodules.util``, with its arguments.

Arguments ``verbose`` have no effect.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from ldm.util import get_obj_from_str

linear = nn.Linear


def exists(x: Any) -> bool:
    """Return whether ``x`` is not None."""
    return x is not None


def default(val: Any, d: Any) -> Any:
    """Return ``val``; if it is None, ``d``, which is called if it is a function."""
    return val if val is not None else d() if isinstance(d, FunctionType) else d


def ismap(x: Any) -> bool:
    """Return whether ``x`` is (B, C, H, W) with more channels than an image."""
    return isinstance(x, Tensor) and x.ndim == 4 and x.shape[1] > 3


def isimage(x: Any) -> bool:
    """Return whether ``x`` is a batch of images, (B, 1, H, W) or (B, 3, H, W)."""
    return isinstance(x, Tensor) and x.ndim == 4 and x.shape[1] in (1, 3)


def mean_flat(tensor: Tensor) -> Tensor:
    """Return the mean over all axes but the first, (B,)."""
    return tensor.mean(dim=tuple(range(1, tensor.ndim)))


def count_params(model: nn.Module, verbose: bool = False) -> int:
    """Return the number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def log_txt_as_img(wh: tuple[int, int], xc: Sequence[str], size: int = 10) -> Tensor:
    """Return pictures of texts, (B, 3, height, width) in [-1, 1], black on white; ``wh`` is (width, height)."""
    width, pictures = max(1, 40 * wh[0] // 256), []  # characters of a line
    for text in xc:
        picture = Image.new("RGB", tuple(wh), "white")
        lines = "\n".join(text[start : start + width] for start in range(0, len(text), width))
        ImageDraw.Draw(picture).text((0, 0), lines, "black", ImageFont.load_default(size))
        pictures.append(np.array(picture).transpose(2, 0, 1) / 127.5 - 1.0)
    return torch.tensor(np.stack(pictures))


def conv_nd(dims: int, *args: Any, **kwargs: Any) -> nn.Module:
    """Return a convolution over 1, 2 or 3 axes."""
    return (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](*args, **kwargs)


def avg_pool_nd(dims: int, *args: Any, **kwargs: Any) -> nn.Module:
    """Return an average pooling over 1, 2 or 3 axes."""
    return (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)[dims - 1](*args, **kwargs)


def checkpoint(func: Callable[..., Any], inputs: Sequence[Any], params: Any, flag: bool) -> Any:
    """Call ``func(*inputs)``; with ``flag``, recompute activations in the backward pass. ``params`` is not needed."""
    return get_obj_from_str("ldm.modules.diffusionmodules.util.run_checkpointed")(func, flag, *inputs)


def make_beta_schedule(schedule: str, n_timestep: int, *args: float, **kwargs: float) -> np.ndarray:
    """See ``ldm.diffusion.schedule.make_beta_schedule``."""
    return get_obj_from_str("ldm.diffusion.schedule.make_beta_schedule")(schedule, n_timestep, *args, **kwargs)


def make_ddim_timesteps(
    ddim_discr_method: str, num_ddim_timesteps: int, num_ddpm_timesteps: int, verbose: bool = True
) -> np.ndarray:
    """See ``ldm.diffusion.samplers.spaced_timesteps``."""
    spaced = get_obj_from_str("ldm.diffusion.samplers.spaced_timesteps")
    return spaced(num_ddim_timesteps, num_ddpm_timesteps, ddim_discr_method)


def make_ddim_sampling_parameters(
    alphacums: Any, ddim_timesteps: np.ndarray, eta: float, verbose: bool = True
) -> tuple[Any, Any, Any]:
    """Return sigma (Song et al. 2021, Eq. 16), abar and the next abar of each visited time step, each (S,)."""
    alphas, previous = alphacums[ddim_timesteps], alphacums[np.append(0, ddim_timesteps[:-1])]
    return eta * ((1 - previous) / (1 - alphas) * (1 - alphas / previous)) ** 0.5, alphas, previous


def extract_into_tensor(a: Tensor, t: Tensor, x_shape: Sequence[int]) -> Tensor:
    """Return ``a[t]`` shaped (B, 1, ..., 1), which broadcasts over ``x_shape``."""
    return a[t].reshape(len(t), *[1] * (len(x_shape) - 1))


def noise_like(shape: Sequence[int], device: torch.device | str, repeat: bool = False) -> Tensor:
    """Return standard normal noise of a shape; ``repeat`` takes the same for all samples."""
    return torch.randn((1, *shape[1:]) if repeat else tuple(shape), device=device).expand(*shape)
