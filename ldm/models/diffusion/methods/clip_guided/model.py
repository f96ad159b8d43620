"""CLIP-guided DDPM: trained on images and their CLIP embeddings, without a text, and sampled from texts.

CLIP maps an image and its description to similar vectors. The network is conditioned on the vector of the image in
training, and on that of a text in sampling.

Dimensions: B batch, D width of CLIP's joint space, C H W what is denoised.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ldm.data.collate import collate
from ldm.data.formats.clip_embeddings import table_of
from ldm.data.module import DataModuleFromConfig
from ldm.data.traits import vocabulary_of
from ldm.diffusion.conditions import TensorCondition
from ldm.diffusion.noise import kept_random_state
from ldm.diffusion.samplers import Sampler, SamplerStep
from ldm.models.contexts import averaged
from ldm.models.diffusion.latent import LatentDiffusion
from ldm.models.diffusion.methods.clip_guided.options import GapOptions, require_width
from ldm.models.diffusion.methods.clip_guided.stage import CLIPStage
from ldm.models.inputs import batch_value, images_from_batch
from ldm.modules.weights import NETWORK_PREFIX, network_keys
from ldm.ranges import ConditioningKey, Weight
from ldm.util import ConfigError, UserError

PIXELS = {"target": "ldm.models.autoencoder.IdentityFirstStage"}
STRENGTHS = (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0)  # guidance strengths w of sample_w
_BATCH = 64  # images embedded at once
_NUM_TEXTS = 1024  # composed captions


class CLIPGuidedDDPM(LatentDiffusion):
    """A diffusion model of pixels, or of latents, conditioned on one CLIP embedding per image."""

    def __init__(
        self,
        cond_stage_config: Mapping[str, Any] | None = None,
        first_stage_config: Mapping[str, Any] = PIXELS,
        cond_stage_key: str = "clip_embedding",
        conditioning_key: ConditioningKey = "adm",
        normalize_clip: bool = False,
        gap: str | Mapping[str, Any] | None = None,
        phrase_separator: str | None = None,
        weight_decay: Weight = 0.0,
        **kwargs: Any,
    ) -> None:
        """Build the model.

        Args:
            cond_stage_config: ``{text_encoder: {target, params}, image_encoder: {target, params}}``, each optional.
            first_stage_config: ``{target, params}`` of the autoencoder; by default there is none.
            cond_stage_key: entry of the batch with embeddings (B, D); without it, images are embedded.
            conditioning_key: see ``DiffusionWrapper``; ``adm`` passes the embedding as vector y.
            normalize_clip: scale embeddings to length 1.
            gap: treatment of the gap between embeddings of images and texts, see ``GapOptions``.
            phrase_separator: embed the phrases of a text one by one, see ``CLIPStage``. A small CLIP binds the words of
                a long text badly.
            weight_decay: of AdamW; 0 is Adam, as in the reference code.
            **kwargs: see ``LatentDiffusion`` and ``DDPM``.

        Raises:
            ConfigError: an option has an unknown value, or the text encoder is that of a CLIP of another width.
        """
        towers = cond_stage_config or {}
        if unknown := sorted(set(towers) - {"text_encoder", "image_encoder"}):
            where = "model.params.cond_stage_config"
            raise ConfigError(f"{where}: expected text_encoder and image_encoder, got {', '.join(unknown)}. Rename it")
        super().__init__(
            first_stage_config=first_stage_config,
            cond_stage_config={
                **towers,
                "normalize": normalize_clip,
                "gap": GapOptions.from_config(gap),
                "phrase_separator": phrase_separator,
            },
            cond_stage_key=cond_stage_key,
            conditioning_key=conditioning_key,
            **kwargs,
        )
        if self.cond_stage_trainable:
            raise ConfigError("model.params.cond_stage_trainable: expected false (CLIP is frozen), got true")
        self.weight_decay = weight_decay
        require_width(self.model.cond_width, self.cond_stage_model.width, "model.params.")

    def build_cond_stage(self, config: Mapping[str, Any]) -> nn.Module:
        """Return the towers of CLIP with the treatment of the gap."""
        return CLIPStage(**config)

    def embeddings(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the untreated image embeddings of a batch, (B, D) float32: its own, or computed from its images.

        Raises:
            UserError: the batch has no embeddings, or not vectors, and there is no image encoder.
        """
        key = self.cond_stage_key
        if key not in batch and self.cond_stage_model.image_encoder is not None:
            return self.cond_stage_model.embed_images(images_from_batch(batch, self.first_stage_key))
        value = batch_value(batch, key)
        if not isinstance(value, Tensor) or value.ndim != 2 or not value.is_floating_point():
            found = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise UserError(f"batch[{key!r}]: expected float vectors (B, D), got {found}. Correct the data set")
        return value.float()

    def get_condition(self, batch: Mapping[str, Any]) -> TensorCondition:
        """Return the treated image embeddings of a batch; zeros are no condition."""
        return TensorCondition(self.cond_stage_model.condition(self.embeddings(batch), self.training))

    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Log ``figure/test_loss``, the loss of the averaged weights."""
        with averaged(self):
            _, terms, size = self.shared_step(batch)
        self.log("figure/test_loss", terms["loss"], batch_size=size, sync_dist=True)

    def configure_optimizers(self) -> Any:
        """Return AdamW with ``weight_decay``, and the learning-rate multiplier if configured."""
        configured = super().configure_optimizers()
        optimizers = configured[0] if isinstance(configured, tuple) else [configured]
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["weight_decay"] = self.weight_decay
        return configured

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Complete a checkpoint of the network alone, as published; the average starts from its weights."""
        state = checkpoint["state_dict"]
        if not all(key.startswith(NETWORK_PREFIX) for key in state):
            return
        own = {key: value.clone() for key, value in self.state_dict().items()}
        average = network_keys([key.removeprefix(NETWORK_PREFIX) for key in state], use_ema=True)
        started = {key: state[NETWORK_PREFIX + name] for name, key in average.items() if key in own}
        checkpoint["state_dict"] = {**own, **started, **state}
        for count in checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_progress", {}).values():
            count.update(dict.fromkeys(count, checkpoint["epoch"]))  # Lightning completes one of the counters alone

    # The gap between embeddings of images and texts ---------------------------------------------------------------

    @property
    def embeds_images(self) -> bool:
        return self.cond_stage_model.image_encoder is not None

    @torch.no_grad()
    def joint_embeddings(self, images: Tensor, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """See ``HasJointSpace``; the embeddings are untreated."""
        return self.cond_stage_model.embed_images(images), self.cond_stage_model.embed_texts(texts)

    def condition_from_images(self, images: Tensor) -> TensorCondition:
        """Return the condition of images (B, 3, H, W) in [-1, 1]: variations of them are sampled."""
        stage = self.cond_stage_model
        return TensorCondition(stage.condition(stage.embed_images(images), self.training))

    def fit_gap(self, images: Tensor, texts: Sequence[str] = ()) -> None:
        """Estimate the statistics of the treatment from untreated image embeddings (N, D) and texts without images."""
        stage = self.cond_stage_model
        stage.fit(images.to(self.device), stage.embed_texts(texts) if stage.gap.needs_texts else None)

    def check_data(self, data: Any) -> None:
        """Raise a ``UserError`` if the embeddings of a data set are of another CLIP."""
        if (table := table_of(data)) is not None:
            self.cond_stage_model.require_clip(table, self.model.cond_width)

    @torch.no_grad()
    def on_fit_start(self) -> None:
        """Check the embeddings of the data, and estimate the statistics of the gap unless a checkpoint has them."""
        stage, data = self.cond_stage_model, self.trainer.datamodule
        datasets = data.datasets if isinstance(data, DataModuleFromConfig) else {}
        for dataset in datasets.values():
            self.check_data(dataset)
        if stage.is_fitted:
            return
        train = datasets.get("train")
        if train is None:
            raise UserError("model.params.gap: expected a data module with training images. Call fit_gap before")
        texts = gap_texts(stage.gap.texts, vocabulary_of(train)) if stage.gap.needs_texts else []
        rows = np.linspace(0, len(train) - 1, min(len(train), stage.gap.num_images)).round().astype(int)
        found = []
        with kept_random_state(self.device):  # data sets may draw their augmentation
            for part in np.array_split(rows, -(-len(rows) // _BATCH)):
                batch = collate([train[int(row)] for row in part])
                found.append(self.embeddings(self.transfer_batch_to_device(batch, self.device, 0)))
        self.fit_gap(torch.cat(found), texts)

    # Sampling -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample_w(
        self,
        conditions: Tensor | Sequence[str],
        strengths: Sequence[float] = STRENGTHS,
        x_T: Tensor | None = None,
        sampler: Sampler | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Sample every condition under every strength w of the guidance (1 + w) e_cond - w e_null, in one batch.

        Args:
            conditions: N texts, or conditions (N, D).
            strengths: W values of w; 0 is the condition itself, -1 no condition, and below the opposite of it.
            x_T: (W N, C, H, W) standard normal noise; drawn if None.
            sampler: by default that of the config.

        Returns:
            images (W N, 3, H, W) of which row w N + n has strength w and condition n, and the states after the steps
            of the sampler, latest t first, each (W N, C, H, W); of those of all T time steps, only t % 10 == 0 or
            t < 10.
        """
        is_tensor = isinstance(conditions, Tensor)
        value = conditions.to(self.device) if is_tensor else self.cond_stage_model.encode_texts(conditions)
        if value.ndim != 2 or not len(strengths):
            expected = "expected conditions (N, D) and at least one strength"
            raise UserError(f"sample_w: {expected}, got {tuple(value.shape)} and {list(strengths)}")
        scales = [1.0 + w for w in strengths]
        scale: float | Tensor = scales[0]
        if len(set(scales)) > 1:
            scale = torch.tensor(scales).repeat_interleave(len(value)).to(value)
        shape = (len(scales) * len(value), *self.latent_shape)
        noise = torch.randn(shape, device=self.device) if x_T is None else x_T.to(self.device)
        frames: list[Tensor] = []
        sampler = sampler or self.default_sampler
        skips_steps = sampler.num_evaluations(self.num_timesteps) < self.num_timesteps

        def keep(step: SamplerStep) -> None:
            if skips_steps or step.timestep % 10 == 0 or step.timestep < 10:
                frames.append(step.x)

        repeated = TensorCondition(value.repeat(len(scales), 1))
        z = self.sample(noise, repeated, sampler, guidance_scale=scale, callback=keep)
        return self.decode_first_stage(z), frames


def gap_texts(given: Sequence[str] | str | None, vocabulary: Any) -> list[str]:
    """Return texts: a list, the lines of a file, or captions of random attribute words of a data set's vocabulary.

    Raises:
        UserError: neither is given, the file does not exist, or there is no text.
    """
    if isinstance(given, str):
        if not Path(given).expanduser().is_file():
            raise UserError(f"model.params.gap.texts: the file {given} does not exist. Correct the path")
        given = Path(given).expanduser().read_text(encoding="utf-8").splitlines()
    if given is not None:
        if texts := [text for text in given if text.strip()]:
            return texts
        raise UserError(
            "model.params.gap.texts: expected at least one text, got none. Add texts, one per line of a file"
        )
    if vocabulary is None:
        raise UserError(
            "model.params.gap.texts: expected texts, because the data have no vocabulary, got none. Set a list or a "
            "file with one text per line; they need no images"
        )
    draws = np.random.default_rng(0)
    factors = [[draws.integers(len(values)) for values in vocabulary.value_to_word] for _ in range(_NUM_TEXTS)]
    return [vocabulary.caption(texts) for texts in vocabulary.texts(np.array(factors), draws)]
