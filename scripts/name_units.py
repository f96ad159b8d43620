"""Name each unit of an unsupervised model (DisDiff, EncDiff) with CLIP:

    python scripts/name_units.py -r logs/quickstart/2026-01-31T12-00-00_encdiff --clip logs/quickstart/*_clip/clip

Every unit moves over its range, and is named after the attribute whose words change most in CLIP's reading. The words
are those of the data set, or of --vocabulary, a YAML or JSON file such as  {expression: [a smiling face, a serious
face], hair: {words: [dark, fair], templates: ["{} hair"]}}. Where the true factors are known, the names are compared
with them. Writes <run>/unit_names/<step>.json and two pictures.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ldm.data.traits import space_of, unwrap, vocabulary_of
from ldm.data.vocabulary import AttributeVocabulary, read_vocabulary
from ldm.diffusion.samplers import SAMPLERS
from ldm.evaluation.editing.editor import check_judge
from ldm.evaluation.row_encoder import RowEncoder
from ldm.evaluation.sampling.request import choose_sampler, describe_sampler
from ldm.evaluation.units.information import name_by_information
from ldm.evaluation.units.names import UnitName, clip_reader, judged_names, name_units, traverse_units
from ldm.evaluation.units.report import caption_of, write_names
from ldm.models.contexts import averaged
from ldm.models.contracts import HasUnits
from ldm.models.inputs import some_images
from ldm.models.judge import load_judge
from ldm.modules.encoders.modules import FrozenClipImageEmbedder, FrozenCLIPTextEmbedder
from ldm.runs.disk import require_writable
from ldm.runs.load import load_run
from ldm.training.cli import run_command
from ldm.util import UserError

RANGE_IMAGES = 1000  # real images that give the range of each unit


def read_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-r", "--run", required=True, metavar="PATH", help="run folder or checkpoint")
    parser.add_argument("--clip", required=True, metavar="NAME", help="CLIP: a folder, or a name such as ViT-B/32")
    text = "YAML or JSON: attributes and their words (default: the data set's)"
    parser.add_argument("--vocabulary", "--words", metavar="FILE", help=text)
    parser.add_argument("--judge", metavar="PATH", help="factor judge, to compare the names with")
    parser.add_argument("--num-images", type=int, default=16, metavar="N", help="images changed (default: 16)")
    parser.add_argument("--points", type=int, default=5, metavar="P", help="points of a range (default: 5)")
    parser.add_argument(
        "--sampler", metavar="NAME", help=f"{', '.join(SAMPLERS)} or package.module.Class (default: ddim)"
    )
    parser.add_argument("--num-steps", type=int, metavar="N", help="steps of the sampler (default: 20 for ddim)")
    parser.add_argument("--seed", type=int, default=0, help="seed of images and noise (default: 0)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    return parser.parse_args(arguments)


def choose_vocabulary(path: str | None, dataset: Any) -> AttributeVocabulary:
    """Return the attributes to choose names from: those of a file (``read_vocabulary``), or of the data set.

    Raises:
        UserError: neither has words.
        ConfigError: the file is malformed.
    """
    vocabulary = read_vocabulary(path) if path else vocabulary_of(dataset)
    if vocabulary is None:
        raise UserError(
            f"the data set {type(unwrap(dataset)).__name__} has no words. Pass attributes by --vocabulary FILE.yaml"
        )
    return vocabulary


@torch.no_grad()
def find_names(options: argparse.Namespace) -> Path:
    """Name the units and return the path of the JSON file."""
    sampler = choose_sampler(options.sampler, {"num_steps": 20}, num_steps=options.num_steps)
    run, device = load_run(options.run, needs=HasUnits), options.device
    require_writable(run.folder, "Change its permissions, or use a copy of the run folder")
    model, data = run.model.to(device), run.build_data()
    data.setup("fit")
    dataset = data.datasets["train"]
    vocabulary = choose_vocabulary(options.vocabulary, dataset)
    judge = load_judge(options.judge).to(device) if options.judge else None
    if judge is not None:
        check_judge(judge, vocabulary, "--judge: expected a judge of the attributes that the units are named after")
    clip = (FrozenCLIPTextEmbedder(options.clip), FrozenClipImageEmbedder(options.clip))
    reader = clip_reader(*(half.to(device) for half in clip), vocabulary)
    images = some_images(dataset, max(RANGE_IMAGES, options.num_images), options.seed).to(device)
    codes = torch.cat([model.encode_units(part) for part in images.split(256)])
    base = codes[: options.num_images]
    generator = torch.Generator().manual_seed(options.seed)
    x_T = torch.randn(len(base), *model.latent_shape, generator=generator).to(device)
    with averaged(model):
        paths = traverse_units(model, codes, base, x_T, options.points, sampler)
    names = name_units(paths, options.points, reader, vocabulary)
    space = space_of(dataset)
    if space is not None and space.factor_names == vocabulary.factor_names:
        add_check(names, "by_information", name_by_information(RowEncoder(model, dataset, device=device)))
    if judge is not None:
        add_check(names, "by_judge", judged_names(paths, options.points, judge.predict_values, vocabulary))
    for name in names:
        print(caption_of(name) + "".join(f"  [{check} {answer or '-'}]" for check, answer in name.checks.items()))
    settings = {"clip": options.clip, "num_images": len(base), "points": options.points, "seed": options.seed}
    settings["sampler"] = describe_sampler(sampler)
    return write_names(run.folder, run.num_steps, names, vocabulary, paths, options.points, settings)


def add_check(names: Sequence[UnitName], check: str, answers: Sequence[str]) -> None:
    """Add the names by another method."""
    for name, answer in zip(names, answers):
        name.checks[check] = answer


def main(arguments: list[str] | None = None) -> int:
    logging.basicConfig(level=logging.WARNING)
    options = read_options(arguments)
    return run_command(lambda: print(find_names(options)))


if __name__ == "__main__":
    sys.path.append(os.getcwd())  # for samplers and models in files of the current folder
    sys.exit(main())
