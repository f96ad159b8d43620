"""Score images: reconstructions of a run, two sets of images against each other, or an encoder on labelled faces:

    python scripts/image_scores.py recon -r logs/2026-01-31T12-00-00_shapes3d_vq -n 1000 --lpips
    python scripts/image_scores.py fid --generated samples.npz --real pictures/ --inception weights.pth
    python scripts/image_scores.py tad -r logs/2026-01-31T12-00-00_celeba_encdiff --images test_celeba.npz

Sets of images are folders of pictures, or .npy and .npz files; weights are searched on this machine, never downloaded.
Scores are printed as JSON and, for a run, also written to <run>/image_scores/<step>-<command>.json.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.data.formats.image_sets import image_batches, read_array
from ldm.diffusion.samplers import SAMPLERS, Sampler
from ldm.evaluation.images.distances import Moments, frechet_distance, kernel_distance
from ldm.evaluation.images.metrics import ReconstructionScores, image_tad
from ldm.evaluation.sampling.request import choose_sampler, describe_sampler
from ldm.metrics import MetricError
from ldm.models.contexts import averaged
from ldm.models.contracts import HasUnits, Reconstructor, require
from ldm.models.inputs import images_from_batch
from ldm.modules.inception import Inception
from ldm.modules.lpips import AlexLPIPS
from ldm.runs.disk import require_writable
from ldm.runs.load import LoadedRun, load_run
from ldm.runs.records import write_json
from ldm.training.cli import run_command

DDIM = {"num_steps": 200, "eta": 1.0}


def read_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recon = commands.add_parser("recon", help="PSNR, SSIM, MSE and LPIPS of test images a run reconstructs")
    recon.add_argument(
        "-n", "--num-images", type=int, default=1000, help="images from the start of the test set (1000)"
    )
    recon.add_argument("--sampler", metavar="NAME", help=f"{', '.join(SAMPLERS)} or package.module.Class (ddim)")
    recon.add_argument("--num-steps", type=int, help="steps of the sampler of a diffusion model (200 for ddim)")
    recon.add_argument("--eta", type=float, help="eta of ddim (1)")
    recon.add_argument("--seed", type=int, default=0, help="seed of the noise (0)")
    recon.add_argument("--lpips", nargs="?", const="", metavar="PATH", help="also LPIPS, with AlexNet's weights")
    fid = commands.add_parser("fid", help="FID and KID of two sets of images")
    fid.add_argument("--generated", required=True, metavar="PATH", help="folder, .npy or .npz; floats in [-1, 1]")
    fid.add_argument("--real", required=True, metavar="PATH", help="the same, or an .npz of mu and sigma (FID only)")
    fid.add_argument("--unit-range", action="store_true", help="floats are in [0, 1]")
    fid.add_argument("--inception", metavar="PATH", help="weights of InceptionV3")
    fid.add_argument("--keep", metavar="NPZ", help="write the statistics of the real images, for --real")
    tad = commands.add_parser("tad", help="TAD of a run's encoder on labelled images")
    tad.add_argument(
        "--images", required=True, metavar="NPZ", help="data (n, 3, H, W), uint8 or in [0, 1]; targ (n, A)"
    )
    tad.add_argument(
        "--tad-range",
        default="signed",
        choices=("signed", "unit"),
        help="range of the encoder's input: [-1, 1], as in training, or [0, 1], as in DisDiff's and EncDiff's code",
    )
    for command in (recon, fid, tad):
        if command is not fid:
            command.add_argument("-r", "--run", required=True, metavar="PATH", help="run folder or checkpoint")
        command.add_argument("--batch-size", type=int, default=50, help="images at once (50)")
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    return parser.parse_args(arguments)


def reconstruct(model: Any, images: Tensor, sampler: Sampler, generator: torch.Generator) -> Tensor:
    """Return the reconstructions of images by an autoencoder, or by a diffusion model with units."""
    if isinstance(model, Reconstructor):
        return model.reconstruct(images)[0]
    require(model, HasUnits, "reconstruction")
    x_T = torch.randn(len(images), *model.latent_shape, generator=generator).to(images.device)
    return model.decode_units(model.encode_units(images), x_T, sampler)


@torch.no_grad()
def score_reconstructions(options: argparse.Namespace) -> dict[str, Any]:
    lpips = None if options.lpips is None else AlexLPIPS(options.lpips or None).to(options.device)
    sampler = choose_sampler(options.sampler, DDIM, num_steps=options.num_steps, eta=options.eta)
    run = load_run(options.run)
    require_writable(run.folder, "Change its permissions, or score a copy of the run folder")
    model, data = run.model.to(options.device), run.build_data()
    data.setup("test")
    scores, generator = ReconstructionScores(lpips), torch.Generator().manual_seed(options.seed)
    left = options.num_images
    with averaged(model):
        for batch in data.test_dataloader():
            for images in images_from_batch(batch)[:left].split(options.batch_size):
                images = images.to(options.device)
                scores.add(images, reconstruct(model, images, sampler, generator))
                left -= len(images)
            if left <= 0:
                break
    settings = describe_sampler(sampler)
    vars(options).update(settings, sampler=settings.pop("name"))
    return keep(run, options, scores.result() | {"num_images": options.num_images - left})


def score_sets(options: argparse.Namespace) -> dict[str, Any]:
    inception = Inception(options.inception, options.device)

    def features(path: str) -> Any:
        return inception.features(image_batches(path, options.batch_size, options.unit_range))

    generated = features(options.generated)
    scores: dict[str, Any] = {"num_generated": len(generated)}
    if is_statistics(options.real):
        return scores | {"fid": frechet_distance(Moments.of(generated), Moments.read(options.real))}
    real = features(options.real)
    moments = Moments.of(real)
    if options.keep:
        moments.write(options.keep)
    mean, deviation = kernel_distance(generated, real)
    distances = {"fid": frechet_distance(Moments.of(generated), moments), "kid": mean, "kid_deviation": deviation}
    return scores | {"num_real": len(real)} | distances


def is_statistics(path: str) -> bool:
    """Return whether a file contains the mean and covariance of features instead of images."""
    return Path(path).suffix == ".npz" and len(read_array(Path(path), ("mu", "arr_0", "images", "data")).shape) == 1


def score_tad(options: argparse.Namespace) -> dict[str, Any]:
    attributes = read_array(Path(options.images), ("targ", "attributes"))
    run = load_run(options.run)
    require_writable(run.folder, "Change its permissions, or score a copy of the run folder")
    model = run.model.to(options.device)
    batches = image_batches(options.images, options.batch_size, is_unit_range=True)
    signed = (b.float() / 127.5 - 1 if b.dtype == torch.uint8 else b for b in batches)
    with averaged(model):
        scores = image_tad(model, (b.to(options.device) for b in signed), attributes, options.tad_range)
    return keep(run, options, scores | {"tad_range": options.tad_range, "num_images": len(attributes)})


def keep(run: LoadedRun, options: argparse.Namespace, scores: dict[str, Any]) -> dict[str, Any]:
    """Write the scores of a run, with the options, into its folder."""
    path = run.folder / "image_scores" / f"{run.num_steps}-{options.command}.json"
    write_json(path, scores | {"checkpoint": str(run.checkpoint), "options": vars(options)})
    return scores


def main(arguments: list[str] | None = None) -> int:
    options = read_options(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    score = {"recon": score_reconstructions, "fid": score_sets, "tad": score_tad}[options.command]
    return run_command(lambda: print(json.dumps(score(options), indent=1)), MetricError)


if __name__ == "__main__":
    sys.path.append(os.getcwd())  # for samplers and models in files of the current folder
    sys.exit(main())
