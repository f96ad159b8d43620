"""Finding the config file a user means."""

from __future__ import annotations

import difflib
from pathlib import Path

from ldm.util import UserError


def find_config_file(given: str) -> Path:
    """Return the config file meant; ``-`` and ``_`` in its name may stand for each other.

    Args:
        given: path as written.

    Raises:
        UserError: no such file; near names are listed.
    """
    path = Path(given)
    if path.is_file():
        return path
    wanted = path.name.replace("-", "_")
    siblings = sorted(path.parent.glob("*.yaml")) if path.parent.is_dir() else []
    for sibling in siblings:
        if sibling.name.replace("-", "_") == wanted:
            return sibling
    near = difflib.get_close_matches(path.name, [sibling.name for sibling in siblings], n=3, cutoff=0.4)
    choices = [str(path.parent / name) for name in near]
    if not choices:
        choices = [str(match) for match in sorted(Path().glob(f"configs/**/*{path.stem[:6]}*.yaml"))[:3]]
    hint = f" Near: {', '.join(choices)}" if choices else f" There are no .yaml files in {path.parent}/"
    raise UserError(f"config file {given} does not exist.{hint}")
