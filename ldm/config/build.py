"""Objects from the sections of a config, with errors that give the file and the dotted key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ldm.config.loading import Config
from ldm.util import BuildError, ConfigError, instantiate_from_config


def build(config: Config, section: str) -> Any:
    """Instantiate a section; a failure names the dotted key and the file.

    Raises:
        ConfigError: the target does not accept its arguments.
    """
    try:
        return instantiate_from_config(config.content[section])
    except BuildError as error:
        key = _find_target(config.content[section], error.target, section)
        raise ConfigError(f"{config.origin(key)}: {key}: {error}") from error
    except ConfigError as error:
        raise ConfigError(f"{config.origin(section)}: {section}: {error}") from error


def _find_target(content: Any, target: str, key: str) -> str:
    """Return the dotted key of the mapping with that target."""
    if isinstance(content, Mapping):
        if content.get("target") == target:
            return key
        for name, value in content.items():
            found = _find_target(value, target, f"{key}.{name}")
            if found:
                return found
    return "" if "." in key else key
