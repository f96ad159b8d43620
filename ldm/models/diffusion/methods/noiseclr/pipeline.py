"""Stable Diffusion in a pipeline of diffusers as a frozen denoiser; needs the extra ``diffusers``.

Legend: B batch, S tokens of a text, D width of their embeddings, C h w the latent, H W the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.diffusion.conditions import Condition, TensorCondition
from ldm.diffusion.parameterization import parameterization
from ldm.diffusion.process import DiffusionProcess
from ldm.models.diffusion.methods.noiseclr.denoiser import FrozenDenoiser, bottleneck_of
from ldm.modules.encoders.splice import TokenSplice
from ldm.util import ConfigError, UserError

_PARTS = ("tokenizer", "text_encoder", "unet", "vae", "scheduler")
_WITHOUT = {**dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder")), "requires_safety_checker": False}
_PREDICTIONS = {"epsilon": "eps", "v_prediction": "v"}  # prediction_type of schedulers -> our parameterization


class PipelineDenoiser(DiffusionProcess, FrozenDenoiser):
    """Stable Diffusion 1 or 2 in a pipeline of diffusers, without its sampling loop and its safety checker.

    Rows are embeddings of a token of the text encoder. Weights are float32; set ``lightning.trainer.precision`` to
    compute in another precision.

    Args:
        pretrained_model: folder of a pipeline, or its name on the Hugging Face hub.
        tokenizer: folder of another tokenizer; by default that of the pipeline.
        use_checkpoint: recompute activations of the network in the backward pass; needs less memory.
        allow_download: download a pipeline that is not on this machine.

    Raises:
        UserError: diffusers or transformers is not installed; there is no such pipeline; or it is not a text-to-image
            pipeline of Stable Diffusion that predicts the noise or the velocity.
    """

    row_space = "token"

    def __init__(
        self,
        pretrained_model: str,
        tokenizer: str | None = None,
        use_checkpoint: bool = False,
        allow_download: bool = False,
    ) -> None:
        super().__init__()
        self._pipeline = pipeline = load_pipeline(pretrained_model, allow_download, tokenizer, **_WITHOUT)
        betas, kind = _check_parts(pipeline, pretrained_model)
        self.unet, self.vae, self.text_encoder = pipeline.unet, pipeline.vae, pipeline.text_encoder
        self.eval().requires_grad_(False)
        self.register_schedule(betas.double().numpy(), 0.0, parameterization(kind))
        table = self.text_encoder.get_input_embeddings()
        self._splice, self.row_width = TokenSplice(table, self._encode_texts), table.embedding_dim
        self.register_buffer("empty", self._encode_texts([""]), persistent=False)
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        self.latent_shape = self.unet.config.in_channels, height, width
        self.bottleneck = bottleneck_of(self.unet)
        if use_checkpoint:
            self.unet.enable_gradient_checkpointing()

    def _encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Return the embeddings (B, S, D) of the tokens of B texts, padded as in the pipeline."""
        return self._pipeline.encode_prompt(list(texts), self.unet.device, 1, False)[0]

    def require_new_tokens(self, names: Sequence[str]) -> None:
        require_new_tokens(self._pipeline.tokenizer, names, self._pipeline.config.get("_name_or_path"))

    @torch.no_grad()
    def condition_from_texts(self, texts: Sequence[str]) -> TensorCondition:
        return TensorCondition(self._encode_texts(texts), lambda: self.empty)

    def _predict_eps(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        tokens = cond.inputs("crossattn")["c_crossattn"][0]
        return self.parameterization.to_eps(self.schedule, x, t, self.unet(x, t, tokens).sample)

    @torch.no_grad()
    def encode(self, images: Tensor, sample: bool = False) -> Tensor:
        posterior, config = self.vae.encode(images).latent_dist, self.vae.config
        z = posterior.sample() if sample else posterior.mode()
        return (z - (config.get("shift_factor") or 0.0)) * config.scaling_factor

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        config = self.vae.config
        return self.vae.decode(z / config.scaling_factor + (config.get("shift_factor") or 0.0)).sample

    def network(self) -> nn.Module:
        return self.unet


def load_pipeline(name: str, allow_download: bool = False, tokenizer: str | None = None, **options: Any) -> Any:
    """Return a ``StableDiffusionPipeline`` in float32 on the CPU.

    Args:
        name: folder of a pipeline, or its name on the Hugging Face hub.
        allow_download: download files that are not on this machine.
        tokenizer: folder of another tokenizer.
        **options: of ``StableDiffusionPipeline.from_pretrained``.

    Raises:
        ConfigError: an option makes diffusers run code of the pipeline.
        UserError: diffusers or transformers is not installed, or there is no such pipeline.
    """
    if given := sorted({"custom_pipeline", "trust_remote_code"} & set(options)):
        raise ConfigError(f"{given[0]}: code of pipelines is not run. Remove the option")
    pipeline_class, tokenizer_class = import_diffusers(name)
    folder = Path(name).expanduser()
    source, local = str(folder) if folder.is_dir() else name, {"local_files_only": not allow_download}
    try:
        parts = pipeline_class.load_config(source, **local)
        missing = [part for part in _PARTS if (parts.get(part) or [None])[-1] is None]
        if not missing:
            if tokenizer is not None:
                options["tokenizer"] = tokenizer_class.from_pretrained(str(Path(tokenizer).expanduser()), **local)
            return pipeline_class.from_pretrained(source, **local, **options).to(dtype=torch.float32)
    except (OSError, ValueError, TypeError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise UserError(
            f"{name}: expected the folder of a complete pipeline of Stable Diffusion, or the name of one in the "
            f"Hugging Face cache, got {type(error).__name__} ({reason}). Correct the path, or set allow_download: true"
        ) from error
    raise UserError(
        f"{name}: expected a text-to-image pipeline ({', '.join(_PARTS)}), got {parts.get('_class_name')} without "
        f"{', '.join(missing)}. Choose a pipeline of Stable Diffusion"
    )


def import_diffusers(where: str | Path) -> tuple[Any, Any]:
    """Return the classes ``StableDiffusionPipeline`` and ``CLIPTokenizer``.

    Raises:
        UserError: diffusers or transformers is not installed.
    """
    try:
        from transformers import CLIPTokenizer  # isort: skip  # first: without it diffusers imports placeholders
        from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
    except ImportError as error:
        raise UserError(
            f"{where}: expected the packages diffusers and transformers for a pipeline, got none ({error}). Run: "
            "pip install -e .[diffusers]"
        ) from error
    return StableDiffusionPipeline, CLIPTokenizer


def _check_parts(pipeline: Any, name: str) -> tuple[Tensor, str]:
    """Return the betas of a pipeline's scheduler, and our name of its parameterization.

    Raises:
        UserError: the parts are not those of a text-to-image pipeline of Stable Diffusion, or are not supported.
    """
    network, first_stage = pipeline.unet.config, pipeline.vae.config
    channels, others = first_stage.get("latent_channels"), ("addition_embed_type", "class_embed_type")
    inputs, kind = [key for key in others if network.get(key) is not None], type(pipeline.vae).__name__
    if network.in_channels != channels or inputs or kind != "AutoencoderKL":
        raise UserError(
            f"{name}: expected a U-Net with {channels} input channels and no inputs beside text, and AutoencoderKL, "
            f"got {network.in_channels} channels, {' and '.join(inputs) or 'no other inputs'} and {kind}. Choose a "
            "text-to-image pipeline of Stable Diffusion 1 or 2"
        )
    prediction = pipeline.scheduler.config.get("prediction_type", "epsilon")
    betas = vars(pipeline.scheduler).get("betas")
    if prediction not in _PREDICTIONS or not isinstance(betas, Tensor):
        raise UserError(
            f"{name}: expected a scheduler with betas and a prediction_type among {', '.join(_PREDICTIONS)}, got "
            f"{type(pipeline.scheduler).__name__} with {prediction!r}. Choose another pipeline"
        )
    return betas, _PREDICTIONS[prediction]


def require_new_tokens(tokenizer: Any, names: Sequence[str], source: str) -> None:
    """Raise a ``UserError`` if the tokenizer of a pipeline has one of the tokens already."""
    vocabulary = tokenizer.get_vocab()
    if existing := [name for name in names if name in vocabulary]:
        raise UserError(
            f"{source}: expected a tokenizer without the tokens to be learned, got one with {', '.join(existing[:4])}. "
            "Choose the pipeline as it was before tokens were added"
        )
