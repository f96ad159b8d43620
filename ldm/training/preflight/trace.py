"""One training step and one validation step on tensors without values: shapes, logged metrics, memory.

A copy of the model is run under torch's ``FakeTensorMode``: it takes milliseconds per layer for any batch size, and
neither weights nor random states change. Steps that need values (own code, or parts that are prepared at the start of
training) are left out.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import FlopCounterMode

from ldm.errors import NotPreparedError
from ldm.models.autoencoder_base import Autoencoder
from ldm.models.contracts import Tokenizes
from ldm.util import ConfigError, UserError

logger = logging.getLogger(__name__)

_SHAPE_ERROR = re.compile(
    r"shapes? (cannot be|do not|does not|mismatch|invalid|'.*' is invalid)|sizes? of tensors?|to have \d+ channels|"
    r"Given (groups|normalized_shape|input size)|can't be greater than|must (match|have)|broadcast|"
    r"incorrect batch size|Expected (number|size|input)|not divisible|same size",
    re.IGNORECASE,
)
# Attributes of a model -> the entries of its config that they are built from.
_SECTIONS = {
    "model.diffusion_model": "unet_config",
    "first_stage_model": "first_stage_config",
    "cond_stage_model": "cond_stage_config",
    "loss": "lossconfig",
    "encoder": "ddconfig",
    "decoder": "ddconfig",
}


class Batch(NamedTuple):
    """The first items of a data set, collated."""

    values: Mapping[str, Any]
    count: int  # items
    size: int  # of a whole batch


@dataclass
class Trace:
    """What the steps of a model would do.

    Attributes:
        names: split ("train", "val") -> logged metrics, for steps that were traced from beginning to end.
        activation_bytes: memory of a training step for the tensors of its backward pass; ``None`` if not known.
        operations: of the matrix products and convolutions of a training step; ``None`` if not known.
    """

    names: dict[str, set[str]] = field(default_factory=dict)
    activation_bytes: int | None = None
    operations: int | None = None


def trace_steps(model: pl.LightningModule, batches: Mapping[str, Batch]) -> Trace:
    """Trace the steps of a model on whole batches of its data.

    Raises:
        ConfigError, UserError: a step raises one, or the shapes in a network do not match.
    """
    trace, began, mode = Trace(), time.monotonic(), FakeTensorMode(allow_non_fake_inputs=True)
    counter, uncounted = FlopCounterMode(display=False), contextlib.nullcontext()
    try:
        with FakeCopyMode(mode):
            clone = copy.deepcopy(model)
    except Exception as error:  # own code may have parts that cannot be copied
        logger.debug("shapes were not checked before training: %s", error)
        return trace
    for module in clone.modules():
        if isinstance(module, Tokenizes):
            module.tokenize = _with_values(module.tokenize)
    if "train" in batches:
        step = "training_step" if model.automatic_optimization else "validation_step"
        if isinstance(clone, Autoencoder):
            _run_backward_passes(clone)
        names, trace.activation_bytes = _traced(mode, clone, step, "train", batches["train"], counter)
        trace.operations = None if names is None else counter.get_total_flops() or None
        if names is not None and model.automatic_optimization:
            trace.names["train"] = names
    if "validation" in batches:
        names, _ = _traced(mode, clone, "validation_step", "validation", batches["validation"], uncounted)
        if names is not None:
            trace.names["val"] = names
    logger.debug("traced the shapes in %.2f s", time.monotonic() - began)
    return trace


def _with_values(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that is run on values although the step around it is traced, as texts have values."""

    @functools.wraps(function)
    def call(*inputs: Any) -> Any:
        with _disable_current_modes():
            return function(*inputs)

    return call


def _run_backward_passes(clone: Autoencoder) -> None:
    """Let the losses of a clone with manual optimization compute their gradients, in the place of its training step."""
    loss_terms = clone.loss_terms

    def with_gradients(*inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        loss, log = loss_terms(*inputs)
        if loss.requires_grad:
            loss.backward(retain_graph=True)
        return loss, log

    clone.loss_terms = with_gradients


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leave out torch's reports of errors, which are handled here."""
    torch_logger = logging.getLogger(FakeTensorMode.__module__)
    level = torch_logger.level
    torch_logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        torch_logger.setLevel(level)


def _traced(
    mode: FakeTensorMode,
    clone: pl.LightningModule,
    step: str,
    section: str,
    batch: Batch,
    counter: contextlib.AbstractContextManager,
) -> tuple[set[str] | None, int | None]:
    """Run a step; return the names of logged metrics and the bytes kept for the backward pass, or ``None`` for both.

    ``counter`` counts the operations of the step and of the backward pass of its loss.
    """
    names: set[str] = set()
    kept = {parameter.untyped_storage()._cdata for parameter in clone.parameters()}
    num_bytes = 0

    def keep(value: Tensor) -> Tensor:
        nonlocal num_bytes
        storage = value.untyped_storage()
        if storage._cdata not in kept:
            kept.add(storage._cdata)
            num_bytes += storage.nbytes()
        return value

    changed = (hook for hook in ("transfer_batch_to_device", "on_after_batch_transfer") if is_overridden(hook, clone))
    if not is_overridden(step, clone) or any(changed):  # batches have other shapes in the step
        return None, None
    clone.log = lambda name, *_, **__: names.add(name)
    values = {key: _grown(mode, value, batch) for key, value in batch.values.items()}
    clone.train(section == "train")
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value)
    loss = None
    try:
        with _quiet(), mode, torch.set_grad_enabled(section == "train"), counter:
            with hooks:
                loss = getattr(clone, step)(values, 0)
            if isinstance(loss, Tensor) and loss.requires_grad:
                loss.backward()
    except NotPreparedError as error:
        logger.debug("%s was not traced: %s", step, error)
    except (ConfigError, UserError) as error:
        is_of_data = "image" in str(error) and not str(error).startswith("model.params.")
        raise type(error)(f"data.params.{section}: {error}" if is_of_data else str(error)) from error
    except Exception as error:
        if loss is None and _SHAPE_ERROR.search(str(error)):  # else the backward pass failed
            raise UserError(_located(error, clone)) from error
        logger.debug("%s was not traced: %s: %s", step, type(error).__name__, error)
    else:
        return names, num_bytes
    return None, None


def _grown(mode: FakeTensorMode, value: Any, batch: Batch) -> Any:
    """Return an entry of the first items in the size of a whole batch."""
    if isinstance(value, Tensor) and value.ndim and len(value) == batch.count:
        with mode:
            return mode.from_tensor(value).new_empty((batch.size, *value.shape[1:]))
    if isinstance(value, Tensor):
        return mode.from_tensor(value)
    if isinstance(value, list) and len(value) == batch.count:
        return (value * batch.size)[: batch.size]
    return value


def _located(error: Exception, model: nn.Module) -> str:
    """Return an error of mismatched shapes with the key of the network, the layer, and its shapes."""
    names = {id(module): name for name, module in model.named_modules()}
    name, layer = "", model
    position: TracebackType | None = error.__traceback__
    while position is not None:
        owner = position.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and id(owner) in names:
            name, layer = names[id(owner)], owner
        position = position.tb_next
    section = next((key for part, key in _SECTIONS.items() if f"{name}.".startswith(f"{part}.")), None)
    key = "model.params" if section is None else f"model.params.{section}"
    weight = layer._parameters.get("weight")
    sizes = f" with a weight of shape {tuple(weight.shape)}" if isinstance(weight, Tensor) else ""
    found = str(error).partition("\n")[0]
    return (
        f"{key}: expected shapes that match, got an error in {name or type(layer).__name__} "
        f"({type(layer).__name__}{sizes}): {found}. Make the sizes in the config match those of the data"
    )
