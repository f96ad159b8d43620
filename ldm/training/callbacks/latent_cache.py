"""Cache of the latents of training images: the frozen first stage encodes every image once, instead of every step."""

from __future__ import annotations

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
from rich.console import Console
from rich.progress import track
from torch.utils.data import DataLoader

from ldm.data.dataset import ImageDataset
from ldm.data.module import DataModuleFromConfig
from ldm.data.paths import cache_folder
from ldm.data.rows import BLOCK, PerProcess, append_npy, explained_writing, map_npy
from ldm.data.traits import unwrap
from ldm.diffusion.noise import kept_random_state
from ldm.models.diffusion.latent import LatentDiffusion
from ldm.models.stored_latents import ImageRows, LatentLabels, StoredLatents, StoresLatents, encode_images
from ldm.modules.weights import exact_fingerprint
from ldm.ranges import Fraction
from ldm.runs.lock import exclusive
from ldm.util import ConfigError, UserError

logger = logging.getLogger(__name__)

_KEY = "lightning.callbacks.latent_cache.params.use"
_SECTIONS = ("train", "validation")
_TIMES = 2  # "auto": images drawn in training per image of the set, below which a new cache does not pay off
_LEAST = 20_000  # "auto": images drawn in training, below which encoding takes seconds
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
            twice.
        memory_share: share of the free memory of a GPU that the latents may take. If they fit, a step reads them
            there; else the data loader reads them from the file.
    """

    def __init__(self, use: bool | Literal["auto"] = "auto", memory_share: Fraction = 0.25) -> None:
        self.use, self.memory_share = use, memory_share
        self._labelled: list[tuple[ImageDataset, LatentLabels]] = []

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
            with kept_random_state(pl_module.device):  # training draws the same numbers as without the files
                try:
                    files = self._find(trainer, pl_module, data)
                except UserError as error:
                    if self.use is True:
                        raise
                    logger.warning("latents are not stored; each step encodes its images. %s", error)
        files = trainer.strategy.broadcast(files)
        if files:
            self._attach(pl_module, data, files)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Release the latents."""
        for dataset, labels in self._labelled:
            dataset.more_labels = tuple(each for each in dataset.more_labels if each is not labels)
        if self._labelled:
            pl_module.stored_latents, self._labelled = None, []

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
            if not path.exists():
                if not is_built:
                    break
                _build(path, model, data, dataset)
            files[section] = path
        return files

    def _attach(self, model: Any, data: DataModuleFromConfig, files: dict[str, Path]) -> None:
        """Let batches contain latents, or positions in a table on the device."""
        arrays = {section: map_npy(path) for section, path in files.items()}
        datasets = {section: unwrap(data.dataset(section)) for section in files}
        probe = torch.from_numpy(datasets["train"].images(datasets["train"].rows[:1]))
        is_gaussian = encode_images(model, probe)[1]
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
            labels = LatentLabels(_rows(datasets[section]), values, offset)
            datasets[section].more_labels = (*datasets[section].more_labels, labels)
            self._labelled.append((datasets[section], labels))
            offset += len(array)
        model.stored_latents = StoredLatents(is_gaussian, tuple(probe.shape[1:3]), table)
        place = "the file" if table is None else f"the memory of {model.device}"
        logger.info("latents (%.2f GB) are read from %s: %s", num_bytes / 1e9, place, files["train"])


def free_memory(device: torch.device) -> int:
    """Return the free bytes of a GPU; 0 for a CPU, whose memory holds the file as it is read, and other devices."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


def _obstacle(data: Any, model: Any, section: str = "train") -> str:
    """Return why the latents of a section cannot be stored, or ""."""
    if not isinstance(model, StoresLatents) or is_overridden("get_input", model, LatentDiffusion):
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


def _agrees(path: Path, model: Any, dataset: ImageDataset) -> bool:
    """Return whether a file has the latents of some images, up to rounding: the code of a first stage may change."""
    rows = _rows(dataset)
    some = np.linspace(0, len(rows) - 1, min(len(rows), _PROBES)).round().astype(int)
    new = encode_images(model, torch.from_numpy(dataset.images(rows[some])))[0].cpu().numpy()
    try:
        array = map_npy(path)
        old = np.array(array[some]) if len(array) == len(rows) else new[:0]
    except UserError as error:
        logger.warning("%s", error)
        return False
    agrees = old.shape == new.shape and np.abs(old - new).max() <= _TOLERANCE * new.std()
    if not agrees:
        logger.warning("%s: other latents than those of %s; building it again", path, type(model).__name__)
    return bool(agrees)


def _build(path: Path, model: Any, data: DataModuleFromConfig, dataset: ImageDataset) -> None:
    """Write the latents of all images of a data set; wait if another process does."""
    rows, size = _rows(dataset), data.batch_size
    with explained_writing(path, 0), exclusive(path.with_suffix(".lock"), f"latents {path.name}", wait=True):
        if path.exists():  # written by the other process
            return
        first, second = (encode_images(model, torch.from_numpy(dataset.images(rows[:2])))[0] for _ in range(2))
        if not torch.allclose(first, second, rtol=0.01, atol=0.01):
            raise UserError(
                f"{type(model.first_stage_model).__name__}.encode: expected equal results for equal images, got others "
                "in a second call. Return a DiagonalGaussian in place of a sample of it"
            )
        shape = (len(rows), *first.shape[1:])
        logger.info("encoding %s images once (%.2f GB): %s", f"{len(rows):,}", 4 * np.prod(shape) / 1e9, path)

        def blocks(done: int) -> Iterator[np.ndarray]:
            loader = data.loader(ImageRows(dataset, rows[done:]), batch_size=size)
            for batch in _shown(loader, "encoding the images"):
                yield encode_images(model, batch["image"])[0].cpu().numpy()

        append_npy(path, shape, size, blocks)


def _shown(loader: DataLoader, text: str) -> Iterable[Any]:
    """Show the progress of a loop on a terminal."""
    return track(loader, text, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
