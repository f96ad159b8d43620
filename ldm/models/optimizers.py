"""Optimizers of the models: Adam and AdamW by one fused kernel."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.optim import Adam, AdamW, Optimizer

_DEVICES = ("cpu", "cuda")  # with fused kernels


def fused(kind: type[Adam] | type[AdamW], parameters: Iterable[Any], **options: Any) -> Optimizer:
    """Return an optimizer that updates all parameters by one kernel, where their device has it.

    The default of torch is a dozen kernels, on a CPU for each tensor. Checkpoints are exchangeable: the state of
    another implementation is taken over.

    Args:
        kind: class of the optimizer.
        parameters: parameters, or groups of them, of one device.
        **options: of the optimizer, such as ``lr``.
    """
    given = list(parameters)
    tensors = [each for entry in given for each in (entry["params"] if isinstance(entry, dict) else [entry])]
    has_kernel = all(tensor.device.type in _DEVICES and tensor.is_floating_point() for tensor in tensors)
    optimizer = kind(given, fused=has_kernel or None, **options)
    # Fused kernels can also divide by the scale of gradients. Lightning would then leave it to them, and refuse to clip
    # gradients in mixed precision, in bf16 too, which has no scale.
    optimizer._step_supports_amp_scaling = False
    optimizer.register_load_state_dict_pre_hook(_keep_implementation)
    return optimizer


def _keep_implementation(optimizer: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
    """Return a saved state with the implementation of ``optimizer``; torch would change to that of the checkpoint."""
    own = {name: optimizer.defaults[name] for name in ("fused", "foreach")}
    return {**saved, "param_groups": [{**group, **own} for group in saved["param_groups"]]}
