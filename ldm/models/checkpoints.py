"""Reading weights: only tensors and plain containers are unpickled, and what did not fit is said."""

from __future__ import annotations

import logging
import pickle
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.util import UserError

logger = logging.getLogger(__name__)


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a Lightning checkpoint, a bare state dict or a safetensors file, on the CPU.

    Raises:
        UserError: the file is missing, damaged, or wants to run code when it is opened.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}: train that stage first, or set the right ckpt_path")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as err:
        raise UserError(
            f"{path} cannot be read as weights. It is damaged, or holds objects that would run code when opened, which "
            f"is refused. Save it again as a state dict of tensors, or use another checkpoint. Detail: {_first(err)}"
        ) from err
    except (RuntimeError, EOFError, ValueError, zipfile.BadZipFile, OSError) as err:
        siblings = ", ".join(sorted(p.name for p in path.parent.glob("*.ckpt") if p != path)) or "none"
        raise UserError(
            f"{path} is damaged or cut short ({_first(err)}). Other checkpoints beside it: {siblings}"
        ) from err
    state = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} holds no state dict: expected a Lightning checkpoint or a mapping of names to tensors")
    return dict(state)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as err:
        raise UserError(f"{path} is damaged or cut short ({_first(err)})") from err


def _first(err: BaseException) -> str:
    return (str(err).splitlines() or [type(err).__name__])[0]


def strip_prefix(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries that start with ``prefix``, without it."""
    return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}


def load_into(
    module: nn.Module,
    path: str | Path,
    ignore_keys: Sequence[str] = (),
    transform: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] | None = None,
) -> None:
    """Load a checkpoint into ``module``; missing and unexpected keys are logged, wrong shapes are an error.

    Args:
        module: where to.
        path: checkpoint file.
        ignore_keys: prefixes of keys not to load.
        transform: maps the file's state dict onto the module's names.

    Raises:
        UserError: the file cannot be read, shapes differ, or nothing in it fits.
    """
    state = read_state_dict(path)
    state = dict(transform(state) if transform else state)
    state = {key: value for key, value in state.items() if not key.startswith(tuple(ignore_keys))}
    own = module.state_dict()
    wrong = [key for key, value in state.items() if key in own and own[key].shape != value.shape]
    if wrong:
        listed = "; ".join(f"{k}: found {tuple(state[k].shape)}, wanted {tuple(own[k].shape)}" for k in wrong[:3])
        raise UserError(
            f"{path}: {len(wrong)} weights have another shape than the config asks for ({listed}). Use the config the "
            "checkpoint was trained with, or name the keys in ignore_keys"
        )
    if not own.keys() & state.keys():
        raise UserError(
            f"{path}: none of its {len(state)} weights (such as {', '.join(list(state)[:3])}) belongs to "
            f"{type(module).__name__} (such as {', '.join(list(own)[:3])}): it is a checkpoint of another model"
        )
    missing, unexpected = module.load_state_dict(state, strict=False)
    logger.info("loaded %s: %d weights, %d missing, %d unexpected", path, len(state), len(missing), len(unexpected))
    for name, keys in (("missing", missing), ("unexpected", unexpected)):
        if keys:
            logger.warning("%s: %d %s keys, such as %s", path, len(keys), name, ", ".join(keys[:5]))
