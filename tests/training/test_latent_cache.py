"""Cache of the latents of training images: equal losses, keys by content, builds that continue, and the rules."""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image

from ldm.data.dataset import ImageDataset
from ldm.data.module import DataModuleFromConfig
from ldm.models.diffusion.latent import LatentDiffusion
from ldm.models.stored_latents import ENTRY
from ldm.training.callbacks import latent_cache
from ldm.training.callbacks.image_logger import ImageLogger
from ldm.training.callbacks.latent_cache import LatentCache
from ldm.training.callbacks.step_seed import StepSeed
from ldm.util import ConfigError, UserError

SIZE, COUNT, BATCH = 16, 24, 8
NETWORK = {"z_channels": 4, "resolution": SIZE, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 2]}
NETWORK |= {"num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0}
IDENTITY = {"target": "torch.nn.Identity"}
STAGES = {
    "kl": ("AutoencoderKL", {"ddconfig": {**NETWORK, "double_z": True}, "embed_dim": 4, "lossconfig": IDENTITY}),
    "vq": (
        "VQModelInterface",
        {"ddconfig": {**NETWORK, "double_z": False}, "embed_dim": 4, "n_embed": 16, "lossconfig": IDENTITY},
    ),
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "clip-disdiff"


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder with random pictures."""
    draws = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for number in range(COUNT):
        pixels = draws.integers(256, size=(SIZE, SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{number:02}.png")
    return tmp_path / "pictures"


def build_model(kind: str = "kl", condition: Any = "__is_unconditional__", **options: Any) -> LatentDiffusion:
    """A small model with random weights, the same in every call."""
    torch.manual_seed(0)
    name, params = STAGES[kind]
    network = {"image_size": 8, "in_channels": 4, "out_channels": 4, "model_channels": 32, "channel_mult": [1]}
    network |= {"num_res_blocks": 1, "attention_resolutions": [], "num_heads": 1}
    model = LatentDiffusion(
        first_stage_config={"target": f"ldm.models.autoencoder.{name}", "params": params},
        cond_stage_config=condition,
        unet_config={"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": network},
        image_size=8,
        channels=4,
        scale_by_std=True,
        use_ema=False,
        **options,
    )
    model.learning_rate = 1e-3
    return model


def build_data(folder: Path, **options: Any) -> DataModuleFromConfig:
    """A data module of pictures; the validation images are some of the training images."""
    target = "ldm.data.formats.folder.ImageFolder"
    train = {"target": target, "params": {"path": str(folder), "image_size": SIZE, **options}}
    validation = {"target": target, "params": {"path": str(folder), "image_size": SIZE, "limit": 10}}
    return DataModuleFromConfig(BATCH, train=train, validation=validation, num_workers=0, seed=0)


class Losses(pl.Callback):
    """Keeps the losses, and the entries of the batches."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self.entries: set[str] = set()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, *_: Any):
        self.values.append(outputs["loss"].item())
        self.entries |= set(batch)


def train(
    model: LatentDiffusion,
    data: DataModuleFromConfig,
    folder: Path,
    use: Any,
    steps: int = 6,
    checkpoint: str | None = None,
    callbacks: Sequence[pl.Callback] = (),
    **options: Any,
) -> tuple[Losses, dict[str, float], pl.Trainer]:
    """Train for some steps; return losses of training and validation, and the trainer."""
    losses = Losses()
    trainer = pl.Trainer(
        max_steps=steps,
        callbacks=[StepSeed(0), LatentCache(use), losses, *callbacks],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(folder),
        **options,
    )
    trainer.fit(model, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    figures = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    return losses, figures, trainer


def files(cache: Path) -> list[str]:
    """Names in the cache folder."""
    return sorted(path.name for path in cache.glob("*")) if cache.exists() else []


@pytest.mark.parametrize("kind", ["kl", "vq"])
@pytest.mark.parametrize("is_resident", [False, True])
def test_losses_and_scale_are_those_without_a_cache(
    kind: str, is_resident: bool, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latent_cache, "free_memory", lambda device: 10**9 if is_resident else 0)
    plain, cached = build_model(kind), build_model(kind)
    expected, expected_val, _ = train(plain, build_data(pictures), tmp_path, use=False)
    losses, val, _ = train(cached, build_data(pictures), tmp_path, use=True)
    assert ENTRY in losses.entries and ENTRY not in expected.entries
    np.testing.assert_allclose(losses.values, expected.values, rtol=1e-4)
    assert val and val == pytest.approx(expected_val, rel=1e-4)
    torch.testing.assert_close(cached.scale_factor, plain.scale_factor, rtol=1e-5, atol=0)
    assert cached.stored_latents is None  # released


def test_a_resumed_run_repeats_the_uninterrupted_one(pictures: Path, tmp_path: Path) -> None:
    whole, _, _ = train(build_model(), build_data(pictures), tmp_path, use=True, steps=6)
    first, _, trainer = train(build_model(), build_data(pictures), tmp_path, use=True, steps=4)
    trainer.save_checkpoint(tmp_path / "step4.ckpt")
    rest, _, _ = train(
        build_model(), build_data(pictures), tmp_path, use=True, steps=6, checkpoint=str(tmp_path / "step4.ckpt")
    )
    assert first.values + rest.values == whole.values


def test_the_file_is_shared_and_named_by_weights_and_pixels(pictures: Path, tmp_path: Path, cache: Path) -> None:
    def build(model: LatentDiffusion, **options: Any) -> list[str]:
        train(model, build_data(pictures, **options), tmp_path, use=True, steps=1)
        return files(cache)

    both = build(build_model())
    assert len(both) == 2  # training and validation images
    assert build(build_model()) == both
    assert build(build_model(), repeat=2) == both  # the same images
    changed = build_model()
    with torch.no_grad():
        next(changed.first_stage_model.parameters()).view(-1)[3] += 1e-6
    assert len(build(changed)) == 4
    assert len(build(build_model(), limit=20)) == 5
    status, path = os.stat(pictures / "03.png"), pictures / "03.png"
    pixels = np.array(Image.open(path))
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert len(build(build_model())) > 5


def test_a_file_with_other_latents_is_replaced(
    pictures: Path, tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The code of a first stage may change, and a file may be damaged."""
    expected, _, _ = train(build_model(), build_data(pictures), tmp_path, use=True)
    paths = sorted(cache.glob("latents-*.npy"), key=lambda path: path.stat().st_size)
    np.save(paths[-1], np.load(paths[-1]) + 1)
    paths[0].write_bytes(paths[0].read_bytes()[:500])
    losses, _, _ = train(build_model(), build_data(pictures), tmp_path, use=True)
    assert losses.values == expected.values
    assert "Building them again" in caplog.text and "truncated" in caplog.text


def _train_once(pictures: Path, folder: Path) -> None:
    losses, _, _ = train(build_model(), build_data(pictures), folder, use=True, steps=2)
    np.save(folder / "losses.npy", losses.values)


@pytest.mark.slow
def test_two_processes_build_one_file(pictures: Path, tmp_path: Path, cache: Path) -> None:
    context = multiprocessing.get_context("spawn")
    folders = [tmp_path / name for name in ("first", "second")]
    for folder in folders:
        folder.mkdir()
    children = [context.Process(target=_train_once, args=(pictures, folder)) for folder in folders]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0]
    first, second = (np.load(folder / "losses.npy").tolist() for folder in folders)
    assert first == second
    assert len(files(cache)) == 2


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"do_augment": True}, r"do_augment .*changes the images at random"),
        ({"augment": {"target": "torch.nn.Identity"}}, "augment .*changes the images at random"),
        ({"fit": "random_crop"}, "fit: random_crop .*changes the images at random"),
    ],
)
def test_images_that_change_are_not_stored(
    options: dict[str, Any], reason: str, pictures: Path, tmp_path: Path, cache: Path
) -> None:
    data = build_data(pictures, **options)
    with pytest.raises(ConfigError, match=f"latent_cache.params.use: expected auto or false, because {reason}"):
        LatentCache(True).check_run(data, build_model())
    LatentCache("auto").check_run(data, build_model())
    losses, _, _ = train(build_model(), data, tmp_path, use="auto", steps=2)
    assert ENTRY not in losses.entries and not files(cache)


def test_models_without_weights_of_a_first_stage_are_not_stored(pictures: Path) -> None:
    model = build_model()
    model.first_stage_model = torch.nn.Identity()
    with pytest.raises(ConfigError, match="Identity has no weights, got true. Set it to auto"):
        LatentCache(True).check_run(build_data(pictures), model)

    class OwnInput(LatentDiffusion):
        def get_input(self, batch: Any) -> torch.Tensor:
            return super().get_input(batch)

    model = build_model()
    model.__class__ = OwnInput
    with pytest.raises(ConfigError, match="OwnInput does not take stored latents"):
        LatentCache(True).check_run(build_data(pictures), model)


@pytest.mark.parametrize(
    ("least", "steps", "is_built"),
    [
        (20_000, 7, False),
        (0, 5, False),  # 40 images drawn of 24
        (0, 6, True),  # 48
    ],
)
def test_auto_builds_a_file_if_it_pays_off(
    least: int, steps: int, is_built: bool, pictures: Path, tmp_path: Path, cache: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(latent_cache, "_LEAST", least)
    losses, _, _ = train(build_model(), build_data(pictures), tmp_path, use="auto", steps=steps)
    assert (ENTRY in losses.entries) == is_built == bool(files(cache))
    train(build_model(), build_data(pictures), tmp_path, use=True, steps=1)
    losses, _, _ = train(build_model(), build_data(pictures), tmp_path, use="auto", steps=1)
    assert ENTRY in losses.entries  # one that exists is used


def test_a_full_disk_or_a_folder_that_cannot_be_written(
    pictures: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(latent_cache, "_LEAST", 0)
    cache.parent.mkdir()
    cache.write_text("a file in place of the folder")
    with pytest.raises(UserError, match="could not be written .*XDG_CACHE_HOME"):
        train(build_model(), build_data(pictures), tmp_path, use=True)
    expected, _, _ = train(build_model(), build_data(pictures), tmp_path, use=False)
    with caplog.at_level(logging.WARNING):
        losses, _, _ = train(build_model(), build_data(pictures), tmp_path, use="auto")
    assert losses.values == expected.values
    assert sum("latents are not stored" in message for message in caplog.messages) == 1


def test_a_first_stage_that_draws_its_latents_is_refused(pictures: Path, tmp_path: Path) -> None:
    model = build_model()
    encode = model.first_stage_model.encode
    model.first_stage_model.encode = lambda x: encode(x).sample()
    with pytest.raises(UserError, match="expected equal latents for equal rows.*DiagonalGaussian"):
        train(model, build_data(pictures), tmp_path, use=True)
    model.first_stage_model.encode = lambda x: (encode(x), None)
    with pytest.raises(UserError, match="expected a float tensor or a DiagonalGaussian, got tuple"):
        train(model, build_data(pictures), tmp_path, use=True)


class OwnImages(ImageDataset):
    """Images of own code that differ in every call."""

    def images(self, rows: np.ndarray) -> np.ndarray:
        return np.random.default_rng().integers(256, size=(len(rows), SIZE, SIZE, 3), dtype=np.uint8)


def test_own_images_that_differ_in_every_call_are_refused(pictures: Path, tmp_path: Path, cache: Path) -> None:
    data = build_data(pictures)
    data.datasets["train"] = OwnImages(np.arange(COUNT))
    with pytest.raises(UserError, match="OwnImages.images and .*got others in a second call"):
        train(build_model(), data, tmp_path, use=True)
    assert not [name for name in files(cache) if name.startswith("latents")]


def test_auto_leaves_most_of_the_disk(
    pictures: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(latent_cache, "_LEAST", 0)
    monkeypatch.setattr(latent_cache, "free_bytes", lambda folder: 9 * 4 * COUNT * 8 * 8 * 8)
    losses, _, _ = train(build_model(), build_data(pictures), tmp_path, use="auto")
    assert ENTRY not in losses.entries and "expected at most 10% of the 0.0 GB" in caplog.text
    losses, _, _ = train(build_model(), build_data(pictures), tmp_path, use=True)
    assert ENTRY in losses.entries


def test_images_that_are_not_used_are_not_read(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures read those that they show."""
    expected, _, _ = train(build_model(), build_data(pictures), tmp_path / "a", use=False)
    monkeypatch.setattr(Losses, "__module__", "ldm.losses")
    shown: list[torch.Tensor] = []

    def log_images(self: Any, batch: Any, **_: Any) -> dict[str, torch.Tensor]:
        shown.append(batch["image"])
        torch.testing.assert_close(
            batch["image"], torch.from_numpy(data.dataset("train").images(batch["index"].numpy()))
        )
        return {}

    monkeypatch.setattr(LatentDiffusion, "log_images", log_images)
    data = build_data(pictures)
    pictures_logger = ImageLogger(batch_frequency=2, max_images=4)
    losses, _, _ = train(build_model(), data, tmp_path / "b", use=True, callbacks=[pictures_logger])
    assert "image" not in losses.entries and "image" in expected.entries
    np.testing.assert_allclose(losses.values, expected.values, rtol=1e-4)
    assert len(shown) >= 4  # of training and validation
    assert "image" in data.dataset("train")[0] and not data.views
    own = build_model()
    own.__class__ = type("Own", (LatentDiffusion,), {})
    for model, needs_images in (
        (build_model(), False),
        (build_model(condition=IDENTITY, conditioning_key="adm"), True),
        (build_model(condition=IDENTITY, conditioning_key="adm", cond_stage_key="class_label"), False),
        (own, True),
    ):
        assert model.needs_images == needs_images


def test_loader_processes_read_the_file(pictures: Path, tmp_path: Path) -> None:
    expected, _, _ = train(build_model(), build_data(pictures), tmp_path, use=True, steps=2)
    data = build_data(pictures)
    data.num_workers = 1
    losses, _, _ = train(build_model(), data, tmp_path, use=True, steps=2)
    assert losses.values == expected.values
