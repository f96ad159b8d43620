"""The JSON Schema of configs: ``configs/schema.json`` is up to date, accepts all shipped configs and refuses slips.

To renew the file after a change of signatures: ``python main.py --schema > configs/schema.json``.
"""

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from legacy_configs import MODELS
from omegaconf import OmegaConf

from ldm.config.schema import value_schema

ROOT = Path(__file__).parents[2]
STORED = ROOT / "configs" / "schema.json"
SCHEMA = json.loads(STORED.read_text())
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
TYPES = {"object": dict, "array": list, "string": str, "null": type(None), "boolean": bool}


def problems(value: Any, schema: dict, key: str = "") -> list[str]:
    """Return the dotted keys at which a value breaks a schema: the keywords that ``ldm.config.schema`` writes."""
    found: list[str] = []
    if "$ref" in schema:
        found += problems(value, SCHEMA["$defs"][schema["$ref"].removeprefix("#/$defs/")], key)
    if "type" in schema and not any(is_of(value, kind) for kind in as_list(schema["type"])):
        found.append(key)
    if "enum" in schema and not any(value == choice and type(value) is type(choice) for choice in schema["enum"]):
        found.append(key)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        is_within = schema.get("minimum", value) <= value <= schema.get("maximum", value)
        found += [] if is_within and value > schema.get("exclusiveMinimum", float("-inf")) else [key]
    if isinstance(value, str) and not re.search(schema.get("pattern", ""), value):
        found.append(key)
    if "anyOf" in schema:
        tried = [problems(value, part, key) for part in schema["anyOf"]]
        found += [] if any(not each for each in tried) else min(tried, key=len)
    for part in schema.get("allOf", ()):
        found += problems(value, part, key)
    if "if" in schema:
        branch = "else" if problems(value, schema["if"], key) else "then"
        found += problems(value, schema.get(branch, {}), key)
    if isinstance(value, dict):
        found += [f"{key}.{name}" for name in schema.get("required", ()) if name not in value]
        for name, item in value.items():
            rule = schema.get("properties", {}).get(name, schema.get("additionalProperties", {}))
            found += [f"{key}.{name}"] if rule is False else problems(item, rule, f"{key}.{name}")
    if isinstance(value, list) and "items" in schema:
        for number, item in enumerate(value):
            found += problems(item, schema["items"], f"{key}.{number}")
    return found


def as_list(value: Any) -> list:
    return value if isinstance(value, list) else [value]


def is_of(value: Any, kind: str) -> bool:
    if kind in ("integer", "number"):
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return is_number and (kind == "number" or float(value).is_integer())
    return isinstance(value, TYPES[kind])


def read(path: Path) -> Any:
    return OmegaConf.to_container(OmegaConf.load(path), resolve=False)


def test_every_reference_leads_somewhere() -> None:
    names = set(re.findall(r'"#/\$defs/([^"]+)"', STORED.read_text()))
    assert names <= set(SCHEMA["$defs"])
    assert not [name for name in names if re.search(r"[^\w.+(),'-]", name)]  # no escapes in JSON pointers


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_shipped_configs_are_valid_and_refer_to_it(path: Path) -> None:
    first = path.read_text().splitlines()[0]
    assert first == f"# yaml-language-server: $schema={os.path.relpath(STORED, path.parent)}"
    assert problems(read(path), SCHEMA) == []


@pytest.mark.parametrize("name", MODELS)
def test_configs_of_the_references_are_valid(name: str) -> None:
    assert problems({"model": copy.deepcopy(MODELS[name])}, SCHEMA) == []


def changed(path: str, key: str, value: Any) -> Any:
    content = OmegaConf.load(ROOT / "configs" / path)
    OmegaConf.update(content, key, value, force_add=True)
    return OmegaConf.to_container(content, resolve=False)


WORLD, VQ, LDM, RECIPE = (f"quickstart/{name}.yaml" for name in ("world", "vq", "ldm", "recipe"))


@pytest.mark.parametrize(
    ("path", "key", "value"),
    [
        (VQ, "modle", {}),
        (VQ, "model.pparams", {}),
        (VQ, "model.base_learning_rate", "abc"),
        (VQ, "model.base_learning_rate", -1),
        (VQ, "model.target", "ldm.models.autoencoder.VQModle"),
        (VQ, "model.target", "ldm.data.world.World3D"),
        (VQ, "model.target", "ldm.util.atomic_write"),
        (VQ, "model.params.embed_dmi", 4),
        (VQ, "model.params.embed_dim", "four"),
        (VQ, "model.params.embed_dim", 4.5),
        (VQ, "model.params.lossconfig.taregt", "x"),
        (VQ, "model.params.ddconfig", {"target": "ldm.data.world.World3D", "params": {"no_option": 1}}),
        (VQ, "lightning.trainer.max_step", 3),
        (VQ, "lightning.trainer.accumulate_grad_batches", 0),
        (VQ, "lightning.trainer.gradient_clip_algorithm", "nrom"),
        (VQ, "lightning.logger", "tensorbord"),
        (VQ, "lightning.callbacks.mine", {"target": "ldm.data.world.World3D"}),
        (VQ, "lightning.callbacks.mine", {"target": "torch.nn.Identity", "parms": {}}),
        (WORLD, "data.params.train.params.splt", "train"),
        (WORLD, "data.params.train.target", "ldm.models.judge.AttributeJudge"),
        (RECIPE, "sed", 1),
        (RECIPE, "seed", "one"),
        (RECIPE, "score.processes", 0),
    ],
)
def test_slips_are_found_at_their_key(path: str, key: str, value: Any) -> None:
    assert problems(read(ROOT / "configs" / path), SCHEMA) == []
    found = problems(changed(path, key, value), SCHEMA)
    assert found and all(each.startswith((f".{key}", f".{key.rpartition('.')[0]}.")) for each in found), found


@pytest.mark.parametrize(
    ("annotation", "accepted", "refused"),
    [
        ("int", [1, "${data:image_size}"], ["1x", 1.5, None, []]),
        ("int | None", [1, None], [1.5, "x"]),
        ("PositiveInt", [1, 2, "${x}"], [0, -1, 1.5, True]),
        ("Fraction | None", [0, 0.5, 1, None], [1.5, -0.1]),
        ("PositiveFloat", [1e-9], [0, -1]),
        ("bool", [True, False, 1, 0], ["maybe", None]),
        ("str", ["x", 1], [None, {}]),
        ("Literal['l1', 'l2']", ["l1", "${x}"], ["l3", None]),
        ("Literal['l1', 3] | Sequence[float | None] | None", ["l1", 3, [1.0], None], ["l2", 4, {}]),
        ("Mapping[str, Any] | None", [{}, None, 3], []),
        ("Callable[[int], str]", [3, "x"], []),
    ],
)
def test_values_of_annotations(annotation: str, accepted: list, refused: list) -> None:
    schema = value_schema(annotation)
    assert [value for value in accepted if problems(value, schema)] == []
    assert [value for value in refused if not problems(value, schema)] == []


def test_the_stored_file_is_what_the_flag_prints() -> None:
    """Generated without torch."""
    code = "import sys, main; main.main(['--schema']); sys.exit(bool({'torch', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == STORED.read_text(), "run: python main.py --schema > configs/schema.json"
