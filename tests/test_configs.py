"""Every config that ships trains, and a run that was cut off goes on as if it had not been."""

import csv
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from direction_models import save_text_model
from legacy_configs import save_clip
from PIL import Image

from ldm.config.loading import load_config
from ldm.data.formats.folder import ImageFolder
from ldm.data.world import World3D
from ldm.evaluation.clip_embeddings import compute_embeddings, load_image_encoder
from ldm.models.diffusion.methods.clip_guided.options import KINDS
from ldm.models.judge import AttributeJudge
from ldm.training.cli import Options
from ldm.training.plan import make_plan
from ldm.training.recipe import load_recipe
from ldm.training.run import run

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "configs" / "quickstart"
SHORT = [
    "lightning.trainer.max_steps=2",
    "lightning.trainer.limit_val_batches=1",
    "lightning.trainer.limit_test_batches=1",
    "lightning.trainer.log_every_n_steps=1",
    "lightning.callbacks.image_logger=null",
    "data.params.batch_size=2",
    "data.params.eval_batch_size=2",
    "data.params.num_workers=0",
]
NO_FIRST_STAGE = "model.params.first_stage_config.params.ckpt_path=null"
NO_BASE = "model.params.unet_config.params.ckpt_path=null"
# Stands for the data sets that nobody has at hand.
WORLD = [f"data.params.{part}.target=stand_ins.World64" for part in ("train", "validation", "test")]
SMALL_NETS = {"ch_mult": "[1,1,1]", "num_res_blocks": 1}
SMALL_FIRST_STAGE = [f"model.params.first_stage_config.params.ddconfig.{k}={v}" for k, v in SMALL_NETS.items()]
SMALL_AUTOENCODER = [
    *(f"model.params.ddconfig.{k}={v}" for k, v in SMALL_NETS.items()),
    *(f"model.params.lossconfig.params.{word}" for word in ("disc_ndf=8", "perceptual_weight=0.0")),
    "lightning.trainer.val_check_interval=1",
    "lightning.trainer.accumulate_grad_batches=1",
]
SMALL_UNET = [
    *(f"model.params.unet_config.params.{word}" for word in ("model_channels=32", "channel_mult=[1,2]")),
    *(f"model.params.unet_config.params.{word}" for word in ("num_res_blocks=1", "attention_resolutions=[2]")),
    "lightning.trainer.val_check_interval=2",
]
SMALL_LATENTS = [NO_FIRST_STAGE, *SMALL_FIRST_STAGE, *SMALL_UNET]
SMALL_DISDIFF = [
    NO_BASE,
    *SMALL_LATENTS,
    "model.params.cond_stage_config.params.d=8",
    "lightning.trainer.limit_val_batches=0",  # their configs monitor no validation
]
SMALL_DIRECTIONS = [
    "DENOISER",
    *(f"model.params.{word}" for word in ("num_directions=4", "directions_per_iteration=2", "min_timestep=20")),
    *(f"lightning.callbacks.direction_bench.params.{word}" for word in ("num_samples=4", "num_images=8", "columns=2")),
    "lightning.callbacks.direction_bench.params.sampler.params.num_steps=2",
]
SMALL_ENCDIFF = ["model.params.cond_stage_config.params.d=8", "lightning.callbacks.scores=null"]
# Data set and first stage, as they stand in the names of the configs.
FAMILY = [(data, stage) for data in ("cars3d", "shapes3d", "mpi3d", "celeba") for stage in ("vq", "kl")]
CONFIGS = {
    "quickstart/clip": [],
    "quickstart/judge": [],
    "quickstart/vq": ["lightning.trainer.val_check_interval=1"],
    "quickstart/ldm": [NO_FIRST_STAGE, "lightning.trainer.val_check_interval=1"],
    "quickstart/clip_disdiff": [NO_FIRST_STAGE, NO_BASE, "CLIP", "lightning.callbacks.edit_score=null"],
    "quickstart/text_to_image": [
        NO_FIRST_STAGE,
        "CLIP",
        "lightning.callbacks.prompt_score=null",
        "model.params.gap=none",
    ],
    "quickstart/text_attention": [NO_FIRST_STAGE, "TEXT_CLIP", "lightning.trainer.val_check_interval=1"],
    "quickstart/noiseclr": SMALL_DIRECTIONS,
    "autoencoder/example_vq_4_16": SMALL_AUTOENCODER,
    "latent-diffusion/example_vq_4_16": SMALL_LATENTS,
    "latent-diffusion/example_vq_4_16_clip-dis": [NO_BASE, *SMALL_LATENTS, "model.params.dis_batch_size=1", "CLIP"],
    **{f"autoencoder/{data}_{stage}_4_16": [*WORLD, *SMALL_AUTOENCODER] for data, stage in FAMILY},
    **{f"latent-diffusion/{data}-{stage}-4-16": [*WORLD, *SMALL_LATENTS] for data, stage in FAMILY},
    **{f"latent-diffusion/{data}-{stage}-4-16-dis": [*WORLD, *SMALL_DISDIFF] for data, stage in FAMILY},
    "quickstart/disdiff": [NO_FIRST_STAGE, NO_BASE],
    "quickstart/encdiff": [NO_FIRST_STAGE, *SMALL_ENCDIFF, "lightning.trainer.val_check_interval=1"],
    "text-to-image/tiny_imagenet": ["EMBEDDED", "model.params.unet_config.params.c_embed_dim=64"],
    "text-to-image/example_vq_4_16": [*SMALL_LATENTS, "EMBEDDED", "model.params.unet_config.params.adm_in_channels=64"],
    **{f"encdiff/{d}_encdiff": [*WORLD, *SMALL_LATENTS, *SMALL_ENCDIFF] for d in ("shapes3d", "mpi3d", "cars3d")},
}
LATENT = ("ldm", "disdiff", "clip_disdiff", "encdiff", "text_to_image", "text_attention")
GAP_STAGES = [f"text_to_image_{kind}_{texts}" for texts in ("whole", "phrases") for kind in KINDS]
RECIPES = {
    "recipe": ["clip", "judge", "vq", "ldm", "clip_disdiff"],
    "recipe_gpu": ["clip", "judge", "vq", "ldm", "clip_disdiff"],
    "recipe_text_to_image": ["clip", "judge", "vq", "text_to_image"],
    "recipe_directions": ["clip", "judge", "vq", "text_attention", "noiseclr"],
    "recipe_gap": ["clip", "judge", "vq", *GAP_STAGES],
    "recipe_disdiff": ["vq", "ldm", "disdiff"],
    "recipe_disdiff_gpu": ["vq", "ldm_eps", "disdiff"],
    "recipe_encdiff": ["vq", "encdiff"],
    "recipe_encdiff_gpu": ["vq", "encdiff"],
}


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """An untrained CLIP of the size the quickstart trains."""
    return save_clip(tmp_path_factory.mktemp("clip") / "clip", image_size=32)


def overrides_of(name, clip_folder):
    """What a config needs where no earlier stage was trained."""
    stage = "model.params.cond_stage_config"
    clip = [f"{stage}.text_encoder.params.version={clip_folder}", f"{stage}.image_encoder.params.model={clip_folder}"]
    parts = {"CLIP": clip, "TEXT_CLIP": [f"{stage}.params.version={clip_folder}"]}
    if "DENOISER" in CONFIGS[name]:
        bench, (run, judge) = "lightning.callbacks.direction_bench.params", denoiser_and_judge(clip_folder.parent)
        parts["DENOISER"] = [f"model.params.denoiser_config.params.run={run}", f"{bench}.judge={judge}"]
        parts["DENOISER"] += [f"{bench}.clip={clip_folder}"]
    if "EMBEDDED" in CONFIGS[name]:
        train, (images, table) = "data.params.train.params", embedded(clip_folder)
        parts["EMBEDDED"] = [clip[0], f"{train}.data.params.path={images}", f"{train}.embeddings={table}"]
    return [word for entry in CONFIGS[name] for word in parts.get(entry, [entry])]


def denoiser_and_judge(folder):
    """An untrained model of texts, and an untrained judge of the world."""
    run, judge = folder / "text_model", folder / "judge.ckpt"
    if not run.exists():
        save_text_model(run)
        network = AttributeJudge(space="shapes3d", channels=4, hidden=8)
        torch.save({"hyper_parameters": dict(network.hparams), "state_dict": network.state_dict()}, judge)
    return run, judge


def embedded(clip_folder):
    """The layout of Tiny ImageNet, and the embeddings of its training images in the seed's format."""
    root, table = clip_folder.parent / "tiny-imagenet-200", clip_folder.parent / "clip.csv"
    if not table.exists():
        for k, pixels in enumerate(World3D(size=64).images(np.arange(0, 480_000, 60_000))):
            folder = root / "train" / f"n{k % 2:02d}" / "images"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / f"{k}.JPEG")
        compute_embeddings([ImageFolder(root / "train")], load_image_encoder(str(clip_folder)), table)
    return root, table


def options_of(name, clip_folder, logdir, extra=(), **changes):
    """A ``main.py`` command on a shipped config, shortened."""
    overrides = [*SHORT, *overrides_of(name, clip_folder), *extra]
    base = [str(ROOT / "configs" / f"{name}.yaml")]
    if name.removeprefix("quickstart/") in LATENT:
        base.insert(0, str(QUICKSTART / "latents.yaml"))
    if name.startswith("quickstart"):
        base.insert(0, str(QUICKSTART / "world.yaml"))
    return Options(base=tuple(base), overrides=tuple(overrides), name="x", logdir=str(logdir), train=True, **changes)


def test_every_shipped_config_is_listed():
    shipped = {str(path.relative_to(ROOT / "configs").with_suffix("")) for path in ROOT.glob("configs/*/*.yaml")}
    sizes = ("full_size", "full_size_vq", "full_size_disdiff")
    parts = {f"quickstart/{name}" for name in ("world", "diffusion", "latents", "clip_guided", *sizes, *RECIPES)}
    # In test_noiseclr_commands.py and test_noiseclr_configs.py, in training/test_own_data.py and test_docs_commands.py.
    elsewhere = ("_shared/", "directions/", "own_data/", "emoji/")
    assert {name for name in shipped - parts if not name.startswith(elsewhere)} == set(CONFIGS)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_are_valid_and_their_models_can_be_built(recipe, clip_folder):
    """Stages that need an earlier one get none; what their sizes say must still fit together."""
    stages = load_recipe(Options(recipe=str(QUICKSTART / f"{recipe}.yaml"))).stages
    assert [stage.name for stage in stages] == RECIPES[recipe]
    for stage in stages:
        base = tuple(str(ROOT / path) for path in stage.base)
        name = "text_to_image" if stage.name in GAP_STAGES else stage.name.removesuffix("_eps")
        missing = overrides_of(f"quickstart/{name}", clip_folder)
        plan = make_plan(Options(base=base, overrides=(*stage.overrides, *missing), name="x", train=True))
        assert sum(p.numel() for p in plan.config.build("model").parameters()) > 1000


# Configs that the commands on the pages of the docs train in the fast tests (test_docs_commands.py).
IN_DOCS = re.compile(r"quickstart/|.*example_vq_4_16|.*/shapes3d[-_](vq|encdiff)|text-to-image/tiny")
# Those of mpi3d differ from those of cars3d in the data set only; KL variants train in the fast tests on shapes3d only.
REPEATED = re.compile(r".*(mpi3d|(cars3d|celeba)[-_]kl)")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if IN_DOCS.match(name) or REPEATED.match(name) else [])
        for name in CONFIGS
    ],
)
def test_two_steps(name, clip_folder, tmp_path):
    plan = make_plan(options_of(name, clip_folder, tmp_path))
    folder = run(plan)
    state = torch.load(folder.last, weights_only=True)
    assert state["global_step"] >= 2
    if "clip" in name:
        assert not any(key.startswith("cond_stage_model") for key in state["state_dict"])
    assert all(torch.isfinite(value).all() for value in state["state_dict"].values() if value.is_floating_point())
    assert name != "quickstart/noiseclr" or (folder.path / "direction_bench" / "2_jacobian.png").is_file()
    if not name.startswith("quickstart"):
        with open(next(folder.path.glob("testtube/*/metrics.csv")), newline="") as stream:
            monitor = plan.config.content["model"]["params"]["monitor"]
            assert monitor in (*next(csv.reader(stream)), "train/epoch_num")  # the latter is not logged


@pytest.mark.parametrize(("data", "stage"), FAMILY)
def test_stages_fit_together(data, stage):
    """The first stage of a diffusion model is built as the autoencoder was trained; its test set is its own data."""
    autoencoder, ldm, disdiff = (
        load_config([ROOT / "configs" / f"{file}.yaml"], roots=["nowhere"], allow_pending=True).content
        for file in (
            f"autoencoder/{data}_{stage}_4_16",
            f"latent-diffusion/{data}-{stage}-4-16",
            f"latent-diffusion/{data}-{stage}-4-16-dis",
        )
    )
    for later in (ldm, disdiff):
        first_stage = later["model"]["params"]["first_stage_config"]["params"]
        assert first_stage["ddconfig"] == autoencoder["model"]["params"]["ddconfig"]
        assert first_stage.get("n_embed") == autoencoder["model"]["params"].get("n_embed")
    base = dict(ldm["model"]["params"]["unet_config"]["params"])
    assert base.items() <= disdiff["model"]["params"]["unet_config"]["params"].items()
    for content in (autoencoder, ldm, disdiff):
        assert content["lightning"]["trainer"]["max_epochs"] > 0
        targets = {content["data"]["params"][part]["target"] for part in ("train", "validation", "test")}
        assert len(targets) == 1 and next(iter(targets)).split(".")[-2] == data


@pytest.mark.parametrize("name", [name for name in CONFIGS if name.endswith(("4_16", "4-16", "4-16-dis"))])
def test_a_data_sets_own_part_is_ten_lines(name):
    lines = (ROOT / "configs" / f"{name}.yaml").read_text().splitlines()
    assert len([line for line in lines if not line.startswith("# yaml-language-server")]) <= 10 or "example" in name


@pytest.mark.parametrize("stage", ["vq", "kl"])
def test_full_size_networks(stage):
    """As large as the references' at 3 channels; a fourth adds a plane to the first and to both last convolutions."""
    first, last = (576, 577) if stage == "kl" else (0, 0)
    for name, total, trained in (
        (f"shapes3d-{stage}-4-16", 29_422_467 + first + last, 29_422_467 + first + last),
        (f"shapes3d-{stage}-4-16-dis", 52_161_158 + first + 2 * last, 22_738_691 + last),
    ):
        overrides = (NO_FIRST_STAGE, NO_BASE) if name.endswith("dis") else (NO_FIRST_STAGE,)
        base = (str(ROOT / "configs" / "latent-diffusion" / f"{name}.yaml"),)
        with torch.device("meta"):  # weights are counted, not made
            model = make_plan(Options(base=base, overrides=overrides, train=True)).config.build("model")
        network = model.model.diffusion_model
        assert sum(p.numel() for p in network.parameters()) == total
        assert sum(p.numel() for p in network.parameters() if p.requires_grad) == trained


@pytest.mark.parametrize("stage", ["vq", "kl"])
def test_small_sizes_go_with_every_stage(stage):
    latents = ("latent-diffusion", "small_latents", (NO_FIRST_STAGE,))
    for name, (room, small, overrides) in {
        f"shapes3d_{stage}_4_16": ("autoencoder", "small_autoencoder", ()),
        f"shapes3d-{stage}-4-16": latents,
        f"shapes3d-{stage}-4-16-dis": (*latents[:2], (NO_FIRST_STAGE, NO_BASE)),
    }.items():
        base = tuple(str(ROOT / "configs" / part) for part in (f"{room}/{name}.yaml", f"_shared/{small}.yaml"))
        plan = make_plan(Options(base=base, overrides=overrides, train=True))
        assert plan.name == name
        assert sum(p.numel() for p in plan.config.build("model").parameters()) < 4_000_000


def losses_of(folder):
    with open(next(folder.path.glob("testtube/*/metrics.csv")), newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row.get("train/loss")]
    return {int(row["step"]): row["train/loss"] for row in rows}


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("name", [name for name in CONFIGS if name.startswith("quickstart")])
def test_resumed_equals_uninterrupted(name, precision, clip_folder, tmp_path):
    """Six steps at once, and three steps and three more after a resume, in the midst of an epoch."""

    six = [
        f"lightning.trainer.precision={precision}",
        "lightning.trainer.max_steps=6",
        "lightning.trainer.limit_val_batches=0",
        "lightning.modelcheckpoint.params.every_n_train_steps=1",
    ]
    stop = ["lightning.callbacks.stop.target=stand_ins.StopAt", "lightning.callbacks.stop.params.step=3"]
    whole = run(make_plan(options_of(name, clip_folder, tmp_path / "whole", six, no_test=True)))
    first = run(make_plan(options_of(name, clip_folder, tmp_path / "parts", [*six, *stop], no_test=True)))
    assert len(losses_of(first)) == 3
    overrides = ("lightning.callbacks.stop=null",)
    resumed = run(make_plan(Options(resume=str(first.path), overrides=overrides, train=True, no_test=True)))
    assert losses_of(resumed) == losses_of(whole)
    assert len(losses_of(whole)) == 6
    expected, found = (torch.load(folder.last, weights_only=True)["state_dict"] for folder in (whole, resumed))
    assert all(torch.equal(value, found[key]) for key, value in expected.items())
