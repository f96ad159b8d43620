"""Edit generated and real images along latent directions:

    python scripts/edit.py -r RUN_OF_NOISECLR -d 3:4.0 -d "<t7>:-2.0:0:30" --text "a red cube" -n 4 --seed 0 -o out/
    python scripts/edit.py -r RUN_OF_NOISECLR --grid 3=-8,-4,0,4,8 --gif      # rows: images, columns: strengths
    python scripts/edit.py -r RUN_OF_NOISECLR --grid 3=-4,0,4 --grid 5=-4,0,4 -d 9:2    # one picture per image
    python scripts/edit.py -r RUN_OF_NOISECLR -d 3:4 --image a.png b.png
    python scripts/edit.py -r RUN_OF_NOISECLR -d 3:4 --image a.png --text "a red cube" --null_text
    python scripts/edit.py --denoiser RUN --directions faces=a.safetensors art=b.safetensors \\
        -d "faces/<t1>" -d "art/<t2>:5"
    python scripts/edit.py --denoiser stable-diffusion-v1-5/stable-diffusion-v1-5 --directions learned_embeds.bin -d 1:5

A direction is named by its token, or by its number from 1; several are applied together. START and END are the first
and the last step of the sampler in which it acts, from 0 for the noisiest. Real images are inverted by DDIM and sampled
again without guidance, or with guidance by null-text optimisation, which needs a text that describes them.

Directions are those of the run, or of files and other runs of NoiseCLR (--directions) that belong to the same denoiser:
directions.safetensors, learned_embeds.bin, textual inversion, or a pipeline of diffusers with learned tokens. With
several of these, names begin with the name before "=", by default that of the file.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import math
import os
import re
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from ldm.training.cli import run_command
from ldm.util import ConfigError, UserError

logger = logging.getLogger("ldm.edit")

STRENGTH = 7.5  # of the reference code


class Change(NamedTuple):
    """A direction with one strength, or with all strengths of a grid."""

    name: str
    strengths: tuple[float, ...]
    start: int = 0
    end: int | None = None

    def caption(self, strength: float) -> str:
        last = "last" if self.end is None else self.end
        steps = "" if (self.start, self.end) == (0, None) else f", steps {self.start} to {last}"
        return f"{self.name}: {strength:+g}{steps}"


def direction(word: str) -> Change:
    """Read NAME[:STRENGTH[:START[:END]]]."""
    name, *rest = word.split(":")
    return _change(word, "NAME[:STRENGTH[:START[:END]]]", name, rest[:1] or [str(STRENGTH)], rest[1:])


def grid(word: str) -> Change:
    """Read NAME=STRENGTH,STRENGTH,...[:START[:END]]."""
    name, _, rest = word.rpartition("=")
    strengths, *steps = rest.split(":")
    return _change(word, "NAME=STRENGTH,STRENGTH,...[:START[:END]]", name, strengths.split(","), steps)


def _change(word: str, form: str, name: str, strengths: list[str], steps: list[str]) -> Change:
    try:
        change = Change(name, tuple(map(float, strengths)), *map(int, steps))
    except (ValueError, TypeError) as error:
        raise argparse.ArgumentTypeError(f"expected {form} with numbers, got {word!r}") from error
    if not name or not all(map(math.isfinite, change.strengths)):
        raise argparse.ArgumentTypeError(f"expected {form} with finite numbers, got {word!r}")
    if change.start < 0 or (change.end is not None and change.end < change.start):
        raise argparse.ArgumentTypeError(f"expected {form} with 0 <= START <= END, got {word!r}")
    return change


def read_options(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("-r", "--resume", metavar="RUN", help="run of NoiseCLR: its directions and its denoiser")
    model.add_argument("--denoiser", metavar="RUN", help="run folder or checkpoint of a diffusion model, or a pipeline")
    add("-b", "--base", nargs="+", default=[], metavar="YAML", help="configs of a checkpoint that has none beside it")
    add("--directions", nargs="+", default=[], metavar="[NAME=]PATH", help="files of directions, or runs of NoiseCLR")
    add(
        "-d",
        "--direction",
        type=direction,
        action="append",
        default=[],
        metavar="NAME[:STRENGTH[:START[:END]]]",
        help=f"edit along a direction (strength {STRENGTH}, all steps); repeatable",
    )
    add(
        "--grid",
        type=grid,
        action="append",
        default=[],
        metavar="NAME=S,S,...",
        help="vary the strength of a direction; given twice: of two directions against each other",
    )
    add("--text", action="append", default=[], help="text of the images; several are used in turn")
    add("--negative_text", metavar="TEXT", help="text that guidance leads away from (no text)")
    add("--image", nargs="+", default=[], metavar="FILE", help="edit these images instead of generated ones")
    add("--null_text", action="store_true", help="learn null conditions with which guidance gives the images again")
    add("-n", "--n_samples", type=int, help="generated images (4)")
    add("--batch_size", type=int, default=4, help="images at once (%(default)s)")
    add("-s", "--seed", type=int, default=0, help="seed of the noise (%(default)s)")
    add("--sampler", metavar="NAME", help="ddim, ddpm, plms, dpm_solver or package.module.Class (ddim)")
    add("-c", "--custom_steps", type=int, metavar="N", help="steps of the sampler (50 for ddim)")
    add("-e", "--eta", type=float, help="eta of ddim: 0 deterministic, 1 as DDPM (0)")
    add("--guidance_scale", type=float, help="scale of guidance; 1 for none (7.5 with --text)")
    add(
        "-o",
        "--output",
        type=Path,
        metavar="DIR",
        help="folder to write (<run>/edits/<time>; edits/<time> for pipelines)",
    )
    add("--gif", action="store_true", help="also write an animation of one --grid")
    add("--device", help="device (cuda if there is one, else cpu)")
    options = parser.parse_args(words)
    if problem := _problem(options):
        parser.error(problem)
    return options


def _problem(options: argparse.Namespace) -> str:
    """Return what is wrong with a combination of options; an empty string if nothing is."""
    given, scale = options.image, options.guidance_scale
    return {
        not options.direction and not options.grid: "expected at least one -d or --grid, got none",
        len(options.grid) > 2: f"--grid: expected at most two, got {len(options.grid)}",
        options.gif and len(options.grid) != 1: f"--gif: expected one --grid, got {len(options.grid)}",
        bool(options.denoiser and not options.directions): "--denoiser: expected --directions FILE beside it, got none",
        min(options.batch_size, 1 if options.n_samples is None else options.n_samples) < 1: (
            f"-n, --batch_size: expected at least 1, got {options.n_samples}, {options.batch_size}"
        ),
        bool(given and options.n_samples): "-n: expected either -n or --image, got both",
        bool(given and options.negative_text is not None): "--negative_text: expected generated images, got --image",
        options.null_text and not given: "--null_text: expected --image FILE beside it, got none",
        bool(given and not options.null_text and scale not in (None, 1)): (
            "--guidance_scale: expected --null_text beside it for real images, which guidance changes otherwise"
        ),
        not options.text and scale not in (None, 1): "--guidance_scale: expected --text beside it, got none",
        options.negative_text is not None and (not options.text or scale == 1): (
            "--negative_text: expected --text and a --guidance_scale other than 1 beside it"
        ),
        scale is not None and not math.isfinite(scale): f"--guidance_scale: expected a finite number, got {scale}",
    }.get(True, "")


def load(options: argparse.Namespace) -> tuple[Any, Any, Path]:
    """Return the denoiser, the directions, and the folder of the run."""
    from ldm.models.diffusion.methods.noiseclr.directions import DirectionSet
    from ldm.models.diffusion.methods.noiseclr.model import NoiseCLR
    from ldm.runs.load import load_run

    sets: dict[str, DirectionSet] = {}
    for word in options.directions:
        name, _, path = word.rpartition("=")
        name = name or Path(path).stem
        if name in sets:
            raise ConfigError(f"--directions: expected different names, got {name!r} twice. Write NAME=PATH")
        sets[name] = DirectionSet.load(path)
    if options.resume:
        loaded = load_run(options.resume, options.base)
        if not isinstance(loaded.model, NoiseCLR):
            name = type(loaded.model).__name__
            raise UserError(
                f"-r {options.resume}: expected a run of NoiseCLR, got {name}. Name its directions with --directions, "
                "and other models with --denoiser"
            )
        denoiser, own, folder = loaded.model.denoiser, loaded.model.directions, loaded.folder
    else:
        own = next(iter(sets.values()))
        denoiser, folder = load_denoiser(options, "auto" if own.kind == "bottleneck" else own.kind)
    found = next(iter(sets.values()), own) if len(sets) < 2 else DirectionSet.joined(sets)
    for name, each in sets.items():
        each.check(denoiser, f"--directions {name}")
    return denoiser, found, folder


def load_denoiser(options: argparse.Namespace, row_space: str) -> tuple[Any, Path]:
    """Return the denoiser of --denoiser and the folder of its run; a pipeline has none."""
    from huggingface_hub import try_to_load_from_cache

    from ldm.models.diffusion.methods.noiseclr.denoiser import RunDenoiser
    from ldm.models.diffusion.methods.noiseclr.pipeline import PipelineDenoiser

    given, index = Path(options.denoiser).expanduser(), "model_index.json"
    if given.exists():
        is_pipeline = (given / index).is_file()
    else:
        is_name = re.fullmatch(r"[\w.-]+/[\w.-]+", options.denoiser)
        is_pipeline = is_name is not None and isinstance(try_to_load_from_cache(options.denoiser, index), str)
        if not is_pipeline:
            raise UserError(
                f"--denoiser {given}: expected a run, a checkpoint, the folder of a pipeline, or the name of one in "
                "the Hugging Face cache, got none of these. Correct the path"
            )
    if is_pipeline:
        return PipelineDenoiser(options.denoiser), Path()
    return RunDenoiser(str(given), options.base, row_space), given if given.is_dir() else given.parent


def read_images(paths: list[str], height: int, width: int) -> Any:
    """Return pictures as (N, 3, height, width) in [-1, 1]; those of another size are cropped and resized."""
    import numpy as np
    import torch
    from PIL import Image, ImageOps

    from ldm.data.formats.picture_files import decode_picture, to_array

    found = []
    for path in map(Path, paths):
        if not path.is_file():
            raise UserError(f"--image {path}: there is no such file. Correct the path")
        picture = decode_picture(path, str(path))
        if picture.size != (width, height):
            size = "{}x{} to {}x{}".format(*picture.size, width, height)
            logger.info("%s: cropped at the centre and resized from %s", path, size)
            picture = ImageOps.fit(picture, (width, height), Image.Resampling.BICUBIC)
        found.append(to_array(picture))
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).float() / 127.5 - 1


def run(options: argparse.Namespace) -> list[Path]:
    import torch
    from rich.console import Console
    from rich.progress import Progress

    from ldm.evaluation.directions.edit import Editor
    from ldm.evaluation.sampling.request import choose_sampler, describe_sampler
    from ldm.models.contexts import chosen_device
    from ldm.runs.disk import require_writable
    from ldm.runs.folder import now_text

    started, device = time.monotonic(), chosen_device(options.device)
    settings = {"num_steps": options.custom_steps, "eta": options.eta}
    is_given = any(value is not None for value in (options.sampler, *settings.values()))
    sampler = choose_sampler(options.sampler, {"num_steps": 50}, **settings) if is_given else None
    denoiser, directions, folder = load(options)
    require_writable(options.output or folder, "Choose another folder with --output")
    progress = Progress(console=Console(stderr=True), transient=True)
    task = progress.add_task("steps")
    editor = Editor(denoiser.to(device), directions, sampler, lambda: progress.advance(task))
    combinations = list(itertools.product(*(change.strengths for change in options.grid)))

    def edits(combination: tuple[float, ...]) -> list[Any]:
        changes = [(change, change.strengths[0]) for change in options.direction] + [*zip(options.grid, combination)]
        return [editor.edit(change.name, strength, change.start, change.end) for change, strength in changes]

    variants = [[], *map(edits, combinations)]
    real = read_images(options.image, *editor.image_size) if options.image else None
    count = len(options.image) or options.n_samples or 4
    noise, parts, scale = editor.noise(count, options.seed), [], 1.0
    passes = len(variants) + bool(options.image) + options.null_text
    batches = [range(first, min(first + options.batch_size, count)) for first in range(0, count, options.batch_size)]
    evaluations = editor.sampler.num_evaluations(editor.num_timesteps)
    progress.update(task, total=len(batches) * passes * evaluations)
    with progress:
        for rows in batches:
            texts = [options.text[row % len(options.text)] for row in rows] if options.text else []
            if real is not None:
                start = editor.inverted(real[rows], texts, options.guidance_scale, options.null_text)
            else:
                start = editor.generated(
                    noise[rows], texts, options.guidance_scale, options.negative_text, options.seed
                )
            scale = start.guidance_scale
            parts.append(torch.stack([editor.images(start, variant) for variant in variants]))
    images = torch.cat(parts, dim=1).transpose(0, 1)  # (N, 1 + V, 3, H, W), without edits first
    record: dict[str, Any] = {"run": options.resume or options.denoiser, "directions": options.directions}
    record |= {"finder": directions.finder, "kind": directions.kind, "fingerprint": denoiser.fingerprint()}
    record |= {key: vars(options)[key] for key in ("text", "negative_text", "image", "null_text", "seed")}
    record |= {"sampler": describe_sampler(editor.sampler), "guidance_scale": scale}
    record["variants"] = [
        [{**vars(edit), "name": directions.names[edit.direction]} for edit in variant] for variant in variants
    ]
    if real is not None:
        record["reconstruction_mse"] = (images[:, 0] - real).square().flatten(1).mean(1).tolist()
    record["seconds"] = round(time.monotonic() - started, 2)
    return write(options.output or folder / "edits" / now_text(), options, images, real, combinations, record)


def write(
    folder: Path, options: argparse.Namespace, images: Any, real: Any, combinations: list[Any], record: dict[str, Any]
) -> list[Path]:
    """Write the grids, the single images, the animation and the record; return the paths of all but single images."""
    import torch
    from PIL import Image

    from ldm.pictures.animation import save_gif
    from ldm.pictures.draw import draw_grid, save_png, to_pixels
    from ldm.pictures.grid import CaptionedGrid
    from ldm.runs.records import write_json

    fixed = ", ".join(change.caption(change.strengths[0]) for change in options.direction)
    names = [Path(path).name for path in options.image] or [
        options.text[row % len(options.text)] if options.text else f"image {row + 1}" for row in range(len(images))
    ]
    if len(options.grid) == 2:
        first, second = options.grid
        rows, columns = ([change.caption(strength) for strength in change.strengths] for change in options.grid)
        grids = {
            f"grid-{row:03d}": CaptionedGrid(images[row, 1:], rows, columns, ", ".join(filter(None, [name, fixed])))
            for row, name in enumerate(names)
        }
    else:
        edited = [options.grid[0].caption(*each) for each in combinations] if options.grid else [f"edited, {fixed}"]
        shown, columns = images, ["original" if real is None else "reconstruction", *edited]
        if real is not None:
            shown, columns = torch.cat([real[:, None], images], dim=1), ["original", *columns]
        grids = {"grid": CaptionedGrid(shown.flatten(0, 1), names, columns, fixed if options.grid else "")}
    written = [save_png(draw_grid(each), folder / f"{name}.png") for name, each in grids.items()]
    for row, variants in enumerate(images):
        for number, pixels in enumerate(to_pixels(variants)):
            save_png(Image.fromarray(pixels), folder / "images" / f"{row:03d}-{number:03d}.png")
    if options.gif:
        frames = [
            CaptionedGrid(images[:, 1 + number], [""], [""] * len(images), options.grid[0].caption(*each))
            for number, each in enumerate(combinations)
        ]
        written.append(save_gif([*frames, *frames[-2:0:-1]], folder / "edits.gif", milliseconds=200, hold=200))
    write_json(folder / "edit.json", record)
    return [*written, folder / "edit.json"]


def main(arguments: list[str] | None = None) -> int:
    options = read_options(sys.argv[1:] if arguments is None else list(arguments))
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("ldm").setLevel(logging.INFO)
    return run_command(lambda: print(*run(options), sep="\n"))


if __name__ == "__main__":
    sys.path.append(os.getcwd())  # for models in files of the current folder
    sys.exit(main())
