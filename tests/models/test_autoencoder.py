import pytest
import pytorch_lightning as pl
import torch
from golden_recipe import KL_DDCONFIG, assert_stat, fill, inp, load_golden
from stand_ins import TINY_DDCONFIG
from torch.utils.data import DataLoader

from ldm.models.autoencoder import AutoencoderKL, VQModel, VQModelInterface, psnr
from ldm.training.callbacks.setup import SetupCallback
from ldm.util import ConfigError, UserError

LOSS = "ldm.modules.losses.vqperceptual.VQLPIPSWithDiscriminator"
KL_LOSS = "ldm.modules.losses.contperceptual.LPIPSWithDiscriminator"


def build(disc_weight=0.0, **params):
    torch.manual_seed(0)
    factor = 1.0 if disc_weight else 0.0
    loss = {
        "disc_start": 0,
        "disc_weight": disc_weight,
        "disc_factor": factor,
        "perceptual_weight": 0.0,
        "disc_ndf": 8,
        "disc_num_layers": 1,
    }
    lossconfig = {"target": LOSS, "params": loss}
    return VQModel(ddconfig=TINY_DDCONFIG, lossconfig=lossconfig, n_embed=32, embed_dim=4, **params)


def build_kl(disc_weight=0.0, **params):
    torch.manual_seed(0)
    loss = {
        "disc_start": 0,
        "disc_weight": disc_weight,
        "perceptual_weight": 0.0,
        "disc_ndf": 8,
        "disc_num_layers": 1,
        "kl_weight": 1e-3,
    }
    ddconfig = {**TINY_DDCONFIG, "double_z": True}
    return AutoencoderKL(ddconfig=ddconfig, lossconfig={"target": KL_LOSS, "params": loss}, embed_dim=4, **params)


def images(count=8):
    generator = torch.Generator().manual_seed(1)
    return [{"image": torch.randint(0, 256, (32, 32, 3), generator=generator, dtype=torch.uint8)} for _ in range(count)]


def train(model, steps=4, **options):
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(model, DataLoader(images(), batch_size=2))
    return trainer


@pytest.mark.parametrize("disc_weight", [0.0, 0.75])
def test_training_changes_what_it_should(disc_weight):
    model = build(disc_weight)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = train(model, steps=4)
    after = model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(name.startswith("encoder") for name in moved)
    assert any(name.startswith("quantize.embedding") for name in moved)
    assert any(name.startswith("loss.discriminator") for name in moved) == (disc_weight > 0)
    assert {"train/loss", "train/psnr", "train/rec_loss", "train/epoch_num"} <= set(trainer.callback_metrics)


def test_the_discriminator_does_not_train_the_autoencoder():
    model = build(0.75)
    x = model.get_input({"image": torch.stack([item["image"] for item in images(2)])})
    reconstruction, codebook_loss, indices = model(x)
    loss, _ = model.loss(
        codebook_loss,
        x,
        reconstruction,
        1,
        0,
        last_layer=model.get_last_layer(),
        split="train",
        predicted_indices=indices,
    )
    loss.backward()
    assert all(p.grad is None for p in model.encoder.parameters())
    assert any(p.grad is not None and p.grad.any() for p in model.loss.discriminator.parameters())


def test_two_half_batches_accumulated_move_the_weights_once():
    model = build()
    model.accumulate_grad_batches = 2
    assert train(model, steps=2).global_step == 2  # four batches


@pytest.mark.parametrize("disc_weight", [0.0, 0.75])
def test_a_step_of_both_optimizers_counts_once(disc_weight):
    model = build(disc_weight)
    seen = []
    forward = model.loss.forward
    model.loss.forward = lambda *args, **kwargs: seen.append(args[4]) or forward(*args, **kwargs)
    trainer = train(model, steps=3)
    assert trainer.global_step == trainer.fit_loop.total_batch_idx + 1 == 3
    assert seen == [step for step in range(3) for _ in trainer.optimizers]
    assert all(state["step"] == 3 for optimizer in trainer.optimizers for state in optimizer.state.values())


def test_interface_skips_the_codebook_only_when_told():
    lossconfig = {"target": "torch.nn.Identity"}
    model = VQModelInterface(embed_dim=4, ddconfig=TINY_DDCONFIG, lossconfig=lossconfig, n_embed=8).eval()
    h = model.encode(torch.rand(2, 3, 32, 32) * 2 - 1)
    assert h.shape == (2, 4, 8, 8)
    assert not torch.equal(model.decode(h), model.decode(h, force_not_quantize=True))
    torch.testing.assert_close(model.decode(h), model.decode(model.quantize(h)[0], force_not_quantize=True))
    assert model.reconstruct(torch.zeros(2, 3, 32, 32))[0].shape == (2, 3, 32, 32)  # it can be trained, too


def test_a_size_that_does_not_divide_names_both_numbers():
    assert build()(torch.zeros(1, 3, 64, 48))[0].shape == (1, 3, 64, 48)
    with pytest.raises(UserError, match="multiples of 4 .*, got 64 x 50"):
        build()(torch.zeros(1, 3, 64, 50))


def test_weights_of_a_latent_diffusion_checkpoint_are_found(tmp_path):
    source = build()
    state = {f"first_stage_model.{name}": value for name, value in source.state_dict().items()}
    torch.save({"state_dict": {**state, "betas": torch.zeros(3)}}, tmp_path / "ldm.ckpt")
    target = build(ckpt_path=str(tmp_path / "ldm.ckpt"))
    assert torch.equal(source.encoder.conv_in.weight, target.encoder.conv_in.weight)


def test_weights_of_another_shape_name_found_and_wanted(tmp_path):
    state = build().state_dict()
    state["quant_conv.weight"] = torch.zeros(3, 4, 1, 1)
    torch.save({"state_dict": state}, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match=r"quant_conv.weight: expected \(4, 4, 1, 1\), got \(3, 4, 1, 1\)"):
        build(ckpt_path=str(tmp_path / "other.ckpt"))


def test_a_checkpoint_of_something_else_is_told(tmp_path):
    torch.save({"state_dict": {"fc.weight": torch.zeros(2)}}, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match="another model"):
        build(ckpt_path=str(tmp_path / "other.ckpt"))


def test_psnr_of_a_known_error():
    x = torch.zeros(1, 3, 4, 4)
    assert psnr(x + 0.2, x).item() == pytest.approx(20.0, abs=1e-4)  # 0.1 on [0, 1]


def test_ema_is_used_and_left(tmp_path):
    model = build(use_ema=True)
    raw = model.quant_conv.weight.clone()
    model.model_ema.quant_convweight.zero_()
    with model.ema_scope():
        assert not model.quant_conv.weight.any()
    assert torch.equal(model.quant_conv.weight, raw)


@pytest.mark.parametrize("disc_weight", [0.0, 0.5])
def test_kl_trains_what_it_should_and_its_variance(disc_weight):
    model = build_kl(
        disc_weight,
        scheduler_config={
            "target": "ldm.lr_scheduler.LambdaLinearScheduler",
            "params": {"warm_up_steps": [1], "cycle_lengths": [100], "f_start": [1.0], "f_max": [1.0], "f_min": [1.0]},
        },
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = train(model, steps=4, num_sanity_val_steps=0)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(before[name], value)}
    assert {"encoder.conv_in.weight", "decoder.conv_out.weight", "quant_conv.weight", "post_quant_conv.bias"} <= moved
    assert model.loss.logvar < before["loss.logvar"]  # the error is below one: its variance shrinks
    assert any(name.startswith("loss.discriminator") for name in moved) == (disc_weight > 0)
    wanted = {"train/loss", "train/rec_loss", "train/kl_loss", "train/logvar", "train/epoch_num", "train/psnr"}
    assert wanted <= set(trainer.callback_metrics)


def test_kl_validation_and_pictures_do_not_depend_on_a_draw():
    model = build_kl(0.5)
    loader = DataLoader(images(4), batch_size=2)
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    first, second = (trainer.validate(model, loader, verbose=False)[0] for _ in range(2))
    assert {"val/rec_loss", "val/kl_loss", "val/psnr", "val/disc_loss"} <= set(first)
    assert first == second
    assert trainer.test(model, loader, verbose=False)[0]["figure/psnr"] > 0
    batch = {"image": torch.stack([item["image"] for item in images(3)])}
    pictures = [model.eval().log_images(batch, N=2) for _ in range(2)]
    assert {name: tuple(value.shape) for name, value in pictures[0].items()} == {
        name: (2, 3, 32, 32) for name in ("inputs", "reconstructions", "samples")
    }
    assert torch.equal(pictures[0]["reconstructions"], pictures[1]["reconstructions"])
    assert not torch.equal(*(p["samples"] for p in pictures))
    x = model.get_input(batch)
    assert not torch.equal(model(x)[0], model(x)[0])  # drawn, as the references do


def test_kl_figures_and_keys():
    golden = load_golden("modules")
    model = AutoencoderKL(ddconfig=KL_DDCONFIG, embed_dim=4, lossconfig={"target": "torch.nn.Identity"})
    fill(model)
    with torch.no_grad():
        posterior = model.encode(inp((2, 3, 64, 64)))
        assert_stat(posterior.mode(), golden["kl_mean"])
        assert_stat(posterior.logvar, golden["kl_logvar"])
        assert_stat(model.decode(posterior.mode()), golden["kl_decode_mode"])
    assert posterior.kl().tolist() == pytest.approx(golden["kl_kl"], rel=1e-5)
    shapes = {name: tuple(value.shape) for name, value in build_kl(0.5).state_dict().items()}
    assert shapes["quant_conv.weight"] == (8, 8, 1, 1) and shapes["post_quant_conv.weight"] == (4, 4, 1, 1)
    assert shapes["loss.logvar"] == () and "loss.discriminator.main.0.weight" in shapes
    assert not any(name.startswith("quantize") for name in shapes)


def test_kl_starts_from_a_latent_diffusion_checkpoint_and_freezes_without_its_loss(tmp_path, caplog):
    source = build_kl(0.5)
    torch.save(source.state_dict(), tmp_path / "kl.ckpt")
    state = {f"first_stage_model.{name}": value for name, value in source.state_dict().items()}
    torch.save({"state_dict": {**state, "betas": torch.zeros(3)}}, tmp_path / "ldm.ckpt")
    for name in ("kl", "ldm"):
        for lossconfig in ("torch.nn.Identity", "ldm.modules.losses.contperceptual.DummyLoss"):
            target = AutoencoderKL(
                ddconfig={**TINY_DDCONFIG, "double_z": True},
                embed_dim=4,
                lossconfig={"target": lossconfig},
                ckpt_path=str(tmp_path / f"{name}.ckpt"),
            )
            assert torch.equal(source.quant_conv.weight, target.quant_conv.weight)
    assert "unexpected keys" not in caplog.text
    with pytest.raises(ConfigError, match="double_z"):
        AutoencoderKL(ddconfig=TINY_DDCONFIG, embed_dim=4, lossconfig={"target": "torch.nn.Identity"})


def test_kl_resumes_from_an_optimizer_state_without_the_variance(tmp_path):
    """The optimizer of the reference code lacks the last parameter."""
    options = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    loader, trainer = DataLoader(images(4), batch_size=2), pl.Trainer(max_steps=2, **options)
    trainer.fit(build_kl(0.5), loader)
    trainer.save_checkpoint(tmp_path / "ours.ckpt")
    content = torch.load(tmp_path / "ours.ckpt", weights_only=True)
    state = content["optimizer_states"][0]
    last = state["param_groups"][0]["params"].pop()
    del state["state"][last]
    torch.save(content, tmp_path / "theirs.ckpt")
    model = build_kl(0.5)
    trainer = pl.Trainer(max_steps=4, callbacks=[SetupCallback(str(tmp_path), {}, {})], **options)
    trainer.fit(model, loader, ckpt_path=tmp_path / "theirs.ckpt", weights_only=True)
    states = trainer.optimizers[0].state
    assert states[model.encoder.conv_in.weight]["step"] == 4 and states[model.loss.logvar]["step"] == 2


def test_half_precision_is_widened_for_the_divergence():
    model = build_kl()
    x = model.get_input({"image": torch.stack([item["image"] for item in images(2)])})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model.encode(x)
    assert half.mean.dtype == torch.float32
    torch.testing.assert_close(half.kl(), model.encode(x).kl(), rtol=0.05, atol=0.0)
