"""Compilation of the networks of a model by ``torch.compile`` (``lightning.compile``), for training steps.

Networks are compiled in place: names of weights, averages, checkpoints and resumed runs stay the same. Only training
batches of the whole size use compiled code. The smaller last batch of an epoch, validation, pictures and tests run
without it, because each further shape or mode would be compiled anew, which takes minutes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import nn

from ldm.training.callbacks.speed_bar import num_images
from ldm.util import ConfigError

# Names of the classes of repeated blocks, of this package, of open_clip and of diffusers.
_BLOCKS = frozenset("ResBlock AttentionBlock BasicTransformerBlock ResnetBlock AttnBlock".split())
_BLOCKS |= frozenset("ResidualAttentionBlock Bottleneck ResnetBlock2D".split())
_GRAPHS_PER_MODULE = 4  # such as one for each of two batch sizes, with and without gradients


def compiling_callbacks(lightning: Mapping[str, Any]) -> list[Callback]:
    """Return the callback for ``compile`` and ``compile_mode`` of the section ``lightning``; empty without it.

    Raises:
        ConfigError: torch is too old.
    """
    scope = lightning.get("compile") or False
    if not scope:
        return []
    if "set_stance" not in vars(torch.compiler):
        raise ConfigError(f"lightning.compile: expected torch 2.6 or later, got {torch.__version__}. Remove the key")
    return [CompileNetworks(scope == "regional", lightning.get("compile_mode") or "default")]


@runtime_checkable
class Compilable(Protocol):
    """A model, stage or loss with networks that run in every training step."""

    def networks_to_compile(self) -> list[nn.Module]:
        """Return the networks, which are called as modules, with tensors of few different shapes."""
        ...


class CompileNetworks(Callback):
    """Compiles the networks of a model when training starts, and selects compiled code batch by batch.

    Args:
        is_regional: compile the repeated blocks of networks, equal ones once.
        mode: ``mode`` of ``torch.compile``.
        backend: ``backend`` of ``torch.compile``.
    """

    def __init__(self, is_regional: bool = False, mode: str = "default", backend: str = "inductor") -> None:
        self.is_regional, self.mode, self.backend = is_regional, mode, backend
        self._whole = 0  # images of a whole batch

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave compiled code out until the first training batch."""
        torch.compiler.set_stance("force_eager")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Mark the networks for compilation, which the first batch starts."""
        modules = list(networks_of(pl_module))
        if self.is_regional:
            modules = [block for network in modules for block in (list(blocks_of(network)) or [network])]
        limit = max(torch._dynamo.config.recompile_limit, _GRAPHS_PER_MODULE * len(modules))  # torch counts all as one
        torch._dynamo.config.recompile_limit = limit
        options = {} if self.backend != "inductor" else {"mode": self.mode}
        for module in modules:
            module.compile(backend=self.backend, dynamic=False, **options)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Use compiled code if the batch has the whole size; CUDA graphs may reuse the memory of the last step."""
        size = num_images(batch)
        self._whole = max(size, self._whole)
        torch.compiler.set_stance("default" if size == self._whole else "force_eager")
        if self.mode != "default":
            torch.compiler.cudagraph_mark_step_begin()

    def on_train_batch_end(self, *_: Any) -> None:
        """Leave compiled code out between training batches."""
        torch.compiler.set_stance("force_eager")

    def teardown(self, *_: Any, **__: Any) -> None:
        """Restore the default of torch."""
        torch.compiler.set_stance("default")

    on_exception = teardown


def networks_of(model: nn.Module) -> Iterable[nn.Module]:
    """Return the networks of a model and of its stages that implement ``Compilable``, each once."""
    parts = (part for part in model.modules() if isinstance(part, Compilable))
    return dict.fromkeys(network for part in parts for network in part.networks_to_compile())


def blocks_of(network: nn.Module) -> Iterator[nn.Module]:
    """Yield the outermost blocks of a network whose classes are known as repeated blocks."""
    for child in network.children():
        if type(child).__name__ in _BLOCKS:
            yield child
        else:
            yield from blocks_of(child)


def compilation_advice(error: Exception) -> str:
    """Return one line for an error of torch's compiler."""
    found = str(error).strip().partition("\n")[0]
    return (
        f"lightning.compile: expected networks that torch can compile on this machine, got {type(error).__name__}: "
        f"{found}. Remove the key to train without compilation"
    )
