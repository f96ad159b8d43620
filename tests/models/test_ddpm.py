import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from stand_ins import TINY_UNET, vq_config
from torch.utils.data import DataLoader

from ldm.diffusion.conditions import TensorCondition
from ldm.diffusion.samplers import DDIMSampler, DPMSolverSampler
from ldm.models.diffusion.ddpm import DDPM, LatentDiffusion
from ldm.util import ConfigError, UserError

UNET = {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": TINY_UNET}


def build(**params):
    torch.manual_seed(0)
    defaults = {"image_size": 8, "channels": 4, "timesteps": 20, "monitor": None}
    return LatentDiffusion(
        first_stage_config=vq_config(),
        cond_stage_config="__is_unconditional__",
        unet_config=UNET,
        **{**defaults, **params},
    )


def images(count=8, size=32):
    generator = torch.Generator().manual_seed(1)
    shape = (size, size, 3)
    return [{"image": torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)} for _ in range(count)]


def batch(count=2, size=32):
    return {"image": torch.stack([item["image"] for item in images(count, size)])}


def train(model, **options):
    trainer = pl.Trainer(
        max_steps=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(model, DataLoader(images(), batch_size=2))
    return trainer


def test_training_reaches_the_network_and_not_the_first_stage():
    model = build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = train(model)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(before[name], value)}
    assert any(name.startswith("model.diffusion_model") for name in moved)
    assert any(name.startswith("model_ema.diffusion_model") for name in moved)
    assert not any(name.startswith("first_stage_model") for name in moved)
    assert {"train/loss", "train/loss_simple", "train/loss_vlb"} <= set(trainer.callback_metrics)
    assert model.first_stage_model.training is False


def test_time_steps_lean_towards_noise_in_training_alone():
    even, leaning = build(), build(noise_bias=2.0)
    torch.manual_seed(0)
    resting = leaning.eval().draw_timesteps(20_000)
    even, leaning = even.train().draw_timesteps(20_000), leaning.train().draw_timesteps(20_000)
    assert even.min() == 0 and even.max() == 19 and leaning.max() == 19
    assert even.float().mean().item() == pytest.approx(9.5, abs=0.1) == resting.float().mean().item()
    assert (leaning < 10).float().mean().item() == pytest.approx(0.25, abs=0.01)  # P(u^(1/2) < 1/2)
    with pytest.raises(ConfigError, match="noise_bias.*got 0.0"):
        build(noise_bias=0.0)


def test_scale_by_std_gives_latents_of_unit_deviation():
    model = build(scale_by_std=True)
    train(model)
    z = model.get_input(batch())  # the very batch it was measured on comes first
    assert z.std().item() == pytest.approx(1.0, abs=1e-4)
    assert "scale_factor" in model.state_dict()
    assert "scale_factor" not in build().state_dict()


@pytest.mark.parametrize("parameterization", ["eps", "x0"])
def test_noise_and_start_are_two_views_of_one_prediction(parameterization):
    model = build(parameterization=parameterization).eval()
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([3, 17])
    eps = model.denoiser(None)(x, t)
    x0 = model.start_from_prediction(x, t, model.apply_model(x, t, None))
    torch.testing.assert_close(model.schedule.predict_start_from_noise(x, t, eps), x0, atol=1e-4, rtol=1e-4)


def test_loss_is_the_sum_of_its_terms():
    model = build(original_elbo_weight=0.5, l_simple_weight=2.0, loss_type="l1")
    prediction, target, t = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([3, 17])
    loss, terms = model.weigh_losses(prediction, target, t, added=torch.tensor([1.0, 3.0]))
    simple = (prediction - target).abs().mean(dim=(1, 2, 3))
    expected = 2 * simple.mean() + 2.0 + 0.5 * (model.lvlb_weights[t] * simple).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(terms["loss_dis"], torch.tensor(2.0))


def test_quantising_respects_the_scale():
    model = build(scale_factor=0.25).eval()
    codes = model.quantize_latent(torch.randn(1, 4, 8, 8)) / 0.25
    torch.testing.assert_close(codes, model.first_stage_model.quantize(codes)[0])


@pytest.mark.parametrize("steps", [5, None])
def test_samples_and_pictures(steps):
    model = build().eval()
    pictures = model.log_images(batch(3), N=2, n_row=2, ddim_steps=steps, plot_denoise_rows=True)
    assert {"inputs", "reconstruction", "samples", "samples_inpainting", "samples_outpainting", "mask"} <= set(pictures)
    assert pictures["samples"].shape == (2, 3, 32, 32)
    row = pictures["diffusion_row"]
    assert len(row.images) == len(row.rows) * len(row.columns)


def test_pixels_without_a_first_stage():
    model = DDPM(unet_config=UNET, image_size=8, channels=4, timesteps=10, monitor=None)
    loss, _ = model.p_losses(torch.randn(2, 4, 8, 8), None, torch.tensor([1, 9]))
    loss.backward()
    assert model.sample(torch.randn(1, 4, 8, 8), sampler=DDIMSampler(2, eta=1.0)).shape == (1, 4, 8, 8)


def test_class_condition_through_cross_attention():
    unet = {**TINY_UNET, "use_spatial_transformer": True, "context_dim": 5}
    model = LatentDiffusion(
        first_stage_config=vq_config(),
        cond_stage_config={"target": "stand_ins.HashedText", "params": {"width": 5}},
        cond_stage_key="text",
        conditioning_key="crossattn",
        image_size=8,
        channels=4,
        timesteps=10,
        monitor=None,
        unet_config={"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": unet},
    )
    loss, _, _ = model.shared_step({**batch(2), "text": [["a", "b"], ["c", "d"]]})
    assert torch.isfinite(loss)


@pytest.mark.parametrize(
    ("given", "words"),
    [({}, "entry 'image'"), (batch(1, 36), "9 x 9 for images of 36 x 36"), ({"image": torch.zeros(3, 3)}, "got ")],
)
def test_bad_batches_are_explained(given, words):
    with pytest.raises(UserError, match=words):
        build().shared_step(given)


def test_unknown_options_list_the_known_ones():
    with pytest.raises(ConfigError, match="'l1' or 'l2'"):
        build(loss_type="l3")
    with pytest.raises(ConfigError, match="crossattn"):
        DDPM(unet_config=UNET, conditioning_key="cross")


def test_weights_without_an_average_restart_it(tmp_path):
    state = build(use_ema=False).state_dict()
    state = {name: value + 1 if "input_blocks.0.0.weight" in name else value for name, value in state.items()}
    torch.save({"state_dict": state}, tmp_path / "raw.ckpt")
    model = build(ckpt_path=str(tmp_path / "raw.ckpt"))
    weight = model.model.diffusion_model.input_blocks[0][0].weight
    assert torch.equal(model.model_ema.diffusion_modelinput_blocks00weight, weight)


def test_only_the_network_may_be_loaded(tmp_path):
    state = {name: value + 1 if value.is_floating_point() else value for name, value in build().state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "whole.ckpt")
    before = build().first_stage_model.quant_conv.weight
    model = build(ckpt_path=str(tmp_path / "whole.ckpt"), load_only_unet=True)
    assert torch.equal(model.first_stage_model.quant_conv.weight, before)
    assert torch.equal(model.model.diffusion_model.out[0].weight, state["model.diffusion_model.out.0.weight"])


def test_a_numbered_checkpoint_holds_the_average_of_its_own_step(tmp_path):
    model = build(use_ema=True)
    numbered = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    loader = DataLoader([{name: value[0] for name, value in batch(1).items()}] * 2, batch_size=1)
    trainer = pl.Trainer(
        max_steps=2,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[numbered],
        default_root_dir=tmp_path,
    )
    trainer.fit(model, loader)
    for step in (1, 2):
        state = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)["state_dict"]
        assert state["model_ema.num_updates"] == step


def test_unexpected_options_name_the_nearest_one():
    with pytest.raises(ConfigError, match="unexpected key 'beta_schedul'. Did you mean 'beta_schedule'"):
        DDPM(unet_config=UNET, beta_schedul="linear")


def test_v_prediction_trains_and_samples():
    model = build(parameterization="v")
    loss, terms = model.p_losses(torch.randn(2, 4, 8, 8), None, torch.tensor([3, 7]))
    loss.backward()
    assert loss.isfinite() and terms["loss_vlb"].isfinite()
    assert model.sample(torch.randn(1, 4, 8, 8), sampler=DPMSolverSampler(3)).isfinite().all()


def test_conditions_are_dropped_per_sample_in_training_alone():
    class Conditioned(DDPM):
        def get_condition(self, batch):
            return TensorCondition(batch["cond"])

    batch, t = {"cond": torch.ones(400, 3)}, torch.zeros(400, dtype=torch.long)
    model = Conditioned(unet_config=UNET, cond_drop_prob=0.25)
    dropped = (model.condition_at(batch, t).value == 0).all(1).float().mean()
    assert 0.15 < dropped < 0.35
    assert (model.eval().condition_at(batch, t).value == 1).all()
    with pytest.raises(ConfigError, match="cond_drop_prob"):
        Conditioned(unet_config=UNET, cond_drop_prob=1.5)


def test_parts_are_declared_in_one_place():
    model = DDPM(unet_config=UNET)
    model.add_frozen("judge", torch.nn.Linear(2, 2))
    model.add_trained("directions", torch.nn.Parameter(torch.zeros(3)), averaged=True)
    model.add_trained("head", torch.nn.Linear(2, 1))
    model.train()
    assert not model.judge.training and model.head.training
    assert not any(p.requires_grad for p in model.judge.parameters())
    shapes = [tuple(p.shape) for p in model.trained_parameters()]
    assert shapes[-3:] == [(3,), (1, 2), (1,)]
    assert {"directions", "head.weight", "judge.weight", "model_ema.directions"} <= set(model.state_dict())
    with torch.no_grad():
        model.directions.add_(1)
    with model.ema_scope():
        assert not model.directions.any()
    assert model.directions.all()


def test_the_network_alone_still_gets_a_scale(tmp_path):
    """load_only_unet with scale_by_std: the file's scale if it has one, else it is measured."""
    source = build(scale_by_std=True)
    source.scale_factor.fill_(0.37)
    torch.save({"state_dict": source.state_dict()}, tmp_path / "scaled.ckpt")
    torch.save({"state_dict": build().state_dict()}, tmp_path / "plain.ckpt")
    options = {"scale_by_std": True, "load_only_unet": True}
    model = build(ckpt_path=str(tmp_path / "scaled.ckpt"), **options)
    assert model.scale_factor.item() == pytest.approx(0.37)
    train(model)
    assert model.scale_factor.item() == pytest.approx(0.37)
    model = build(ckpt_path=str(tmp_path / "plain.ckpt"), **options)
    train(model)
    assert model.scale_factor.item() != 1.0


class WithReader(LatentDiffusion):
    def __init__(self, **options):
        super().__init__(**options)
        self.add_trained("reader", torch.nn.Linear(3, 2), averaged=True)


def test_added_parts_start_from_the_checkpoint_of_the_config(tmp_path):
    options = {"first_stage_config": vq_config(), "cond_stage_config": "__is_unconditional__", "unet_config": UNET}
    options |= {"image_size": 8, "channels": 4, "timesteps": 20}
    source = WithReader(**options)
    torch.nn.init.constant_(source.reader.weight, 5.0)
    source.model_ema.readerweight.fill_(4.0)
    torch.save({"state_dict": source.state_dict()}, tmp_path / "whole.ckpt")
    model = WithReader(**options, ckpt_path=str(tmp_path / "whole.ckpt"))
    assert (model.reader.weight == 5).all() and (model.model_ema.readerweight == 4).all()
    fresh = WithReader(**options, ckpt_path=str(tmp_path / "whole.ckpt"), ignore_keys=["reader", "model_ema"])
    assert not (fresh.reader.weight == 5).any() and torch.equal(fresh.model_ema.readerweight, fresh.reader.weight)


def test_the_samplers_of_pictures():
    """The option, else the config's, else DDIM with at most as many steps as the schedule has."""
    assert build().choose_sampler(None, 200, 1.0).num_steps == 20
    configured = build(sampler={"target": "ldm.diffusion.samplers.PLMSSampler", "params": {"num_steps": 4}})
    assert configured.choose_sampler(None, 200, 1.0).num_steps == 4
    assert configured.choose_sampler("ddim", 200, 1.0).num_steps == 50
    pictures = build(log_every_t=5).log_images(batch(), return_keys=["samples"])
    assert list(pictures) == ["samples"]
    assert list(build().log_images(batch(), sample=False, return_keys=["inputs"])) == ["inputs"]


def test_options_that_cannot_work_are_refused():
    with pytest.raises(ConfigError, match="timesteps: expected at least 2, got 1"):
        build(timesteps=1)
    with pytest.raises(ConfigError, match="cond_drop_prob: expected a model with a condition"):
        build(cond_drop_prob=0.1)
