"""Check, convert and write data sets.

    python scripts/dataset.py check shapes3d --path data/              # prints counts and factors, reads every image
    python scripts/dataset.py check folder --path photos/ attributes=photos/table.csv
    python scripts/dataset.py check configs/my_config.yaml             # every data set of a config
    python scripts/dataset.py convert mpi3d data/mpi3d/mpi3d_toy.npy --path downloads/ variant=toy
    python scripts/dataset.py write data/mine.lmdb --images photos/ --attributes photos/table.csv --resolution 128
    python scripts/dataset.py write data/mine.h5 --images photos/ --attributes photos/table.csv
    python scripts/dataset.py world data/shapes3d/3dshapes.h5          # the embedded world as a 3dshapes.h5 (5.9 GB)
    python scripts/dataset.py world data/shapes3d/3dshapes.h5 --keep floor_hue=2 wall_hue=2 object_hue=5 orientation=5
    python scripts/dataset.py emoji data/emoji                         # 1,680 emoji of people and their attributes

Arguments of the form key=value are options of the data set's class. Files are written atomically: an interrupted
command leaves nothing behind and can be started again.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from ldm.config.loading import load_config, parse_overrides
from ldm.data.check import check_dataset, shared_images
from ldm.data.factors import factor_space
from ldm.data.factors.shapes3d import write_shapes3d
from ldm.data.formats.attribute_tables import read_table
from ldm.data.formats.emoji import LICENCE, TABLE, VERSION, write_emoji
from ldm.data.formats.image_sources import H5_SUFFIXES
from ldm.data.formats.picture_files import OTHER_SUFFIXES, PICTURE_SUFFIXES, decode_picture, find_pictures
from ldm.data.formats.table_pictures import match_pictures
from ldm.data.formats.text_writers import write_text_h5, write_text_lmdb
from ldm.data.kinds import KINDS, build_kind
from ldm.data.rows import write_h5, write_npy
from ldm.data.world import World3D
from ldm.training.cli import run_command
from ldm.training.own_data import read_own_data
from ldm.util import ConfigError, UserError, instantiate_from_config

_TRAIN = "data.params.train"


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    return run_command(lambda: options.run(options))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="check | convert | write | world | emoji")

    check = commands.add_parser("check", help="print a summary of a data set, and every image that cannot be read")
    check.add_argument("dataset", help=f"a config (.yaml), or one of {', '.join(KINDS)}")
    check.add_argument("options", nargs="*", metavar="key=value", help="options of the data set; overrides of a config")
    check.add_argument("--path", help="file or folder of the data set; otherwise DATA_ROOT")
    check.add_argument("--quick", action="store_true", help="read 200 images instead of all")
    check.set_defaults(run=run_check)

    convert = commands.add_parser("convert", help="write the images to a file that is read without unpacking")
    convertible = [name for name, kind in KINDS.items() if kind.open_source]
    convert.add_argument("dataset", choices=convertible)
    convert.add_argument("target", type=Path, help="file to write: .npy (mapped, the fastest) or .h5 (compressed)")
    convert.add_argument("options", nargs="*", metavar="key=value", help="options, such as variant=real")
    convert.add_argument("--path", help="file or folder of the published data set; otherwise DATA_ROOT")
    convert.set_defaults(run=run_convert)

    write = commands.add_parser("write", help="write an LMDB (or HDF5 file) of images and a table of attributes")
    write.add_argument("target", type=Path, help="LMDB folder or .h5 file to write")
    source = write.add_mutually_exclusive_group(required=True)
    source.add_argument("--images", type=Path, help="folder of the images")
    source.add_argument("--world", type=int, metavar="N", help="write N images of the embedded world with texts")
    write.add_argument("--attributes", type=Path, help=".csv (header; image, attribute, ...) or .json of the texts")
    write.add_argument("--resolution", type=int, default=128, help="side of the stored images in pixels (default: 128)")
    write.add_argument("--jpeg", action="store_true", help="store JPEG instead of PNG in an LMDB (smaller, but lossy)")
    write.set_defaults(run=run_write)

    world = commands.add_parser("world", help="write the embedded world in the layout of 3dshapes.h5")
    world.add_argument("target", type=Path, help="file to write, such as data/shapes3d/3dshapes.h5")
    world.add_argument(
        "--keep",
        nargs="+",
        default=[],
        metavar="factor=N",
        help="write only N values of a factor (or a list [0,3,...]), in all combinations; factors: "
        + ", ".join(factor_space("shapes3d").all_names),
    )
    world.set_defaults(run=run_world)

    emoji = commands.add_parser(
        "emoji",
        help="write emoji of people, drawn for two vendors, with role, gender, skin tone and style",
        epilog="example: python scripts/dataset.py emoji data/emoji --packages downloads/",
    )
    emoji.add_argument("target", type=Path, help="folder to write, such as data/emoji")
    emoji.add_argument(
        "--packages",
        type=Path,
        metavar="DIR",
        help=f"folder of emoji-datasource-google-{VERSION}.tgz and emoji-datasource-twitter-{VERSION}.tgz; those that "
        "are missing are fetched into it with npm pack (default: a temporary folder)",
    )
    emoji.set_defaults(run=run_emoji)
    parser.set_defaults(options=None)
    options, rest = parser.parse_known_args(arguments)  # argparse does not accept key=value words after a --flag
    if rest and (options.options is None or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    options.options = [*(options.options or []), *rest]
    return options


def run_check(options: argparse.Namespace) -> int:
    """Run ``check``; return 0 if everything could be read."""
    num_problems = 0
    datasets = dict(_datasets(options))
    for name, dataset in datasets.items():
        with _progress("images read", len(dataset)) as (progress, task):
            report = check_dataset(
                dataset, options.quick, lambda done, total: progress.update(task, completed=done, total=total)
            )
        print(f"\n{name}")
        for fact, value in report.facts:
            print(f"  {fact + ':':20s} {value}")
        print(f"  {'read:':20s} {report.checked:,} images, {report.num_problems:,} problems")
        for problem in report.problems:
            print(f"  PROBLEM: {problem}", file=sys.stderr)
        if report.num_problems > len(report.problems):
            print(f"  PROBLEM: ... {report.num_problems:,} images in all", file=sys.stderr)
        num_problems += report.num_problems
        shared = 0 if name == _TRAIN or _TRAIN not in datasets else shared_images(datasets[_TRAIN], dataset)
        if shared:
            print(
                f"  WARNING: {shared:,} of its images are also in {_TRAIN}, so scores are those of training images. "
                "Set split: train there and split: validation here, or holdout: in both.",
                file=sys.stderr,
            )
    return int(num_problems > 0)


def _datasets(options: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """Yield name and data set of everything to be checked."""
    if not options.dataset.endswith((".yaml", ".yml")):
        params = _values(options.options) | ({"path": options.path} if options.path else {})
        yield options.dataset, build_kind(options.dataset, params)
        return
    if options.path:
        raise ConfigError("--path applies to named data sets. For a config, use data.params.<split>.params.path=...")
    config = load_config([options.dataset], options.options, allow_pending=True)
    is_own = "data" not in config.content and "path" in config.content  # a file for data= of a recipe
    data = read_own_data(options.dataset).sections["data"] if is_own else config.section("data")
    sections = data.get("params") or {}
    found = {name: sections[name] for name in ("train", "validation", "test", "predict") if sections.get(name)}
    if not found:
        raise ConfigError(
            f"{options.dataset}: expected a data set (data.params.train, validation, test or predict), got none."
        )
    for name, section in found.items():
        yield f"data.params.{name}", instantiate_from_config(section)


def run_convert(options: argparse.Namespace) -> int:
    """Run ``convert``."""
    target = options.target
    if target.suffix not in (".npy", *H5_SUFFIXES):
        raise ConfigError(f"{target}: expected a file name that ends in .npy or .h5.")
    kind = KINDS[options.dataset]
    source = kind.open_source(options.path, **_values(options.options))
    if source.path.resolve() == target.resolve():
        raise UserError(f"{target} is already converted: it is the file that was found.")
    shape = (source.count, *source.shape)
    _print_space(target, int(np.prod(shape)))
    with _progress("images", source.count) as (progress, task):
        if target.suffix == ".npy":
            write_npy(target, shape, _counted(source.blocks(), progress, task))
        else:
            write_h5(target, shape, source.blocks(), kind.arrays, on_progress=_updater(progress, task))
    print(f"{source.count:,} images of {source.path} written to {target}")
    return 0


def run_write(options: argparse.Namespace) -> int:
    """Run ``write``."""
    if options.target.suffix not in ("", ".lmdb", *H5_SUFFIXES):
        formats = ", ".join((".lmdb", *H5_SUFFIXES))
        raise ConfigError(
            f"{options.target}: expected a folder without suffix or a name that ends in {formats}. Rename it"
        )
    if options.world is None:
        samples, count = _pictures(options.images, options.attributes)
    else:
        samples, count = _world_samples(options.world), options.world
    with _progress("images", count) as (progress, task):
        update = _updater(progress, task)
        if options.target.suffix in H5_SUFFIXES:
            write_text_h5(options.target, samples, count, options.resolution, update)
        else:
            write_text_lmdb(options.target, samples, options.resolution, "JPEG" if options.jpeg else "PNG", update)
    print(f"{count:,} images written to {options.target}")
    return 0


def _pictures(folder: Path, attributes: Path | None) -> tuple[Iterable[tuple[Image.Image, Any]], int]:
    """Return the images of a table with their texts, in its order; without a table, all images of the folder."""
    if attributes is None:
        names = find_pictures(folder)
        texts: Sequence[Sequence[str] | None] = [None] * len(names)
    else:
        everything = find_pictures(folder, PICTURE_SUFFIXES + OTHER_SUFFIXES)
        table, _ = match_pictures(read_table(attributes), folder, everything)
        names, texts = table.pictures, table.cells
    files = [folder / name for name in names]
    return ((_decode(file), text) for file, text in zip(files, texts)), len(files)


def _decode(file: Path) -> Image.Image:
    """Return an image; errors do not name the option of data sets that leaves it out."""
    try:
        return decode_picture(file, str(file))
    except UserError as error:
        raise UserError(f"{str(error).partition(';')[0]}, or remove it from the folder and the table") from error


def _world_samples(count: int) -> Iterator[tuple[np.ndarray, list[str]]]:
    """Yield random images of the embedded world with their texts."""
    world = World3D(size=64, split="train", limit=count, text="attributes")
    for position in range(len(world)):
        item = world[position]
        yield item["image"].numpy(), item["text"]


def run_world(options: argparse.Namespace) -> int:
    """Run ``world``."""
    keep = _values(options.keep)
    part = factor_space("shapes3d").restrict(keep)
    _print_space(options.target, part.space.size * 64 * 64 * 3)
    with _progress("images", part.space.size) as (progress, task):
        count = write_shapes3d(options.target, keep, _updater(progress, task))
    print(f"{count:,} images written to {options.target}")
    return 0


def run_emoji(options: argparse.Namespace) -> int:
    """Run ``emoji``; do nothing if the folder contains the set already, because it is written atomically."""
    if (options.target / TABLE).is_file():
        print(f"{options.target} contains the pictures already")
        return 0
    pictures, roles = write_emoji(options.target, options.packages)
    print(f"{pictures:,} pictures, {roles} roles, written to {options.target} (licences: {options.target / LICENCE})")
    return 0


def _values(words: Sequence[str]) -> dict[str, Any]:
    """Parse ``key=value`` words; values are YAML, keys may contain dots."""
    return OmegaConf.to_container(parse_overrides(words), resolve=True)


def _print_space(target: Path, num_bytes: int) -> None:
    folder = target.absolute().parent
    while not folder.is_dir():
        folder = folder.parent
    print(f"{target}: up to {num_bytes / 1e9:.1f} GB; {shutil.disk_usage(folder).free / 1e9:.1f} GB are free")


@contextmanager
def _progress(title: str, total: int) -> Iterator[tuple[Progress, TaskID]]:
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield progress, progress.add_task(title, total=total)


def _updater(progress: Progress, task: TaskID) -> Any:
    return lambda done: progress.update(task, completed=done)


def _counted(blocks: Iterable[np.ndarray], progress: Progress, task: TaskID) -> Iterator[np.ndarray]:
    for block in blocks:
        yield block
        progress.advance(task, len(block))


if __name__ == "__main__":
    sys.exit(main())
