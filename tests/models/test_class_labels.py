"""Class labels: checked on the CPU in one line, and delivered by folders and tables."""

from __future__ import annotations

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from stand_ins import TINY_UNET, vq_config
from torch.utils.data import DataLoader

from ldm.data.collate import collate
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.encoders.labels import ClassEmbedder, class_labels
from ldm.util import UserError

IMAGE = torch.zeros(32, 32, 3, dtype=torch.uint8)
WRONG = {
    "too large": (6, "got 6"),
    "negative": (-1, "got -1"),
    "float": (5.0, "got 5.0"),
    "string": ("5", "got '5'"),
    "one-element array": (np.array([5]), r"got \[5\]"),
    "one-element tensor": (torch.tensor([5]), r"got \[5\]"),
    "boolean": (True, "got True"),
    "none": (None, "got None"),
}


def model_of(stage="embedder"):
    torch.manual_seed(0)
    unet, params = TINY_UNET, {"conditioning_key": "adm", "cond_stage_config": {"target": "torch.nn.Identity"}}
    if stage != "network":
        unet = {**TINY_UNET, "use_spatial_transformer": True, "context_dim": 4}
        target = "ldm.modules.encoders.modules.ClassEmbedder"
        options = {"embed_dim": 4, "n_classes": 6, "key": "cls" if stage == "embedder" else "other"}
        params = {"conditioning_key": "crossattn", "cond_stage_config": {"target": target, "params": options}}
    else:
        unet = {**TINY_UNET, "num_classes": 6}
    return LatentDiffusion(
        unet_config={"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": unet},
        first_stage_config=vq_config(),
        cond_stage_key="class_label" if stage == "embedder" else "cls",
        **params,
        image_size=8,
        channels=4,
        timesteps=10,
        monitor=None,
    )


def batch_of(label):
    return collate([{"image": IMAGE, "cls": label} for _ in range(2)])


@pytest.mark.parametrize("stage", ["embedder", "embedder of an entry", "network"])
@pytest.mark.parametrize("name", WRONG)
def test_wrong_labels_are_one_line_with_value_key_and_remedy(stage, name):
    label, found = WRONG[name]
    model = model_of(stage)
    line = rf"^batch\['cls'\]: expected one integer class in \[0, 6\) for each image, {found}\. Let the data set .*"
    for check in (model.get_condition, lambda batch: model.on_before_batch_transfer(batch, 0)):
        with pytest.raises(UserError, match=line) as error:
            check(batch_of(label))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("stage", ["embedder", "embedder of an entry", "network"])
@pytest.mark.parametrize("label", [5, 0, np.int32(5), np.int64(5), np.array(5), torch.tensor(5), np.uint8(5)])
def test_integers_in_range_are_taken(stage, label):
    model = model_of(stage)
    loss, _, _ = model.shared_step(batch_of(label))
    assert loss.isfinite()
    wanted = model.get_condition(batch_of(int(label))).value
    assert torch.equal(model.get_condition(batch_of(label)).value, wanted)


def test_training_stops_before_the_first_step():
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=2, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    items = [{"image": IMAGE, "cls": label} for label in (0, 6)]
    with pytest.raises(UserError, match=r"batch\['cls'\].*got 6"):
        trainer.fit(model_of(), DataLoader(items, batch_size=2, collate_fn=collate))


def test_labels_on_a_device_are_not_read_in_training():
    labels = torch.zeros(2, dtype=torch.long, device="meta")  # its values cannot be read
    assert class_labels(labels, 6, "class").device.type == "meta"
    for wrong in (labels.float(), labels[:, None]):
        with pytest.raises((UserError, NotImplementedError)):
            class_labels(wrong, 6, "class")


def test_a_missing_entry_and_labels_alone():
    stage = ClassEmbedder(4, n_classes=6, key="cls")
    with pytest.raises(UserError, match=r"batch\['cls'\], got a batch with only image"):
        stage({"image": IMAGE})
    with pytest.raises(UserError, match=r"^class: expected one integer class in \[0, 6\) .* got 6"):
        stage(torch.tensor([0, 6]))
    assert stage(torch.tensor([0, 5])).shape == (2, 1, 4)
