"""Configs, network layouts and checkpoints ``<epoch>.pth`` of the CLIP-guided DDPM's reference code, translated."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ldm.legacy.reference_keys import known_values
from ldm.util import ConfigError, UserError

_MODEL, _NETWORK = "model.params", "model.params.unet_config.params"
_EVERY = "lightning.modelcheckpoint.params.every_n_epochs"
_LIGHTNING = "1.4.2"  # a version whose checkpoints have an epoch and no progress; Lightning completes them
# Keys of flat configs, or of the sections of later versions -> keys of this package.
_KEYS: dict[str, tuple[str, ...]] = {
    "img_size": (f"{_MODEL}.image_size", f"{_NETWORK}.img_size"),
    "img_channels": (f"{_MODEL}.channels", f"{_NETWORK}.img_ch"),
    "timesteps": (f"{_MODEL}.timesteps", f"{_NETWORK}.T"),
    "beta_start": (f"{_MODEL}.linear_start",),
    "beta_end": (f"{_MODEL}.linear_end",),
    "down_channels": (f"{_NETWORK}.down_chs",),
    "t_embed_dim": (f"{_NETWORK}.t_embed_dim",),
    "c_embed_dim": (f"{_NETWORK}.c_embed_dim",),
    "c_drop_prob": (f"{_MODEL}.cond_drop_prob",),
    "clip_model": (f"{_MODEL}.cond_stage_config.text_encoder.params.version",),
    "ema.enabled": (f"{_MODEL}.use_ema",),
    "ema.decay": (f"{_MODEL}.ema_decay",),
    **dict.fromkeys(("learning_rate", "lrate"), ("model.base_learning_rate",)),
    "batch_size": ("data.params.batch_size",),
    "num_workers": ("data.params.num_workers",),
    "epochs": ("lightning.trainer.max_epochs",),
    **dict.fromkeys(("save_frequency", "save_interval", "save_every"), (_EVERY,)),
}
_PATHS = ("h5_path", "data_paths", "data_dir", "dataset_root")
_TABLES = ("clip_csv_path", "clip_csv", "csv_path")
_OTHERS = (*_PATHS, *_TABLES, "max_samples", "random_seed", "model_name")
_SECTIONS = ("model", "diffusion", "training", "data", "clip", "generation", "paths")
# Keys without effect -> what replaces them.
_IGNORED = {
    **dict.fromkeys(("save_dir", "checkpoint_dir", "checkpoint_path"), "see the run folder"),
    **dict.fromkeys(("text_prompts", "guidance_weights"), "sample from texts with scripts/generate.py"),
    **dict.fromkeys(("lr_scheduler.type", "lr_scheduler.eta_min"), "the rate is constant without scheduler_config"),
    "delete_old_checkpoints": "set lightning.modelcheckpoint.params.save_top_k",
    "preprocessed_clip": "embeddings are computed before training, of the original images",
    "features": "c_embed_dim is the width of the embeddings",
    "seed": "set it with -s",
    "device": "set it with --gpus or --accelerator",
}


def reference_values(config: Any, source: str) -> dict[str, Any]:
    """Return the values of a config of the reference code by key, without its sections.

    Raises:
        ConfigError: it is not a mapping, or a key is unknown.
    """
    if not isinstance(config, Mapping):
        raise ConfigError(f"{source}: expected a mapping of keys (img_size, timesteps, ...), got {config!r}")
    return known_values(_leaves(config), (*_KEYS, *_OTHERS), _IGNORED, source)


def _leaves(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, "" if key in _SECTIONS and not prefix else f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def model_overrides(values: Mapping[str, Any]) -> list[str]:
    """Return ``key=value`` words of a model, and of its training."""
    return [f"{ours}={json.dumps(value)}" for key, value in values.items() for ours in _KEYS.get(key, ())]


def data_section(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``{target, params}`` of the training images with their embeddings; by default Tiny ImageNet's."""
    name = next((key for key in _PATHS if values.get(key)), "dataset_root")
    path, size = values.get(name) or "data/tiny-imagenet-200", values.get("img_size", 32)
    if name == "h5_path":
        target, params = "ldm.data.formats.h5_text.ArrayImages", {"path": path, "image_size": size}
    else:
        patterns = [path] if isinstance(path, str) else list(path)
        if len(patterns) != 1:
            raise ConfigError(f"{name}: expected one folder, or one pattern of paths in it, got {path}. Use one folder")
        folder = patterns[0].partition("*")[0].rstrip("/") or "."
        split = "train" if Path(folder, "train").is_dir() else None
        target = "ldm.data.formats.folder.ImageFolder"
        params = {"path": folder, "image_size": size, "fit": "random_crop", "split": split}
    params |= {"do_augment": True, "limit": values.get("max_samples"), "seed": values.get("random_seed", 0)}
    table = next((values[key] for key in _TABLES if values.get(key)), "clip.csv")
    embedded = {"embeddings": table, "data": {"target": target, "params": params}}
    return {"target": "ldm.data.formats.clip_embeddings.with_embeddings", "params": embedded}


def network_overrides(state: Mapping[str, Any], source: str) -> list[str]:
    """Return ``key=value`` words of the network whose published weights are given, from their names and shapes.

    T is not among them: it does not follow from the weights.

    Raises:
        UserError: they are the weights of another network.
    """
    arch, inner = ("dli", "model.0") if "down0.conv1.model.0.weight" in state else ("package", "conv")
    time = "temb_1" if "temb_1.model.0.weight" in state else "t_emb1"
    names = [f"down0.conv1.{inner}", f"down1.model.0.{inner}", f"down2.model.0.{inner}", "dense_emb.0"]
    names += [f"{time}.model.0", "c_embed1.model.0"]
    if missing := [name for name in names if f"{name}.weight" not in state]:
        raise UserError(
            f"{source}: expected the network of a CLIP-guided DDPM (with {missing[0]}.weight), got a checkpoint of "
            f"another kind (with {', '.join(list(state)[:3])}, ...). Choose the <epoch>.pth of its training"
        )
    fine, middle, coarse, flat, angles, embedding = (state[f"{name}.weight"].shape for name in names)
    size, channels = 4 * math.isqrt(flat[1] // coarse[0]), fine[1]
    found = {"img_size": size, "img_channels": channels, "down_channels": [fine[0], middle[0], coarse[0]]}
    found |= {"t_embed_dim": angles[1], "c_embed_dim": embedding[1]}
    return [f"{_NETWORK}.arch={arch}", *model_overrides(found)]


def epoch_checkpoint(content: Any) -> Any:
    """Return ``{model, optimizer, epoch, ...}`` as a Lightning checkpoint; other contents unchanged.

    The number of steps is that of the optimizer's state, and the epoch of the file counts from 0 and is complete.
    """
    if not isinstance(content, Mapping) or not {"model", "optimizer", "epoch"} <= set(content):
        return content
    optimizer = content["optimizer"]
    steps = max((int(state["step"]) for state in optimizer["state"].values()), default=0)
    return {
        "pytorch-lightning_version": _LIGHTNING,
        "state_dict": {f"model.diffusion_model.{key}": value for key, value in content["model"].items()},
        "optimizer_states": [optimizer],
        "lr_schedulers": [],
        "epoch": int(content["epoch"]) + 1,
        "global_step": steps,
    }
