"""Score stored representations in parallel and show one table over runs and seeds."""

from __future__ import annotations

import argparse
import os
import signal
import sys

EXAMPLES = """examples:
  score every run below logs, on all cores:
    python run_para_metrics.py -l logs
  one run, two processes, results also as CSV:
    python run_para_metrics.py -l logs/2026-01-31T12-00-00_shapes3d_s0 -p 2 --csv results_detail.csv
  keep scoring while training goes on, looking every five minutes:
    python run_para_metrics.py -l logs --watch 300
  files of older code that do not name their data set:
    python run_para_metrics.py -l logs -d cars3d
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
    add("--seed", type=int, default=0, help="seed of the metrics' random draws; published scores use 0, others go to "
        "dis_metrics/seed=N (default: 0)")
    add("--watch", type=float, nargs="?", const=60.0, metavar="SECONDS",
        help="do not end, but look for new files every so many seconds (60)")
    add("--csv", metavar="FILE", help="also write the figures of all scored checkpoints to this file")
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
    from ldm.evaluation.score_command import run_scoring  # late, so that --help answers at once
    from ldm.util import ConfigError, UserError

    try:
        return run_scoring(**vars(arguments))
    except (UserError, ConfigError, OSError) as err:
        print(f"error: {err}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted. What was finished is kept; the same command continues.", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
