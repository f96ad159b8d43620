"""Exponential moving average of a network's weights."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ldm.util import ConfigError


class LitEma(nn.Module):
    """Averages of the parameters that train, kept as buffers named after them without the dots.

    After n updates the rate is ``min(decay, (1 + n) / (10 + n))``, so that early averages forget the start quickly.
    Everything stays on the device: an update is three fused operations and no synchronisation.

    Args:
        model: the network; parameters that do not require a gradient now are left out.
        decay: final rate, in [0, 1].
        use_num_updates: warm the rate up; False uses ``decay`` from the start.
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999, use_num_updates: bool = True) -> None:
        super().__init__()
        if not 0.0 <= decay <= 1.0:
            raise ConfigError(f"the decay of the moving average is {decay}; expected a number between 0 and 1.")
        self.register_buffer("decay", torch.tensor(decay, dtype=torch.float32))
        self.register_buffer("num_updates", torch.tensor(0 if use_num_updates else -1, dtype=torch.int))
        self.buffer_names = {
            name: name.replace(".", "") for name, parameter in model.named_parameters() if parameter.requires_grad
        }
        parameters = dict(model.named_parameters())
        for name, buffer_name in self.buffer_names.items():
            self.register_buffer(buffer_name, parameters[name].detach().clone())
        self._stored: list[Tensor] = []

    @torch.no_grad()
    def forward(self, model: nn.Module) -> None:
        """Move the averages towards the model's parameters: average -= (1 - rate) (average - parameter)."""
        averages, parameters = self._pairs(model)
        counts = self.num_updates >= 0
        self.num_updates += counts.to(self.num_updates.dtype)
        warm_up = (1 + self.num_updates) / (10 + self.num_updates)
        rate = torch.where(counts, torch.minimum(self.decay, warm_up), self.decay)
        steps = torch._foreach_sub(averages, parameters)
        torch._foreach_mul_(steps, 1 - rate)
        torch._foreach_sub_(averages, steps)

    @torch.no_grad()
    def restart(self, model: nn.Module) -> None:
        """Forget the past: the averages become the model's parameters."""
        averages, parameters = self._pairs(model)
        torch._foreach_copy_(averages, parameters)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Put the averages in place of the model's parameters."""
        averages, parameters = self._pairs(model)
        torch._foreach_copy_(parameters, averages)

    def store(self, parameters: Iterable[nn.Parameter]) -> None:
        """Keep a copy of parameters for :meth:`restore`."""
        self._stored = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def restore(self, parameters: Iterable[nn.Parameter]) -> None:
        """Put back what :meth:`store` kept and forget it."""
        torch._foreach_copy_(list(parameters), self._stored)
        self._stored = []

    def _pairs(self, model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
        """The averages and the model's parameters in the same order."""
        buffers, parameters = dict(self.named_buffers()), dict(model.named_parameters())
        averages = [buffers[buffer_name] for buffer_name in self.buffer_names.values()]
        return averages, [parameters[name].detach() for name in self.buffer_names]
