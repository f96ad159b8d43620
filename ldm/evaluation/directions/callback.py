"""The direction bench at the end of the test pass of a model with directions: numbers as JSON, tables and pictures."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from rich.console import Console

from ldm.data.options import require_count
from ldm.data.traits import unwrap, vocabulary_of
from ldm.diffusion.samplers import DDIMSampler, Sampler, build_sampler
from ldm.evaluation.directions.finders import Finder, GivenDirections, build_finder
from ldm.evaluation.directions.measure import Bench, BenchPlan, Meters
from ldm.evaluation.directions.report import BenchReport
from ldm.evaluation.sampling.request import describe_sampler
from ldm.evaluation.test_pass import TestPassCallback
from ldm.evaluation.units.names import clip_reader
from ldm.models.contracts import HasAttributes, HasDirections, missing_members, require
from ldm.models.diffusion.methods.noiseclr.directions import DirectionSet
from ldm.models.inputs import some_images
from ldm.models.judge import load_judge
from ldm.modules.encoders.modules import FrozenClipImageEmbedder, FrozenCLIPTextEmbedder
from ldm.modules.lpips import AlexLPIPS
from ldm.ranges import Count, Finite, Fraction, Seed
from ldm.runs.records import write_json
from ldm.util import ConfigError, UserError

logger = logging.getLogger(__name__)

_SECONDS = "direction_seconds"  # entry of checkpoints: how long the directions were trained
_LPIPS_SIZE = 31  # least pixels a side for AlexNet
_MEMORY = (
    "peak resident memory of the process since its start, when the finder had ended",
    "peak memory allocated on the device while finding",
)


class DirectionBench(TestPassCallback):
    """Measures the effects of the directions of a model and of other finders.

    See ``ldm.evaluation.directions.measure`` for the protocol and ``ldm.models.contracts.HasDirections`` for the
    models. The files are ``<run>/direction_bench/<step>.json``, ``<step>_<finder>.png`` (direction x factor),
    ``<step>_overview.png``, and ``<run>/images/test/directions_<finder>_<...>.png`` (edits).

    ``results.json`` receives ``<finder>_owned_factors``, ``<finder>_leakage``, ``<finder>_mean_margin``, and
    ``owned_factors`` and ``leakage`` by finder.

    Args:
        judge: checkpoint or run folder of an ``AttributeJudge``; without one, no factors are reported.
        clip: CLIP that names directions, see ``find_clip``; without one, there are no names.
        finders: see ``build_finder``; a mapping gives them names. ``RandomRows`` is the control.
        num_samples: base images, N.
        strengths: grid of strengths.
        sampler: a deterministic sampler, see ``build_sampler``; by default DDIM with 12 steps.
        batch_size: images sampled at once.
        seed: seed of images, noise and finders.
        own_threshold, leakage_threshold: see ``BenchPlan``.
        num_directions: directions of the other finders; by default as many as the model has.
        num_images: test images for the finders.
        columns: samples in the pictures.

    Raises:
        ConfigError: an option is out of range, or a finder is unknown.
    """

    def __init__(
        self,
        judge: str | None = None,
        clip: str | None = None,
        finders: Sequence[Any] | Mapping[str, Any] = ("noiseclr", "h_space", "jacobian", "random"),
        num_samples: Count = 32,
        strengths: Sequence[Finite] = (-4.0, -2.0, -1.0, 1.0, 2.0, 4.0),
        sampler: Sampler | Mapping[str, Any] | str | None = None,
        batch_size: Count = 128,
        seed: Seed = 0,
        own_threshold: Fraction = 0.5,
        leakage_threshold: Fraction = 0.3,
        num_directions: Count | None = None,
        num_images: Count = 256,
        columns: Count = 8,
    ) -> None:
        self.judge_path, self.clip, self.finders = judge, clip, finders
        self.num_directions, self.num_images, self.columns = num_directions, num_images, columns
        self._seconds: float | None = None  # None: unknown
        self._began = time.monotonic()
        self.sampler = DDIMSampler(num_steps=12) if sampler is None else build_sampler(sampler)
        options = (tuple(map(float, strengths)), batch_size, seed, own_threshold, leakage_threshold)
        self._plan = BenchPlan(num_samples, self.sampler, *options)
        require_count("num_samples", num_samples, 4)
        self._build_finders(DirectionSet(torch.zeros(0, 1), "condition", (), "noiseclr"))  # raises for unknown ones

    def check_run(self, data: Any, model: pl.LightningModule) -> None:
        """Check before training that the model has directions and that the judge exists."""
        require(model, HasDirections, "direction bench")
        if "test" in data.dataset_configs and self.judge_path and vocabulary_of(data.dataset("test")) is not None:
            load_judge(self.judge_path)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock; see also the base class."""
        super().on_fit_start(trainer, pl_module)
        self._began = time.monotonic() - (self._seconds or 0.0)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Store how long the directions were trained."""
        checkpoint[_SECONDS] = self._seconds = round(time.monotonic() - self._began, 1)

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Read how long the directions were trained; see also the base class."""
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        self._seconds = checkpoint.get(_SECONDS)

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        """Check before the test pass that the bench can run.

        Raises:
            UserError: the judge or CLIP is missing or does not fit, the data set has no words, the directions contain
                NaN or belong to another model, or a finder cannot find as many.
        """
        require(pl_module, HasDirections, "direction bench")
        dataset: Any = self.test_loader(trainer).dataset
        denoiser = pl_module.denoiser
        self._learned = pl_module.directions
        self._finders = self._build_finders(self._learned)
        self._count = self.num_directions or len(self._learned)
        for finder in self._finders.values():
            finder.check(denoiser, min(self.num_images, len(dataset)), self._count)
        self._texts = captions(dataset, denoiser, self._plan.num_samples, self._plan.seed)
        with torch.no_grad():
            z = torch.zeros(1, *denoiser.latent_shape, device=pl_module.device)
            size = tuple(denoiser.decode(z).shape[2:])
        self._meters, self._lpips = build_meters(self.judge_path, self.clip, dataset, size, pl_module.device)

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        """Find, sample, measure and write, in the first process only."""
        if trainer.fast_dev_run or not trainer.is_global_zero:
            return
        with torch.inference_mode(False), torch.no_grad():  # the Jacobian needs tensors with gradients
            self._run(trainer, pl_module)

    def _run(self, trainer: Any, pl_module: Any) -> None:
        device, seed = pl_module.device, self._plan.seed
        bench = Bench(pl_module.denoiser, self._plan, self._meters, self._texts)
        images = some_images(self.test_loader(trainer).dataset, self.num_images, seed, pl_module.first_stage_key)
        images, measured, costs = images.to(device), {}, {}
        for name, finder in self._finders.items():
            logger.info("direction bench: %s", name)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            began = time.monotonic()
            directions = finder.find(pl_module.denoiser, images, self._count, seed)
            seconds = round(time.monotonic() - began, 1)
            if isinstance(finder, GivenDirections):
                seconds = self._seconds if directions is self._learned else None
            costs[name] = {"seconds": seconds, "peak_memory_bytes": peak_memory(device)}
            measured[name] = bench.measure(directions)
        vocabulary, run_dir, progress = self._meters.vocabulary, self.run_dir(trainer), self.progress(trainer)
        attributes = () if vocabulary is None else vocabulary.factor_names
        report = BenchReport(self._plan, attributes if self._meters.judge else (), measured, costs, attributes)
        path = run_dir / "direction_bench" / f"{progress.step}.json"
        settings = {"judge": self.judge_path, "clip": self.clip, "seed": seed, "num_images": len(images)}
        settings |= {"sampler": describe_sampler(self.sampler), "lpips": self._lpips}
        settings["memory"] = _MEMORY[device.type == "cuda"]
        write_json(path, {**report.to_dict(), **settings, **progress._asdict()})
        self.publish(trainer, **report.figures())
        stamp = f"gs-{progress.step:06d}_e-{progress.epoch:06d}_b-000000"
        report.draw(bench, path, run_dir / "images" / "test", stamp, self.columns)
        report.show(Console())
        logger.info("direction bench: %s", path)

    def _build_finders(self, learned: DirectionSet) -> dict[str, Finder]:
        named = dict(self.finders) if isinstance(self.finders, Mapping) else {}
        built = [build_finder(each, learned) for each in named.values() or self.finders]
        names = [str(name) for name in named] or [finder.name for finder in built]
        wrong = [name for name in names if not name.isidentifier() or names.count(name) > 1]
        if wrong or not names:
            raise ConfigError(
                f"finders: expected different names of letters, digits and _, got {wrong[:1] or 'none'}. Use a mapping "
                "of names to finders"
            )
        return dict(zip(names, built))


def captions(dataset: Any, denoiser: Any, count: int, seed: int) -> list[str] | None:
    """Return captions of the attributes of random images; None if the data set or the model has no texts."""
    dataset = unwrap(dataset)
    if vocabulary_of(dataset) is None or missing_members(dataset, HasAttributes):
        return None
    rows = np.random.default_rng(seed).choice(dataset.rows, count, replace=count > len(dataset.rows))
    vocabulary = dataset.vocabulary
    texts = [vocabulary.caption(phrases) for phrases in vocabulary.texts(dataset.attribute_values(rows))]
    try:
        denoiser.condition_from_texts(texts[:1])
    except UserError as error:
        logger.info("direction bench: images are sampled without a condition (%s)", error)
        return None
    return texts


def build_meters(
    judge_path: str | None, clip: str | None, dataset: Any, size: tuple[int, ...], device: torch.device
) -> tuple[Meters, str]:
    """Return judge, CLIP and LPIPS for images of H, W = ``size``, and the network of LPIPS or why it is missing."""
    vocabulary, judge, reader, lpips = vocabulary_of(dataset), None, None, None
    if vocabulary is None and (judge_path or clip):
        raise UserError(
            f"direction bench: expected a test data set with a vocabulary, got {type(unwrap(dataset)).__name__}. Set "
            "data.params.test to a data set with words, or judge and clip of DirectionBench to null"
        )
    if vocabulary is not None and judge_path:
        judge = load_judge(judge_path).to(device)
        expected = size, [len(values) for values in vocabulary.value_to_word]
        found = (judge.image_size, judge.image_size), list(judge.sizes)
        if found != expected:
            raise UserError(
                f"{judge_path}: expected a judge of images of {expected[0]} pixels and of factors with {expected[1]} "
                f"values, got {found[0]} and {found[1]}. Use a judge that was trained on the images of this model"
            )
    if vocabulary is not None and clip:
        text_encoder, image_encoder = FrozenCLIPTextEmbedder(clip), FrozenClipImageEmbedder(clip)
        reader = clip_reader(text_encoder.to(device), image_encoder.to(device), vocabulary)
    note = f"not computed: images of {size} pixels are smaller than {_LPIPS_SIZE}"
    if min(size) >= _LPIPS_SIZE:
        try:
            lpips, note = AlexLPIPS().to(device), "AlexNet"
        except UserError as error:
            note = f"not computed: {error}"
    return Meters(vocabulary, judge and judge.predict_values, reader, lpips), note


def peak_memory(device: torch.device) -> int | None:
    """Return the most bytes in use so far, see ``_MEMORY``; None where the system does not report it (Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
