"""Old names, options, flags and configs: each resolves, means what it meant, and builds its model."""

from __future__ import annotations

import copy
import inspect
import logging
import re
from typing import Any

import legacy_configs
import pytest
from legacy_configs import LIGHTNING, MODELS, data, save_clip, with_clip
from omegaconf import OmegaConf

import main as front_door
from ldm import legacy
from ldm.config.signatures import read_signature
from ldm.errors import report_once
from ldm.legacy import names as legacy_names
from ldm.training.cli import parse_arguments
from ldm.training.plan import Plan, make_plan
from ldm.util import ConfigError, UserError, get_obj_from_str, instantiate_from_config

TARGETS = """
ldm.models.autoencoder.{VQModel,VQModelInterface,AutoencoderKL,IdentityFirstStage}
ldm.models.diffusion.ddpm.{LatentDiffusion,DDPM,Layout2ImgDiffusion}
ldm.models.diffusion.ddpm_kl.LatentDiffusion ldm.models.diffusion.ddpm_enc.LatentDiffusion
ldm.modules.diffusionmodules.openaimodel.UNetModel ldm.modules.diffusionmodules.openaimodel_shift.UNetModel
ldm.modules.diffusionmodules.openaimodel_enc.{UNetModel,Encoder4}
ldm.modules.encoders.modules.{Encoder4,Encoder4_vae,Encoder256,FrozenCLIPTextEmbedder,FrozenClipImageEmbedder}
ldm.modules.encoders.modules.{ClassEmbedder,BERTEmbedder,SpatialRescaler,TransformerEmbedder,MLP_layers}
ldm.modules.encoders.modules.{PerceiverEncoder,PerceiverDecoder}
ldm.lr_scheduler.{LambdaLinearScheduler,LambdaWarmUpCosineScheduler,LambdaWarmUpCosineScheduler2}
taming.modules.losses.vqperceptual.{VQLPIPSWithDiscriminator,DummyLoss}
ldm.modules.losses.vqperceptual.VQLPIPSWithDiscriminator torch.nn.Identity
ldm.modules.losses.{LPIPSWithDiscriminator,VQLPIPSWithDiscriminator,DummyLoss}
ldm.modules.losses.contperceptual.{LPIPSWithDiscriminator,DummyLoss}
main.{DataModuleFromConfig,WrappedDataset,ImageLogger,SetupCallback,CUDACallback,LearningRateMonitor}
main_val.{DataModuleFromConfig,ImageLogger,SetupCallback,CUDACallback,LearningRateMonitor} ldm.tools.Record
pytorch_lightning.callbacks.ModelCheckpoint pytorch_lightning.loggers.TestTubeLogger
pytorch_lightning.loggers.test_tube.TestTubeLogger lightning.pytorch.callbacks.ModelCheckpoint
ldm.data.dis.{Shapes3DTrain,MPI3DTrain,Cars3DTrain,Celebarain,Mercaritrain,Mercaritrain_clip,CustomDatasetTrain}
ldm.data.dis.{CustomDatasetTrainCLIP,Shapes3D,MPI3D,Cars3D,CelebAlmdb,Bedroom_lmdb,Horse_lmdb,FFHQlmdb}
ldm.data.disdata.{Shapes3DTrain,MPI3DTrain,Cars3DTrain,Celebarain,BedroomTrain,HorseTrain,FFHQTrain,AFHQTrain,AFHQVal}
ldm.data.disdata.{FlowerTrain,FlowerVal}
"""
NOT_SHIPPED = """
ldm.data.imagenet.{ImageNetTrain,ImageNetValidation,ImageNetSRTrain,ImageNetSRValidation}
ldm.data.lsun.{LSUNBedroomsTrain,LSUNBedroomsValidation,LSUNChurchesTrain,LSUNChurchesValidation}
ldm.data.openimages.{FullOpenImagesTrain,OpenImagesBBoxValidation,SuperresOpenImagesAdvancedTrain}
taming.data.imagenet.ImageNetTrain
ldm.data.faceshq.{CelebAHQTrain,FFHQValidation} taming.data.faceshq.{CelebAHQValidation,FFHQTrain}
ldm.data.landscapes.{RFWTrain,RFWValidation} ldm.data.previews.pytorch_dataset.{PreviewsTrain,PreviewsValidation}
ldm.data.dis.{Clevr,ClevrTrain} ldm.data.disdata.{LSUNChurchTrain,Shapes3DTrainSD,MPI3DTrainSD}
"""


def names(text: str) -> list[str]:
    """Expand ``a.{b,c}``."""
    found = []
    for word in text.split():
        head, _, tail = word.partition("{")
        found += [head + name for name in tail.rstrip("}").split(",")] if tail else [word]
    return found


@pytest.fixture(autouse=True)
def warnings_are_said_again():
    report_once.cache_clear()


@pytest.mark.parametrize("target", names(TARGETS + NOT_SHIPPED))
def test_every_target_resolves(target):
    assert inspect.isclass(get_obj_from_str(target))
    assert read_signature(legacy.resolve_target(target)) is not None or target.startswith("torch.")


def test_every_table_leads_somewhere():
    for old in legacy_names.ALIASES:
        assert read_signature(legacy.resolve_target(old)) is not None, old
    for old, entry in legacy_names.OLD_DATASETS.items():
        assert set(legacy.translate(old)[1]) <= set(read_signature(entry.today).required), old


@pytest.mark.parametrize("target", names(NOT_SHIPPED))
def test_data_sets_nobody_ships_say_so_only_when_asked_for(target):
    config = {"target": target, "params": {"size": 256, "degradation": "pil_nearest"}}
    section = {**data(), "params": {"batch_size": 2, "train": config}}
    module = instantiate_from_config(section)
    with pytest.raises(UserError, match=rf"{target} does not come with this package.*ldm\.data\.\w+\.\w+"):
        module.setup("fit")


def as_plan(tmp_path, model: dict[str, Any], words: str = "", **sections: Any) -> Plan:
    """What ``main.py --base`` makes of a config."""
    path = tmp_path / "old.yaml"
    content = {"model": copy.deepcopy(model), "data": data(path=str(tmp_path / "db")), "lightning": LIGHTNING}
    OmegaConf.save(OmegaConf.create({**content, **sections}), path)
    return make_plan(parse_arguments(["-b", str(path), *words.split()]))


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip") / "clip")


CLASSES = {
    "disdiff": "DisDiff",
    "disdiff kl": "DisDiff",
    "clip-disdiff": "CLIPDisDiff",
    "encdiff": "EncDiff",
    "vq": "VQModel",
    "kl": "AutoencoderKL",
}


@pytest.mark.parametrize("name", MODELS)
def test_old_configs_build_their_models(name, tmp_path, clip_folder):
    plan = as_plan(tmp_path, with_clip(MODELS[name], clip_folder, 64))
    model = plan.config.build("model")
    assert type(model).__name__ == CLASSES.get(name, "LatentDiffusion")
    assert model.monitor == MODELS[name]["params"]["monitor"]


@pytest.mark.parametrize("name", ["ldm", "class", "encdiff"])
def test_old_configs_build_without_main_too(name):
    """As the references' notebooks do: load the file, build its model."""
    config = OmegaConf.create(copy.deepcopy(MODELS[name]))
    assert type(instantiate_from_config(config)).__name__ == CLASSES.get(name, "LatentDiffusion")


def test_old_trainer_arguments_are_mapped_or_named(tmp_path):
    flags = "--gpus 0,1 --accelerator ddp --terminate_on_nan --weights_summary top --amp_level O1 --track_grad_norm 2"
    settings = as_plan(tmp_path, MODELS["ldm"], flags).settings
    assert settings.arguments | {"benchmark": True} == {
        "accelerator": "gpu",
        "devices": [0, 1],
        "strategy": "ddp",
        "detect_anomaly": True,
        "enable_model_summary": True,
        "benchmark": True,
        "precision": "auto",
    }
    assert settings.dropped == ["amp_level", "track_grad_norm"]


def test_a_latent_diffusion_is_told_by_its_parts():
    def today(model: dict[str, Any]) -> str:
        return legacy.translate(model["target"], model["params"])[0].rpartition(".")[2]

    assert {name: today(model) for name, model in MODELS.items() if "Diffusion" in model["target"]} == {
        name: CLASSES.get(name, "LatentDiffusion") for name, model in MODELS.items() if "Diffusion" in model["target"]
    }
    plain = legacy_configs.model("ldm.models.diffusion.ddpm_kl.LatentDiffusion", kl_loss_flag=False)
    assert today(plain) == "LatentDiffusion"
    assert today(legacy_configs.model(**legacy_configs.ENCDIFF)) == "EncDiff"


def test_defaults_are_those_of_the_old_class():
    model = legacy_configs.model(**{**legacy_configs.DISDIFF})
    old = {"dis_loss_type": "IM", "dis_weight": 1.0, "dis_loss_flag": False, "cond_stage_trainable": False}
    model["params"] = {key: value for key, value in model["params"].items() if key not in old}
    _, params = legacy.translate(model["target"], model["params"])
    assert {key: params[key] for key in old} == old
    today, params = legacy.translate(legacy_names.DISDIFF, {"unet_config": {}})
    assert (today, params) == (legacy_names.DISDIFF, {"unet_config": {}})


def test_options_that_mean_nothing_are_named_once(caplog):
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            _, params = legacy.translate(MODELS["encdiff"]["target"], MODELS["encdiff"]["params"])
            stage = legacy.translate(legacy_configs.VQ["target"], {"colorize_nlabels": None, "embed_dim": 3})
    assert len(caplog.records) == 1
    assert "lambda_mcl, mcl_tau, mcl_type ignored" in caplog.text
    assert not {"use_mcl", "lambda_mcl"} & set(params) and params["eval_name"] == "shapes3d"
    assert stage[1] == {"embed_dim": 3}


def test_codes_are_as_wide_as_clip(caplog):
    model = with_clip(MODELS["clip-disdiff"], "ViT-L/14")
    params = legacy.translate(model["target"], model["params"])[1]
    assert params["unet_config"]["params"]["repre_emb_channels"] == 768
    assert "repre_emb_channels: expected the width of CLIP's embeddings (768), got 32" in caplog.text
    assert model["params"]["unet_config"]["params"]["repre_emb_channels"] == 32  # the config itself is left alone
    model = with_clip(MODELS["clip-disdiff"], "hf-hub:some/clip", 17)
    params = legacy.translate(model["target"], model["params"])[1]
    assert params["unet_config"]["params"]["repre_emb_channels"] == 17


def test_clip_text_of_latent_diffusion_is_a_sequence():
    stage = {"target": legacy_names.CLIP_TEXT, "params": {"version": "ViT-L/14"}}
    model = legacy_configs.model(cond_stage_config=stage, conditioning_key="crossattn")
    params = legacy.translate(model["target"], model["params"])[1]
    assert params["cond_stage_config"]["params"] == {"n_repeat": 1, "version": "ViT-L/14"}
    assert legacy.translate(stage["target"], stage["params"])[1] == {"version": "ViT-L/14"}


@pytest.mark.parametrize(
    ("old", "given", "today", "params"),
    [
        ("dis.Shapes3DTrain", {"as_tensor": True, "original_resolution": 64}, "shapes3d.Shapes3D", {}),
        ("disdata.MPI3DTrain", {"do_augment": False}, "mpi3d.MPI3D", {"variant": "toy"}),
        ("dis.Cars3DTrain", {}, "cars3d.Cars3D", {"repeat": 10}),
        ("dis.Cars3DTrain", {"test": False}, "cars3d.Cars3D", {"repeat": 1}),
        ("dis.Cars3DTrain", {"repeat": 3}, "cars3d.Cars3D", {"repeat": 3}),
        ("dis.Celebarain", {}, "celeba.CelebA", {"image_size": 64, "original_resolution": None, "crop_d2c": True}),
        (
            "dis.Celebarain",
            {"original_resolution": 128, "crop_d2c": False, "do_normalize": True},
            "celeba.CelebA",
            {"image_size": 64, "original_resolution": 128, "crop_d2c": False},
        ),
        (
            "dis.Mercaritrain",
            {"path": "x"},
            "lmdb_text.LMDBImages",
            {"path": "x", "image_size": 64, "original_resolution": 128, "crop_d2c": False},
        ),
        (
            "dis.Mercaritrain_clip",
            {},
            "lmdb_text.LMDBTextImages",
            {"image_size": 64, "original_resolution": 128, "crop_d2c": False},
        ),
        (
            "disdata.HorseTrain",
            {},
            "lmdb_sets.LSUN",
            {"image_size": 64, "original_resolution": 256, "category": "horse"},
        ),
        ("disdata.AFHQVal", {}, "folder.ImageFolder", {"image_size": 64, "fit": "stretch", "split": "validation"}),
    ],
)
def test_data_sets_by_their_old_names(old, given, today, params):
    assert legacy.translate(f"ldm.data.{old}", given) == (legacy.resolve_target(f"ldm.data.{today}"), params)


def test_images_are_not_repeated_where_they_are_scored():
    cars = {"target": "ldm.data.dis.Cars3DTrain"}
    section = {"batch_size": 2, "train": cars, "test": cars, "validation": {**cars, "params": {"repeat": 2}}}
    params = legacy.translate("main.DataModuleFromConfig", section)[1]
    repeats = {name: legacy.translate(**params[name])[1]["repeat"] for name in ("train", "validation", "test")}
    assert repeats == {"train": 10, "validation": 2, "test": 1}


def test_renamed_options_of_callbacks():
    today, params = legacy.translate("lightning.pytorch.callbacks.ModelCheckpoint", {"period": 2, "monitor": "x"})
    assert (today, params) == ("pytorch_lightning.callbacks.ModelCheckpoint", {"every_n_epochs": 2, "monitor": "x"})


def test_the_flags_of_the_disentangling_loss(tmp_path, caplog):
    kept = as_plan(tmp_path, MODELS["disdiff"]).config.content["model"]["params"]
    assert (kept["dis_loss_type"], kept["dis_weight"]) == ("Z", 0.05)
    params = as_plan(tmp_path, MODELS["disdiff"], "-dt IM -dw 0.5").config.content["model"]["params"]
    assert (params["dis_loss_type"], params["dis_weight"]) == ("IM", 0.5)
    plan = as_plan(tmp_path, MODELS["disdiff"], "-dw")
    assert plan.config.build("model").dis_weight == 1.0
    with caplog.at_level(logging.WARNING):
        params = as_plan(tmp_path, MODELS["ldm"], "-dt Z -dw 0.05").config.content["model"]["params"]
    assert "dis_weight" not in params and "-dw is ignored" in caplog.text
    with pytest.raises(ConfigError, match="-dw sets model.params.dis_weight"):
        as_plan(tmp_path, MODELS["vq"], "-dw 2")


def test_the_number_of_tokens(tmp_path):
    plan = as_plan(tmp_path, MODELS["encdiff"], "--token_num 7 -n run")
    params = plan.config.content["model"]["params"]
    assert params["unet_config"]["params"]["latent_unit"] == params["cond_stage_config"]["params"]["latent_unit"] == 7
    assert plan.config.build("model").latent_unit == 7
    assert plan.name == "TK7_run"
    params = as_plan(tmp_path, MODELS["disdiff"], "--token_num 5").config.content["model"]["params"]
    assert params["cond_stage_config"]["params"]["latent_dim"] == 5 * 4
    assert as_plan(tmp_path, MODELS["encdiff"], "--token_num -1 -n run").name == "run"
    with pytest.raises(ConfigError, match="a network with units"):
        as_plan(tmp_path, MODELS["ldm"], "--token_num 5")


def test_the_environment_in_a_config(tmp_path, monkeypatch):
    monkeypatch.setenv("DB_PATH", "somewhere.lmdb")
    section = data("ldm.data.dis.CustomDatasetTrainCLIP", path="${env:DB_PATH}", image_size="${env:SIZE,32}")
    images = as_plan(tmp_path, MODELS["ldm"], data=section).config.content["data"]["params"]["train"]["params"]
    assert images["path"] == "somewhere.lmdb" and str(images["image_size"]) == "32"


def test_slips_in_old_words_are_named(tmp_path):
    slip = copy.deepcopy(MODELS["disdiff"])
    slip["params"]["dis_wieght"] = 1.0
    with pytest.raises(ConfigError, match=r"model.params.dis_wieght: .*LatentDiffusion does not accept .*'dis_weight'"):
        as_plan(tmp_path, slip)
    with pytest.raises(ConfigError, match=r"data.params.train.params.spilt.*'split'"):
        as_plan(tmp_path, MODELS["ldm"], data=data("ldm.data.dis.Shapes3DTrain", spilt="train"))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("sgm.models.diffusion.DiffusionEngine", "no package 'sgm'. Known families: latent-diffusion, DisDiff"),
        ("cldm.cldm.ControlLDM", "no package 'cldm'"),
        ("ldm.models.diffusion.classifier.NoisyLatentImageClassifier", "there is no module ldm.models.diffusion.clas"),
        ("ldm.models.diffusion.ddpm.LatentDifusion", "did you mean.*LatentDiffusion"),
    ],
)
def test_a_config_of_an_unknown_family(target, message, tmp_path, capsys):
    path = tmp_path / "foreign.yaml"
    content = {"model": {"target": target, "params": {}}, "data": data()}
    OmegaConf.save(OmegaConf.create(content), path)
    assert front_door.main(["-b", str(path), "-t", "-l", str(tmp_path / "logs")]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}: model.target: ")
    assert re.search(message, error, re.IGNORECASE)
    assert not (tmp_path / "logs").exists()


# Every target of the configs that earlier versions of this package shipped.
OWN_TARGETS = """
ldm.data.{cars3d.Cars3D,celeba.CelebA,mpi3d.MPI3D,shapes3d.Shapes3D,module.DataModuleFromConfig,world.World3D}
ldm.data.factors.{cars3d.Cars3D,mpi3d.MPI3D,shapes3d.Shapes3D} ldm.data.formats.celeba.CelebA
ldm.evaluation.{edit.EditScore,editing.callback.EditScore,pixel_pca.PixelBaseline,train_scores.ScoreWhileTraining}
ldm.models.{clip.WorldCLIP,judge.FactorJudge,autoencoder.AutoencoderKL,autoencoder.VQModelInterface}
ldm.models.diffusion.{clip_disdiff.CLIPDisDiff,disdiff.DisDiff,encdiff.EncDiff,ddpm.LatentDiffusion}
ldm.models.diffusion.methods.{clip_disdiff.model.CLIPDisDiff,disdiff.model.DisDiff,encdiff.model.EncDiff}
ldm.modules.losses.{contperceptual.LPIPSWithDiscriminator,vqperceptual.VQLPIPSWithDiscriminator}
ldm.training.callbacks.{image_logger.ImageLogger,results.ResultsWriter}
ldm.evaluation.representation.RepresentationWriter ldm.training.loggers.MetricsCSVLogger
"""


@pytest.mark.parametrize("target", names(OWN_TARGETS))
def test_targets_of_earlier_versions_resolve(target):
    assert inspect.isclass(get_obj_from_str(target))
    assert read_signature(legacy.resolve_target(target)) is not None


def test_the_discriminator_of_taming_is_tamings_own():
    name = "taming.modules.discriminator.model.NLayerDiscriminator"
    assert legacy.resolve_target(name) == name


def test_replacements_of_data_sets_name_the_same_images():
    for target, has_faces in (("taming.data.faceshq.FFHQTrain", True), ("taming.data.imagenet.ImageNetTrain", False)):
        advice = legacy.translate(target)[1]["instead"]
        assert ("FFHQ" in advice) == has_faces and "ldm.data.formats.folder.ImageFolder" in advice
