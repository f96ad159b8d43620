"""Take the edit score of a finished run again, for example with more samples or another judge:

    python scripts/edit_score.py -r logs/2024-01-01T12-00-00_clip-disdiff --num-samples 1000

What is not given is taken from the run's EditScore callback, and the rest from the callback's defaults.
"""

from __future__ import annotations

import argparse
import logging
import sys
from typing import Any

import pytorch_lightning as pl

from ldm.config.build import build
from ldm.evaluation.editing.callback import EditScore
from ldm.runs.checkpoint_io import AtomicCheckpointIO
from ldm.training.cli import parse_arguments
from ldm.training.plan import Plan, make_plan
from ldm.training.trainer import choose_devices
from ldm.util import ConfigError, UserError


def read_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-r", "--run", required=True, metavar="PATH", help="run folder or checkpoint")
    parser.add_argument("--judge", metavar="PATH", help="checkpoint or run folder of the judge")
    parser.add_argument("--num-samples", type=int, metavar="N", help="base images")
    parser.add_argument("--batch-size", type=int, metavar="N", help="images sampled at once")
    parser.add_argument("--num-steps", type=int, metavar="N", help="DDIM steps")
    parser.add_argument("--eta", type=float, help="DDIM's eta")
    parser.add_argument("--guidance-scale", type=float, metavar="S", help="factor of the sub-gradients")
    parser.add_argument("--seed", type=int, help="seed of texts, asked words and noise")
    parser.add_argument("--columns", type=int, metavar="N", help="samples in the picture")
    return parser.parse_args(arguments)


def score_params(plan: Plan, given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the callback: those given, over those of the run's config."""
    entries = (plan.config.section("lightning").get("callbacks") or {}).values()
    found = [entry for entry in entries if entry and str(entry.get("target", "")).endswith(".EditScore")]
    params = {**((found[0].get("params") or {}) if found else {}), **given}
    if "judge" not in params:
        raise UserError("the run's config names no judge: give one with --judge <checkpoint or run folder>")
    return params


def main(arguments: list[str] | None = None) -> int:
    options = {name: value for name, value in vars(read_options(arguments)).items() if value is not None}
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("ldm").setLevel(logging.INFO)
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    try:
        plan = make_plan(parse_arguments(["-r", options.pop("run")]))
        callback = EditScore(**score_params(plan, options))
        devices = choose_devices(plan.settings.arguments)
        trainer = pl.Trainer(
            accelerator=devices.accelerator,
            devices=1,
            callbacks=[callback],
            default_root_dir=str(plan.resume.folder.path),
            limit_test_batches=1,  # the score samples for itself; the test set is there for its words and images
            logger=False,
            enable_progress_bar=False,
            plugins=[AtomicCheckpointIO()],
        )
        model, data = build(plan.config, "model"), build(plan.config, "data")
        trainer.test(model, datamodule=data, ckpt_path=str(plan.resume.checkpoint), weights_only=True, verbose=False)
    except (ConfigError, UserError) as err:
        print(err, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
