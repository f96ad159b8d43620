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
  every metric there is, and the spread over ten seeds of the metrics' own draws:
    python run_para_metrics.py -l logs --metrics all --seeds 0-9
  the settings of disentanglement_lib, table for a paper:
    python run_para_metrics.py -l logs --protocol disentanglement_lib --latex table.tex --markdown table.md
  keep scoring while training goes on, looking every five minutes:
    python run_para_metrics.py -l logs --watch 300
  on a Dask cluster (pip install -e .[cluster]; folders shared with its workers):
    python run_para_metrics.py -l logs --scheduler tcp://node17:8786
  files of older code that do not name their data set:
    python run_para_metrics.py -l logs -d cars3d
  anyone's latents, (N, K) or (N, U, D), of a known data set or with a table of factors:
    python run_para_metrics.py --latents z.npy -d shapes3d --metrics all --out scores.json
    python run_para_metrics.py --latents z.parquet --factors factors.csv --out scores.json
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
    add("-d", "--dataset", help="data set of files that do not say theirs: shapes3d, mpi3d, cars3d, dsprites, ...")
    add(
        "--metrics",
        nargs="+",
        metavar="NAME",
        help="beta_vae dci mig factor_vae sap modularity_explicitness irs "
        "unsupervised med, or all (default: what the protocol runs)",
    )
    add(
        "--protocol",
        default="disdiff",
        help="disdiff (default: that of DisDiff and EncDiff), disentanglement_lib, "
        "med or fast; other protocols' scores go to dis_metrics/protocol=NAME",
    )
    add(
        "--seeds",
        default="0",
        metavar="0-9",
        help="seeds of the metrics' random draws; published scores use 0, others go to dis_metrics/seed=N (default: 0)",
    )
    add(
        "--watch",
        type=float,
        nargs="?",
        const=60.0,
        metavar="SECONDS",
        help="do not end, but look for new files every so many seconds (60)",
    )
    add("--scheduler", metavar="tcp://HOST:PORT", help="let the workers of this Dask scheduler do the jobs")
    add("--csv", metavar="FILE", help="also write the figures of all scored checkpoints to this file")
    add("--latex", metavar="FILE", help="also write the table as LaTeX")
    add("--markdown", metavar="FILE", help="also write the table as Markdown")
    add("--report", action="store_true", help="also write report.html into each run and, of several runs, into -l")
    add("--latents", metavar="FILE", help="score this array instead of runs: .npy .npz .h5 .parquet .csv")
    add("--factors", metavar="FILE", help="with --latents: factors of each image, one row per image, instead of -d")
    add("--out", metavar="FILE", help="with --latents: the score file (default: <latents>.scores.json)")
    arguments = parser.parse_args()
    if arguments.processes < 1:
        parser.error(f"-p {arguments.processes}: at least one process is needed")
    return arguments


def main() -> int:
    """Run the command; returns its exit status."""
    arguments = parse_arguments()
    for name in ("SIGTERM", "SIGHUP"):  # a batch system or a closed terminal ends it as cleanly as Ctrl-C
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    from ldm.scoring.command import Options, run_scoring  # late, so that --help answers at once
    from ldm.util import ConfigError, UserError

    try:
        return run_scoring(Options(**vars(arguments)))
    except (UserError, ConfigError, OSError) as err:
        print(f"error: {err}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted. What was finished is kept; the same command continues.", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
