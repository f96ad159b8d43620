"""Kinds of objects that a config may name, checked before anything is imported or called.

A ``target`` of the standard library, and anything that is not of the kind that its place in the config needs, is
refused: building a config never runs code that is not part of a model, a data set or the like. The kind is read from
the source, without an import, and again from the imported object. ``allow_targets=[my_lab.tools]`` on the command line
of ``main.py``, or the environment variable ``LDM_ALLOW_TARGETS`` (names separated by commas), accepts the targets with
these prefixes; a config file cannot contain it.
"""

from __future__ import annotations

import ast
import builtins
import importlib.util
import inspect
import logging
import os
import re
import sysconfig
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ldm.config.signatures import definitions, find_source, lacks_name, origin_of
from ldm.config.suggestions import advice_for_missing
from ldm.legacy import NOT_SHIPPED_CLASS, resolve_target
from ldm.util import search_working_directory

logger = logging.getLogger(__name__)

ALLOW_KEY, ALLOW_VARIABLE = "allow_targets", "LDM_ALLOW_TARGETS"
_MAX_HOPS = 12
# Places of modules. Ducks, classes with the methods of a kind but another base class, are accepted in some only.
_STANDARD, _OWN, _FOREIGN = "the standard library", "your own files", "an installed package"
_LIGHTNING = ("pytorch_lightning", "lightning", "lightning_fabric")
_KNOWN = ("ldm", "torch", "torchvision", "open_clip", *_LIGHTNING)
_SITES = {"site-packages", "dist-packages"}


class Kind(NamedTuple):
    """A kind of object: what a message expects, base classes as "package Name", and methods of ducks."""

    text: str
    bases: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()


_SCHEDULE = "ldm.lr_scheduler.LambdaLinearScheduler"
_MODULES = ("torch Module", "lightning LightningModule")
KINDS = {
    "model": Kind("a LightningModule", ("lightning LightningModule",)),
    "data": Kind("a LightningDataModule", ("lightning LightningDataModule",)),
    "dataset": Kind(
        "a data set (a class with __len__ and __getitem__)", ("torch Dataset",), ("__len__", "__getitem__")
    ),
    "callback": Kind("a Callback of Lightning", ("lightning Callback", "lightning Checkpoint")),
    "checkpoint": Kind("a Checkpoint callback of Lightning", ("lightning Checkpoint",)),
    "logger": Kind("a Logger of Lightning", ("lightning Logger",)),
    "module": Kind("an nn.Module", _MODULES),
    "callable": Kind(f"a class whose objects map a step to a factor, such as {_SCHEDULE}", _MODULES, ("__call__",)),
}
_PARTS = (
    *("torch Optimizer", "torch LRScheduler", "torch Sampler", "torch Distribution", "ldm Sampler", "ldm Finder"),
    *("ldm AttributeVocabulary", "ldm FactorSpace", "ldm Record", "lightning CheckpointIO", "lightning LayerSync"),
    *("lightning Profiler", "lightning Strategy", "lightning Precision", "lightning ClusterEnvironment"),
)
PART = "part"
_BASES = {base for kind in KINDS.values() for base in kind.bases}.union(_PARTS)
KINDS[PART] = Kind("a class that is part of a model, its training or its data", tuple(_BASES))
# Dotted keys whose kind is known.
_BY_KEY = {
    r"model|data": "{0}",
    r"data\.params\.(train|validation|test|predict)": "dataset",
    r"lightning\.callbacks\.[^.]+": "callback",
    r"lightning\.logger": "logger",
    r"lightning\.modelcheckpoint": "checkpoint",
    r".*\.(temperature_)?scheduler_config": "callable",
    r"model\..*\.(first_stage|cond_stage|unet|denoiser|low_scale)_config|model\..*\.lossconfig": "module",
    r"model\..*\.cond_stage_config\.(text|image)_encoder": "module",
}


class Found(NamedTuple):
    """A class, or the class that a function returns, as far as it was read.

    Attributes:
        module: module that defines the class or function.
        bases: the class and its ancestors, as "package Name".
        methods: names of its methods.
        is_class: false for functions.
        is_complete: whether all ancestors were read.
    """

    module: str
    bases: frozenset[str] = frozenset()
    methods: frozenset[str] = frozenset()
    is_class: bool = True
    is_complete: bool = True


def kind_of_key(key: str) -> str:
    """Return the kind, a key of ``KINDS``, that a dotted key of a config needs."""
    return next((kind.format(key) for pattern, kind in _BY_KEY.items() if re.fullmatch(pattern, key)), PART)


def find_refused(content: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the dotted key and a message for every target of a config that is refused; nothing is imported."""
    for key, target in _targets(content, ""):
        if problem := refusal(target, resolve_target(target), kind_of_key(key)):
            yield f"{key}.target", problem


def _targets(content: Any, above: str) -> Iterator[tuple[str, str]]:
    """Yield the dotted key of every mapping with a ``target``, at any depth."""
    if isinstance(content, Mapping) and above and isinstance(content.get("target"), str):
        yield above, content["target"]
    parts = content.items() if isinstance(content, Mapping) else enumerate(content) if isinstance(content, list) else ()
    for name, value in parts:
        yield from _targets(value, f"{above}.{name}".removeprefix("."))


def refusal(target: str, today: str, kind: str = PART, imported: Any = None) -> str:
    """Return why a target is refused; an empty string if it is accepted, or if only its import can tell.

    Args:
        target: the name in the message.
        today: today's dotted path.
        kind: a key of ``KINDS``.
        imported: the object, if it is imported already.
    """
    if is_allowed(today) or today == NOT_SHIPPED_CLASS:  # its constructor reports what to do
        return ""
    wanted = KINDS[kind]
    try:
        found = read_object(today) if imported is None else _describe(imported)
    except (SyntaxError, UnicodeDecodeError) as error:
        return f"{target}: its source cannot be read ({error}). Correct the file"
    if found is None or accepts(found, kind) or (not found.is_complete and place_of(found.module) != _STANDARD):
        return ""
    place = place_of(found.module)
    if kind != PART and found.is_class and place in _KNOWN:  # allowed, it would fail in its place
        return f"expected {wanted.text}, got {target}. Set another target"
    owner = f" of {place}" if place in (_STANDARD, _FOREIGN) else "" if found.is_class else ", a function"
    is_plain = not found.is_class and place == _OWN
    advice = "Name a class, or annotate the function with the class that it returns. " if is_plain else ""
    return f"expected {wanted.text}, got {target}{owner}. {advice}{_how_to_allow(target)}"


def check_import(path: str, today: str) -> str:
    """Return why a module may not be imported; an empty string if it may.

    Modules of the standard library and ``__main__`` files of packages can act when they are imported.
    """
    module = today.rpartition(".")[0]
    if is_allowed(today):
        return ""
    if place_of(module) == _STANDARD or "__main__" in module.split(".")[1:]:
        owner = _STANDARD if place_of(module) == _STANDARD else "a command"
        return f"expected a class of a model, data set or callback, got {path} of {owner}. {_how_to_allow(path)}"
    if not module.startswith("ldm.") and lacks_name(today):
        return f"{path!r}: module {module!r} has no {today.rpartition('.')[2]!r}.{advice_for_missing(path, today)}"
    return ""


def _how_to_allow(target: str) -> str:
    return (
        f"If you trust it, add {ALLOW_KEY}=[{target}] to the command line of main.py, or set the environment variable "
        f"{ALLOW_VARIABLE}={target}"
    )


def is_allowed(today: str) -> bool:
    """Return whether the user allows a target by name or by the name of a module or package above it."""
    names = [name.strip() for name in os.environ.get(ALLOW_VARIABLE, "").split(",")]
    return any(name and f"{today}.".startswith(f"{name}.") for name in names)


def allow(names: Sequence[str]) -> None:
    """Accept targets with these prefixes in this process and those that it starts; one warning names all."""
    allowed = ",".join(filter(None, [os.environ.get(ALLOW_VARIABLE), *names]))
    if allowed:
        os.environ[ALLOW_VARIABLE] = allowed
        logger.warning("%s: targets that begin with %s are imported and called", ALLOW_KEY, allowed)


def place_of(module: str) -> str:
    """Return where a module comes from: the name of a known package, or a group of others."""
    top = module.partition(".")[0]
    if top in _KNOWN:
        return top
    search_working_directory()
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):  # made at run time
        return _OWN
    if spec is None:
        return _OWN
    origin = spec.origin or next(iter(spec.submodule_search_locations or ()), "")
    if origin in ("built-in", "frozen"):
        return _STANDARD
    path = Path(origin).resolve()
    if _SITES & set(path.parts):
        return _FOREIGN
    libraries = [Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib")]
    return _STANDARD if any(folder in path.parents for folder in libraries) else _OWN


def accepts(found: Found, kind: str) -> bool:
    """Return whether an object, as far as it was read, is of a kind."""
    place, wanted = place_of(found.module), KINDS[kind]
    if not found.is_class and place not in ("ldm", "torchvision", _OWN):  # torch.jit.load, open_clip.create_model, ...
        return False
    if found.bases & set(wanted.bases):
        return True
    if place in (_STANDARD, _FOREIGN):
        return False
    if kind != PART:
        return bool(wanted.methods) and found.methods.issuperset(wanted.methods)
    return (found.is_class and place == _OWN) or any(accepts(found, name) for name in ("dataset", "callable"))


def _id(dotted: str) -> str:
    """Return "package Name"; Lightning is distributed under several names."""
    top, last = dotted.partition(".")[0], dotted.rpartition(".")[2]
    return f"{'lightning' if top in _LIGHTNING else top} {last}"


def _describe(factory: Any) -> Found:
    """Describe an imported object."""
    made, is_class = factory, inspect.isclass(factory)
    if not is_class:
        try:
            made = typing.get_type_hints(factory).get("return")
        except (TypeError, NameError, AttributeError):
            made = None
    ancestors = [base for base in made.__mro__ if base is not object] if inspect.isclass(made) else []
    module = str(factory.__module__ if callable(factory) else type(factory).__module__)
    bases = frozenset(_id(f"{base.__module__}.{base.__name__}") for base in ancestors)
    return Found(module, bases, frozenset(name for base in ancestors for name in vars(base)), is_class)


def read_object(target: str, hops: int = _MAX_HOPS) -> Found | None:
    """Describe a class or function from its source; None if it is not found there."""
    module, _, name = target.rpartition(".")
    if _id(target) in _BASES:
        return Found(module, frozenset([_id(target)]))
    if place_of(module) == _STANDARD:
        methods = frozenset(dir(vars(builtins).get(name)) if module == "builtins" else ())
        return Found(module, methods=methods, is_complete=module in ("builtins", "typing", "abc"))
    path = find_source(module)
    if path is None or not hops:
        return None
    nodes, imports = definitions(path, module)
    node = nodes.get(name)
    if isinstance(node, ast.ClassDef):
        return _read_class(node, module, imports, hops)
    if isinstance(node, ast.FunctionDef):
        returned = read_object(origin_of(node.returns, module, imports), hops - 1) if node.returns else None
        is_known = not node.returns or place_of(module) == "ldm" or (returned is not None and returned.is_complete)
        return Found(module, returned.bases if returned else frozenset(), frozenset(), False, is_known)
    if isinstance(node, ast.Assign) and isinstance(node.value, (ast.Name, ast.Attribute)):
        return read_object(origin_of(node.value, module, imports), hops - 1)
    if name in imports:
        return read_object(imports[name], hops - 1)
    return read_object(imports["*"].removesuffix("*") + name, hops - 1) if "*" in imports else None


def _read_class(node: ast.ClassDef, module: str, imports: Mapping[str, str], hops: int) -> Found:
    bases, methods = {_id(f"{module}.{node.name}")}, set()
    for item in node.body:
        if isinstance(item, (ast.FunctionDef, ast.AsyncFunctionDef)):
            methods.add(item.name)
        elif isinstance(item, ast.Assign):
            methods.update(ast.unparse(target) for target in item.targets)
    parents = [read_object(origin_of(base, module, imports), hops - 1) for base in node.bases]
    for found in filter(None, parents):
        bases, methods = bases | found.bases, methods | found.methods
    is_complete = all(found is not None and found.is_complete for found in parents)
    return Found(module, frozenset(bases), frozenset(methods), is_complete=is_complete)
