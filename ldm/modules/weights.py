"""Weight files: search, safe reading, and extraction of a denoising network's weights from a checkpoint."""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import pickletools
import re
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ldm.data.rows import check_parts
from ldm.errors import reason_of, report_once
from ldm.util import UserError

_SHOWN = 8  # groups of keys listed in a message

NETWORK_PREFIX = "model.diffusion_model."
EMA_PREFIX = "model_ema."

# Exceptions raised when reading truncated, overwritten or foreign files.
DAMAGE = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    OSError,
    zipfile.BadZipFile,
)

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
# Entries of a file that hold the weights, in order of preference.
_STATE_DICTS = ("state_dict", "model_state_dict", "module", "model", "params", "generator", "model_ema", "ema")
# Prefixes that wrappers add: outer ones repeatedly at the start of a key; inner ones (torch.compile, DDP, FSDP)
# anywhere, and in the names of averages without their dots.
_OUTER = re.compile(r"(?:(?:module|model|state_dict|model_state_dict|net|network|generator|ema|ema_model)\.)+")
_INNER = re.compile(r"_orig_mod\.?|(?:^|(?<=\.))(?:module|_forward_module|_fsdp_wrapped_module)\.")
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
    found, searched = first_file([given] if given else [cache / name for name in names], names)
    if found is None:
        raise UserError(
            f"{user}, but there is no {searched[0]}. Put {names[0]} (from {source}) into {cache}, or set its path "
            f"in the environment variable {variable}{others}."
        )
    return found


def first_file(places: Sequence[str | os.PathLike], names: Sequence[str]) -> tuple[Path | None, list[Path]]:
    """Return the first existing one of some files, and of files ``names`` in some folders, and all searched paths."""
    paths = [Path(place).expanduser() for place in places]
    searched = [file for path in paths for file in ([path / name for name in names] if path.is_dir() else [path])]
    return next((file for file in searched if file.is_file()), None), searched


def grouped(keys: Iterable[str]) -> str:
    """Return counts of keys by their first two components, such as ``37 keys of cond_stage_model.transformer.*``.

    A key that is alone in its group is written out. The largest groups come first.
    """
    groups = defaultdict(list)
    for key in keys:
        parts = key.split(".")
        groups[".".join(parts[: 2 if len(parts) > 2 else 1])].append(key)
    largest = sorted(groups.items(), key=lambda group: -len(group[1]))
    texts = [f"{len(each)} keys of {name}.*" if each[1:] else each[0] for name, each in largest[:_SHOWN]]
    rest = sum(len(each) for _, each in largest[_SHOWN:])
    return ", ".join([*texts, f"{rest} other keys"] if rest else texts)


def weights_fingerprint(model: nn.Module) -> str:
    """Return a hash of the names, shapes and some values of all weights of a model, the same in half precision."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        flat = value.flatten()
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(flat[:: max(1, len(flat) // 8)].half().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def exact_fingerprint(model: nn.Module) -> str:
    """Return a hash of the class of a model and of all values of its weights."""
    digest = hashlib.blake2b(f"{type(model).__module__}.{type(model).__qualname__}".encode(), digest_size=8)
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


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
    names = (name for name, _ in module.named_parameters() if not name.startswith(module.unused_weights))
    if all(prefix + name in state for name in names):
        module.missing_weights = None


class _Inert:
    """Placeholder for objects of a checkpoint that are not needed, such as callbacks and configs."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


def read_state_dict(path: str | Path, names: Iterable[str] = ()) -> dict[str, Tensor]:
    """Read the tensors of a Lightning checkpoint, a plain state dict or a safetensors file, on the CPU.

    No code in the file is run; see :func:`load_pickled`.

    With ``names``, the keys of the model, prefixes of wrappers are removed, see :func:`without_wrappers`.

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
    except PermissionError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). Change its permissions.") from error
    except (*DAMAGE, SafetensorError) as error:
        text = f"damaged, truncated or not a checkpoint ({reason_of(error)}). Copy it again, or name another one."
        raise UserError(f"{path}: {text}") from error
    content = content if isinstance(content, Mapping) else {}
    entry = next((name for name in _STATE_DICTS if _tensors(content.get(name))), None)
    if entry not in (None, _STATE_DICTS[0]):
        report_once(f"{path}: read the weights of its entry {entry!r}", logging.INFO)
    tensors = _tensors(content if entry is None else content[entry])
    if not tensors:
        raise UserError(f"{path}: expected a checkpoint with a `state_dict`, or a dict of tensors, got no tensors.")
    return without_wrappers(tensors, names, path)


def _tensors(state: Any) -> dict[str, Tensor]:
    """Return the tensors of a mapping; empty for any other value."""
    return {k: v for k, v in state.items() if isinstance(v, Tensor)} if isinstance(state, Mapping) else {}


def without_wrappers(state: Mapping[str, Tensor], names: Iterable[str], path: str | Path) -> dict[str, Tensor]:
    """Return a state dict without the prefixes that wrappers of a model added to its keys, such as ``module.`` of DDP.

    Of all possible removals, the one after which most ``names`` (keys of the model) are found is chosen; none, if none
    finds more. One log line contains ``path``, the removed prefixes and the number of keys.
    """
    names = set(names)
    renamed, prefix = {key: key for key in state}, ""  # key of the file -> key of the model
    most = len(names & state.keys())
    for inner in (renamed, {key: _INNER.sub("", key) for key in state}):
        runs = {match[0] for key in inner.values() if (match := _OUTER.match(key))}
        outers = {run[: end.end()] for run in runs for end in re.finditer(r"\.", run)}
        for outer in ("", *sorted(outers, key=len)):
            for added in ("", NETWORK_PREFIX):  # a file of the denoising network alone has no prefix
                candidate = {key: added + name.removeprefix(outer) for key, name in inner.items()}
                if (found := len(names.intersection(candidate.values()))) > most:
                    renamed, prefix, most = candidate, outer, found
    changed = [key for key, name in renamed.items() if key != name]
    if changed:
        removed = {prefix, *(match[0] for key in changed for match in _INNER.finditer(key))} - {""}
        is_network = all(name.endswith(key) for key, name in renamed.items())
        action = f"added {NETWORK_PREFIX} to" if is_network else f"removed {', '.join(sorted(removed))} from"
        report_once(f"{path}: {action} {len(changed)} of {len(state)} keys", logging.INFO)
    return {name: state[key] for key, name in renamed.items()}


def load_pickled(path: str | Path, map_location: Any = "cpu") -> Any:
    """Read a file written by ``torch.save`` without running code: tensors, numbers, strings and plain containers.

    Objects of Lightning, OmegaConf and the reference repositories, which old checkpoints contain beside their weights,
    are replaced by placeholders. Other classes and functions are refused.

    Args:
        path: file to read.
        map_location: see ``torch.load``.

    Raises:
        UserError: the file refers to other classes or functions, so that unpickling it could run code.
        zipfile.BadZipFile: a part of the file has changed since it was written.
        pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError: damaged or not written by torch.
    """
    if not Path(path).stat().st_size:
        raise EOFError("the file is empty")
    if is_zip := zipfile.is_zipfile(path):
        check_parts(path)
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


def network_keys(names: Iterable[str], use_ema: bool) -> dict[str, str]:
    """Return the key of each parameter of the denoising network in a checkpoint; averages are named without dots."""
    if use_ema:
        return {name: f"{EMA_PREFIX}diffusion_model{name.replace('.', '')}" for name in names}
    return {name: NETWORK_PREFIX + name for name in names}


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
    keys = network_keys(names, use_ema)
    missing = [name for name, key in keys.items() if key not in state]
    if missing:
        kind = "averaged" if use_ema else "raw"
        advice = "Set `load_ema_ckpt: false` if it was trained without `use_ema`. " if use_ema else ""
        raise UserError(
            f"{path}: expected {len(keys)} {kind} weights of the network, got none for {len(missing)} of them, such as "
            f"{', '.join(missing[:5])}. The file contains {', '.join(list(state)[:3])}, "
            f"... {advice}Use the `unet_config` that the checkpoint was trained with."
        )
    return {name: state[key] for name, key in keys.items()}
