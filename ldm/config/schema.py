"""JSON Schema of configs, generated from the signatures of the classes that configs can name.

It covers configs, recipes and the files of own images for recipes. Editors use it for completion and checking. Files
are layers of a config, so no key is required; params are checked for the ``target`` beside them. The params of old
names and of classes of other packages are open.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from typing import Any

from ldm.config.signatures import Signature, find_signature, ours
from ldm.config.targets import KINDS, PART, Found, accepts, read_object
from ldm.config.trainer_args import KNOWN_ARGS, TRAINER_TYPES
from ldm.config.validation import LIGHTNING_VALUES, LOGGER_NAMES
from ldm.legacy import ALIASES, old_params, old_prefixes, resolve_target
from ldm.ranges import CHOICES, RANGES
from ldm.util import PLACEHOLDERS

# Functions that a config may name.
_FUNCTIONS = ("ldm.data.formats.clip_embeddings.with_embeddings", "ldm.data.world.world_vocabulary")
_REFERENCE = {"$ref": "#/$defs/reference"}
_FIRST_STAGE = {"enum": ["vq", "pixels"]}
_ANY = {"$ref": "#/$defs/any"}
_TYPES = {
    "int": ["integer"],
    "float": ["number"],
    "bool": ["boolean", "integer"],
    "str": ["string", "number"],
    "Sequence": ["array"],
    "list": ["array"],
    "tuple": ["array"],
    "None": ["null"],
}


def config_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of config files and recipes."""
    read = {name: read_object(name) for name in sorted({*ours(), *_FUNCTIONS}) if "._" not in name}
    names = {
        name: found
        for name, found in read.items()
        if found and found.module.startswith("ldm.") and accepts(found, PART)
    }
    values: dict[str, Any] = {}
    groups: dict[str, list[str]] = {}  # params -> classes
    for name in names:
        groups.setdefault(json.dumps(_params_of(name, values)), []).append(name)
    rules = [
        {
            "if": {"properties": {"target": {"enum": targets}}, "required": ["target"]},
            "then": {"properties": {"params": json.loads(params)}},
        }
        for params, targets in groups.items()
    ]
    above = {
        "if": {"type": "object", "required": ["target"]},
        "then": {"$ref": f"#/$defs/{PART}"},
        "else": {"additionalProperties": _ANY, "items": _ANY},
    }
    definitions = {
        "config": _config(),
        "recipe": _recipe(),
        "images": {"properties": {"first_stage": _FIRST_STAGE, "stages": {"type": "object"}}},
        "reference": {"type": "string", "pattern": r"\$\{.+\}"},
        "any": above,
        **{kind: _object(kind, names) for kind in KINDS},
        **dict(sorted(values.items())),
        "params": {"allOf": rules},
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Config or recipe",
        "type": "object",
        "if": {"anyOf": [{"required": [key]} for key in ("path", "attributes", "image_size")]},
        "then": {"$ref": "#/$defs/images"},
        "else": {
            "if": {"required": ["stages"]},
            "then": {"$ref": "#/$defs/recipe"},
            "else": {"$ref": "#/$defs/config"},
        },
        "$defs": definitions,
    }


def schema_text() -> str:
    """Return the schema as the text of ``configs/schema.json``: one line per definition and class."""
    schema = config_schema()
    definitions = ",\n".join(f"{json.dumps(name)}: {json.dumps(part)}" for name, part in schema.pop("$defs").items())
    definitions = definitions.replace('{"if": {"properties"', '\n{"if": {"properties"')
    return f'{json.dumps(schema)[:-1]}, "$defs": {{\n{definitions}\n}}}}\n'


def value_schema(annotation: str) -> dict[str, Any]:
    """Return the schema of the values that fit an annotation, or a reference ``${...}``.

    Args:
        annotation: source of an annotation: plain types, ``Literal``, names of ``ldm.ranges`` and unions of these;
            every value fits another one.
    """
    nodes, parts = [ast.parse(annotation, mode="eval").body], []
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.BinOp):
            nodes += [node.left, node.right]
            continue
        name, _, inner = ast.unparse(node).partition("[")
        name, inner = ("Literal", f"{CHOICES[name]}]") if name in CHOICES else (name, inner)
        if name == "Literal":
            parts.append({"enum": list(ast.literal_eval(f"({inner[:-1]},)"))})
        elif name in RANGES:
            parts.append(_range(name))
        elif name in _TYPES:
            parts.append({"type": _TYPES[name]})
        else:
            return _ANY
    types = [name for part in parts if set(part) == {"type"} for name in part["type"]]
    plain = [{"type": sorted(set(types))}] if types else []
    return {"anyOf": [part for part in parts if set(part) != {"type"}] + plain + [_REFERENCE] * ("string" not in types)}


def _range(name: str) -> dict[str, Any]:
    limits = RANGES[name]
    result: dict[str, Any] = {"type": "integer" if limits.kind is int else "number"}
    keys = {"minimum": limits.least, "maximum": limits.most, "exclusiveMinimum": limits.above}
    result |= {"multipleOf": 1} if limits.is_whole else {}
    return result | {key: limit for key, limit in keys.items() if abs(limit) != float("inf")}


def _params_of(name: str, values: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of the params of one class; schemas of their values are added to ``values``."""
    signature, (known, is_open) = find_signature(name) or Signature({}, is_open=True), old_params(name)
    properties: dict[str, Any] = dict.fromkeys(sorted(known), {})
    for option, is_needed in signature.required.items():
        annotation = signature.annotations.get(option, "Any")
        annotation += "" if is_needed or annotation.endswith(" | None") else " | None"
        schema = value_schema(annotation)
        if schema is not _ANY:
            key = annotation.replace(" | ", "+").replace(" ", "").translate(str.maketrans("[]", "()"))
            values[key], schema = schema, {"$ref": f"#/$defs/{key}"}
        properties[option] = schema
    return {"properties": properties} | ({} if is_open or signature.is_open else {"additionalProperties": False})


def _object(kind: str, names: Mapping[str, Found]) -> dict[str, Any]:
    """Return the schema of a ``{target, params}`` of a kind; other packages' classes are accepted."""
    fitting = [name for name, found in names.items() if accepts(found, kind)]
    old = [name for name in ALIASES if kind == PART or resolve_target(name) in fitting]
    others = rf"^(?!ldm\.)|\$\{{|^({'|'.join(map(re.escape, old_prefixes()))})"
    target = {"anyOf": [{"enum": sorted({*fitting, *old})}, {"type": "string", "pattern": others}, {"type": "null"}]}
    params = {"anyOf": [{"type": ["object", "null"]}, _REFERENCE], **_parts(kind)}
    own = {"model": {"base_learning_rate": value_schema("LearningRate | None")}, "data": {"fingerprint": {}}}
    return {
        "anyOf": [{"type": ["object", "null"]}, {"enum": list(PLACEHOLDERS)}, _REFERENCE],
        "properties": {**own.get(kind, {}), "target": target, "params": params},
        "additionalProperties": False,
        "allOf": [{"$ref": "#/$defs/params"}],
    }


def _parts(kind: str) -> dict[str, Any]:
    """Return the rule for everything below ``params``."""
    sections = dict.fromkeys(("train", "validation", "test", "predict"), {"$ref": "#/$defs/dataset"})
    return {"properties": sections if kind == "data" else {}, "additionalProperties": _ANY}


def _config() -> dict[str, Any]:
    kinds = {name: {"$ref": f"#/$defs/{name}"} for name in ("model", "data")}
    trainer = {name: value_schema(TRAINER_TYPES.get(name, "Any")) for name in sorted(KNOWN_ARGS)}
    lightning = {
        **{name: value_schema(f"{kind} | None") for name, kind in LIGHTNING_VALUES.items()},
        "trainer": {"type": ["object", "null"], "properties": trainer, "additionalProperties": False},
        "callbacks": {"type": ["object", "null"], "additionalProperties": {"$ref": "#/$defs/callback"}},
        "logger": {"anyOf": [{"enum": [*LOGGER_NAMES, None]}, {"$ref": "#/$defs/logger"}]},
        "modelcheckpoint": {"$ref": "#/$defs/checkpoint"},
    }
    part = {"type": ["object", "null"], "properties": lightning, "additionalProperties": False}
    files = {"anyOf": [{"type": ["string", "null"]}, {"type": "array", "items": {"type": "string"}}]}
    return {"properties": {"base": files, **kinds, "lightning": part}, "additionalProperties": False}


def _recipe() -> dict[str, Any]:
    texts = {"type": "array", "items": {"type": "string"}}
    stage: Mapping[str, Any] = {"name": {"type": "string"}, "base": texts, "overrides": texts}
    stage = {**stage, "first_stage": _FIRST_STAGE}
    score = {"type": ["object", "null"], "properties": {"processes": _range("PositiveInt")}}
    score["additionalProperties"] = False
    stages = {"type": "object", "properties": stage, "required": ["name", "base"], "additionalProperties": False}
    top = {"name": {"type": "string"}, "logdir": {"type": "string"}, "seed": {"type": "integer"}, "score": score}
    top |= {"data": {"type": ["string", "null"]}, "stages": {"type": "array", "items": stages}}
    return {"properties": top, "required": ["name"], "additionalProperties": False}
