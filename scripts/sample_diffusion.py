"""Sample a trained diffusion model and write the samples as an array and as a picture:

    python scripts/sample_diffusion.py -r logs/2026-01-31T12-00-00_shapes3d-vq-4-16 -n 64 -c 50
    python scripts/sample_diffusion.py -r model.ckpt --base configs/latent-diffusion/shapes3d-vq-4-16.yaml
    python scripts/sample_diffusion.py -r RUN --sampler dpm_solver -c 20
    python scripts/sample_diffusion.py -r RUN --swap          # the effect of each unit (DisDiff, EncDiff, CLIP-DisDiff)
    python scripts/sample_diffusion.py -r RUN --text "red floor | | small object | | | "      # CLIP-DisDiff
    python scripts/sample_diffusion.py -r model.ckpt -b txt2img.yaml --text "a red cube" --guidance_scale 5
    python scripts/sample_diffusion.py -r model.ckpt -b v1-inference.yaml --text "a hill" --text "a lake" -n 8 \
        --guidance_scale 7.5 --negative_text "blurred" --size 512 768 --sampler plms
    python scripts/sample_diffusion.py -r model.ckpt -b cin256.yaml --class 25 187 --guidance_scale 3

Conditions that are not given are read from random images of the config's data: from the first of test, validation and
train that has them; so are masks, masked images and other maps. Samples have the size of these images, else of the
training data, else of the config, unless --size is given. Words of the form key=value change the config as in main.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import sys
import time
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ldm.diffusion.samplers import SAMPLERS, build_sampler
from ldm.evaluation.sampling.job import SamplingJob, write_samples
from ldm.evaluation.sampling.request import Request, choose_sampler, split_text
from ldm.models.contexts import chosen_device
from ldm.models.contracts import Samplable
from ldm.runs.disk import require_writable
from ldm.runs.folder import now_text
from ldm.runs.load import load_run
from ldm.training.cli import run_command, split_overrides

DDIM = {"num_steps": 50, "eta": 1.0}


def read_options(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, default = parser.add_argument, Request()
    add("-r", "--resume", required=True, metavar="PATH", help="run folder, model-zoo folder or checkpoint")
    add("-b", "--base", nargs="+", default=[], metavar="YAML", help="configs merged over those beside the checkpoint")
    add("-n", "--n_samples", type=int, default=default.count, help="samples; with --swap columns (%(default)s)")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--sampler", metavar="NAME", help=f"{', '.join(SAMPLERS)} or package.module.Class (ddim)")
    kind.add_argument("-v", "--vanilla_sample", action="store_true", help="the same as --sampler ddpm: all time steps")
    add("-c", "--custom_steps", type=int, metavar="N", help="steps of the sampler (50 for ddim)")
    add("-e", "--eta", type=float, help="eta of ddim: 0 deterministic, 1 as DDPM (1)")
    add("-l", "--logdir", metavar="DIR", help="write to <DIR>/samples/<checkpoint>/<time> (the run folder)")
    add("--batch_size", type=int, default=default.batch_size, help="samples at once (%(default)s)")
    add("-s", "--seed", type=int, default=default.seed, help="seed of noise and conditions (%(default)s)")
    add("--unit", type=int, metavar="K", help="use the gradient of unit K only, counted from 1")
    add("--swap", action="store_true", help="one row per unit, in which all samples take that unit of the first one")
    add("--text", action="append", default=[], help="one text, or one per unit separated by |; repeatable")
    add("--negative_text", metavar="TEXT", help="text that guidance leads away from (no text)")
    add("--size", type=int, nargs=2, metavar=("H", "W"), help="height and width of the images, pixels")
    add("--class", dest="classes", type=int, nargs="+", default=[], metavar="C", help="classes, from 0, used in turn")
    add("--guidance_scale", type=float, default=default.guidance, help="scale of guidance; 1 for none (%(default)s)")
    add("--device", help="device (cuda if there is one, else cpu)")
    return parser.parse_args(words)


def request_of(options: argparse.Namespace) -> Request:
    if options.vanilla_sample:  # as in latent-diffusion, -c and -e have no effect beside -v
        sampler = choose_sampler("ddpm", {})
    else:
        sampler = choose_sampler(options.sampler, DDIM, num_steps=options.custom_steps, eta=options.eta)
    return Request(
        count=options.n_samples,
        batch_size=options.batch_size,
        sampler=sampler,
        seed=options.seed,
        unit=None if options.unit is None else options.unit - 1,
        swap=options.swap,
        texts=tuple(split_text(text) for text in options.text),
        classes=tuple(options.classes),
        negative_text=options.negative_text,
        size=None if options.size is None else tuple(options.size),
        guidance=options.guidance_scale,
    )


def run(options: argparse.Namespace, overrides: list[str]) -> list[Path]:
    request = request_of(options)
    loaded = load_run(options.resume, options.base, overrides, needs=Samplable)
    require_writable(options.logdir or loaded.folder, "Choose another folder with -l")
    configured = (loaded.config.section("model").get("params") or {}).get("sampler")
    if configured and not options.vanilla_sample and {options.sampler, options.custom_steps, options.eta} == {None}:
        request = dataclasses.replace(request, sampler=build_sampler(configured))
    loaded.model.to(chosen_device(options.device))
    columns = (TextColumn("steps"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    started = time.monotonic()
    progress = Progress(*columns)
    job = SamplingJob(loaded, request, lambda done: progress.update(task, completed=done))
    task = progress.add_task("steps", total=job.total_steps)
    with progress:
        grid = job.swaps() if request.swap else None
        images = job.samples() if grid is None else grid.images
    folder = Path(options.logdir or loaded.folder) / "samples" / loaded.checkpoint.stem / now_text()
    record = {"checkpoint": str(loaded.checkpoint), "configs": list(loaded.config.files), "overrides": overrides}
    record |= {"seconds": round(time.monotonic() - started, 2), **request.record()}
    return write_samples(folder, images, grid, record)


def main(arguments: list[str] | None = None) -> int:
    words, overrides = split_overrides(sys.argv[1:] if arguments is None else list(arguments))
    options = read_options(words)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("ldm").setLevel(logging.INFO)
    return run_command(lambda: print(*run(options, overrides), sep="\n"))


if __name__ == "__main__":
    sys.path.append(os.getcwd())  # for samplers and models in files of the current folder
    sys.exit(main())
