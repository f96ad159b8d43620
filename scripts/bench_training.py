"""Compare training steps of ``ldm`` with the plain way, and with what the machine can do.

    python scripts/bench_training.py                                   # everything, half an hour on a CPU
    python scripts/bench_training.py --networks --steps 5              # the references' four networks, 16 images
    python scripts/bench_training.py --stages clip_disdiff vq --parts  # two stages of the quickstart and their parts
    python scripts/bench_training.py --stages full_disdiff --device cuda --batch-size 128 --json speed.json

A network is trained alone: forward and backward pass, optimizer, moving average. A stage is the whole training step of
a shipped config, with frozen first stage, condition and disentangling loss, on a batch of its data (``full_...``: in
the size of the references). Weights are random. The plain way (``plain_training.py``) has the same weights and inputs:
float32, one pass per unit, attention by einsum, loops over parameters. Steps of all ways alternate within one process,
after steps that are not counted; times and ratios are medians. Operations are those of matrix products and
convolutions, as executed; the peak is that of a matrix product in the same precision. The last two columns are the
relative differences of loss and gradients in float32 from the plain way, before the first update.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import logging
import platform
import statistics
import sys
import tempfile
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from bench_cases import NETWORKS, PLAIN, PRECISIONS, STAGES, Bench, Case, Way
from bench_parts import WARM_UP, Clock, data_seconds, lightning_seconds, seconds_of_parts
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ldm.models.contexts import chosen_device
from ldm.training.cli import run_command
from ldm.training.throughput import device_time, measure_peak, precision_dtype
from ldm.util import UserError

WIDTH = 150  # of the tables, at least
CONVOLUTIONS = (torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default)


@dataclass
class Result:
    """Figures of one way of a case; None where they do not apply."""

    case: str
    way: str
    batch_size: int
    seconds: float
    images_per_second: float
    operations: float
    share_of_peak: float
    convolution_share: float | None  # of the peak, during convolutions alone
    convolution_time: float  # share of the time of a step
    memory_bytes: int
    ratio: float  # seconds of the plain way / seconds, median over rounds
    loss_difference: float | None = None
    gradient_difference: float | None = None
    parts: dict[str, float] | None = None  # seconds


def make_clock(device: torch.device, kind: str) -> Clock:
    """Return a clock in seconds that waits for the device: by the wall, or of the processor per thread."""

    def wall() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return functools.partial(device_time, device) if kind == "processor" else wall


# Measurements ------------------------------------------------------------------------------------------------------


def differences(way: Way, plain: Way, batch: Mapping[str, Any]) -> tuple[float, float]:
    """Return the relative differences of the losses and of all gradients of two ways on a batch."""
    losses, gradients = [], []
    for each in (way, plain):
        torch.manual_seed(1)
        losses.append(torch.stack([loss.float() for loss in each.step(batch, updates=False)]))
        gradients.append(each.gradients())
    ours, theirs = gradients
    if ours.keys() != theirs.keys():
        raise UserError(f"{way.name}: expected gradients of {len(theirs)} parameters, got {len(ours)}")
    squares = sum((ours[name] - theirs[name]).double().square().sum() for name in theirs)
    norm = sum(gradient.double().square().sum() for gradient in theirs.values())
    loss = ((losses[0] - losses[1]).abs() / losses[1].abs()).max()
    return float(loss), float((squares / norm).sqrt())


def operations_of_convolutions(counter: FlopCounterMode) -> int:
    """Return the operations of the convolutions among those that were counted."""
    counts = counter.get_flop_counts().get("Global", {})
    return sum(count for kind, count in counts.items() if "conv" in str(kind))


class StepTrace(TorchDispatchMode):
    """Context that measures the time of convolutions and the largest size of all tensors, which both take time.

    Attributes:
        seconds: of the convolutions.
        largest: bytes of the tensors that were allocated in the context and in use at the same time.
    """

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.seconds, self.largest = 0.0, 0
        self._clock, self._current, self._known = clock, 0, weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation."""
        is_timed = func in CONVOLUTIONS
        start = self._clock() if is_timed else 0.0
        result = func(*args, **(kwargs or {}))
        if is_timed:
            self.seconds += self._clock() - start
        for each in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(each, Tensor):
                self._add(each.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage not in self._known:
            self._known.add(storage)
            self._current += storage.nbytes()
            self.largest = max(self.largest, self._current)
            weakref.finalize(storage, self._release, storage.nbytes())

    def _release(self, num_bytes: int) -> None:
        self._current -= num_bytes


def traced_step(way: Way, batch: Mapping[str, Any], clock: Clock) -> tuple[FlopCounterMode, float, int]:
    """Return the operations of a step, the seconds of its convolutions, and the largest size of all tensors."""
    with FlopCounterMode(display=False) as counter:
        way.step(batch)
    states = [value for each in way.optimizers for state in each.state.values() for value in state.values()]
    resident = [*way.model.parameters(), *way.model.buffers(), *(each for each in states if isinstance(each, Tensor))]
    with StepTrace(clock) as trace:
        way.step(batch)
    return counter, trace.seconds, trace.largest + sum(each.numel() * each.element_size() for each in resident)


def measure(
    case: Case,
    ways: Sequence[Way],
    batch: Mapping[str, Any],
    peaks: Mapping[str, float],
    steps: int,
    clock: Clock,
    advance: Callable[[], None],
) -> list[Result]:
    """Time the steps of all ways in turn."""
    by_name, found = {way.name: way for way in ways}, []
    plain, size = by_name[PLAIN], len(batch["image"])
    compared = differences(by_name["fp32"], plain, batch) if "fp32" in by_name else (None, None)
    traces = {}
    for way in ways:
        way.step(batch)
        traces[way.name] = traced_step(way, batch, clock)
        advance()
    for round_index in range(WARM_UP - 1 + steps):
        for way in ways:
            start = clock()
            way.step(batch)
            if round_index >= WARM_UP - 1:
                way.seconds.append(clock() - start)
        advance()
    for way in ways:
        counter, convolution_seconds, memory = traces[way.name]
        seconds, peak = statistics.median(way.seconds), peaks["fp32" if way.is_plain else way.name]
        found.append(
            Result(
                case.title,
                way.name,
                size,
                seconds,
                size / seconds,
                counter.get_total_flops(),
                counter.get_total_flops() / seconds / peak,
                operations_of_convolutions(counter) / convolution_seconds / peak if convolution_seconds else None,
                convolution_seconds / seconds,
                memory,
                statistics.median(theirs / ours for theirs, ours in zip(plain.seconds, way.seconds)),
                *(compared if way.name == "fp32" else (None, None)),
            )
        )
    return found


def add_parts(
    bench: Bench,
    case: Case,
    ways: Sequence[Way],
    batch: Mapping[str, Any],
    results: list[Result],
    clock: Clock,
    steps: int,
) -> None:
    """Measure the parts of our ways."""
    for way, result in zip(ways, results):
        if not way.is_plain:
            result.parts = seconds_of_parts(way, batch, clock, steps)
            if not case.is_network:
                result.parts["Lightning"] = lightning_seconds(bench, case, batch, way, clock, steps)
                result.parts["data"] = data_seconds(bench, case, clock)


# Output ------------------------------------------------------------------------------------------------------------


def machine(device: torch.device) -> dict[str, str]:
    """Return processor or GPU, threads and versions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    found = {"processor": names[0] if names else platform.processor(), "threads": str(torch.get_num_threads())}
    if device.type == "cuda":
        found["GPU"] = torch.cuda.get_device_name(device)
    return {**found, "python": platform.python_version(), "torch": torch.__version__, "lightning": pl.__version__}


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def show(results: Sequence[Result], console: Console) -> None:
    """Print the table of all steps."""
    headings = ("case", "B", "way", "s / step", "images/s", "GFLOP", "of peak", "convolutions", "their time", "MiB")
    table = Table(*headings, "ratio", "loss", "gradient", title="training steps")
    for column in table.columns[3:]:
        column.justify = "right"
    for index, found in enumerate(results):
        if index and results[index - 1].case != found.case:
            table.add_section()
        compared = (found.loss_difference, found.gradient_difference)
        table.add_row(
            found.case,
            str(found.batch_size),
            found.way,
            f"{found.seconds:.3f}",
            f"{found.images_per_second:.0f}" if found.images_per_second >= 10 else f"{found.images_per_second:.1f}",
            f"{found.operations / 1e9:.1f}",
            _share(found.share_of_peak),
            _share(found.convolution_share),
            _share(found.convolution_time),
            f"{found.memory_bytes / 2**20:.0f}",
            f"{found.ratio:.2f}x",
            *("" if each is None else f"{each:.0e}" for each in compared),
        )
    console.print(table)


def show_parts(results: Sequence[Result], console: Console) -> None:
    """Print a table of the parts of each step."""
    for found in results:
        if found.parts:
            whole = sum(found.parts.values())
            table = Table("part", "ms", "share", title=f"{found.case}, {found.way}")
            for name, seconds in sorted(found.parts.items(), key=lambda each: -each[1]):
                table.add_row(name, f"{seconds * 1e3:.1f}", f"{seconds / whole:.3f}")
            console.print(table)


def read_options(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = {"networks": [case.name for case in NETWORKS], "stages": [case.name for case in STAGES]}
    for group, choices in names.items():
        text = f"by default all: {', '.join(choices)}"
        parser.add_argument(f"--{group}", nargs="*", choices=choices, metavar="NAME", help=text)
    parser.add_argument(
        "--precision", nargs="+", choices=PRECISIONS, default=["fp32", "bf16"], help="of our steps (default: fp32 bf16)"
    )
    parser.add_argument("--steps", type=int, default=5, help="measured steps of each way (default: 5)")
    parser.add_argument("--batch-size", type=int, help="default: that of the config, and 16 in the references' sizes")
    parser.add_argument("--parts", action="store_true", help="also divide the time of a step among its parts")
    parser.add_argument("--device", help="default: the GPU if there is one")
    parser.add_argument("--threads", type=int, help="of torch on the CPU (default: one per core)")
    parser.add_argument("--clock", choices=("wall", "processor"), default="wall", help="processor: for busy machines")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="keys of all configs, after `--`")
    options = parser.parse_args(words)
    if options.steps < 1 or (options.threads or 1) < 1:
        parser.error("--steps, --threads: expected at least 1")
    return options


def chosen_cases(options: argparse.Namespace) -> list[Case]:
    """Return the named networks and stages; all of them if neither option is given."""
    groups = ((options.networks, NETWORKS), (options.stages, STAGES))
    is_all = options.networks is None and options.stages is None
    found = [(case, named) for named, cases in groups for case in cases if is_all or named is not None]
    return [case for case, named in found if not named or case.name in named]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Leave out the messages and warnings of Lightning, which are meant for a run."""
    lightning = logging.getLogger("pytorch_lightning")
    level = lightning.level
    lightning.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        lightning.setLevel(level)


def run(options: argparse.Namespace) -> None:
    if options.threads:
        torch.set_num_threads(options.threads)
    device, console, cases, results = chosen_device(options.device), Console(), chosen_cases(options), []
    console.width, clock, about = max(console.width, WIDTH), make_clock(device, options.clock), machine(device)
    dtypes = {name: precision_dtype(PRECISIONS[name]) for name in dict.fromkeys(["fp32", *options.precision])}
    peaks = {name: measure_peak(device, dtype, seconds=0.5) for name, dtype in dtypes.items()}
    console.print(", ".join(f"{key} {value}" for key, value in about.items()), highlight=False)
    shown = ", ".join(f"{name} {peak / 1e9:.0f} GFLOP/s" for name, peak in peaks.items())
    console.print(f"peak of a matrix product: {shown}", highlight=False)
    try:
        with quiet(), tempfile.TemporaryDirectory() as folder, Progress(console=console, transient=True) as progress:
            bench = Bench(device, Path(folder), options.overrides, options.batch_size)
            rounds = options.steps + WARM_UP - 1 + len(options.precision) + 1
            task = progress.add_task("", total=rounds * len(cases))
            for case in cases:
                progress.update(task, description=case.title)
                ways, batch = bench.ways(case, options.precision)
                found = measure(case, ways, batch, peaks, options.steps, clock, lambda: progress.advance(task))
                if options.parts:
                    add_parts(bench, case, ways, batch, found, clock, options.steps)
                results += found
    finally:  # also if it is interrupted
        show(results, console)
        show_parts(results, console)
        if options.json:
            figures = [asdict(found) for found in results]
            options.json.write_text(json.dumps({"machine": about, "peaks": peaks, "results": figures}, indent=1))


def main(arguments: Sequence[str] | None = None) -> int:
    options = read_options(arguments)
    return run_command(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
