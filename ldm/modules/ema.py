"""Exponential moving average of the weights of a network and of further trained parts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ldm.util import ConfigError

Part = nn.Module | nn.Parameter


class LitEma(nn.Module):
    """Averages of trainable parameters, stored as buffers that are named after the parameters without dots.

    After n updates the decay is ``min(decay, (1 + n) / (10 + n))``, so that early averages follow the weights quickly.
    An update consists of three fused operations on the device, without synchronization.

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
        self._register(model)

    def add(self, name: str, part: Part) -> None:
        """Average a further module or parameter, under buffers named ``<name><parameter name without dots>``.

        It is averaged and replaced together with the network.
        """
        self._extra[name] = part
        self._register(None)

    def _register(self, model: nn.Module | None) -> None:
        for name, parameter in self._named(model):
            if parameter.requires_grad and name not in self._buffers:
                self.register_buffer(name, parameter.detach().clone())

    @torch.no_grad()
    def forward(self, model: nn.Module) -> None:
        """Move the averages towards the parameters: average -= (1 - decay) (average - parameter)."""
        averages, parameters = self._pairs(model)
        counts = self.num_updates >= 0
        self.num_updates += counts.to(self.num_updates.dtype)
        warm_up = (1 + self.num_updates) / (10 + self.num_updates)
        decay = torch.where(counts, torch.minimum(self.decay, warm_up), self.decay)
        steps = torch._foreach_sub(averages, parameters)
        torch._foreach_mul_(steps, 1 - decay)
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

    def _named(self, model: nn.Module | None) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters of the network, if given, and of the extra parts with the names of their buffers."""
        for prefix, part in {"": model, **self._extra}.items():
            if isinstance(part, nn.Parameter):
                yield prefix, part
            elif part is not None:
                for name, parameter in part.named_parameters():
                    yield prefix + name.replace(".", ""), parameter

    def _pairs(self, model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
        """Return the averages and the parameters in the same order."""
        buffers = dict(self.named_buffers())
        averaged = [(name, parameter) for name, parameter in self._named(model) if name in buffers]
        return [buffers[name] for name, _ in averaged], [parameter.detach() for _, parameter in averaged]
