import copy

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import ModelCheckpoint
from stand_ins import TINY_KL, TINY_UNET, vq_config
from torch.utils.data import DataLoader

from ldm.data.collate import collate
from ldm.diffusion.samplers import DDIMSampler
from ldm.models.diffusion.latent import LatentDiffusion
from ldm.models.diffusion.methods.disdiff.model import DisDiff
from ldm.models.diffusion.units import UnitCodes
from ldm.training.callbacks.step_seed import StepSeed
from ldm.util import ConfigError, UserError

UNITS, WIDTH = 3, 4
ENCODERS = "ldm.modules.encoders.modules"
SHIFT = "ldm.modules.diffusionmodules.openaimodel_shift.UNetModel"


def build(encoder="Encoder4", unet=None, **params):
    torch.manual_seed(0)
    network = {
        **TINY_UNET,
        "latent_unit": UNITS,
        "repre_emb_channels": WIDTH,
        "seprate_decoder": True,
        "orth_emb": True,
        **(unet or {}),
    }
    defaults = {"first_stage_config": vq_config(), "image_size": 8, "channels": 4, "timesteps": 20, "monitor": None}
    encoder = {"target": f"{ENCODERS}.{encoder}", "params": {"d": 8, "latent_dim": UNITS * WIDTH, "image_size": 32}}
    options = {**defaults, "cond_stage_config": encoder, **params}
    model = DisDiff(unet_config={"target": SHIFT, "params": network}, **options)
    for parameter in model.model.diffusion_model.trainable_parameters():
        if parameter.ndim > 1 and not parameter.any():  # layers that start at zero would hide what is behind them
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def items(count=4):
    generator = torch.Generator().manual_seed(1)
    return [{"image": torch.randint(0, 256, (32, 32, 3), generator=generator, dtype=torch.uint8)} for _ in range(count)]


def batch(count=4):
    return collate(items(count))


def step(model, count=4):
    """One training step's loss and terms, always on the same draws."""
    torch.manual_seed(3)
    loss, terms, _ = model.train().shared_step(batch(count))
    return loss, terms


def grads_of(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


OPTIONS = [
    {},
    {"dis_loss_type": "IM"},
    {"parameterization": "x0"},
    {"train_enc_flag": True},
    {"detach_flag": True},
    {"encoder": "Encoder4_vae", "kl_loss_flag": True},
    {"first_stage_config": TINY_KL},
    {"dis_batch_size": 2},
    {"unet": {"orth_emb": False}},
    {"unet": {"wo_part_emb": True}},
    {"unet": {"seprate_decoder": False}},
    {"unet": {"unit_chunk": 2}},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradients_reach_the_decoder_and_the_encoder_alone(options):
    model = build(**options)
    loss, terms = step(model)
    loss.backward()
    reached = {name for name, grad in grads_of(model).items() if grad.any()}
    trained = {id(p): name for name, p in model.named_parameters() for q in model.trained_parameters() if p is q}
    assert all(torch.isfinite(value).all() for value in terms.values())
    # Biases before a normalisation have gradients of rounding size only: every part has some weight that is reached.
    assert reached <= set(trained.values())
    parts = {"repre_embed", "shift_middle_block", "shift_output_blocks", "shift_out"}
    parts |= {part for part in ("part_emb", "part_latents") if hasattr(model.model.diffusion_model, part)}
    wanted = {f"model.diffusion_model.{part}" for part in parts} | {f"cond_stage_model.encoder.{i}" for i in (0, 3, 6)}
    assert all(any(name.startswith(part) for name in reached) for part in wanted)
    assert set(grads_of(model)) == set(trained.values())


def test_losses_and_gradients_are_those_of_the_formulas():
    """In float64, against the disentangling loss written out with a copy of the encoder and one unit after another."""
    model, unit, t = build(dis_weight=0.3, loss_type="l1").double(), torch.tensor([2, 0, 1]), torch.tensor([1, 9, 19])
    model.train()
    images = torch.rand(3, 3, 32, 32, dtype=torch.float64) * 2 - 1
    z, noise = model.encode_first_stage(images), torch.randn(3, 4, 8, 8, dtype=torch.float64)
    twin = copy.deepcopy(model)
    cond = UnitCodes(model.cond_stage_model(images).unflatten(1, (UNITS, WIDTH)))
    model.p_losses(z, cond, t, noise, unit)[0].backward()

    codes = twin.cond_stage_model(images)
    x_t, net = twin.q_sample(z, t, noise), twin.model.diffusion_model
    single = [net(x_t, t, codes, sampled_index=torch.full((3,), k)).unit_grad[:, 0] for k in range(UNITS)]
    base = net.base_prediction(x_t, t)
    shift, scale = (getattr(twin, name)[t].view(-1, 1, 1, 1) for name in ("shift_coef", "ddim_coef"))
    loss = (base + shift * sum(single) - noise).abs().mean()
    judge = copy.deepcopy(twin.cond_stage_model).eval().requires_grad_(False)
    chosen = torch.stack([single[k][row] for row, k in enumerate(unit.tolist())])
    starts = [twin.schedule.predict_start_from_noise(x_t, t, eps) for eps in (base, base + scale * chosen)]
    seen = [judge(twin.decode_first_stage(s, force_not_quantize=True)).view(3, UNITS, WIDTH) for s in starts]
    own = codes.detach().view(3, UNITS, WIDTH)
    closer = (seen[0] - own).norm(dim=-1) - (seen[1] - own).norm(dim=-1)
    moved = (seen[0] - seen[1]).norm(dim=-1)
    both = F.cross_entropy(closer, unit, reduction="none") + F.cross_entropy(moved, unit, reduction="none")
    weight = 0.3 * (starts[0] - starts[1]).detach().square().mean(dim=(1, 2, 3))
    (loss + (weight * both).mean()).backward()

    expected, found = grads_of(twin), grads_of(model)
    assert expected.keys() == found.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-7, atol=1e-10, msg=name)


def test_batch_statistics_are_updated_once_per_step():
    model = build()
    twin = copy.deepcopy(model.cond_stage_model).train()
    step(model)
    with torch.no_grad():
        twin(batch()["image"].permute(0, 3, 1, 2).float() / 127.5 - 1)
    for name, value in twin.named_buffers():
        torch.testing.assert_close(model.cond_stage_model.get_buffer(name), value)
    assert all(module.training for module in model.cond_stage_model.modules())


def test_the_loss_can_train_the_encoder_that_judges():
    at_rest, live = build(), build(train_enc_flag=True)
    for model in (at_rest, live):
        model.dis_weight = 100.0
        step(model)[0].backward()
    name = "cond_stage_model.encoder.0.weight"
    assert not torch.allclose(grads_of(at_rest)[name], grads_of(live)[name])
    assert live.cond_stage_model.encoder[1].num_batches_tracked == 3
    with pytest.raises(ConfigError, match="train_enc_flag"):
        build(train_enc_flag=True, cond_stage_trainable=False)


def test_detached_images_leave_the_reconstruction_alone():
    detached, without = build(detach_flag=True), build(dis_loss_flag=False)
    for model in (detached, without):
        step(model)[0].backward()
    for name, grad in grads_of(without).items():
        torch.testing.assert_close(grads_of(detached)[name], grad)
    assert "loss_dis" in step(detached)[1] and "loss_dis" not in step(without)[1]


def test_divergence_of_the_codes():
    model = build("Encoder4_vae", kl_loss_flag=True, kl_weight=0.5)
    loss, terms = step(model)
    assert model.cond_stage_model.posterior is None  # nothing of the step is kept
    model.kl_loss_flag = False
    plain, _ = step(model)
    mean = model.cond_stage_model.posterior.mean
    variance, logvar = model.cond_stage_model.posterior.var, model.cond_stage_model.posterior.logvar
    expected = 0.5 * (mean**2 + variance - 1 - logvar).view(4, UNITS, WIDTH).sum(2).mean()
    torch.testing.assert_close(terms["loss_kl"], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss, plain + 0.5 * terms["loss_kl"])
    with pytest.raises(ConfigError, match="kl_loss_flag.*Encoder4_vae"):
        build(kl_loss_flag=True)


def test_drawn_codes_are_told_by_their_means():
    model = build("Encoder4_vae").eval()
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    assert torch.equal(model.encode_units(images), model.encode_units(images))
    assert not torch.equal(model.cond_stage_model(images), model.cond_stage_model(images))


def test_units_are_drawn_by_torch_from_all():
    model, seen = build(), set()
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([5, 19])
    cond = UnitCodes(torch.randn(2, UNITS, WIDTH))
    with torch.no_grad():
        out = model.eval().gradients(x, t, cond)
        for seed in (0, 0, *range(1, 12)):
            torch.manual_seed(seed)
            seen.add(tuple(model.dis_loss(x, t, out, cond).tolist()))
        given = {
            tuple(model.dis_loss(x, t, out, cond, torch.tensor([a, b])).tolist())
            for a in range(UNITS)
            for b in range(UNITS)
        }
    assert len(given) == UNITS**2
    assert seen <= given and len(seen) > UNITS


def test_the_optimizer_gets_the_decoder_first_and_then_the_encoder():
    model = build()
    group = model.configure_optimizers().param_groups[0]
    expected = [*model.model.diffusion_model.trainable_parameters(), *model.cond_stage_model.parameters()]
    assert [id(p) for p in group["params"]] == [id(p) for p in expected]
    assert group["weight_decay"] == 0.01
    averaged = {name for name, _ in model.model_ema.named_buffers()} - {"decay", "num_updates"}
    assert len(averaged) == len(list(model.model.diffusion_model.trainable_parameters()))
    frozen = build(cond_stage_trainable=False)
    assert not any(p.requires_grad for p in frozen.cond_stage_model.parameters())
    assert not frozen.train().cond_stage_model.training
    assert len(frozen.trained_parameters()) == len(averaged)


def test_a_joint_decoder_has_one_gradient(caplog):
    model = build(unet={"seprate_decoder": False})
    assert "one gradient together" in caplog.text
    codes = torch.randn(2, UNITS, WIDTH)
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([5, 9])
    assert model.gradients(x, t, UnitCodes(codes)).unit_grad.shape == (2, 1, 4, 8, 8)
    assert "loss_dis" not in step(model)[1]
    assert model.model.diffusion_model.repre_embed.in_features == UNITS * WIDTH
    with pytest.raises(UserError, match="seprate_decoder"):
        model.decode_units(codes, x, 2, only=torch.tensor([0, 1]))
    pictures = model.eval().log_images(batch(), ddim_steps=2, plot_swapped_concepts=True, plot_decoded_xstart=True)
    assert "samples_swapping" in pictures and "samples_swapping_partial" not in pictures
    assert {"predXstart_st", "predXstart_fl"} <= set(pictures) and "predXstart_0" not in pictures


def test_units_of_images_and_images_of_units():
    model = build().eval()
    images, x_T = torch.rand(2, 3, 32, 32) * 2 - 1, torch.randn(2, *model.latent_shape)
    codes = model.encode_units(images)
    assert codes.shape == (2, UNITS, WIDTH) and codes.dtype == torch.float32
    as_bytes = ((images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
    torch.testing.assert_close(model.encode_representation({"image": as_bytes}), codes, atol=0.05, rtol=0.05)
    decoded = model.decode_units(codes, x_T, sampler=DDIMSampler(3))
    assert decoded.shape == (2, 3, 32, 32) and decoded.abs().max() <= 1
    assert torch.equal(decoded, model.decode_units(codes, x_T, sampler=DDIMSampler(3)))
    single = model.decode_units(codes, x_T, sampler=DDIMSampler(3), only=torch.tensor([1, 2]))
    other = codes.clone()
    other[0, [0, 2]], other[1, :2] = 7.0, 7.0  # units that do not count
    repeated = model.decode_units(other, x_T, sampler=DDIMSampler(3), only=torch.tensor([1, 2]))
    torch.testing.assert_close(single, repeated)
    assert not torch.equal(single, decoded)


def test_pictures_have_the_familys_names_and_captions():
    model = build(log_every_t=4).eval()
    model.model.diffusion_model.shift_out[2].weight.data *= 30  # so that units outweigh the steps of the codebook
    model.model_ema.restart(model.model)
    pictures = model.log_images(
        batch(), N=3, n_row=2, ddim_steps=2, plot_swapped_concepts=True, plot_decoded_xstart=True
    )
    assert set(pictures) == {
        "inputs",
        "reconstruction",
        "diffusion_row",
        "samples",
        "samples_x0_quantized",
        "mask",
        "samples_inpainting",
        "samples_outpainting",
        "progressive_row",
        "samples_swapping",
        "samples_swapping_partial",
        "predXstart_st",
        "predXstart_fl",
        "predXstart_0",
        "predXstart_1",
        "predXstart_2",
    }
    for name in ("samples_swapping", "samples_swapping_partial"):
        grid = pictures[name]
        assert grid.rows == ["own units", "unit 1", "unit 2", "unit 3"] and len(grid.images) == 4 * 3
        own, swapped = grid.images.view(4, 3, 3, 32, 32)[[0, 1]]
        assert not torch.equal(own[1], swapped[1])
        assert torch.equal(own[0], swapped[0]) == (name == "samples_swapping")  # the first sample keeps its units
    grid = pictures["predXstart_1"]
    assert grid.columns == ["t = 10", "t = 12", "t = 14", "t = 16", "t = 18", "t = 19"]
    assert grid.rows == ["", ""] and len(grid.images) == 2 * 6
    assert not torch.equal(grid.images, pictures["predXstart_st"].images)
    few = model.log_images(batch(), N=2, sample=False)
    assert set(few) == {"inputs", "reconstruction", "diffusion_row"}
    assert set(model.log_images(batch(), N=2, ddim_steps=2, return_keys=["inputs"])) == {"inputs"}


def test_predicted_starts_of_all_units_are_what_sampling_uses():
    model = build().eval()
    x, t, cond = torch.randn(2, 4, 8, 8), torch.tensor([5, 19]), UnitCodes(torch.randn(2, UNITS, WIDTH))
    out = model.gradients(x, t, cond)
    eps = out.pred + model.ddim_coef[t].view(-1, 1, 1, 1) * out.out_grad
    torch.testing.assert_close(model.apply_model(x, t, cond), eps)
    torch.testing.assert_close(model.apply_model(x, t, None), out.pred)


@pytest.mark.parametrize("options", [{}, {"encoder": "Encoder4_vae", "kl_loss_flag": True}])
def test_half_precision_stays_finite(options):
    model = build(**options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = step(model)
    loss.backward()
    assert all(torch.isfinite(grad).all() for grad in grads_of(model).values())
    full, _ = step(build(**options))
    torch.testing.assert_close(loss, full, rtol=0.05, atol=0.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.eval().encode_representation(batch()).dtype == torch.float32


def fit(folder, resume=None):
    """Four steps in two epochs, with a checkpoint of each."""
    trainer = pl.Trainer(
        max_steps=4,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[StepSeed(5), ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)],
    )
    loader = DataLoader(items(4), batch_size=2, collate_fn=collate)
    trainer.fit(build(), loader, ckpt_path=resume, weights_only=True)
    return torch.load(folder / "step=4.ckpt", weights_only=True)["state_dict"]


def test_resumed_training_is_the_same(tmp_path):
    start = build().state_dict()
    whole = fit(tmp_path / "whole")
    resumed = fit(tmp_path / "resumed", tmp_path / "whole" / "step=2.ckpt")
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    moved = {name.split(".")[0] for name, value in whole.items() if not torch.equal(value, start[name])}
    assert moved == {"model", "model_ema", "cond_stage_model"}
    trained = ("shift_", "part_", "repre_")
    names = [name for name in whole if name.startswith("model.diffusion_model.")]
    stays = [name for name in names if not name.split(".")[2].startswith(trained)]
    assert stays and all(torch.equal(whole[name], start[name]) for name in stays)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dis_loss_type": "X"}, "'Z' or 'IM'"),
        ({"unet": {"latent_unit": 5}}, r"5 x 4 = 20, got 12"),
        ({"cond_stage_config": "__is_unconditional__"}, "image encoder"),
    ],
)
def test_options_that_cannot_work_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        build(**options)


@pytest.mark.parametrize("with_weights", [False, True])
def test_a_plain_network_is_refused(with_weights, tmp_path):
    network = {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": TINY_UNET}
    options = {"first_stage_config": vq_config(), "image_size": 8, "channels": 4, "unet_config": network}
    if with_weights:
        torch.save(
            LatentDiffusion(**options, cond_stage_config="__is_unconditional__").state_dict(), tmp_path / "plain.ckpt"
        )
        options["ckpt_path"] = str(tmp_path / "plain.ckpt")
    with pytest.raises(ConfigError, match="openaimodel_shift.UNetModel"):
        DisDiff(**options, cond_stage_config={"target": "torch.nn.Flatten"})
