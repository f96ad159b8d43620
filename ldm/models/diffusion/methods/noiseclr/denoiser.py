"""Frozen denoisers along whose directions images are edited: one interface for models of this package and of others.

Legend: B batch, M rows, D width of a row, C h w the latent, H W the image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from ldm.data.options import require_choice
from ldm.diffusion.conditions import Condition, TensorCondition, as_condition
from ldm.diffusion.schedule import NoiseSchedule
from ldm.models.contracts import ConditionStage, Samplable, require
from ldm.models.diffusion.latent import LatentDiffusion
from ldm.modules.encoders.splice import TokenSplice
from ldm.modules.weights import NeedsWeights, weights_fingerprint
from ldm.runs.load import load_run
from ldm.util import ConfigError, UserError

ROW_SPACES = ("auto", "token", "condition")


class FrozenDenoiser(NeedsWeights):
    """A frozen diffusion model with a condition; base class of the adapters.

    A row is the learned part of a direction: the embedding of one token of a text encoder (``row_space`` token), or the
    condition itself, a vector or one token of the cross-attention (``row_space`` condition).

    Attributes:
        latent_shape: (C, h, w).
        row_space: token or condition.
        row_width: D.
        bottleneck: module of the network whose output is the coarsest feature map, (B, c, h', w') or (B, c).
        empty: no condition of one sample, (1, ...).
    """

    latent_shape: tuple[int, int, int]
    row_space: str
    row_width: int
    bottleneck: nn.Module
    empty: Tensor
    _splice: TokenSplice | None = None  # for rows of tokens

    @property
    def schedule(self) -> NoiseSchedule:
        """Constants of the noise schedule on the device of the network."""
        raise NotImplementedError

    def initial_rows(self, count: int, words: Sequence[str] = ()) -> Tensor:
        """Return rows (count, D).

        Rows of tokens are those of words in turn, or random with the statistics of the token embeddings. Rows that are
        conditions are standard normal.
        """
        if self._splice is not None:
            return self._splice.initial_rows(count, words)
        if words:
            raise ConfigError("initializer_tokens: expected none with row_space condition. Remove the key")
        return torch.randn(count, self.row_width)

    def require_new_tokens(self, names: Sequence[str]) -> None:
        """Raise a ``UserError`` if tokens of these names, which are to be learned, exist already."""

    def conditions(self, rows: Tensor) -> TensorCondition:
        """Return the conditions of rows (M, D); gradients pass."""
        if self._splice is not None:
            value = self._splice.encode_rows(rows)
        elif self.empty.ndim == 2:
            value = rows
        else:  # the second token, after a start token, in a sequence of tokens
            position = min(1, self.empty.shape[1] - 1)
            empty = self.empty.expand(len(rows), -1, -1)
            value = torch.cat([empty[:, :position], rows[:, None], empty[:, position + 1 :]], dim=1)
        return TensorCondition(value, lambda: self.empty)

    def null(self, count: int) -> TensorCondition:
        """Return no condition for ``count`` samples."""
        return TensorCondition(self.empty.expand(count, *self.empty.shape[1:]), lambda: self.empty)

    def condition_from_texts(self, texts: Sequence[str]) -> Condition:
        """Return the condition of B texts; raise a ``UserError`` if the model takes none."""
        raise NotImplementedError

    def predict_eps(self, x: Tensor, t: Tensor, cond: Condition, shift: Tensor | None = None) -> Tensor:
        """Return the predicted noise (B, C, h, w) in x (B, C, h, w) at t (B,); ``shift`` is added to the bottleneck."""
        if shift is None:
            return self._predict_eps(x, t, cond)
        return self._hooked(lambda _, inputs, output: output + shift.to(output).reshape(output.shape), x, t, cond)

    def _hooked(self, hook: Callable[..., Any], x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        handle = self.bottleneck.register_forward_hook(hook)
        try:
            return self._predict_eps(x, t, cond)
        finally:
            handle.remove()

    def _predict_eps(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        raise NotImplementedError

    @torch.no_grad()
    def bottleneck_features(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """Return the output of the bottleneck, (B, c, h', w') or (B, c)."""
        found: list[Tensor] = []
        self._hooked(lambda _, inputs, output: found.append(output), x, t, cond)
        return found[0]

    def encode(self, images: Tensor, sample: bool = False) -> Tensor:
        """Return scaled latents (B, C, h, w) of images (B, 3, H, W) in [-1, 1]; drawn, or the mean of the posterior."""
        raise NotImplementedError

    def decode(self, z: Tensor) -> Tensor:
        """Return images (B, 3, H, W) in about [-1, 1] of scaled latents."""
        raise NotImplementedError

    def network(self) -> nn.Module:
        """Return the denoising network."""
        raise NotImplementedError

    def networks_to_compile(self) -> list[nn.Module]:
        """See ``ldm.training.compiling.Compilable``."""
        return [self.network()]

    def fingerprint(self) -> str:
        """Return a hash of some values of all weights of the network; equal for equal weights in every precision."""
        return weights_fingerprint(self.network())

    def state_dict(self, *args: Any, destination: dict | None = None, **kwargs: Any) -> dict[str, Any]:
        """Return no entries: checkpoints contain directions alone, and the denoiser has files of its own."""
        return {} if destination is None else destination


class ModelDenoiser(FrozenDenoiser):
    """A diffusion model of this package: of texts, of a vector such as an image embedding, or of tokens.

    Args:
        model: the model, with averaged weights if it has some; these replace its weights.
        row_space: ``token`` learns the embedding of one token of the text encoder; ``condition`` learns the vector, or
            one token of the cross-attention; ``auto`` is ``token`` for models of texts.
        use_checkpoint: recompute activations of the network in the backward pass; needs less memory.

    Raises:
        ConfigError: ``row_space`` is unknown.
        UserError: the model has no condition of one tensor per sample.
    """

    def __init__(self, model: LatentDiffusion, row_space: str = "auto", use_checkpoint: bool = False) -> None:
        super().__init__()
        require_choice("row_space", row_space, ROW_SPACES)
        require(model, Samplable, "directions")
        self.model = use_average(model).eval().requires_grad_(False)
        wrapper, self.latent_shape = model.model, model.latent_shape
        stage = model.cond_stage_model
        takes_texts = isinstance(stage, ConditionStage) and stage.takes_texts
        if wrapper.concatenates or not (wrapper.attends or wrapper.conditioning_key == "adm"):
            raise UserError(
                f"directions: expected a model with one condition by cross-attention or by a vector, got "
                f"{type(model).__name__} with conditioning_key {wrapper.conditioning_key!r}. Choose another model"
            )
        self.row_space = row_space if row_space != "auto" else "token" if takes_texts else "condition"
        self._splice = TokenSplice(stage, self._encode_texts) if self.row_space == "token" else None
        empty = self._encode_texts([""]).detach() if takes_texts else self._zero_condition()
        self.register_buffer("empty", empty, persistent=False)
        self.row_width = empty.shape[-1] if self._splice is None else self._splice.width
        self.bottleneck = bottleneck_of(wrapper.diffusion_model)
        for module in wrapper.modules() if use_checkpoint else ():
            if "use_checkpoint" in vars(module):
                module.use_checkpoint = True

    def _encode_texts(self, texts: Sequence[str]) -> Tensor:
        encoded = as_condition(self.model.cond_stage_model.encode_texts(texts))
        if not isinstance(encoded, TensorCondition):
            raise UserError(
                f"directions: expected a text encoder with one tensor per text, got {type(encoded).__name__}"
            )
        return encoded.value

    def _zero_condition(self) -> Tensor:
        wrapper = self.model.model
        is_vector = wrapper.conditioning_key == "adm"
        width = wrapper.cond_width if is_vector else wrapper.diffusion_model.config.context_dim
        if width is None:
            raise UserError(
                "directions: expected a network with a condition by float vectors or tokens, got class labels. Choose "
                "a model of texts, of embeddings or of tokens"
            )
        return torch.zeros((1, width) if is_vector else (1, 1, width))

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move the denoiser; the model notes its device."""
        self.model.to(*args, **kwargs)
        return super().to(*args, **kwargs)

    @property
    def schedule(self) -> NoiseSchedule:
        return self.model.schedule

    def condition_from_texts(self, texts: Sequence[str]) -> Condition:
        return self.model.condition_from_texts(texts)

    def _predict_eps(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        model = self.model
        return model.parameterization.to_eps(model.schedule, x, t, model.apply_model(x, t, cond))

    @torch.no_grad()
    def encode(self, images: Tensor, sample: bool = False) -> Tensor:
        model = self.model
        encoded = model.first_stage_model.encode(images)
        if not isinstance(encoded, Tensor):
            encoded = encoded.sample() if sample else encoded.mode()
        return model.scale_factor * encoded

    def decode(self, z: Tensor) -> Tensor:
        return self.model.decode_first_stage(z)

    def network(self) -> nn.Module:
        return self.model.model.diffusion_model


class RunDenoiser(ModelDenoiser):
    """A trained model: a run folder, a model-zoo folder, or a checkpoint with its config.

    Args:
        run: see ``ldm.runs.load.load_run``.
        base: configs of a checkpoint that has none beside it.
        row_space, use_checkpoint: see ``ModelDenoiser``.

    Raises:
        UserError: there is no such run, or its model has no condition of one tensor per sample.
    """

    def __init__(
        self,
        run: str,
        base: Sequence[str] = (),
        row_space: Literal["auto", "token", "condition"] = "auto",
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__(load_run(run, base).model, row_space, use_checkpoint)


def use_average(model: LatentDiffusion) -> LatentDiffusion:
    """Return a model whose averaged weights, if any, have replaced its weights, without the average."""
    if model.use_ema:
        with model.ema_scope():
            averaged = {name: value.clone() for name, value in model.model.state_dict().items()}
        model.model.load_state_dict(averaged)
        del model.model_ema
        model.use_ema = False
    return model


def bottleneck_of(network: nn.Module) -> nn.Module:
    """Return the module of a U-Net whose output is the coarsest feature map.

    Raises:
        UserError: the network has none under a known name.
    """
    parts = dict(network.named_children())
    for name in ("middle_block", "mid_block", "dense_emb"):  # of this package, of diffusers, of the CLIP-guided U-Net
        if name in parts:
            return parts[name]
    raise UserError(
        f"directions: expected a U-Net with a bottleneck (middle_block), got {type(network).__name__}. Choose a model "
        "with ldm.modules.diffusionmodules.openaimodel.UNetModel"
    )
