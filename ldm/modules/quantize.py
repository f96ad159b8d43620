"""Vector quantization (van den Oord et al. 2017) with optional initialization from data and revival of unused codes.

Legend: B batch, C code width, H W space, N = B*H*W vectors, n_embed codes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.errors import reason_of
from ldm.util import ConfigError, UserError


class VectorQuantizer2(nn.Module):
    """Replacement of each vector by the nearest code, with a straight-through gradient.

    The training loss is mean((sg[z_q] - z)²) + mean((z_q - sg[z])²), with weight ``beta`` on one of the terms.

    Args:
        n_e: number of codes.
        e_dim: width of a code.
        beta: weight of one of the two loss terms, see ``legacy``.
        remap: path of a ``.npy`` file with the indices of used codes; returned indices are positions in it.
        unknown_index: replacement of an index that is not in ``remap``: "random", "extra" (one more index) or an int.
        sane_index_shape: return indices as (B, H, W) instead of flat.
        legacy: apply ``beta`` to the codebook term, as in LDM's checkpoints, instead of the commitment term.
        init_from_data: initialize the codes with vectors of the first training batch, unless loaded from a checkpoint.
        revive_every: interval in training steps at which codes that were not used since the last time are replaced by
            random vectors of the batch; 0 disables it.

    The state of the last two options is kept in persistent buffers, so that training resumes exactly. A checkpoint
    without these buffers can be loaded; its codebook counts as initialized.

    Example:
        >>> quantize = VectorQuantizer2(n_e=16, e_dim=3, beta=0.25)
        >>> z_q, loss, (_, _, indices) = quantize(torch.randn(2, 3, 4, 4))
        >>> z_q.shape, indices.shape
        (torch.Size([2, 3, 4, 4]), torch.Size([32]))
    """

    def __init__(
        self,
        n_e: int,
        e_dim: int,
        beta: float = 0.25,
        remap: str | None = None,
        unknown_index: str | int = "random",
        sane_index_shape: bool = False,
        legacy: bool = True,
        init_from_data: bool = False,
        revive_every: int = 0,
    ) -> None:
        super().__init__()
        self.n_e, self.e_dim, self.beta, self.legacy = n_e, e_dim, beta, legacy
        self.sane_index_shape, self.revive_every = sane_index_shape, revive_every
        self.embedding = nn.Embedding(n_e, e_dim)
        nn.init.uniform_(self.embedding.weight, -1.0 / n_e, 1.0 / n_e)
        self.has_remap = remap is not None
        if remap is not None:
            self.register_buffer("used", torch.as_tensor(_read_used(remap)).long())
            if not (unknown_index in ("random", "extra") or isinstance(unknown_index, int)):
                raise ConfigError(f"unknown_index: expected 'random', 'extra' or an integer, got {unknown_index!r}.")
            self.unknown_index = len(self.used) if unknown_index == "extra" else unknown_index
        self.renews_codes = init_from_data or revive_every > 0
        if self.renews_codes:
            self.register_buffer("is_initialised", torch.tensor(not init_from_data))
            self.register_buffer("num_training_steps", torch.tensor(0))
            self.register_buffer("use_counts", torch.zeros(n_e, dtype=torch.long))
        self.register_load_state_dict_pre_hook(_match_buffers)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, tuple[None, None, Tensor]]:
        """Quantize.

        Args:
            z: (B, C, H, W).

        Returns:
            z_q: (B, C, H, W) codes; their gradient is passed to ``z``.
            loss: scalar.
            (None, None, indices): indices (B*H*W,), or (B, H, W) with ``sane_index_shape``.

        Raises:
            ConfigError: the number of channels is not the width of a code.
        """
        if z.shape[1] != self.e_dim:
            raise ConfigError(
                f"quantizer: expected a latent of {self.e_dim} channels, got {z.shape[1]}. Set `embed_dim` to the "
                "number of output channels of `quant_conv`."
            )
        z = rearrange(z, "b c h w -> b h w c").float()
        vectors = z.reshape(-1, self.e_dim)  # (N, C)
        if self.training and self.renews_codes:
            self._renew_codes(vectors.detach())
        indices = self.nearest(vectors)  # (N,)
        if self.training and self.renews_codes:
            # bincount would synchronize
            used = torch.zeros_like(self.use_counts).index_add_(0, indices, torch.ones_like(indices))
            if dist.is_available() and dist.is_initialized():  # DDP keeps the buffers of rank zero only
                dist.all_reduce(used)
            self.use_counts += used
        codes = self.embedding(indices).view(z.shape)
        commitment = F.mse_loss(z, codes.detach())
        codebook = F.mse_loss(codes, z.detach())
        loss = commitment + self.beta * codebook if self.legacy else self.beta * commitment + codebook
        z_q = z + (codes - z).detach()  # straight through
        if self.has_remap:
            indices = self._to_used(indices)
        if self.sane_index_shape:
            indices = indices.view(z.shape[:-1])
        return rearrange(z_q, "b h w c -> b c h w").contiguous(), loss, (None, None, indices)

    @torch.no_grad()
    def nearest(self, vectors: Tensor) -> Tensor:
        """Return the indices of the nearest codes, (N,), of vectors (N, C)."""
        codes = self.embedding.weight
        with torch.autocast(vectors.device.type, enabled=False):  # half precision confuses near codes
            distances = vectors.square().sum(dim=1, keepdim=True) + codes.square().sum(dim=1) - 2 * vectors @ codes.T
        return distances.argmin(dim=1)

    def get_codebook_entry(self, indices: Tensor, shape: tuple[int, int, int, int] | None = None) -> Tensor:
        """Return the codes of ``indices``, as (B, C, H, W) if ``shape`` (B, H, W, C) is given."""
        if self.has_remap:
            indices = self.used[torch.where(indices >= len(self.used), 0, indices)]  # the extra index: the first code
        return _as_map(self.embedding(indices), shape)

    def _to_used(self, indices: Tensor) -> Tensor:
        """Map codebook indices (N,) to positions in ``used``."""
        match = indices[:, None] == self.used
        position = match.long().argmax(-1)
        if self.unknown_index == "random":
            unknown = torch.randint_like(position, len(self.used))
        else:
            unknown = torch.full_like(position, int(self.unknown_index))
        return torch.where(match.any(-1), position, unknown)

    @torch.no_grad()
    def _renew_codes(self, vectors: Tensor) -> None:
        """Initialize the codes in the first step and replace unused ones at each revival, without synchronization."""
        is_due = torch.zeros_like(self.is_initialised)
        if self.revive_every:
            is_due = (self.num_training_steps > 0) & (self.num_training_steps % self.revive_every == 0)
        candidates = vectors[self._spread_indices(vectors)]  # (n_embed, C)
        if dist.is_available() and dist.is_initialized():  # keep the codebook equal in all processes
            dist.broadcast(candidates, src=0)
        is_replaced = ~self.is_initialised | (is_due & (self.use_counts == 0))  # (n_embed,)
        self.embedding.weight.copy_(torch.where(is_replaced[:, None], candidates, self.embedding.weight))
        self.use_counts.mul_(~is_due)
        self.num_training_steps += 1
        self.is_initialised.fill_(True)

    def _spread_indices(self, vectors: Tensor) -> Tensor:
        """Return random row indices of ``vectors``, (n_embed,); distinct if there are enough rows."""
        rows = vectors.shape[0]
        order = torch.arange(self.n_e, device=vectors.device, dtype=torch.float64)
        shift = torch.randint(self.n_e, (), device=vectors.device)
        within = torch.rand(self.n_e, device=vectors.device)
        strata = (order + shift) % self.n_e + within  # one draw from each of n_embed equal parts of the batch
        return (strata * (rows / self.n_e)).long().clamp(max=rows - 1)


class GumbelQuantize(nn.Module):
    """Replacement of each vector by a random code, differentiable by the Gumbel-softmax trick (Jang et al. 2017).

    The names of the weights are those of taming-transformers. Codes are drawn in evaluation, too.

    Args:
        num_hiddens, embedding_dim, n_embed: channels of the input, width and number of the codes.
        straight_through: in training, return the drawn code instead of a mixture of codes; always in evaluation.
        kl_weight: weight of the divergence of the codes' probabilities from a uniform distribution.
        temp_init: initial ``temperature`` of the softmax.
    """

    def __init__(
        self,
        num_hiddens: int,
        embedding_dim: int,
        n_embed: int,
        straight_through: bool = True,
        kl_weight: float = 5e-4,
        temp_init: float = 1.0,
    ) -> None:
        super().__init__()
        self.n_embed, self.straight_through, self.kl_weight = n_embed, straight_through, kl_weight
        self.temperature = temp_init
        self.proj = nn.Conv2d(num_hiddens, n_embed, 1)
        self.embed = nn.Embedding(n_embed, embedding_dim)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, tuple[None, None, Tensor]]:
        """Map ``z`` (B, num_hiddens, H, W) to codes (B, embedding_dim, H, W), loss () and indices (B, H, W)."""
        logits, is_hard = self.proj(z).float(), self.straight_through or not self.training
        choice = F.gumbel_softmax(logits, tau=self.temperature, hard=is_hard, dim=1)  # (B, n_embed, H, W)
        z_q = torch.einsum("bnhw,nd->bdhw", choice, self.embed.weight)
        q = logits.softmax(dim=1)
        loss = self.kl_weight * (q * torch.log(q * self.n_embed + 1e-10)).sum(dim=1).mean()
        return z_q, loss, (None, None, choice.argmax(dim=1))

    def get_codebook_entry(self, indices: Tensor, shape: tuple[int, int, int, int] | None = None) -> Tensor:
        """See ``VectorQuantizer2``."""
        return _as_map(self.embed(indices), shape)


def _read_used(path: str) -> np.ndarray:
    """Return the indices of used codes, (K,) integers, of an .npy file.

    Raises:
        UserError: the file cannot be read, or contains other values.
    """
    try:
        used = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"remap: {path} cannot be read ({reason_of(error)}). Name an .npy file of indices") from error
    if not isinstance(used, np.ndarray) or used.ndim != 1 or used.dtype.kind not in "iuf":
        found = f"{used.dtype} {used.shape}" if isinstance(used, np.ndarray) else "an .npz archive"
        raise UserError(f"remap: expected an .npy file of indices (K,) of codes, got {found} in {path}. Correct it")
    return used


def _as_map(codes: Tensor, shape: tuple[int, int, int, int] | None) -> Tensor:
    """Return codes as (B, C, H, W) if their ``shape`` (B, H, W, C) is given, else as they are."""
    return codes if shape is None else rearrange(codes.view(shape), "b h w c -> b c h w").contiguous()


def _match_buffers(module: VectorQuantizer2, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Accept checkpoints with and without counters.

    A codebook without renewal drops the counters of a checkpoint; one with renewal starts with empty counters, as
    initialized, if the checkpoint has none.
    """
    counters = {
        "is_initialised": torch.tensor(True),
        "num_training_steps": torch.tensor(0),
        "use_counts": torch.zeros(module.n_e, dtype=torch.long),
    }
    for name, start in counters.items():
        if not module.renews_codes:
            state_dict.pop(f"{prefix}{name}", None)
        elif f"{prefix}embedding.weight" in state_dict:
            state_dict.setdefault(f"{prefix}{name}", start)
