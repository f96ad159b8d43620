"""Resuming at any checkpoint continues with the very next batch."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, ModelCheckpoint

from ldm.data.module import DataModuleFromConfig

SIZE, BATCH = 22, 4  # 6 batches per epoch, the last one short


class Numbers(torch.utils.data.Dataset):
    """Items that are their own index."""

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> dict:
        return {"index": index, "x": torch.tensor([float(index)])}


class Recorder(pl.LightningModule):
    """Writes down the images of each training step."""

    def __init__(self, manual: bool = False) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.automatic_optimization = not manual
        self.seen: list[list[int]] = []

    def training_step(self, batch: dict, batch_idx: int) -> torch.Tensor:
        self.seen.append(batch["index"].tolist())
        loss = self.layer(batch["x"]).mean()
        if not self.automatic_optimization:
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(loss, retain_graph=True)
                optimizer.step()
        return loss

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        pass

    def configure_optimizers(self):
        count = 1 if self.automatic_optimization else 2
        optimizers = [torch.optim.SGD(self.parameters(), lr=1e-3) for _ in range(count)]
        return optimizers[0] if count == 1 else (optimizers, [])


class StopDuring(Callback):
    """Interrupts in the midst of a batch, as Ctrl-C does."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_before_backward(self, trainer: pl.Trainer, module: pl.LightningModule, loss: torch.Tensor) -> None:
        if len(module.seen) == self.batch:
            raise RuntimeError("interrupted")


def fit(tmp_path, recorder=None, workers=0, ckpt=None, seed=5, callbacks=(), validation=False, **trainer_options):
    recorder = recorder or Recorder()
    config = {"target": f"{__name__}.Numbers"}
    data = DataModuleFromConfig(
        BATCH, train=config, validation=config if validation else None, num_workers=workers, seed=seed
    )
    options = {
        "max_epochs": 4,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
        "num_sanity_val_steps": 0,
    }
    checkpointing = any(isinstance(c, ModelCheckpoint) for c in callbacks)
    trainer = pl.Trainer(
        default_root_dir=tmp_path,
        callbacks=list(callbacks),
        enable_checkpointing=checkpointing,
        **(options | trainer_options),
    )
    try:
        trainer.fit(recorder, data, ckpt_path=ckpt)
    except RuntimeError as err:
        if "interrupted" not in str(err):
            raise
    return recorder.seen, trainer


def keep_every_step(tmp_path):
    return ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)


@pytest.mark.parametrize("step", [1, 3, 6, 7, 12, 17])
def test_resume_from_a_step_checkpoint(tmp_path, step):
    """Mid-epoch (3, 7, 17) and exactly at an epoch's last batch (6, 12)."""
    whole, _ = fit(tmp_path, callbacks=[keep_every_step(tmp_path)])
    assert len(whole) == 24
    rest, _ = fit(tmp_path, ckpt=tmp_path / f"step={step}.ckpt")
    assert rest == whole[step:]


@pytest.mark.parametrize("step", [4, 6])
def test_resume_with_worker_processes(tmp_path, step):
    """Batches prefetched by workers but not trained are read again."""
    whole, _ = fit(tmp_path, workers=2, max_epochs=2, callbacks=[keep_every_step(tmp_path)])
    rest, _ = fit(tmp_path, workers=2, max_epochs=2, ckpt=tmp_path / f"step={step}.ckpt")
    assert rest == whole[step:]


def test_resume_with_validation_in_between(tmp_path):
    options = {"validation": True, "val_check_interval": 2}
    whole, _ = fit(tmp_path, callbacks=[keep_every_step(tmp_path)], **options)
    for step in (2, 5, 6, 8):
        rest, _ = fit(tmp_path, ckpt=tmp_path / f"step={step}.ckpt", **options)
        assert rest == whole[step:], step


def test_resume_from_an_epoch_end_checkpoint(tmp_path):
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", every_n_epochs=1, save_top_k=-1, save_on_train_epoch_end=True)
    whole, _ = fit(tmp_path, callbacks=[keep])
    rest, _ = fit(tmp_path, ckpt=tmp_path / "epoch=1.ckpt")
    assert rest == whole[12:]


def test_an_interrupted_batch_is_trained_again(tmp_path):
    whole, _ = fit(tmp_path)
    before, trainer = fit(tmp_path, callbacks=[StopDuring(9)])
    assert len(before) == 9
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    rest, _ = fit(tmp_path, ckpt=tmp_path / "last.ckpt")
    assert rest == whole[8:]


def test_a_run_cut_by_max_steps_can_be_prolonged(tmp_path):
    whole, _ = fit(tmp_path, max_epochs=-1, max_steps=20)
    first, trainer = fit(tmp_path, max_epochs=-1, max_steps=8)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    rest, _ = fit(tmp_path, max_epochs=-1, max_steps=20, ckpt=tmp_path / "last.ckpt")
    assert first + rest == whole


def test_manual_optimization_with_two_optimizers(tmp_path):
    """global_step counts both optimizers; the order counts batches."""
    whole, trainer = fit(tmp_path, Recorder(manual=True), max_epochs=2, callbacks=[StopDuring(99)])
    first, trainer = fit(tmp_path, Recorder(manual=True), max_epochs=-1, max_steps=16)
    assert len(first) == 8
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    rest, _ = fit(tmp_path, Recorder(manual=True), max_epochs=-1, max_steps=24, ckpt=tmp_path / "last.ckpt")
    assert first + rest == whole


def test_limited_batches_and_accumulation(tmp_path):
    options = {"limit_train_batches": 4, "accumulate_grad_batches": 2, "max_epochs": 3}
    whole, _ = fit(tmp_path, callbacks=[keep_every_step(tmp_path)], **options)
    assert len(whole) == 12
    rest, _ = fit(tmp_path, ckpt=tmp_path / "step=3.ckpt", **options)
    assert rest == whole[6:]


def test_the_checkpoint_keeps_the_seed(tmp_path):
    whole, _ = fit(tmp_path, seed=5, callbacks=[keep_every_step(tmp_path)])
    rest, _ = fit(tmp_path, seed=99, ckpt=tmp_path / "step=8.ckpt")
    assert rest == whole[8:]
    other, _ = fit(tmp_path, seed=99)
    assert other != whole
