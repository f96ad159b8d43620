"""Operations of a training step, and their share of those that the device can do.

The limit is measured, not looked up: a matrix product in the precision of the run, for a fraction of a second, once at
the start of training. Matrix products and convolutions are counted, as is usual for the share of the peak of a GPU;
a multiplication and an addition are two operations.
"""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

_SIDES = {"cpu": 2048, "cuda": 8192}  # of the matrices
_DTYPES = {"bf16": torch.bfloat16, "16": torch.float16, "64": torch.float64}  # by the first part of a precision


class OperationCounter(FlopCounterMode):
    """Context in which the operations of both passes are counted, on real tensors and on those without values."""

    def __init__(self) -> None:
        super().__init__(display=False)

    @property
    def total(self) -> int:
        """Operations of all matrix products and convolutions."""
        return self.get_total_flops()

    @property
    def of_convolutions(self) -> int:
        """Operations of the convolutions."""
        counts = self.get_flop_counts().get("Global", {})
        return sum(count for kind, count in counts.items() if "conv" in str(kind))


def precision_dtype(precision: str | int) -> torch.dtype:
    """Return the type of numbers of matrix products for a Lightning precision, such as ``bf16-mixed``."""
    return _DTYPES.get(str(precision).partition("-")[0], torch.float32)


def measure_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.06) -> float:
    """Return the operations per second of a matrix product; a few times ``seconds`` are spent, and random states kept.

    The best of several products is taken, and on a CPU the processor time per thread instead of the wall-clock time, so
    that other work on the machine has little influence.
    """
    side = _SIDES.get(device.type, 2048)
    first = torch.full((side, side), 0.5, device=device, dtype=dtype)
    second, product = torch.full_like(first, 0.25), torch.empty_like(first)
    best = _product_seconds(first, second, product)  # the first product also loads kernels
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        best = min(best, _product_seconds(first, second, product))
    return 2 * side**3 / best


def _product_seconds(first: Tensor, second: Tensor, product: Tensor) -> float:
    start = device_time(first.device)
    torch.mm(first, second, out=product)
    return device_time(first.device) - start


def device_time(device: torch.device) -> float:
    """Return the processor time per thread of a CPU, or the wall-clock time after all work on a GPU, in seconds."""
    if device.type == "cpu":
        return time.process_time() / torch.get_num_threads()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def share_of_peak(operations: float | None, seconds: float, peak: float | None) -> float:
    """Return the share of ``peak`` (operations per second) that was reached; NaN if a part is not known."""
    if operations is None or not peak or seconds <= 0:
        return math.nan
    return operations / seconds / peak
