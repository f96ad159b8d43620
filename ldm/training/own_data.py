"""A user's own images in a recipe: the file of ``data=FILE``, and the config of the data set that all stages share.

The file contains options of the data set, and settings of the recipe (``SETTINGS``)::

    path: photos                     # options of the data set; relative to the working directory, else to this file
    attributes: photos/table.csv
    image_size: 32
    templates: {colour: "{} thing"}
    target: my_data.MyImages         # its class; by default ImageFolder
    first_stage: pixels              # vq or pixels; by default pixels below 32 pixels
    stages: {clip: {lightning: {trainer: {max_steps: 500}}}}    # changes to the configs of stages
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.config.data_sections import OF_TRAINING
from ldm.config.loading import Config, data_set, describe_data, load_config, save_config
from ldm.config.signatures import Signature, find_signature
from ldm.config.validation import check_keys
from ldm.legacy import resolve_target
from ldm.util import ConfigError, UserError, did_you_mean

SETTINGS = ("target", "first_stage", "stages")
FOLDER = "ldm.data.formats.folder.ImageFolder"
DATA_FILE = "data.yaml"
FIRST_STAGES = ("vq", "pixels")
SMALL_SIDE = 32  # pixels; below it an autoencoder costs more than it saves
EPOCH = 10_000  # images; smaller data sets are repeated, because the start of an epoch takes time
_SIDE_UNIT = 8  # pixels: patches of 4, halved once by the U-Nets
_SPLITS = {"train": "train", "validation": "validation", "test": "evaluation"}


@dataclass(frozen=True)
class OwnData:
    """Contents of a user's file.

    Attributes:
        file: its path.
        sections: the config with the data sets of all stages.
        first_stage: ``vq`` or ``pixels``.
        overrides: stage -> ``a.b=c`` words.
        has_factors: whether the attributes are factors that metrics can be computed on.
    """

    file: str
    sections: dict[str, Any]
    first_stage: str
    overrides: dict[str, list[str]]
    has_factors: bool

    def save(self, logdir: str) -> str:
        """Write the config of the data sets to ``<logdir>/data.yaml`` and return its path."""
        path = Path(logdir) / DATA_FILE
        save_config(path, self.sections, "Data of all stages, written by a recipe. Change the file of data= instead.")
        return str(path)


def read_own_data(file: str) -> OwnData:
    """Read and check a user's file; the training images are opened.

    Raises:
        ConfigError: a key is unknown or a value is not valid.
        UserError: the file, the images or the table are missing or malformed.
    """
    config = load_config([file])
    content = {"target": FOLDER, **config.content}
    if not isinstance(content["target"], str):
        raise config.error("target", f"expected the dotted path of a class, got {content['target']!r}")
    signature = find_signature(resolve_target(content["target"])) or Signature({}, is_open=True)
    if not signature.is_open:
        if "split" not in signature.required:
            raise config.error("target", f"expected a data set with the option split, got {content['target']}")
        options = [name for name in signature.required if name != "split"]  # given by the recipe
        check_keys(config, "", content, (*options, *SETTINGS))
    params = {key: value for key, value in content.items() if key not in SETTINGS}
    for name in params:
        if "Path" in signature.annotations.get(name, ""):
            params[name] = _find(params[name], Path(config.files[0]).parent)
    train = {"target": content["target"], "params": {**params, "split": "train"}}
    try:
        side, count = (describe_data({"params": {"train": train}}, key) for key in ("image_size", "num_images"))
        whole = data_set(json.dumps({**train, "params": {**params, "split": "test"}}, sort_keys=True))
    except (ConfigError, UserError) as error:
        kind = UserError if isinstance(error, UserError) else ConfigError
        raise kind(f"{config.files[0]}: {error}") from error
    if side % _SIDE_UNIT:
        raise config.error("image_size", f"expected a multiple of {_SIDE_UNIT}, got {side}")
    if count < EPOCH and "repeat" in signature.required:
        train["params"].setdefault("repeat", -(-EPOCH // count))
    others = {key: value for key, value in params.items() if key not in OF_TRAINING}
    parts = {part: {**train, "params": {**others, "split": split}} for part, split in _SPLITS.items()}
    module = {"batch_size": 32, **parts, "train": train}
    return OwnData(
        config.files[0],
        {"data": {"target": "ldm.data.module.DataModuleFromConfig", "params": module}},
        _first_stage(config, side),
        _overrides(config),
        _has_factors(whole),
    )


def _find(given: Any, folder: Path) -> Any:
    """Return a path (or list) relative to the working directory, else to the user's file, if it exists there."""
    if isinstance(given, list):
        return [_find(path, folder) for path in given]
    beside = folder / str(given)
    is_beside = given is not None and not Path(given).expanduser().exists() and beside.exists()
    return str(beside) if is_beside else given


def _first_stage(config: Config, side: int) -> str:
    chosen = config.content.get("first_stage") or ("pixels" if side < SMALL_SIDE else "vq")
    if chosen not in FIRST_STAGES:
        choices = " or ".join(FIRST_STAGES)
        raise config.error("first_stage", f"expected {choices}, got {chosen!r}.{did_you_mean(chosen, FIRST_STAGES)}")
    return chosen


def _has_factors(dataset: Any) -> bool:
    """Return whether the factors of the whole set make a full product, in whose order the images are."""
    from ldm.data.traits import position_space_of  # imports torch

    space = position_space_of(dataset)
    return space is not None and space.size == len(dataset)


def _overrides(config: Config) -> dict[str, list[str]]:
    stages = config.content.get("stages") or {}
    if not isinstance(stages, Mapping) or not all(isinstance(changes, Mapping) for changes in stages.values()):
        example = "{clip: {lightning: {trainer: {max_steps: 500}}}}"
        raise config.error("stages", f"expected changes to the configs of stages, such as {example}, got {stages!r}")
    return {name: list(_words(changes)) for name, changes in stages.items()}


def _words(changes: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield ``a.b=c`` for every value in nested mappings."""
    for key, value in changes.items():
        if isinstance(value, Mapping) and value:
            yield from _words(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}={json.dumps(value)}"  # JSON is YAML
