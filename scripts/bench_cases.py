"""Training steps that ``bench_training.py`` measures: shipped configs with random weights, batches of their data."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from plain_training import make_plain, plain_optimizer
from torch import Tensor, nn

from ldm.models.autoencoder_base import Autoencoder
from ldm.models.diffusion.base import DDPM
from ldm.modules.diffusionmodules import openaimodel_enc, openaimodel_shift
from ldm.modules.lpips import LPIPS
from ldm.modules.quantize import VectorQuantizer2
from ldm.training.cli import Options
from ldm.training.plan import Plan, make_plan
from ldm.training.throughput import precision_dtype

ROOT = Path(__file__).resolve().parents[1]
PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}
PLAIN = "plain"
NETWORK_BATCH = 16  # images, of the networks and of the stages in the references' sizes
WIDTH_OF_CLIP = 512  # of the embeddings of clip_guided, those of ViT-B/32

# Overrides for what does not exist on every machine: earlier stages, and the data sets of the references.
_NO_FIRST_STAGE = "model.params.first_stage_config.params.ckpt_path=null"
_NO_BASE = "model.params.unet_config.params.ckpt_path=null"
_STAGE = "model.params.cond_stage_config"
_TEXT, _IMAGE = f"{_STAGE}.text_encoder.params.version=CLIP", f"{_STAGE}.image_encoder.params.model=CLIP"


def _world(size: int) -> tuple[str, ...]:
    names = ("train", "validation", "test")
    found = [f"data.params.{name}.target=ldm.data.world.World3D" for name in names]
    return (*found, *(f"data.params.{name}.params.size={size}" for name in names))


@dataclass(frozen=True)
class Case:
    """A training step to measure.

    Attributes:
        name: as on the command line.
        title: as in the table.
        configs: files below ``configs``.
        overrides: of their keys; ``CLIP`` is replaced by the folder of a CLIP with random weights.
        is_network: the network alone is trained.
        is_full_size: in the size of the references; the batch size is that of the networks.
    """

    name: str
    title: str
    configs: tuple[str, ...]
    overrides: tuple[str, ...] = ()
    is_network: bool = False
    is_full_size: bool = False


def _full(name: str, title: str, config: str, *overrides: str, is_network: bool = False) -> Case:
    return Case(name, title, (config,), overrides, is_network, is_full_size=True)


def _small(name: str, *overrides: str, latents: bool = True) -> Case:
    files = ("world", "latents", name) if latents else ("world", name)
    overrides = (_NO_FIRST_STAGE, *overrides) if latents else overrides
    return Case(name, name, tuple(f"quickstart/{file}.yaml" for file in files), overrides)


_LDM, _DISDIFF = "latent-diffusion/shapes3d-vq-4-16.yaml", "latent-diffusion/shapes3d-vq-4-16-dis.yaml"
_ENCDIFF, _VQ = "encdiff/shapes3d_encdiff.yaml", "autoencoder/shapes3d_vq_4_16.yaml"
_NO_EVALUATION = "lightning.callbacks.scores=null"
NETWORKS = [
    _full("shift", "shift U-Net, 6 units", _DISDIFF, _NO_FIRST_STAGE, _NO_BASE, *_world(64), is_network=True),
    _full("encdiff", "EncDiff U-Net", _ENCDIFF, _NO_FIRST_STAGE, *_world(64), is_network=True),
    _full("unet", "plain U-Net", _LDM, _NO_FIRST_STAGE, *_world(64), is_network=True),
    _full("vqvae", "VQ-VAE, 64 px", _VQ, *_world(64), is_network=True),
]
STAGES = [
    _small("clip", latents=False),
    _small("judge", latents=False),
    _small("vq", latents=False),
    _small("ldm"),
    _small("clip_disdiff", _NO_BASE, _TEXT, _IMAGE, "lightning.callbacks.edit_score=null"),
    _small("encdiff", _NO_EVALUATION, "lightning.callbacks.pixel_pca=null"),
    _small("disdiff", _NO_BASE),
    _small("text_to_image", _TEXT, _IMAGE, "model.params.gap=none", "lightning.callbacks.prompt_score=null"),
    _small("text_attention", f"{_STAGE}.params.version=CLIP"),
    _full("full_vq", "VQ-VAE", _VQ, *_world(64)),
    _full("full_ldm", "LDM", _LDM, _NO_FIRST_STAGE, *_world(64)),
    _full("full_disdiff", "DisDiff", _DISDIFF, _NO_FIRST_STAGE, _NO_BASE, *_world(64)),
    _full("full_encdiff", "EncDiff", _ENCDIFF, _NO_FIRST_STAGE, _NO_EVALUATION, *_world(64)),
    _full(
        "full_clip_disdiff",
        "CLIP-DisDiff",
        "latent-diffusion/example_vq_4_16_clip-dis.yaml",
        *(_NO_FIRST_STAGE, _NO_BASE, _TEXT, _IMAGE),
    ),
    _full(
        "clip_guided",
        "CLIP-guided DDPM",
        "text-to-image/tiny_imagenet.yaml",
        *(f"{_STAGE}=null", "data.params.train.target=ldm.data.world.World3D", "data.params.train.params.size=32"),
    ),
]


# Models and their steps --------------------------------------------------------------------------------------------


def prepare(model: pl.LightningModule, precision: str) -> Callable[[], contextlib.AbstractContextManager]:
    """Prepare a model for a precision as a run does, and return the context of its forward passes."""
    device, dtype = model.device.type, precision_dtype(PRECISIONS[precision])
    return functools.partial(torch.autocast, device, dtype, enabled=dtype != torch.float32)


def without_files(device: torch.device, precision: str) -> pl.Trainer:
    """Return a Lightning Trainer that writes nothing."""
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    accelerator = "gpu" if device.type == "cuda" else device.type
    options = {"max_epochs": -1, "max_steps": 1000, "accelerator": accelerator, "devices": 1}
    return pl.Trainer(precision=PRECISIONS[precision], **options, **quiet)


@dataclass
class Way:
    """A way to train: a model in a precision, with its optimizers and moving averages.

    Attributes:
        name: precision, or ``plain``.
        model: a copy of the model of the case.
        is_network: the network alone is trained.
        clip: largest norm of the gradients, if they are clipped.
        seconds: of each measured step.
    """

    name: str
    model: pl.LightningModule
    is_network: bool
    clip: float | None
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.is_plain = self.name == PLAIN
        if self.is_plain:
            make_plain(self.model)
        self.context = prepare(self.model, "fp32" if self.is_plain else self.name)
        self.model.log = lambda *_, **__: None  # the steps run without a trainer; optimizers may depend on its settings
        self.model.trainer = without_files(self.model.device, "fp32" if self.is_plain else self.name)
        found = self.model.configure_optimizers()
        self.model._trainer = None
        found = found["optimizer"] if isinstance(found, dict) else found[0] if isinstance(found, tuple) else found
        found = found if isinstance(found, list) else [found]
        if self.is_network:
            del found[1:]
        if self.is_plain:
            found = [plain_optimizer(each) for each in found]
        self.optimizers = found
        self.averages = [(each._average, each._network) for each in self.model.configure_callbacks()]

    def losses(self, batch: Mapping[str, Any]) -> Iterator[Tensor]:
        """Yield the loss of each optimizer."""
        if self.is_network:
            yield network_loss(self.model, batch)
        elif isinstance(self.model, Autoencoder):
            yield from self._losses_of_autoencoder(batch)
        else:
            yield self.model.training_step(batch, 0)

    def _losses_of_autoencoder(self, batch: Mapping[str, Any]) -> Iterator[Tensor]:
        x = self.model.get_input(batch)
        outputs = None
        for index in range(len(self.optimizers)):
            for other, optimizer in enumerate(self.optimizers):
                for parameter in (each for group in optimizer.param_groups for each in group["params"]):
                    parameter.requires_grad_(other == index)
            if outputs is None or self.is_plain:  # the references run the autoencoder once per optimizer
                outputs = self.model.reconstruct(x)
            yield self.model.loss_terms(x, *outputs, index, "train")[0]

    def step(
        self, batch: Mapping[str, Any], mark: Callable[[str], None] = lambda _: None, updates: bool = True
    ) -> list[Tensor]:
        """Train on a batch and return the losses; ``mark`` is called with the name of each part that begins."""
        found = []
        mark("forward")
        with self.context():
            losses = self.losses(batch)
            loss = next(losses)
        for optimizer in self.optimizers:
            mark("backward")
            loss.backward()
            found.append(loss.detach())
            mark("optimizer")
            if updates:
                parameters = [each for group in optimizer.param_groups for each in group["params"]]
                if self.clip is not None:
                    nn.utils.clip_grad_norm_(parameters, self.clip, foreach=False if self.is_plain else None)
                optimizer.step()
                optimizer.zero_grad()
            mark("forward")
            with self.context():
                loss = next(losses, loss)
        mark("moving average")
        for average, network in self.averages if updates else ():
            average(network)
        mark("")
        return found

    def gradients(self) -> dict[str, Tensor]:
        """Return the gradients by name, and remove them."""
        found = {name: each.grad for name, each in self.model.named_parameters() if each.grad is not None}
        self.model.zero_grad()
        return found


def network_loss(model: pl.LightningModule, batch: Mapping[str, Any]) -> Tensor:
    """Return a loss of the network alone: of noise for a diffusion model, of images for an autoencoder."""
    if isinstance(model, Autoencoder):
        x = model.get_input(batch)
        reconstruction, (codebook_loss, _) = model.reconstruct(x)
        return (reconstruction - x).abs().mean() + codebook_loss
    network, size = model.model.diffusion_model, len(batch["image"])
    x = torch.randn(size, *model.latent_shape, device=model.device)
    t = torch.randint(model.num_timesteps, (size,), device=model.device)
    target = torch.randn_like(x)
    if isinstance(network, openaimodel_shift.UNetModel):
        codes = torch.randn(size, network.latent_unit, network.repre_emb_channels, device=x.device)
        out = network(x, t, codes)
        return (out.pred + out.out_grad - target).abs().mean()
    if isinstance(network, openaimodel_enc.UNetModel):
        tokens = torch.randn(size, network.latent_unit, network.config.context_dim, device=x.device)
        return (network(x, t, tokens) - target).abs().mean()
    return (network(x, t) - target).abs().mean()


class Bench:
    """Models and batches of cases on a device.

    Args:
        device: where to run.
        folder: for the CLIP with random weights.
        overrides: for all configs.
        batch_size: for all cases; None: that of the config, or of the networks for the sizes of the references.
    """

    def __init__(
        self, device: torch.device, folder: Path, overrides: Sequence[str] = (), batch_size: int | None = None
    ) -> None:
        self.device, self.folder, self.overrides, self.batch_size = device, folder, tuple(overrides), batch_size

    def plan(self, case: Case, *more: str) -> Plan:
        """Return the plan of a run of a case."""
        size = self.batch_size or (NETWORK_BATCH if case.is_full_size else None)
        words = list(case.overrides)
        if any(word.endswith("=CLIP") for word in words):
            folder = str(self.clip(64 if case.is_full_size else 32))
            words = [word.removesuffix("CLIP") + folder if word.endswith("=CLIP") else word for word in words]
        words += [] if size is None else [f"data.params.batch_size={size}"]
        base = tuple(str(ROOT / "configs" / file) for file in case.configs)
        return make_plan(Options(base=base, overrides=(*words, *self.overrides, *more), name="bench", train=True))

    def clip(self, size: int) -> Path:
        """Return the folder of a CLIP with random weights, that of the quickstart for images of ``size`` pixels."""
        folder = self.folder / str(size)
        if not folder.exists():
            case = _small("clip", *_world(size), latents=False)
            Bench(self.device, self.folder).plan(case).config.build("model").save_folder(folder)
        return folder

    def build(self, case: Case) -> tuple[pl.LightningModule, dict[str, Any], float | None]:
        """Return a model, a batch, and the norm at which the gradients are clipped."""
        torch.manual_seed(0)
        plan = self.plan(case)
        model, data = plan.config.build("model").to(self.device).train(), plan.config.build("data")
        for module in model.modules():
            if isinstance(module, LPIPS):
                module.missing_weights = None  # random ones take as long
            elif isinstance(module, VectorQuantizer2):  # distant codes, so that rounding does not change the nearest
                nn.init.normal_(module.embedding.weight)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1 and not parameter.any():  # else most gradients were 0
                    parameter.normal_(std=0.02)
        if isinstance(model, DDPM) and model.use_ema:
            model.model_ema.restart(model.model)
        batch = model.transfer_batch_to_device(next(iter(data.train_dataloader())), self.device, 0)
        if case.name == "clip_guided":
            batch["clip_embedding"] = torch.randn(len(batch["image"]), WIDTH_OF_CLIP, device=self.device)
        return model, batch, plan.settings.arguments.get("gradient_clip_val")

    def ways(self, case: Case, precisions: Sequence[str]) -> tuple[list[Way], dict[str, Any]]:
        """Return the ways of a case, the plain one last, and a batch."""
        model, batch, clip = self.build(case)
        names = [*precisions, PLAIN]
        return [Way(name, copy.deepcopy(model), case.is_network, clip) for name in names], batch
