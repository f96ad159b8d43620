"""Parts of data sets and one's own labelled pictures, from the representation file to the scores."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from torch.utils.data import DataLoader

from ldm.data.collate import collate
from ldm.data.factors import FactorSpace
from ldm.data.formats.folder import ImageFolder
from ldm.data.module import WrappedDataset
from ldm.data.world import World3D
from ldm.evaluation.pixel_pca import pixel_axes
from ldm.evaluation.representation import RepresentationWriter
from ldm.evaluation.row_encoder import RowEncoder
from ldm.metrics import METRICS
from ldm.scoring.factors import space_of
from ldm.scoring.files import read_latent_file
from ldm.scoring.run import Options, score_folder
from ldm.util import UserError

KEEP = {"floor_hue": 2, "wall_hue": 1, "object_hue": 5, "scale": 2, "orientation": 3}
QUICK = {name: METRICS[name] for name in ("mig",)}


class FactorReader(pl.LightningModule):
    """Represents an image by its true factors, one per unit."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def encode_representation(self, batch):
        return batch["factors"].float()[..., None]

    def test_step(self, batch, batch_idx):
        return self.encode_representation(batch)


def encode(dataset, folder):
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    trainer = pl.Trainer(accelerator="cpu", default_root_dir=folder, callbacks=[RepresentationWriter()], **quiet)
    trainer.test(FactorReader(), DataLoader(dataset, batch_size=64, collate_fn=collate), verbose=False)
    return folder / "dis_repre" / "epoch=000000.npz"


def write_photos(folder, copies=2):
    """A labelled folder: 3 hues, 2 sizes, some pictures of each."""
    lines = ["path,hue,size"]
    for hue, size, k in itertools.product(range(3), range(2), range(copies)):
        picture = np.zeros((16, 16, 3), np.uint8)
        picture[: 8 + 8 * size, :, hue] = 255 - k
        Image.fromarray(picture).save(folder / f"{k}_{hue}_{size}.png")
        lines.append(f"{k}_{hue}_{size}.png,{'rgb'[hue]},{('small', 'large')[size]}")
    (folder / "table.csv").write_text("\n".join(lines))
    return ImageFolder(folder, "table.csv", image_size=16)


@pytest.mark.parametrize("wrap", [False, True])
def test_a_part_of_the_world_is_scored(tmp_path, wrap):
    dataset = World3D(size=32, keep=KEEP)
    path = encode(WrappedDataset(dataset) if wrap else dataset, tmp_path)
    head = read_latent_file(path)
    assert head.shape == (240, 6, 1) and head.factor_sizes == (2, 5, 2, 4, 3)  # one wall hue is nothing to recover
    assert space_of(head).to_dict() == dataset.position_space.to_dict()
    report = score_folder(Options(tmp_path, metrics=QUICK))
    assert report.failures == [] and len(report.written) == 1


def test_a_random_choice_cannot_be_scored_and_is_told_what_can(tmp_path):
    path = encode(World3D(size=32, limit=100), tmp_path)
    with pytest.raises(UserError, match="expected 480000 images .* got 100.*params.keep"):
        space_of(read_latent_file(path))


def test_own_pictures_with_labels_are_scored(tmp_path):
    (tmp_path / "photos").mkdir()
    dataset = write_photos(tmp_path / "photos")
    path = encode(dataset, tmp_path / "run")
    space = space_of(read_latent_file(path))
    assert space.all_names == ("hue", "size", "instance") and space.factor_names == ("hue", "size")
    report = score_folder(Options(tmp_path / "run", metrics=QUICK))
    assert report.failures == []
    scores = json.loads(report.written[0].read_text())["MIG"]
    assert min(value for value in scores.values() if isinstance(value, float)) > 0.9  # units are the factors themselves


def test_smallnorb_keeps_the_factor_that_is_not_to_be_recovered(tmp_path):
    space = FactorSpace(("a", "instance", "b"), (2, 3, 2), latent=(0, 2))
    dataset = World3D(size=32, limit=12)
    dataset.kept = dataset.kept._replace(space=space)
    head = read_latent_file(encode(dataset, tmp_path))
    assert head.factor_sizes == (2, 2) and space_of(head).to_dict() == space.named("World3D").to_dict()


def test_d_has_to_name_a_space_of_the_same_factors(tmp_path):
    head = read_latent_file(encode(World3D(size=32, keep=KEEP), tmp_path))
    assert space_of(head, "shapes3d").size == 240
    with pytest.raises(UserError, match="floor_hue.*but -d cars3d has the factors elevation"):
        space_of(head, "cars3d")


def test_scores_while_training_see_the_part(tmp_path):
    dataset = World3D(size=32, keep=KEEP, split="train")
    rows = RowEncoder(FactorReader(), dataset)
    assert rows.space.size == 240
    units = rows(np.arange(240))
    shown = World3D(size=32, keep=KEEP).__getitems__(range(240))["factors"].numpy()
    for k in range(6):  # a unit is its factor up to sign and place
        if len(set(shown[:, k])) > 1:
            assert abs(np.corrcoef(units[:, k], shown[:, k])[0, 1]) > 0.999
    assert pixel_axes(dataset, 2).axes.shape == (32 * 32 * 3, 2)
