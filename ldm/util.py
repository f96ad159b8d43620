"""Helpers without heavy dependencies: objects and configs from YAML, errors for the user, atomic files."""

from __future__ import annotations

import ast
import contextlib
import difflib
import errno
import functools
import importlib
import inspect
import os
import platform
import re
import signal
import sys
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import IO, Any, SupportsFloat, SupportsIndex, SupportsInt, cast

from ldm.errors import BuildError, ConfigError, MissingTargetError, UserError, in_one_line
from ldm.legacy import resolve_target, translate
from ldm.ranges import CHOICES, RANGES

# Strings that the LDM family writes in place of a config; they mean "no object of its own".
PLACEHOLDERS = ("__is_first_stage__", "__is_unconditional__")

_FORMULA = re.compile(r"'*[=+\-@\t\r]")
_LOAD_HINT = "Files that use `base:` or ${last_ckpt:...} have to be loaded with ldm.util.load_config"


_OF_VALUES = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


class Interrupted(BaseException):
    """Work stopped on request of the user or the system, after saving.

    Not a ``KeyboardInterrupt``, which Lightning handles itself, with exit code 1 and Ctrl-C disabled.

    Args:
        signal_number: the signal received.
        advice: how to continue.
    """

    def __init__(self, signal_number: int, advice: str = "") -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}{advice}")
        self.exit_code = 128 + signal_number


def did_you_mean(word: str, known: Iterable[str], cutoff: float = 0.72) -> str:
    """Return `` Did you mean 'x'?`` for the nearest known word of at least that similarity, or an empty string."""
    near = difflib.get_close_matches(str(word), [str(name) for name in known], n=1, cutoff=cutoff)
    return f" Did you mean {near[0]!r}?" if near else ""


# Plain annotations: the values that fit, and their name in a message.
_FITTING: dict[str, tuple[Any, str]] = {
    "int": (SupportsIndex, "an integer"),
    "float": (SupportsFloat, "a number"),
    "bool": (SupportsInt, "true or false"),
    "str": ((str, os.PathLike), "a text"),
    "Word": (str, "a text"),  # entries of lists of str may be numbers, other than these
    "AnyPath": ((str, os.PathLike), "a path (as text: './2024' or \"'2024'\")"),
    "Sequence": (Sized, "a list"),
    "Mapping": (Mapping, "a mapping"),
    "None": (type(None), "null"),
}
_PLAIN = (str, int, float, list, tuple, Mapping, type(None))  # values in YAML


def mismatch(annotation: str, value: Any) -> str:
    """Return ``expected ..., got ...`` if a value from a config does not fit an annotation, else an empty string.

    Values are compared with plain annotations, ``Literal``, names of ``ldm.ranges``, unions of these, and the entries
    of lists and mappings likewise; every value fits another annotation. NaN is not a number.
    """
    parts = _alternatives(annotation)
    known = [part for part in parts if part[0] in (*_FITTING, *RANGES, "Literal")]
    if len(known) < len(parts) and {name for name, _ in known} > {"None"} and isinstance(value, _PLAIN):
        parts = known  # the others are classes
    if any(_fits(name, inner, value) for name, inner in parts):
        return ""
    return f"expected {' or '.join(_described(name, inner, value) for name, inner in parts)}, got {value!r}"


@functools.cache
def _alternatives(annotation: str) -> list[tuple[str, str]]:
    """Split ``"A[x] | B"`` into ``[("A", "x"), ("B", "")]``."""
    nodes, parts = [ast.parse(annotation, mode="eval").body], []
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.BinOp):
            nodes += (node.right, node.left)
        else:
            name, _, inner = ast.unparse(node).partition("[")
            name, inner = ("Literal", f"{CHOICES[name]}]") if name in CHOICES else (name, inner)
            parts.append((name.replace("list", "Sequence").replace("tuple", "Sequence"), inner.removesuffix("]")))
    return parts


def _fits(name: str, inner: str, value: Any) -> bool:
    if name == "Literal":
        return value in ast.literal_eval(f"({inner},)")
    if name in RANGES:
        return RANGES[name].contains(value)
    kind, _ = _FITTING.get(name, (object, ""))
    if not isinstance(value, kind) or (kind is SupportsFloat and value != value):  # NaN
        return False
    if name == "bool":
        return value in (0, 1)
    if name == "Sequence" and isinstance(value, (str, Mapping)):
        return False
    if not inner:
        return True
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, Sequence) else ()
    item = inner.removeprefix("str, ").removesuffix(", ...")
    item = {"str": "str | float"}.get(item, item)  # words and names of columns may be numbers
    return not any(mismatch(item, part) for part in items)


def _described(name: str, inner: str, value: Any) -> str:
    if name == "Literal":
        return ", ".join(dict.fromkeys(map(str, ast.literal_eval(f"({inner},)"))))
    if name in RANGES:
        return RANGES[name].text
    described = _FITTING.get(name, (object, ""))[1]
    if name != "Sequence" or not inner or isinstance(value, str) or not isinstance(value, Sequence):
        return described
    return f"{described}, each entry {_described(inner.removesuffix(', ...'), '', None)}"


def load_config(
    paths: str | os.PathLike | Sequence[str | os.PathLike],
    overrides: Sequence[str] = (),
    roots: Sequence[str | os.PathLike] = ("logs",),
) -> dict[str, Any]:
    """Load config files for use in Python.

    Files named under ``base:`` are merged, and every ``${...}`` is resolved. A ``${last_ckpt:NAME}`` of a run that does
    not exist yet becomes the text ``<last_ckpt NAME>``.

    Args:
        paths: a YAML file, or several that are merged from left to right.
        overrides: ``a.b=c`` assignments, applied last.
        roots: folders searched for runs by ``${last_run:NAME}`` and ``${last_ckpt:NAME}``.

    Returns:
        The config as plain dicts, lists and scalars.

    Raises:
        UserError: a file does not exist.
        ConfigError: a file is not a YAML mapping, or a reference cannot be resolved.

    Example::

        config = load_config("configs/latent-diffusion/shapes3d-vq-4-16-dis.yaml")
        data = instantiate_from_config(config["data"])
    """
    from ldm.config import loading

    files = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    return loading.load_config(files, overrides, roots, allow_pending=True).content


def __getattr__(name: str) -> Any:
    """Return a function that LDM has in this module (``ismap``, ...); those need torch, which is imported here only."""
    functions = {} if name.startswith("_") else vars(importlib.import_module("ldm.legacy.functions"))
    if name not in functions:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return functions[name]


def search_working_directory() -> None:
    """Append the working directory to the import path, as LDM's command lines do, so that users' modules are found."""
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.append(folder)


def get_obj_from_str(path: str, today: str | None = None) -> Any:
    """Import the object that a ``target`` names; old names are translated.

    Args:
        path: dotted path ``package.module.Name``, of today or of the reference repositories.
        today: the translated path, if the caller has translated it.

    Returns:
        The class or function.

    Raises:
        BuildError: the module or the name does not exist (the message contains the nearest existing name), or the
            module may not be imported, see ``ldm.config.targets``.
        UserError: the module raises an error.
    """
    from ldm.config.targets import check_import

    today = today or resolve_target(path)
    module_name, _, name = today.rpartition(".")
    if not module_name:
        raise BuildError(f"expected a dotted path package.module.Name, got {path!r}", path)
    search_working_directory()
    if problem := check_import(path, today):
        raise BuildError(problem, path)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise BuildError(f"{path!r}: there is no module {error.name!r}", path) from error
        raise UserError(f"target {path!r} needs the package {error.name!r}. Install it with pip") from error
    except (ConfigError, UserError):
        raise
    except Exception as error:  # of the code of the module
        cause = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise UserError(
            f"target {path!r}: the module {module_name} cannot be imported ({cause}). Correct it"
        ) from error
    try:
        return getattr(module, name)
    except AttributeError as error:
        hint = did_you_mean(name, vars(module))
        raise BuildError(f"{path!r}: module {module_name!r} has no {name!r}.{hint}", path) from error


def instantiate_from_config(config: Mapping[str, Any] | str | None, kind: str = "part", /, **extra: Any) -> Any:
    """Build the object that a ``{target, params}`` mapping describes; names of the references are translated.

    Args:
        config: the mapping, plain or of OmegaConf, or one of LDM's placeholder strings.
        kind: a key of ``ldm.config.targets.KINDS``; other objects are refused before they are imported or called.
        **extra: arguments added to ``params``.

    Returns:
        The object; ``None`` for a placeholder string.

    Raises:
        MissingTargetError: ``target`` is missing.
        BuildError: the target does not exist, is of another kind, or does not accept the arguments.
    """
    from ldm.config.targets import refusal

    if isinstance(config, str) and config in PLACEHOLDERS:
        return None
    if not isinstance(config, Mapping):
        raise ConfigError(f"config: expected a mapping with `target` and `params`, got {config!r}. {_LOAD_HINT}")
    config = _plain(config)
    if not config.get("target"):
        found = ", ".join(map(str, config)) or "nothing"
        raise MissingTargetError(f"config: expected a `target` (package.module.Name), got only {found}. {_LOAD_HINT}")
    target, params = config["target"], _plain(config.get("params") or {})
    today, arguments = translate(target, {**params, **extra})
    if problem := refusal(target, today, kind):
        raise BuildError(problem, target)
    factory = get_obj_from_str(target, today)
    if problem := refusal(target, today, kind, factory):
        raise BuildError(problem, target)
    _check_arguments(factory, target, today, arguments)
    try:
        return factory(**arguments)
    except BuildError as error:
        error.key = ".".join([*_path_to(params, error.target, ("params",)), error.key])
        raise
    except (ConfigError, UserError):
        raise
    except _OF_VALUES as error:  # of a class of others, or of a value that no annotation excludes
        raise BuildError(f"{target}: {in_one_line(error)}", target, "params") from error


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a mapping as a dict; configs of OmegaConf are resolved."""
    if isinstance(config, dict):
        return config
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if not OmegaConf.is_config(config):
        return dict(config)
    try:
        return cast("dict[str, Any]", OmegaConf.to_container(config, resolve=True))
    except OmegaConfBaseException as error:
        raise ConfigError(f"config: {str(error).splitlines()[0]}. {_LOAD_HINT}") from error


def _path_to(content: Any, target: str, above: tuple[str, ...]) -> tuple[str, ...]:
    """Return the keys that lead to the mapping with that target; empty if there is none."""
    for name, value in content.items() if isinstance(content, Mapping) else ():
        if isinstance(value, Mapping):
            found = (*above, str(name))
            found = found if value.get("target") == target else _path_to(value, target, found)
            if found:
                return found
    return ()


def _check_arguments(factory: Any, target: str, today: str, arguments: Mapping[str, Any]) -> None:
    """Raise a ``BuildError`` that lists the accepted arguments if the given ones do not fit."""
    from ldm.config.signatures import find_misfit, find_signature

    misfit = find_misfit(target, arguments, find_signature(today))
    if misfit is not None:
        raise BuildError(misfit.message, target, ".".join(filter(None, ("params", misfit.name))))
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):  # compiled classes have no signature; they check their arguments themselves
        return
    try:
        signature.bind(**arguments)
    except TypeError as error:
        accepted = [name for name in signature.parameters if name not in ("args", "kwargs", "self")]
        unknown = [name for name in arguments if name not in accepted]
        hint = did_you_mean(unknown[0], accepted) if unknown else ""
        shown = ", ".join(accepted) or "no arguments"
        raise BuildError(f"{target}: {error}.{hint} Accepted: {shown}", target, "params") from error


def owner_mark() -> str:
    """Return a unique part of the name of a temporary file, with process and computer; ``ldm.runs.disk`` reads it."""
    return f"{os.getpid()}@{platform.node()}@{uuid.uuid4().hex[:8]}"


def csv_cell(value: Any) -> Any:
    """Return a cell of a CSV file: a text that a spreadsheet would run as a formula begins with an apostrophe.

    OWASP, "CSV Injection". Numbers, also as texts, are unchanged; :func:`csv_text` removes the apostrophe.
    """
    if not isinstance(value, str) or not _FORMULA.match(value):
        return value
    try:
        float(value)
        return value
    except ValueError:
        return f"'{value}"


def csv_text(cell: str) -> str:
    """Return the text that :func:`csv_cell` wrote as a cell."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "w") -> Iterator[IO]:
    """Open a temporary file beside ``path`` and rename it to ``path`` after everything was written.

    Readers never see a partial file, and a crash or a full disk leaves the old one.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{owner_mark()}.tmp")
    try:
        with temporary.open(mode, encoding=None if "b" in mode else "utf-8") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(target)
    except BaseException as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            error.filename = error.filename or str(target)  # errors of writing do not name the file
        temporary.unlink(missing_ok=True)
        raise
