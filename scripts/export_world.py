"""Write the embedded world as a file in the layout of 3dshapes.h5:

    python scripts/export_world.py data/shapes3d/3dshapes.h5
"""

from __future__ import annotations

import argparse
import sys

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ldm.data.shapes3d import COUNT, write_shapes3d
from ldm.util import ConfigError, UserError


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", help="the file to write, for example data/shapes3d/3dshapes.h5")
    parser.add_argument("--limit", type=int, help=f"write only the first LIMIT of {COUNT:,} images")
    options = parser.parse_args(arguments)
    columns = (TextColumn("images"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns) as progress:
            task = progress.add_task("images", total=min(options.limit or COUNT, COUNT))
            count = write_shapes3d(options.path, options.limit, lambda done: progress.update(task, completed=done))
    except (ConfigError, UserError) as err:
        print(err, file=sys.stderr)
        return 1
    print(f"{count:,} images written to {options.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
