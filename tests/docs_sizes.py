"""Keys of a config that make its networks small and its training short, found by the sections of the config."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from docs_files import TWO

TRAINER = {"max_steps": 1, "val_check_interval": 1, "log_every_n_steps": 1, "accumulate_grad_batches": 1}
TRAINER |= {"num_sanity_val_steps": 0, "precision": "32-true"}
SIZES = {  # by a key of the section
    "ch_mult": {"ch": 32, "num_res_blocks": 1},
    "patch_size": {"width": 32, "layers": 1, "head_width": 16},
    "model_channels": {"model_channels": 32, "channel_mult": [1, 2], "num_res_blocks": 1, "attention_resolutions": [2]},
    "down_chs": {"down_chs": [32, 32, 64]},
    "disc_start": {"disc_ndf": 8, "perceptual_weight": 0.0},
    "num_directions": {"num_directions": 8, "directions_per_iteration": 2},
}
CALLBACKS = {  # by the class
    "EditScore": {"num_samples": 4, "columns": 2},
    "PromptScore": {"num_prompts": 4, "strengths": [-1, 0, 1], "rows": 2},
    "ScoreWhileTraining": {"metrics": ["factor_vae"], "settings": {"factor_vae": {"num_train": 20, "num_eval": 20}}},
    "DirectionBench": {"num_samples": 4, "num_images": 8, "columns": 2, "strengths": [2], "num_directions": 2},
}


def small_sizes(section: Any, key: str) -> dict[str, Any]:
    """Return the keys at and below ``key`` that make the networks of a section small, with their values."""
    if not isinstance(section, Mapping):
        return {}
    found = {}
    for name in section.keys() & SIZES.keys():
        found |= {f"{key}.{part}": size for part, size in SIZES[name].items()}
    if str(section.get("target", "")).rpartition(".")[2].startswith("Encoder4"):
        found[f"{key}.params.d"] = 8
    if "ch_mult" in section and "patch_size" in section:
        found.pop(f"{key}.width"), found.pop(f"{key}.layers"), found.pop(f"{key}.head_width")
    if "ch_mult" in section:
        found[f"{key}.ch_mult"] = [1] * len(section["ch_mult"])
    return {
        **found,
        **{k: v for name, value in section.items() for k, v in small_sizes(value, f"{key}.{name}").items()},
    }


def short_run(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys that make a training short, with their values: one step, few images, few samples."""
    lightning, data = content.get("lightning") or {}, (content.get("data") or {}).get("params") or {}
    found = {f"lightning.trainer.{name}": value for name, value in TRAINER.items()}
    found |= {"data.params.batch_size": 2, "data.params.eval_batch_size": 8, "data.params.num_workers": 0}
    found["lightning.callbacks.image_logger"] = None
    if (lightning.get("trainer") or {}).get("limit_val_batches") != 0:
        found["lightning.trainer.limit_val_batches"] = 1
    for part in ("train", "validation", "test"):
        section = data.get(part) or {}
        if str(section.get("target")).endswith(".World3D"):
            found[f"data.params.{part}.params.limit"] = 64
            if part == "test" and not (section.get("params") or {}).get("holdout"):
                found |= {
                    f"data.params.test.params.{name}": value for name, value in {"keep": TWO, "limit": None}.items()
                }
    for name, callback in (lightning.get("callbacks") or {}).items():
        if not callback or name == "image_logger":
            continue
        path = f"lightning.callbacks.{name}.params"
        params = callback.get("params") or {}
        found |= {
            f"{path}.{key}": value for key, value in CALLBACKS.get(callback["target"].rpartition(".")[2], {}).items()
        }
        if isinstance(params.get("sampler"), Mapping):
            found[f"{path}.sampler.params.num_steps"] = 2
    return found


def words_of(keys: Mapping[str, Any]) -> list[str]:
    """Return assignments as words of a command line."""
    return [
        f"{key}={yaml.safe_dump(value, default_flow_style=True, width=1e6).split(chr(10))[0]}"
        for key, value in keys.items()
    ]


def strings(content: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield the dotted keys and values of all texts of a config."""
    if isinstance(content, Mapping):
        for name, value in content.items():
            yield from strings(value, f"{key}.{name}" if key else str(name))
    elif isinstance(content, str):
        yield key, content
