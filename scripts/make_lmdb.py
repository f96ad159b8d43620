"""Make an image + text LMDB from a folder of pictures and a table of attributes, or from the embedded world:

    python scripts/make_lmdb.py data/mine.lmdb --images pictures/ --attributes attributes.csv
    python scripts/make_lmdb.py data/example.lmdb --world 1000 --resolution 64

The .csv has a header and the picture's name in its first column, one attribute per further column; a .json is an
object {"name.png": ["red floor", ...], ...}.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ldm.data.lmdb_text import write_text_lmdb
from ldm.data.picture_files import decode_picture, read_attributes
from ldm.data.world import World3D
from ldm.util import ConfigError, UserError


def pictures_of_folder(folder: Path, table: dict[str, list[str]]) -> Iterator[tuple[Image.Image, list[str]]]:
    """The named pictures, in the order of the table."""
    for name, texts in table.items():
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} does not exist, but the attributes name it")
        yield decode_picture(folder / name, str(folder / name)), texts


def pictures_of_world(count: int) -> Iterator[tuple[np.ndarray, list[str]]]:
    """Random pictures of the embedded world with their attribute texts."""
    world = World3D(size=64, split="train", limit=count, text="attributes")
    for i in range(len(world)):
        item = world[i]
        yield item["image"].numpy(), item["text"]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", help="the LMDB folder to write")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--images", type=Path, help="folder of the pictures; needs --attributes")
    source.add_argument("--world", type=int, metavar="N", help="take N pictures of the embedded world instead")
    parser.add_argument("--attributes", type=Path, help=".csv or .json of the attributes")
    parser.add_argument("--resolution", type=int, default=128, help="side of the stored pictures (128)")
    parser.add_argument("--jpeg", action="store_true", help="store JPEG instead of PNG: smaller, not exact")
    options = parser.parse_args(arguments)
    if options.images is not None and options.attributes is None:
        parser.error("--images needs --attributes")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    columns = (TextColumn("pictures"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        if options.images is not None:
            table = read_attributes(options.attributes)
            samples, total = pictures_of_folder(options.images, table), len(table)
        else:
            samples, total = pictures_of_world(options.world), options.world
        with Progress(*columns) as progress:
            task = progress.add_task("pictures", total=total)
            count = write_text_lmdb(options.path, samples, options.resolution, "JPEG" if options.jpeg else "PNG",
                                    lambda done: progress.update(task, completed=done))
    except (ConfigError, UserError) as err:
        print(err, file=sys.stderr)
        return 1
    print(f"{count:,} pictures written to {options.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
