"""Train, validate, resume or test a model from config files, or run a recipe: ``python main.py --help``."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence

from ldm.config.targets import allow
from ldm.training.cli import Options, parse_arguments, run_command

_SHOWN = ("ldm", "pytorch_lightning.callbacks.model_summary")


def configure_logging(debug: bool) -> None:
    """Show log messages of this package as plain lines, and warnings of others."""
    handler = logging.StreamHandler()
    if not debug:
        handler.addFilter(lambda record: record.name.startswith(_SHOWN) or record.levelno >= logging.WARNING)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"  # processes of further devices show warnings only
    logging.getLogger("ldm").setLevel(logging.DEBUG if debug else logging.INFO if is_first else logging.WARNING)
    if not debug:
        os.environ.setdefault("POSSIBLE_USER_WARNINGS", "off")  # Lightning's advice on numbers of workers
        warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning 2.6 on torch 2.15
        warnings.filterwarnings("ignore", message=".*exists and is not empty.*")  # true for every resumed run
        warnings.filterwarnings("ignore", message=".*could not find the monitored key.*")  # ended before a validation
        warnings.filterwarnings("ignore", message="The dirpath has changed.*")  # best files are selected anew
        warnings.filterwarnings("ignore", message=".*on_before_batch_transfer.*")  # where labels are checked on the CPU


def dispatch(options: Options) -> None:
    """Run the command; heavy packages are imported only if training starts."""
    allow(options.allow_targets)
    if options.schema:
        from ldm.config.schema import schema_text

        sys.stdout.write(schema_text())
        return
    if options.recipe:
        from ldm.training.recipe import run_recipe

        run_recipe(options)
        return
    from ldm.training.plan import make_plan, print_config, report_config

    plan = make_plan(options)
    if options.print_config:
        print_config(plan)
    elif not options.train and plan.resume is None:
        report_config(plan)
    else:
        from ldm.training.run import run

        run(plan)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code; see ``run_command``."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    debug = any(word in ("-d", "--debug") for word in words)
    configure_logging(debug)
    return run_command(lambda: dispatch(parse_arguments(words)), debug=debug)


if __name__ == "__main__":
    sys.exit(main())
