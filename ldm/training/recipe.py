"""Recipes: several runs that build on each other, trained, scored and reported by one command.

A recipe is a YAML file::

    name: quickstart
    logdir: logs/quickstart
    seed: 0
    stages:
      - name: vq                                  # name of the run; later configs use ${last_run:vq}
        base: [configs/quickstart/vq.yaml]
        overrides: [lightning.trainer.max_epochs=4]
    score: {processes: 2}                         # or null

Every stage is a ``main.py`` command in its own process. The command is printed and can be repeated by hand.

A recipe with the key ``data`` is for any images: ``data: FILE``, or ``data: null`` and ``data=FILE`` on the command
line, names the user's file (``ldm.training.own_data``). Its data sets are written to ``<logdir>/data.yaml``, the first
config of every stage. A stage with ``first_stage: vq`` or ``first_stage: pixels`` is left out with the other one, and
``{first_stage}`` in ``base`` is replaced by its name.
"""

from __future__ import annotations

import contextlib
import logging
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ldm.config.loading import COMMAND_LINE, Config, load_config, save_config
from ldm.config.validation import check_keys, check_values
from ldm.runs.disk import require_writable
from ldm.runs.find import list_runs
from ldm.runs.folder import RunFolder, name_problem
from ldm.runs.lock import exclusive
from ldm.runs.records import RESULTS_FILE, RUN_FILE, read_json, utc_now, write_json
from ldm.training.cli import Options, stop_signals
from ldm.training.own_data import OwnData, read_own_data
from ldm.training.plan import Plan, make_plan
from ldm.util import ConfigError, Interrupted, UserError, did_you_mean

logger = logging.getLogger(__name__)

DATA_FILE = "data.yaml"
_HANGUP = 1  # SIGHUP, which Windows lacks
# Key of a recipe or of a stage -> annotation of its values.
_TYPES = {"name": "Word | int", "logdir": "AnyPath | None", "seed": "Seed", "stages": "Sequence[Mapping]"}
_STAGE_TYPES = {"name": "Word | int", "base": "Sequence[Word]", "overrides": "Sequence[Word] | None"}
_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Recipe:
    """A recipe file with the options of the command line; a stage is the options of ``main.py`` that train it."""

    name: str
    logdir: str
    seed: int
    stages: tuple[Options, ...]
    score: Mapping[str, Any] | None
    figures: Mapping[str, None] = field(default_factory=dict)  # figures of stages that are left out
    notes: tuple[str, ...] = ()  # reasons why figures are missing
    sources: Mapping[str, str] = field(default_factory=dict)  # stage.key of overrides -> file and key above it


def load_recipe(options: Options, on_folder: Callable[[Path], None] = lambda folder: None) -> Recipe:
    """Load a recipe and apply ``-l``, ``-s``, ``data=FILE`` and ``stage.key=value`` words; writes ``data.yaml``.

    Args:
        options: options of the command line.
        on_folder: called with the folder of the runs before a file is written.

    Raises:
        ConfigError: a key or stage is unknown or missing.
        UserError: a file does not exist.
    """
    config = load_config([str(options.recipe)], kind="recipe")
    path, content = config.files[0], config.content
    known = ("name", "logdir", "seed", "data", "stages", "score")
    check_keys(config, "", content, known, required=("name", "stages"))
    check_values(config, "", content, _TYPES)
    if problem := name_problem(str(content["name"])):
        raise config.error("name", problem)
    if content.get("score") is not None:
        check_keys(config, "score", content["score"], ("processes",))
        check_values(config, "score", content["score"], {"processes": "Count"})
    own = _own_data(config, [word for word in options.overrides if word.startswith("data=")])
    extra: dict[str, list[str]] = {name: [*words] for name, words in (own.overrides if own else {}).items()}
    for word in options.overrides:
        stage, _, rest = word.partition(".")
        if not word.startswith("data="):
            extra.setdefault(stage, []).append(rest)
    seed = options.seed if options.seed is not None else int(content.get("seed", 0))
    logdir = options.logdir or str(content.get("logdir") or f"logs/{content['name']}")
    common = Options(train=True, logdir=logdir, seed=seed, trainer=options.trainer)
    stages = [replace(common, **entry) for entry in _stages(config, own.first_stage if own else None)]
    given = [(path, stage.name, stage.overrides) for stage in stages]
    given += [(own.file, *item) for item in own.overrides.items()] if own else []
    sources = {f"{name}.{word}".partition("=")[0]: f"{file}: stages." for file, name, words in given for word in words}
    sources |= {word.partition("=")[0]: "command line: " for word in options.overrides}
    stages = [replace(stage, overrides=(*stage.overrides, *extra.pop(stage.name, ()))) for stage in stages]
    if extra:
        names, unknown = [stage.name for stage in stages], next(iter(extra))
        where = f"{own.file}: stages" if own and unknown in own.overrides else "command line"
        raise ConfigError(
            f"{where}: expected a stage of {path} ({', '.join(names)}), got {unknown!r}."
            f"{did_you_mean(unknown, names)} Overrides of a recipe have the form {names[0]}.model.params.x=1"
        )
    on_folder(Path(logdir))
    recipe = Recipe(str(content["name"]), logdir, seed, tuple(stages), content.get("score"), sources=sources)
    return recipe if own is None else _with_own_data(recipe, own)


def _own_data(config: Config, words: Sequence[str]) -> OwnData | None:
    """Return the contents of the user's file; None for a recipe that names its data itself."""
    path, file = config.files[0], words[-1].partition("=")[2] if words else config.content.get("data")
    if "data" not in config.content and words:
        expected = "expected a recipe with the key data, such as configs/own_data/recipe.yaml"
        raise ConfigError(f"command line: {words[0]}: {expected}, got {path}. Change the recipe")
    if "data" in config.content and not file:
        command = f"python main.py --recipe {path} data=mine.yaml"
        raise config.error("data", f"expected the file of your images, got none. Run: {command}")
    return read_own_data(str(file)) if file else None


def _stages(config: Config, first_stage: str | None) -> Iterator[dict[str, Any]]:
    """Yield the name, configs and overrides of every stage; those of another first stage are left out."""
    known = ("name", "base", "overrides", *(() if first_stage is None else ("first_stage",)))
    for index, entry in enumerate(config.content["stages"]):
        check_keys(config, f"stages.{index}", entry, known, required=("name", "base"))
        check_values(config, f"stages.{index}", entry, _STAGE_TYPES)
        if problem := name_problem(name := str(entry["name"])):
            raise config.error(f"stages.{index}.name", problem)
        if entry.get("first_stage") in (None, first_stage):
            base = tuple(file.replace("{first_stage}", str(first_stage)) for file in entry["base"])
            yield {"name": name, "base": base, "overrides": tuple(entry.get("overrides") or ())}


def _with_own_data(recipe: Recipe, own: OwnData) -> Recipe:
    """Return a recipe whose stages start with the user's data, without figures that cannot be computed."""
    file = Path(recipe.logdir) / DATA_FILE
    save_config(file, own.sections, f"Data of all stages, written by a recipe from {own.file}")
    stages = tuple(replace(stage, base=(str(file), *stage.base)) for stage in recipe.stages)
    figures, notes = {}, []
    if own.first_stage == "pixels":
        figures, notes = {"psnr": None}, ["no psnr: the models work on pixels"]
    if recipe.score is not None and not own.has_factors:
        notes.append("no disentanglement metrics: they need equally many images of every combination of the attributes")
    score = recipe.score if own.has_factors else None
    return replace(recipe, stages=stages, score=score, figures=figures, notes=tuple(notes))


def run_recipe(options: Options) -> Path:
    """Run the stages that are not finished, score, collect the figures and print them.

    Returns:
        ``<logdir>/<recipe>_results.json``.

    Raises:
        ConfigError, UserError: a stage cannot be run.
        Interrupted: stopped by Ctrl-C, SIGTERM or SIGHUP; the same command continues the recipe.
    """
    with contextlib.ExitStack() as stack:
        return _run_recipe(load_recipe(options, lambda folder: stack.enter_context(_locked(folder))), options)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock the folder of a recipe against a second recipe, which would train the same stages."""
    require_writable(folder, "Choose another folder with -l")
    folder.mkdir(parents=True, exist_ok=True)
    with exclusive(folder / ".recipe.lock", f"recipe in {folder}"):
        yield


def _run_recipe(recipe: Recipe, options: Options) -> Path:
    again = shlex.join(["python", *options.command])
    for stage in recipe.stages:
        _plan(replace(stage, train=False), recipe.sources)
    runs = {stage.name: _run_stage(stage, again) for stage in recipe.stages}
    seconds = {name: float(read_json(run / RUN_FILE).get("seconds") or 0.0) for name, run in runs.items()}
    if recipe.score is not None:
        started = time.monotonic()
        flags = ["-l", recipe.logdir, "-p", str(recipe.score.get("processes", 1))]
        _call([sys.executable, str(_ROOT / "run_para_metrics.py"), *flags], "scoring", again)
        seconds["score"] = round(time.monotonic() - started, 1)
    return gather(recipe, runs, seconds)


def _plan(stage: Options, sources: Mapping[str, str]) -> Plan:
    """Return the plan of a stage; errors of overrides name it and the file."""
    try:
        return make_plan(stage)
    except (ConfigError, UserError) as error:
        text = f"{stage.name}.{str(error).removeprefix(f'{COMMAND_LINE}: ')}"
        source = next((sources[key] for key in sources if text.startswith((f"{key}:", f"{key}."))), None)
        if source is None:
            raise
        raise ConfigError(f"{source}{text}") from error


def _run_stage(stage: Options, again: str) -> Path:
    """Train, continue or skip a stage, and return its run folder."""
    fingerprint = make_plan(stage).fingerprint
    runs = (run for run in list_runs([stage.log_root]) if run[1].get("name") == stage.name)
    newest, record = next(runs, (None, {}))
    command, task = [sys.executable, str(_ROOT / "main.py")], f"stage {stage.name}"
    if newest is not None and record.get("fingerprint") == fingerprint:
        if record.get("status") == "finished":
            logger.info("%s: already finished in %s", task, newest)
            return newest
        if RunFolder(newest).last.is_file():
            logger.info("%s: continuing %s", task, newest)
            _call([*command, "-r", str(newest), "-t"], task, again)
            return newest
    elif newest is not None:
        logger.info("%s: config, data, seed or an earlier stage changed since %s", task, newest)
    logger.info("%s: training", task)
    flags = [word for name, value in stage.trainer.items() for word in (f"--{name}", value)]
    names = ["-n", stage.name, "-l", stage.log_root, "-s", str(stage.seed)]
    _call([*command, "-t", *names, *flags, *stage.overrides, "-b", *stage.base], task, again)
    return next(run for run, record in list_runs([stage.log_root]) if record.get("name") == stage.name)


def _call(command: list[str], task: str, again: str) -> None:
    """Run a command and wait for it; signals to stop are passed on to it. Raise if it failed or was stopped.

    The command has a session of its own, so that each signal of a terminal reaches it once.
    """
    logger.info("$ %s", shlex.join(command))
    processes: list[subprocess.Popen] = []
    stops: list[int] = []

    def stop(number: int, frame: Any) -> None:
        stops.append(number)
        for process in processes:
            process.send_signal(number)

    with stop_signals(stop, "SIGINT"):
        process = subprocess.Popen(command, start_new_session=True)
        processes.append(process)
        if stops:  # arrived while it was started
            process.send_signal(stops[0])
        code = process.wait()
    code = 128 - code if code < 0 else code  # ended by a signal
    stopped = stops[0] if stops else code - 128
    if stopped in (_HANGUP, signal.SIGINT, signal.SIGTERM):
        logger.warning("%s stopped; continue it with: %s", task, again)
        raise Interrupted(stopped)
    if code:
        raise UserError(f"{task} failed (exit code {code}, see the message above). Fix the error, then rerun: {again}")


def gather(recipe: Recipe, runs: Mapping[str, Path], seconds: dict[str, float]) -> Path:
    """Merge the figures of the runs into ``<logdir>/<recipe>_results.json``, print them and list the pictures.

    The file name contains the name of the recipe, because several recipes can share a folder and stages.
    """
    stages = {name: read_json(run / RESULTS_FILE, missing_ok=True) for name, run in runs.items()}
    content = {
        **recipe.figures,
        **{key: value for results in stages.values() for key, value in results.items()},
        "recipe": recipe.name,
        "seed": recipe.seed,
        "written": utc_now(),
        "seconds": {**seconds, "total": round(sum(seconds.values()), 1)},
        "runs": {name: str(run) for name, run in runs.items()},
        "stages": stages,
        "notes": list(recipe.notes),
        "pictures": [str(path) for run in runs.values() for path in newest_pictures(run)],
    }
    path = Path(recipe.logdir) / f"{recipe.name}_{RESULTS_FILE}"
    write_json(path, content)
    _print_table(content, path)
    return path


def newest_pictures(run: Path) -> list[Path]:
    """Return the newest picture of each kind of a run; pictures of validation data take precedence."""
    paths = sorted(run.rglob("*.png"))  # train before val, which replaces it
    newest = {path.name.partition("_gs-")[0]: path for path in paths if "_gs-" in path.name}
    return [*(path for path in paths if "_gs-" not in path.name), *newest.values()]


def _print_table(content: Mapping[str, Any], path: Path) -> None:
    seconds = content["seconds"]
    table = Table("stage", "figure", title=f"{content['recipe']}, seed {content['seed']}")
    table.add_column("value", justify="right")
    table.add_column("by attribute")
    for name in (*content["stages"], *(["score"] if "score" in seconds else []), "total"):
        for key, value, parts in by_attribute(content["stages"].get(name, {})):
            table.add_row(name, key, f"{value:.4g}", ", ".join(f"{part} {of:.3g}" for part, of in parts.items()))
        table.add_row(name, "seconds", f"{seconds.get(name, 0.0):.0f}", end_section=True)
    console = Console(soft_wrap=True)
    console.print(table)
    lines = [f"note: {note}" for note in content["notes"]] + [f"figures: {path}"]
    for line in (*lines, *(f"picture: {picture}" for picture in content["pictures"])):
        console.print(line, highlight=False)


def by_attribute(figures: Mapping[str, Any]) -> list[tuple[str, float, dict[str, float]]]:
    """Return the name and value of each figure that is not of one attribute, and its values by attribute.

    Figures are ``accuracy``, ``accuracy_hue``, ``accuracy_unseen``, ``accuracy_hue_unseen``, ...; texts are left out.
    """
    numbers = {key: value for key, value in figures.items() if isinstance(value, (int, float))}
    groups: dict[str, dict[str, float]] = {}
    for key, value in numbers.items():
        suffix = next((end for end in ("_seen", "_unseen") if key.endswith(end)), "")
        name = key.removesuffix(suffix)
        whole = min((base for base in numbers if name.startswith(f"{base}_")), key=len, default=None)
        if whole is None or f"{whole}{suffix}" not in numbers:
            groups.setdefault(key, {})
        else:
            groups.setdefault(f"{whole}{suffix}", {})[name.removeprefix(f"{whole}_")] = value
    return [(key, numbers[key], parts) for key, parts in groups.items()]
