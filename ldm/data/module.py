"""Data module of every config: data sets by ``target``, their loaders, and a training order that can be resumed."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.seed import pl_worker_init_function
from torch.utils.data import DataLoader

from ldm.data.collate import collate
from ldm.data.dataset import WrappedDataset
from ldm.data.options import require_count
from ldm.data.sampler import ResumableShuffle
from ldm.data.traits import is_in_memory
from ldm.ranges import Count, OptionalCount, Seed
from ldm.util import BuildError, ConfigError, UserError, instantiate_from_config

logger = logging.getLogger(__name__)

_MAX_WORKERS = 4
_SECTIONS = {"fit": ("train", "validation"), "validate": ("validation",), "test": ("test",), "predict": ("predict",)}


class _ResumableLoader(DataLoader):
    """Loader that Lightning accepts as resumable; its position follows from the trainer (``_position``)."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Do nothing: the loader has no state of its own."""


def usable_cpus() -> int:
    """Return the number of processors that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS, Windows
        return os.cpu_count() or 1


class DataModuleFromConfig(pl.LightningDataModule):
    """Data sets of a config, each given as ``{target, params}``.

    The training order is a pure function of (seed, epoch), and the position in it follows from the number of trained
    batches, which Lightning stores in every checkpoint. A run that is resumed from any checkpoint, also within an
    epoch, therefore continues with the next batch. Test, validation and prediction iterate over all images in order,
    unless shuffling is requested.

    Args:
        batch_size: images per batch and device.
        train: config of the training images; None if there are none.
        validation: config of the validation images; without it Lightning does not validate.
        test: config of the images that representations and scores are computed from.
        predict: config of the images for prediction.
        wrap: put each data set into a ``WrappedDataset``.
        num_workers: number of loader processes. None takes 0 for data sets made in memory, else the number of
            available processors less one, at most 4.
        shuffle_test_loader: shuffle the test images (scores need them in order).
        use_worker_init_fn: seed numpy, torch and Python in each loader process (Lightning's worker function).
        shuffle_val_dataloader: shuffle the validation images.
        shuffle_train_loader: if False, training keeps the order of the data set.
        seed: seed of the training order; None takes that of the run (``seed_everything``), else 0. It is stored in
            checkpoints.
        eval_batch_size: batch size of validation, test and prediction; None takes ``batch_size``.

    Attributes:
        views: section -> data set that the loader reads in place of the own one, such as one with stored latents.

    Raises:
        ConfigError: a batch size or the number of workers is out of range.
    """

    def __init__(
        self,
        batch_size: Count,
        train: Mapping[str, Any] | None = None,
        validation: Mapping[str, Any] | None = None,
        test: Mapping[str, Any] | None = None,
        predict: Mapping[str, Any] | None = None,
        wrap: bool = False,
        num_workers: OptionalCount | None = None,
        shuffle_test_loader: bool = False,
        use_worker_init_fn: bool = False,
        shuffle_val_dataloader: bool = False,
        shuffle_train_loader: bool = True,
        seed: Seed | None = None,
        eval_batch_size: Count | None = None,
    ) -> None:
        super().__init__()
        eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        require_count("data.params.batch_size", batch_size)
        require_count("data.params.eval_batch_size", eval_batch_size)
        require_count("data.params.num_workers", num_workers, least=0, or_null=True)
        sections = {"train": train, "validation": validation, "test": test, "predict": predict}
        self.dataset_configs = {name: config for name, config in sections.items() if config is not None}
        self.datasets: dict[str, Any] = {}
        self.views: dict[str, Any] = {}
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.wrap = wrap
        self.num_workers = num_workers
        self.use_worker_init_fn = use_worker_init_fn
        self.shuffle_train_loader = shuffle_train_loader
        self.shuffle_test_loader = shuffle_test_loader
        self.shuffle_val_dataloader = shuffle_val_dataloader
        if validation is None:
            self.val_dataloader = super().val_dataloader  # Lightning does not validate without an override
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed

    def setup(self, stage: str | None = None) -> None:
        """Build the data sets of a stage ("fit", "validate", "test", "predict"; None builds all)."""
        for name in self.dataset_configs if stage is None else _SECTIONS[stage]:
            if name in self.dataset_configs:
                self.dataset(name)

    def dataset(self, name: str) -> Any:
        """Return the data set of a section, built when it is first used.

        Raises:
            ConfigError, UserError: there is no such section, or it cannot be built.
        """
        if name not in self.dataset_configs:
            raise ConfigError(
                f"data.params.{name}: expected the {name} images, got only "
                f"{', '.join(self.dataset_configs) or 'an empty section'}. Add a {{target, params}} entry."
            )
        if name not in self.datasets:
            try:
                dataset = instantiate_from_config(self.dataset_configs[name], "dataset")
            except BuildError as error:
                raise ConfigError(f"data.params.{name}.{error}") from error
            except (ConfigError, UserError) as error:
                kind = UserError if isinstance(error, UserError) else ConfigError
                raise kind(f"data.params.{name}: {error}") from error
            self.datasets[name] = WrappedDataset(dataset) if self.wrap else dataset
        return self.datasets[name]

    def loader(self, dataset: Any, loader: type[DataLoader] = DataLoader, **options: Any) -> DataLoader:
        """Return a loader of a data set in its order, with the workers of this module; see ``DataLoader``."""
        workers = self.num_workers
        if workers is None:
            workers = 0 if is_in_memory(dataset) else max(0, min(_MAX_WORKERS, usable_cpus() - 1))
        options.setdefault("batch_size", self.eval_batch_size)
        return loader(
            dataset,
            num_workers=workers,
            collate_fn=collate,
            worker_init_fn=pl_worker_init_function if self.use_worker_init_fn else None,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=workers > 0,  # else started anew, with their imports, in every epoch and validation
            **options,
        )

    def train_dataloader(self) -> DataLoader:
        """Return the loader of training batches, which starts at the position of the trainer.

        Raises:
            ConfigError: there is no ``train`` section, or not one batch of images for every device.
        """
        dataset = self.views.get("train", self.dataset("train"))
        world_size = self.trainer.world_size if self.trainer else 1
        if len(dataset) < self.batch_size * world_size:
            devices = f" on each of {world_size} devices" if world_size > 1 else ""
            raise ConfigError(
                f"data.params.train: expected at least one batch of {self.batch_size} images{devices}, got "
                f"{len(dataset)} images. Set data.params.batch_size to at most {len(dataset) // world_size}."
            )
        sampler = ResumableShuffle(
            dataset,
            batch_size=self.batch_size,
            seed=self.seed,
            position=self._position,
            shuffle=self.shuffle_train_loader,
            rank=self.trainer.global_rank if self.trainer else 0,
            world_size=world_size,
        )
        return self.loader(dataset, _ResumableLoader, sampler=sampler, batch_size=self.batch_size)

    def with_images(self, batch: Any, section: str) -> Any:
        """Return a batch with its images, which are read if a view without them is loaded."""
        view = self.views.get(section)
        if view is None or view.reads_images:
            return batch
        rows = batch["index"]
        return {**batch, "image": torch.from_numpy(view.images(rows.cpu().numpy())).to(rows.device)}

    def val_dataloader(self) -> DataLoader:
        """Return the loader of validation batches."""
        dataset = self.views.get("validation", self.dataset("validation"))
        return self.loader(dataset, shuffle=self.shuffle_val_dataloader)

    def test_dataloader(self) -> DataLoader:
        """Return the loader of all test batches in order: row i of a result belongs to image i."""
        return self.loader(self.dataset("test"), shuffle=self.shuffle_test_loader)

    def predict_dataloader(self) -> DataLoader:
        """Return the loader of all prediction batches in order."""
        return self.loader(self.dataset("predict"), shuffle=False)

    def batches_per_epoch(self) -> int:
        """Return the number of training batches per epoch and device, with the trainer's ``limit_train_batches``."""
        world_size = self.trainer.world_size if self.trainer else 1
        batches = -(-(len(self.dataset("train")) // world_size) // self.batch_size)
        limit = self.trainer.limit_train_batches if self.trainer else None
        if isinstance(limit, float):
            return int(batches * limit)
        return batches if limit is None else min(batches, limit)

    def _batches_trained(self) -> int:
        """Return the number of batches whose training step is done, over all epochs.

        ``processed`` rather than ``completed``: callbacks save checkpoints between the two.
        """
        return self.trainer.fit_loop.epoch_loop.batch_progress.total.processed if self.trainer else 0

    def _position(self) -> tuple[int, int]:
        return divmod(self._batches_trained(), max(1, self.batches_per_epoch()))

    def state_dict(self) -> dict[str, Any]:
        """Return the seed of the training order and the settings that it depends on."""
        state = {"seed": self.seed, "batch_size": self.batch_size, "batches_trained": self._batches_trained()}
        if "train" in self.datasets:
            state["batches_per_epoch"] = self.batches_per_epoch()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the training order of a checkpoint; warn if the batches will differ."""
        self.seed = state["seed"]
        found = {"batch_size": self.batch_size}
        if "train" in self.dataset_configs:
            found["batches_per_epoch"] = self.batches_per_epoch()
        for key, value in found.items():
            if key in state and state[key] != value:
                logger.warning(
                    "the checkpoint was trained with %s = %s, now it is %s: training continues, but with other batches "
                    "than those of the uninterrupted run",
                    key,
                    state[key],
                    value,
                )
