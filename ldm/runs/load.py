"""A trained diffusion model from a run folder, a model-zoo folder or a checkpoint file, ready to sample; and runs.

The config is the run's own, the ``config.yaml`` beside the checkpoint (as in latent-diffusion's model zoo), or given.
Checkpoints of earlier stages that it names are not needed: the checkpoint holds all stages.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.config.build import build
from ldm.config.loading import Config, load_config
from ldm.config.validation import CHECKPOINT_KEY, validate
from ldm.models.diffusion.base import DDPM
from ldm.modules.weights import NETWORK_PREFIX, read_state_dict
from ldm.runs.checkpoint_io import read_checkpoint
from ldm.runs.folder import DEFAULT_LOGDIR, Resume, RunFolder, last_checkpoint, resolve_resume
from ldm.util import UserError

logger = logging.getLogger(__name__)

_ZOO_CONFIG, _ZOO_CHECKPOINT = "config.yaml", "model.ckpt"
_FIRST_STAGE = "first_stage_model."


@dataclass(frozen=True)
class Trained:
    """A model with its weights.

    Attributes:
        model: the model in evaluation mode.
        config: what it was built from.
        checkpoint: the file its weights came from.
        folder: the run's folder, or the checkpoint's.
    """

    model: DDPM
    config: Config
    checkpoint: Path
    folder: Path


def load_trained(given: str, base: Sequence[str] = (), overrides: Sequence[str] = ()) -> Trained:
    """Load a trained diffusion model.

    Args:
        given: a run folder, a folder with ``model.ckpt`` and ``config.yaml``, or a checkpoint file.
        base: configs merged over those found beside the checkpoint; needed where there are none.
        overrides: ``a.b=c`` words, applied last.

    Raises:
        UserError: no checkpoint, no config, a checkpoint of another model, or one without a network's weights.
        ConfigError: the config says something that cannot be.
    """
    checkpoint, found, folder = _locate(Path(given))
    if not found and not base:
        raise UserError(
            f"-r {given}: there is no config beside {checkpoint} (neither {folder}/configs/*.yaml nor "
            f"{checkpoint.parent / _ZOO_CONFIG}): name the one it was trained with by --base"
        )
    config = load_config([*found, *base], overrides, [folder.parent, DEFAULT_LOGDIR], allow_pending=True)
    validate(config, check_files=False, sections=("model",))
    state = read_state_dict(checkpoint)
    has_first_stage = any(key.startswith(_FIRST_STAGE) for key in state)
    content = _without_checkpoints(config.content["model"], keep=() if has_first_stage else ("first_stage_config",))
    model = build(Config({**config.content, "model": content}, config.origins, config.files), "model")
    if not isinstance(model, DDPM):
        raise UserError(f"{checkpoint}: {type(model).__name__} is no diffusion model: there is nothing to sample from")
    _check_network(model, state, checkpoint)
    model.init_from_ckpt(str(checkpoint))
    return Trained(model.eval(), config, checkpoint, folder)


@dataclass(frozen=True)
class LoadedRun:
    """A run of any model, exactly as its checkpoint left it.

    Attributes:
        config: the run's config.
        source: its folder and checkpoint.
        model: the model in evaluation mode.
        num_steps: how many steps it was trained.
    """

    config: Config
    source: Resume
    model: Any
    num_steps: int


def load_run(given: str) -> LoadedRun:
    """Load the model of a run folder, or of one of its checkpoints.

    Raises:
        UserError: no such run or checkpoint.
        ConfigError: the config says something that cannot be.
    """
    source = resolve_resume(given)
    config = load_config(source.configs, roots=[source.folder.path.parent, DEFAULT_LOGDIR])
    validate(config)
    model, checkpoint = build(config, "model"), read_checkpoint(source.checkpoint)
    model.load_state_dict(checkpoint["state_dict"])
    return LoadedRun(config, source, model.eval(), int(checkpoint["global_step"]))


def _locate(given: Path) -> tuple[Path, list[Path], Path]:
    """Return the checkpoint, the configs that belong to it, and the folder that is theirs."""
    if not given.exists():
        raise UserError(f"-r {given} does not exist; expected a run folder or a checkpoint file")
    if given.is_dir() and not RunFolder(given).checkpoints.is_dir():
        checkpoint = given / _ZOO_CHECKPOINT
        if not checkpoint.is_file():
            raise UserError(f"-r {given} holds neither checkpoints/ nor {_ZOO_CHECKPOINT}: name the checkpoint itself")
    else:
        checkpoint = last_checkpoint(given) if given.is_dir() else given
    run = RunFolder(checkpoint.absolute().parent.parent)
    configs = sorted(run.configs.glob("*.yaml"))
    if configs:
        return checkpoint, configs, run.path
    beside = checkpoint.parent / _ZOO_CONFIG
    return checkpoint, [beside] if beside.is_file() else [], checkpoint.absolute().parent


def _without_checkpoints(content: Any, keep: Sequence[str]) -> Any:
    """A copy of a config without the checkpoints it names, except below the keys to keep."""
    if isinstance(content, Mapping):
        return {
            key: value if key in keep else None if key == CHECKPOINT_KEY else _without_checkpoints(value, keep)
            for key, value in content.items()
        }
    return [_without_checkpoints(item, keep) for item in content] if isinstance(content, list) else content


def _check_network(model: DDPM, state: Mapping[str, Any], checkpoint: Path) -> None:
    """Raise if some of the network's weights are not in the checkpoint: its samples would mean nothing."""
    missing = [key for key in model.state_dict() if key.startswith(NETWORK_PREFIX) and key not in state]
    if missing:
        raise UserError(
            f"{checkpoint} lacks {len(missing)} weights of the network, such as {', '.join(missing[:4])}: it belongs "
            f"to another model than the config, whose network is {type(model.model.diffusion_model).__module__}."
            f"{type(model.model.diffusion_model).__name__}. Name the config it was trained with by --base"
        )
