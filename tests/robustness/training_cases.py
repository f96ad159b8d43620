"""Small trainings that are stopped at a batch, and what remains of them."""

from __future__ import annotations

import csv
import json
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch

_DDCONFIG = {"double_z": False, "z_channels": 3, "resolution": 8, "in_channels": 3, "out_ch": 3, "ch": 32}
_DDCONFIG |= {"ch_mult": [1, 1], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.1}
_AUTOENCODER = {"embed_dim": 3, "n_embed": 8, "ddconfig": _DDCONFIG}
_LOSS = {"disc_start": 1, "perceptual_weight": 0.0, "disc_ndf": 8, "disc_num_layers": 1, "codebook_weight": 1.0}
_UNET = {"image_size": 4, "in_channels": 3, "out_channels": 3, "model_channels": 32, "attention_resolutions": [2]}
_UNET |= {"num_res_blocks": 1, "channel_mult": [1, 1], "num_heads": 2}
_CYCLES = {"warm_up_steps": [2], "cycle_lengths": [9], "f_start": [0.1], "f_max": [1.0], "f_min": [0.1]}
_SCHEDULE = {"target": "ldm.lr_scheduler.LambdaLinearScheduler", "params": _CYCLES}
_PLAIN = {"timesteps": 20, "image_size": 8, "channels": 3, "monitor": "val/loss_simple_ema"}
_PLAIN |= {"unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": _UNET}}
_FIRST = {"target": "ldm.models.autoencoder.VQModelInterface"}
_FIRST |= {"params": {**_AUTOENCODER, "lossconfig": {"target": "torch.nn.Identity"}}}
_LATENT = {**_PLAIN, "image_size": 4, "scale_by_std": True, "cond_stage_config": "__is_unconditional__"}
_LATENT |= {"first_stage_config": _FIRST, "scheduler_config": _SCHEDULE}
_ADVERSARIAL = {"target": "ldm.modules.losses.vqperceptual.VQLPIPSWithDiscriminator", "params": _LOSS}
_VQ = {**_AUTOENCODER, "monitor": "val/rec_loss", "use_ema": True, "lr_g_factor": 2.0}
_VQ |= {"scheduler_config": _SCHEDULE, "lossconfig": _ADVERSARIAL}

# Name -> target and params of the model, batches per optimizer step, and further Trainer arguments. Epochs have ten
# batches: their last windows are short, and validations are due within windows.
CASES: dict[str, tuple[str, dict[str, Any], int, dict[str, Any]]] = {
    "plain": ("ldm.models.diffusion.ddpm.DDPM", _PLAIN, 1, {"val_check_interval": 3}),
    "latent": ("ldm.models.diffusion.ddpm.LatentDiffusion", _LATENT, 4, {"val_check_interval": 3}),
    "adversarial": ("ldm.models.autoencoder.VQModel", _VQ, 3, {"val_check_interval": 0.5, "gradient_clip_val": 1.0}),
    "steps": ("ldm.models.autoencoder.VQModel", _VQ, 3, {"val_check_interval": 7, "check_val_every_n_epoch": None}),
}


class Noise(torch.utils.data.Dataset):
    """Images of noise, item i always the same."""

    def __init__(self, size: int = 26) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": np.random.RandomState(index).rand(8, 8, 3).astype(np.float32) * 2 - 1}


class StopAt(pl.Callback):
    """Stops the run at the end of a batch, or before it, if the variable STOP contains its number and a reason.

    A ``KeyboardInterrupt`` within the process saves nothing, like SIGKILL.
    """

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._stop(trainer, "before")

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._stop(trainer, "after")

    def on_validation_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:
            self._stop(trainer, "validation")

    def _stop(self, trainer: pl.Trainer, hook: str) -> None:
        batch, where, reason = os.environ.get("STOP", "0 - -").split()
        if where != hook or trainer.fit_loop.total_batch_idx + 1 < int(batch):
            return
        if reason.startswith("SIG"):
            os.kill(os.getpid(), signal.Signals[reason])
            if reason == "SIGTERM":
                os.environ["STOP"] = "0 - -"
        else:
            raise {"error": ArithmeticError, "interrupt": KeyboardInterrupt}[reason]("stopped by the test")


def write_config(name: str, path: Path) -> Path:
    """Write the config of a case and return its path."""
    target, params, accumulate, trainer = CASES[name]
    data = {"batch_size": 2, "num_workers": 0}
    data |= {
        part: {"target": "training_cases.Noise", "params": {"size": n}}
        for part, n in (("train", 26), ("validation", 4))
    }
    trainer = {"accelerator": "cpu", "max_epochs": 2, "limit_train_batches": 10, "log_every_n_steps": 1, **trainer}
    lightning = {
        "scale_lr": False,
        "logger": "csv",
        "trainer": {**trainer, "accumulate_grad_batches": accumulate},
        "modelcheckpoint": {"params": {"every_n_train_steps": 2, "filename": "{step:06}", "save_top_k": -1}},
        "callbacks": {"image_logger": None, "stop": {"target": "training_cases.StopAt", "params": {}}},
    }
    model = {"base_learning_rate": 1e-3, "target": target, "params": params}
    data = {"target": "ldm.data.module.DataModuleFromConfig", "params": data}
    path.write_text(json.dumps({"model": model, "data": data, "lightning": lightning}))
    return path


def remains(run: Path) -> tuple[Counter, dict[str, torch.Tensor], list[int]]:
    """Return the rows of metrics.csv, the weights, and the batches of all checkpoints; check that no row is doubled."""
    with (run / "testtube/version_0/metrics.csv").open(newline="") as stream:
        rows = [frozenset((key, value) for key, value in row.items() if value) for row in csv.DictReader(stream)]
    logged = Counter((dict(row)["step"], frozenset(dict(row))) for row in rows)
    assert max(logged.values()) == 1, [each for each, count in logged.items() if count > 1]
    assert not list(run.rglob("*.tmp*"))
    checkpoints = [torch.load(path, weights_only=True) for path in sorted((run / "checkpoints").glob("*.ckpt"))]
    last = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    progress = [each["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["completed"] for each in checkpoints]
    return Counter(rows), last["state_dict"], progress


def assert_equal(run: Path, reference: Path, accumulate: int) -> None:
    """Check rows, weights and the positions of all checkpoints of a resumed run."""
    rows, weights, progress = remains(run)
    expected_rows, expected_weights, _ = remains(reference)
    assert rows == expected_rows, (sorted(map(sorted, rows - expected_rows)), sorted(map(sorted, expected_rows - rows)))
    for key, value in expected_weights.items():
        torch.testing.assert_close(weights[key], value, rtol=0, atol=0)
    assert all(batches % accumulate == 0 or batches == 10 for batches in progress), progress
