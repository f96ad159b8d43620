"""Two processes train on disjoint halves, and resume to the same batches."""

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
from pytorch_lightning.callbacks import ModelCheckpoint
sys.path[:0] = [{tests!r}, {root!r}]
from test_module_resume import Recorder
from ldm.data.module import DataModuleFromConfig

def run(name, ckpt=None):
    keep = ModelCheckpoint({folder!r}, filename="{{step}}", every_n_train_steps=1, save_top_k=-1)
    recorder = Recorder()
    data = DataModuleFromConfig(4, train={{"target": "test_module_resume.Numbers"}}, num_workers=0, seed=5)
    trainer = pl.Trainer(max_epochs=2, accelerator="cpu", devices=2, strategy="ddp", logger=False,
                         default_root_dir={folder!r}, callbacks=[keep] if ckpt is None else [],
                         enable_checkpointing=ckpt is None, enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(recorder, data, ckpt_path=ckpt)
    with open(os.path.join({folder!r}, f"{{name}}{{trainer.global_rank}}.json"), "w") as file:
        json.dump(recorder.seen, file)
    trainer.strategy.barrier()

run("whole")
run("rest", os.path.join({folder!r}, "step=2.ckpt"))
"""


@pytest.mark.slow
def test_two_processes(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(tests=str(ROOT / "tests" / "data"), root=str(ROOT), folder=str(tmp_path)))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=240, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    whole, rest = (
        [json.loads((tmp_path / f"{name}{rank}.json").read_text()) for rank in (0, 1)] for name in ("whole", "rest")
    )
    for rank in (0, 1):
        assert [len(batch) for batch in whole[rank]] == [4, 4, 3] * 2  # 22 images, 11 per process
        assert rest[rank] == whole[rank][2:]
    for epoch in (0, 1):
        seen = sum((whole[rank][3 * epoch + i] for rank in (0, 1) for i in range(3)), [])
        assert sorted(seen) == list(range(22))
