"""Keys of reference codes whose configs are flat."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from ldm.util import ConfigError, did_you_mean

logger = logging.getLogger(__name__)


def known_values(
    pairs: Iterable[tuple[str, Any]], known: Iterable[str], ignored: Mapping[str, str], source: str
) -> dict[str, Any]:
    """Return the values of known keys; keys without effect are logged.

    Args:
        pairs: keys and values.
        known: keys that are translated.
        ignored: keys without effect -> reason, or replacement.
        source: name of the file, for messages.

    Raises:
        ConfigError: a key is neither known nor ignored.
    """
    values, known = {}, (*known, *ignored)
    for key, value in pairs:
        if key not in known:
            raise ConfigError(f"{source}: unknown key {key!r}.{did_you_mean(key, known)} Known: {', '.join(known)}")
        if key in ignored:
            logger.warning("%s: %s is ignored: %s", source, key, ignored[key])
        else:
            values[key] = value
    return values
