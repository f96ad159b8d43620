"""Save learned directions as a pipeline of diffusers, or as a file:

    python scripts/load_and_save_model.py --ckpt_path outputs/directions/checkpoint-1000/pytorch_model.bin \\
        --save_path models/faces --num_tokens 100
    python scripts/load_and_save_model.py --ckpt_path logs/2026-01-31T12-00-00_directions --save_path learned_embeds.bin
    python scripts/load_and_save_model.py --ckpt_path models/faces --save_path faces.safetensors

--ckpt_path is a checkpoint of NoiseCLR's reference code (pytorch_model.bin or model.safetensors), its
learned_embeds.bin, a pipeline that it saved, a run folder of this package or a checkpoint of one, or a file of
directions. A --save_path that ends in .bin or .safetensors is a file; any other is the folder of a pipeline, whose
prompts may contain <t1>, <t2>, ...
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ldm.training.cli import run_command
from ldm.util import UserError

PRETRAINED = "stable-diffusion-v1-5/stable-diffusion-v1-5"


def read_options(words: list[str] | None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    add = parser.add_argument
    add("--ckpt_path", required=True, metavar="PATH", help="learned directions")
    add("--save_path", required=True, type=Path, metavar="PATH", help="*.bin, *.safetensors, or folder of a pipeline")
    add(
        "--num_tokens", type=int, metavar="K", help="number of directions; checked, and needed for unusual vocabularies"
    )
    add("--pretrained_model", default=PRETRAINED, metavar="NAME", help="pipeline without directions (%(default)s)")
    add("--allow_download", action="store_true", help="download a pipeline that is not on this machine")
    return parser.parse_args(words)


def run(options: argparse.Namespace) -> None:
    from ldm.models.diffusion.methods.noiseclr.directions import DirectionSet
    from ldm.models.diffusion.methods.noiseclr.files import save_pipeline
    from ldm.models.diffusion.methods.noiseclr.pipeline import load_pipeline

    path, target = options.ckpt_path, options.save_path.expanduser()
    if target.suffix in (".bin", ".safetensors"):
        directions = DirectionSet.load(path, options.num_tokens)
        directions.save(target)
    else:
        pipeline = load_pipeline(options.pretrained_model, options.allow_download)
        directions = DirectionSet.load(path, options.num_tokens, len(pipeline.tokenizer))
        if directions.kind != "token":
            raise UserError(f"{path}: expected directions of kind token for a pipeline, got kind {directions.kind}")
        save_pipeline(target, directions.named(), pipeline)
    print(f"saved {len(directions)} directions to {target}")


def main(arguments: list[str] | None = None) -> int:
    options = read_options(arguments)
    return run_command(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
