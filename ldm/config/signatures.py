"""Accepted arguments of classes and functions, read from their source without importing it.

Configs are checked with it in milliseconds, before torch and Lightning are imported.
"""

from __future__ import annotations

import ast
import builtins
import functools
import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from ldm.util import did_you_mean, mismatch, search_working_directory

_MAX_HOPS = 8
_INTERVAL = "NonNegativeInt | None"
_MONITOR = {"monitor": "str | None", "mode": "Literal['min', 'max']", "verbose": "bool"}
# Classes of Lightning -> argument -> the values that fit, as annotations of ours.
_OF_LIGHTNING = {
    "ModelCheckpoint": {
        **_MONITOR,
        **dict.fromkeys(("every_n_train_steps", "every_n_epochs"), _INTERVAL),
        **dict.fromkeys(("save_weights_only", "auto_insert_metric_name", "enable_version_counter"), "bool"),
        "save_on_train_epoch_end": "bool | None",
        "save_top_k": "OptionalCount | Literal[-1]",
        "save_last": "bool | Literal['link'] | None",
        "train_time_interval": "str | Mapping[str, NonNegativeFloat] | PositiveFloat | None",
        "dirpath": "AnyPath | None",
        "filename": "str | None",
    },
    "EarlyStopping": {
        **_MONITOR,
        **dict.fromkeys(("strict", "check_finite", "log_rank_zero_only"), "bool"),
        **dict.fromkeys(("stopping_threshold", "divergence_threshold"), "float | None"),
        "check_on_train_epoch_end": "bool | None",
        "min_delta": "Finite",
        "patience": "NonNegativeInt",
    },
    "LearningRateMonitor": {
        **dict.fromkeys(("log_momentum", "log_weight_decay"), "bool"),
        "logging_interval": "Literal['step', 'epoch'] | None",
    },
}


@dataclass(frozen=True)
class Signature:
    """Accepted arguments.

    Attributes:
        required: argument name -> whether it has no default.
        is_open: whether further arguments are accepted (``**kwargs`` whose use cannot be followed).
        annotations: argument name -> source of its annotation.
    """

    required: dict[str, bool]
    is_open: bool = False
    annotations: dict[str, str] = field(default_factory=dict, compare=False)

    def after(self, *inherited: Signature) -> Signature:
        """Return the union with inherited signatures; own arguments are first (by position) and take precedence."""
        parts = [*inherited, self]
        return Signature(
            self.required | {n: needed for part in inherited for n, needed in part.required.items()} | self.required,
            self.is_open,
            {name: text for part in parts for name, text in part.annotations.items()},
        )


class Misfit(NamedTuple):
    """First parameter that a target does not accept, by name or value, or "" if one is missing, and the message."""

    name: str
    message: str


class UnknownNameError(LookupError):
    """A module or a name in it does not exist."""


def read_signature(target: str) -> Signature | None:
    """Return the arguments that ``package.module.Name`` accepts.

    Args:
        target: today's dotted path.

    Returns:
        The signature; ``None`` if it cannot be read from the source (compiled, dynamic, or not installed).

    Raises:
        UnknownNameError: ``ldm`` has no such module or name.
    """
    module, _, name = target.rpartition(".")
    found = _signature_of(module, name, _MAX_HOPS)
    if found is None or target.startswith("ldm."):
        return found
    is_lightning = module.partition(".")[0] in ("pytorch_lightning", "lightning")
    return replace(found, annotations=_OF_LIGHTNING.get(name, {}) if is_lightning else {})  # others may be mere remarks


def find_signature(target: str) -> Signature | None:
    """Return the signature of a target; ``None`` also for unknown names, which the validation of configs reports."""
    try:
        return read_signature(target)
    except UnknownNameError:
        return None


def find_misfit(
    target: str, params: Mapping[str, Any], signature: Signature | None, check_required: bool = True
) -> Misfit | None:
    """Compare parameters with a signature.

    Args:
        target: the name in the message.
        params: parameters of a config.
        signature: accepted arguments; ``None`` accepts everything.
        check_required: also report required parameters that are missing.

    Returns:
        The first unknown or missing parameter, or the first of another type than its annotation; ``None`` if all fit.
    """
    if signature is None:
        return None
    for name in params:
        if name not in signature.required and not signature.is_open:
            hint = did_you_mean(name, signature.required)
            accepted = ", ".join(signature.required) or "no arguments"
            return Misfit(name, f"{target} does not accept {name!r}.{hint} Accepted: {accepted}")
    missing = [name for name, needed in signature.required.items() if needed and name not in params]
    if missing and check_required:
        return Misfit("", f"{target} requires {', '.join(map(repr, missing))}. Add params.{missing[0]}")
    for name, value in params.items():
        annotation = signature.annotations.get(name, "Any")
        if (problem := mismatch(annotation, value)) and not (value is None and annotation == "bool"):  # null: false
            hint = did_you_mean(value, re.findall(r"'(.+?)'", annotation)) or " Correct the value"
            return Misfit(name, f"{problem}.{hint}")
    return None


def is_installed(target: str) -> bool:
    """Return whether the top-level package of a dotted path exists, without importing it."""
    search_working_directory()
    try:
        return importlib.util.find_spec(target.partition(".")[0]) is not None
    except (ImportError, ValueError):
        return True  # modules made at run time have no spec


def _signature_of(module: str, name: str, hops: int) -> Signature | None:
    """Find ``name`` in ``module``, following re-exports, and read its arguments."""
    is_ours = module.split(".")[0] == "ldm"
    path = find_source(module)
    if path is None and is_ours:
        raise UnknownNameError(f"there is no module {module}")
    if path is None:
        return None
    nodes, imports = definitions(path, module)
    node = nodes.get(name)
    if isinstance(node, ast.ClassDef):
        return _class_signature(node, module, imports, hops)
    if isinstance(node, ast.FunctionDef):
        return _function_signature(node, False)
    if name in imports and hops:
        origin, _, original = imports[name].rpartition(".")
        return _signature_of(origin, original, hops - 1)
    if is_ours and "*" not in imports and "__getattr__" not in nodes and name not in nodes:
        raise UnknownNameError(f"module {module} has no {name}")
    return None


def lacks_name(target: str, hops: int = _MAX_HOPS) -> bool:
    """Return whether a module exists, but neither it nor its star imports contain a name as a word."""
    module, _, name = target.rpartition(".")
    path = find_source(module)
    text = "" if path is None else path.read_text(encoding="utf-8", errors="replace")
    if path is None or not hops or re.search(rf"\b({name}|__getattr__|globals|setattr|exec|sys\.modules)\b", text):
        return False
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    stars = re.findall(r"^\s*from\s+(\S+)\s+import\s+\*", text, re.MULTILINE)
    names = [importlib.util.resolve_name(star, package) for star in stars]
    is_module = path.name == "__init__.py" and (path.parent / f"{name}.py").exists()
    return not is_module and all(lacks_name(f"{star}.{name}", hops - 1) for star in names)


def find_source(module: str) -> Path | None:
    """Return the source file of a dotted module; nothing is imported."""
    top, *rest = module.split(".")
    search_working_directory()
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    if not spec.submodule_search_locations:
        return Path(spec.origin) if not rest and str(spec.origin).endswith(".py") else None
    base = Path(next(iter(spec.submodule_search_locations))).joinpath(*rest)
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)


@functools.cache
def definitions(path: Path, module: str) -> tuple[dict[str, ast.AST], dict[str, str]]:
    """Return the names that a module defines, and its imported names with their dotted origin."""
    nodes: dict[str, ast.AST] = {}
    imports: dict[str, str] = {}
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.parse(path.read_text(encoding="utf-8"), filename=str(path)).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            nodes[node.name] = node
        elif isinstance(node, ast.Assign):
            nodes.update({target.id: node for target in node.targets if isinstance(target, ast.Name)})
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join(parents[: len(parents) - node.level + 1] + ([base] if base else []))
            imports.update({alias.asname or alias.name: f"{base}.{alias.name}" for alias in node.names})
        elif isinstance(node, ast.Import):
            imports.update({alias.asname or alias.name: alias.name for alias in node.names})
    return nodes, imports


def _class_signature(node: ast.ClassDef, module: str, imports: dict[str, str], hops: int) -> Signature | None:
    """Read ``__init__`` or dataclass fields; ``**kwargs`` are followed into the base classes."""
    methods = {item.name: item for item in node.body if isinstance(item, ast.FunctionDef)}
    if "__new__" in methods:
        return None
    decorators = {ast.unparse(item).split("(")[0].rpartition(".")[2] for item in node.decorator_list}
    if "__init__" in methods:
        own = _function_signature(methods["__init__"], True)
        described = _described_by(methods["__init__"], module)
        if described is not None:
            return replace(own.after(described), is_open=False)
        if not own.is_open:
            return own
    elif "dataclass" in decorators:
        return _field_signature(node)
    else:
        own = Signature({}, is_open=True)
    inherited = [_base_signature(base, module, imports, hops) for base in node.bases]
    if not inherited or any(base is None for base in inherited):
        return own if inherited or "__init__" in methods else Signature(own.required)
    merged = Signature({}).after(*reversed(inherited))
    for name in _passed_on(methods.get("__init__"), list(merged.required)):
        merged.required.pop(name, None)
    return replace(own.after(merged), is_open=any(base.is_open for base in inherited))


def _passed_on(init: ast.FunctionDef | None, names: list[str]) -> list[str]:
    """Return the base arguments that ``__init__`` passes to ``super().__init__(...)`` itself."""
    for call in ast.walk(init) if init else ():
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "super().__init__":
            plain = [item for item in call.args if not isinstance(item, ast.Starred)]
            return [*names[: len(plain)], *(item.arg for item in call.keywords if item.arg)]
    return []


def _described_by(init: ast.FunctionDef, module: str, hops: int = _MAX_HOPS) -> Signature | None:
    """Return the options that ``__init__(self, ..., **params)`` takes from ``params`` beside its own arguments.

    Recognised are the calls ``SomeDataclass.from_params(params)`` and ``group_options(params, SomeDataclass, ...)``.
    """
    path = find_source(module)
    if init.args.kwarg is None or path is None:
        return None
    nodes, imports = definitions(path, module)
    for call in ast.walk(init):
        if not isinstance(call, ast.Call):
            continue
        function, *groups = [ast.unparse(item) for item in (call.func, *call.args)]
        if function.endswith(".from_params") and groups == [init.args.kwarg.arg]:
            groups = [function.removesuffix(".from_params")]
        elif function == "group_options" and groups[:1] == [init.args.kwarg.arg]:
            groups = groups[1:]
        else:
            continue
        found = [_fields_of(group, module, nodes, imports, hops) for group in groups]
        if all(found):
            return Signature({}).after(*found)
    return None


def _fields_of(
    name: str, module: str, nodes: dict[str, ast.AST], imports: dict[str, str], hops: int
) -> Signature | None:
    """Return the fields of a dataclass that is defined in a module or imported there."""
    if isinstance(node := nodes.get(name), ast.ClassDef):
        return _field_signature(node)
    origin, _, original = imports.get(name, "").rpartition(".")
    path = find_source(origin) if origin and hops else None
    return None if path is None else _fields_of(original, origin, *definitions(path, origin), hops - 1)


def _base_signature(base: ast.expr, module: str, imports: dict[str, str], hops: int) -> Signature | None:
    """Return the signature of a base class in the same package; ``None`` for others."""
    origin = origin_of(base, module, imports)
    if not hops or origin.split(".")[0] != module.split(".")[0]:
        return None
    parent, _, name = origin.rpartition(".")
    return _signature_of(parent, name, hops - 1)


def origin_of(node: ast.expr, module: str, imports: Mapping[str, str]) -> str:
    """Return the dotted path of an expression such as ``nn.Module`` or ``Dataset[int]``."""
    dotted = ast.unparse(node.value if isinstance(node, ast.Subscript) else node).strip("'\"")
    first, _, rest = dotted.partition(".")
    default = f"builtins.{first}" if first in vars(builtins) and not rest else f"{module}.{first}"
    return imports.get(first, default) + (f".{rest}" if rest else "")


def _field_signature(node: ast.ClassDef) -> Signature | None:
    if node.bases:
        return None
    fields = [item for item in node.body if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)]
    annotations = {item.target.id: ast.unparse(item.annotation) for item in fields}
    return Signature({item.target.id: item.value is None for item in fields}, annotations=annotations)


def _function_signature(node: ast.AST, skip_first: bool) -> Signature:
    arguments = node.args
    positional = [*arguments.posonlyargs, *arguments.args]
    plain = len(positional) - len(arguments.defaults)
    required = {item.arg: index < plain for index, item in enumerate(positional)}
    if skip_first and positional:
        required.pop(positional[0].arg)
    required.update({item.arg: default is None for item, default in zip(arguments.kwonlyargs, arguments.kw_defaults)})
    named = (item for item in (*positional, *arguments.kwonlyargs) if item.annotation)
    annotations = {item.arg: ast.unparse(item.annotation) for item in named}
    return Signature(required, arguments.kwarg is not None, annotations)


@functools.cache
def ours() -> list[str]:
    """Return the dotted paths of all classes in ``ldm``, re-exports included; only used for suggestions."""
    root = Path(__file__).resolve().parents[1]
    names = []
    for path in sorted(root.rglob("*.py")):
        module = ".".join(("ldm", *path.relative_to(root).with_suffix("").parts)).removesuffix(".__init__")
        nodes, imports = definitions(path, module)
        shown = [name for name in imports if name[:1].isupper()] if "__all__" in nodes else []
        classes = [name for name, node in nodes.items() if isinstance(node, ast.ClassDef)]
        names += [f"{module}.{name}" for name in (*shown, *classes)]
    return names
