"""Weight files: search, safe reading, and extraction of a denoising network's weights from a checkpoint."""

from __future__ import annotations

import os
import pickle
import pickletools
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ldm.util import UserError

NETWORK_PREFIX = "model.diffusion_model."
EMA_PREFIX = "model_ema."

# Exceptions raised when reading truncated, overwritten or foreign files.
DAMAGE = (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError, zipfile.BadZipFile)

# Packages whose classes older checkpoints refer to beside their weights (callbacks, settings). These objects are not
# needed and are replaced by placeholders. References to any other package are refused.
_BESIDE_WEIGHTS = frozenset(
    """pytorch_lightning lightning lightning_fabric lightning_utilities torchmetrics omegaconf argparse collections
    pathlib numpy torch typing enum datetime ldm taming main main_val""".split()
)
_BESIDE_WEIGHTS_EXACT = frozenset(
    """copyreg._reconstructor builtins.object builtins.dict builtins.list builtins.int builtins.float builtins.str
    builtins.bool builtins.tuple builtins.set builtins.slice builtins.complex""".split()
)
# Mappings that are filled entry by entry, which torch's reader supports for plain dicts only.
_LIKE_DICTS = frozenset(("pytorch_lightning.utilities.parsing.AttributeDict", "builtins.dict"))
_UNKNOWN_NAME = re.compile(r"GLOBAL (\S+) (?:was not an allowed global|whose module \S+ is blocked)")


def find_weights(
    path: str | os.PathLike | None, user: str, names: Sequence[str], variable: str, source: str, others: str
) -> Path:
    """Return the weight file of a published network: ``path``, else ``variable``, else torch's cache.

    Args:
        path: the file, or a folder that contains it; None searches the other two places.
        user: start of the error message, such as "perceptual loss: expected VGG16's weights".
        names: possible names of the file, in order of preference.
        variable: environment variable with the path of a file or folder.
        source: publisher of the file, for the error message.
        others: end of the error message: alternatives to setting the variable.

    Raises:
        UserError: the file is missing; the message contains the searched path.
    """
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    given = path or os.environ.get(variable)
    location = Path(given) if given else cache
    candidates = [location / name for name in names] if location.is_dir() or not given else [location]
    found = next((candidate for candidate in candidates if candidate.is_file()), None)
    if found is None:
        raise UserError(
            f"{user}, but there is no {candidates[0]}. Put {names[0]} (from {source}) into {cache}, or set its path "
            f"in the environment variable {variable}{others}."
        )
    return found


def group_keys(keys: Iterable[str], most: int = 8) -> str:
    """Return the modules that state-dict keys belong to, at most two levels deep, with counts: 'a.b: 2, betas: 1'."""
    counts = Counter(".".join(key.split(".")[:-1][:2]) or key for key in keys)
    shown = ", ".join(f"{name}: {count}" for name, count in counts.most_common(most))
    return f"{shown}, and {len(counts) - most} more" if len(counts) > most else shown


class NeedsWeights(nn.Module):
    """Base class of modules whose pretrained weights may be missing at construction.

    Such a module is built without them, so that configs can be inspected and checkpoints that contain the weights can
    be loaded. The constructor sets the error message ``missing_weights``, and ``forward`` calls
    :meth:`require_weights`; a state dict with all needed parameters of the module clears the message.
    """

    unused_weights: tuple[str, ...] = ()  # start of the names of parameters that need not be loaded

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.missing_weights: str | None = None
        self.register_load_state_dict_pre_hook(_note_weights)

    def require_weights(self) -> None:
        """Raise a ``UserError`` that names the missing weight file, if the weights are missing."""
        if self.missing_weights is not None:
            raise UserError(self.missing_weights)


def _note_weights(module: NeedsWeights, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Record that a state dict contains the weights."""
    names = (name for name, _ in module.named_parameters() if not name.startswith(module.unused_weights))
    if all(prefix + name in state for name in names):
        module.missing_weights = None


class _Inert:
    """Placeholder for objects of a checkpoint that are not needed, such as callbacks and configs."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a Lightning checkpoint, a plain state dict or a safetensors file, on the CPU.

    No code in the file is run; see :func:`load_pickled`.

    Raises:
        UserError: the file is missing, damaged, refers to other code, or contains no tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}. Train that stage first, or correct the path.")
    try:
        content = load_file(path) if path.suffix == ".safetensors" else load_pickled(path)
    except UserError:
        raise
    except (*DAMAGE, SafetensorError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path}: damaged, truncated or not a checkpoint ({reason}). Copy it again.") from error
    state = content.get("state_dict", content) if isinstance(content, Mapping) else {}
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"{path}: expected a checkpoint with a `state_dict`, or a dict of tensors, got no tensors.")
    return tensors


def load_pickled(path: str | Path, map_location: Any = "cpu") -> Any:
    """Read a file written by ``torch.save`` without running code: tensors, numbers, strings and plain containers.

    Objects of Lightning, OmegaConf and the reference repositories, which old checkpoints contain beside their weights,
    are replaced by placeholders. Other classes and functions are refused.

    Args:
        path: file to read.
        map_location: see ``torch.load``.

    Raises:
        UserError: the file refers to other classes or functions, so that unpickling it could run code.
        pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError: damaged or not written by torch.
    """
    is_zip = zipfile.is_zipfile(path)
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path) if is_zip else _names_in_plain_pickle(path)
    stand_ins = {name: _stand_in(name, path) for name in sorted(names)}
    while True:
        try:
            with torch.serialization.safe_globals([(kind, name) for name, kind in stand_ins.items()]):
                return torch.load(path, map_location=map_location, weights_only=True)
        except pickle.UnpicklingError as error:  # files of torch < 1.6 reveal their names one by one
            found = _UNKNOWN_NAME.search(str(error))
            if found is None:
                raise
            name = found[1] if "." in found[1] else f"builtins.{found[1]}"
            if name in stand_ins:
                raise
            stand_ins[name] = _stand_in(name, path)


def _stand_in(name: str, path: str | Path) -> type:
    """Return the placeholder for a class or function in a checkpoint; refuse unknown ones."""
    if name.partition(".")[0] not in _BESIDE_WEIGHTS and name not in _BESIDE_WEIGHTS_EXACT:
        raise UserError(
            f"{path}: expected no more than tensors and plain containers, got a reference to {name}, which could run "
            "code. The file was refused. Obtain a file of weights only (torch.save of a state_dict, or safetensors)."
        )
    return dict if name in _LIKE_DICTS else _Inert


def _names_in_plain_pickle(path: str | Path) -> set[str]:
    """Return the classes and functions in the first pickle of a file; empty if the file is not a pickle."""
    names: set[str] = set()
    texts: list[str] = []
    try:
        with open(path, "rb") as stream:
            for operation, argument, _ in pickletools.genops(stream):
                if operation.name == "GLOBAL":
                    names.add(str(argument).replace(" ", "."))
                elif operation.name == "STACK_GLOBAL":
                    names.add(".".join(texts[-2:]))
                elif isinstance(argument, str):
                    texts.append(argument)
    except (ValueError, EOFError, UnicodeDecodeError, IndexError):
        return set()  # torch.load reports the error
    return names


def network_weights(
    state: Mapping[str, Tensor], names: Iterable[str], use_ema: bool, path: str | Path
) -> dict[str, Tensor]:
    """Return the weights of the denoising network in a latent diffusion checkpoint, by ``names``.

    Args:
        state: tensors of the checkpoint.
        names: parameter names of the network, such as ``input_blocks.0.0.weight``.
        use_ema: return the averaged weights, whose keys are ``names`` without dots.
        path: checkpoint file, for error messages.

    Raises:
        UserError: some of ``names`` are missing in the checkpoint.
    """
    if use_ema:
        keys = {name: f"{EMA_PREFIX}diffusion_model{name.replace('.', '')}" for name in names}
    else:
        keys = {name: NETWORK_PREFIX + name for name in names}
    missing = [name for name, key in keys.items() if key not in state]
    if missing:
        kind = "averaged" if use_ema else "raw"
        advice = "Set `load_ema_ckpt: false` if it was trained without `use_ema`. " if use_ema else ""
        raise UserError(
            f"{path}: expected {len(keys)} {kind} weights of the network, got none for {len(missing)} of them, such as "
            f"{', '.join(missing[:5])}. {advice}Use the `unet_config` that the checkpoint was trained with."
        )
    return {name: state[key] for name, key in keys.items()}
