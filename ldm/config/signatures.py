"""What a class or function accepts, read from its source without importing it.

A config is checked this way in milliseconds, before torch and Lightning are loaded.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from dataclasses import dataclass, field
from pathlib import Path

_MAX_HOPS = 8


@dataclass(frozen=True)
class Signature:
    """Accepted arguments.

    Attributes:
        required: argument name -> whether it has no default.
        is_open: whether further arguments may be given (``**kwargs`` whose destination is not ours to see).
    """

    required: dict[str, bool] = field(default_factory=dict)
    is_open: bool = False


class UnknownNameError(LookupError):
    """A module or a name in it does not exist; ``known`` holds the names that do."""

    def __init__(self, message: str, known: list[str]) -> None:
        super().__init__(message)
        self.known = known


def read_signature(target: str) -> Signature | None:
    """Return what ``package.module.Name`` accepts.

    Args:
        target: today's dotted path.

    Returns:
        The signature; ``None`` when the source does not tell (compiled, dynamic, or not installed).

    Raises:
        UnknownNameError: the package is ours and has no such module or name.
    """
    module, _, name = target.rpartition(".")
    return _signature_of(module, name, _MAX_HOPS)


def is_installed(target: str) -> bool:
    """Whether the top-level package or module of a dotted path exists; nothing is imported."""
    try:
        return importlib.util.find_spec(target.partition(".")[0]) is not None
    except (ImportError, ValueError):
        return True  # a module that was made by hand has no spec


def _signature_of(module: str, name: str, hops: int) -> Signature | None:
    """Find ``name`` in ``module``, following re-exports, and read its arguments."""
    is_ours = module.split(".")[0] == "ldm"
    path = find_source(module)
    if path is None:
        if is_ours:
            raise UnknownNameError(f"there is no module {module}", ours())
        return None
    node, imports = _definitions(path, module)
    if name in node:
        found = node[name]
        if isinstance(found, ast.ClassDef):
            return _class_signature(found, module, imports, hops)
        return _function_signature(found, skip_first=False)
    if name in imports and hops:
        origin, _, original = imports[name].rpartition(".")
        return _signature_of(origin, original, hops - 1)
    if is_ours and "*" not in imports and "__getattr__" not in node and name not in _assigned(path):
        raise UnknownNameError(f"module {module} has no {name}", [f"{module}.{known}" for known in [*node, *imports]])
    return None


def find_source(module: str) -> Path | None:
    """Return the source file of a dotted module; only the top-level package is looked up, none is imported."""
    top, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    if spec is None or not (spec.submodule_search_locations or spec.origin):
        return None
    if not spec.submodule_search_locations:
        return Path(spec.origin) if not rest and str(spec.origin).endswith(".py") else None
    base = Path(next(iter(spec.submodule_search_locations))).joinpath(*rest)
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.is_file():
            return path
    return None


@functools.cache
def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def _definitions(path: Path, module: str) -> tuple[dict[str, ast.AST], dict[str, str]]:
    """Return the module's classes and functions, and its imported names with their dotted origin."""
    nodes: dict[str, ast.AST] = {}
    imports: dict[str, str] = {}
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in _parse(path).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            nodes[node.name] = node
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join(parents[: len(parents) - node.level + 1] + ([base] if base else []))
            imports.update({alias.asname or alias.name: f"{base}.{alias.name}" for alias in node.names})
        elif isinstance(node, ast.Import):
            imports.update({alias.asname or alias.name: alias.name for alias in node.names})
    return nodes, imports


def _assigned(path: Path) -> set[str]:
    """Return the names a module assigns at its top level."""
    return {
        target.id
        for node in _parse(path).body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def _class_signature(node: ast.ClassDef, module: str, imports: dict[str, str], hops: int) -> Signature | None:
    """Read ``__init__`` (or dataclass fields); ``**kwargs`` are followed into the base classes."""
    methods = {item.name: item for item in node.body if isinstance(item, ast.FunctionDef)}
    if "__new__" in methods:
        return None
    decorators = {ast.unparse(item).split("(")[0].rpartition(".")[2] for item in node.decorator_list}
    if "__init__" in methods:
        own = _function_signature(methods["__init__"], skip_first=True)
        described = _described_by(methods["__init__"], module)
        if described is not None:
            return Signature({**described.required, **own.required})
        if not own.is_open:
            return own
    elif "dataclass" in decorators:
        return _field_signature(node)
    else:
        own = Signature({}, is_open=True)
    inherited = [_base_signature(base, module, imports, hops) for base in node.bases]
    if not inherited or any(base is None for base in inherited):
        return own if inherited else Signature(own.required)
    merged: dict[str, bool] = {}
    for base in reversed(inherited):
        merged.update(base.required)
    for name in _passed_on(methods.get("__init__"), list(merged)):
        merged.pop(name, None)
    return Signature({**merged, **own.required}, is_open=any(base.is_open for base in inherited))


def _passed_on(init: ast.FunctionDef | None, names: list[str]) -> list[str]:
    """Return the base arguments that ``super().__init__(...)`` is given by name or place, so that configs need not."""
    for call in ast.walk(init) if init else ():
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "super().__init__":
            plain = [item for item in call.args if not isinstance(item, ast.Starred)]
            return [*names[: len(plain)], *(item.arg for item in call.keywords if item.arg)]
    return []


def _described_by(init: ast.FunctionDef, module: str) -> Signature | None:
    """Return the fields of the dataclass that ``__init__(self, **params)`` checks its params with.

    Recognised by the call ``SomeDataclass.from_params(params)`` of a dataclass in the same module.
    """
    path = find_source(module)
    if init.args.kwarg is None or path is None:
        return None
    nodes, _ = _definitions(path, module)
    for call in ast.walk(init):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "from_params":
            node = nodes.get(ast.unparse(call.func.value))
            if isinstance(node, ast.ClassDef) and [ast.unparse(arg) for arg in call.args] == [init.args.kwarg.arg]:
                return _field_signature(node)
    return None


def _base_signature(base: ast.expr, module: str, imports: dict[str, str], hops: int) -> Signature | None:
    """Return the signature of a base class of ours; ``None`` for foreign ones."""
    dotted = ast.unparse(base)
    first, _, rest = dotted.partition(".")
    origin = imports.get(first, f"{module}.{first}") + (f".{rest}" if rest else "")
    if not hops or origin.split(".")[0] != module.split(".")[0]:
        return None
    parent, _, name = origin.rpartition(".")
    return _signature_of(parent, name, hops - 1)


def _field_signature(node: ast.ClassDef) -> Signature | None:
    if node.bases:
        return None
    fields = [item for item in node.body if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)]
    return Signature({item.target.id: item.value is None for item in fields})


def _function_signature(node: ast.AST, skip_first: bool) -> Signature:
    arguments = node.args
    positional = [*arguments.posonlyargs, *arguments.args]
    plain = len(positional) - len(arguments.defaults)
    required = {item.arg: index < plain for index, item in enumerate(positional)}
    if skip_first and positional:
        required.pop(positional[0].arg)
    required.update({item.arg: default is None for item, default in zip(arguments.kwonlyargs, arguments.kw_defaults)})
    return Signature(required, is_open=arguments.kwarg is not None)


@functools.cache
def ours() -> list[str]:
    """Return the dotted paths of all classes in ``ldm``, re-exported ones too; only used to suggest a name."""
    root = Path(__file__).resolve().parents[1]
    names = []
    for path in sorted(root.rglob("*.py")):
        module = ".".join(("ldm", *path.relative_to(root).with_suffix("").parts)).removesuffix(".__init__")
        nodes, imports = _definitions(path, module)
        shown = [name for name in imports if name[:1].isupper()] if "__all__" in _assigned(path) else []
        names += [f"{module}.{name}" for name in shown]
        names += [f"{module}.{name}" for name, node in nodes.items() if isinstance(node, ast.ClassDef)]
    return names
