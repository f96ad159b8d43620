"""Callbacks of a run: the defaults, merged by name with ``lightning.callbacks`` of the config."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from pytorch_lightning import Callback, LightningModule

from ldm.config.validation import CALLBACKS, CHECKPOINT
from ldm.legacy import resolve_target
from ldm.runs.folder import RunFolder
from ldm.training.checkpoints import build_callback, with_direction
from ldm.util import ConfigError

logger = logging.getLogger(__name__)

SCORES = "ldm.evaluation.train_scores.ScoreWhileTraining"
_DEFAULT_SCORES = ("factor_vae", "dci", "mig")
_MONITORING = ("ModelCheckpoint", "EarlyStopping")

# Name under which a config can change or remove a callback of every run -> params.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "image_logger": {"batch_frequency": 750, "max_images": 4},
    "learning_rate_logger": {"logging_interval": "step"},
    "cuda_callback": {},
    "results_writer": {},
    "representation_writer": {},
    "latent_cache": {},
}


def _named_defaults(folder: RunFolder) -> dict[str, dict[str, Any]]:
    """Return the defaults of callbacks that are added only if the config names them."""
    return {
        "metrics_over_trainsteps_checkpoint": {
            "target": CHECKPOINT,
            "params": {
                "dirpath": str(folder.checkpoints / "trainstep_checkpoints"),
                "filename": "{epoch:06}-{step:09}",
                "verbose": True,
                "save_top_k": -1,
                "every_n_train_steps": 10000,
                "save_weights_only": True,
            },
        }
    }


def monitors_of(lightning: Mapping[str, Any], model: LightningModule) -> set[str]:
    """Return the metrics monitored by the model's checkpoints and by the callbacks of a config."""
    entries = [lightning.get("modelcheckpoint"), *(lightning.get("callbacks") or {}).values()]
    named = [((entry or {}).get("params") or {}).get("monitor") for entry in entries]
    return {name for name in (getattr(model, "monitor", None), *named) if name}


def scores_for(monitors: Iterable[str], eval_name: str | None) -> dict[str, Any] | None:
    """Return a callback that logs disentanglement scores at every validation, if they are needed.

    EncDiff takes scores whenever ``eval_name`` is set, and its configs monitor them (``val/factor_vae_score``,
    ``val/dci_disentanglement``) without a callback of their own.
    """
    from ldm.metrics.registry import ALL_METRICS

    monitors = set(monitors)
    monitored = [name for name, metric in ALL_METRICS.items() if f"val/{metric.logged}" in monitors]
    if eval_name is None and not monitored:
        return None
    return {"target": SCORES, "params": {"metrics": list(dict.fromkeys([*_DEFAULT_SCORES, *monitored]))}}


def build_callbacks(
    config: Mapping[str, Any], folder: RunFolder, scores: Mapping[str, Any] | None = None
) -> list[Callback]:
    """Merge ``lightning.callbacks`` over the defaults by name and build them; ``null`` removes one.

    Args:
        config: the section ``lightning.callbacks``.
        folder: the run's folder.
        scores: see :func:`scores_for`; used unless the config has its own callback for scores, or one named ``scores``.

    Raises:
        ConfigError: an entry that is not a default has no target, or its arguments do not fit.
    """
    merged: dict[str, Any] = {name: {"target": CALLBACKS[name], "params": params} for name, params in _DEFAULTS.items()}
    optional = _named_defaults(folder)
    targets = [resolve_target(str(entry.get("target"))) for entry in config.values() if entry]
    if scores is not None and "scores" not in config and SCORES not in targets:
        logger.info("disentanglement scores at every validation are on; lightning.callbacks.scores=null disables them")
        merged["scores"] = scores
    for name, entry in config.items():
        if entry is None:
            merged.pop(name, None)
            continue
        base = merged.get(name) or optional.get(name) or {}
        merged[name] = {**base, **entry, "params": {**base.get("params", {}), **(entry.get("params") or {})}}
    callbacks = []
    for name, entry in merged.items():
        kind, params = str(entry.get("target", "")).rpartition(".")[2], entry.get("params") or {}
        if kind == "SetupCallback":
            continue  # added to every run by the command line
        if kind in _MONITORING:
            params = with_direction(params)
        if kind == "ModelCheckpoint":  # Lightning's default folder is another one
            params = {"dirpath": str(folder.checkpoints), **params}
        try:
            callbacks.append(build_callback({**entry, "params": params}))
        except ConfigError as error:
            raise ConfigError(f"lightning.callbacks.{name}: {error}") from error
    return callbacks
