"""Several runs that build on each other, one command: train what is missing, score, draw, tell.

A recipe is a YAML file::

    name: quickstart
    logdir: logs/quickstart
    seed: 0
    stages:
      - name: vq                                  # the run's name; ${last_run:vq} in later configs finds it
        base: [configs/quickstart/vq.yaml]
        overrides: [lightning.trainer.max_epochs=4]
    score: {processes: 2}                         # or null

Every stage is a normal ``main.py`` command in a process of its own: it is printed, can be repeated by hand, and
gives all its memory back before the next one starts.
"""

from __future__ import annotations

import dataclasses
import logging
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ldm.config.loading import load_config
from ldm.runs.folder import RESULTS_FILE, RunFolder, list_runs, read_json, utc_now, write_json
from ldm.training.cli import Options
from ldm.training.plan import make_plan
from ldm.util import ConfigError, Interrupted, UserError, did_you_mean

logger = logging.getLogger(__name__)

_ROOT = Path(__file__).resolve().parents[2]
_KEYS = ("name", "logdir", "seed", "stages", "score")
_STAGE_KEYS = ("name", "base", "overrides")
_SCORE_KEYS = ("processes",)


@dataclass(frozen=True)
class Stage:
    """One run of a recipe."""

    name: str
    base: tuple[str, ...]
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recipe:
    """A recipe file with the command line's changes applied."""

    path: str
    name: str
    logdir: str
    seed: int
    stages: tuple[Stage, ...]
    score: Mapping[str, Any] | None


def load_recipe(options: Options) -> Recipe:
    """Read a recipe; ``-l``, ``-s`` and ``stage.key=value`` words change it.

    Raises:
        ConfigError: a key or stage is unknown or missing.
        UserError: the file does not exist.
    """
    config = load_config([str(options.recipe)])
    path, content = config.files[0], config.content
    _check(path, "", content, _KEYS, required=("name", "stages"))
    if content.get("score") is not None:
        _check(path, "score", content["score"], _SCORE_KEYS, required=())
    entries = content["stages"]
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"{path}: stages: expected a list of {{name, base, overrides}}, found {entries!r}")
    extra: dict[str, list[str]] = {}
    for word in options.overrides:
        stage, _, rest = word.partition(".")
        extra.setdefault(stage, []).append(rest)
    stages = []
    for index, entry in enumerate(entries):
        _check(path, f"stages.{index}", entry, _STAGE_KEYS, required=("name", "base"))
        overrides = (*(entry.get("overrides") or ()), *extra.pop(entry["name"], ()))
        stages.append(Stage(entry["name"], tuple(entry["base"]), overrides))
    if extra:
        names = [stage.name for stage in stages]
        raise ConfigError(
            f"command line: {next(iter(extra))!r} is no stage of {path} ({', '.join(names)})."
            f"{did_you_mean(next(iter(extra)), names)} Overrides of a recipe look like {names[0]}.model.params.x=1"
        )
    seed = options.seed if options.seed is not None else int(content.get("seed", 0))
    logdir = options.logdir or str(content.get("logdir") or f"logs/{content['name']}")
    return Recipe(path, str(content["name"]), logdir, seed, tuple(stages), content.get("score"))


def _check(path: str, key: str, content: Any, known: Iterable[str], required: Iterable[str]) -> None:
    """Raise for unknown or missing keys of one mapping of the recipe."""
    known = tuple(known)
    where = f"{path}: {key}: " if key else f"{path}: "
    if not isinstance(content, Mapping):
        raise ConfigError(f"{where}expected a mapping with {', '.join(known)}, found {content!r}")
    for name in content:
        if name not in known:
            raise ConfigError(f"{where}unknown key {name!r}.{did_you_mean(name, known)} Known: {', '.join(known)}")
    for name in required:
        if not content.get(name):
            raise ConfigError(f"{where}{name!r} is missing")


def run_recipe(options: Options) -> Path:
    """Run the stages that are not finished, score, gather the figures and print them.

    Returns:
        ``<logdir>/<recipe>_results.json``.

    Raises:
        ConfigError, UserError: with a message for the user.
        Interrupted: stopped by Ctrl-C; the same command continues.
    """
    recipe = load_recipe(options)
    again = " ".join(["python", *options.command])
    for stage in recipe.stages:
        make_plan(dataclasses.replace(_stage_options(recipe, stage, options), train=False))
    runs = {stage.name: _run_stage(recipe, stage, options, again) for stage in recipe.stages}
    seconds = {name: float(_run_record(run).get("seconds") or 0.0) for name, run in runs.items()}
    if recipe.score is not None:
        started = time.monotonic()
        processes = str(recipe.score.get("processes", 1))
        command = [sys.executable, str(_ROOT / "run_para_metrics.py"), "-l", recipe.logdir, "-p", processes]
        _call(command, "scoring", again)
        seconds["score"] = round(time.monotonic() - started, 1)
    return gather(recipe, runs, seconds)


def _stage_options(recipe: Recipe, stage: Stage, options: Options) -> Options:
    """Return what ``main.py`` would be told to train this stage."""
    return Options(
        base=stage.base,
        overrides=stage.overrides,
        name=stage.name,
        logdir=recipe.logdir,
        seed=recipe.seed,
        train=True,
        trainer=options.trainer,
    )


def _run_stage(recipe: Recipe, stage: Stage, options: Options, again: str) -> Path:
    """Train, continue or skip one stage; return its run folder."""
    fingerprint = make_plan(_stage_options(recipe, stage, options)).fingerprint
    newest = next((run for run in list_runs([recipe.logdir]) if run[1].get("name") == stage.name), None)
    command = [sys.executable, str(_ROOT / "main.py")]
    if newest is not None and newest[1].get("fingerprint") == fingerprint:
        if newest[1].get("status") == "finished":
            logger.info("stage %s: finished already in %s", stage.name, newest[0])
            return newest[0]
        if RunFolder(newest[0]).last.is_file():
            logger.info("stage %s: continuing %s", stage.name, newest[0])
            _call([*command, "-r", str(newest[0]), "-t"], f"stage {stage.name}", again)
            return newest[0]
    elif newest is not None:
        logger.info("stage %s: its config, seed or what it builds on changed since %s", stage.name, newest[0])
    logger.info("stage %s: training", stage.name)
    flags = [word for name, value in options.trainer.items() for word in (f"--{name}", value)]
    names = ["-n", stage.name, "-l", recipe.logdir, "-s", str(recipe.seed)]
    _call([*command, "-t", *names, *flags, *stage.overrides, "-b", *stage.base], f"stage {stage.name}", again)
    return next(run for run, record in list_runs([recipe.logdir]) if record.get("name") == stage.name)


def _call(command: list[str], what: str, again: str) -> None:
    """Run one command and wait for it, on Ctrl-C until it has saved.

    Raises:
        UserError: it failed.
        Interrupted: it was stopped.
    """
    logger.info("$ %s", " ".join(command))
    process = subprocess.Popen(command)
    stopped = 0
    while True:
        try:
            code = process.wait()
            break
        except KeyboardInterrupt:  # the terminal sent it to the child too, which saves and stops
            stopped = signal.SIGINT
    if stopped or code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
        logger.warning("%s stopped; continue with the same command: %s", what, again)
        raise Interrupted(stopped or code - 128)
    if code:
        raise UserError(f"{what} failed (exit code {code}, message above). Repair it, then continue with: {again}")


def _run_record(run: Path) -> dict[str, Any]:
    return read_json(run / "run.json")


def gather(recipe: Recipe, runs: Mapping[str, Path], seconds: dict[str, float]) -> Path:
    """Merge the runs' figures into ``<logdir>/<recipe>_results.json``, print them and list the pictures.

    The recipe's name is in the file's, because several recipes may share a folder and with it their first stages.
    """
    stages: dict[str, Any] = {}
    pictures: list[str] = []
    for name, run in runs.items():
        file = run / RESULTS_FILE
        stages[name] = read_json(file) if file.is_file() else {}
        pictures += [str(path) for path in newest_pictures(run)]
    seconds = {**seconds, "total": round(sum(seconds.values()), 1)}
    figures = {key: value for results in stages.values() for key, value in results.items()}
    path = Path(recipe.logdir) / f"{recipe.name}_{RESULTS_FILE}"
    content = {
        **figures,
        "recipe": recipe.name,
        "seed": recipe.seed,
        "written": utc_now(),
        "seconds": seconds,
        "runs": {name: str(run) for name, run in runs.items()},
        "stages": stages,
        "pictures": pictures,
    }
    write_json(path, content)
    _print_table(recipe, stages, seconds, pictures, path)
    return path


def newest_pictures(run: Path) -> list[Path]:
    """Return a run's pictures: of each kind the newest, and of images never trained on where there are such."""
    newest: dict[str, Path] = {}
    others = []
    for path in sorted(run.rglob("*.png")):  # train before val, so that the latter takes the place of the former
        kind, stamp, _ = path.name.partition("_gs-")
        if stamp:
            newest[kind] = path
        else:
            others.append(path)
    return [*others, *newest.values()]


def _print_table(
    recipe: Recipe, stages: Mapping[str, Any], seconds: Mapping[str, float], pictures: list[str], path: Path
) -> None:
    table = Table(title=f"{recipe.name}, seed {recipe.seed}")
    for column in ("stage", "figure", "value"):
        table.add_column(column, justify="right" if column == "value" else "left")
    for name, results in stages.items():
        for key, value in results.items():
            if isinstance(value, (int, float)):
                table.add_row(name, key, f"{value:.4g}")
        table.add_row(name, "seconds", f"{seconds.get(name, 0.0):.0f}", end_section=True)
    if "score" in seconds:
        table.add_row("score", "seconds", f"{seconds['score']:.0f}", end_section=True)
    table.add_row("total", "seconds", f"{seconds['total']:.0f}")
    console = Console(soft_wrap=True)
    console.print(table)
    console.print(f"figures: {path}", highlight=False)
    for picture in pictures:
        console.print(f"picture: {picture}", highlight=False)
