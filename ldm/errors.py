"""Errors and repeated messages for the user; ``ldm.util`` exports the errors."""

from __future__ import annotations

import functools
import itertools
import logging
import re
import traceback
from pathlib import Path

logger = logging.getLogger(__name__)

_ADVICE_TO_UNPICKLE = re.compile(r"weights_only|allow_pickle|pickle\.load")


class _Readable(Exception):
    """An error whose message leaves out the traceback that torch adds to the errors of loader processes."""

    def __str__(self) -> str:
        text, kind = Exception.__str__(self), type(self)  # not that of KeyError
        if text.startswith("Caught ") and "\nOriginal Traceback (most recent call last):\n" in text:
            return text.rpartition(f"\n{kind.__module__}.{kind.__qualname__}: ")[2].strip()
        return text


class ConfigError(_Readable, ValueError):
    """An invalid configuration; the message names the file or key and the next step."""


class MissingTargetError(ConfigError, KeyError):
    """A mapping that should describe an object has no ``target`` (also a ``KeyError``, as in LDM)."""


class BuildError(ConfigError):
    """An object that cannot be built from its config.

    Args:
        message: the reason.
        target: the ``target`` that failed.
        key: dotted key of the error, relative to the config passed to :func:`instantiate_from_config`.
    """

    def __init__(self, message: str, target: str, key: str = "target") -> None:
        super().__init__(message)
        self.target, self.key = target, key

    def __str__(self) -> str:
        return f"{self.key}: {self.args[0]}"


class UserError(_Readable, RuntimeError):
    """A problem outside the code (a file, weights, the disk); the message contains the next step."""


class NotPreparedError(UserError):
    """A part is used that training prepares before its first step."""


@functools.cache
def report_once(message: str, level: int = logging.WARNING) -> None:
    """Log a message once in a process; a run opens its files for each of its parts."""
    logger.log(level, "%s", message)


def in_one_line(error: BaseException) -> str:
    """Return type, text and place of an error of own code, in one line."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    text = str(error).partition("\n")[0]
    where = f"{Path(place.filename).name}, line {place.lineno}"
    return f"{type(error).__name__}: {text} ({where}). Add -d for the traceback"


def reason_of(error: BaseException) -> str:
    """Return the text of an error in one line, without the advice of torch and numpy to unpickle code."""
    sentences = re.split(r"(?<=\.)\s+", " ".join(str(error).split()))
    kept = itertools.takewhile(lambda sentence: not _ADVICE_TO_UNPICKLE.search(sentence), sentences)
    return " ".join(kept).rstrip(".") or "it contains Python objects, which are not unpickled"
