"""Figures a model logs in its test pass end up in the run's results."""

import json

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from ldm.training.callbacks.results import ResultsWriter


class Measured(pl.LightningModule):
    def test_step(self, batch, _):
        self.log("figure/share", batch.float().mean(), batch_size=len(batch))
        self.log("test/other", 3.0)


def test_only_figures_are_kept_beside_older_ones(tmp_path):
    (tmp_path / "results.json").write_text('{"psnr": 30.0}')
    trainer = pl.Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=[ResultsWriter()],
    )
    trainer.test(Measured(), DataLoader(torch.arange(5), batch_size=4), verbose=False)
    assert json.loads((tmp_path / "results.json").read_text()) == {"psnr": 30.0, "share": 2.0}
