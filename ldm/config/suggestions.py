"""Suggestions for classes that configs name and that do not exist."""

from __future__ import annotations

import ast
import difflib
from pathlib import Path

from ldm.config.signatures import definitions, find_source, ours
from ldm.legacy import ALIASES, OLD_MODULES, resolve_target
from ldm.util import did_you_mean

_FORKS = ("ldm", "taming", *OLD_MODULES)  # packages of the references, which forks extend


def near_class(target: str) -> str:
    """Return `` Did you mean 'x'?`` for a class of the same name or with a slip in its dotted name, else nothing."""
    public = [name for name in (*ours(), *ALIASES) if "._" not in name]
    same_kind = [name for name in public if name.split(".")[:2] == target.split(".")[:2]]
    last = target.rpartition(".")[2]
    same_name = {resolve_target(name): name for name in same_kind if name.rpartition(".")[2] == last}
    if len(same_name) == 1:
        return f" Did you mean {next(iter(same_name.values()))!r}?"
    slips = [name for name in same_kind if last != (near := name.rpartition(".")[2]) and _is_slip(last, near)]
    return did_you_mean(target, [*slips, *(name for name in public if _is_slip(target, name))], cutoff=0.8)


def _is_slip(given: str, name: str) -> bool:
    """Return whether two words differ by a typing error: at most three letters, no digit and not the first letter."""
    matcher = difflib.SequenceMatcher(None, given, name, autojunk=False)
    unmatched = len(given) + len(name) - 2 * sum(block.size for block in matcher.get_matching_blocks())
    digits = [[letter for letter in word if letter.isdigit()] for word in (given, name)]
    return given[:1] == name[:1] and digits[0] == digits[1] and unmatched <= 3


def advice_for_missing(target: str, today: str) -> str:
    """Return the sentences after the message that a module has no such name: ``target``, or ``today``."""
    module, _, name = today.rpartition(".")
    path = find_source(module)
    if target.partition(".")[0] in _FORKS or path is None:
        hint = near_class(target)
        more = f" {'Otherwise it' if hint else 'It'} is {_advice_for_forks(target)}"
        return hint if module in OLD_MODULES else hint + more
    nodes, imports = definitions(path, module)
    classes = [known for known, node in nodes.items() if isinstance(node, ast.ClassDef)]
    public = [known for known in (*classes, *imports) if not known.startswith("_") and known[:1].isupper()]
    listing = f" It has {', '.join(public[:6])}{', ...' * (len(public) > 6)}." if public else ""
    return did_you_mean(name, public) or f"{listing} Correct the name, or add the class to {path}"


def _advice_for_forks(target: str) -> str:
    """Return where to put the file of a class that this package does not have, and its name there."""
    module, _, name = target.rpartition(".")
    stem, theirs, source = module.rpartition(".")[2], Path(*module.split(".")).with_suffix(".py"), find_source(module)
    is_free = source is None and find_source(stem) in (None, Path.cwd() / f"{stem}.py")
    own = Path(f"{stem}.py" if is_free else f"my_{stem}.py")
    step = f"put its file outside ldm/, in the folder where the command runs (./{own}), and"
    if own.is_file():
        step = f"as ./{own} exists,"
    elif theirs.is_file() and (source is None or not source.samefile(theirs)):
        step = f"copy ./{theirs} to ./{own}, outside ldm/, and"
    return f"a class of a fork: {step} set the target to {own.stem}.{name}"
