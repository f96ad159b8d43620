"""One's own pictures with one YAML and no Python: a folder and a table, from stage 1 to text attributes."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from stand_ins import TINY_DDCONFIG, TINY_UNET, vq_config

from ldm.training.cli import Options
from ldm.training.plan import make_plan
from ldm.training.run import run
from ldm.util import UserError, instantiate_from_config

SHORT = [
    "lightning.trainer.max_steps=2",
    "lightning.trainer.limit_val_batches=1",
    "data.params.num_workers=0",
    "lightning.callbacks.image_logger=null",
]
ROOT = Path(__file__).parents[2]
OWN_DATA = """
data:
  params:
    batch_size: 4
    train: &pictures
      target: ldm.data.formats.folder.ImageFolder
      params: {{path: "{folder}", attributes: table.csv, image_size: 64, templates: {{colour: "{{}} thing"}}}}
    validation: *pictures
    test: *pictures
"""
VQ = {
    "target": "ldm.models.autoencoder.VQModel",
    "base_learning_rate": 1e-4,
    "params": {
        "embed_dim": 4,
        "n_embed": 64,
        "ddconfig": TINY_DDCONFIG,
        "lossconfig": {
            "target": "ldm.modules.losses.vqperceptual.VQLPIPSWithDiscriminator",
            "params": {"disc_start": 0, "disc_factor": 0.0, "perceptual_weight": 0.0},
        },
    },
}
CLIP_DISDIFF = {
    "target": "ldm.models.diffusion.methods.clip_disdiff.model.CLIPDisDiff",
    "base_learning_rate": 1e-4,
    "params": {
        "timesteps": 20,
        "image_size": 8,
        "channels": 4,
        "first_stage_config": vq_config(),
        "cond_stage_config": {
            "text_encoder": {"target": "stand_ins.HashedText"},
            "image_encoder": {"target": "stand_ins.LinearImage"},
        },
        "unet_config": {
            "target": "ldm.modules.diffusionmodules.openaimodel_shift.UNetModel",
            "params": {
                **TINY_UNET,
                "latent_unit": 2,
                "repre_emb_channels": 16,
                "seprate_decoder": True,
                "orth_emb": True,
            },
        },
    },
}


@pytest.fixture
def photos(tmp_path):
    """Twelve pictures of no particular size, and a table that says colour and shape."""
    folder, lines = tmp_path / "photos", ["image,colour,shape"]
    for colour, shape, k in itertools.product(("red", "green", "blue"), ("ball", "cube"), range(2)):
        folder.mkdir(exist_ok=True)
        pixels = np.random.RandomState(k).randint(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{colour}-{shape}-{k}.jpg")
        lines.append(f"{colour}-{shape}-{k}.jpg,{colour},{shape}")
    (folder / "table.csv").write_text("\n".join(lines))
    return folder


def options(tmp_path, photos, model, *overrides, **params):
    """The one YAML a user writes, and the command."""
    described = {
        "target": "ldm.data.formats.folder.ImageFolder",
        "params": {
            "path": str(photos),
            "attributes": "table.csv",
            "templates": {"colour": "{} thing"},
            "image_size": 32,
            **params,
        },
    }
    data = {
        "target": "ldm.data.module.DataModuleFromConfig",
        "params": {"batch_size": 4, "train": described, "validation": described, "test": described},
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"model": model, "data": data}))
    return Options(
        base=(str(tmp_path / "mine.yaml"),),
        overrides=(*SHORT, *overrides),
        name="mine",
        train=True,
        logdir=str(tmp_path / "logs"),
    )


def test_a_first_stage_trains_on_own_pictures(tmp_path, photos):
    folder = run(make_plan(options(tmp_path, photos, VQ)))
    state = torch.load(folder.last, weights_only=True)
    assert state["global_step"] >= 2
    assert all(torch.isfinite(value).all() for value in state["state_dict"].values() if value.is_floating_point())


def test_columns_of_the_table_are_the_texts_of_the_units(tmp_path, photos):
    folder = run(make_plan(options(tmp_path, photos, CLIP_DISDIFF)))
    with np.load(folder.path / "dis_repre" / "epoch=000000.npz") as file:
        assert file["latents"].shape[:2] == (12, 2)
        assert file["factor_names"].tolist() == ["colour", "shape"] and file["factor_sizes"].tolist() == [3, 2]


def test_fewer_attributes_than_units(tmp_path, photos):
    three = "model.params.unet_config.params.latent_unit=3"
    with pytest.raises(UserError, match=r"expected 3 attributes per image.*got 2 .*'blue thing', 'ball'"):
        run(make_plan(options(tmp_path, photos, CLIP_DISDIFF, three, "data.params.shuffle_train_loader=false")))
    with pytest.raises(UserError, match=r"expected 3 attributes, got 2 \(colour, shape\). Set num_attributes"):
        run(make_plan(options(tmp_path, photos, CLIP_DISDIFF, num_attributes=3)))


@pytest.mark.parametrize("name", ["autoencoder/example_vq_4_16", "latent-diffusion/example_vq_4_16_clip-dis"])
def test_own_pictures_take_the_place_of_any_other_data(tmp_path, photos, name):
    """The YAML names the data alone and follows a shipped config; what that said of other data is left out."""
    (tmp_path / "mine.yaml").write_text(OWN_DATA.format(folder=photos))
    base = (str(ROOT / "configs" / f"{name}.yaml"), str(tmp_path / "mine.yaml"))
    nothing = [
        f"{key}=null"
        for key in ("model.params.unet_config.params.ckpt_path", "model.params.first_stage_config.params.ckpt_path")
    ]
    clip = [
        f"model.params.cond_stage_config.{key}=ViT-L/14"
        for key in ("text_encoder.params.version", "image_encoder.params.model")
    ]
    plan = make_plan(Options(base=base, overrides=(*nothing, *clip) if "clip" in name else (), name="x", train=True))
    train = plan.config.content["data"]["params"]["train"]
    assert train["target"] == "ldm.data.formats.folder.ImageFolder"
    assert set(train["params"]) - {"text"} == {"path", "attributes", "image_size", "templates", "split"}
    assert len(instantiate_from_config(train)) == 11


def test_a_misspelt_option_is_told_before_anything_starts(tmp_path, photos):
    with pytest.raises(Exception, match="does not accept 'atributes'. Did you mean 'attributes'"):
        make_plan(options(tmp_path, photos, VQ, "data.params.train.params.atributes=x.csv"))
