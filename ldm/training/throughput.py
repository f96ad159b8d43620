"""Operations of a training step, and their share of those that the device can do.

The limit is measured, not looked up: a matrix product in the precision of the run, for a tenth of a second, when the
speed is first shown. Matrix products and convolutions are counted, as is usual for the share of the peak of a GPU;
a multiplication and an addition are two operations.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

_SIDES = {"cpu": 1024, "cuda": 8192}  # of the matrices
_DTYPES = {"bf16": torch.bfloat16, "16": torch.float16, "64": torch.float64}  # by the first part of a precision


def precision_dtype(precision: str | int) -> torch.dtype:
    """Return the type of numbers of matrix products for a Lightning precision, such as ``bf16-mixed``."""
    return _DTYPES.get(str(precision).partition("-")[0], torch.float32)


def measure_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.05) -> float:
    """Return the operations per second of a matrix product, of which several are computed for ``seconds``.

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


@dataclass
class Throughput:
    """Images, time and waiting of a part of a training.

    Attributes:
        images: on all devices.
        seconds: without validations.
        waited: seconds in which the next batch was not ready.
        batches: on each device.
    """

    images: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    batches: int = 0

    def __iadd__(self, other: Throughput) -> Throughput:
        """Add another part."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)
        return self

    def describe(self, operations_per_image: float | None = None, peak: float | None = None) -> str:
        """Return images per second, the share of the ``peak`` of all devices, if known, and the share of waiting.

        Empty for a single batch of less than a second, which includes preparations.
        """
        if self.seconds < 1 and self.batches < 2:
            return ""
        seconds = max(self.seconds, 1e-6)
        speed, waiting = self.images / seconds, min(1.0, self.waited / seconds)
        shown = [f"{speed:.0f} images/s", f"{100 * waiting:.0f} % waiting for data"]
        if operations_per_image is not None and peak is not None:
            shown.insert(1, f"{100 * operations_per_image * speed / peak:.0f} % of peak")
        return ", ".join(shown)
