"""Config files and overrides merged into one resolved config, with the origin of each key."""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError

from ldm.config.data_sections import with_all_sections, without_foreign_params
from ldm.config.targets import ALLOW_KEY
from ldm.legacy import mend_indentation
from ldm.runs.find import find_run
from ldm.runs.folder import last_checkpoint
from ldm.util import BuildError, ConfigError, UserError, instantiate_from_config

logger = logging.getLogger(__name__)

COMMAND_LINE = "command line"
INCLUDE_KEY = "base"
# Messages of OmegaConf about ``${...}`` -> ours.
_REFERENCES = {
    r"Interpolation key '(.+)' not found": "${{{0}}}: this config has no key {0}. Correct the reference or add the key",
    r"Environment variable '(.+)' not found": "the variable {0} is not set. Export it, or use ${{env:{0},default}}",
    r"Unsupported interpolation type (\S+)": "expected ${{env:, ${{data:, ${{last_run: or ${{last_ckpt:, got ${{{0}:",
    r"(?:input|error at:) '(.*)'": "expected ${{a.b}}, or \\${{ for plain text, got {0!r}. Correct it",
}


@dataclass
class Config:
    """A merged and resolved config.

    Attributes:
        content: plain dicts, lists and scalars.
        origins: dotted key -> the file (or "command line") that set it last.
        files: the given files, in order.
        pending: messages about runs that do not exist yet (only if they are allowed).
    """

    content: dict[str, Any]
    origins: dict[str, str] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    pending: list[str] = field(default_factory=list)

    def origin(self, key: str) -> str:
        """Return the file that set a dotted key, or else the nearest mapping above it."""
        while key:
            if key in self.origins:
                return self.origins[key]
            below = [origin for known, origin in self.origins.items() if known.startswith(key + ".")]
            if below:
                return below[-1]
            key = key.rpartition(".")[0]
        return self.files[-1] if self.files else COMMAND_LINE

    def section(self, name: str) -> dict[str, Any]:
        """Return a top-level mapping; empty if it is missing. Raises ``ConfigError`` if it is not a mapping."""
        section = self.content.get(name) or {}
        if not isinstance(section, Mapping):
            raise self.error(name, f"expected a mapping, got {section!r}. Correct the section")
        return section

    def error(self, key: str, message: str) -> ConfigError:
        """Return an error whose message begins with the file and the dotted key."""
        return ConfigError(f"{self.origin(key)}: {key}: {message}")

    def build(self, section: str) -> Any:
        """Instantiate a section.

        Raises:
            ConfigError: the target does not exist or does not accept its arguments.
        """
        try:
            return instantiate_from_config(self.content[section], section)
        except BuildError as error:
            raise ConfigError(f"{self.origin(f'{section}.{error.key}')}: {section}.{error}") from error
        except ConfigError as error:
            key = "" if str(error).startswith(f"{section}.") else f"{section}: "
            raise ConfigError(f"{self.origin(section)}: {key}{error}") from error

    def fingerprint(self, seed: int) -> str:
        """Return 16 hex digits that identify config and seed."""
        text = json.dumps({"seed": seed, **self.content}, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def load_config(
    files: Sequence[str | os.PathLike],
    overrides: Sequence[str] = (),
    roots: Sequence[str | os.PathLike] = ("logs",),
    allow_pending: bool = False,
    kind: str = "",
) -> Config:
    """Merge files from left to right, then ``a.b=c`` overrides, and resolve every ``${...}``.

    A file can name others that it builds on, relative to itself: ``base: [../_shared/disdiff.yaml]``. They are merged
    before it, each one once. A data set that replaces another one keeps the options that both accept.

    Args:
        files: YAML files; ``-`` and ``_`` in a name are interchangeable.
        overrides: dotted assignments.
        roots: folders searched by ``${last_run:NAME}`` and ``${last_ckpt:NAME}``, in order of precedence.
        allow_pending: keep references to runs that do not exist yet as text instead of raising.
        kind: "config", "recipe" or "file of own data", if others are refused.

    Raises:
        UserError: a file or a referenced run does not exist.
        ConfigError: a file is not a YAML mapping, files include each other, or a reference cannot be resolved.
    """
    config, merged = Config({}), OmegaConf.create({})
    layers: list[tuple[str, DictConfig]] = []
    for given in files:
        path = find_config_file(str(given))
        config.files += (str(path),)
        layers += [(str(part), layer) for part, layer in _layers(path, (), set())]
    layers.append((COMMAND_LINE, parse_overrides(overrides)))
    if INCLUDE_KEY in layers[-1][1]:
        raise ConfigError(f"command line: {INCLUDE_KEY} cannot be overridden. Name files with -b/--base")
    for origin, layer in layers:
        if ALLOW_KEY in layer:
            raise ConfigError(
                f"{origin}: {ALLOW_KEY}: a config cannot allow its own targets. If you trust it, add "
                f"{ALLOW_KEY}=[{','.join(allowed_names(layer))}] to the command line of main.py"
            )
        layer = with_all_sections(merged, layer)
        keys = _dotted_keys(OmegaConf.to_container(layer, resolve=False))
        config.origins.update(dict.fromkeys(keys, origin))
        merged = OmegaConf.merge(without_foreign_params(merged, layer), layer)
    if kind:
        _check_kind(config, OmegaConf.to_container(merged, resolve=False), kind)
    _register_resolvers([str(root) for root in roots], config, allow_pending)
    config.content = _resolve(merged, config)
    return config


def find_config_file(given: str) -> Path:
    """Return the path of a config file; ``-`` and ``_`` in its name are interchangeable.

    Args:
        given: path as given by the user.

    Raises:
        UserError: the file does not exist; the message lists similar names.
    """
    path = Path(given)
    if path.is_file():
        return path
    if path.is_dir():
        inside = ", ".join(map(str, sorted(path.glob("*.yaml"))[:5]))
        step = f"Name one in it: {inside}" if inside else f"For images, name a file that contains path: {given}"
        raise UserError(f"{given}: expected a .yaml file, got a folder. {step}")
    wanted = path.name.replace("-", "_")
    siblings = sorted(path.parent.glob("*.yaml"))
    for sibling in siblings:
        if sibling.name.replace("-", "_") == wanted:
            return sibling
    near = difflib.get_close_matches(path.name, [sibling.name for sibling in siblings], n=3, cutoff=0.4)
    choices = [path.parent / name for name in near] or sorted(Path().glob(f"configs/**/*{path.stem[:6]}*.yaml"))[:3]
    hint = f" Similar: {', '.join(map(str, choices))}" if choices else f" {path.parent}/ contains no .yaml files"
    raise UserError(f"config file {given} does not exist.{hint}")


def _check_kind(config: Config, content: Mapping[str, Any], expected: str) -> None:
    """Raise ``ConfigError`` if a file is for another flag of ``main.py``."""
    kinds = {
        ("recipe", "stages", "--recipe {}"): isinstance(content.get("stages"), list),
        ("config", "model", "--base {}"): any(isinstance(content.get(name), Mapping) for name in ("model", "data")),
        ("file of own data", "path", "--recipe configs/own_data/recipe.yaml data={}"): "path" in content,
    }
    kind, key, flags = next((kind for kind, is_found in kinds.items() if is_found), (expected, "", ""))
    if kind != expected:
        file = config.origin(key)
        raise ConfigError(f"{file}: expected a {expected}, got a {kind}. Run: python main.py {flags.format(file)}")


def parse_overrides(overrides: Sequence[str]) -> DictConfig:
    """Parse ``a.b=c`` words; values are YAML (``1e-4``, ``true``, ``[1, 2]``)."""
    for word in overrides:
        if "=" not in word:
            raise ConfigError(f"command line: expected key=value (model.params.x=1), got {word!r}")
    try:
        return OmegaConf.from_dotlist(list(overrides))
    except Exception as error:  # YAML and grammar errors come from two libraries
        raise ConfigError(
            f"command line: the overrides {' '.join(overrides)} cannot be read: {_in_words(error)}"
        ) from error


def allowed_names(layer: Mapping[str, Any]) -> list[str]:
    """Return the names under ``allow_targets``: a list, or one name."""
    names = layer.get(ALLOW_KEY)
    return [str(name) for name in ([names] if isinstance(names, str) else names or ())]


def _layers(path: Path, above: tuple[Path, ...], done: set[Path]) -> Iterator[tuple[Path, DictConfig]]:
    """Yield the layers of a file in the order of merging: the files under ``base``, each once, then the file itself."""
    own = path.resolve()
    if own in above:
        circle = [*above[above.index(own) :], own]
        raise ConfigError(f"{path}: {INCLUDE_KEY}: circular include: {' -> '.join(map(str, circle))}")
    if own in done:
        return
    layer = _read_yaml(path)
    for name in _file_names(path, layer):
        try:
            part = Path(os.path.normpath(find_config_file(str(path.parent / name))))
        except UserError as error:
            raise UserError(f"{path}: {INCLUDE_KEY}: {error}") from error
        yield from _layers(part, (*above, own), done)
    done.add(own)
    yield path, layer


def _file_names(path: Path, layer: DictConfig) -> list[str]:
    """Remove ``base`` from a layer and return its file names."""
    named = OmegaConf.to_container(layer, resolve=False).get(INCLUDE_KEY)
    layer.pop(INCLUDE_KEY, None)
    names = [named] if isinstance(named, str) else [] if named is None else named
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{path}: {INCLUDE_KEY}: expected a list of YAML files relative to this one, got {named!r}")
    return names


def _read_yaml(path: Path) -> DictConfig:
    try:
        layer = OmegaConf.load(path)
    except Exception as error:  # YAML scanner errors and OmegaConf's own; both contain line and column
        layer = _read_mended(path, error)
        if layer is None:
            raise ConfigError(f"{path} cannot be read as YAML: {_in_words(error)}") from error
    if not isinstance(layer, DictConfig):
        raise ConfigError(f"{path}: expected a mapping with `model` and `data`, got a list")
    return layer


def _read_mended(path: Path, error: Exception) -> DictConfig | None:
    """Read a file with one line indented one space too far, with a warning; None if the error is another one."""
    mark = error.problem_mark if isinstance(error, MarkedYAMLError) else None
    text = None if mark is None else mend_indentation(path.read_text(encoding="utf-8"), mark.line)
    if text is None:
        return None
    try:
        layer = OmegaConf.create(text)
    except Exception:  # another error: the first one is reported
        return None
    message = "%s: line %d is indented one space further than the line above; read with the indentation of that line"
    logger.warning(message, path, mark.line + 1)
    return layer


def _dotted_keys(content: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the dotted key of every entry; lists are one entry."""
    for key, value in content.items():
        if isinstance(value, dict) and value:
            yield from _dotted_keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _register_resolvers(roots: list[str], config: Config, allow_pending: bool) -> None:
    """Register ``env``, ``data``, ``last_run`` and ``last_ckpt`` with OmegaConf for these folders and this config."""
    data_file = config.origins.get("data.params.train.target", COMMAND_LINE)

    def environment(name: str, *default: Any) -> Any:
        if name not in os.environ and not default:
            raise ConfigError(f"the environment variable {name} is not set. Export it, or use ${{env:{name},default}}")
        return os.environ.get(name, *default)

    def run_reference(kind: str, name: str) -> str:
        try:
            run = find_run(str(name), roots, config.files, None if data_file == COMMAND_LINE else data_file)
            return str(run if kind == "last_run" else last_checkpoint(run))
        except UserError as error:
            if not allow_pending:
                raise
            if str(error).splitlines()[0] not in config.pending:
                config.pending.append(str(error).splitlines()[0])
            return f"<{kind} {name}>"

    opened: dict[str, Any] = {}  # the data set, while this config is resolved: its files may change later

    def data_property(key: str, divisor: int = 1, *, _root_: DictConfig) -> Any:
        from ldm.data.describe import describe  # imports torch, which configs without ``${data:...}`` do not need

        sections = OmegaConf.to_container(_root_.get("data") or {}, resolve=True).get("params") or {}
        named = {name: part for name, part in sections.items() if isinstance(part, dict) and "target" in part}
        name = next((name for name in ("train", "test", "validation") if name in named), None)
        if name is None:
            step = "Merge a file with `data`, such as configs/quickstart/world.yaml, with -b"
            raise ConfigError(f"${{data:{key}}}: expected a `data` section with a data set, got none. {step}")
        try:
            if not opened:
                opened["data"] = instantiate_from_config(sections[name], "dataset")
        except BuildError as error:
            raise BuildError(error.args[0], error.target, f"data.params.{name}.{error.key}") from error
        value = describe(opened["data"], key)
        if divisor == 1:
            return value
        if not isinstance(value, int) or not isinstance(divisor, int) or divisor < 1 or value % divisor:
            raise ConfigError(f"${{data:{key},{divisor}}}: expected a multiple of {divisor}, got {value}")
        return value // divisor

    # OmegaConf 2.4 renamed register_new_resolver and warns about the old name.
    name = "register_resolver" if "register_resolver" in vars(OmegaConf) else "register_new_resolver"
    register = vars(OmegaConf)[name].__func__
    register("env", environment, replace=True)
    register("data", data_property, replace=True)
    for kind in ("last_run", "last_ckpt"):
        register(kind, functools.partial(run_reference, kind), replace=True)


def _resolve(merged: DictConfig, config: Config) -> dict[str, Any]:
    try:
        return OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key = str(error.full_key or "?")
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, (ConfigError, UserError)):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise config.error(key, _in_words(error)) from error
        if isinstance(cause, BuildError):  # of a data set
            raise config.error(cause.key, cause.args[0]) from error
        raise type(cause)(f"{config.origin(key)}: {key}: {cause}") from error


def _in_words(error: Exception) -> str:
    """Return the message of an error of reading or resolving; that of a reference with the next step."""
    text = " ".join(str(error).partition("\n    full_key")[0].split())
    found = ((re.search(pattern, text), message) for pattern, message in _REFERENCES.items())
    return next((message.format(*match.groups()) for match, message in found if match), text)


def save_config(path: Path, content: dict[str, Any], comment: str = "") -> None:
    """Write plain content as YAML, with an optional comment at the top."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = "".join(f"# {line}\n" for line in comment.splitlines())
    path.write_text(head + OmegaConf.to_yaml(OmegaConf.create(content)), encoding="utf-8")
