"""A frozen U-Net with a second decoder that predicts one gradient per latent unit (Yang et al. 2023, DisDiff).

The second decoder is PDAE's gradient estimator (Zhang et al. 2022), run once per unit on the same encoder features:
``g_k = G(h_0, skips; emb + part_k, W z_k)``. The units are folded into the batch, so one pass computes all of them.

Legend: B batch, U units, K units in one pass, D width of a unit's code, C channels, H W space, E embedding width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ldm.modules.diffusionmodules import openaimodel
from ldm.modules.diffusionmodules.openaimodel import UNetConfig, build_decoder, build_head, build_middle
from ldm.modules.diffusionmodules.util import run_checkpointed
from ldm.modules.weights import network_weights, read_state_dict
from ldm.util import ConfigError, UserError


class ShiftOutput(NamedTuple):
    """What the shift U-Net returns; the coefficient between the two is the diffusion model's affair.

    Attributes:
        pred: (B, C, H, W) prediction of the frozen network; carries no gradient.
        unit_grad: (B, U, C, H, W) gradient of each unit, or (B, 1, C, H, W) of the one asked for.
    """

    pred: Tensor
    unit_grad: Tensor

    @property
    def out_grad(self) -> Tensor:
        """(B, C, H, W): the sum of the units' gradients."""
        return self.unit_grad.sum(dim=1)


class UNetModel(openaimodel.UNetModel):
    """Frozen U-Net plus shift decoder.

    Args:
        latent_unit: number of units U.
        repre_emb_channels: width D of a unit's code.
        seprate_decoder: one gradient per unit (the spelling is the family's); False: one gradient of all units
            together, from the concatenated codes.
        orth_emb: units are told apart by the rows of a learned rotation; False: by learned vectors.
        wo_part_emb: units are not told apart at all, except by their codes.
        ckpt_path: checkpoint of the latent-diffusion model that is frozen; None leaves it at random.
        load_ema_ckpt: take the averaged weights of that checkpoint.
        legacy_load_ema_flag: read ``load_ema_ckpt`` the wrong way round, as the reference code does.
        init_shift_from_base: start the shift decoder from the frozen decoder's weights (its last layer stays zero)
            instead of from scratch, as the papers do; it learns much faster in a few thousand steps.
        unit_chunk: units computed in one pass, None for all; with a chunk the activations are recomputed in the
            backward pass, so the memory is that of one chunk.
        params: keywords of :class:`UNetConfig`.

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
        latent_unit: int = 6,
        repre_emb_channels: int = 32,
        seprate_decoder: bool = False,
        orth_emb: bool = False,
        wo_part_emb: bool = False,
        ckpt_path: str | None = None,
        load_ema_ckpt: bool = False,
        legacy_load_ema_flag: bool = False,
        init_shift_from_base: bool = False,
        unit_chunk: int | None = None,
        **params: Any,
    ) -> None:
        super().__init__(**{**params, "dropout": 0.0})  # dropout belongs to what is trained, not to the frozen half
        config = UNetConfig.from_params(params)
        if config.use_spatial_transformer or config.n_embed is not None:
            raise ConfigError(
                "unet_config.params: the shift U-Net has neither `use_spatial_transformer` nor `n_embed`, because "
                "units enter through the residual blocks and its output is a picture: remove them."
            )
        if unit_chunk is not None and unit_chunk < 1:
            raise ConfigError(f"unet_config.params.unit_chunk is {unit_chunk}; expected at least 1, or null.")
        self.latent_unit = latent_unit
        self.repre_emb_channels = repre_emb_channels
        self.is_separate = seprate_decoder
        self.unit_chunk = unit_chunk
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
        if self.has_part_emb:
            self._build_part_embedding(config.embed_dim)
        self.register_load_state_dict_pre_hook(_match_scale_factor)
        if ckpt_path is not None:
            self.load_base(ckpt_path, use_ema=load_ema_ckpt != legacy_load_ema_flag)
        if init_shift_from_base:
            self._copy_base_to_shift()
        self.train()

    @torch.no_grad()
    def _copy_base_to_shift(self) -> None:
        """Give each shift layer the weights of its twin in the frozen decoder; layers for the code have none."""
        own = dict(self.named_parameters())
        for name, parameter in own.items():
            if name.startswith(("shift_middle_block", "shift_output_blocks")):
                twin = own.get(name.removeprefix("shift_"))
                if twin is not None:
                    parameter.copy_(twin)

    def _build_part_embedding(self, embed_dim: int) -> None:
        """Codes that tell the units apart: rows of a rotation of half the embedding's width, or free vectors."""
        if not self.is_orthogonal:
            self.part_latents = nn.Embedding(self.latent_unit, self.repre_emb_channels)
            self.part_emb = nn.Linear(self.repre_emb_channels, embed_dim)
            return
        width = embed_dim // 2
        if self.latent_unit > width:
            raise ConfigError(
                f"unet_config.params.latent_unit is {self.latent_unit}, but with `orth_emb` there are only "
                f"{width} orthogonal codes (2 * model_channels): use fewer units or a wider network."
            )
        self.part_latents = nn.Embedding(width, width)
        self.part_emb = nn.Linear(width, embed_dim)

    def train(self, mode: bool = True) -> UNetModel:
        """Set the training mode of the shift decoder; the frozen network stays in eval mode."""
        super().train(mode)
        for module in self.base_modules:
            module.eval()
        return self

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """What the optimiser gets, in the order of the family's checkpoints."""
        modules = [self.shift_out, self.shift_middle_block, self.shift_output_blocks, self.repre_embed]
        if self.has_part_emb:
            modules += [self.part_emb, self.part_latents]
        for module in modules:
            yield from module.parameters()

    @torch.no_grad()
    def load_base(self, path: str, use_ema: bool) -> None:
        """Copy the frozen network, and its latents' ``scale_factor`` if it has one, from a checkpoint.

        Raises:
            UserError: the file cannot be read, or its weights do not fit.
        """
        state = read_state_dict(path)
        weights = network_weights(state, self.base_names, use_ema, path)
        own = dict(self.named_parameters())
        for name, weight in weights.items():
            if weight.shape != own[name].shape:
                raise UserError(
                    f"{path}: weight {name} has shape {tuple(weight.shape)}, but `unet_config` asks for "
                    f"{tuple(own[name].shape)}: use the sizes the checkpoint was trained with."
                )
            own[name].copy_(weight)
        if "scale_factor" in state:
            self.register_buffer("scale_factor", state["scale_factor"].clone())

    @torch.no_grad()
    def base_prediction(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """The frozen network alone: x (B, C, H, W), timesteps (B,) -> (B, C, H, W)."""
        return super().forward(x, timesteps, None, y)

    def part_codes(self) -> Tensor:
        """(U, code width) what tells the units apart, before ``part_emb``."""
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
            unit_mask: (B, U) bool; the gradient of a unit that is False is exactly 0. None: all are set.
            sampled_index: (B,) the only unit to compute for each sample. None: all.
            y: (B,) class labels, only with ``num_classes``.

        Returns:
            prediction and gradients, see :class:`ShiftOutput`.

        Raises:
            ConfigError: the width of ``context`` is not what the config says.
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
        """Check the context's width and give it its unit axis: (B, U, D)."""
        units, width = self.latent_unit, self.repre_emb_channels
        if context is None:
            raise ValueError(
                f"the shift U-Net needs a context of shape (B, {units}, {width}), found None: give the codes of the "
                "units, or call base_prediction for the frozen network alone."
            )
        if context.shape[1:] not in ((units, width), (units * width,)):
            raise ConfigError(
                f"the codes of the units have shape {tuple(context.shape)}, expected (B, {units}, {width}): "
                f"unet_config.params.latent_unit is {units} and unet_config.params.repre_emb_channels is {width}; set "
                "them to the number and width of what the encoder of the condition returns."
            )
        return context.reshape(-1, units, width)

    def _gradients(self, h0: Tensor, skips: list[Tensor], emb: Tensor, codes: Tensor) -> Tensor:
        """Gradients of K units, chunk by chunk: emb (B, K, E), codes (B, K, D) -> (B, K, C, H, W)."""
        chunk = self.unit_chunk or codes.shape[1]
        is_chunked = chunk < codes.shape[1]
        parts = [
            run_checkpointed(self._folded_pass, is_chunked, h0, skips, emb_chunk, code_chunk)
            for emb_chunk, code_chunk in zip(emb.split(chunk, dim=1), codes.split(chunk, dim=1))
        ]
        return torch.cat(parts, dim=1) if is_chunked else parts[0]

    def _folded_pass(self, h0: Tensor, skips: list[Tensor], emb: Tensor, codes: Tensor) -> Tensor:
        """One pass of the shift decoder with the units folded into the batch, unit-major."""
        batch, units = codes.shape[:2]
        emb = emb.transpose(0, 1).flatten(0, 1)  # (K*B, E)
        cond = self.repre_embed(codes).transpose(0, 1).flatten(0, 1)  # (K*B, E)
        h = self.shift_middle_block(h0, emb, cond=cond)
        for block, skip in zip(self.shift_output_blocks, reversed(skips)):
            h = block(h, emb, cond=cond, skip=skip)
        return self.shift_out(h).unflatten(0, (units, batch)).transpose(0, 1)


def _match_scale_factor(module: UNetModel, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """The latents' scale comes and goes with the checkpoint of the base: take it if there, keep ours if not."""
    key = f"{prefix}scale_factor"
    own = getattr(module, "scale_factor", None)
    if key in state_dict and own is None:
        module.register_buffer("scale_factor", torch.zeros_like(state_dict[key]))
    elif key not in state_dict and own is not None and f"{prefix}time_embed.0.weight" in state_dict:
        state_dict[key] = own
