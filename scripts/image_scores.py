"""Score images: reconstructions of a run, two sets of images against each other, or an encoder on labelled faces:

    python scripts/image_scores.py recon -r logs/2026-01-31T12-00-00_shapes3d_vq -n 1000 --lpips
    python scripts/image_scores.py fid --generated samples.npz --real pictures/ --inception weights.pth
    python scripts/image_scores.py tad -r logs/2026-01-31T12-00-00_celeba_encdiff --images test_celeba.npz

Sets of images are folders of pictures, or .npy and .npz files; weights are found on this machine, never downloaded.
Scores are printed as JSON and, for a run, also written to <run>/image_scores/<step>-<what>.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.config.build import build
from ldm.evaluation.images.inception import Inception, Moments, frechet_distance, kernel_distance
from ldm.evaluation.images.metrics import ReconstructionScores, image_tad
from ldm.evaluation.images.sets import image_batches, read_array
from ldm.metrics import MetricError
from ldm.models.inputs import images_from_batch
from ldm.modules.lpips_alex import AlexLPIPS
from ldm.runs.folder import write_json
from ldm.runs.load import LoadedRun, load_run
from ldm.util import ConfigError, UserError


def read_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    recon = commands.add_parser("recon", help="PSNR, SSIM, MSE and LPIPS of test images a run reconstructs")
    recon.add_argument("-n", "--num-images", type=int, default=1000, help="of the test set, from its start (1000)")
    recon.add_argument("--num-steps", type=int, default=200, help="DDIM steps of a diffusion model (200)")
    recon.add_argument("--eta", type=float, default=1.0, help="DDIM's eta (1)")
    recon.add_argument("--seed", type=int, default=0, help="of the noise (0)")
    recon.add_argument("--lpips", nargs="?", const="", metavar="PATH", help="also LPIPS, with AlexNet's weights")
    fid = commands.add_parser("fid", help="FID and KID of two sets of images")
    fid.add_argument("--generated", required=True, metavar="PATH", help="folder, .npy or .npz; floats in [-1, 1]")
    fid.add_argument("--real", required=True, metavar="PATH", help="the same, or an .npz of mu and sigma (FID alone)")
    fid.add_argument("--unit-range", action="store_true", help="floats are in [0, 1]")
    fid.add_argument("--inception", metavar="PATH", help="weights of InceptionV3")
    fid.add_argument("--keep", metavar="NPZ", help="write the statistics of the real images, for later --real")
    tad = commands.add_parser("tad", help="TAD of a run's encoder on labelled images")
    tad.add_argument(
        "--images", required=True, metavar="NPZ", help="data (n, 3, H, W), uint8 or in [0, 1]; targ (n, A)"
    )
    tad.add_argument(
        "--tad-range",
        default="signed",
        choices=("signed", "unit"),
        help="what the encoder is shown: [-1, 1], as in training, or [0, 1], as DisDiff and EncDiff do it",
    )
    for command in (recon, fid, tad):
        if command is not fid:
            command.add_argument("-r", "--run", required=True, metavar="PATH", help="run folder or checkpoint")
        command.add_argument("--batch-size", type=int, default=50, help="images at once (50)")
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    return parser.parse_args(arguments)


def reconstruct(model: Any, images: Tensor, options: argparse.Namespace, generator: torch.Generator) -> Tensor:
    """What an autoencoder, or a diffusion model with units, makes of images."""
    if hasattr(model, "reconstruct"):
        return model.reconstruct(images)[0]
    if not hasattr(model, "decode_units"):
        raise UserError(f"{type(model).__name__} does not reconstruct images: name an autoencoder, DisDiff or EncDiff")
    x_T = torch.randn(len(images), *model.latent_shape, generator=generator).to(images.device)
    return model.decode_units(model.encode_units(images), x_T, num_steps=options.num_steps, eta=options.eta)


@torch.no_grad()
def score_reconstructions(options: argparse.Namespace) -> dict[str, Any]:
    lpips = None if options.lpips is None else AlexLPIPS(options.lpips or None).to(options.device)
    run = load_run(options.run)
    model, data = run.model.to(options.device), build(run.config, "data")
    data.setup("test")
    scores, generator = ReconstructionScores(lpips), torch.Generator().manual_seed(options.seed)
    left = options.num_images
    with getattr(model, "ema_scope", contextlib.nullcontext)():
        for batch in data.test_dataloader():
            for images in images_from_batch(batch)[:left].split(options.batch_size):
                images = images.to(options.device)
                scores.add(images, reconstruct(model, images, options, generator))
                left -= len(images)
            if left <= 0:
                break
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
    """Whether a file holds the mean and covariance of features in place of images."""
    return Path(path).suffix == ".npz" and len(read_array(Path(path), ("mu", "arr_0", "images", "data")).shape) == 1


def score_tad(options: argparse.Namespace) -> dict[str, Any]:
    attributes = read_array(Path(options.images), ("targ", "attributes"))
    run = load_run(options.run)
    model = run.model.to(options.device)
    batches = image_batches(options.images, options.batch_size, is_unit_range=True)
    signed = (b.float() / 127.5 - 1 if b.dtype == torch.uint8 else b for b in batches)
    with getattr(model, "ema_scope", contextlib.nullcontext)():
        scores = image_tad(model, (b.to(options.device) for b in signed), attributes, options.tad_range)
    return keep(run, options, scores | {"tad_range": options.tad_range, "num_images": len(attributes)})


def keep(run: LoadedRun, options: argparse.Namespace, scores: dict[str, Any]) -> dict[str, Any]:
    """Write a run's scores beside its checkpoints, with what they were taken with."""
    place = run.source
    path = Path(place.folder.path) / "image_scores" / f"{run.num_steps}-{options.what}.json"
    write_json(path, scores | {"checkpoint": str(place.checkpoint), "options": vars(options)})
    return scores


def main(arguments: list[str] | None = None) -> int:
    options = read_options(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        scores = {"recon": score_reconstructions, "fid": score_sets, "tad": score_tad}[options.what](options)
    except (ConfigError, UserError, MetricError) as err:
        print(err, file=sys.stderr)
        return 1
    print(json.dumps(scores, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
