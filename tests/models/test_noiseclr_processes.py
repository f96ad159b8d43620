"""NoiseCLR in two processes whose last evaluation batches differ in size and number."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from direction_models import save_text_model

ROOT = Path(__file__).parents[2]
SCRIPT = """
import json, sys
import pytorch_lightning as pl
import torch
sys.path[:0] = [{tests!r}, {models!r}, {root!r}]
torch.set_num_threads(1)
from test_noiseclr import build, batch_of

class Data(pl.LightningDataModule):
    def loader(self, *sizes):
        return torch.utils.data.DataLoader([batch_of(size) for size in sizes], batch_size=None)

    def train_dataloader(self):
        return self.loader(2, 2, 2)

    def val_dataloader(self):  # of different sizes, one image among them, which has no loss
        return self.loader(3, 2) if self.trainer.global_rank == 0 else self.loader(3, 1)

    def test_dataloader(self):  # of different numbers
        return self.loader(2, 2, 2) if self.trainer.global_rank == 0 else self.loader(3)

model = build({zoo!r})
trainer = pl.Trainer(max_steps=3, accelerator="cpu", strategy="ddp", devices=2, val_check_interval=2, logger=False,
                     enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                     use_distributed_sampler=False, default_root_dir={folder!r})
trainer.fit(model, Data())
losses = {{name: float(value) for name, value in trainer.callback_metrics.items()}}
losses |= trainer.test(model, Data(), verbose=False)[0]
rows = trainer.strategy.all_gather(model.rows.detach())
if trainer.is_global_zero:
    with open({folder!r} + "/found.json", "w") as stream:
        json.dump({{**losses, "equal": torch.equal(rows[0], rows[1])}}, stream)
"""


@pytest.mark.slow
def test_evaluation_batches_of_two_processes_may_differ(tmp_path):
    zoo = save_text_model(tmp_path / "zoo")
    places = {"tests": str(ROOT / "tests"), "models": str(ROOT / "tests" / "models"), "root": str(ROOT)}
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(**places, folder=str(tmp_path), zoo=str(zoo)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=300, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert {"train/loss", "val/loss", "figure/test_loss"} <= set(found) and found["equal"]
    assert all(map(math.isfinite, found.values()))
