"""Generate images from texts with a CLIP-guided DDPM:

    python scripts/generate.py --checkpoint model_checkpoint/9.pth --prompts "A fish" "A tree" --output images/fish.png
    python scripts/generate.py --checkpoint logs/2026-01-31T12-00-00_tiny_imagenet --prompts "A fish" --w 0 1 2 4
    python scripts/generate.py --checkpoint 9.pth --prompts "A fish" "" --num_samples 4 --steps 50 --gif fish.gif

The checkpoint is an <epoch>.pth of the reference code, a run folder, or a checkpoint of one. The picture has a row for
each text and a column for each guidance strength w of (1 + w) e_text - w e_none: 0 is the text itself, larger values
follow it more closely, -1 ignores it, and smaller values lead away from it. The empty text has no condition. A sampler
of the config that visits all time steps, such as that of the reference code, is replaced by 20 steps of DPM-Solver++
without --all_steps.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import sys
import textwrap
from pathlib import Path
from typing import Any

from ldm.training.cli import run_command
from ldm.util import ConfigError, UserError

BASE = Path(__file__).resolve().parents[1] / "configs" / "_shared" / "clip_guided.yaml"
_FEW_STEPS = 20
_LONGEST = 160  # characters of a caption
ENCODER = "model.params.cond_stage_config.text_encoder"


def read_options(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="PATH", help="<epoch>.pth, run folder, or checkpoint of a run")
    add("--prompts", nargs="+", required=True, metavar="TEXT", help='texts; "" for no condition')
    add("--output", type=Path, default=Path("images/generated.png"), metavar="PNG", help="the picture (%(default)s)")
    add("--w", type=float, nargs="+", default=[1.0], metavar="W", help="guidance strengths, also negative (1)")
    add("--num_samples", type=int, default=1, metavar="N", help="images for each text and strength (%(default)s)")
    add("--sampler", metavar="NAME", help="ddim, ddpm, plms, dpm_solver or package.module.Class (that of the config)")
    add(
        "--all_steps",
        action="store_true",
        help="sample over all time steps if the config does so, as the reference code",
    )
    add("--steps", type=int, metavar="N", help="steps of the sampler; without --sampler of ddim")
    add("--seed", type=int, default=0, help="seed of the noise (%(default)s)")
    add("--clip", metavar="NAME", help="CLIP by name or folder (that of the config; ViT-B/32 for an <epoch>.pth)")
    add("-b", "--base", nargs="+", default=[], metavar="YAML", help="configs merged over that of the checkpoint")
    add("--config", metavar="YAML", help="config of the reference code that an <epoch>.pth was trained with")
    add("--gif", type=Path, metavar="GIF", help="also write the denoising as an animation")
    add("--device", help="device (cuda if there is one, else cpu)")
    options = parser.parse_args(words)
    if options.num_samples < 1:
        parser.error(f"--num_samples: expected at least 1, got {options.num_samples}")
    if not all(map(math.isfinite, options.w)):
        parser.error(f"--w: expected finite numbers, got {options.w}")
    for flag, path, suffix in (("--output", options.output, ".png"), ("--gif", options.gif, ".gif")):
        if path is not None and path.suffix.lower() != suffix:
            parser.error(f"{flag}: expected a {suffix} file, got {path}")
    return options


def load(options: argparse.Namespace) -> Any:
    """Return the model."""
    from ldm.config.loading import load_config
    from ldm.legacy.clip_guided import model_overrides, network_overrides, reference_values
    from ldm.models.contracts import GuidedByTexts
    from ldm.modules.weights import load_pickled, read_state_dict
    from ldm.runs.load import load_run

    path, base, words = Path(options.checkpoint), options.base, []
    if not path.exists():
        raise UserError(f"--checkpoint {path} does not exist. Name an <epoch>.pth, a run folder or a checkpoint of one")
    if path.suffix == ".pth":
        base, words = [str(BASE), *base], network_overrides(read_state_dict(path), str(path))
        content = load_pickled(path)
        if options.config or content.get("config"):
            config = load_config([options.config]).content if options.config else content["config"]
            words = [*model_overrides(reference_values(config, options.config or f"{path}: config")), *words]
    elif options.config:
        raise ConfigError(f"--config: expected an <epoch>.pth, got {path}, whose config is that of its run. Remove it")
    if options.clip:
        target = "ldm.modules.encoders.modules.FrozenCLIPTextEmbedder"
        words += [f"{ENCODER}.target={target}", f"{ENCODER}.params.version={options.clip}"]
    model = load_run(options.checkpoint, base, words, needs=GuidedByTexts).model
    if not model.cond_stage_model.takes_texts:
        raise UserError(
            f"--checkpoint {path}: expected a model with a text encoder, got none. Name its CLIP with --clip"
        )
    return model


def run(options: argparse.Namespace) -> list[Path]:
    import torch
    from rich.console import Console
    from rich.progress import Progress

    from ldm.evaluation.sampling.request import choose_sampler
    from ldm.models.contexts import averaged, chosen_device
    from ldm.pictures.draw import draw_grid, save_png
    from ldm.pictures.grid import CaptionedGrid
    from ldm.runs.disk import require_writable

    require_writable(options.output.parent, "Choose another file with --output")
    given = options.sampler is not None or options.steps is not None
    sampler = choose_sampler(options.sampler, {"num_steps": 50}, num_steps=options.steps) if given else None
    device = chosen_device(options.device)
    model = load(options).to(device)
    if sampler is None and not options.all_steps:
        count = model.num_timesteps
        is_slow = model.default_sampler.num_evaluations(count) == count > _FEW_STEPS
        sampler = choose_sampler("dpm_solver", {}, num_steps=_FEW_STEPS) if is_slow else None
    texts, strengths = options.prompts, options.w
    captions = [textwrap.shorten(text, _LONGEST, placeholder=" ...") or "(no text)" for text in texts]
    columns = [f"w = {w:g}" for w in strengths for _ in range(options.num_samples)]

    def grid(images: torch.Tensor) -> CaptionedGrid:
        images = images.clamp(-1, 1).unflatten(0, (len(strengths), len(texts), -1)).transpose(0, 1)
        return CaptionedGrid(images.flatten(0, 2).cpu(), captions, columns)

    torch.manual_seed(options.seed)
    noise = torch.randn(len(texts) * options.num_samples, *model.latent_shape).repeat(len(strengths), 1, 1, 1)
    repeated = [text for text in texts for _ in range(options.num_samples)]
    total = (sampler or model.default_sampler).num_evaluations(model.num_timesteps)
    with averaged(model), Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("steps", total=total)
        model.model.register_forward_pre_hook(lambda *_: progress.advance(task))
        images, states = model.sample_w(repeated, strengths, noise.to(model.device), sampler)
    written = [save_png(draw_grid(grid(images)), options.output)]
    if options.gif:
        from ldm.pictures.animation import save_gif

        with torch.no_grad():
            written.append(save_gif([grid(model.decode_first_stage(state)) for state in states], options.gif))
    return written


def main(arguments: list[str] | None = None) -> int:
    options = read_options(sys.argv[1:] if arguments is None else list(arguments))
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    return run_command(lambda: print(*run(options), sep="\n"))


if __name__ == "__main__":
    sys.path.append(os.getcwd())  # for models in files of the current folder
    sys.exit(main())
