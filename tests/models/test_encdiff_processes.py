"""Two processes train EncDiff together on the CPU: the same weights, from disjoint images."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SCRIPT = """
import json, os, sys
import pytorch_lightning as pl
import torch
sys.path[:0] = [{tests!r}, {models!r}, {root!r}]
torch.set_num_threads(1)
from test_encdiff import build
from ldm.data.module import DataModuleFromConfig
from ldm.evaluation.train_scores import ScoreWhileTraining

class Images(pl.Callback):
    def __init__(self):
        self.rows = []
    def on_train_batch_start(self, trainer, model, batch, batch_idx):
        self.rows += batch["index"].tolist()

images = Images()
scores = ScoreWhileTraining(2, ["mig"], settings={{"mig": {{"num_train": 200}}}})
data = {{"target": "ldm.data.world.World3D", "params": {{"size": 32, "split": "train", "limit": 64}}}}
model = build(scale_by_std=True, use_ema=True)
trainer = pl.Trainer(max_steps=3, accelerator="cpu", devices=2, strategy="ddp", logger=False, precision={precision!r},
                     default_root_dir={folder!r}, callbacks=[images, scores], enable_checkpointing=True,
                     enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False)
trainer.fit(model, DataModuleFromConfig(4, train=data, num_workers=0, seed=5))
sums = {{name: value.double().sum().item() for name, value in model.named_parameters() if value.requires_grad}}
with open(os.path.join({folder!r}, f"rank{{trainer.global_rank}}.json"), "w") as file:
    json.dump({{"rows": images.rows, "sums": sums, "best": scores.best, "scale": model.scale_factor.item()}}, file)
trainer.strategy.barrier()
"""


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_two_processes(precision, tmp_path):
    places = {"tests": str(ROOT / "tests"), "models": str(ROOT / "tests" / "models"), "root": str(ROOT)}
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(**places, folder=str(tmp_path), precision=precision))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first["sums"] == second["sums"]
    assert first["scale"] == second["scale"] != 1.0
    assert first["best"] == second["best"] and first["best"]["mig"]["step"] in (2, 3)
    assert len(first["rows"]) == 12 and not set(first["rows"]) & set(second["rows"])
    assert (tmp_path / "scores.csv").is_file() and (tmp_path / "checkpoints" / "best_mig.ckpt").is_file()
