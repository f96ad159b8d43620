"""Samples of every kind of model, and checkpoints of the references."""

import json
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import yaml
from golden_recipe import fill
from stand_ins import TINY_UNET, vq_config

from ldm.config.loading import Config
from ldm.data.world import World3D
from ldm.diffusion.samplers import DDIMSampler, DDPMSampler, DPMSolverSampler, PLMSSampler
from ldm.diffusion.schedule import NoiseSchedule, make_beta_schedule
from ldm.evaluation.sampling.job import SamplingJob, write_samples
from ldm.evaluation.sampling.request import Request, choose_sampler, describe_sampler, split_text
from ldm.models.contracts import Samplable
from ldm.runs.load import LoadedRun, load_run
from ldm.util import ConfigError, UserError, instantiate_from_config

WORLD = {"target": "ldm.data.world.World3D", "params": {"limit": 40, "text": "attributes"}}
DATA = {"target": "ldm.data.module.DataModuleFromConfig", "params": {"batch_size": 4, "test": WORLD}}
SHARED = {"image_size": 8, "channels": 4, "timesteps": 20, "scale_by_std": True, "first_stage_config": vq_config()}
LDM = {
    "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
    "params": {
        **SHARED,
        "cond_stage_config": "__is_unconditional__",
        "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": TINY_UNET},
    },
}
SHIFT_UNET = {
    "target": "ldm.modules.diffusionmodules.openaimodel_shift.UNetModel",
    "params": {**TINY_UNET, "latent_unit": 6, "repre_emb_channels": 16, "seprate_decoder": True, "orth_emb": True},
}
CLIP_DISDIFF = {
    "target": "ldm.models.diffusion.methods.clip_disdiff.model.CLIPDisDiff",
    "params": {
        **SHARED,
        "unet_config": SHIFT_UNET,
        "cond_stage_config": {
            "text_encoder": {"target": "stand_ins.HashedText"},
            "image_encoder": {"target": "stand_ins.LinearImage"},
        },
    },
}
ENCDIFF_ENCODER = "ldm.modules.diffusionmodules.openaimodel_enc"
ENCDIFF = {
    "target": "ldm.models.diffusion.methods.encdiff.model.EncDiff",
    "params": {
        **SHARED,
        "image_size": 16,
        "channels": 3,
        "first_stage_config": vq_config(
            embed_dim=3,
            ddconfig={
                "double_z": False,
                "z_channels": 3,
                "resolution": 64,
                "in_channels": 3,
                "out_ch": 3,
                "ch": 32,
                "ch_mult": [1],
                "num_res_blocks": 1,
                "attn_resolutions": [],
                "patch_size": 4,
            },
        ),
        "cond_stage_config": {
            "target": f"{ENCDIFF_ENCODER}.Encoder4",
            "params": {"d": 128, "context_dim": 8, "latent_unit": 3},
        },
        "unet_config": {
            "target": f"{ENCDIFF_ENCODER}.UNetModel",
            "params": {
                **TINY_UNET,
                "image_size": 16,
                "in_channels": 3,
                "out_channels": 3,
                "use_spatial_transformer": True,
                "context_dim": 8,
                "latent_unit": 3,
            },
        },
    },
}
DISDIFF = {  # in the words of its own repository, where all models have one name
    "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
    "params": {
        **{key: ENCDIFF["params"][key] for key in (*SHARED, "image_size", "channels")},
        "conditioning_key": "adm",
        "cond_stage_trainable": True,
        "concat_mode": False,
        "dis_loss_flag": True,
        "cond_stage_config": {
            "target": "ldm.modules.encoders.modules.Encoder4",
            "params": {"d": 128, "latent_dim": 48},
        },
        "unet_config": {
            "target": SHIFT_UNET["target"],
            "params": {**SHIFT_UNET["params"], "image_size": 16, "in_channels": 3, "out_channels": 3, "latent_unit": 3},
        },
    },
}
DDIM = DDIMSampler(2)
TEXT = ("red floor", "", "blue object", "", "cube", "")


def write_config(path, model, data=DATA):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({"model": model} | ({} if data is None else {"data": data})))


def filled(config):
    """The model with the figures' weights in every part."""
    model = instantiate_from_config(config)
    parts = [model.model.diffusion_model, model.first_stage_model]
    for part in parts + ([model.cond_stage_model] if config in (ENCDIFF, DISDIFF) else []):
        fill(part)
    if config in (ENCDIFF, DISDIFF):
        spread_codes(model)
    if model.use_ema:
        model.model_ema.restart(model.model)
    return model


def spread_codes(model):
    """Spread the codes of different images, which are nearly equal with the recipe's weights, and their effects."""
    images = torch.from_numpy(World3D(64).images(np.arange(0, 480000, 30007))).permute(0, 3, 1, 2) / 127.5 - 1
    last = model.cond_stage_model.encoder[16]
    last.weight.data.mul_(5000)
    last.bias.data.sub_(model.encode_units(images).mean(0).flatten())
    if hasattr(model.model.diffusion_model, "shift_out"):
        model.model.diffusion_model.shift_out[2].weight.data.mul_(100)


def write_run(folder, config, data=DATA):
    """A run folder as main.py leaves it."""
    model = filled(config)
    write_config(folder / "configs" / "2026-01-01T00-00-00-project.yaml", config, data)
    (folder / "checkpoints").mkdir()
    torch.save({"state_dict": model.state_dict(), "global_step": 7, "epoch": 1}, folder / "checkpoints" / "last.ckpt")
    return model


def draw(folder, base=(), overrides=(), **options):
    request = Request(**{"count": 3, "batch_size": 2, "sampler": DDIM, **options})
    return SamplingJob(load_run(str(folder), base, overrides), request)


def distance(one, other):
    """Return the mean absolute difference, on which a quantizer's code changed by rounding has little effect."""
    return (one - other).abs().mean().item()


def test_samples_are_those_of_the_model(tmp_path):
    model = write_run(tmp_path / "run", LDM).eval()
    steps = []
    trained = load_run(str(tmp_path / "run"))
    job = SamplingJob(trained, Request(count=3, batch_size=2, sampler=DDIM, seed=5), steps.append)
    found = job.samples()
    torch.manual_seed(5)
    x_T = torch.randn(3, 4, 8, 8)
    expected = model.decode_first_stage(model.sample(x_T, None, DDIM)).clamp(-1, 1)
    assert distance(found, expected) < 1e-3
    assert steps == list(range(1, job.total_steps + 1))
    assert trained.folder == tmp_path / "run" and trained.checkpoint.name == "last.ckpt"


@pytest.mark.parametrize(("sampler", "steps"), [(DDPMSampler(), 20), (DPMSolverSampler(4), 4)])
def test_other_samplers(tmp_path, sampler, steps):
    write_run(tmp_path / "run", LDM)
    job = draw(tmp_path / "run", sampler=sampler, count=2)
    assert job.total_steps == steps
    assert job.samples().isfinite().all()


class OwnModel(pl.LightningModule):
    """A user's model of two units, without a moving average and without a network named ``model``."""

    latent_unit, latent_shape, unit_names, num_timesteps, first_stage_key = 2, (3, 4, 4), None, 10, "image"

    def encode_units(self, images):
        return images.flatten(1)[:, :2]

    def decode_units(self, codes, x_T, sampler=None, only=None):
        schedule = NoiseSchedule.from_betas(make_beta_schedule("linear", 10, 0.01, 0.2))
        return sampler.sample(lambda x, t: x * codes.mean(), x_T, schedule)


@pytest.mark.parametrize("sampler", [DDIM, PLMSSampler(3)])
def test_a_model_of_a_user_is_sampled_and_its_steps_are_counted(tmp_path, sampler):
    steps, run = [], LoadedRun(OwnModel(), Config({"model": LDM, "data": DATA}), tmp_path / "own.ckpt", tmp_path)
    job = SamplingJob(run, Request(count=3, batch_size=2, sampler=sampler, swap=True), steps.append)
    assert len(job.swaps().images) == 3 * 3
    assert steps == list(range(1, job.total_steps + 1)) and "sample" not in vars(sampler)


def test_averaged_weights_are_sampled(tmp_path):
    """The trained weights of the file are noise; its average is the filled model."""
    model = write_run(tmp_path / "run", LDM)
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    expected = draw(tmp_path / "run").samples()
    state = {
        key: torch.randn_like(value) if key.startswith("model.diffusion_model") else value
        for key, value in model.state_dict().items()
    }
    torch.save({"state_dict": state}, path)
    assert distance(draw(tmp_path / "run").samples(), expected) < 1e-3
    torch.save({"state_dict": {k: v for k, v in state.items() if not k.startswith("model_ema")}}, path)
    assert distance(draw(tmp_path / "run").samples(), expected) > 1e-2


def test_a_checkpoint_of_the_references_with_a_config_beside_it(tmp_path):
    """Old words, schedule constants among the weights, checkpoints of earlier stages that are long gone."""
    model = filled(LDM)
    state = {key: value for key, value in model.state_dict().items() if not key.startswith("model_ema.")}
    for name in ("betas", "alphas_cumprod", "posterior_mean_coef1"):
        state.setdefault(name, getattr(model, name))
    (tmp_path / "zoo").mkdir()
    torch.save({"state_dict": state, "global_step": 1}, tmp_path / "zoo" / "model.ckpt")
    old = json.loads(json.dumps(LDM))
    old["params"]["first_stage_config"]["params"]["ckpt_path"] = "/my/checkpoint/path"
    write_config(tmp_path / "zoo" / "config.yaml", old, data=None)
    beside = draw(tmp_path / "zoo").samples()
    given = draw(tmp_path / "zoo" / "model.ckpt").samples()
    assert torch.equal(beside, given)
    (tmp_path / "zoo" / "config.yaml").rename(tmp_path / "own.yaml")
    assert torch.equal(draw(tmp_path / "zoo" / "model.ckpt", base=[str(tmp_path / "own.yaml")]).samples(), given)
    with pytest.raises(UserError, match=r"no config found beside .*model.ckpt.*--base"):
        load_run(str(tmp_path / "zoo" / "model.ckpt"))


@pytest.mark.parametrize("config", [ENCDIFF, DISDIFF], ids=["EncDiff", "DisDiff"])
def test_units_of_real_images(tmp_path, config):
    """One sample per image, the first unit of the first image in all; a unit alone; the same whatever the batches."""
    data = json.loads(json.dumps(DATA))
    data["params"]["test"]["params"]["size"] = 64
    write_run(tmp_path / "run", config, data)
    grid = draw(tmp_path / "run", swap=True).swaps()
    assert grid.rows == ["samples", "unit 1", "unit 2", "unit 3"] and len(grid.images) == 4 * 3
    samples = draw(tmp_path / "run", batch_size=3).samples()
    assert distance(grid.images[:3], samples) < 1e-3
    for row in range(1, 4):  # a sample that takes a unit from itself stays what it is
        assert distance(grid.images[3 * row], samples[0]) < 1e-3
    assert max(distance(grid.images[3 * row + 1], samples[1]) for row in range(1, 4)) > 1e-3
    alone = draw(tmp_path / "run", unit=1).samples()
    assert distance(alone, samples) > 1e-3
    for option, flag in (("guidance", "--guidance_scale"), ("classes", "--class"), ("texts", "--text")):
        with pytest.raises(UserError, match=f"{flag}: .* samples from the units of images"):
            draw(tmp_path / "run", **{option: 2.0 if option == "guidance" else (TEXT,)})
    partial = draw(tmp_path / "run", unit=1, swap=True)
    assert partial.total_steps == 2 * 2 * 2
    assert partial.swaps().rows == ["samples", "unit 2"]


def test_texts_of_the_request_and_of_the_data(tmp_path):
    model = write_run(tmp_path / "run", CLIP_DISDIFF).eval()
    asked = draw(tmp_path / "run", texts=(TEXT,), count=2).samples()
    torch.manual_seed(23)
    expected = model.sample_edit([list(TEXT)] * 2, torch.randn(2, 4, 8, 8), DDIM)
    assert distance(asked, expected) < 1e-3
    loud = {"count": 2, "guidance": 100.0}
    from_data, from_text = draw(tmp_path / "run", **loud), draw(tmp_path / "run", texts=(TEXT,), **loud)
    assert distance(from_data.samples(), from_text.samples()) > 1e-3
    texts = (TEXT, ("green floor", *TEXT[1:]))
    grid = draw(tmp_path / "run", count=2, swap=True, texts=texts, guidance=100.0).swaps()
    rows = grid.images.unflatten(0, (7, 2))
    assert distance(rows[1, 1], rows[0, 1]) > 1e-3  # the floor is the first one's
    assert distance(rows[2, 1], rows[0, 1]) < 1e-3  # the second unit was the same before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unit": 0}, "--unit"),
        ({"swap": True}, "--swap"),
        ({"texts": (TEXT,)}, "--text"),
        ({"classes": (1,)}, "--class"),
        ({"guidance": 2.0}, "--guidance_scale"),
    ],
)
def test_options_that_do_not_fit_the_model(tmp_path, options, message):
    write_run(tmp_path / "run", LDM)
    with pytest.raises(UserError, match=f"{message}: LatentDiffusion samples from noise without a condition"):
        draw(tmp_path / "run", **options)


def test_requests_out_of_range(tmp_path):
    write_run(tmp_path / "run", CLIP_DISDIFF, data=None)
    with pytest.raises(UserError, match="--unit: expected 1 to 6, got 7"):
        draw(tmp_path / "run", unit=6)
    with pytest.raises(UserError, match="expected 6 attributes .* got 2"):
        draw(tmp_path / "run", texts=(("red floor", "cube"),))
    with pytest.raises(UserError, match="the config has no `data`. Add one with --base"):
        draw(tmp_path / "run")
    for wrong, flag in (({"count": 0}, "-n"), ({"batch_size": 0}, "--batch_size")):
        with pytest.raises(ConfigError, match=f"{flag}: expected at least 1, got 0"):
            Request(**wrong)
    with pytest.raises(ConfigError, match="between 2 and 20"):
        draw(tmp_path / "run", texts=(TEXT,), sampler=DDIMSampler(21)).samples()


def test_checkpoints_that_do_not_fit(tmp_path):
    write_run(tmp_path / "run", LDM, data=None)
    write_config(tmp_path / "other.yaml", CLIP_DISDIFF, data=None)
    with pytest.raises(UserError, match=r"lacks \d+ weights of CLIPDisDiff, such as .*shift"):
        load_run(str(tmp_path / "run"), [str(tmp_path / "other.yaml")])
    write_config(tmp_path / "autoencoder.yaml", vq_config(), data=None)
    with pytest.raises((UserError, ConfigError), match="VQModelInterface"):
        load_run(
            str(tmp_path / "run" / "checkpoints" / "last.ckpt"), [str(tmp_path / "autoencoder.yaml")], needs=Samplable
        )
    path = tmp_path / "vq.ckpt"
    state = instantiate_from_config(vq_config()).state_dict()
    for wrong, match in (
        ({"quant_conv.weight": torch.zeros(3, 3, 1, 1)}, r"vq.ckpt: 1 weights .*quant_conv.weight: expected .*got \(3"),
        ({"quant_conv.weight": None}, r"vq.ckpt lacks 1 weights of VQModelInterface, such as quant_conv.weight"),
    ):
        torch.save({"state_dict": {**state, **wrong}}, path)
        with pytest.raises(UserError, match=match):
            load_run(str(path), [str(tmp_path / "autoencoder.yaml")])
    with pytest.raises(UserError, match="expected checkpoints/ or model.ckpt"):
        load_run(str(tmp_path))
    with pytest.raises(UserError, match="does not exist"):
        load_run(str(tmp_path / "nothing"))


def test_files(tmp_path):
    images = torch.linspace(-1, 1, 2 * 3 * 4 * 5).view(2, 3, 4, 5)
    paths = write_samples(tmp_path / "deep" / "folder", images, None, {"seed": 1})
    assert [path.name for path in paths] == ["2x4x5x3-samples.npz", "samples.png", "sampling.json"]
    pixels = np.load(paths[0])["arr_0"]
    assert pixels.shape == (2, 4, 5, 3) and pixels.dtype == np.uint8 and pixels.min() == 0 and pixels.max() == 255
    assert json.loads(paths[2].read_text()) == {"seed": 1}
    assert sorted(path.name for path in Path(paths[0]).parent.iterdir()) == sorted(path.name for path in paths)


def test_texts_on_the_command_line():
    assert split_text(" red floor|| cube ") == ("red floor", "", "cube")


def test_samplers_on_the_command_line():
    defaults = {"num_steps": 50, "eta": 1.0}
    described = describe_sampler(choose_sampler(None, defaults, num_steps=7, eta=None))
    assert described == {"name": "ddim", "num_steps": 7, "spacing": "uniform", "temperature": 1.0, "eta": 1.0}
    assert describe_sampler(choose_sampler("ddim", defaults))["eta"] == 1.0
    assert choose_sampler("dpm_solver", defaults).num_steps == 20
    path = "ldm.diffusion.samplers.plms.PLMSSampler"
    assert describe_sampler(choose_sampler(path, defaults, num_steps=3))["name"] == "plms"
    with pytest.raises(ConfigError, match="eta"):
        choose_sampler("plms", defaults, eta=0.5)
    with pytest.raises(ConfigError, match="Did you mean 'ddpm'"):
        choose_sampler("ddqm", defaults)


@pytest.mark.parametrize("config", [LDM, ENCDIFF], ids=["LDM", "EncDiff"])
def test_an_eta_beyond_the_schedule_is_refused(tmp_path, config):
    data = json.loads(json.dumps(DATA))
    data["params"]["test"]["params"]["size"] = 64
    write_run(tmp_path / "run", config, data)
    with pytest.raises(ConfigError, match="expected eta of at most .* got 5"):
        draw(tmp_path / "run", sampler=DDIMSampler(4, eta=5.0)).samples()


def test_conditions_come_from_the_first_section_that_has_them(tmp_path):
    """The quickstart's test set has no text, its validation set does."""
    plain = {"target": WORLD["target"], "params": {"limit": 40}}
    data = {**DATA, "params": {"batch_size": 4, "test": plain, "validation": WORLD, "train": plain}}
    write_run(tmp_path / "run", CLIP_DISDIFF, data)
    assert draw(tmp_path / "run", unit=1).samples().isfinite().all()
    assert draw(tmp_path / "run", swap=True).swaps().rows[0] == "samples"
    data["params"].pop("validation")
    write_config(tmp_path / "none.yaml", CLIP_DISDIFF, {**data, "params": {**data["params"], "validation": None}})
    with pytest.raises(UserError, match="test: .*'text'.*train: .*'text'"):
        draw(tmp_path / "run", base=[str(tmp_path / "none.yaml")])


@pytest.mark.parametrize("config", [ENCDIFF, CLIP_DISDIFF], ids=["EncDiff", "CLIP-DisDiff"])
def test_all_rows_of_swaps_draw_the_same_noise(tmp_path, config):
    """A row whose unit is equal in all samples equals the row above, whatever the sampler draws on its way."""
    data = json.loads(json.dumps(DATA))
    data["params"]["test"]["params"]["size"] = 64 if config is ENCDIFF else 32
    write_run(tmp_path / "run", config, data)
    noisy = {"sampler": DDIMSampler(2, eta=1.0), "count": 4, "batch_size": 2}
    job = draw(tmp_path / "run", swap=True, **noisy)
    job.source.swap = lambda cond, first, unit: cond  # every row asks for the same
    rows = job.swaps().images.unflatten(0, (-1, 4))
    assert distance(rows[1:], rows[:1].expand_as(rows[1:])) < 1e-3
    assert distance(rows[0], draw(tmp_path / "run", **noisy).samples()) < 1e-3
    assert distance(rows[0], draw(tmp_path / "run", count=4).samples()) > 1e-3  # eta adds noise
