"""Command line of ``main.py``: flags of the LDM family (``main_val.py`` included), Trainer arguments, overrides.

``run_command`` maps errors to messages and exit codes, for ``main.py`` and the scripts.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from ldm.config.trainer_args import KNOWN_ARGS, TRAINER_ARGS
from ldm.runs.disk import full_message, is_full, refused_message
from ldm.runs.folder import DEFAULT_LOGDIR, name_problem
from ldm.util import ConfigError, Interrupted, UserError, did_you_mean, mismatch

DEFAULT_SEED = 23
EXIT_USER_ERROR, EXIT_CTRL_C = 1, 130

_BOOLEANS = dict.fromkeys("yes true t y 1".split(), True) | dict.fromkeys("no false f n 0".split(), False)
_EXAMPLES = """examples:
  train, score and draw everything, without data files:
    python main.py --recipe configs/quickstart/recipe.yaml
  train one model:
    python main.py --base configs/latent-diffusion/example_vq_4_16_clip-dis.yaml -t --gpus 0, -l exp -n my_run -s 0
  check a config without training:
    python main.py --base my.yaml
  override keys of a config:
    python main.py --base my.yaml -t model.base_learning_rate=1e-5 data.params.batch_size=16
  accept targets that are refused (not classes of a model, data set, callback, ...), in a config that you trust:
    python main.py --base theirs.yaml -t allow_targets=[their_lab.tools]
  resume an interrupted run:
    python main.py -r logs/2026-01-31T12-00-00_my_run -t
"""

_OVERRIDE = re.compile(r"^[A-Za-z_][\w\-]*(\.[\w\-]+|\[\d+\])*=")
_NO_FILE = re.compile(r"=.*|true|false|null|-?[\d.]\S*|[A-Za-z_]\w*(\.\w+)+(?<!\.yaml)(?<!\.yml)")
_ALLOW = "allow_targets="
# Options with a free text value, which may contain "=".
_TEXT_OPTIONS = "-n --name -r --resume -p --project -f --postfix -l --logdir --recipe -dt --dis_loss_type".split()


@dataclass(frozen=True)
class Options:
    """Parsed command line.

    Attributes:
        base: config files, merged from left to right.
        overrides: ``a.b=c`` assignments, applied last.
        allow_targets: names of ``allow_targets=[...]``, see ``ldm.config.targets``.
        trainer: Trainer arguments given as flags, unparsed.
        seed, scale_lr, dis_weight, dis_loss_type, token_num: ``None`` if not given.
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
    schema: bool = False
    overrides: tuple[str, ...] = ()
    allow_targets: tuple[str, ...] = ()
    trainer: dict[str, str] = field(default_factory=dict)
    command: tuple[str, ...] = ()

    @property
    def log_root(self) -> str:
        """Folder of the runs."""
        return self.logdir or DEFAULT_LOGDIR


def parse_bool(text: str) -> bool:
    """Parse yes/true/t/y/1 and no/false/f/n/0 in any case."""
    try:
        return _BOOLEANS[text.lower()]
    except KeyError as error:
        raise argparse.ArgumentTypeError(f"expected true, false or key=value without spaces, got {text!r}") from error


def parse_seed(text: str) -> int:
    """Parse a random seed."""
    seed = int(text) if text.removeprefix("-").isdecimal() else text
    if problem := mismatch("Seed", seed):
        raise argparse.ArgumentTypeError(problem)
    return int(seed)


class _Parser(argparse.ArgumentParser):
    """A parser that raises ``ConfigError`` instead of exiting."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"command line: {message}. See python main.py --help")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser with all flags; Trainer arguments are in their own group."""
    parser = _Parser(
        prog="main.py",
        description="Train, validate, resume or test a model from config files, or run a recipe.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    flag = {"type": parse_bool, "nargs": "?", "const": True, "metavar": "BOOL"}
    switch = {**flag, "default": False}
    add = parser.add_argument
    add("-b", "--base", nargs="*", action="extend", default=[], metavar="YAML", help="config files, merged in order")
    add("-t", "--train", **switch, help="train; without it the config is only validated (with -r: tested)")
    add("-r", "--resume", default="", metavar="PATH", help="run folder or .ckpt to continue from")
    add("--recipe", metavar="YAML", help="run all stages of a recipe, then score and draw")
    add("-n", "--name", nargs="?", const="", default="", help="name of the run (default: name of the config)")
    add("-f", "--postfix", default="", help="suffix of the run's name")
    add("-l", "--logdir", metavar="DIR", help="folder of the runs (default: logs)")
    add("-s", "--seed", type=parse_seed, help=f"random seed (default: {DEFAULT_SEED})")
    add("--no-test", **switch, help="do not test after training")
    add("-d", "--debug", **switch, help="show tracebacks and debug messages; W&B offline")
    add("-p", "--project", help="name of the W&B project")
    add("--scale_lr", **flag, help="lr = accumulate x devices x batch size x base lr (default: true)")
    add("-dw", "--dis_weight", type=float, nargs="?", const=1.0, help="set model.params.dis_weight")
    add("-dt", "--dis_loss_type", nargs="?", metavar="TYPE", help="set model.params.dis_loss_type")
    add("--token_num", type=int, metavar="U", help="number of units: set latent_unit and the widths derived from it")
    add("--print-config", **switch, help="print the merged, resolved config and exit")
    add("--schema", **switch, help="print the JSON Schema of configs and recipes, for editors, and exit")
    group = parser.add_argument_group("Lightning Trainer (also under lightning.trainer in a config)")
    shown = TRAINER_ARGS | {"gpus", "resume_from_checkpoint"}
    for name in [*sorted(shown), *sorted(KNOWN_ARGS - shown)]:
        options = {"metavar": "VALUE"} if name in shown else {"help": argparse.SUPPRESS}
        group.add_argument(f"--{name}", nargs="?", const="true", default=argparse.SUPPRESS, **options)
    return parser


def parse_arguments(arguments: Sequence[str]) -> Options:
    """Parse the command line.

    Args:
        arguments: words after ``main.py``.

    Returns:
        The options; Trainer flags and overrides are collected.

    Raises:
        ConfigError: an unknown flag, an invalid value, or flags that exclude each other.
    """
    words, overrides = split_overrides(list(arguments))
    namespace, unknown = build_parser().parse_known_args(words)
    if unknown:
        _raise_unknown(unknown)
    values = vars(namespace)
    trainer = {name: values.pop(name) for name in list(values) if name in KNOWN_ARGS}
    values["base"] = tuple(values["base"])
    lists = [word.partition("=")[2].strip("[]") for word in overrides if word.startswith(_ALLOW)]
    values["allow_targets"] = tuple(name.strip(" '\"") for text in lists for name in text.split(","))
    overrides = [word for word in overrides if not word.startswith(_ALLOW)]
    if values["token_num"] == -1:  # default of EncDiff's main_val.py
        values["token_num"] = None
    options = Options(**values, overrides=tuple(overrides), trainer=trainer, command=("main.py", *arguments))
    for flag, text in (("-n/--name", options.name), ("-f/--postfix", options.postfix)):
        if problem := name_problem(text, is_suffix=flag.startswith("-f")):
            raise ConfigError(f"command line: {flag}: {problem}")
    for word in options.base:
        if _NO_FILE.fullmatch(word) and not Path(word).exists():
            raise ConfigError(f"command line: expected a .yaml file or key=value without spaces, got {word!r}")
    if options.name and options.resume:
        raise ConfigError(
            "command line: -n/--name and -r/--resume exclude each other, because a resumed run keeps its folder. To "
            "start a new run from a checkpoint, use -n together with --resume_from_checkpoint PATH"
        )
    if options.recipe and (options.base or options.resume or options.name):
        raise ConfigError("command line: --recipe excludes -b, -r and -n, because a recipe names its configs and runs")
    if not (options.base or options.resume or options.recipe or options.schema):
        raise ConfigError("nothing to do: pass --base CONFIG.yaml, -r RUN or --recipe RECIPE.yaml. See --help")
    return options


def split_overrides(words: list[str]) -> tuple[list[str], list[str]]:
    """Separate ``a.b=c`` words from flags, so that their order does not matter."""
    rest: list[str] = []
    overrides: list[str] = []
    for index, word in enumerate(words):
        is_text = index > 0 and words[index - 1] in _TEXT_OPTIONS
        (overrides if _OVERRIDE.match(word) and not is_text else rest).append(word)
    return rest, overrides


def run_command(command: Callable[[], int | None], *errors: type[Exception], debug: bool = False) -> int:
    """Run a command and return its exit code: its own or 0, 1 after an error, 128 + the number of a stop signal.

    Messages are written to standard error.

    Args:
        command: the command.
        *errors: types of errors that are messages to the user, beside ``ConfigError``, ``UserError``, a full disk and
            missing permissions.
        debug: raise errors instead.
    """
    try:
        with stop_signals(_interrupt):
            return command() or 0
    except (ConfigError, UserError, *errors) as error:
        if debug:
            raise
        message, code = f"error: {error}", EXIT_USER_ERROR
    except OSError as error:
        text = full_message(error) if is_full(error) else refused_message(error)
        if debug or text is None:
            raise
        message, code = f"error: {text}", EXIT_USER_ERROR
    except KeyboardInterrupt:
        message, code = "interrupted", EXIT_CTRL_C
    except Interrupted as stop:
        message, code = str(stop), stop.exit_code
    sys.stderr.write(f"{message}\n")
    return code


def _interrupt(number: int, frame: Any) -> None:
    raise Interrupted(number)


@contextlib.contextmanager
def stop_signals(handler: Callable[[int, Any], None], *names: str) -> Iterator[None]:
    """Handle SIGTERM, SIGHUP (a closed terminal) and further signals, by name, unless they are ignored as by ``nohup``.

    By default they end the process without clean-up. Signals are handled in the main thread only.
    """
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        wanted = {"SIGTERM", "SIGHUP", *names} & signal.Signals.__members__.keys()  # Windows has no SIGHUP
        for number in (signal.Signals[name] for name in wanted):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def _raise_unknown(unknown: Sequence[str]) -> NoReturn:
    """Raise for words that are neither flags nor overrides, with the nearest flag."""
    word = next((word for word in unknown if word.startswith("-")), unknown[0])
    if not word.startswith("-"):
        raise ConfigError(f"command line: unrecognized argument {word!r}. Overrides have the form model.params.x=1")
    flag = word.split("=")[0]
    hint = did_you_mean(flag, build_parser()._option_string_actions)
    raise ConfigError(f"command line: unrecognized argument {flag}.{hint} See python main.py --help")
