"""Compute the edit score of a finished run again, for example with more samples or another judge:

    python scripts/edit_score.py -r logs/2024-01-01T12-00-00_clip-disdiff --num-samples 1000
    python scripts/edit_score.py -r RUN --sampler dpm_solver --num-steps 20

Options that are not given are those of the run's EditScore callback, or the callback's defaults. An earlier score of
the same step is kept: the new files are ``edit_score/<step>-1.json`` and so on, and results.json does not change.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl

from ldm.config.loading import Config
from ldm.config.trainer_args import translate_trainer_args
from ldm.diffusion.samplers import SAMPLERS
from ldm.evaluation.editing.callback import EditScore
from ldm.evaluation.sampling.request import choose_sampler
from ldm.legacy import sampling_options
from ldm.runs.checkpoint_io import AtomicCheckpointIO
from ldm.runs.disk import require_writable
from ldm.runs.load import load_run
from ldm.training.cli import run_command
from ldm.training.trainer import choose_devices
from ldm.util import UserError


def read_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-r", "--run", required=True, metavar="PATH", help="run folder or checkpoint")
    parser.add_argument("--judge", metavar="PATH", help="checkpoint or run folder of the judge")
    parser.add_argument("--num-samples", type=int, metavar="N", help="base images")
    parser.add_argument("--batch-size", type=int, metavar="N", help="images sampled at once")
    parser.add_argument("--sampler", metavar="NAME", help=f"{', '.join(SAMPLERS)} or package.module.Class")
    parser.add_argument("--num-steps", type=int, metavar="N", help="steps of the sampler")
    parser.add_argument("--eta", type=float, help="eta of ddim")
    text = "scale of sub-gradients or guidance; of several the best is chosen on other edits"
    parser.add_argument("--guidance-scale", type=float, nargs="+", metavar="S", help=text)
    parser.add_argument("--num-guidance-samples", type=int, metavar="N", help="base images for that choice")
    text = "all words of an attribute in their order, to count errors between neighbouring words"
    parser.add_argument("--ordered", nargs="+", type=ordered_words, metavar="ATTRIBUTE=WORD,WORD,...", help=text)
    parser.add_argument("--seed", type=int, help="seed of texts, requested words and noise")
    parser.add_argument("--columns", type=int, metavar="N", help="samples in the picture")
    text = "replace the score of the step, and the figures in results.json"
    parser.add_argument("--replace", action="store_true", help=text)
    return parser.parse_args(arguments)


def ordered_words(text: str) -> tuple[str, list[str]]:
    """Parse ``ATTRIBUTE=WORD,WORD,...``."""
    name, separator, words = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"expected ATTRIBUTE=WORD,WORD,..., got {text!r}")
    return name, [word.strip() for word in words.split(",")]


def score_params(config: Config, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments of the callback: the given ones over those of the run's config."""
    entries = (config.section("lightning").get("callbacks") or {}).values()
    found = [entry for entry in entries if entry and str(entry.get("target", "")).endswith(".EditScore")]
    configured = sampling_options((found[0].get("params") or {}) if found else {}, num_steps=50, eta=0.0)
    given = dict(given)
    if "ordered" in given:
        given["ordered"] = dict(given["ordered"])
    settings = {name: given.pop(name) for name in ("num_steps", "eta") if name in given}
    name = given.pop("sampler", None)
    if name or settings:
        given["sampler"] = changed_sampler(configured.get("sampler"), name, settings)
    params = {**configured, **given}
    if "judge" not in params:
        raise UserError("edit score: the run's config names no judge. Pass --judge <checkpoint or run folder>")
    return params


def changed_sampler(configured: Any, name: str | None, settings: Mapping[str, Any]) -> Any:
    """Return a sampler for the callback: one by name, or the configured one with other settings."""
    if name or not isinstance(configured, Mapping):
        return choose_sampler(name or configured, {}, **settings)
    return {**configured, "params": {**(configured.get("params") or {}), **settings}}


def score(options: dict[str, Any]) -> None:
    """Compute the score of a run and write it into its folder."""
    run = load_run(options.pop("run"))
    require_writable(run.folder, "Change its permissions, or score a copy of the run folder")
    callback = EditScore(**score_params(run.config, options))
    settings = translate_trainer_args(run.config.section("lightning").get("trainer") or {})
    devices = choose_devices(settings.arguments)
    trainer = pl.Trainer(
        accelerator=devices.accelerator,
        devices=1,
        callbacks=[callback],
        default_root_dir=str(run.folder),
        limit_test_batches=1,  # the score uses the test set's words and images, not its batches
        logger=False,
        enable_progress_bar=False,
        plugins=[AtomicCheckpointIO()],
    )
    data, checkpoint = run.build_data(), str(run.checkpoint)  # the checkpoint also restores the step count
    trainer.test(run.model, datamodule=data, ckpt_path=checkpoint, weights_only=True, verbose=False)


def main(arguments: list[str] | None = None) -> int:
    options = {name: value for name, value in vars(read_options(arguments)).items() if value is not None}
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("ldm").setLevel(logging.INFO)
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    return run_command(lambda: score(options))


if __name__ == "__main__":
    sys.path.append(os.getcwd())  # for samplers and models in files of the current folder
    sys.exit(main())
