"""Parts of a training step and what Lightning and the data add to it, for ``bench_training.py``."""

from __future__ import annotations

import functools
import itertools
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from bench_cases import PRECISIONS, Bench, Case, Way
from torch import Tensor, nn

from ldm.models.autoencoder_base import Autoencoder
from ldm.models.diffusion.base import DDPM
from ldm.models.diffusion.latent import LatentDiffusion
from ldm.modules.diffusionmodules import openaimodel, openaimodel_shift
from ldm.modules.ema import LitEma
from ldm.runs.folder import RunFolder
from ldm.training.trainer import build_trainer, choose_devices

WARM_UP = 2  # steps of each way before those that are measured

Clock = Callable[[], float]


def named_parts(model: pl.LightningModule) -> Iterator[tuple[str, nn.Module]]:
    """Yield the parts of a model with their names; parts of one name are added."""
    if isinstance(model, Autoencoder):
        yield from (("encoder", model.encoder), ("codebook", model.quantize), ("decoder", model.decoder))
        for name in ("perceptual_loss", "discriminator"):
            part = model.loss.get_submodule(name) if vars(model.loss)["_modules"].get(name) is not None else None
            if part is not None:
                yield name.replace("_", " "), part
    elif isinstance(model, DDPM):
        yield from _parts_of_network(model.model.diffusion_model)
        if isinstance(model, LatentDiffusion):
            stage = dict(model.first_stage_model.named_children())
            yield from (("first stage", stage[name]) for name in ("encoder", "quant_conv") if name in stage)
            yield from (
                ("decoder of the loss", stage[name]) for name in ("decoder", "post_quant_conv") if name in stage
            )
            towers = dict(model.cond_stage_model.named_children()) if model.cond_stage_model is not None else {}
            if "image_encoder" in towers and towers["image_encoder"] is not None:
                yield "CLIP", towers["image_encoder"]
            if towers:
                yield "condition", towers.get("text_encoder") or model.cond_stage_model
    else:
        yield from model.named_children()


def _parts_of_network(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    if not isinstance(network, openaimodel.UNetModel):
        yield "U-Net", network
        return
    is_frozen = isinstance(network, openaimodel_shift.UNetModel)
    yield from (("frozen U-Net" if is_frozen else "U-Net encoder", block) for block in network.input_blocks)
    decoder = [network.middle_block, *network.output_blocks, network.out]
    yield from (("frozen U-Net" if is_frozen else "U-Net decoder", block) for block in decoder)
    if is_frozen:
        shift = [network.shift_middle_block, *network.shift_output_blocks, network.shift_out]
        yield from (("U-Net decoder", block) for block in shift)


class Parts:
    """Divides the time of a step among the parts of a model, in the forward and in the backward pass.

    In the backward pass a part begins when the gradient of its output arrives, and ends when another one begins.
    """

    def __init__(self, model: pl.LightningModule, clock: Clock) -> None:
        self.seconds: dict[str, float] = {}
        self._clock, self._stack, self._now, self._since = clock, [], "", 0.0
        self._handles = []
        for name, part in named_parts(model):
            self._handles.append(part.register_forward_pre_hook(lambda *_, name=name: self._enter(name)))
            self._handles.append(part.register_forward_hook(lambda _, __, out, name=name: self._leave(name, out)))

    def mark(self, name: str) -> None:
        """Begin a part; "" ends the last one."""
        now = self._clock()
        if self._now:
            self.seconds[self._now] = self.seconds.get(self._now, 0.0) + now - self._since
        self._now, self._since = (
            {"forward": "loss, other layers", "backward": "loss, other layers"}.get(name, name),
            now,
        )

    def _enter(self, name: str) -> None:
        self._stack.append(self._now)
        self.mark(name)

    def _leave(self, name: str, output: Any) -> None:
        self.mark(self._stack.pop())
        outputs = output if isinstance(output, (tuple, list)) else [output]
        for each in outputs:
            if isinstance(each, Tensor) and each.requires_grad:
                each.register_hook(lambda _: self.mark(name))

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()


def seconds_of_parts(way: Way, batch: Mapping[str, Any], clock: Clock, steps: int) -> dict[str, float]:
    """Return the mean seconds of each part of a step."""
    parts = Parts(way.model, clock)
    try:
        for _ in range(steps):
            way.step(batch, parts.mark)
    finally:
        parts.close()
    return {name: seconds / steps for name, seconds in parts.seconds.items()}


class _Repeated:
    """A loader that returns one batch again and again."""

    def __init__(self, batch: Mapping[str, Any], count: int) -> None:
        self.batch, self.count = batch, count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return itertools.repeat(self.batch, self.count)


class StepTimer(pl.Callback):
    """Divides the time of the steps of a Trainer between the model and Lightning.

    Forward and backward pass, clipping, optimizer and moving average count as the model's, everything else, such as
    loops, callbacks, logging and the hooks of manual optimization, as Lightning's.

    Attributes:
        seconds: of Lightning per step.
    """

    def __init__(self, clock: Clock) -> None:
        self.seconds: list[float] = []
        self._clock, self._since, self._sum, self._is_lightning = clock, 0.0, 0.0, True

    def _switch(self, is_lightning: bool) -> bool:
        now, was_lightning = self._clock(), self._is_lightning
        self._sum += now - self._since if was_lightning else 0.0
        self._since, self._is_lightning = now, is_lightning
        return was_lightning

    def _timed(self, function: Callable[..., Any], is_lightning: bool) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            before = self._switch(is_lightning)
            try:
                return function(*args, **kwargs)
            finally:
                self._switch(before)

        return call

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Wrap the functions of the model, and those of Lightning that it calls."""
        own = {"training_step": False, "backward": False, "configure_gradient_clipping": False}
        hooks = ("log", "log_dict", "toggle_optimizer", "untoggle_optimizer", "optimizers", "lr_schedulers")
        for name, is_lightning in {**own, **dict.fromkeys(hooks, True)}.items():
            setattr(pl_module, name, self._timed(getattr(pl_module, name), is_lightning))
        for average in (module for module in pl_module.modules() if isinstance(module, LitEma)):
            average.forward = self._timed(average.forward, is_lightning=False)
        for optimizer in trainer.optimizers:
            step = self._timed(optimizer.step, is_lightning=False)
            optimizer.step = functools.partial(self._step, step)

    def _step(self, step: Callable[..., Any], closure: Callable[[], Any] | None = None) -> Any:
        return step(closure if closure is None else self._timed(closure, is_lightning=True))

    def on_train_batch_start(self, *_: Any) -> None:
        """End a step and begin the next one."""
        self._switch(is_lightning=True)
        self.seconds.append(self._sum)
        self._sum = 0.0


def lightning_seconds(bench: Bench, case: Case, batch: Mapping[str, Any], way: Way, clock: Clock, steps: int) -> float:
    """Return the seconds of Lightning per step of a run, without checkpoints and pictures, on one repeated batch."""
    keys = {"limit_val_batches": 0, "enable_checkpointing": "false", "accumulate_grad_batches": 1}
    keys |= {"max_steps": steps + WARM_UP + 1, "precision": PRECISIONS[way.name]}
    words = [f"lightning.trainer.{name}={value}" for name, value in keys.items()]
    plan = bench.plan(case, *words, "lightning.callbacks.image_logger=null")
    plan.settings.arguments["accelerator"] = "gpu" if bench.device.type == "cuda" else bench.device.type
    model, data, timer = bench.build(case)[0], plan.config.build("data"), StepTimer(clock)
    data.train_dataloader = lambda: _Repeated(batch, steps + WARM_UP + 1)
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(plan, choose_devices(plan.settings.arguments), model, RunFolder(Path(folder)), [timer])
        trainer.fit(model, datamodule=data)
    return statistics.median(timer.seconds[WARM_UP + 1 :])


def data_seconds(bench: Bench, case: Case, clock: Clock, count: int = 10) -> float:
    """Return the mean seconds until the next batch of the data of a case."""
    batches = iter(bench.plan(case).config.build("data").train_dataloader())
    next(batches)
    start = clock()
    for _ in range(count):
        next(batches)
    return (clock() - start) / count
