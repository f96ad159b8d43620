"""A user's own images in a recipe: the file of ``data=FILE``, and the config of the data sets that all stages share.

The file contains options of the data set (``path``, ``attributes``, ``image_size``, ...) and the keys ``SETTINGS``, see
docs/methods.md. Paths are relative to the working directory, else to the file.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.config.data_sections import OF_TRAINING
from ldm.config.loading import Config, load_config
from ldm.config.signatures import Signature, find_signature
from ldm.config.validation import check_keys
from ldm.legacy import resolve_target
from ldm.util import ConfigError, UserError, did_you_mean, instantiate_from_config

logger = logging.getLogger(__name__)

SETTINGS = ("target", "first_stage", "stages")
FOLDER = "ldm.data.formats.folder.ImageFolder"
SMALL_SIDE = 32  # pixels; below it an autoencoder costs more than it saves
EPOCH = 10_000  # images; smaller data sets are repeated, because the start of an epoch takes time
_SIDE_UNIT = 8  # pixels: patches of 4, halved once by the U-Nets
_SPLITS = {"train": "train", "validation": "validation", "test": "evaluation"}


@dataclass(frozen=True)
class OwnData:
    """Contents of a user's file."""

    file: str
    sections: dict[str, Any]  # the config with the data sets of all stages
    first_stage: str  # vq or pixels
    overrides: dict[str, list[str]]  # stage -> a.b=c words
    has_factors: bool  # whether the attributes are factors that metrics can be computed on


def read_own_data(file: str) -> OwnData:
    """Read and check a user's file; the training images are opened.

    Raises:
        ConfigError: a key is unknown or a value is not valid.
        UserError: the file, the images or the table are missing or malformed.
    """
    from ldm.data.describe import describe  # imports torch
    from ldm.data.traits import position_space_of, vocabulary_of

    config = load_config([file], kind="file of own data")
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
    others = {key: value for key, value in params.items() if key not in OF_TRAINING}
    train = {"target": content["target"], "params": {**params, "split": "train"}}
    try:
        images = instantiate_from_config(train)
        whole = instantiate_from_config({**train, "params": {**others, "split": "test"}})
        side, count = (describe(images, key) for key in ("image_size", "num_images"))
    except (ConfigError, UserError) as error:
        kind = UserError if isinstance(error, UserError) else ConfigError
        raise kind(f"{config.files[0]}: {error}") from error
    chosen = content.get("first_stage") or ("pixels" if side < SMALL_SIDE else "vq")
    if chosen not in ("vq", "pixels"):
        hint = did_you_mean(chosen, ("vq", "pixels"))
        raise config.error("first_stage", f"expected vq or pixels, got {chosen!r}.{hint}")
    if side % _SIDE_UNIT:
        raise config.error("image_size", f"expected a multiple of {_SIDE_UNIT}, got {side}")
    if count < EPOCH and "repeat" in signature.required:
        train["params"].setdefault("repeat", -(-EPOCH // count))
    vocabulary = vocabulary_of(images)
    columns = zip(vocabulary.factor_names, vocabulary.words) if vocabulary is not None else ()
    for name in (name for name, words in columns if len(words) == 1):
        logger.warning("%s: %s is the same for all images, so nothing is learned about it", config.files[0], name)
    space = position_space_of(whole)
    parts = {part: {**train, "params": {**others, "split": split}} for part, split in _SPLITS.items()}
    module = {"batch_size": 32, **parts, "train": train}
    paths = [params[name] for name in params if "Path" in signature.annotations.get(name, "")]
    files = fingerprint([images, whole], paths)
    return OwnData(
        config.files[0],
        {"data": {"target": "ldm.data.module.DataModuleFromConfig", "params": module, "fingerprint": files}},
        chosen,
        _overrides(config),
        space is not None and space.size == len(whole),
    )


def fingerprint(datasets: Sequence[Any], paths: Sequence[Any]) -> str:
    """Return 16 hex digits that change with the files of data sets: content of tables, size and time of others.

    Args:
        datasets: data sets, whose images may be files of their own.
        paths: values of the options that name files or folders, or lists of these; tables may be in a folder.
    """
    from ldm.data.dataset import FactorDataset, ImageDataset

    listed = [path for given in paths for path in (given if isinstance(given, list) else [given]) if path]
    named = [Path(path).expanduser() for path in listed]
    files = {beside for path in named for beside in (path, path / "data.mdb", *(other / path for other in named))}
    for images in datasets:
        if isinstance(images, ImageDataset) and not isinstance(images, FactorDataset):
            files |= {Path(images.row_name(row)) for row in set(images.rows.tolist())}
    digest = hashlib.sha256()
    for file in sorted(file for file in files if file.is_file()):
        is_table, status = file.suffix in (".csv", ".json"), file.stat()
        digest.update(repr((str(file), file.read_bytes() if is_table else (status.st_size, status.st_mtime))).encode())
    return digest.hexdigest()[:16]


def _find(given: Any, folder: Path) -> Any:
    """Return a path (or list) relative to the working directory, else to the user's file, if it exists there."""
    if isinstance(given, list):
        return [_find(path, folder) for path in given]
    beside = folder / str(given)
    is_beside = given is not None and not Path(given).expanduser().exists() and beside.exists()
    return str(beside) if is_beside else given


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
