"""From config files and overrides to one plain, resolved config that remembers where each key came from."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm.config.data_sections import without_foreign_params
from ldm.config.files import find_config_file
from ldm.legacy import mend_indentation
from ldm.runs.folder import find_run, last_checkpoint
from ldm.util import ConfigError, UserError

logger = logging.getLogger(__name__)

COMMAND_LINE = "command line"
INCLUDE_KEY = "base"


@dataclass
class Config:
    """One merged and resolved config.

    Attributes:
        content: plain dicts, lists and scalars.
        origins: dotted key -> the file (or "command line") that set it last.
        files: the files given, in order.
        included: the files that those name under `base`, in the order of merging.
        pending: texts of references to runs that do not exist yet (only when they are allowed).
    """

    content: dict[str, Any]
    origins: dict[str, str] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    included: tuple[str, ...] = ()
    pending: list[str] = field(default_factory=list)

    def origin(self, key: str) -> str:
        """Return where a dotted key was set; a key nobody set answers for the nearest mapping above it."""
        while key:
            if key in self.origins:
                return self.origins[key]
            below = [origin for known, origin in self.origins.items() if known.startswith(key + ".")]
            if below:
                return below[-1]
            key = key.rpartition(".")[0]
        return self.files[-1] if self.files else COMMAND_LINE

    def section(self, name: str) -> dict[str, Any]:
        """Return a top-level mapping; empty when it is absent."""
        return self.content.get(name) or {}

    def fingerprint(self, seed: int) -> str:
        """Return 16 hex digits that change whenever anything that shapes the run changes."""
        text = json.dumps({"seed": seed, **self.content}, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def load_config(
    files: Sequence[str | os.PathLike],
    overrides: Sequence[str] = (),
    roots: Sequence[str | os.PathLike] = ("logs",),
    allow_pending: bool = False,
) -> Config:
    """Merge files from left to right, then ``a.b=c`` overrides, and resolve every ``${...}``.

    A file may name others that it builds on, relative to itself: ``base: [../_shared/disdiff.yaml]``. They are merged
    before it, each one once. A data set that replaces another keeps those of its options that it knows.

    Args:
        files: YAML files; ``-`` and ``_`` in a name may stand for each other.
        overrides: dotted assignments.
        roots: folders searched by ``${last_run:NAME}`` and ``${last_ckpt:NAME}``, the first one first.
        allow_pending: keep references to runs that do not exist yet as text instead of raising.

    Raises:
        UserError: a file or a run that is needed does not exist.
        ConfigError: a file is no YAML mapping, files name each other in a circle, or a reference cannot be resolved.
    """
    config = Config({})
    merged = OmegaConf.create({})
    for given in files:
        path = find_config_file(str(given))
        config.files += (str(path),)
        for part, layer in _layers(path):
            config.origins.update({key: str(part) for key in _dotted_keys(layer)})
            if part != path:
                config.included += (str(part),)
            merged = OmegaConf.merge(without_foreign_params(merged, layer), layer)
    layer = parse_overrides(overrides)
    if INCLUDE_KEY in layer:
        raise ConfigError(f"command line: {INCLUDE_KEY}: files are given with -b/--base, not as an override")
    config.origins.update({key: COMMAND_LINE for key in _dotted_keys(layer)})
    merged = OmegaConf.merge(without_foreign_params(merged, layer), layer)
    _register_resolvers([str(root) for root in roots], config.pending if allow_pending else None)
    config.content = _resolve(merged, config)
    return config


def parse_overrides(overrides: Sequence[str]) -> DictConfig:
    """Read ``a.b=c`` words; values are YAML, so ``1e-4``, ``true``, ``[1, 2]`` mean what they look like."""
    for word in overrides:
        if "=" not in word:
            raise ConfigError(f"command line: {word!r} is no override; expected key=value, as in model.params.x=1")
    try:
        return OmegaConf.from_dotlist(list(overrides))
    except Exception as error:  # YAML and grammar errors come from two libraries
        raise ConfigError(f"command line: the overrides {' '.join(overrides)} cannot be read: {error}") from error


def _layers(
    path: Path, above: tuple[Path, ...] = (), done: set[Path] | None = None
) -> Iterator[tuple[Path, DictConfig]]:
    """Yield a file's layers in the order of merging: first what it names under ``base``, each file once, then itself.

    Args:
        path: the file.
        above: the files that led here, outermost first.
        done: the files already yielded.

    Raises:
        UserError: a named file does not exist.
        ConfigError: ``base`` is no list of files, or leads back to a file above.
    """
    done = set() if done is None else done
    if path.resolve() in above:
        circle = [*above[above.index(path.resolve()) :], path.resolve()]
        raise ConfigError(f"{path}: {INCLUDE_KEY}: files name each other in a circle: {' -> '.join(map(str, circle))}")
    if path.resolve() in done:
        return
    layer = _read_yaml(path)
    for name in _file_names(path, layer):
        try:
            part = Path(os.path.normpath(find_config_file(str(path.parent / name))))
        except UserError as error:
            raise UserError(f"{path}: {INCLUDE_KEY}: {error}") from error
        yield from _layers(part, (*above, path.resolve()), done)
    done.add(path.resolve())
    yield path, layer


def _file_names(path: Path, layer: DictConfig) -> list[str]:
    """Take ``base`` out of a layer and return the file names in it: one, several, or none."""
    named = OmegaConf.to_container(layer, resolve=False).get(INCLUDE_KEY)
    layer.pop(INCLUDE_KEY, None)
    names = [named] if isinstance(named, str) else [] if named is None else named
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{path}: {INCLUDE_KEY}: expected a list of YAML files relative to this one, found {named!r}")
    return names


def _read_yaml(path: Path) -> DictConfig:
    try:
        layer = OmegaConf.load(path)
    except Exception as error:  # YAML scanner errors and OmegaConf's own, both name line and column
        layer = _read_mended(path, error)
        if layer is None:
            raise ConfigError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(layer, DictConfig):
        raise ConfigError(f"{path}: expected a mapping with `model` and `data`, found a list")
    return layer


def _read_mended(path: Path, error: Exception) -> DictConfig | None:
    """Read a file in which one line is indented by a blank too many, and say so; None if that is not the matter."""
    mark = getattr(error, "problem_mark", None)
    text = None if mark is None else mend_indentation(path.read_text(encoding="utf-8"), mark.line)
    if text is None:
        return None
    try:
        layer = OmegaConf.create(text)
    except Exception:  # as above: it is another error, and the first one is told
        return None
    message = "%s: line %d is indented one blank further than the line above; it is read as if it were not"
    logger.warning(message, path, mark.line + 1)
    return layer


def _dotted_keys(layer: DictConfig) -> Iterator[str]:
    """Yield the dotted key of every entry, mappings before what they hold; lists are one entry."""

    def walk(content: Any, prefix: str) -> Iterator[str]:
        for key, value in content.items():
            dotted = f"{prefix}{key}"
            if isinstance(value, dict):
                yield from walk(value, dotted + ".")
            if not isinstance(value, dict) or not value:
                yield dotted

    yield from walk(OmegaConf.to_container(layer, resolve=False), "")


def _register_resolvers(roots: list[str], pending: list[str] | None) -> None:
    """Teach OmegaConf ``env``, ``last_run`` and ``last_ckpt`` as seen from these folders."""

    def environment(name: str, default: Any = KeyError) -> Any:
        value = os.environ.get(name, default)
        if value is KeyError:
            raise ConfigError(
                f"the environment variable {name} is not set: export it, or write ${{env:{name},default}}"
            )
        return value

    def run_reference(kind: str, name: str) -> str:
        try:
            run = find_run(str(name), roots)
            return str(run if kind == "last_run" else last_checkpoint(run))
        except UserError as error:
            if pending is None:
                raise
            if str(error).splitlines()[0] not in pending:
                pending.append(str(error).splitlines()[0])
            return f"<{kind} {name}>"

    # OmegaConf 2.4 renamed the function and warns about the old name; 2.3 has only the old one.
    register = getattr(OmegaConf, "register_resolver", None) or OmegaConf.register_new_resolver
    register("env", environment, replace=True)
    for kind in ("last_run", "last_ckpt"):
        register(kind, functools.partial(run_reference, kind), replace=True)


def _resolve(merged: DictConfig, config: Config) -> dict[str, Any]:
    try:
        return OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key = str(getattr(error, "full_key", "") or "?")
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, (ConfigError, UserError)):
            cause = cause.__cause__ or cause.__context__
        if cause is not None:
            raise type(cause)(f"{config.origin(key)}: {key}: {cause}") from error
        first_line = str(error).splitlines()[0]
        raise ConfigError(f"{config.origin(key)}: {key}: {first_line}") from error


def save_config(path: Path, content: dict[str, Any], comment: str = "") -> None:
    """Write plain content as YAML with an optional comment above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = "".join(f"# {line}\n" for line in comment.splitlines())
    path.write_text(head + OmegaConf.to_yaml(OmegaConf.create(content)), encoding="utf-8")
