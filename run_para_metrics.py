"""Score stored representations in parallel, show one table over runs and seeds, write reports."""

from __future__ import annotations

import argparse
import os
import signal
import sys

EXAMPLES = """examples:
  score every run below logs, on all cores:
    python run_para_metrics.py -l logs
  one run, two processes, results also as CSV, with a report to open in a browser:
    python run_para_metrics.py -l logs/2026-01-31T12-00-00_shapes3d_s0 -p 2 --csv results_detail.csv --report
  all metrics, with the spread over ten seeds of their random draws:
    python run_para_metrics.py -l logs --metrics all --seeds 0-9
  settings of disentanglement_lib, with a table for a paper:
    python run_para_metrics.py -l logs --protocol disentanglement_lib --latex table.tex --markdown table.md
  how far the scores can be trusted: intervals, baselines, changed units, noise between runs:
    python run_para_metrics.py -l logs --trust --report
  score new files during training, polling every five minutes:
    python run_para_metrics.py -l logs --watch 300
  on a Dask cluster whose workers share the folders:
    python run_para_metrics.py -l logs --scheduler tcp://node17:8786
  files of other code, without the name of their data set:
    python run_para_metrics.py -l logs -d cars3d
  a metric of your own, ALIGNMENT in my_metric.py (see CONTRIBUTING.md):
    python run_para_metrics.py -l logs --metrics my_metric.ALIGNMENT
  any latents, (N, K) or (N, U, D), of a known data set or with a table of factors:
    python run_para_metrics.py --latents z.npy -d shapes3d --metrics all --out scores.json
    python run_para_metrics.py --latents z.parquet --factors factors.csv --out scores.json
  continuous factors in bins, rows without labels left out, units divided by their standard deviation:
    python run_para_metrics.py --latents z.csv --factors f.csv --bins size=10 x=equal_frequency:10 y=0,0.5,1
    python run_para_metrics.py --latents z.csv --factors f.csv --missing drop --standardize
"""
INTERRUPTED = 130  # exit status of a command ended by Ctrl-C


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Score <run>/dis_repre/*.npz into <run>/dis_metrics/<step>.json. Finished scores and parts of "
        "interrupted ones are kept, so the same command continues.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("-l", "--logdir", default="logs", help="a run folder, or any folder above runs (default: logs)")
    add("-p", "--processes", type=int, default=os.cpu_count() or 1, help="processes (default: the CPU cores)")
    add("-d", "--dataset", help="data set of files without metadata: shapes3d, mpi3d, cars3d, dsprites, ...")
    add(
        "--metrics",
        nargs="+",
        metavar="NAME",
        help="beta_vae dci mig factor_vae sap modularity_explicitness irs unsupervised med, or all of these; infomec "
        "mcc r2 dci_lasso dci_forest dci_boosted dci_es mig_sup dcimig jemmig downstream_task reduced_downstream_task "
        "fairness; or the dotted path of a metric in a file of your own (default: the metrics of the protocol)",
    )
    add(
        "--protocol",
        default="disdiff",
        help="disdiff (default; used by DisDiff and EncDiff), disentanglement_lib, med or fast; scores of other "
        "protocols than disdiff are written to dis_metrics/protocol=NAME",
    )
    add(
        "--seeds",
        default="0",
        metavar="0-9",
        help="seeds of the random draws of metrics; published scores use 0, other scores are written to "
        "dis_metrics/seed=N (default: 0)",
    )
    add(
        "--watch",
        type=float,
        nargs="?",
        const=60.0,
        metavar="SECONDS",
        help="poll for new files every SECONDS (default: 60)",
    )
    add("--scheduler", metavar="tcp://HOST:PORT", help="use the workers of this Dask scheduler")
    add("--csv", metavar="FILE", help="also write the figures of all scored checkpoints to this file")
    add("--latex", metavar="FILE", help="also write the table as LaTeX")
    add("--markdown", metavar="FILE", help="also write the table as Markdown")
    add("--report", action="store_true", help="also write report.html into each run, and into -l for several runs")
    add(
        "--trust",
        type=int,
        nargs="?",
        const=10,
        metavar="N",
        help="also show how far the latest scores can be trusted, by N replicates (default: 10), baselines and changed "
        "units; written to dis_metrics/trust",
    )
    add("--latents", metavar="FILE", help="score this array instead of runs: .npy .npz .h5 .parquet .csv")
    add("--factors", metavar="FILE", help="with --latents: factors of each image, one row per image, instead of -d")
    add("--out", metavar="FILE", help="with --latents: the score file (default: <latents>.scores.json)")
    add(
        "--missing",
        choices=("error", "drop"),
        default="error",
        help="with --factors: stop at a row without a value of a factor (default), or leave such rows out",
    )
    add(
        "--bins",
        nargs="+",
        default=(),
        metavar="NAME=BINS",
        help="with --factors: divide a continuous factor into bins of equal width (NAME=10), of equal frequency "
        "(NAME=equal_frequency:10), or at inner edges (NAME=0,0.5,1)",
    )
    add(
        "--standardize",
        action="store_true",
        help="divide each unit by its standard deviation; scores of runs are written to dis_metrics/standardized",
    )
    arguments = parser.parse_args()
    if arguments.processes < 1:
        parser.error(f"-p/--processes: expected at least 1, got {arguments.processes}")
    if arguments.watch is not None and not 0 < arguments.watch < float("inf"):
        parser.error(f"--watch: expected a positive number of seconds, got {arguments.watch:g}")
    return arguments


def score(arguments: argparse.Namespace) -> int:
    """Score and return the exit status; packages are imported here, so that --help is quick."""
    from ldm.runs.disk import full_message, is_full
    from ldm.scoring.command import run_scoring
    from ldm.scoring.run import Options
    from ldm.util import ConfigError, UserError

    try:
        return run_scoring(Options(**vars(arguments)))
    except (UserError, ConfigError, OSError) as error:
        print(f"error: {full_message(error) if is_full(error) else error}", file=sys.stderr)
        return 1


def main() -> int:
    """Run the command and return its exit status."""
    arguments = parse_arguments()
    names = {"SIGINT", "SIGTERM", "SIGHUP"}  # Ctrl-C, a batch system, a closed terminal: all end it in the same way
    signals = [number for number in signal.Signals if number.name in names]
    for number in signals:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    try:
        return score(arguments)
    except KeyboardInterrupt:
        for number in signals:
            signal.signal(number, signal.SIG_IGN)
        print("interrupted: finished results are kept; rerun the same command to continue", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
