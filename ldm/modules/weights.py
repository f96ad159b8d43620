"""Reading the weights of a checkpoint file, and picking a denoising network's out of them."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.util import UserError

NETWORK_PREFIX = "model.diffusion_model."
EMA_PREFIX = "model_ema."


class _Inert:
    """Stands for a class a checkpoint names but no weight needs (a callback, a config): it does nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a Lightning checkpoint, a bare state dict or a safetensors file, on the CPU.

    Only tensors and plain containers are built; any other object in the file becomes an inert placeholder, so old
    Lightning checkpoints open and no code of theirs runs.

    Args:
        path: the file.

    Returns:
        Name -> tensor.

    Raises:
        UserError: the file is missing, damaged, or holds no tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}: train that stage first or correct the path.")
    try:
        content = _load_safetensors(path) if path.suffix == ".safetensors" else _load_pickled(path)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError, zipfile.BadZipFile) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"{path} is damaged, cut short or no checkpoint ({reason}): copy or train it again."
        ) from error
    state = content.get("state_dict", content) if isinstance(content, Mapping) else {}
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise UserError(
            f"{path} holds no weights: expected a Lightning checkpoint with a `state_dict`, or a dict of tensors."
        )
    return tensors


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(str(error)) from error


def _load_pickled(path: Path) -> Any:
    unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipfile.is_zipfile(path) else []
    with torch.serialization.safe_globals([(_Inert, name) for name in unknown]):
        return torch.load(path, map_location="cpu", weights_only=True)


def network_weights(
    state: Mapping[str, Tensor], names: Iterable[str], use_ema: bool, path: str | Path
) -> dict[str, Tensor]:
    """Weights of the denoising network of a latent-diffusion checkpoint.

    Args:
        state: the checkpoint's tensors.
        names: parameter names of the network, such as ``input_blocks.0.0.weight``.
        use_ema: take the averaged weights; their keys have lost all dots, so they are found from ``names``.
        path: the file, for messages.

    Returns:
        ``names`` -> tensor.

    Raises:
        UserError: some of ``names`` are not in the checkpoint.
    """
    if use_ema:
        keys = {name: f"{EMA_PREFIX}diffusion_model{name.replace('.', '')}" for name in names}
    else:
        keys = {name: NETWORK_PREFIX + name for name in names}
    missing = [name for name, key in keys.items() if key not in state]
    if missing:
        kind = "averaged" if use_ema else "raw"
        advice = "a checkpoint trained without `use_ema` needs `load_ema_ckpt: false`; " if use_ema else ""
        raise UserError(
            f"{path} lacks {len(missing)} of the {len(keys)} {kind} weights the network needs, such as "
            f"{', '.join(missing[:5])}: {advice}the `unet_config` must be the one the checkpoint was trained with."
        )
    return {name: state[key] for name, key in keys.items()}
