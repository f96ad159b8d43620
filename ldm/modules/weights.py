"""Finding and reading weight files, and picking a denoising network's out of a checkpoint."""

from __future__ import annotations

import os
import pickle
import pickletools
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.util import UserError

NETWORK_PREFIX = "model.diffusion_model."
EMA_PREFIX = "model_ema."

# What reading a file raises that is cut short, overwritten or none of torch's.
DAMAGE = (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError, zipfile.BadZipFile)

# Packages whose classes older checkpoints name beside their weights (callbacks, settings). Nothing of them is needed,
# so they become placeholders. Names of any other package are refused: no weight needs them.
_BESIDE_WEIGHTS = frozenset(
    """pytorch_lightning lightning lightning_fabric lightning_utilities torchmetrics omegaconf argparse collections
    pathlib numpy torch typing enum datetime ldm taming main main_val""".split()
)
_BESIDE_WEIGHTS_EXACT = frozenset(
    (
        "copyreg._reconstructor",
        "builtins.object",
        "builtins.dict",
        "builtins.list",
        "builtins.int",
        "builtins.float",
        "builtins.str",
        "builtins.bool",
        "builtins.tuple",
        "builtins.set",
        "builtins.slice",
        "builtins.complex",
    )
)
# Mappings that are filled entry by entry, which torch's reader allows for plain dicts alone.
_LIKE_DICTS = frozenset(("pytorch_lightning.utilities.parsing.AttributeDict", "builtins.dict"))
_UNKNOWN_NAME = re.compile(r"GLOBAL (\S+) (?:was not an allowed global|whose module \S+ is blocked)")


def find_weights(
    path: str | os.PathLike | None, what: str, names: Sequence[str], variable: str, source: str, others: str
) -> Path:
    """A published network's weights on this machine: at ``path``, where ``variable`` says, or in torch's cache.

    Args:
        path: the file, or a folder that holds it; None looks in the other two places.
        what: for the message, "X needs Y's weights".
        names: of the file, the first that is there.
        variable: environment variable that names a file or folder.
        source: for the message, where the file is published.
        others: for the message, after "name its path in the variable": other ways out.

    Raises:
        UserError: they are nowhere; the message says which file to put where.
    """
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    given = path or os.environ.get(variable)
    place = Path(given) if given else cache
    candidates = [place / name for name in names] if place.is_dir() or not given else [place]
    found = next((candidate for candidate in candidates if candidate.is_file()), None)
    if found is None:
        raise UserError(
            f"{what}, and there is no {candidates[0]}. Put {names[0]} (from {source}) into {cache}, or name its path "
            f"in the variable {variable}{others}."
        )
    return found


class _Inert:
    """Stands for a class a checkpoint names but no weight needs (a callback, a config): it does nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a Lightning checkpoint, a bare state dict or a safetensors file, on the CPU.

    Only tensors and plain containers are built (see :func:`load_pickled`); no code of the file's runs.

    Args:
        path: the file.

    Returns:
        Name -> tensor.

    Raises:
        UserError: the file is missing, damaged, names code to run, or holds no tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}: train that stage first or correct the path.")
    try:
        content = _load_safetensors(path) if path.suffix == ".safetensors" else load_pickled(path)
    except UserError:
        raise
    except DAMAGE as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path} is damaged, cut short or no checkpoint ({reason}): copy or train it again.") from error
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


def load_pickled(path: str | Path, map_location: Any = "cpu") -> Any:
    """Read what ``torch.save`` wrote, as data: tensors, numbers, texts and plain containers.

    Classes of Lightning, OmegaConf and the references, which old checkpoints name beside their weights, become inert
    placeholders. Nothing else is built or called, whatever the file says.

    Args:
        path: the file.
        map_location: see ``torch.load``.

    Raises:
        UserError: the file names anything else, so that reading it plainly could run code.
        pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError: damaged, or not of torch.
    """
    is_zip = zipfile.is_zipfile(path)
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path) if is_zip else _names_in_plain_pickle(path)
    stand_ins = {name: _stand_in(name, path) for name in sorted(names)}
    while True:
        try:
            with torch.serialization.safe_globals([(kind, name) for name, kind in stand_ins.items()]):
                return torch.load(path, map_location=map_location, weights_only=True)
        except pickle.UnpicklingError as error:  # files of torch before 1.6 tell their names one at a time
            found = _UNKNOWN_NAME.search(str(error))
            if found is None:
                raise
            name = found[1] if "." in found[1] else f"builtins.{found[1]}"
            if name in stand_ins:
                raise
            stand_ins[name] = _stand_in(name, path)


def _stand_in(name: str, path: str | Path) -> type:
    """What takes the place of a name in a checkpoint.

    Raises:
        UserError: the name is none that stands beside weights.
    """
    if name.partition(".")[0] not in _BESIDE_WEIGHTS and name not in _BESIDE_WEIGHTS_EXACT:
        raise UserError(
            f"{path} holds more than tensors and plain containers: it names {name}, and reading that could run code. "
            "The file is refused and nothing in it was run. Ask whoever made it for a checkpoint of weights "
            "(torch.save of a state_dict, or safetensors)"
        )
    return dict if name in _LIKE_DICTS else _Inert


def _names_in_plain_pickle(path: str | Path) -> set[str]:
    """Classes and functions that the first pickle of a file names; empty where the file is no pickle."""
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
        return set()  # what it is, torch will say
    return names


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
