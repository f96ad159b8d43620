"""Find and load a CLIP from the disk, by name or from a folder, without ever asking the network unbidden.

A CLIP is named in one of these ways:

* an OpenAI name (``ViT-L/14``, ``RN50``): open_clip's ``-quickgelu`` model, which is what OpenAI trained, with the
  weights tagged ``openai``;
* an open_clip name (``ViT-B-32``), optionally with a tag (``ViT-B-32:laion2b_s34b_b79k``);
* a folder with ``open_clip_config.json`` and weights, as open_clip's ``local-dir:`` schema reads it, and as
  :class:`ldm.models.clip.WorldCLIP` writes it;
* ``hf-hub:owner/model``, when that repository lies in the Hugging Face cache.

Weights of a *named* model are taken from the first of: the explicit ``weights`` path, the environment variable
``OPEN_CLIP_WEIGHTS`` (both: a file, or a folder with the file), open_clip's cache ``~/.cache/clip``, the Hugging
Face cache. Only ``allow_download=True`` may fetch them.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ldm.modules.encoders.tokenizer import WORDS_FILE, WordTokenizer
from ldm.util import UserError

_log = logging.getLogger(__name__)

WEIGHTS_VARIABLE = "OPEN_CLIP_WEIGHTS"
CONFIG_FILE = "open_clip_config.json"
WEIGHT_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "model.safetensors")
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")
OPENAI_CACHE = "~/.cache/clip"  # where both OpenAI's package and open_clip keep downloaded files

_OPENAI_NAMES = {
    name: name.replace("/", "-").replace("@336px", "-336") + "-quickgelu"
    for name in ("RN50", "RN101", "RN50x4", "RN50x16", "RN50x64", "ViT-B/32", "ViT-B/16", "ViT-L/14", "ViT-L/14@336px")
}


@dataclass(frozen=True)
class ClipSource:
    """Where one CLIP comes from; all of it on this disk.

    Attributes:
        name: as the user wrote it (for messages).
        architecture: open_clip model name, or None when the folder's own config describes the model.
        model_cfg: open_clip model config (embed_dim, vision_cfg, text_cfg, ...).
        preprocess_cfg: at least ``mean`` and ``std``, three numbers each, for images in [0, 1].
        weights: the file with the weights.
        folder: folder of a local model (may hold ``words.json`` or tokenizer files), else None.
    """

    name: str
    architecture: str | None
    model_cfg: dict[str, Any]
    preprocess_cfg: dict[str, Any]
    weights: Path
    folder: Path | None


def import_open_clip() -> ModuleType:
    """The ``open_clip`` package, imported only when a CLIP is really wanted (it takes seconds)."""
    try:
        import open_clip
    except ImportError as err:
        raise UserError(
            "CLIP needs the package open_clip, which cannot be imported here "
            f"({err}); install it with: pip install open_clip_torch"
        ) from err
    return open_clip


def parse_name(name: str) -> tuple[str, str | None]:
    """Split a model name into open_clip's architecture name and weight tag (None: not said).

    >>> parse_name("ViT-L/14")
    ('ViT-L-14-quickgelu', 'openai')
    >>> parse_name("ViT-B-32:laion2b_s34b_b79k")
    ('ViT-B-32', 'laion2b_s34b_b79k')
    """
    if name in _OPENAI_NAMES:
        return _OPENAI_NAMES[name], "openai"
    architecture, _, tag = name.partition(":")
    return architecture.replace("/", "-"), tag or None


def find_clip(name: str, weights: str | os.PathLike | None = None, allow_download: bool = False) -> ClipSource:
    """Resolve a model name or folder to files on the disk.

    Args:
        name: see the module's text.
        weights: optional weight file, or folder holding it.
        allow_download: fetch missing weights of a named model with open_clip's own downloader.

    Raises:
        UserError: unknown name, or files missing; the message lists the exact files that were looked for.
    """
    folder = _model_folder(name)
    if folder is not None:
        return _folder_source(name, folder, weights, allow_download)
    return _named_source(name, weights, allow_download)


def _model_folder(name: str) -> Path | None:
    """The folder a name stands for, or None for the name of a published model."""
    if name.startswith("hf-hub:"):
        from huggingface_hub import try_to_load_from_cache

        repository = name.removeprefix("hf-hub:")
        found = try_to_load_from_cache(repository, CONFIG_FILE, cache_dir=_hugging_face_cache())
        if not isinstance(found, str):
            raise UserError(
                f"{name} is not in the Hugging Face cache ({_hugging_face_cache()}): no {CONFIG_FILE} of it there; "
                "download the repository on a machine with a network and give its folder instead"
            )
        return Path(found).parent
    path = Path(name.removeprefix("local-dir:")).expanduser()
    if path.is_dir():
        return path
    if name.startswith(("local-dir:", "/", "./", "../", "~")):
        raise UserError(
            f"the CLIP folder {path} does not exist; expected a folder with {CONFIG_FILE} and {WEIGHT_FILES[0]} "
            "(train one with configs/quickstart/clip.yaml: it is <run>/clip)"
        )
    return None


def _folder_source(name: str, folder: Path, weights: str | os.PathLike | None, allow_download: bool) -> ClipSource:
    config = _read_config(folder)
    if "model_cfg" not in config:
        raise UserError(f"{folder / CONFIG_FILE} has no 'model_cfg' section, so it describes no CLIP")
    if not allow_download:
        _refuse_network_parts(name, config["model_cfg"], ("hf_model_name",))
    place = Path(weights).expanduser() if weights is not None else folder
    found = place if place.is_file() else _weight_file_in(place, WEIGHT_FILES)
    if found is None:
        looked_for = ", ".join(str(place / file) for file in WEIGHT_FILES)
        raise UserError(f"no weights for the CLIP in {folder}: looked for {looked_for}; put the file there")
    return ClipSource(name, None, config["model_cfg"], _preprocess(config.get("preprocess_cfg")), found, folder)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as err:
        raise UserError(f"the folder {folder} is no CLIP: {path} is missing") from err
    except ValueError as err:
        raise UserError(f"{path} is not valid JSON: {err}") from err


def _named_source(name: str, weights: str | os.PathLike | None, allow_download: bool) -> ClipSource:
    open_clip = import_open_clip()
    architecture, tag = parse_name(name)
    model_cfg = open_clip.get_model_config(architecture)
    if model_cfg is None:
        raise UserError(
            f"{name!r} is neither a folder nor a CLIP that open_clip {open_clip.__version__} knows; OpenAI names: "
            f"{', '.join(_OPENAI_NAMES)}; open_clip names: python -c 'import open_clip; print(open_clip.list_models())'"
        )
    if tag is None and open_clip.is_pretrained_cfg(architecture, "openai"):
        tag = "openai"
    published = open_clip.get_pretrained_cfg(architecture, tag) if tag else {}
    if tag and not published and weights is None:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(architecture)) or "none"
        raise UserError(f"{name!r}: open_clip knows no weights tagged {tag!r} of {architecture}; known: {tags}")
    if not allow_download:
        _refuse_network_parts(name, model_cfg, ("hf_model_name", "hf_tokenizer_name"))
    found = _find_named_weights(name, architecture, published, weights, allow_download)
    beside = found.parent / CONFIG_FILE  # a folder's own mean and std go with its weights
    preprocess = _read_config(found.parent).get("preprocess_cfg") if beside.is_file() else published
    return ClipSource(name, architecture, model_cfg, _preprocess(preprocess), found, None)


def _refuse_network_parts(name: str, model_cfg: dict[str, Any], keys: tuple[str, ...]) -> None:
    """Text towers and tokenizers named after the Hugging Face hub are fetched there by their constructors."""
    for key in keys:
        if model_cfg.get("text_cfg", {}).get(key):
            raise UserError(
                f"{name} takes its {key} {model_cfg['text_cfg'][key]!r} from the Hugging Face hub; set "
                "allow_download: true to let it ask there, or choose a CLIP with a text tower of its own"
            )


def _find_named_weights(
    name: str, architecture: str, published: dict[str, Any], weights: str | os.PathLike | None, allow_download: bool
) -> Path:
    file_names = _published_file_names(architecture, published)
    looked_for: list[Path] = []
    for place in (weights, os.environ.get(WEIGHTS_VARIABLE)):
        if not place:
            continue
        path = Path(place).expanduser()
        found = path if path.is_file() else _weight_file_in(path, file_names)
        if found is not None:
            return found
        looked_for += [path / file for file in file_names] if path.is_dir() else [path]
        if place is weights:  # an explicit path that is wrong must not be replaced by something else
            raise _missing_weights(name, looked_for)
    for path in _cached_files(published):
        if path.is_file():
            return path
        looked_for.append(path)
    if allow_download and published:
        _log.info("downloading the weights of %s, as allow_download says", name)
        return Path(import_open_clip().download_pretrained(published))
    raise _missing_weights(name, looked_for)


def _published_file_names(architecture: str, published: dict[str, Any]) -> tuple[str, ...]:
    """File names under which the weights may lie in a folder of the user's, the likeliest first."""
    own = [f"{architecture}{suffix}" for suffix in WEIGHT_SUFFIXES]
    own += [f"{architecture}/{file}" for file in WEIGHT_FILES]
    url = published.get("url", "").rpartition("/")[2]
    return tuple(dict.fromkeys(([url] if url else []) + own + list(WEIGHT_FILES)))


def _weight_file_in(folder: Path, file_names: tuple[str, ...]) -> Path | None:
    """The first of ``file_names`` in ``folder``, else its only weight file, else None."""
    for file in file_names:
        if (folder / file).is_file():
            return folder / file
    others = [path for path in folder.glob("*") if path.suffix in WEIGHT_SUFFIXES] if folder.is_dir() else []
    return others[0] if len(others) == 1 else None


def _cached_files(published: dict[str, Any]) -> list[Path]:
    """Where open_clip and the Hugging Face hub would have left these weights."""
    paths = []
    if published.get("url"):
        paths.append(Path(OPENAI_CACHE).expanduser() / published["url"].rpartition("/")[2])
    if published.get("hf_hub"):
        repository, file = os.path.split(published["hf_hub"])
        for candidate in [file] if file else WEIGHT_FILES[:2]:
            paths.append(_hub_file(repository, candidate))
    return paths


def _hub_file(repository: str, file: str) -> Path:
    """The cached file, or (for the message) the place where it would be."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, file, cache_dir=_hugging_face_cache())
    if isinstance(found, str):
        return Path(found)
    return _hugging_face_cache() / f"models--{repository.replace('/', '--')}" / "snapshots" / "<commit>" / file


def _hugging_face_cache() -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def _missing_weights(name: str, looked_for: list[Path]) -> UserError:
    places = "\n  ".join(map(str, looked_for)) or "(no file is published for it)"
    return UserError(
        f"no weights for CLIP {name!r} on this machine; looked for\n  {places}\n"
        f"Put the file at one of these places, or name it: the parameter 'weights' or the environment variable "
        f"{WEIGHTS_VARIABLE} (a file, or a folder holding it). With a network, allow_download: true fetches it."
    )


def _preprocess(stated: dict[str, Any] | None) -> dict[str, Any]:
    """The stated mean and std, or those of OpenAI where a config says nothing."""
    open_clip = import_open_clip()
    defaults = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
    return {**defaults, **{key: value for key, value in (stated or {}).items() if value is not None}}


def build_clip(model_cfg: dict[str, Any]) -> nn.Module:
    """A CLIP of open_clip's classes with random weights.

    Args:
        model_cfg: embed_dim, vision_cfg, text_cfg and the optional keys of an open_clip model config.
    """
    open_clip = import_open_clip()
    config = copy.deepcopy(model_cfg)
    if "hf_model_name" in config["text_cfg"]:
        config["text_cfg"]["hf_model_pretrained"] = False
    custom = config.pop("custom_text", False) or "hf_model_name" in config["text_cfg"]
    if "multimodal_cfg" in config:
        return open_clip.CoCa(**config)
    return (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**config)


def load_clip(source: ClipSource) -> nn.Module:
    """Build the model and fill it with its weights (float32, on the CPU, in eval mode).

    Files are read as safetensors or with ``weights_only``; nothing in them is executed.

    Raises:
        UserError: the file is damaged, or holds another architecture.
    """
    model = build_clip(source.model_cfg)
    try:
        if _is_torchscript(source.weights):
            model.load_state_dict(_read_torchscript(source.weights))
        else:
            import_open_clip().load_checkpoint(model, str(source.weights), weights_only=True)
    except Exception as err:  # safetensors, pickle, zip and torch each have errors of their own for a bad file
        reason = " ".join(str(err).split("\n")[:2])
        raise UserError(
            f"{source.weights} does not load as the CLIP {source.name!r} "
            f"({source.architecture or 'described by its folder'}): {type(err).__name__}: {reason}; "
            "the file is damaged or belongs to another model"
        ) from err
    return model.float().eval().requires_grad_(False)


def _is_torchscript(path: Path) -> bool:
    """OpenAI publishes TorchScript archives, which ``weights_only`` loading refuses."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in member for member in archive.namelist())


def _read_torchscript(path: Path) -> dict[str, Tensor]:
    """Weights of a TorchScript archive; the entries left out are numbers about the model and a constant mask."""
    state = torch.jit.load(str(path), map_location="cpu").state_dict()
    constants = ("input_resolution", "context_length", "vocab_size", "attn_mask")
    return {key: value for key, value in state.items() if key not in constants}


def load_tokenizer(source: ClipSource) -> Any:
    """The tokenizer that belongs to a CLIP: its folder's ``words.json``, else open_clip's own for it.

    Returns:
        A callable ``(texts: list[str], context_length: int) -> int64 (N, context_length)``.
    """
    if source.folder is None:
        return import_open_clip().get_tokenizer(source.architecture)
    words = source.folder / WORDS_FILE
    if words.is_file():
        return WordTokenizer.load(words)
    return import_open_clip().get_tokenizer(f"local-dir:{source.folder}")
