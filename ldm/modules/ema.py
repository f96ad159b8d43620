"""Exponential moving average of the weights of a network and of further trained parts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ldm.util import ConfigError

Part = nn.Module | nn.Parameter


class LitEma(nn.Module):
    """Averages of trainable parameters, stored as buffers that are named after the parameters without dots.

    After n updates the decay is ``min(decay, (1 + n) / (10 + n))``, so that early averages follow the weights quickly.
    An update consists of at most three fused operations on the device, without synchronization.

    Args:
        model: the network; parameters that do not require a gradient at construction are not averaged.
        decay: final decay, in [0, 1].
        use_num_updates: warm the decay up; False uses ``decay`` from the start.
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999, use_num_updates: bool = True) -> None:
        super().__init__()
        if not 0.0 <= decay <= 1.0:
            raise ConfigError(f"decay of the moving average: expected a number in [0, 1], got {decay}.")
        self.register_buffer("decay", torch.tensor(decay, dtype=torch.float32))
        self.register_buffer("num_updates", torch.tensor(0 if use_num_updates else -1, dtype=torch.int))
        self._extra: dict[str, Part] = {}  # a dict is not registered: the parts stay out of the state dict
        self._found: list[Any] = []  # network, names of the averages, owners of the parameters
        self._register(model)

    def add(self, name: str, part: Part) -> None:
        """Average a further module or parameter, under buffers named ``<name><parameter name without dots>``.

        It is averaged and replaced together with the network.
        """
        self._extra[name] = part
        self._register(None)

    def _register(self, model: nn.Module | None) -> None:
        self._found = []
        for name, owner, key in self._owners(model):
            parameter = owner[key]
            if parameter.requires_grad and name not in self._buffers:
                self.register_buffer(name, parameter.detach().clone())

    @torch.no_grad()
    def forward(self, model: nn.Module) -> None:
        """Move the averages towards the parameters: average -= (1 - decay) (average - parameter)."""
        averages, parameters = self._pairs(model, reuse=True)
        counts = self.num_updates >= 0
        self.num_updates += counts.to(self.num_updates.dtype)
        warm_up = (1 + self.num_updates) / (10 + self.num_updates)
        decay = torch.where(counts, torch.minimum(self.decay, warm_up), self.decay)
        rate = 1 - decay
        dtypes = {tensor.dtype for tensor in (*averages, *parameters)}
        if rate.device.type == "cpu" and dtypes == {rate.dtype}:  # loops over the tensors there: one instead of three
            torch._foreach_lerp_(averages, parameters, [rate] * len(averages))
            return
        steps = torch._foreach_sub(averages, parameters)
        torch._foreach_mul_(steps, rate)
        torch._foreach_sub_(averages, steps)

    @torch.no_grad()
    def restart(self, model: nn.Module) -> None:
        """Set the averages to the current parameters."""
        averages, parameters = self._pairs(model)
        torch._foreach_copy_(averages, parameters)

    @contextlib.contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[None]:
        """Replace the parameters by the averages within the context."""
        averages, parameters = self._pairs(model)
        trained = [parameter.clone() for parameter in parameters]
        torch._foreach_copy_(parameters, averages)
        try:
            yield
        finally:
            torch._foreach_copy_(parameters, trained)

    def _owners(self, model: nn.Module | None) -> Iterator[tuple[str, dict[str, Any], str]]:
        """Yield the name of the buffer, and the dictionary and the key, of every parameter that may be averaged."""
        for prefix, part in {"": model, **self._extra}.items():
            if isinstance(part, nn.Parameter):
                yield prefix, self._extra, prefix
            elif part is not None:
                for name, _ in part.named_parameters():
                    owner, _, key = name.rpartition(".")
                    yield prefix + name.replace(".", ""), part.get_submodule(owner)._parameters, key

    def _pairs(self, model: nn.Module, reuse: bool = False) -> tuple[list[Tensor], list[Tensor]]:
        """Return the averages and the parameters in the same order.

        With ``reuse``, the names that the last call has found for the same network are used again: every step of
        training takes less time. Tensors may have been replaced since, by a move to a device or by loading.
        """
        if not (reuse and self._found and self._found[0] is model):
            found = [owner for owner in self._owners(model) if owner[0] in self._buffers]
            self._found = [model, [name for name, _, _ in found], [owner[1:] for owner in found]]
        _, names, owners = self._found
        return [self._buffers[name] for name in names], [owner[key].detach() for owner, key in owners]
