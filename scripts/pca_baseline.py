"""Score a principal component analysis of the pixels by the published protocol, as a baseline for a run:

    python scripts/pca_baseline.py -r logs/quickstart/2026-01-31T12-00-00_encdiff
    python scripts/pca_baseline.py -b configs/quickstart/world.yaml -k 20 -l logs/pixel_pca

With -r, the data set and the number of components are those of the run, results are written to <run>/pixel_pca, and the
run's own scores are printed beside them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ldm.config.loading import load_config
from ldm.evaluation.pixel_pca import FOLDER, write_pixel_pca
from ldm.runs.find import resolve_resume
from ldm.scoring.files import figures_of, latent_paths, read_latent_file, read_scores
from ldm.scoring.run import Options, score_folder
from ldm.training.cli import run_command
from ldm.util import UserError, instantiate_from_config


def read_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("-r", "--run", metavar="PATH", help="a run with a representation (dis_repre)")
    source.add_argument("-b", "--base", metavar="YAML", nargs="+", help="configs with the data set in data.params.test")
    parser.add_argument("-k", "--components", type=int, metavar="K", help="components (default: the run's units)")
    parser.add_argument(
        "-l",
        "--logdir",
        metavar="PATH",
        default="logs/pixel_pca",
        help="output folder without -r (default: %(default)s)",
    )
    parser.add_argument("-p", "--processes", type=int, default=1, help="number of processes for scoring (default: 1)")
    return parser.parse_args(arguments)


def num_units(run: Path) -> int:
    """Return the number of units of the newest representation of a run."""
    paths = latent_paths(run)
    if not paths:
        raise UserError(f"{run}: no representation in dis_repre. Write one (python main.py -r {run}), or pass -k")
    return read_latent_file(paths[-1]).shape[1]


def print_scores(folders: dict[str, Path]) -> None:
    """Print the newest scores, one row per folder."""
    table = Table(title="scores over the whole data set")
    rows = {}
    for label, folder in folders.items():
        scores = read_scores(folder, seed=0)
        rows[label] = figures_of(scores[max(scores)]) if scores else {}
    columns = list(dict.fromkeys(name for figures in rows.values() for name in figures))
    for heading in ("", *columns):
        table.add_column(heading, justify="right" if heading else "left")
    for label, figures in rows.items():
        table.add_row(label, *(f"{figures[name]:.3f}" if name in figures else "-" for name in columns))
    Console(soft_wrap=True).print(table)


def score(options: argparse.Namespace) -> int:
    """Write the baseline, score it, print the table, and return the exit code."""
    folders = {}
    if options.run:
        source = resolve_resume(options.run)
        run, config = source.folder.path, load_config(source.configs)
        folder, components = run / FOLDER, options.components or num_units(run)
        folders[run.name] = run
    else:
        if not options.components:
            raise UserError("-k: the number of components is required without -r")
        config, folder, components = load_config(options.base), Path(options.logdir), options.components
    sections = config.section("data").get("params") or {}
    if not sections.get("test"):
        raise UserError("data.params.test: expected a data set with known factors, got none")
    dataset = instantiate_from_config(sections["test"])
    for path in (folder / "dis_metrics").glob("*.json"):
        path.unlink()  # of another number of components
    write_pixel_pca(dataset, components, folder)
    report = score_folder(Options(folder, options.processes))
    for failure in report.failures:
        print(failure, file=sys.stderr)
    print_scores({f"PCA of pixels, {components} components": folder, **folders})
    return 1 if report.failures else 0


def main(arguments: list[str] | None = None) -> int:
    options = read_options(arguments)
    return run_command(lambda: score(options))


if __name__ == "__main__":
    sys.exit(main())
