"""Frozen U-Net with a second decoder that predicts one gradient per latent unit (Yang et al. 2023, DisDiff).

The second decoder is the gradient estimator of PDAE (Zhang et al. 2022), run for each unit on the same encoder
features: ``g_k = G(h_0, skips; emb + part_k, W z_k)``. The units are folded into the batch: one pass computes all.

Legend: B batch, U units, K units in one pass, D width of a unit's code, C channels, H W space, E embedding width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from ldm.modules.diffusionmodules import openaimodel
from ldm.modules.diffusionmodules.openaimodel import build_decoder, build_head, build_middle
from ldm.modules.diffusionmodules.shapes import UNetConfig
from ldm.modules.diffusionmodules.util import run_checkpointed
from ldm.modules.weights import network_keys, network_weights, read_state_dict
from ldm.ranges import Count, Finite
from ldm.util import ConfigError, UserError


class ShiftOutput(NamedTuple):
    """Output of the shift U-Net; the caller scales the gradients and adds them to the prediction."""

    pred: Tensor  # (B, C, H, W) prediction of the frozen network, detached
    unit_grad: Tensor  # (B, U, C, H, W) gradient of each unit, or (B, 1, C, H, W) of the selected unit

    @property
    def out_grad(self) -> Tensor:
        """Sum of the units' gradients, (B, C, H, W)."""
        return self.unit_grad.sum(dim=1)


class UNetModel(openaimodel.UNetModel):
    """Frozen U-Net with a trainable shift decoder.

    Args:
        latent_unit: number of units U.
        repre_emb_channels: width D of a unit's code.
        seprate_decoder: predict one gradient per unit (the spelling is that of DisDiff's configs); False: one gradient
            for all units together, from the concatenated codes.
        orth_emb: distinguish the units by the rows of a learned rotation; False: by learned vectors.
        wo_part_emb: distinguish the units by their codes only.
        ckpt_path: checkpoint of the latent diffusion model to freeze; None keeps the random initialization.
        load_ema_ckpt: load the averaged weights of that checkpoint.
        legacy_load_ema_flag: invert ``load_ema_ckpt``, as the reference code does.
        init_shift_from_base: initialize the shift decoder, except for its last layer, with the weights of the frozen
            decoder instead of from scratch as in the papers; it then learns faster in a few thousand steps. Without
            ``ckpt_path``, call :meth:`copy_base_to_shift` after loading the weights of the frozen network.
        unit_chunk: number of units computed in one pass, None for all; the activations of each chunk are recomputed in
            the backward pass, which reduces memory to that of one chunk.
        code_scale: factor of the codes. A network learns slowly from inputs far below 1: use sqrt(D) for codes of
            length 1, such as normalized embeddings of CLIP.
        params: keyword arguments of :class:`UNetConfig`.

    Attributes:
        scale_factor: scale of the first stage's latents in the checkpoint of the frozen network; None if unknown.

    Example:
        >>> unet = UNetModel(image_size=8, in_channels=4, out_channels=4, model_channels=32, num_res_blocks=1,
        ...                  attention_resolutions=[2], channel_mult=[1, 2], num_heads=4, latent_unit=3,
        ...                  repre_emb_channels=5, seprate_decoder=True, orth_emb=True)
        >>> out = unet(torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), torch.randn(2, 3, 5))
        >>> out.pred.shape, out.unit_grad.shape
        (torch.Size([2, 4, 8, 8]), torch.Size([2, 3, 4, 8, 8]))
    """

    def __init__(
        self,
        latent_unit: Count = 6,
        repre_emb_channels: Count = 32,
        seprate_decoder: bool = False,
        orth_emb: bool = False,
        wo_part_emb: bool = False,
        ckpt_path: str | None = None,
        load_ema_ckpt: bool = False,
        legacy_load_ema_flag: bool = False,
        init_shift_from_base: bool = False,
        unit_chunk: Count | None = None,
        code_scale: Finite = 1.0,
        **params: Any,
    ) -> None:
        super().__init__(**{**params, "dropout": 0.0})  # no dropout in the frozen half
        config = UNetConfig.from_params(params)
        if config.use_spatial_transformer or config.n_embed is not None:
            raise ConfigError(
                "unet_config.params: expected neither `use_spatial_transformer` nor `n_embed` for the shift U-Net, "
                "whose units condition the residual blocks and whose output is a picture. Remove them."
            )
        self.latent_unit, self.repre_emb_channels = latent_unit, repre_emb_channels
        self.is_separate, self.unit_chunk, self.code_scale = seprate_decoder, unit_chunk, code_scale
        self.requires_grad_(False)
        self.base_names = [name for name, _ in self.named_parameters()]
        self.base_modules = list(self.children())
        self.shift_middle_block = build_middle(config, config.embed_dim)
        self.shift_output_blocks = build_decoder(config, self.skip_channels, config.embed_dim)
        self.shift_out = build_head(config)
        code_width = repre_emb_channels * (1 if seprate_decoder else latent_unit)
        self.repre_embed = nn.Linear(code_width, config.embed_dim)
        self.has_part_emb = seprate_decoder and not wo_part_emb
        self.is_orthogonal = orth_emb
        if self.has_part_emb:  # rows of a rotation of half the embedding's width, or free vectors
            rows, width = (config.embed_dim // 2,) * 2 if orth_emb else (latent_unit, repre_emb_channels)
            if rows < latent_unit:
                raise ConfigError(
                    f"unet_config.params.latent_unit: expected at most 2 * model_channels = {rows} units with "
                    f"`orth_emb`, got {latent_unit}. Use fewer units or a wider network."
                )
            self.part_latents = nn.Embedding(rows, width)
            self.part_emb = nn.Linear(width, config.embed_dim)
        self.init_shift_from_base = init_shift_from_base
        self.register_buffer("scale_factor", None)
        self.register_load_state_dict_pre_hook(_match_scale_factor)
        if ckpt_path is not None:
            self.load_base(ckpt_path, use_ema=load_ema_ckpt != legacy_load_ema_flag)
        self.train()

    @property
    def base_scale(self) -> Tensor | None:
        """Scale of the first stage's latents in the checkpoint of the frozen network, (), or None if unknown."""
        return self.scale_factor

    @torch.no_grad()
    def copy_base_to_shift(self) -> None:
        """Copy the weights of the frozen decoder into the shift decoder, except for the layers of the codes."""
        own = dict(self.named_parameters())
        for base in self.base_names:
            if base.startswith(("middle_block", "output_blocks")):
                own[f"shift_{base}"].copy_(own[base])

    def train(self, mode: bool = True) -> UNetModel:
        """Set the mode of the shift decoder; the frozen network stays in evaluation mode."""
        super().train(mode)
        for module in self.base_modules:
            module.eval()
        return self

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters of the optimizer in the order of DisDiff's checkpoints."""
        modules = [self.shift_out, self.shift_middle_block, self.shift_output_blocks, self.repre_embed]
        modules += [self.part_emb, self.part_latents] if self.has_part_emb else []
        yield from nn.ModuleList(modules).parameters()

    @torch.no_grad()
    def load_base(self, path: str, use_ema: bool) -> None:
        """Load the frozen network, and ``scale_factor`` if present, from a checkpoint of a latent diffusion model.

        With ``use_ema``, load its averaged weights. With ``init_shift_from_base``, also initialize the shift decoder.

        Raises:
            UserError: the file cannot be read, or its weights do not match.
        """
        state = read_state_dict(path, network_keys(self.base_names, use_ema).values())
        weights = network_weights(state, self.base_names, use_ema, path)
        own = dict(self.named_parameters())
        for name, weight in weights.items():
            if weight.shape != own[name].shape:
                raise UserError(
                    f"{path}: expected shape {tuple(own[name].shape)} of {name}, got {tuple(weight.shape)}. Use the "
                    "`unet_config` that the checkpoint was trained with."
                )
            own[name].copy_(weight)
        if "scale_factor" in state:
            self.scale_factor = state["scale_factor"].clone()
        if self.init_shift_from_base:
            self.copy_base_to_shift()

    @torch.no_grad()
    def base_prediction(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """Return the prediction of the frozen network: x (B, C, H, W), timesteps (B,) to (B, C, H, W)."""
        return super().forward(x, timesteps, None, y)

    def part_codes(self) -> Tensor:
        """Return the embeddings of the unit index before ``part_emb``, (U, width)."""
        weight = self.part_latents.weight
        if not self.is_orthogonal:
            return weight
        with torch.autocast(weight.device.type, enabled=False):
            return torch.linalg.matrix_exp(weight.T - weight)[: self.latent_unit]

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor,
        unit_mask: Tensor | None = None,
        sampled_index: Tensor | None = None,
        y: Tensor | None = None,
    ) -> ShiftOutput:
        """Predict.

        Args:
            x: (B, C, H, W) noisy latent.
            timesteps: (B,) steps.
            context: (B, U, D) codes of the units, or (B, U*D).
            unit_mask: (B, U) bool; the gradient of a unit is exactly 0 where it is False. None: all units.
            sampled_index: (B,) int64, the only unit to compute for each sample. None: all units.
            y: class labels or float vectors, with ``num_classes``.

        Returns:
            Prediction and gradients, see :class:`ShiftOutput`.

        Raises:
            ConfigError: the shape of ``context`` does not match the config.
        """
        codes = self._unit_codes(context)
        with torch.no_grad():
            h0, skips, emb = self.encode(x, timesteps, None, y)
            pred = self.decode(h0, skips, emb)
        parts = self.part_emb(self.part_codes()) if self.has_part_emb else None  # (U, E)
        if not self.is_separate:
            if unit_mask is not None:
                codes = torch.where(unit_mask[..., None], codes, 0)
                unit_mask = unit_mask.any(dim=1, keepdim=True)
            codes = codes.flatten(1).unsqueeze(1)  # (B, 1, U*D)
        elif sampled_index is not None:
            rows = torch.arange(len(codes), device=codes.device)
            codes = codes[rows, sampled_index].unsqueeze(1)  # (B, 1, D)
            parts = None if parts is None else parts[sampled_index].unsqueeze(1)  # (B, 1, E)
            unit_mask = None if unit_mask is None else unit_mask[rows, sampled_index].unsqueeze(1)
        unit_emb = emb[:, None] if parts is None else emb[:, None] + parts  # (B, K or 1, E)
        unit_grad = self._gradients(h0, skips, unit_emb.expand(-1, codes.shape[1], -1), codes)
        if unit_mask is not None:
            unit_grad = torch.where(unit_mask[(..., *[None] * (x.ndim - 1))], unit_grad, 0)
        return ShiftOutput(pred, unit_grad)

    def _unit_codes(self, context: Tensor | None) -> Tensor:
        """Check the shape of the context and return it as (B, U, D), times ``code_scale``."""
        units, width = self.latent_unit, self.repre_emb_channels
        if context is None:
            raise ValueError(
                f"shift U-Net: expected a context of shape (B, {units}, {width}), got None. Pass the codes of the "
                "units, or call base_prediction() for the frozen network."
            )
        if context.shape[1:] not in ((units, width), (units * width,)):
            raise ConfigError(
                f"shift U-Net: expected codes of shape (B, {units}, {width}), got {tuple(context.shape)}. Set "
                "unet_config.params.latent_unit and unet_config.params.repre_emb_channels to the number and the width "
                "of the codes that the condition stage returns."
            )
        return context.reshape(-1, units, width) * self.code_scale

    def _gradients(self, h0: Tensor, skips: list[Tensor], emb: Tensor, codes: Tensor) -> Tensor:
        """Return the gradients of K units, in chunks: emb (B, K, E), codes (B, K, D) to (B, K, C, H, W)."""
        chunk = self.unit_chunk or codes.shape[1]
        is_chunked = chunk < codes.shape[1]
        parts = [
            run_checkpointed(self._folded_pass, is_chunked, h0, skips, emb_chunk, code_chunk)
            for emb_chunk, code_chunk in zip(emb.split(chunk, dim=1), codes.split(chunk, dim=1))
        ]
        return torch.cat(parts, dim=1) if is_chunked else parts[0]

    def _folded_pass(self, h0: Tensor, skips: list[Tensor], emb: Tensor, codes: Tensor) -> Tensor:
        """Run the shift decoder once with the units folded into the batch, unit-major."""
        units = codes.shape[1]
        emb = rearrange(emb, "b k e -> (k b) e")
        cond = rearrange(self.repre_embed(codes), "b k e -> (k b) e")
        h = self.shift_middle_block(h0, emb, cond=cond)
        for block, skip in zip(self.shift_output_blocks, reversed(skips)):
            h = block(h, emb, cond=cond, skip=skip)
        return rearrange(self.shift_out(h), "(k b) ... -> b k ...", k=units)


def _match_scale_factor(module: UNetModel, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Accept checkpoints with and without ``scale_factor``: take theirs if present, else keep the module's."""
    key, own = f"{prefix}scale_factor", module.scale_factor
    if key in state_dict and own is None:
        module.scale_factor = torch.zeros_like(state_dict[key])
    elif key not in state_dict and own is not None and f"{prefix}time_embed.0.weight" in state_dict:
        state_dict[key] = own
