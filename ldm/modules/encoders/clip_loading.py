"""Search and loading of CLIPs by name or from a folder, without network access unless it is allowed.

A CLIP is named in one of these ways:

* an OpenAI name (``ViT-L/14``, ``RN50``): the ``-quickgelu`` architecture of open_clip with weights tagged ``openai``;
* an open_clip name (``ViT-B-32``), optionally with a tag (``ViT-B-32:laion2b_s34b_b79k``);
* a folder with ``open_clip_config.json`` and weights, in the format of open_clip's ``local-dir:`` schema, as written by
  :class:`ldm.models.clip.AttributeCLIP`;
* ``hf-hub:owner/model``, if that repository is in the Hugging Face cache.

The weights of a *named* model are searched in this order: the path ``weights``, the environment variable
``OPEN_CLIP_WEIGHTS`` (both: a file, or a folder that contains it), open_clip's cache ``~/.cache/clip``, the Hugging
Face cache. Only ``allow_download=True`` downloads them.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import os
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ldm.errors import reason_of
from ldm.modules.encoders.tokenizer import WORDS_FILE, WordTokenizer
from ldm.modules.weights import first_file, read_state_dict
from ldm.util import UserError

logger = logging.getLogger(__name__)

WEIGHTS_VARIABLE = "OPEN_CLIP_WEIGHTS"
CONFIG_FILE = "open_clip_config.json"
WEIGHT_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "model.safetensors")
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")
OPENAI_CACHE = "~/.cache/clip"  # cache of OpenAI's package and of open_clip

_OPENAI_CONSTANTS = ("input_resolution", "context_length", "vocab_size", "attn_mask")  # beside the weights
_OPENAI_NAMES = {
    name: name.replace("/", "-").replace("@336px", "-336") + "-quickgelu"
    for name in ("RN50", "RN101", "RN50x4", "RN50x16", "RN50x64", "ViT-B/32", "ViT-B/16", "ViT-L/14", "ViT-L/14@336px")
}


@dataclass(frozen=True)
class ClipSource:
    """Local files of a CLIP."""

    name: str  # name given by the user, for messages
    architecture: str | None  # open_clip model name, or None if the config of the folder describes the model
    model_cfg: dict[str, Any]  # open_clip model config (embed_dim, vision_cfg, text_cfg, ...)
    preprocess_cfg: dict[str, Any]  # at least ``mean`` and ``std``, three numbers each, for images in [0, 1]
    weights: Path | None  # weight file; None if it is missing
    folder: Path | None  # folder of a local model, which may contain ``words.json`` or tokenizer files; else None
    missing: str | None = None  # error message without weights


def import_open_clip() -> ModuleType:
    """Import ``open_clip`` on first use, because the import takes seconds."""
    try:
        import open_clip
    except ImportError as error:
        raise UserError(f"CLIP: cannot import open_clip ({error}). Run: pip install open_clip_torch.") from error
    return open_clip


def parse_name(name: str) -> tuple[str, str | None]:
    """Split a model name into open_clip's architecture name and weight tag, None without tag.

    >>> parse_name("ViT-L/14")
    ('ViT-L-14-quickgelu', 'openai')
    >>> parse_name("ViT-B-32:laion2b_s34b_b79k")
    ('ViT-B-32', 'laion2b_s34b_b79k')
    """
    if name in _OPENAI_NAMES:
        return _OPENAI_NAMES[name], "openai"
    architecture, _, tag = name.partition(":")
    return architecture.replace("/", "-"), tag or None


def find_clip(
    name: str, weights: str | os.PathLike | None = None, allow_download: bool = False, is_optional: bool = False
) -> ClipSource:
    """Resolve a model name or folder to local files.

    Args:
        name: see the module docstring.
        weights: optional weight file, or folder that contains it.
        allow_download: download missing weights of a named model with open_clip.
        is_optional: accept a model without weights, unless ``weights`` states where they are.

    Raises:
        UserError: the name is unknown, or files are missing; the message lists the searched files.
    """
    folder = _model_folder(name)
    if folder is None:
        source = _named_source(name, weights, allow_download)
    else:
        source = _folder_source(name, folder, weights, allow_download)
    if source.missing and not (is_optional and weights is None):
        raise UserError(source.missing)
    return source


def _model_folder(name: str) -> Path | None:
    """Return the folder of a local or cached model, or None for the name of a published model."""
    if name.startswith("hf-hub:"):
        config = hub_file(name.removeprefix("hf-hub:"), CONFIG_FILE)
        if not config.is_file():
            raise UserError(
                f"{name}: not in the Hugging Face cache, expected {config}. Download the repository, or use a folder "
                f"with {CONFIG_FILE}."
            )
        return config.parent
    path = Path(name.removeprefix("local-dir:")).expanduser()
    if path.is_dir():
        return path
    if name.startswith(("local-dir:", "/", "./", "../", "~")):
        raise UserError(
            f"the CLIP folder {path} does not exist; expected a folder with {CONFIG_FILE} and {WEIGHT_FILES[0]}. Train "
            "a CLIP with configs/quickstart/clip.yaml and use <run>/clip."
        )
    return None


def _folder_source(name: str, folder: Path, weights: str | os.PathLike | None, allow_download: bool) -> ClipSource:
    config = read_config(folder / CONFIG_FILE)
    if "model_cfg" not in config:
        raise UserError(f"{folder / CONFIG_FILE}: expected a 'model_cfg' section, got none. Copy the file again.")
    if not allow_download:
        _refuse_network_parts(name, config["model_cfg"], ("hf_model_name",))
    found, missing = search_weights(name, [weights or folder], WEIGHT_FILES)
    preprocess = _preprocess(config.get("preprocess_cfg"))
    return ClipSource(name, None, config["model_cfg"], preprocess, found, folder, missing)


def read_config(path: Path) -> dict[str, Any]:
    """Return the content of the config file of a CLIP."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise UserError(f"{path}: expected the config of a CLIP, but it is missing. Copy the file there.") from error
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: not valid JSON ({error}). Copy the file again.") from error


def search_weights(
    name: str, places: Sequence[str | os.PathLike], file_names: Sequence[str], others: str = ""
) -> tuple[Path | None, str | None]:
    """Return the first existing weight file, see ``first_file``, or None and an error message that ends in ``others``.

    In a folder without any of ``file_names``, its only weight file is taken.
    """
    searched: list[Path] = []
    for place in places:
        found, candidates = first_file([place], file_names)
        files = [file for file in Path(place).expanduser().glob("*") if file.suffix in WEIGHT_SUFFIXES]
        if found or len(files) == 1:
            return found or files[0], None
        searched += candidates
    paths = ", ".join(map(str, searched)) or "a file, but open_clip publishes none"
    advice = f"Put the file there, or set the parameter 'weights' to the file or its folder{others}."
    return None, f"CLIP {name!r}: the weights are missing on this machine; expected {paths}. {advice}"


def _named_source(name: str, weights: str | os.PathLike | None, allow_download: bool) -> ClipSource:
    open_clip = import_open_clip()
    architecture, tag = parse_name(name)
    model_cfg = open_clip.get_model_config(architecture)
    if model_cfg is None:
        raise UserError(
            f"{name!r}: expected a folder, an OpenAI name ({', '.join(_OPENAI_NAMES)}) or a model of open_clip "
            f"{open_clip.__version__}. List those with: python -c 'import open_clip; print(open_clip.list_models())'."
        )
    if tag is None and open_clip.is_pretrained_cfg(architecture, "openai"):
        tag = "openai"
    published = open_clip.get_pretrained_cfg(architecture, tag) if tag else {}
    if tag and not published and weights is None:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(architecture)) or "none"
        raise UserError(f"{name!r}: expected a tag of {architecture} in open_clip ({tags}), got {tag!r}.")
    if not allow_download:
        _refuse_network_parts(name, model_cfg, ("hf_model_name", "hf_tokenizer_name"))
    files = [published.get("url", "").rpartition("/")[2], *(f"{architecture}{suffix}" for suffix in WEIGHT_SUFFIXES)]
    files += [*(f"{architecture}/{file}" for file in WEIGHT_FILES), *WEIGHT_FILES]
    given = [os.environ[WEIGHTS_VARIABLE]] if os.environ.get(WEIGHTS_VARIABLE) else []
    places = [weights] if weights else given + _cached_files(published)  # a wrong path is not replaced by another file
    others = f", or the environment variable {WEIGHTS_VARIABLE}. With network access, allow_download: true downloads it"
    found, missing = search_weights(name, places, [*filter(None, files)], others)
    if found is None and not weights and allow_download and published:
        logger.info("downloading the weights of %s", name)
        found, missing = Path(open_clip.download_pretrained(published)), None
    if found is not None and (found.parent / CONFIG_FILE).is_file():  # a folder may define mean and std of its weights
        published = read_config(found.parent / CONFIG_FILE).get("preprocess_cfg")
    return ClipSource(name, architecture, model_cfg, _preprocess(published), found, None, missing)


def _refuse_network_parts(name: str, model_cfg: dict[str, Any], keys: tuple[str, ...]) -> None:
    """Refuse text towers and tokenizers that open_clip downloads from the Hugging Face hub at construction."""
    for key in keys:
        if model_cfg.get("text_cfg", {}).get(key):
            raise UserError(
                f"{name}: {key} {model_cfg['text_cfg'][key]!r} is loaded from the Hugging Face hub. Set "
                "allow_download: true to allow it, or choose another CLIP."
            )


def _cached_files(published: dict[str, Any]) -> list[Path]:
    """Return the paths of the weights in the caches of open_clip and the Hugging Face hub."""
    paths = []
    if published.get("url"):
        paths.append(Path(OPENAI_CACHE).expanduser() / published["url"].rpartition("/")[2])
    if published.get("hf_hub"):
        repository, file = os.path.split(published["hf_hub"])
        paths += [hub_file(repository, candidate) for candidate in ([file] if file else WEIGHT_FILES[:2])]
    return paths


def hub_file(repository: str, file: str) -> Path:
    """Return the path of a file in the Hugging Face cache; if it is missing, the path for the error message."""
    from huggingface_hub import constants, try_to_load_from_cache

    found = try_to_load_from_cache(repository, file, cache_dir=constants.HF_HUB_CACHE)
    if isinstance(found, str):
        return Path(found)
    return Path(constants.HF_HUB_CACHE, f"models--{repository.replace('/', '--')}", "snapshots", "<commit>", file)


def _preprocess(stated: dict[str, Any] | None) -> dict[str, Any]:
    """Return the stated mean and std, or those of OpenAI by default."""
    open_clip = import_open_clip()
    defaults = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
    return {**defaults, **{key: value for key, value in (stated or {}).items() if value is not None}}


def build_clip(model_cfg: dict[str, Any]) -> nn.Module:
    """Build a CLIP with random weights from a model config of open_clip (embed_dim, vision_cfg, text_cfg, ...)."""
    open_clip = import_open_clip()
    config = copy.deepcopy(model_cfg)
    if "hf_model_name" in config["text_cfg"]:
        config["text_cfg"]["hf_model_pretrained"] = False
    custom = config.pop("custom_text", False) or "hf_model_name" in config["text_cfg"]
    if "multimodal_cfg" in config:
        return open_clip.CoCa(**config)
    return (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**config)


def load_clip(source: ClipSource) -> nn.Module:
    """Build a CLIP and load its weights: float32, on the CPU, in evaluation mode, without gradients.

    Files are read as safetensors or with ``weights_only``; no code in them is run.

    Raises:
        UserError: the file is damaged or contains another architecture.
    """
    model = build_clip(source.model_cfg)
    with report_damage(source):
        own = model.state_dict()
        state = read_weights(source.weights, own) if source.weights.suffix in WEIGHT_SUFFIXES else {}
        if {key: value.shape for key, value in state.items()} == {key: value.shape for key, value in own.items()}:
            model.load_state_dict(state)
        else:  # other layouts, which open_clip converts
            import_open_clip().load_checkpoint(model, str(source.weights), weights_only=True)
    return model.float().eval().requires_grad_(False)


def read_weights(path: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """Return the tensors of a weight file; see ``read_state_dict``."""
    if not _is_torchscript(path):
        return read_state_dict(path, names)
    state = torch.jit.load(str(path), map_location="cpu").state_dict()
    return {key: value for key, value in state.items() if key not in _OPENAI_CONSTANTS}


@contextlib.contextmanager
def report_damage(source: ClipSource) -> Iterator[None]:
    """Raise a ``UserError`` if the weights of a CLIP cannot be read or do not fit."""
    try:
        yield
    except Exception as error:  # safetensors, pickle, zip and torch raise different errors for a bad file
        raise UserError(
            f"{source.weights}: expected weights of the CLIP {source.name!r} "
            f"({source.architecture or 'described by its folder'}), got {type(error).__name__}: {reason_of(error)}. "
            "The file is damaged or belongs to another model; copy the right one."
        ) from error


def _is_torchscript(path: Path) -> bool:
    """Return whether a file is a TorchScript archive, as published by OpenAI and refused by ``weights_only``."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in member for member in archive.namelist())


def load_tokenizer(source: ClipSource) -> Any:
    """Return the tokenizer of a CLIP: the ``words.json`` of its folder, else open_clip's tokenizer.

    It is called with (texts: list[str], context_length: int) and returns (N, context_length) int64.
    """
    if source.folder is not None and (source.folder / WORDS_FILE).is_file():
        return WordTokenizer.load(source.folder / WORDS_FILE)
    return import_open_clip().get_tokenizer(source.architecture or f"local-dir:{source.folder}")


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the files of a tokenizer from one folder of a CLIP to another: all files but config and weights."""
    for path in source.iterdir():
        if path.is_file() and path.name != CONFIG_FILE and path.suffix not in WEIGHT_SUFFIXES:
            shutil.copy2(path, target / path.name)
