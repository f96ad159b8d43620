"""Small helpers every room may use: building objects from a config, errors for the user, atomic files."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import inspect
import os
import signal
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from ldm.legacy import resolve_target, translate

# Strings the LDM family writes where a config would stand; they mean "no object of its own here".
PLACEHOLDERS = ("__is_first_stage__", "__is_unconditional__")


class ConfigError(ValueError):
    """A config says something that cannot be: the message names the file or key and the next step."""


class MissingTargetError(ConfigError, KeyError):
    """A mapping that should describe an object has no ``target`` (a ``KeyError`` too, as in LDM)."""

    __str__ = ValueError.__str__


class BuildError(ConfigError):
    """An object could not be built from its config; carries the ``target`` so that callers can add the key."""

    def __init__(self, message: str, target: str) -> None:
        super().__init__(message)
        self.target = target


class UserError(RuntimeError):
    """Something outside the code has to be repaired (a file, a weight, a disk); the message says how."""


class Interrupted(BaseException):
    """Work stopped because the user or the system asked, after everything worth keeping was saved.

    Not a ``KeyboardInterrupt``, which Lightning would answer itself, with exit code 1 and Ctrl-C disabled.

    Args:
        signal_number: the signal that asked.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.exit_code = 128 + signal_number


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the nearest known word, or an empty string."""
    near = difflib.get_close_matches(str(word), [str(name) for name in known], n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else ""


def get_obj_from_str(path: str, today: str | None = None) -> Any:
    """Import what a config's ``target`` names, old names included.

    Args:
        path: dotted path ``package.module.Name``; names of the reference repositories are translated first.
        today: the translation, where the caller knows it better.

    Returns:
        The class or function.

    Raises:
        BuildError: the module or the name does not exist; the nearest existing name is given.
    """
    today = today or resolve_target(path)
    module_name, _, name = today.rpartition(".")
    if not module_name:
        raise BuildError(f"target {path!r} is no dotted path; expected package.module.Name", path)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise BuildError(f"target {path!r}: there is no module {error.name!r}", path) from error
        raise UserError(f"target {path!r} needs the package {error.name!r}: pip install it first") from error
    if not hasattr(module, name):
        hint = did_you_mean(name, vars(module))
        raise BuildError(f"target {path!r}: module {module_name!r} has no {name!r}.{hint}", path)
    return getattr(module, name)


def instantiate_from_config(config: Mapping[str, Any] | str | None, **extra: Any) -> Any:
    """Build the object a ``{target, params}`` mapping describes, in today's or in the references' words.

    Args:
        config: the mapping, or one of LDM's placeholder strings.
        **extra: arguments the caller adds to ``params``.

    Returns:
        The object; ``None`` for a placeholder string.

    Raises:
        MissingTargetError: ``target`` is not given.
        BuildError: the target does not exist or does not accept the arguments.
    """
    if isinstance(config, str) and config in PLACEHOLDERS:
        return None
    if not isinstance(config, Mapping):
        raise ConfigError(f"expected a mapping with `target` and `params`, found {config!r}")
    if not config.get("target"):
        raise MissingTargetError(
            f"a `target` (package.module.Name) is missing beside {sorted(map(str, config)) or 'nothing'}"
        )
    target = config["target"]
    today, arguments = translate(target, {**(config.get("params") or {}), **extra})
    factory = get_obj_from_str(target, today)
    _check_arguments(factory, target, arguments)
    return factory(**arguments)


def _check_arguments(factory: Any, target: str, arguments: Mapping[str, Any]) -> None:
    """Raise a ``BuildError`` that lists what ``factory`` accepts when the arguments do not fit it."""
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):  # compiled classes have no signature; they check for themselves
        return
    try:
        signature.bind(**arguments)
    except TypeError as error:
        accepted = [name for name in signature.parameters if name not in ("args", "kwargs", "self")]
        unknown = [name for name in arguments if name not in accepted]
        hint = did_you_mean(unknown[0], accepted) if unknown else ""
        message = f"target {target!r}: {error}.{hint} Accepted: {', '.join(accepted) or 'no arguments'}"
        raise BuildError(message, target) from error


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "w") -> Iterator[IO]:
    """Open a temporary file beside ``path`` and rename it over ``path`` only when all was written.

    A reader, a crash or a full disk therefore never sees or leaves half a file.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, mode) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def _umask() -> int:
    """Return the process' umask; ``mkstemp`` makes files private, which a results folder should not be."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
