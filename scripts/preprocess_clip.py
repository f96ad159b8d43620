"""Compute the CLIP image embeddings of a folder of images, or of the data sets of a config:

    python scripts/preprocess_clip.py --data_dir data/tiny-imagenet-200/train --output clip.csv
    python scripts/preprocess_clip.py --data_dir photos/ --output clip.safetensors --clip ViT-L/14 --device cuda
    python scripts/preprocess_clip.py --base my_config.yaml --clip logs/my_clip/clip --output world.safetensors

An interrupted command continues where it stopped when it is run again; after images were added, it computes these only.
Images that cannot be read are listed and skipped. Use the file in a config as follows:

    train:
      target: ldm.data.formats.clip_embeddings.with_embeddings
      params:
        embeddings: clip.safetensors
        data: {target: ldm.data.formats.folder.ImageFolder, params: {path: photos, image_size: 32}}

With --base, the data sets are those that the config wraps in with_embeddings, else data.params.train. Words of the form
key=value change the config as in main.py.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from ldm.config.loading import load_config
from ldm.data.formats.clip_embeddings import with_embeddings
from ldm.data.formats.folder import ImageFolder
from ldm.data.formats.picture_files import find_pictures
from ldm.data.module import usable_cpus
from ldm.data.options import require_count
from ldm.data.traits import is_in_memory, unwrap
from ldm.evaluation.clip_embeddings import compute_embeddings, load_image_encoder
from ldm.models.contexts import chosen_device
from ldm.training.cli import run_command, split_overrides
from ldm.util import ConfigError, get_obj_from_str, instantiate_from_config

LISTED = 20  # names of images that are printed


class SpeedColumn(ProgressColumn):
    """Images per second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:.0f} images/s")


def read_options(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data_dir", type=Path, metavar="DIR", help="folder of the images, sub-folders included")
    source.add_argument("--base", nargs="+", metavar="YAML", help="configs of the data sets")
    add("--output", type=Path, required=True, metavar="FILE", help=".safetensors, .h5, or .csv (path, f1, ..., fD)")
    add("--clip", default="ViT-B/32", metavar="NAME", help="CLIP by name or folder (%(default)s)")
    add("--weights", metavar="PATH", help="weights of the CLIP: file or folder (its usual places on this machine)")
    add("--batch_size", type=int, default=64, help="images at once (%(default)s)")
    add("--num_workers", type=int, help="processes that read images (number of processors less one, at most 4)")
    add("--device", help="device (cuda if there is one, else cpu)")
    return parser.parse_args(words)


def datasets_of(options: argparse.Namespace, overrides: Sequence[str]) -> list[Any]:
    """Return the data sets whose images are embedded."""
    if options.data_dir is not None:
        return [ImageFolder(options.data_dir)]
    sections = load_config(options.base, overrides, allow_pending=True).section("data").get("params") or {}
    sections = {name: sections[name] for name in ("train", "validation", "test") if sections.get(name)}
    wrapped = [
        section["params"]["data"]
        for section in sections.values()
        if get_obj_from_str(section["target"]) is with_embeddings
    ]
    if not wrapped and "train" not in sections:
        raise ConfigError(f"{options.base[-1]}: expected a data set data.params.train, got none. Add it.")
    return [unwrap(instantiate_from_config(section)) for section in wrapped or [sections["train"]]]


def run(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    require_count("--batch_size", options.batch_size)
    datasets = datasets_of(options, overrides)
    encoder = load_image_encoder(options.clip, options.weights, chosen_device(options.device))
    workers = options.num_workers
    if workers is None:
        workers = 0 if all(map(is_in_memory, datasets)) else max(0, min(4, usable_cpus() - 1))
    columns = (TextColumn("images"), BarColumn(), MofNCompleteColumn(), SpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("images", total=None)

        def show(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        table, failed = compute_embeddings(datasets, encoder, options.output, options.batch_size, workers, show)
    print(f"{len(table.names):,} embeddings ({table.width} wide, {options.clip}) written to {options.output}")
    report("skipped, because they cannot be read", list(failed.values()))
    if options.data_dir is not None:
        added = sorted(set(find_pictures(options.data_dir)) - set(datasets[0].pictures))
        report("added meanwhile, and not in the file (rerun the command to add them)", added)


def report(title: str, names: Sequence[str]) -> None:
    """Print the first names of a list to standard error."""
    if names:
        rest = [f"... and {len(names) - LISTED:,} more"] if len(names) > LISTED else []
        print(f"{title}: {len(names):,} images", *names[:LISTED], *rest, sep="\n  ", file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    words, overrides = split_overrides(sys.argv[1:] if arguments is None else list(arguments))
    options = read_options(words)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    return run_command(lambda: run(options, overrides))


if __name__ == "__main__":
    sys.path.append(os.getcwd())  # for data sets in files of the current folder
    sys.exit(main())
