"""Check, convert and write data sets.

    python scripts/dataset.py check shapes3d --path data/              # counts, factors, every image read
    python scripts/dataset.py check folder --path photos/ attributes=photos/table.csv
    python scripts/dataset.py check configs/my_config.yaml             # every data set of a config
    python scripts/dataset.py convert mpi3d data/mpi3d/mpi3d_toy.npy --path downloads/ variant=toy
    python scripts/dataset.py write data/mine.lmdb --images photos/ --attributes photos/table.csv --resolution 128
    python scripts/dataset.py write data/mine.h5 --images photos/ --attributes photos/table.csv
    python scripts/dataset.py world data/shapes3d/3dshapes.h5          # the embedded world as a 3dshapes.h5 (5.9 GB)
    python scripts/dataset.py world data/shapes3d/3dshapes.h5 --keep floor_hue=2 wall_hue=2 object_hue=5 orientation=5

Options of the form key=value are those of the data set's class. Nothing half-written is left behind: a file appears
under its name when it is whole, and an interrupted command is started again.
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
from ldm.data.check import check_dataset
from ldm.data.factors import factor_space
from ldm.data.factors.shapes3d import write_shapes3d
from ldm.data.formats.attribute_tables import read_table
from ldm.data.formats.h5_files import write_h5
from ldm.data.formats.image_sources import H5_SUFFIXES
from ldm.data.formats.picture_files import decode_picture, find_pictures
from ldm.data.formats.text_writers import write_text_h5, write_text_lmdb
from ldm.data.kinds import KINDS, build_kind, kind_of
from ldm.data.rows import write_npy
from ldm.data.world import World3D
from ldm.util import ConfigError, UserError, instantiate_from_config


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        return options.run(options)
    except (ConfigError, UserError) as err:
        print(err, file=sys.stderr)
        return 1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="check | convert | write | world")

    check = commands.add_parser("check", help="say what a data set holds, and name everything that cannot be read")
    check.add_argument("what", help=f"a config (.yaml), or one of {', '.join(KINDS)}")
    check.add_argument("options", nargs="*", metavar="key=value", help="options of the data set; overrides of a config")
    check.add_argument("--path", help="file or folder of the data set; otherwise DATA_ROOT")
    check.add_argument("--quick", action="store_true", help="look at 200 images instead of all")
    check.set_defaults(run=run_check)

    convert = commands.add_parser("convert", help="write images once in a form that is read without unpacking")
    convertible = [name for name, kind in KINDS.items() if kind.open_source]
    convert.add_argument("what", choices=convertible)
    convert.add_argument("target", type=Path, help="file to write: .npy (mapped, the quickest) or .h5 (compressed)")
    convert.add_argument("options", nargs="*", metavar="key=value", help="such as variant=real for mpi3d")
    convert.add_argument("--path", help="file or folder of the published data set; otherwise DATA_ROOT")
    convert.set_defaults(run=run_convert)

    write = commands.add_parser("write", help="an LMDB (or its twin in HDF5) from pictures and a table of attributes")
    write.add_argument("target", type=Path, help="the LMDB folder, or the .h5 file, to write")
    source = write.add_mutually_exclusive_group(required=True)
    source.add_argument("--images", type=Path, help="folder of the pictures")
    source.add_argument("--world", type=int, metavar="N", help="N pictures of the embedded world with its texts")
    write.add_argument("--attributes", type=Path, help=".csv (header; picture, attribute, ...) or .json of the texts")
    write.add_argument("--resolution", type=int, default=128, help="side of the stored pictures (128)")
    write.add_argument("--jpeg", action="store_true", help="LMDB: JPEG instead of PNG, smaller but not exact")
    write.set_defaults(run=run_write)

    world = commands.add_parser("world", help="the embedded world in the layout of 3dshapes.h5")
    world.add_argument("target", type=Path, help="the file to write, such as data/shapes3d/3dshapes.h5")
    world.add_argument(
        "--keep",
        nargs="+",
        default=[],
        metavar="factor=N",
        help="write only N values of a factor (or [0,3,...]), in all combinations; factors: "
        + ", ".join(factor_space("shapes3d").all_names),
    )
    world.set_defaults(run=run_world)
    options, rest = parser.parse_known_args(arguments)  # argparse loses key=value words that come after a --flag
    if rest and (not hasattr(options, "options") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    options.options = [*getattr(options, "options", []), *rest]
    return options


def run_check(options: argparse.Namespace) -> int:
    """``check``: 0 if everything could be read."""
    num_problems = 0
    for name, dataset in _datasets(options):
        with _progress("images read", len(dataset)) as (progress, task):
            report = check_dataset(
                dataset, options.quick, lambda done, total: progress.update(task, completed=done, total=total)
            )
        print(f"\n{name}")
        for what, value in report.facts:
            print(f"  {what + ':':20s} {value}")
        print(f"  {'read:':20s} {report.checked:,} images, {len(report.problems)} problems")
        for problem in report.problems:
            print(f"  PROBLEM: {problem}", file=sys.stderr)
        num_problems += len(report.problems)
    return int(num_problems > 0)


def _datasets(options: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """Name and data set of everything to be checked."""
    if not options.what.endswith((".yaml", ".yml")):
        params = _values(options.options) | ({"path": options.path} if options.path else {})
        yield options.what, build_kind(options.what, params)
        return
    if options.path:
        raise ConfigError("--path goes with the name of a data set; a config has data.params.<split>.params.path=...")
    config = load_config([options.what], options.options, allow_pending=True)
    sections = config.section("data").get("params") or {}
    found = {name: sections[name] for name in ("train", "validation", "test", "predict") if sections.get(name)}
    if not found:
        raise ConfigError(f"{options.what} describes no data set: data.params.train, validation, test or predict")
    for name, described in found.items():
        yield f"data.params.{name}", instantiate_from_config(described)


def run_convert(options: argparse.Namespace) -> int:
    """``convert``: from the published form to a plain one."""
    target = options.target
    if target.suffix not in (".npy", *H5_SUFFIXES):
        raise ConfigError(f"{target}: expected a file name that ends in .npy or .h5")
    kind = kind_of(options.what)
    source = kind.open_source(options.path, **_values(options.options))
    if source.path.resolve() == target.resolve():
        raise UserError(f"{target} is what would be converted; it is converted already")
    shape = (source.count, *source.shape)
    _say_room(target, int(np.prod(shape)))
    with _progress("images", source.count) as (progress, task):
        if target.suffix == ".npy":
            write_npy(target, shape, _counted(source.blocks(), progress, task))
        else:
            write_h5(target, shape, source.blocks(), kind.arrays, on_progress=_follower(progress, task))
    print(f"{source.count:,} images of {source.path} written to {target}")
    return 0


def run_write(options: argparse.Namespace) -> int:
    """``write``: pictures with texts."""
    if options.world is None:
        samples, count = _pictures(options.images, options.attributes)
    else:
        samples, count = _world_samples(options.world), options.world
    is_h5 = options.target.suffix in H5_SUFFIXES
    with _progress("pictures", count) as (progress, task):
        follow = _follower(progress, task)
        if is_h5:
            write_text_h5(options.target, samples, count, options.resolution, follow)
        else:
            write_text_lmdb(options.target, samples, options.resolution, "JPEG" if options.jpeg else "PNG", follow)
    print(f"{count:,} pictures written to {options.target}")
    return 0


def _pictures(folder: Path, attributes: Path | None) -> tuple[Iterable[tuple[Image.Image, Any]], int]:
    """The pictures a table names, in its order, with their texts; without a table all of a folder."""
    if attributes is None:
        names = find_pictures(folder)
        texts: Sequence[Sequence[str] | None] = [None] * len(names)
    else:
        table = read_table(attributes)
        names, texts = table.pictures, table.cells
        for name in names:
            if not (folder / name).is_file():
                raise UserError(f"{folder / name} does not exist, but the attributes name it")
    files = [folder / name for name in names]
    return ((decode_picture(file, str(file)), text) for file, text in zip(files, texts)), len(files)


def _world_samples(count: int) -> Iterator[tuple[np.ndarray, list[str]]]:
    """Random pictures of the embedded world with their texts."""
    world = World3D(size=64, split="train", limit=count, text="attributes")
    for position in range(len(world)):
        item = world[position]
        yield item["image"].numpy(), item["text"]


def run_world(options: argparse.Namespace) -> int:
    """``world``: a 3dshapes.h5 without a download."""
    keep = _values(options.keep)
    part = factor_space("shapes3d").restrict(keep)
    _say_room(options.target, part.space.size * 64 * 64 * 3)
    with _progress("images", part.space.size) as (progress, task):
        count = write_shapes3d(options.target, keep, _follower(progress, task))
    print(f"{count:,} images written to {options.target}")
    return 0


def _values(words: Sequence[str]) -> dict[str, Any]:
    """``key=value`` words; values are YAML, keys may have dots."""
    return OmegaConf.to_container(parse_overrides(words), resolve=True)


def _say_room(target: Path, num_bytes: int) -> None:
    folder = target.absolute().parent
    while not folder.is_dir():
        folder = folder.parent
    print(f"{target}: up to {num_bytes / 1e9:.1f} GB; {shutil.disk_usage(folder).free / 1e9:.1f} GB are free")


@contextmanager
def _progress(what: str, total: int) -> Iterator[tuple[Progress, TaskID]]:
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield progress, progress.add_task(what, total=total)


def _follower(progress: Progress, task: TaskID) -> Any:
    return lambda done: progress.update(task, completed=done)


def _counted(blocks: Iterable[np.ndarray], progress: Progress, task: TaskID) -> Iterator[np.ndarray]:
    for block in blocks:
        yield block
        progress.advance(task, len(block))


if __name__ == "__main__":
    sys.exit(main())
