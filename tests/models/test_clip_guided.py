"""The CLIP-guided DDPM: schedule, sampler, guidance, dropout, and treatments of the gap."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from clip_guided_models import SEED_OPTIONS, SIZE, TARGET, WIDTH, T, batch_of, build, towers_of, unet
from legacy_configs import save_clip
from omegaconf import OmegaConf
from stand_ins import PLAIN_UNET, vq_config

from ldm.config.loading import load_config
from ldm.config.validation import validate
from ldm.data.world import world_vocabulary
from ldm.diffusion.conditions import TensorCondition
from ldm.diffusion.guidance import classifier_free
from ldm.diffusion.samplers import DDIMSampler, DDPMSampler, named_sampler
from ldm.models.diffusion.methods.clip_guided.model import gap_texts
from ldm.util import ConfigError, UserError


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    return towers_of(save_clip(tmp_path_factory.mktemp("clip") / "clip"))


# Schedule, sampler, guidance -----------------------------------------------------------------------------------------


def test_schedule_is_linear_in_beta():
    model = build(timesteps=400)
    expected = torch.linspace(1e-4, 0.02, 400, dtype=torch.float64)
    torch.testing.assert_close(model.betas.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(model.alphas_cumprod.double(), torch.cumprod(1 - expected, 0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("arch", ["package", "dli"])
@pytest.mark.parametrize("w", [-2.0, 0.0, 1.5])
def test_sampler_is_the_written_out_loop(arch, w):
    model = build(arch).eval()
    cond, x_T = torch.randn(3, WIDTH), torch.randn(3, 3, SIZE, SIZE)
    torch.manual_seed(5)
    found = model.sample(x_T, TensorCondition(cond), guidance_scale=1 + w)
    network = model.model.diffusion_model.double()
    beta = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
    alpha, abar = 1 - beta, torch.cumprod(1 - beta, 0)
    torch.manual_seed(5)
    x = x_T.double()
    with torch.no_grad():
        for t in reversed(range(T)):
            steps = torch.full((3,), t)
            eps = (1 + w) * network(x, steps, cond.double()) - w * network(x, steps, torch.zeros(3, WIDTH).double())
            x = (x - (1 - alpha[t]) / (1 - abar[t]).sqrt() * eps) / alpha[t].sqrt()
            if t > 0:
                x = x + beta[t - 1].sqrt() * torch.randn(3, 3, SIZE, SIZE).double()
    torch.testing.assert_close(found.double(), x, rtol=1e-3, atol=1e-4)


def test_variance_is_checked():
    with pytest.raises(ConfigError, match=r"sampler.params.variance: expected one of posterior, previous.*'previos'"):
        DDPMSampler(variance="previos")


def test_guidance_per_sample_is_that_of_each_strength():
    def predict(x, t, cond):
        return x * cond.value.mean(1).reshape(-1, 1, 1, 1)

    x, cond = torch.randn(3, 1, 2, 2), TensorCondition(torch.randn(3, 5))
    scales = torch.tensor([-1.0, 1.0, 3.0])
    found = classifier_free(predict, cond, scales)(x, torch.zeros(3))
    for row, scale in enumerate(scales.tolist()):
        one = TensorCondition(cond.value[row : row + 1])
        torch.testing.assert_close(
            found[row : row + 1], classifier_free(predict, one, scale)(x[row : row + 1], torch.zeros(1))
        )


def test_sample_w_has_all_strengths_of_all_conditions_strength_first():
    model = build().eval()
    conditions, strengths = torch.randn(2, WIDTH), [-1.0, 0.0, 2.0]
    x_T = torch.randn(6, 3, SIZE, SIZE)
    images, frames = model.sample_w(conditions, strengths, x_T, DDIMSampler(4))
    for row, (w, c) in enumerate((w, c) for w in strengths for c in conditions):
        one = model.sample(x_T[row : row + 1], TensorCondition(c[None]), DDIMSampler(4), guidance_scale=1 + w)
        torch.testing.assert_close(images[row : row + 1], one, rtol=1e-4, atol=1e-5)
    alone = model.sample(x_T[:2], TensorCondition(torch.zeros(2, WIDTH)), DDIMSampler(4))
    torch.testing.assert_close(images[:2], alone, rtol=1e-4, atol=1e-5)  # w = -1 is no condition
    _, frames = model.sample_w(conditions)
    assert len(frames) == len([t for t in range(T) if t % 10 == 0 or t < 10]) and len(frames[0]) == 14


@pytest.mark.parametrize("sampler", ["ddim", "plms", "dpm_solver", "ddpm"])
def test_every_sampler_samples(sampler):
    model = build().eval()
    chosen = named_sampler(sampler, num_steps=None if sampler == "ddpm" else 4)
    assert model.sample(torch.randn(2, 3, SIZE, SIZE), torch.randn(2, WIDTH), chosen, 2.0).shape == (2, 3, SIZE, SIZE)


# Condition -----------------------------------------------------------------------------------------------------------


def test_dropout_is_per_sample_or_per_element():
    batch, t = {**batch_of(64), "clip_embedding": torch.ones(64, WIDTH)}, torch.zeros(64, dtype=torch.long)
    whole = build(cond_drop_prob=0.5).train().condition_at(batch, t).value
    assert 10 < (whole.sum(1) == 0).sum() < 54 and ((whole.sum(1) == 0) | (whole.sum(1) == WIDTH)).all()
    single = build(cond_drop_prob=0.1, drop_per_element=True).train().condition_at(batch, t).value
    assert 0.07 < (single == 0).float().mean() < 0.13 and (single.sum(1) > 0).all()
    assert build(cond_drop_prob=1.0).eval().condition_at(batch, t).value.all()


def test_embeddings_of_the_batch_and_of_the_image_tower(towers):
    model = build(cond_stage_config=towers).eval()
    batch = batch_of()
    assert torch.equal(model.get_condition(batch).value, batch["clip_embedding"])
    del batch["clip_embedding"]
    images = batch["image"].permute(0, 3, 1, 2).float() / 127.5 - 1
    expected = model.cond_stage_model.image_encoder(images)
    assert torch.equal(model.get_condition(batch).value, expected)
    normal = build(cond_stage_config=towers, normalize_clip=True).eval()
    torch.testing.assert_close(normal.get_condition(batch).value, F.normalize(expected, dim=-1))
    assert (normal.condition_from_texts(["red floor"]).value.norm(dim=1) - 1).abs() < 1e-5
    assert model.condition_from_texts(["red floor"]).value.norm(dim=1) != 1  # as CLIP returns it


def test_missing_embeddings_and_towers_are_named(towers):
    model = build()
    with pytest.raises(UserError, match="expected an entry 'clip_embedding'"):
        model.get_condition({"image": batch_of()["image"]})
    with pytest.raises(UserError, match=r"expected float vectors \(B, D\), got torch.int64"):
        model.get_condition({**batch_of(), "clip_embedding": torch.zeros(4, WIDTH, dtype=torch.long)})
    with pytest.raises(UserError, match="text_encoder, got none"):
        model.cond_stage_model.encode_texts(["red floor"])
    with pytest.raises(ConfigError, match="expected text_encoder and image_encoder, got text_tower"):
        build(cond_stage_config={"text_tower": towers["text_encoder"]})


def test_an_empty_text_is_no_condition(towers):
    model = build(cond_stage_config=towers, gap="noise").eval()
    value = model.condition_from_texts(["red floor", "", " "]).value
    assert value[0].any() and not value[1:].any()
    assert not model.condition_from_texts(["red floor"]).null().value.any()


def written_out(kind, images, texts):
    """Return the conditions of images (N, D), without noise, and of texts (M, D), with the statistics of both."""
    if kind in ("none", "bank"):
        nearest = [F.cosine_similarity(text[None], images).argsort(descending=True)[:2] for text in texts]
        return images, texts if kind == "none" else torch.stack([(images[a] + images[b]) / 2 for a, b in nearest])
    images, texts = (rows / rows.square().sum(1, keepdim=True).sqrt() for rows in (images, texts))
    centered_images, centered_texts = images - images.mean(0), texts - texts.mean(0)
    if kind == "covariance":
        nearest = [F.cosine_similarity(text[None], centered_images).argmax() for text in centered_texts]
        images = images + torch.stack([text - images[row] for text, row in zip(texts, nearest)]).mean(0)
    elif kind != "noise":
        images, texts = centered_images, centered_texts
    return tuple(WIDTH**0.5 * rows / rows.square().sum(1, keepdim=True).sqrt() for rows in (images, texts))


@pytest.mark.parametrize("kind", ["none", "noise", "mean", "noise_mean", "covariance", "bank"])
def test_gap_treatments(kind, towers):
    gap = {"kind": kind, "num_images": 32, "num_neighbors": 2}
    model = build(cond_stage_config=towers, gap=gap)
    batch, texts = batch_of(12), ["red floor", "green wall", "blue floor", "a small sphere"]
    if model.cond_stage_model.gap.needs_statistics:
        with pytest.raises(UserError, match=f"statistics of '{kind}'"):
            model.get_condition(batch)
        model.fit_gap(batch["clip_embedding"], texts)
    seen, trained = model.eval().get_condition(batch).value, model.train().get_condition(batch).value
    spoken = model.condition_from_texts(texts).value
    untreated = model.cond_stage_model.text_encoder.encode(texts)
    expected_seen, expected_spoken = written_out(kind, batch["clip_embedding"], untreated)
    torch.testing.assert_close(seen, expected_seen, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(spoken, expected_spoken, rtol=1e-4, atol=1e-5)
    assert torch.equal(seen, trained) == (kind in ("none", "mean", "bank"))
    if kind not in ("none", "bank"):
        torch.testing.assert_close(trained.norm(dim=1), torch.full((12,), WIDTH**0.5))
    again = build(cond_stage_config=towers, gap=gap)
    again.load_state_dict(model.state_dict())
    assert again.cond_stage_model.is_fitted and torch.equal(again.condition_from_texts(texts).value, spoken)
    assert not any("encoder" in key for key in model.state_dict())


@pytest.mark.parametrize(
    ("gap", "message"),
    [
        ("noize", "gap.kind: expected one of none, noise.*Did you mean 'noise'"),
        ({"kind": "noise", "stdd": 1.0}, r"gap: unknown keys \['stdd'\]. Use only kind, std"),
        ({"kind": "noise", "std": -1.0}, "gap.std: expected a number from 0 to 1000000"),
        ({"kind": "bank", "num_images": 2}, "gap.num_neighbors: expected at most num_images"),
    ],
)
def test_gap_options_are_refused_by_the_check_and_the_model(gap, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        build(gap=gap)
    config = {"model": {"target": TARGET, "params": {**SEED_OPTIONS, "unet_config": unet(), "gap": gap}}}
    OmegaConf.save(OmegaConf.create(config), tmp_path / "c.yaml")
    with pytest.raises(ConfigError, match=message):
        validate(load_config([tmp_path / "c.yaml"], []), sections=("model",))


def test_sizes_are_refused_by_the_check(tmp_path):
    params = {**SEED_OPTIONS, "unet_config": unet(img_size=30)}
    OmegaConf.save(OmegaConf.create({"model": {"target": TARGET, "params": params}}), tmp_path / "c.yaml")
    with pytest.raises(ConfigError, match="img_size: expected a multiple of 4, got 30"):
        validate(load_config([tmp_path / "c.yaml"], []), sections=("model",))


def test_texts_of_the_statistics(tmp_path):
    (tmp_path / "texts.txt").write_text("a cat\n\na dog\n", encoding="utf-8")
    assert gap_texts(str(tmp_path / "texts.txt"), None) == ["a cat", "a dog"]
    assert gap_texts(["a cat"], world_vocabulary()) == ["a cat"]
    texts = gap_texts(None, world_vocabulary())
    assert len(set(texts)) > 500 and texts == gap_texts(None, world_vocabulary())
    with pytest.raises(UserError, match=r"nowhere.txt does not exist"):
        gap_texts(str(tmp_path / "nowhere.txt"), None)
    with pytest.raises(UserError, match=r"gap.texts: expected texts"):
        gap_texts(None, None)
    with pytest.raises(ConfigError, match="text_encoder: expected the text tower, which gap 'mean' needs"):
        build(gap="mean")


# Other networks and spaces -------------------------------------------------------------------------------------------

OURS = {**PLAIN_UNET, "num_classes": "sequential", "adm_in_channels": WIDTH}


@pytest.mark.parametrize("is_latent", [False, True])
@pytest.mark.parametrize("is_ours", [False, True])
def test_networks_on_pixels_and_on_latents(is_latent, is_ours):
    channels = 4 if is_latent else 3
    ours = {**OURS, "in_channels": channels, "out_channels": channels}
    network = {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": ours}
    first = {"first_stage_config": vq_config()} if is_latent else {}
    model = build(unet_config=network if is_ours else unet(img_ch=channels), channels=channels, **first)
    batch = batch_of(2, 32 if is_latent else SIZE)
    loss, _, _ = model.train().shared_step(batch)
    loss.backward()
    assert all(p.grad is not None for p in model.network_parameters())
    pictures = model.eval().log_images(batch, N=2, sampler={"target": "ldm.diffusion.samplers.DDIMSampler"} | FEW)
    assert pictures["samples"].shape == (2, 3, 32, 32) if is_latent else (2, 3, SIZE, SIZE)


FEW: dict[str, Any] = {"params": {"num_steps": 2}}


# Texts of several phrases ---------------------------------------------------------------------------------------------


def test_phrases_of_a_text_are_embedded_one_by_one(towers):
    model = build(cond_stage_config=towers, phrase_separator=",")
    stage, plain = model.cond_stage_model, build(cond_stage_config=towers).cond_stage_model
    found = stage.embed_texts(["red floor, small object,, cube", "cube", " , "])
    single = plain.embed_texts(["red floor", "small object", "cube"])
    direction = F.normalize(F.normalize(single, dim=-1).mean(dim=0), dim=-1)
    torch.testing.assert_close(found[0], single.norm(dim=-1).mean() * direction)
    torch.testing.assert_close(found[1], single[2])
    assert not torch.allclose(found[0], plain.embed_texts(["red floor, small object, cube"])[0])
    assert (stage.encode_texts(["", "cube"])[0] == 0).all()


def test_condition_from_images_is_that_of_the_batch(towers):
    model = build(cond_stage_config=towers, image_size=32, unet_config=unet(img_size=32)).eval()
    images = torch.rand(3, 3, 32, 32) * 2 - 1
    embedded, texts = model.joint_embeddings(images, ["red floor"])
    assert model.embeds_images and texts.shape == (1, WIDTH)
    torch.testing.assert_close(model.condition_from_images(images).value, embedded)
    assert not build().embeds_images


def test_sample_w_returns_every_state_of_a_sampler_that_skips_time_steps():
    model = build(timesteps=100, unet_config=unet(T=100)).eval()
    cond = torch.randn(2, WIDTH)
    _, few = model.sample_w(cond, (0.0, 1.0), sampler=DDIMSampler(4))
    _, all_steps = model.sample_w(cond, (0.0,), sampler=DDPMSampler())
    assert len(few) == 4 and few[0].shape == (4, 3, SIZE, SIZE)
    assert len(all_steps) == 10 + 9


def test_bank_needs_no_texts_and_statistics_of_another_treatment_are_not_taken(towers, tmp_path):
    bank = {"kind": "bank", "num_images": 8, "num_neighbors": 2}
    model = build(cond_stage_config=towers, gap=bank)
    assert not model.cond_stage_model.gap.needs_texts
    model.fit_gap(batch_of(6)["clip_embedding"])
    assert model.condition_from_texts(["red floor"]).value.abs().sum() > 0
    other = build(cond_stage_config=towers, gap={"kind": "mean", "num_images": 8})
    other.fit_gap(batch_of(6)["clip_embedding"], ["red floor", "blue wall"])
    torch.save({"state_dict": other.state_dict()}, tmp_path / "mean.ckpt")
    for gap in (bank, {"kind": "covariance"}):
        loaded = build(cond_stage_config=towers, gap=gap, ckpt_path=str(tmp_path / "mean.ckpt"))
        assert not loaded.cond_stage_model.is_fitted
    few = build(cond_stage_config=towers, gap={**bank, "num_neighbors": 7})
    few.load_state_dict(model.state_dict())
    assert not few.cond_stage_model.is_fitted
    with pytest.raises(UserError, match=r"gap.texts: expected at least one text"):
        gap_texts([" "], None)
