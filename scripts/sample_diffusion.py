"""Sample a trained diffusion model and write the samples as an array and as a picture:

    python scripts/sample_diffusion.py -r logs/2026-01-31T12-00-00_shapes3d-vq-4-16 -n 64 -c 50
    python scripts/sample_diffusion.py -r model.ckpt --base configs/latent-diffusion/shapes3d-vq-4-16.yaml
    python scripts/sample_diffusion.py -r RUN --swap            # what each unit does (DisDiff, EncDiff, CLIP-DisDiff)
    python scripts/sample_diffusion.py -r RUN --text "red floor | | small object | | | "      # CLIP-DisDiff
    python scripts/sample_diffusion.py -r model.ckpt -b txt2img.yaml --text "a red cube" --guidance_scale 5
    python scripts/sample_diffusion.py -r model.ckpt -b cin256.yaml --class 25 187 --guidance_scale 3

Models with a condition take it from images of the config's data; key=value words change the config as in main.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
import time
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ldm.evaluation.sampling.conditions import Request, split_text
from ldm.evaluation.sampling.job import Sampler, write_samples
from ldm.runs.folder import now_text
from ldm.runs.load import load_trained
from ldm.training.cli import split_overrides
from ldm.util import ConfigError, UserError


def read_options(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, default = parser.add_argument, Request()
    add("-r", "--resume", required=True, metavar="PATH", help="run folder, model-zoo folder or checkpoint")
    add("-b", "--base", nargs="+", default=[], metavar="YAML", help="configs, over those beside the checkpoint")
    add("-n", "--n_samples", type=int, default=default.count, help="samples (%(default)s); with --swap columns")
    add("-e", "--eta", type=float, default=default.eta, help="DDIM's eta: 0 deterministic, 1 as DDPM (%(default)s)")
    add("-v", "--vanilla_sample", action="store_true", help="DDPM over all time steps instead of DDIM")
    add("-l", "--logdir", metavar="DIR", help="where to write (the run's folder): <DIR>/samples/<checkpoint>/<time>")
    add("-c", "--custom_steps", type=int, default=default.num_steps, help="DDIM steps (%(default)s)")
    add("--batch_size", type=int, default=default.batch_size, help="samples at once (%(default)s)")
    add("-s", "--seed", type=int, default=default.seed, help="of noise and conditions (%(default)s)")
    add("--unit", type=int, metavar="K", help="the gradient of unit K alone, counted from 1")
    add("--swap", action="store_true", help="one row per unit, in which all samples take that unit of the first one")
    add("--text", action="append", default=[], help="one text, or one per unit separated by |; repeatable")
    add("--class", dest="classes", type=int, nargs="+", default=[], metavar="C", help="classes, from 0, in turn")
    add("--guidance_scale", type=float, default=default.guidance, help="towards texts or classes (%(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    return parser.parse_args(words)


def request_of(options: argparse.Namespace) -> Request:
    return Request(
        count=options.n_samples,
        batch_size=options.batch_size,
        num_steps=None if options.vanilla_sample else options.custom_steps,
        eta=options.eta,
        seed=options.seed,
        unit=None if options.unit is None else options.unit - 1,
        swap=options.swap,
        texts=tuple(split_text(text) for text in options.text),
        classes=tuple(options.classes),
        guidance=options.guidance_scale,
    )


def run(options: argparse.Namespace, overrides: list[str]) -> list[Path]:
    request = request_of(options)
    trained = load_trained(options.resume, options.base, overrides)
    trained.model.to(options.device)
    columns = (TextColumn("steps"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    started = time.monotonic()
    progress = Progress(*columns)
    sampler = Sampler(trained, request, lambda done: progress.update(task, completed=done))
    task = progress.add_task("steps", total=sampler.total_steps)
    with progress:
        grid = sampler.swaps() if request.swap else None
        images = sampler.samples() if grid is None else grid.images
    folder = Path(options.logdir or trained.folder) / "samples" / trained.checkpoint.stem / now_text()
    record = {"checkpoint": str(trained.checkpoint), "configs": list(trained.config.files), "overrides": overrides}
    record |= {"seconds": round(time.monotonic() - started, 2), **dataclasses.asdict(request)}
    return write_samples(folder, images, grid, record)


def main(arguments: list[str] | None = None) -> int:
    words, overrides = split_overrides(sys.argv[1:] if arguments is None else list(arguments))
    options = read_options(words)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("ldm").setLevel(logging.INFO)
    try:
        paths = run(options, overrides)
    except (ConfigError, UserError) as err:
        print(err, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    for path in paths:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
