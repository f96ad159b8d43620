"""The representation file: order of the data set, step, and errors."""

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset

from ldm.data.factors import FactorSpace
from ldm.evaluation.representation import RepresentationWriter
from ldm.util import UserError

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}


class Numbers(Dataset):
    space = FactorSpace(("tens", "units"), (3, 4))

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return {"image": torch.full((1,), float(index)), "index": index}


class Reader(pl.LightningModule):
    """Represents image i by 2 units (i, -i), or not at all."""

    unit_names = ("plus", "minus")
    latent_unit, latent_shape = 2, (1, 1, 1)

    def __init__(self, answers=True):
        super().__init__()
        self.answers, self.layer = answers, torch.nn.Linear(1, 1)

    def encode_units(self, images):
        raise NotImplementedError

    decode_units = encode_units

    def training_step(self, batch, batch_idx):
        return self.layer(batch["image"]).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def test_step(self, batch, batch_idx):
        return torch.stack([batch["image"], -batch["image"]], dim=1).double() if self.answers else None


def run_test(tmp_path, model=None, loader=None, ckpt_path=None, **options):
    trainer = pl.Trainer(callbacks=[RepresentationWriter()], default_root_dir=tmp_path, **QUIET, **options)
    trainer.test(model or Reader(), loader or DataLoader(Numbers(), batch_size=5), ckpt_path=ckpt_path, verbose=False)
    return sorted(path.name for path in (tmp_path / "dis_repre").glob("*"))


def test_file_holds_all_rows_in_order(tmp_path):
    assert run_test(tmp_path) == ["epoch=000000.npz"]
    with np.load(tmp_path / "dis_repre" / "epoch=000000.npz") as file:
        assert file["latents"].dtype == np.float32
        rows = np.arange(12)
        assert np.array_equal(file["latents"], np.stack([rows, -rows], axis=1)[..., None])
        assert int(file["num_samples"]) == 0
        assert file["factor_names"].tolist() == ["tens", "units"] and file["factor_sizes"].tolist() == [3, 4]
        assert file["unit_names"].tolist() == ["plus", "minus"]


def test_step_and_epoch_are_those_of_the_weights(tmp_path):
    writer = RepresentationWriter()
    trainer = pl.Trainer(max_epochs=2, callbacks=[writer], default_root_dir=tmp_path, **QUIET)
    model, loader = Reader(), DataLoader(Numbers(), batch_size=4)
    trainer.fit(model, loader)
    trainer.test(model, loader, verbose=False)
    with np.load(tmp_path / "dis_repre" / "epoch=000001.npz") as file:
        assert int(file["num_samples"]) == 6


@pytest.mark.parametrize("save_weights_only", [False, True])
def test_step_and_epoch_are_those_of_a_loaded_checkpoint(tmp_path, save_weights_only):
    keeper = pl.callbacks.ModelCheckpoint(
        tmp_path, "{epoch:06}", save_top_k=-1, save_weights_only=save_weights_only, auto_insert_metric_name=True
    )
    options = QUIET | {"enable_checkpointing": True}
    pl.Trainer(max_epochs=2, callbacks=[keeper], **options).fit(Reader(), DataLoader(Numbers(), batch_size=4))
    assert run_test(tmp_path, ckpt_path=tmp_path / "epoch=000001.ckpt") == ["epoch=000001.npz"]
    with np.load(tmp_path / "dis_repre" / "epoch=000001.npz") as file:
        assert int(file["num_samples"]) == 6


def test_model_without_representation_writes_nothing(tmp_path):
    assert run_test(tmp_path, Reader(answers=False)) == []


def test_a_partial_test_pass_writes_nothing(tmp_path, caplog):
    assert run_test(tmp_path, limit_test_batches=1) == []
    assert "nothing is written" in caplog.text


@pytest.mark.parametrize("options", [{"drop_last": True}, {"shuffle": True}])
def test_loader_that_loses_the_order_is_refused(tmp_path, options):
    with pytest.raises(UserError, match="10 rows|shuffles"):
        run_test(tmp_path, loader=DataLoader(Numbers(), batch_size=5, **options))
    assert not list((tmp_path / "dis_repre").glob("*"))


def test_other_shapes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Reader, "test_step", lambda self, batch, batch_idx: batch["image"][:, 0])
    with pytest.raises(UserError, match=r"\(B, U, D\) or \(B, U\), got \(5,\)"):
        run_test(tmp_path)
