"""Compare training steps of NoiseCLR with the same computation written as its reference code does it.

    python scripts/bench_directions.py -r logs/quickstart/2026-01-31T12-00-00_text_attention
    python scripts/bench_directions.py -p stable-diffusion-v1-5 --device cuda --precision bf16 --use_checkpoint

Both ways take the same noised latents and directions. The reference encodes and denoises one direction after another,
and keeps the graph of the prediction without a condition. Steps of both alternate within one process; each consists of
the loss and its gradients with respect to the rows.
"""

from __future__ import annotations

import argparse
import functools
import platform
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from ldm.losses.directions import noiseclr_loss, unit_changes
from ldm.models.contexts import chosen_device
from ldm.models.diffusion.methods.noiseclr.model import NoiseCLR
from ldm.training.cli import run_command

NOISECLR = "ldm.models.diffusion.methods.noiseclr"
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def reference_loss(model: NoiseCLR, x: Tensor, t: Tensor, chosen: Tensor) -> Tensor:
    """Return the loss with one pass of the text encoder and of the network for each direction."""
    denoiser, count = model.denoiser, len(x)
    without = denoiser.predict_eps(x, t, denoiser.null(count))

    def changes(index: int) -> Tensor:
        cond = denoiser.conditions(model.rows[index][None].expand(count, -1))
        return unit_changes(denoiser.predict_eps(x, t, cond) - without)

    first, *others = chosen.tolist()
    own = changes(first)
    similarities = torch.stack([(own * changes(other)).sum(dim=1) for other in others])
    return noiseclr_loss(own, similarities, model.temperature)


def step_seconds(model: NoiseCLR, compute: Callable[[], Tensor], device: torch.device) -> tuple[float, float]:
    """Return the seconds of one step, and its loss."""
    model.rows.grad = None
    synchronize(device)
    start = time.perf_counter()
    loss = compute()
    loss.backward()
    synchronize(device)
    return time.perf_counter() - start, loss.item()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def read_options(words: list[str] | None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("-r", "--run", help="run of a model with a condition")
    source.add_argument("-p", "--pipeline", help="folder of a diffusers pipeline")
    parser.add_argument("-K", "--num_directions", type=int, default=32)
    parser.add_argument("-M", "--directions_per_iteration", type=int, default=16)
    parser.add_argument("-B", "--batch_size", type=int, default=6, help="images (default: 6)")
    parser.add_argument("-n", "--steps", type=int, default=10, help="steps of each way, after one that is not counted")
    parser.add_argument("--use_checkpoint", action="store_true", help="recompute activations in the backward pass")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of autocast")
    parser.add_argument("--device", help="default: the GPU if there is one")
    return parser.parse_args(words)


def run(options: argparse.Namespace) -> None:
    device = chosen_device(options.device)
    target, params = (
        (f"{NOISECLR}.denoiser.RunDenoiser", {"run": options.run})
        if options.run
        else (f"{NOISECLR}.pipeline.PipelineDenoiser", {"pretrained_model": options.pipeline})
    )
    torch.manual_seed(0)
    denoiser = {"target": target, "params": {**params, "use_checkpoint": options.use_checkpoint}}
    model = NoiseCLR(denoiser, options.num_directions, options.directions_per_iteration).to(device)
    x = torch.randn(options.batch_size, *model.denoiser.latent_shape, device=device)
    ways = {
        "reference": lambda t, chosen: reference_loss(model, x, t, chosen),
        "ours": lambda t, chosen: model.loss_at(x, t, chosen),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    losses, memory = dict.fromkeys(ways, 0.0), dict.fromkeys(ways, 0)
    dtype = PRECISIONS[options.precision]
    for _ in range(options.steps + 1):
        t, chosen = model.draw_timestep(len(x)), model.draw_directions()
        for name, loss_at in ways.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                taken, losses[name] = step_seconds(model, functools.partial(loss_at, t, chosen), device)
            seconds[name].append(taken)
            memory[name] = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"{hardware}, torch {torch.__version__}, Python {platform.python_version()}, {options.precision}")
    print(f"B {len(x)}, M {options.directions_per_iteration}, latents {tuple(model.denoiser.latent_shape)}")
    for name in ways:
        median = statistics.median(seconds[name][1:])
        shown = f", {memory[name] / 2**30:.1f} GiB" if memory[name] else ""
        print(f"{name:10s} {1 / median:8.3f} steps/s ({median:.3f} s){shown}, last loss {losses[name]:.5f}")
    ratio = statistics.median(a / b for a, b in zip(seconds["reference"][1:], seconds["ours"][1:]))
    print(f"ours is {ratio:.2f} times as fast (median of {options.steps} pairs)")


def main(arguments: list[str] | None = None) -> int:
    options = read_options(arguments)
    return run_command(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
