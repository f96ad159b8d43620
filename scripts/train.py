"""Train a CLIP-guided DDPM, or directions of Stable Diffusion (NoiseCLR), from a config of their reference codes:

    python scripts/train.py --config config/default.yaml
    python scripts/train.py --config config/default.yaml --gpus 0, -l exp -n my_run -s 0 data.params.num_workers=8
    python scripts/train.py --config config/default.yaml -r logs/2026-01-31T12-00-00_default
    python scripts/train.py --model_config_path configs/base_config.py --gpus 0,

A config of --config has the keys img_size, img_channels, timesteps, beta_start, beta_end, epochs, batch_size,
learning_rate, c_drop_prob, down_channels, t_embed_dim, c_embed_dim, clip_model, save_frequency; data_dir, dataset_root,
data_paths or h5_path (data/tiny-imagenet-200), clip_csv_path (clip.csv), max_samples; or sections of them. Keys that
are missing have the values of configs/_shared/clip_guided.yaml. A missing file of embeddings is computed first.

A config of --model_config_path is a Python file with the assignments of NoiseCLR's configs/base_config.py, which is
parsed and not executed, or a YAML file with these keys. Keys that are missing have the values of
configs/directions/stable_diffusion.yaml. Run folders are in output_dir's parent and named after output_dir. A pipeline
that is not on this machine is downloaded with model.params.denoiser_config.params.allow_download=true.

All other arguments are those of main.py: this command runs python main.py -b configs/_shared/clip_guided.yaml -t ...,
or configs/directions/stable_diffusion.yaml.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

from ldm.config.loading import load_config
from ldm.legacy.clip_guided import data_section, model_overrides, reference_values
from ldm.legacy.noiseclr import read_assignments, training_words
from ldm.training.cli import parse_arguments, run_command

ROOT = Path(__file__).resolve().parents[1]
BASE = ROOT / "configs" / "_shared" / "clip_guided.yaml"
DIRECTIONS = ROOT / "configs" / "directions" / "stable_diffusion.yaml"


def read_options(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    configs = parser.add_mutually_exclusive_group(required=True)
    configs.add_argument("--config", metavar="YAML", help="config of the CLIP-guided DDPM's reference code")
    configs.add_argument("--model_config_path", metavar="PY", help="config of NoiseCLR's reference code")
    parser.add_argument("--skip-clip-extraction", action="store_true", help="do not compute missing embeddings")
    parser.add_argument("--no-animation", action="store_true", help="without effect: see generate.py --gif")
    return parser.parse_known_args(words)


def program(path: Path) -> Callable[[list[str]], int]:
    """Return the function ``main`` of a command."""
    return runpy.run_path(str(path))["main"]


def run(options: argparse.Namespace, others: list[str]) -> int:
    values = reference_values(load_config([options.config]).content, options.config)
    train = data_section(values)
    data = [f"data.params.train={json.dumps(train)}"]
    table = train["params"]["embeddings"]
    if not (options.skip_clip_extraction or Path(table).expanduser().exists()):
        clip = values.get("clip_model", "ViT-B/32")
        words = ["--base", str(BASE), "--output", table, "--clip", clip, *data]
        if status := program(ROOT / "scripts" / "preprocess_clip.py")(words):
            return status
    given = parse_arguments(["-b", str(BASE), "-t", *others])
    name = [] if given.name or given.resume else ["-n", str(values.get("model_name") or Path(options.config).stem)]
    return program(ROOT / "main.py")(["-b", str(BASE), "-t", *name, *model_overrides(values), *data, *others])


def train_directions(path: str, others: list[str]) -> int:
    content = read_assignments(path) if path.endswith(".py") else load_config([path]).content
    overrides, flags = training_words(content, path)
    given = parse_arguments(["-b", str(DIRECTIONS), "-t", *others])
    is_named = bool(given.name or given.resume)
    words = [word for pair in flags.items() if not (is_named and pair[0] in ("-n", "-r")) for word in pair]
    return program(ROOT / "main.py")(["-b", str(DIRECTIONS), "-t", *words, *overrides, *others])


def main(arguments: list[str] | None = None) -> int:
    options, others = read_options(sys.argv[1:] if arguments is None else list(arguments))
    if options.model_config_path:
        return run_command(lambda: train_directions(options.model_config_path, others))
    return run_command(lambda: run(options, others))


if __name__ == "__main__":
    sys.path.append(os.getcwd())  # for data sets in files of the current folder
    sys.exit(main())
