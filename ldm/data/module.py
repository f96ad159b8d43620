"""The data module of every config: data sets by ``target``, loaders, and a training order that can be resumed."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset

from ldm.data.collate import collate
from ldm.data.sampler import ResumableShuffle
from ldm.util import ConfigError, instantiate_from_config

logger = logging.getLogger(__name__)

_MOST_WORKERS = 4
_SECTIONS_OF_STAGE = {
    "fit": ("train", "validation"),
    "validate": ("validation",),
    "test": ("test",),
    "predict": ("predict",),
}


class WrappedDataset(Dataset):
    """Any indexable object with a length as a torch data set; shows what else the object has, such as its factors."""

    def __init__(self, dataset: Any) -> None:
        self.data = dataset

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        return self.data[index]

    def __getattr__(self, name: str) -> Any:
        if name == "data" or name.startswith("__") and name != "__getitems__":  # unpickling asks before there is any
            raise AttributeError(name)
        return getattr(self.data, name)


class _PlaceKeepingLoader(DataLoader):
    """Says to Lightning that it can be resumed; the place itself follows from the trainer (``_position``)."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to take up."""


def seed_worker(worker_id: int) -> None:
    """Give each loader process its own numpy and Python seeds, following from torch's."""
    seed = torch.initial_seed() % 2**32
    np.random.seed(seed)
    random.seed(seed)


def usable_cpus() -> int:
    """Processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class DataModuleFromConfig(pl.LightningDataModule):
    """Data sets named in the config, each as ``{target, params}``.

    The training order is a pure function of (seed, epoch), and the place in it follows from the number of
    batches the trainer has trained, which Lightning keeps in every checkpoint. A run resumed from any
    checkpoint, in the midst of an epoch too, therefore continues with the very next batch. Test, validation and
    prediction run through everything in order, unless asked to shuffle.

    Args:
        batch_size: images per batch and device.
        eval_batch_size: the same for validation, test and prediction; None takes ``batch_size``.
        train: config of the training images; None where there are none.
        validation: likewise; without it Lightning does not validate.
        test: likewise; what representations and scores are computed from.
        predict: likewise.
        wrap: put each data set into a plain ``WrappedDataset``.
        num_workers: loader processes. None: none for data sets made in memory, else the processors that are
            left, at most 4.
        shuffle_test_loader: shuffle test images (scores need them in order).
        use_worker_init_fn: seed numpy and Python in each loader process.
        shuffle_val_dataloader: shuffle validation images.
        shuffle_train_loader: False trains in the data set's order.
        seed: of the training order; None takes the run's (``seed_everything``), else 0. A checkpoint keeps it.

    Raises:
        ConfigError: batch size or worker number out of range.
    """

    def __init__(
        self,
        batch_size: int,
        train: Mapping[str, Any] | None = None,
        validation: Mapping[str, Any] | None = None,
        test: Mapping[str, Any] | None = None,
        predict: Mapping[str, Any] | None = None,
        wrap: bool = False,
        num_workers: int | None = None,
        shuffle_test_loader: bool = False,
        use_worker_init_fn: bool = False,
        shuffle_val_dataloader: bool = False,
        shuffle_train_loader: bool = True,
        seed: int | None = None,
        eval_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        for name, size in (("batch_size", batch_size), ("eval_batch_size", eval_batch_size)):
            if not isinstance(size, int) or size < 1:
                raise ConfigError(f"data.params.{name} must be a whole number, at least 1; found {size!r}")
        if num_workers is not None and (not isinstance(num_workers, int) or num_workers < 0):
            raise ConfigError(
                f"data.params.num_workers must be a whole number, at least 0, or null; found {num_workers!r}"
            )
        sections = {"train": train, "validation": validation, "test": test, "predict": predict}
        self.dataset_configs = {name: config for name, config in sections.items() if config is not None}
        self.datasets: dict[str, Any] = {}
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.wrap = wrap
        self.num_workers = num_workers
        self.use_worker_init_fn = use_worker_init_fn
        self.shuffle_train_loader = shuffle_train_loader
        self.shuffle_test_loader = shuffle_test_loader
        self.shuffle_val_dataloader = shuffle_val_dataloader
        if validation is None:
            self.val_dataloader = super().val_dataloader  # unseen by Lightning, which then does not validate
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed

    def setup(self, stage: str | None = None) -> None:
        """Build the data sets of a stage ("fit", "validate", "test", "predict"; None builds all)."""
        wanted = self.dataset_configs if stage is None else _SECTIONS_OF_STAGE[stage]
        for name in wanted:
            if name in self.dataset_configs and name not in self.datasets:
                dataset = instantiate_from_config(self.dataset_configs[name])
                self.datasets[name] = WrappedDataset(dataset) if self.wrap else dataset

    def _dataset(self, name: str) -> Any:
        if name not in self.dataset_configs:
            raise ConfigError(
                f"data.params.{name} is missing: add a {{target, params}} entry for the {name} images "
                f"(found only: {', '.join(self.dataset_configs) or 'none'})"
            )
        if name not in self.datasets:
            stage = next(s for s, names in _SECTIONS_OF_STAGE.items() if name in names)
            self.setup(stage)
        return self.datasets[name]

    def _loader(self, dataset: Any, loader: type[DataLoader] = DataLoader, **options: Any) -> DataLoader:
        workers = self.num_workers
        if workers is None:
            in_memory = getattr(dataset, "in_memory", False)
            workers = 0 if in_memory else max(0, min(_MOST_WORKERS, usable_cpus() - 1))
        options.setdefault("batch_size", self.eval_batch_size)
        return loader(
            dataset,
            num_workers=workers,
            collate_fn=collate,
            worker_init_fn=seed_worker if self.use_worker_init_fn else None,
            pin_memory=torch.cuda.is_available(),
            **options,
        )

    def train_dataloader(self) -> DataLoader:
        """Training batches from where the trainer stands.

        Raises:
            ConfigError: no ``train`` section, or fewer images than one batch on every device.
        """
        dataset = self._dataset("train")
        world_size = self.trainer.world_size if self.trainer else 1
        if len(dataset) < self.batch_size * world_size:
            devices = f" on each of {world_size} devices" if world_size > 1 else ""
            raise ConfigError(
                f"data.params.train holds {len(dataset)} images, fewer than one batch of {self.batch_size}"
                f"{devices}; set data.params.batch_size to at most {len(dataset) // world_size} or use more images"
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
        return self._loader(dataset, _PlaceKeepingLoader, sampler=sampler, batch_size=self.batch_size)

    def val_dataloader(self) -> DataLoader:
        """Validation batches in order."""
        return self._loader(self._dataset("validation"), shuffle=self.shuffle_val_dataloader)

    def test_dataloader(self) -> DataLoader:
        """All test batches in order, so that row i of what is computed from them is image i."""
        return self._loader(self._dataset("test"), shuffle=self.shuffle_test_loader)

    def predict_dataloader(self) -> DataLoader:
        """All prediction batches in order."""
        return self._loader(self._dataset("predict"), shuffle=False)

    def batches_per_epoch(self) -> int:
        """Training batches per epoch and device, ``limit_train_batches`` of the trainer included."""
        world_size = self.trainer.world_size if self.trainer else 1
        batches = -(-(len(self._dataset("train")) // world_size) // self.batch_size)
        limit = self.trainer.limit_train_batches if self.trainer else None
        if isinstance(limit, float):
            return int(batches * limit)
        return batches if limit is None else min(batches, limit)

    def _batches_trained(self) -> int:
        """Batches whose training step is done, over all epochs: neither prefetched nor interrupted ones count.

        ``processed`` rather than ``completed``: callbacks save checkpoints between the two.
        """
        return self.trainer.fit_loop.epoch_loop.batch_progress.total.processed if self.trainer else 0

    def _position(self) -> tuple[int, int]:
        return divmod(self._batches_trained(), max(1, self.batches_per_epoch()))

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of the data: the seed of the order, and what its meaning rests on."""
        state = {"seed": self.seed, "batch_size": self.batch_size, "batches_trained": self._batches_trained()}
        if "train" in self.datasets:
            state["batches_per_epoch"] = self.batches_per_epoch()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the order of the checkpoint; warn where the batches cannot be the same."""
        self.seed = state["seed"]
        found = {"batch_size": self.batch_size}
        if "train" in self.dataset_configs:
            found["batches_per_epoch"] = self.batches_per_epoch()
        for key, value in found.items():
            if key in state and state[key] != value:
                logger.warning(
                    "the checkpoint was trained with %s = %s, now it is %s: training goes on, but not "
                    "with the batches the uninterrupted run would have seen",
                    key,
                    state[key],
                    value,
                )
