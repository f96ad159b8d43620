"""A trained model from a run folder, a model-zoo folder or a checkpoint file, in evaluation mode.

The config is the one of the run, the ``config.yaml`` beside the checkpoint (latent-diffusion's model zoo), or given.
Checkpoints of earlier stages named in the config are not needed if the checkpoint contains all stages.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from ldm.config.loading import Config, load_config
from ldm.config.validation import CHECKPOINT_KEY, validate
from ldm.models.checkpoints import load_into
from ldm.models.contracts import require
from ldm.modules.weights import NETWORK_PREFIX, NeedsWeights, read_state_dict, without_wrappers
from ldm.runs.checkpoint_io import read_checkpoint
from ldm.runs.folder import DEFAULT_LOGDIR, RunFolder, last_checkpoint
from ldm.util import UserError

_ZOO_CONFIG, _ZOO_CHECKPOINT = "config.yaml", "model.ckpt"
_FIRST_STAGE, _COND_STAGE = "first_stage_model.", "cond_stage_model."


@runtime_checkable
class _Initializable(Protocol):
    """A model that maps checkpoints of other layouts to its own weights."""

    def init_from_ckpt(self, path: str) -> None:
        """Load weights from ``path``."""


@dataclass(frozen=True)
class LoadedRun:
    """A model with its weights.

    Attributes:
        model: the model in evaluation mode, on the CPU.
        config: the config it was built from.
        checkpoint: the file of its weights.
        folder: the run's folder, or the checkpoint's.
    """

    model: Any
    config: Config
    checkpoint: Path
    folder: Path

    @functools.cached_property
    def num_steps(self) -> int:
        """Number of optimizer steps of training; 0 if the checkpoint does not store it.

        Raises:
            UserError: the checkpoint contains weights only.
        """
        return int(read_checkpoint(self.checkpoint)["global_step"])

    def build_data(self) -> Any:
        """Return the data module of the config.

        Raises:
            ConfigError: the config has no valid ``data`` section.
        """
        validate(self.config, check_files=False)
        return self.config.build("data")


def load_run(
    given: str, base: Sequence[str] = (), overrides: Sequence[str] = (), needs: type | None = None
) -> LoadedRun:
    """Load a trained model.

    Args:
        given: a run folder, a folder with ``model.ckpt`` and ``config.yaml``, or a checkpoint file.
        base: configs merged over those found beside the checkpoint; required if there are none.
        overrides: ``a.b=c`` words, applied last.
        needs: a protocol of ``ldm.models.contracts`` that the model must implement, such as ``Samplable``.

    Raises:
        UserError: there is no checkpoint or no config, or the checkpoint lacks weights of the model or has other
            shapes, or the model does not implement ``needs``.
        ConfigError: the ``model`` section is invalid. Other sections are not checked.
    """
    checkpoint, found, folder = _locate(Path(given).expanduser())
    if not found and not base:
        raise UserError(
            f"-r {given}: no config found beside {checkpoint} (neither {folder}/configs/*.yaml nor "
            f"{checkpoint.parent / _ZOO_CONFIG}). Name the config it was trained with by --base"
        )
    config = load_config([*found, *base], overrides, [folder.parent, DEFAULT_LOGDIR], allow_pending=True)
    validate(config, check_files=False, sections=("model",))
    state = read_state_dict(checkpoint)
    has_first_stage = any(_FIRST_STAGE in key for key in state)  # wrappers may have added a prefix
    content = _without_checkpoints(config.content["model"], keep=() if has_first_stage else ("first_stage_config",))
    model = Config({**config.content, "model": content}, config.origins, config.files).build("model")
    if needs is not None:
        require(model, needs, str(checkpoint))
    state = without_wrappers(state, model.state_dict(), checkpoint)
    if isinstance(model, _Initializable):
        _check_weights(model, state, checkpoint, (NETWORK_PREFIX, _COND_STAGE))
        model.init_from_ckpt(str(checkpoint))
    else:
        _check_weights(model, state, checkpoint)
        load_into(model, checkpoint)
    return LoadedRun(model.eval(), config, checkpoint, folder)


def _locate(given: Path) -> tuple[Path, list[Path], Path]:
    """Return the checkpoint, the configs that belong to it, and their folder."""
    if not given.exists():
        raise UserError(f"-r {given} does not exist. Name a run folder or a checkpoint file")
    if given.is_dir() and not RunFolder(given).checkpoints.is_dir():
        checkpoint = given / _ZOO_CHECKPOINT
        if not checkpoint.is_file():
            raise UserError(f"-r {given}: expected checkpoints/ or {_ZOO_CHECKPOINT}, got neither. Name the checkpoint")
    else:
        checkpoint = last_checkpoint(given) if given.is_dir() else given
    run = RunFolder(checkpoint.absolute().parent.parent)
    configs = sorted(run.configs.glob("*.yaml"))
    if configs:
        return checkpoint, configs, run.path
    beside = checkpoint.parent / _ZOO_CONFIG
    return checkpoint, [beside] if beside.is_file() else [], checkpoint.absolute().parent


def _without_checkpoints(content: Any, keep: Sequence[str]) -> Any:
    """Return a copy of a config with every checkpoint set to None, except below the keys to keep."""
    if isinstance(content, Mapping):
        return {
            key: value if key in keep else None if key == CHECKPOINT_KEY else _without_checkpoints(value, keep)
            for key, value in content.items()
        }
    return [_without_checkpoints(item, keep) for item in content] if isinstance(content, list) else content


def _check_weights(model: Any, state: Mapping[str, Any], checkpoint: Path, prefixes: tuple[str, ...] = ("",)) -> None:
    """Raise if weights whose names start with one of ``prefixes`` are not in the checkpoint.

    Pretrained parts of which the checkpoint has no weight have those of their own files, or report these when used.
    """
    parts = [f"{name}." for name, part in model.named_modules() if isinstance(part, NeedsWeights)]
    elsewhere = tuple(part for part in parts if not any(key.startswith(part) for key in state))
    needed = (key for key in model.state_dict() if key.startswith(prefixes) and not key.startswith(elsewhere))
    optional = ("num_batches_tracked", "position_ids")
    missing = [key for key in needed if key not in state and not key.endswith(optional)]
    if missing:
        raise UserError(
            f"{checkpoint} lacks {len(missing)} weights of {type(model).__name__}, such as {', '.join(missing[:4])} "
            f"(it contains {', '.join(list(state)[:3])}, ...): it belongs to another model than the config describes. "
            "Name the config it was trained with by --base"
        )
