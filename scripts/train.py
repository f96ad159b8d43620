"""Train a CLIP-guided DDPM from a config of its reference code:

    python scripts/train.py --config config/default.yaml
    python scripts/train.py --config config/default.yaml --gpus 0, -l exp -n my_run -s 0 data.params.num_workers=8
    python scripts/train.py --config config/default.yaml -r logs/2026-01-31T12-00-00_default

The config has the keys img_size, img_channels, timesteps, beta_start, beta_end, epochs, batch_size, learning_rate,
c_drop_prob, down_channels, t_embed_dim, c_embed_dim, clip_model, save_frequency; data_dir, dataset_root, data_paths or
h5_path (data/tiny-imagenet-200), clip_csv_path (clip.csv), max_samples; or sections of them. Keys that are missing have
the values of configs/_shared/clip_guided.yaml. A missing file of embeddings is computed first.

All other arguments are those of main.py: this command runs python main.py -b configs/_shared/clip_guided.yaml -t ...
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
from ldm.training.cli import parse_arguments, run_command

ROOT = Path(__file__).resolve().parents[1]
BASE = ROOT / "configs" / "_shared" / "clip_guided.yaml"


def read_options(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.add_argument("--config", required=True, metavar="YAML", help="config of the reference code")
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


def main(arguments: list[str] | None = None) -> int:
    options, others = read_options(sys.argv[1:] if arguments is None else list(arguments))
    return run_command(lambda: run(options, others))


if __name__ == "__main__":
    sys.path.append(os.getcwd())  # for data sets in files of the current folder
    sys.exit(main())
