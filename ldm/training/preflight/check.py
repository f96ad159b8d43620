"""The checks of ``-t`` before training, in their order."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator, Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.seed import isolate_rng
from torch.utils.data import DataLoader

from ldm.config.loading import Config
from ldm.data.collate import collate
from ldm.data.module import DataModuleFromConfig
from ldm.data.traits import vocabulary_of
from ldm.diffusion.samplers import Sampler
from ldm.errors import NotPreparedError, in_one_line
from ldm.legacy import sampling_options
from ldm.models.contracts import ChecksData, ChecksRun, Tokenizes
from ldm.models.diffusion.base import DDPM
from ldm.models.diffusion.latent import has_test_pass
from ldm.models.inputs import check_item
from ldm.training.callbacks.image_logger import ImageLogger
from ldm.training.callbacks.monitor_check import check_monitors
from ldm.training.callbacks.speed_bar import SpeedBar
from ldm.training.plan import Plan
from ldm.training.preflight.resources import check_epoch, check_memory, warn_of_full_disk
from ldm.training.preflight.trace import Batch, trace_steps
from ldm.util import ConfigError, UserError

logger = logging.getLogger(__name__)

_KEY = re.compile(r"((model|data|lightning)(\.\w+)+):")


def preflight(plan: Plan, trainer: pl.Trainer, model: pl.LightningModule, data: pl.LightningDataModule) -> None:
    """Check that a run can be trained and tested; nothing is written, and random states are kept.

    The data sets that are built here are used by the run. Data modules of other classes are not built.

    Raises:
        ConfigError, UserError: the run would fail.
    """
    config, batches = plan.config, {}
    model.trainer = trainer  # own hooks for batches may use it
    if isinstance(data, DataModuleFromConfig):
        data.trainer = trainer  # as Lightning sets it; limits and devices determine the batches of an epoch
        for name in filter(data.dataset_configs.__contains__, ("train", "validation")):  # in Lightning's order
            with _located(config, f"data.params.{name}"):
                data.dataset(name)  # may draw random numbers, as without this check
        with isolate_rng(torch.cuda.is_initialized()):
            batches = _check_data(config, trainer, model, data)
            with _located(config):
                data.train_dataloader()  # raises without a whole batch
                check_epoch(trainer, data.batches_per_epoch())
                _check_callbacks(trainer, model, data)
        if isinstance(model, DDPM):
            _check_samplers(config, trainer, model, "test" in data.dataset_configs)
    with isolate_rng(torch.cuda.is_initialized()), _located(config):
        traced = trace_steps(model, batches)
    check_monitors(trainer, model, traced.names)
    check_memory(trainer, model, traced.activation_bytes)
    bar = trainer.progress_bar_callback
    if isinstance(bar, SpeedBar) and traced.operations is not None:
        bar.operations_per_image = traced.operations / batches["train"].size
    warn_of_full_disk(trainer, model)


@contextlib.contextmanager
def _located(config: Config, key: str = "") -> Iterator[None]:
    """Add the file, and a dotted key, to errors without it; with a key, an error of own code becomes one line."""
    try:
        yield
    except (ConfigError, UserError) as error:
        text = str(error) if str(error).startswith(key) else f"{key}: {error}"
        found = _KEY.match(text)
        if not key and found is None:
            raise
        kind = UserError if isinstance(error, UserError) else ConfigError
        raise kind(f"{config.origin(found[1] if found else key)}: {text}") from error
    except Exception as error:
        if not key:
            raise
        raise config.error(key, in_one_line(error)) from error


def _check_data(
    config: Config, trainer: pl.Trainer, model: pl.LightningModule, data: DataModuleFromConfig
) -> dict[str, Batch]:
    """Build the other data sets and read the first images of all; return these, and the size of whole batches.

    Data sets that the run does not use are released, and their errors are warnings.
    """
    batches: dict[str, Batch] = {}
    used = {"train", "validation"} | ({"test"} if has_test_pass(model, trainer.callbacks) else set())
    for name in data.dataset_configs:
        try:
            with _located(config, f"data.params.{name}"):
                dataset = data.dataset(name)
                batch = _first_batch(dataset, model)
                _check_words(dataset, batch, model)
        except (ConfigError, UserError) as error:
            if name in used:
                raise
            logger.warning("%s. Training is not affected", error)
        else:
            size = data.batch_size if name == "train" else min(data.eval_batch_size, len(dataset))
            batches[name] = Batch(batch, min(2, len(dataset)), size)
        if name not in used:
            data.datasets.pop(name, None)
    return batches


def _first_batch(dataset: Any, model: pl.LightningModule) -> Mapping[str, Any]:
    """Return a batch of the first two images, read as the loaders do and checked."""
    if not len(dataset):
        raise UserError("expected images, got an empty data set")
    check_item(dataset[0], getattr(model, "first_stage_key", getattr(model, "image_key", None)))
    rows = list(range(min(2, len(dataset))))
    batch = next(iter(DataLoader(dataset, batch_size=len(rows), sampler=rows, collate_fn=collate)))
    return model.on_before_batch_transfer(batch, 0)


def _check_words(dataset: Any, batch: Mapping[str, Any], model: pl.LightningModule) -> None:
    """Check attributes and words of a data set, where the model or its text encoder has a closed vocabulary."""
    if isinstance(model, ChecksData):
        model.check_data(dataset)
    vocabulary = vocabulary_of(dataset)
    if vocabulary is not None and "text" in batch:
        for stage in model.modules():
            if isinstance(stage, Tokenizes):
                stage.tokenize(vocabulary.all_words())


def _check_callbacks(trainer: pl.Trainer, model: pl.LightningModule, data: DataModuleFromConfig) -> None:
    if trainer.fast_dev_run:
        return
    for callback in trainer.callbacks:
        if isinstance(callback, ChecksRun):
            try:
                callback.check_run(data, model)
            except NotPreparedError as error:  # checked again before the first step
                logger.debug("%s: not checked before training: %s", type(callback).__name__, error)


def _check_samplers(config: Config, trainer: pl.Trainer, model: DDPM, is_tested: bool) -> None:
    """Compare the samplers of pictures and scores with the schedule of the model."""
    samplers, settings = {"model.params.sampler": model.default_sampler}, model.picture_steps_and_eta
    for callback in trainer.callbacks:
        given = vars(callback).get("sampler")
        if isinstance(callback, ImageLogger) and (pictures := sampling_options(callback.log_images_kwargs, *settings)):
            key = "lightning.callbacks.image_logger.params.log_images_kwargs.sampler"
            samplers[key] = model.choose_sampler(pictures.get("sampler"), *settings)
        elif isinstance(given, Sampler) and is_tested:
            samplers[f"lightning.callbacks: {type(callback).__name__}.sampler"] = given
    for key, sampler in samplers.items():
        if type(sampler).sample is Sampler.sample:  # others may have other rules
            with _located(config, key):
                sampler.check(model.schedule, sampler.timesteps(model.num_timesteps))
