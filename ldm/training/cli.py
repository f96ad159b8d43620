"""The command line of ``main.py``: every flag of the LDM family, every Trainer argument, dotted overrides."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from ldm.config.trainer_args import DROPPED_ARGS, KNOWN_ARGS, RENAMED_ARGS, TRAINER_ARGS
from ldm.runs.folder import DEFAULT_LOGDIR
from ldm.util import ConfigError, did_you_mean

DEFAULT_SEED = 23

_EXAMPLES = """examples:
  everything, from no file at all to scored and drawn results:
    python main.py --recipe configs/quickstart/recipe.yaml
  train one model:
    python main.py --base configs/latent-diffusion/example_vq_4_16_clip-dis.yaml -t --gpus 0, -l exp -n my_run -s 0
  check a config without training:
    python main.py --base my.yaml
  change keys without editing a file:
    python main.py --base my.yaml -t model.base_learning_rate=1e-5 data.params.batch_size=16
  continue a stopped run exactly where it stopped:
    python main.py -r logs/2026-01-31T12-00-00_my_run -t
"""

_OVERRIDE = re.compile(r"^[A-Za-z_][\w\-]*(\.[\w\-]+|\[\d+\])*=")
# Options whose value is free text and may itself hold an "=".
_TEXT_OPTIONS = frozenset(
    "-n --name -r --resume -p --project -f --postfix -l --logdir --recipe -dt --dis_loss_type".split()
)


@dataclass(frozen=True)
class Options:
    """What the user asked for.

    Attributes:
        base: config files, merged from left to right.
        overrides: ``a.b=c`` assignments, applied last.
        trainer: Trainer arguments given as flags, as written.
        seed, scale_lr, dis_weight, dis_loss_type, token_num: ``None`` where not given.
        command: the command line, for the record.
    """

    name: str = ""
    resume: str = ""
    base: tuple[str, ...] = ()
    train: bool = False
    no_test: bool = False
    project: str | None = None
    debug: bool = False
    seed: int | None = None
    postfix: str = ""
    logdir: str | None = None
    scale_lr: bool | None = None
    dis_weight: float | None = None
    dis_loss_type: str | None = None
    token_num: int | None = None
    recipe: str | None = None
    print_config: bool = False
    overrides: tuple[str, ...] = ()
    trainer: dict[str, str] = field(default_factory=dict)
    command: tuple[str, ...] = ()

    @property
    def log_root(self) -> str:
        """Folder that holds the runs."""
        return self.logdir or DEFAULT_LOGDIR


def str2bool(text: str | bool) -> bool:
    """Read yes/true/t/y/1 and no/false/f/n/0 in any case."""
    if isinstance(text, bool):
        return text
    if text.lower() in ("yes", "true", "t", "y", "1"):
        return True
    if text.lower() in ("no", "false", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is no yes or no; write true or false")


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints are ``ConfigError``s, so that they read like all other messages."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"command line: {message}. See python main.py --help")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser with all flags; Trainer arguments are in groups of their own."""
    parser = _Parser(
        prog="main.py",
        description="Train, check, resume or test one model from config files; or run a whole recipe.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_run_flags(parser)
    flag = {"type": str2bool, "nargs": "?", "const": True}
    add = parser.add_argument
    add("--scale_lr", **flag, metavar="BOOL", help="lr = accumulate x devices x batch size x base lr (default)")
    add("-dw", "--dis_weight", type=float, nargs="?", const=1.0, help="writes model.params.dis_weight")
    add("-dt", "--dis_loss_type", nargs="?", metavar="TYPE", help="writes model.params.dis_loss_type")
    add("--token_num", type=int, metavar="U", help="number of units: writes latent_unit and what follows from it")
    add("--print-config", **flag, default=False, metavar="BOOL", help="print the merged, resolved config and stop")
    group = parser.add_argument_group("Lightning Trainer (also under lightning.trainer in a config)")
    for name in sorted(TRAINER_ARGS | {"gpus", "resume_from_checkpoint"}):
        group.add_argument(f"--{name}", nargs="?", const="true", default=argparse.SUPPRESS, metavar="VALUE")
    for name in sorted((RENAMED_ARGS | DROPPED_ARGS) - {"gpus", "resume_from_checkpoint"}):
        group.add_argument(f"--{name}", nargs="?", const="true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return parser


def _add_run_flags(parser: argparse.ArgumentParser) -> None:
    """Add what to run, on which configs, and where the run goes."""
    flag = {"type": str2bool, "nargs": "?", "const": True, "default": False, "metavar": "BOOL"}
    add = parser.add_argument
    add("-b", "--base", nargs="*", action="extend", default=[], metavar="YAML", help="configs, merged in order")
    add("-t", "--train", **flag, help="train; without it the config is only checked (with -r: tested)")
    add("-r", "--resume", default="", metavar="PATH", help="run folder or .ckpt to continue from")
    add("--recipe", metavar="YAML", help="run all stages of a recipe, then score and draw")
    add("-n", "--name", nargs="?", const="", default="", help="name of the run (default: the config's name)")
    add("-f", "--postfix", default="", help="added to the run's name")
    add("-l", "--logdir", metavar="DIR", help="folder of the runs (default: logs)")
    add("-s", "--seed", type=int, help=f"seed of everything random (default: {DEFAULT_SEED})")
    add("--no-test", **flag, help="do not test after training")
    add("-d", "--debug", **flag, help="show tracebacks and debug messages; W&B offline")
    add("-p", "--project", help="name of the W&B project")


def parse_arguments(arguments: Sequence[str]) -> Options:
    """Read the command line.

    Args:
        arguments: words after ``main.py``.

    Returns:
        The options, with Trainer flags and overrides gathered.

    Raises:
        ConfigError: an unknown flag, a wrong value, or flags that exclude each other.
    """
    words, overrides = split_overrides(list(arguments))
    namespace, unknown = build_parser().parse_known_args(words)
    if unknown:
        _complain_unknown(unknown)
    values = vars(namespace)
    trainer = {name: values.pop(name) for name in list(values) if name in KNOWN_ARGS}
    values["base"] = tuple(values["base"])
    if values["token_num"] == -1:  # EncDiff's way to say nothing
        values["token_num"] = None
    options = Options(**values, overrides=tuple(overrides), trainer=trainer, command=("main.py", *arguments))
    if options.name and options.resume:
        raise ConfigError(
            "-n/--name and -r/--resume exclude each other: a resumed run keeps its folder. To start a new run "
            "from a checkpoint use -n together with --resume_from_checkpoint PATH"
        )
    if options.recipe and (options.base or options.resume or options.name):
        raise ConfigError("--recipe names its own configs and runs: leave out -b, -r and -n")
    if not (options.base or options.resume or options.recipe):
        raise ConfigError("nothing to do: give --base CONFIG.yaml, -r RUN or --recipe RECIPE.yaml. See --help")
    return options


def split_overrides(words: list[str]) -> tuple[list[str], list[str]]:
    """Take the ``a.b=c`` words out, so that ``-b x.yaml -t a.b=c`` needs no care about their order."""
    rest: list[str] = []
    overrides: list[str] = []
    for index, word in enumerate(words):
        is_text = index > 0 and words[index - 1] in _TEXT_OPTIONS
        (overrides if _OVERRIDE.match(word) and not is_text else rest).append(word)
    return rest, overrides


def _complain_unknown(unknown: Sequence[str]) -> NoReturn:
    """Raise for words that are neither flags nor overrides, with the nearest flag."""
    word = next((word for word in unknown if word.startswith("-")), unknown[0])
    if not word.startswith("-"):
        raise ConfigError(f"command line: {word!r} is no flag and no override; overrides look like model.params.x=1")
    flag = word.split("=")[0]
    flags = [text for action in build_parser()._actions for text in action.option_strings]
    hint = did_you_mean(flag, flags)
    raise ConfigError(f"command line: unknown flag {flag}.{hint} See python main.py --help")
