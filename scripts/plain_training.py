"""Training steps in the plain way: what the definitions of the networks say, one operation after the other.

``bench_training.py`` compares ``ldm`` with them. :func:`make_plain` takes a model and replaces the computations of its
layers by the functions of this module, which read the same weights; configuration and losses are shared. The plain way
is that of the reference codes:

* float32 in contiguous memory, group normalization and activation one after the other;
* attention by two ``einsum`` and a softmax, recomputed in the backward pass (the references checkpoint every attention,
  and residual blocks with ``use_checkpoint`` only, which none of their configs sets);
* one pass of the shift decoder per latent unit, and one of the decoder and of CLIP per edit, in Python loops;
* one network per token of EncDiff; texts are embedded in each step;
* loops over the tensors in AdamW, in the clipping of gradients and in the moving average of the weights;
* a forward pass of the autoencoder for each of its two optimizers.

Legend: B batch, U units, C channels, H W space, L positions, S tokens, E width of the timestep embedding.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.losses.disentangling import disentangling_loss
from ldm.models.diffusion.methods.clip_disdiff.model import CLIPDisDiff
from ldm.modules import attention
from ldm.modules.diffusionmodules import blocks, model, openaimodel, openaimodel_enc, openaimodel_shift
from ldm.modules.ema import LitEma
from ldm.modules.encoders.clip_embedders import FrozenCLIPTextEmbedder


def normalize(norm: nn.Module, x: Tensor) -> Tensor:
    """Return the group normalization of ``x`` (B, C, ...)."""
    return F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)


def attention_weights(q: Tensor, k: Tensor) -> Tensor:
    """Return the softmax of the scaled products of q (N, L, D) and k (N, S, D), (N, L, S)."""
    return torch.softmax(torch.einsum("nld,nsd->nls", q, k) / math.sqrt(q.shape[-1]), dim=-1)


def recompute(function: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
    """Call a function whose activations are recomputed in the backward pass."""
    return checkpoint(function, *inputs, use_reentrant=False) if torch.is_grad_enabled() else function(*inputs)


# Diffusion U-Nets --------------------------------------------------------------------------------------------------


def res_block(self: blocks.ResBlock, x: Tensor, emb: Tensor, cond: Tensor | None = None) -> Tensor:
    """Return a residual block with scales and shifts of the timestep, then of the condition (PDAE, Eq. 13)."""

    def apply(x: Tensor, emb: Tensor, cond: Tensor | None) -> Tensor:
        norm, _, conv = self.in_layers
        h = conv(self.resample(F.silu(normalize(norm, x))))
        shifts = [self.emb_layers[1](F.silu(emb))]
        if self.cond_emb_layers is not None:
            shifts.append(self.cond_emb_layers[1](F.silu(cond)))
        norm, _, dropout, conv = self.out_layers
        if self.use_scale_shift_norm:
            h = normalize(norm, h)
            for scale, shift in (each[:, :, None, None].chunk(2, dim=1) for each in shifts):
                h = h * (1 + scale) + shift
        else:
            for shift in shifts:
                h = h + shift[:, :, None, None]
            h = normalize(norm, h)
        return self.skip_connection(self.resample(x)) + conv(dropout(F.silu(h)))

    return recompute(apply, x, emb, cond) if self.use_checkpoint else apply(x, emb, cond)


def attention_block(self: blocks.AttentionBlock, x: Tensor) -> Tensor:
    """Return self-attention over the positions; the channels of the projection are (heads, [q, k, v], width)."""

    def apply(x: Tensor) -> Tensor:
        flat = x.reshape(*x.shape[:2], -1)  # (B, C, L)
        qkv = self.qkv(normalize(self.norm, flat))
        qkv = qkv.reshape(len(x) * self.num_heads, -1, qkv.shape[-1])  # (B heads, 3 D, L)
        q, k, v = qkv.chunk(3, dim=1)
        h = torch.einsum("nls,nds->ndl", attention_weights(q.mT, k.mT), v)
        return (flat + self.proj_out(h.reshape(flat.shape))).reshape(x.shape)

    return recompute(apply, x)


def cross_attention(self: attention.CrossAttention, x: Tensor, context: Tensor | None = None) -> Tensor:
    """Return the attention of x (B, L, C) to a context (B, S, D), or to x."""
    source = x if context is None else context

    def heads(tensor: Tensor) -> Tensor:
        parts = tensor.reshape(*tensor.shape[:2], self.heads, -1).transpose(1, 2)
        return parts.reshape(-1, *parts.shape[2:])  # (B heads, L, D)

    q, k, v = heads(self.to_q(x)), heads(self.to_k(source)), heads(self.to_v(source))
    h = torch.einsum("nls,nsd->nld", attention_weights(q, k), v)
    h = h.reshape(len(x), self.heads, *h.shape[1:]).transpose(1, 2)
    return self.to_out(h.reshape(*h.shape[:2], -1))


def transformer_block(self: attention.BasicTransformerBlock, x: Tensor, context: Tensor | None) -> Tensor:
    """Return self-attention, cross-attention and feed-forward, each with a residual connection."""

    def apply(x: Tensor, context: Tensor | None) -> Tensor:
        if self.use_self_attention:
            x = x + self.attn1(self.norm1(x), context if self.disable_self_attn else None)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))

    return recompute(apply, x, context)


def spatial_transformer(self: attention.SpatialTransformer, x: Tensor, context: Tensor | None = None) -> Tensor:
    """Return transformer blocks over the positions of a feature map (B, C, H, W)."""
    h = self.proj_in(normalize(self.norm, x))
    shape = h.shape
    h = h.reshape(*shape[:2], -1).permute(0, 2, 1).contiguous()
    for block in self.transformer_blocks:
        h = block(h, context)
    return x + self.proj_out(h.permute(0, 2, 1).reshape(shape).contiguous())


def stage(
    self: blocks.UNetStage,
    x: Tensor,
    emb: Tensor,
    context: Tensor | None = None,
    cond: Tensor | None = None,
    skip: Tensor | None = None,
) -> Tensor:
    """Return the layers of a stage in sequence, after the skipped channels were appended."""
    x = x if skip is None else torch.cat([x, skip], dim=1)
    for layer in self:
        if isinstance(layer, blocks.ResBlock):
            x = layer(x, emb, cond)
        elif isinstance(layer, attention.SpatialTransformer):
            x = layer(x, context)
        else:
            x = layer(x)
    return x


def embedding(self: openaimodel.UNetModel, timesteps: Tensor, y: Tensor | None) -> Tensor:
    """Return the embedding (B, E) of time steps (B,) and of a vector or class."""
    half = self.config.model_channels // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=timesteps.device, dtype=torch.float32) / half)
    angles = timesteps[:, None].float() * frequencies
    emb = self.time_embed(torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1))
    return emb if y is None else emb + self.label_emb(y)


def encoder(self: openaimodel.UNetModel, x: Tensor, emb: Tensor, context: Tensor | None) -> list[Tensor]:
    """Return the outputs of the stages of the encoder."""
    outputs = []
    for block in self.input_blocks:
        x = block(x, emb, context)
        outputs.append(x)
    return outputs


def head(out: nn.Sequential, h: Tensor) -> Tensor:
    """Return normalization, activation and the last convolution."""
    return out[2](F.silu(normalize(out[0], h)))


def unet(
    self: openaimodel.UNetModel, x: Tensor, timesteps: Tensor, context: Tensor | None = None, y: Tensor | None = None
) -> Tensor:
    """Return the prediction (B, C, H, W) of a U-Net."""
    if context is not None:
        context = context.reshape(len(x), -1, self.config.context_dim)
    emb = embedding(self, timesteps, y)
    outputs = encoder(self, x, emb, context)
    h = self.middle_block(outputs[-1], emb, context)
    for block in self.output_blocks:
        h = block(h, emb, context, skip=outputs.pop())
    return head(self.out, h)


def shift_unet(
    self: openaimodel_shift.UNetModel,
    x: Tensor,
    timesteps: Tensor,
    context: Tensor,
    unit_mask: Tensor | None = None,
    **unused: None,
) -> openaimodel_shift.ShiftOutput:
    """Return the frozen prediction and one gradient per unit, each by a pass of the shift decoder.

    ``unused`` are inputs that are None in training: the index of a single unit, and class labels.
    """
    codes = context.reshape(len(x), self.latent_unit, -1) * self.code_scale
    with torch.no_grad():
        emb = embedding(self, timesteps, None)
        outputs = encoder(self, x, emb, None)
        h = self.middle_block(outputs[-1], emb)
        for block, skip in zip(self.output_blocks, reversed(outputs)):
            h = block(h, emb, skip=skip)
        pred = head(self.out, h)
    if not self.is_separate:
        raise ValueError("plain shift U-Net: expected one gradient per unit (seprate_decoder: true)")
    weight = self.part_latents.weight
    rows = torch.linalg.matrix_exp(weight.T - weight) if self.is_orthogonal else weight
    gradients = []
    for unit in range(self.latent_unit):
        cond = self.repre_embed(codes[:, unit])
        unit_emb = emb + self.part_emb(rows[unit].expand(len(x), -1))
        h = self.shift_middle_block(outputs[-1], unit_emb, cond=cond)
        for block, skip in zip(self.shift_output_blocks, reversed(outputs)):
            h = block(h, unit_emb, cond=cond, skip=skip)
        gradient = head(self.shift_out, h)
        if unit_mask is not None:
            gradient = torch.where(unit_mask[:, unit, None, None, None], gradient, 0)
        gradients.append(gradient)
    return openaimodel_shift.ShiftOutput(pred, torch.stack(gradients, dim=1))


def unit_tokens(self: openaimodel_enc.UnitTokens, scalars: Tensor) -> Tensor:
    """Return tokens (B, U, D) of scalars (B, U), by one network per unit."""
    tokens = []
    for unit in range(self.num_units):
        h = scalars[:, unit, None]
        for layer in range(self.num_layers):
            weight, bias = self.get_parameter(f"weight_{layer}")[unit], self.get_parameter(f"bias_{layer}")[unit]
            h = F.linear(F.elu(h) if layer else h, weight, bias)
        tokens.append(h)
    return torch.stack(tokens, dim=1)


# Autoencoders ------------------------------------------------------------------------------------------------------


def swish(x: Tensor) -> Tensor:
    """Return ``x * sigmoid(x)`` in two operations, as in LDM's autoencoders."""
    return x * torch.sigmoid(x)


def resnet_block(self: model.ResnetBlock, x: Tensor) -> Tensor:
    """Return a residual block of two convolutions."""
    h = self.conv1(swish(normalize(self.norm1, x)))
    h = self.conv2(self.dropout(swish(normalize(self.norm2, h))))
    return self.nin_shortcut(x) + h


def attn_block(self: model.AttnBlock, x: Tensor) -> Tensor:
    """Return single-head attention over the positions of (B, C, H, W)."""
    h = normalize(self.norm, x)
    q, k, v = (layer(h).flatten(2) for layer in (self.q, self.k, self.v))  # (B, C, L)
    h = torch.einsum("nls,ncs->ncl", attention_weights(q.mT, k.mT), v)
    return x + self.proj_out(h.reshape(x.shape))


def image_encoder(self: model.Encoder, x: Tensor) -> Tensor:
    """Return the latents, or their moments, of images."""
    h = self.conv_in(F.pixel_unshuffle(x, self.shape.patch_size))
    for level in self.down:
        h = level(h)
    return self.conv_out(swish(normalize(self.norm_out, self.mid(h))))


def image_decoder(self: model.Decoder, z: Tensor) -> Tensor:
    """Return the images of latents."""
    h = self.mid(self.conv_in(z))
    for level in reversed(self.up):
        h = level(h)
    return F.pixel_shuffle(self.conv_out(swish(normalize(self.norm_out, h))), self.shape.patch_size)


# Losses, averages, models ------------------------------------------------------------------------------------------


def clip_dis_loss(
    self: CLIPDisDiff,
    x_t: Tensor,
    t: Tensor,
    out: openaimodel_shift.ShiftOutput,
    cond: object,
    unit: Tensor | None = None,
) -> Tensor:
    """Return the disentangling loss of CLIP-DisDiff, which decodes and embeds the edit of one unit after the other."""
    count = self.dis_batch_size
    x_t, t, cond = x_t[:count], t[:count], cond.first(count)
    pred, unit_grad = out.pred[:count], out.unit_grad[:count]
    if unit is None:  # drawn as by the model, for equal losses
        weight = cond.mask.float() + 1e-6
        unit = (weight / torch.empty_like(weight).exponential_()).argmax(dim=1)
    rows = torch.arange(len(x_t), device=x_t.device)
    edits = [unit_grad[rows, unit]] if self.dis_mode == "sampled" else unit_grad.unbind(dim=1)
    see = self.cond_stage_model["image_encoder"]
    with torch.no_grad():
        z_before, image_before = self.decode_prediction(x_t, t, pred)
        seen_before = see(image_before)
    latents, images, seen = [], [], []
    for edit in edits:
        z, image = self.decode_prediction(x_t, t, pred + self.gradient_scale(t, pred) * edit)
        latents.append(z)
        images.append(image)
        seen.append(see(image))
    chosen = -1 if len(edits) == 1 or self.dis_mode == "reference" else unit
    variant, invariant = self._logits(seen_before, torch.stack(seen, dim=1), cond.codes.detach())
    z_change, image_change = (
        z_before - torch.stack(latents)[chosen, rows],
        image_before - torch.stack(images)[chosen, rows],
    )
    return disentangling_loss(variant, invariant, unit, self.change_weight(z_change, image_change))


@torch.no_grad()
def update_average(self: LitEma, network: nn.Module) -> None:
    """Move the averages towards the weights, one after the other."""
    self.num_updates += 1
    decay = min(float(self.decay), (1 + int(self.num_updates)) / (10 + int(self.num_updates)))
    averages = dict(self.named_buffers())
    for name, owner, key in self._owners(network):
        if name in averages:
            averages[name].sub_((1 - decay) * (averages[name] - owner[key]))


FORWARDS: dict[type[nn.Module], Callable[..., object]] = {
    blocks.ResBlock: res_block,
    blocks.AttentionBlock: attention_block,
    blocks.UNetStage: stage,
    attention.CrossAttention: cross_attention,
    attention.BasicTransformerBlock: transformer_block,
    attention.SpatialTransformer: spatial_transformer,
    openaimodel.UNetModel: unet,
    openaimodel_enc.UNetModel: unet,
    openaimodel_enc.UnitTokens: unit_tokens,
    openaimodel_shift.UNetModel: shift_unet,
    model.ResnetBlock: resnet_block,
    model.AttnBlock: attn_block,
    model.Encoder: image_encoder,
    model.Decoder: image_decoder,
    LitEma: update_average,
}


def make_plain(network: nn.Module) -> nn.Module:
    """Replace the computations of a model by those of this module, in place; its weights stay as they are."""
    for module in network.modules():
        if type(module) in FORWARDS:
            module.forward = types.MethodType(FORWARDS[type(module)], module)
        if isinstance(module, FrozenCLIPTextEmbedder):
            module.caches_texts = False
    if isinstance(network, CLIPDisDiff):
        network.dis_loss = types.MethodType(clip_dis_loss, network)
    return network


def plain_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return an Adam or AdamW of the same parameters and settings that updates one tensor after the other."""
    groups = [{**group, "fused": None, "foreach": False} for group in optimizer.param_groups]
    return type(optimizer)(groups)
