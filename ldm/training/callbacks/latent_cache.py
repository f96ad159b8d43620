"""Cache of the latents of training images: the frozen first stage encodes every image once, instead of every step."""

from __future__ import annotations

import copy
import functools
import hashlib
import logging
import math
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities.model_helpers import is_overridden
from pytorch_lightning.utilities.seed import isolate_rng
from rich.console import Console
from rich.progress import track
from torch.utils.data import DataLoader

from ldm.data.dataset import ImageDataset
from ldm.data.module import DataModuleFromConfig
from ldm.data.paths import cache_folder
from ldm.data.rows import BLOCK, PerProcess, append_npy, explained_writing, map_npy
from ldm.data.traits import unwrap
from ldm.models.diffusion.latent import LatentDiffusion
from ldm.models.stored_latents import ImageRows, LatentLabels, StoredLatents, encode_images
from ldm.modules.weights import exact_fingerprint
from ldm.ranges import Fraction
from ldm.runs.disk import free_bytes
from ldm.runs.lock import exclusive
from ldm.util import ConfigError, UserError

logger = logging.getLogger(__name__)

_KEY = "lightning.callbacks.latent_cache.params.use"
_SECTIONS = ("train", "validation")
_TIMES = 2  # "auto": images drawn in training per image of the set, below which a new cache does not pay off
_LEAST = 20_000  # "auto": images drawn in training, below which encoding takes seconds
_MOST_OF_DISK = 0.1  # "auto": share of the free disk space that a new file may take
_PROBES = 8  # images whose latents are compared with those of a file
_TOLERANCE = 0.05  # deviations of all latents; a difference in the weights or the images is larger than one in rounding


class LatentCache(Callback):
    """Stores the output of a frozen first stage for all training and validation images in files, and reads these.

    The name of a file contains the hash of all weights of the first stage and that of all pixels, so that it is never
    used for others: ``<cache folder>/latents-<weights>-<images>.npy``. Stages, methods, seeds and runs with the same
    first stage and images share it. A build that is killed continues.

    Args:
        use: true builds the file; false uses none; "auto" uses one that exists, and builds one if training draws at
            least 20,000 images and more than twice as many as the set has: building encodes each once, and reads it
            twice. The new file takes at most a tenth of the free disk space.
        memory_share: share of the free memory of a GPU that the latents may take. If they fit, a step reads them
            there; else the data loader reads them from the file.
    """

    def __init__(self, use: bool | Literal["auto"] = "auto", memory_share: Fraction = 0.25) -> None:
        self.use, self.memory_share = use, memory_share

    def check_run(self, data: Any, model: Any) -> None:
        """Raise a ``ConfigError`` if latents are to be stored (``use: true``) and cannot be."""
        if self.use is True and (reason := _obstacle(data, model)):
            raise ConfigError(f"{_KEY}: expected auto or false, because {reason}, got true. Set it to auto")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find or build the files, and pass them to model and data sets. Other processes wait for the first one."""
        data = trainer.datamodule
        self.check_run(data, pl_module)
        if self.use is False or trainer.fast_dev_run:
            return
        if reason := _obstacle(data, pl_module):
            logger.debug("latents are not stored, because %s", reason)
            return
        files: dict[str, Path] = {}
        if trainer.is_global_zero:
            try:
                with isolate_rng():  # training draws the same numbers as without the files
                    files = self._find(trainer, pl_module, data)
            except UserError as error:
                if self.use is True:
                    raise
                logger.warning("latents are not stored; each step encodes its images. %s", error)
        files = trainer.strategy.broadcast(files)
        if files:
            self._attach(trainer, pl_module, data, files)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Release the latents."""
        if isinstance(pl_module, LatentDiffusion) and pl_module.stored_latents is not None:
            pl_module.stored_latents = None
            trainer.datamodule.views.clear()

    def _find(self, trainer: Trainer, model: Any, data: DataModuleFromConfig) -> dict[str, Path]:
        """Return the file of each section; without one for the training images, none for the validation images."""
        is_built = self.use is True or _pays_off(trainer, data)
        if not (is_built or any(cache_folder().glob("latents-*.npy"))):
            return {}
        start, files = f"latents-{exact_fingerprint(model.first_stage_model)}", {}
        if not (is_built or any(cache_folder().glob(f"{start}-*.npy"))):
            return {}
        for section in _SECTIONS:
            if section not in data.dataset_configs or (section == "validation" and _obstacle(data, model, section)):
                continue
            dataset = unwrap(data.dataset(section))
            path = cache_folder() / f"{start}-{_images_fingerprint(data, dataset)}.npy"
            if path.exists() and not _agrees(path, model, dataset):
                path.unlink()
            if not (is_built or path.exists()):
                break
            _build(path, model, data, dataset, most_of_disk=1.0 if self.use is True else _MOST_OF_DISK)
            files[section] = path
        return files

    def _attach(
        self, trainer: Trainer, model: LatentDiffusion, data: DataModuleFromConfig, files: dict[str, Path]
    ) -> None:
        """Let batches contain latents, or positions in a table on the device, in place of images that are not used."""
        arrays = {section: map_npy(path) for section, path in files.items()}
        is_own = all(type(each).__module__.startswith(("ldm.", "pytorch_lightning.")) for each in trainer.callbacks)
        num_bytes = sum(array.nbytes for array in arrays.values())
        table, offset = None, 0
        if num_bytes <= self.memory_share * free_memory(model.device):
            shape = (sum(map(len, arrays.values())), *arrays["train"].shape[1:])
            table = torch.empty(shape, device=model.device)
        for section, array in arrays.items():
            if table is not None:
                for start in range(0, len(array), BLOCK):
                    part = torch.from_numpy(np.array(array[start : start + BLOCK]))
                    table[offset + start : offset + start + len(part)].copy_(part)
            values = PerProcess(functools.partial(map_npy, files[section])) if table is None else None
            data.views[section] = view = copy.copy(unwrap(data.dataset(section)))
            view.more_labels = (*view.more_labels, LatentLabels(_rows(view), values, offset))
            view.reads_images = model.needs_images or not is_own
            offset += len(array)
        image = torch.from_numpy(data.views["train"].images(data.views["train"].rows[:1]))
        model.stored_latents = StoredLatents(encode_images(model, image)[1], tuple(image.shape[1:3]), table)
        place = "the file" if table is None else f"the memory of {model.device}"
        logger.info("latents (%.2f GB) are read from %s: %s", num_bytes / 1e9, place, files["train"])


def free_memory(device: torch.device) -> int:
    """Return the free bytes of a GPU; 0 for a CPU, whose memory holds the file as it is read, and other devices."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


def _obstacle(data: Any, model: Any, section: str = "train") -> str:
    """Return why the latents of a section cannot be stored, or ""."""
    if not isinstance(model, LatentDiffusion) or is_overridden("get_input", model, LatentDiffusion):
        return f"{type(model).__name__} does not take stored latents"
    if next(model.first_stage_model.parameters(), None) is None:
        return f"{type(model.first_stage_model).__name__} has no weights"
    if not isinstance(data, DataModuleFromConfig):
        return f"{type(data).__name__} is another data module than DataModuleFromConfig"
    dataset = unwrap(data.dataset(section))
    if not isinstance(dataset, ImageDataset) or model.first_stage_key != "image":
        return f"the images are not the entry 'image' of an ImageDataset (data.params.{section})"
    options = ", ".join(dataset.random_options)
    return f"{options} (data.params.{section}) changes the images at random" if options else ""


def _pays_off(trainer: Trainer, data: DataModuleFromConfig) -> bool:
    """Return whether training draws enough images; that of a resumed run is counted from its beginning."""
    batches = math.inf if trainer.max_steps < 0 else trainer.max_steps * trainer.accumulate_grad_batches
    if (trainer.max_epochs or -1) > 0:
        batches = min(batches, trainer.max_epochs * data.batches_per_epoch())
    drawn = batches * data.batch_size * trainer.world_size
    return drawn >= max(_LEAST, _TIMES * len(_rows(unwrap(data.dataset("train")))))


def _rows(dataset: ImageDataset) -> np.ndarray:
    return np.unique(dataset.rows)


def _images_fingerprint(data: DataModuleFromConfig, dataset: ImageDataset) -> str:
    """Return a hash of all pixels of a data set, which are read once."""
    rows = _rows(dataset)
    digest = hashlib.blake2b(f"{dataset.images(rows[:1]).shape} {rows.tolist()}".encode(), digest_size=8)
    for batch in _shown(data.loader(ImageRows(dataset, rows)), "reading the images"):
        digest.update(batch["image"].numpy().data)
    return digest.hexdigest()


def _probe(model: LatentDiffusion, dataset: ImageDataset, rows: np.ndarray, step: int = 1) -> np.ndarray:
    """Return the latents of some rows, which are read in reverse order if ``step`` is -1."""
    images = dataset.images(rows[:: _stride(rows)][::step])
    return encode_images(model, torch.from_numpy(images))[0].cpu().numpy()[::step]


def _stride(rows: np.ndarray) -> int:
    return max(1, len(rows) // _PROBES)


def _are_close(first: np.ndarray, second: np.ndarray) -> bool:
    return first.shape == second.shape and bool(np.abs(first - second).max() <= _TOLERANCE * second.std())


def _agrees(path: Path, model: LatentDiffusion, dataset: ImageDataset) -> bool:
    """Return whether a file has the latents of some images, up to rounding: the code of a first stage may change."""
    rows = _rows(dataset)
    try:
        stored = map_npy(path)
    except UserError as error:
        logger.warning("%s", error)
        return False
    if len(stored) == len(rows) and _are_close(stored[:: _stride(rows)], _probe(model, dataset, rows)):
        return True
    logger.warning("%s: expected the latents of %s, got others. Building them again", path, type(model).__name__)
    return False


def _build(
    path: Path, model: LatentDiffusion, data: DataModuleFromConfig, dataset: ImageDataset, most_of_disk: float
) -> None:
    """Write the latents of all images of a data set, unless the file exists; wait if another process writes it.

    Raises:
        UserError: the file is larger than a share of the free disk space, or cannot be written, or images or their
            latents differ in a second call.
    """
    rows, size = _rows(dataset), data.batch_size
    with explained_writing(path, 0), exclusive(path.with_suffix(".lock"), f"latents {path.name}", wait=True):
        if path.exists():
            return
        probe = _probe(model, dataset, rows)
        if not _are_close(_probe(model, dataset, rows, -1), probe):
            raise UserError(
                f"{type(dataset).__name__}.images and {type(model.first_stage_model).__name__}.encode: expected equal "
                "latents for equal rows, got others in a second call. Return a DiagonalGaussian in place of a sample, "
                "or set lightning.callbacks.latent_cache=null"
            )
        shape, free = (len(rows), *probe.shape[1:]), free_bytes(path.parent) / 1e9
        if (needed := 4e-9 * float(np.prod(shape))) > most_of_disk * free:
            raise UserError(
                f"{path}: expected at most {most_of_disk:.0%} of the {free:.1f} GB that are free, got {needed:.1f} GB. "
                f"To store them nevertheless, set {_KEY}=true"
            )
        logger.info("encoding %s images once (%.2f GB): %s", f"{len(rows):,}", needed, path)

        def blocks(done: int) -> Iterator[np.ndarray]:
            loader = data.loader(ImageRows(dataset, rows[done:]), batch_size=size)
            for batch in _shown(loader, "encoding the images"):
                yield encode_images(model, batch["image"])[0].cpu().numpy()

        append_npy(path, shape, size, blocks)


def _shown(loader: DataLoader, text: str) -> Iterable[Any]:
    """Show the progress of a loop on a terminal."""
    return track(loader, text, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
