"""Images of any size and aspect ratio: autoencoders, latent and pixel models, and the size that checkpoints keep."""

from __future__ import annotations

import logging

import pytest
import torch
import yaml
from condition_parts import TEXTS, batch, data, diffusion, drawn, first_stage, sampled, train
from stand_ins import PLAIN_UNET

import main as front_door
from ldm.models.diffusion.ddpm import DDPM
from ldm.modules.diffusionmodules.model import Decoder, Encoder
from ldm.runs.load import load_run
from ldm.util import ConfigError, UserError, instantiate_from_config

UNET_CONFIG = {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": PLAIN_UNET}
LOSSES = {
    "kl": {"target": "ldm.modules.losses.LPIPSWithDiscriminator", "params": {"disc_start": 0}},
    "vq": {"target": "ldm.modules.losses.vqperceptual.VQLPIPSWithDiscriminator", "params": {"disc_start": 0}},
}


@pytest.mark.parametrize("kind", ["kl", "vq"])
@pytest.mark.parametrize("factor", [4, 8, 16])
def test_first_stages_take_every_size_that_their_downsampling_divides(kind, factor):
    config = first_stage(kind, factor, resolution=64)
    stage = instantiate_from_config(config).eval()
    for height, width in ((32, 48), (64, 64), (96, 16)):
        code = stage.encode(torch.rand(1, 3, height, width))
        code = code.mode() if kind == "kl" else code
        assert code.shape[2:] == (height // factor, width // factor)
        assert stage.decode(code).shape == (1, 3, height, width)
    with pytest.raises(UserError, match=f"multiples of {factor} .* got 32 x {factor + 1}"):
        stage.encode(torch.rand(1, 3, 32, factor + 1))


@pytest.mark.parametrize("kind", ["kl", "vq"])
@pytest.mark.parametrize("channels", [1, 4])
def test_first_stages_name_the_channels_of_images(kind, channels):
    stage = instantiate_from_config(first_stage(kind)).eval()
    with pytest.raises(UserError, match=rf"of 3 channels \(ddconfig.in_channels\), got .* 32 x 48 x {channels}"):
        stage.encode(torch.rand(1, channels, 32, 48))


@pytest.mark.parametrize("use_ema", [False, True])
@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_autoencoders_train_and_draw_images_that_are_not_square(kind, use_ema, tmp_path):
    model = first_stage(kind, factor=4, resolution=64)
    model["target"] = model["target"].replace("VQModelInterface", "VQModel")
    loss = {**LOSSES[kind], "params": {**LOSSES[kind]["params"], "perceptual_weight": 0.0}}
    model = {**model, "base_learning_rate": 1e-5, "params": {**model["params"], "lossconfig": loss, "use_ema": use_ema}}
    assert {"inputs", "reconstructions"} <= drawn(train(tmp_path, model, data(size=(32, 64))))


def attention_of(network, part):
    return [level for level, stage in enumerate(getattr(network, part)) if len(stage.attn)]


@pytest.mark.parametrize(
    ("resolution", "encoder", "decoder"),
    [
        (64, [2], [2]),  # feature maps of 64, 32, 16
        ([64, 64], [2], [2]),
        ([48, 32], [1], [1]),  # 48 x 32, 24 x 16, 12 x 8
        (66, [2], [2]),  # 66, 33, 16
        (67, [2], [2]),
        (32, [1], [1]),
    ],
)
def test_resolution_places_attention_only(resolution, encoder, decoder):
    ddconfig = {**first_stage(resolution=resolution)["params"]["ddconfig"], "attn_resolutions": [16]}
    networks = Encoder(**ddconfig), Decoder(**ddconfig)
    assert attention_of(networks[0], "down") == encoder
    assert attention_of(networks[1], "up") == decoder
    assert networks[1](torch.rand(1, 4, 2, 3)).shape == (1, 3, 8, 12)


def test_a_decoder_counts_from_the_latent_as_in_latent_diffusion():
    ddconfig = {**first_stage(resolution=66)["params"]["ddconfig"], "attn_resolutions": [33]}
    assert attention_of(Encoder(**ddconfig), "down") == [1]  # 66, 33, 16
    assert attention_of(Decoder(**ddconfig), "up") == []  # 64, 32, 16


@pytest.mark.parametrize("resolution", [[32, 32, 32], "32", 2, None])
def test_other_resolutions_are_refused(resolution):
    ddconfig = {**first_stage()["params"]["ddconfig"], "resolution": resolution}
    with pytest.raises(ConfigError, match="ddconfig.resolution: expected"):
        Encoder(**ddconfig)


@pytest.mark.parametrize("image_size", [0, [8], [8, 8, 8], "8", [8, "8"], None])
def test_other_image_sizes_are_refused(image_size):
    with pytest.raises(ConfigError, match="image_size: expected"):
        instantiate_from_config(diffusion(image_size=image_size))


@pytest.mark.parametrize("kind", ["kl", "vq"])
@pytest.mark.parametrize("size", [(32, 32), (48, 64), (24, 80)])
def test_latents_have_the_size_of_the_data(kind, size, caplog):
    config = diffusion(first_stage_config=first_stage(kind), unet={"image_size": [8, 8]}, image_size=[8, 8])
    model = instantiate_from_config(config)
    assert model.latent_shape == (4, 8, 8)
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            model.train()
            loss, _, _ = model.shared_step(batch(size=size))
    assert torch.isfinite(loss) and model.latent_shape == (4, size[0] // 4, size[1] // 4)
    assert caplog.text.count("image_size is not used") == (size != (32, 32))
    pictures = model.eval().log_images(batch(size=size), ddim_steps=2)
    assert pictures["samples"].shape == (2, 3, *size) and pictures["mask"].shape[2:] == model.latent_shape[1:]


def test_channels_still_have_to_match():
    model = instantiate_from_config(diffusion(channels=3, unet={"in_channels": 3, "out_channels": 3}))
    with pytest.raises(UserError, match="channels: expected the 4 channels of the data, got 3"):
        model.shared_step(batch())


def test_a_first_stage_encodes_and_decodes():
    with pytest.raises(ConfigError, match="first_stage_config: expected a first stage .*Identity, which lacks decode"):
        instantiate_from_config(diffusion(first_stage_config={"target": "torch.nn.Identity"}))


@pytest.mark.parametrize(("size", "latent"), [((32, 36), "8 x 9"), ((20, 32), "5 x 8")])
def test_sizes_that_the_network_cannot_halve_are_named(size, latent):
    model = instantiate_from_config(diffusion())
    message = f"multiples of 2 .* got {latent} for images of {size[0]} x {size[1]} pixels.* multiples of 2 x 4 = 8"
    with pytest.raises(UserError, match=message):
        model.shared_step(batch(size=size))
    with pytest.raises(UserError, match=message):
        model.latent_size(*size)
    with pytest.raises(UserError, match="multiples of 2 .* got 3 x 8"):
        model.sample(torch.randn(1, 4, 3, 8))


def test_a_pixel_model_has_the_size_of_the_data():
    unet = {**UNET_CONFIG, "params": {**PLAIN_UNET, "in_channels": 3, "out_channels": 3}}
    options = {"unet_config": unet, "timesteps": 10, "monitor": None}
    with pytest.raises(UserError, match=r"image_size: expected 32 x 48, .* got 16 x 16. Set image_size to \[32, 48\]"):
        DDPM(image_size=16, **options).shared_step(batch(size=(32, 48)))
    model = DDPM(image_size=[32, 48], **options)
    model.shared_step(batch(size=(32, 48)))
    assert model.latent_shape == (3, 32, 48)
    identity = {"target": "ldm.models.autoencoder.IdentityFirstStage"}
    pixels = diffusion(first_stage_config=identity, channels=3, unet={"in_channels": 3, "out_channels": 3})
    with pytest.raises(UserError, match="image_size: expected 32 x 32"):
        instantiate_from_config(pixels).shared_step(batch())


def test_a_pixel_model_of_another_size_does_not_start(tmp_path, capsys):
    unet = {**UNET_CONFIG, "params": {**PLAIN_UNET, "in_channels": 3, "out_channels": 3}}
    params = {"image_size": 16, "unet_config": unet, "timesteps": 10, "monitor": None}
    model = {"base_learning_rate": 1e-4, "target": "ldm.models.diffusion.ddpm.DDPM", "params": params}
    assert train(tmp_path, model, data()) is None
    assert "model.params.image_size: expected 32 x 32" in capsys.readouterr().err


def test_a_run_keeps_the_size_of_its_data(tmp_path, capsys, caplog):
    run = train(tmp_path, diffusion(image_size=16), data(size=(32, 48)))
    assert front_door.main(["-r", str(run), "-t", "--no-test", "--max_steps", "3"]) == 0, capsys.readouterr().err
    with caplog.at_level("INFO"):
        loaded = load_run(str(run))
    assert loaded.model.latent_shape == (4, 8, 12) and " 0 missing, 0 unexpected" in caplog.text
    assert "latent_size" not in loaded.model.state_dict()
    state = torch.load(loaded.checkpoint, weights_only=True)["state_dict"]
    assert state["latent_size"].tolist() == [8, 12]
    model = instantiate_from_config(diffusion(image_size=16))
    model.load_state_dict(state)  # with all keys
    assert model.latent_shape == (4, 8, 12)
    assert sampled(capsys, run, "-n", "2") == (2, 32, 48, 3)
    assert sampled(capsys, run, "-n", "2", "--size", "64", "40") == (2, 64, 40, 3)
    assert "got 7.5 x 8 for images of 30 x 32 pixels" in sampled(capsys, run, "--size", "30", "32")
    assert "multiples of 2 x 4 = 8" in sampled(capsys, run, "--size", "36", "32")
    assert "--size: expected at least 1, got 0" in sampled(capsys, run, "--size", "0", "32")


def test_conditions_from_data_give_the_size_of_their_images(tmp_path, capsys):
    words = {"cond_stage_key": "txt", "cond_stage_config": {"target": "condition_parts.OwnWords"}}
    model = diffusion(unet=TEXTS, conditioning_key="crossattn", use_ema=False, **words)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"model": model, "data": data(size=(64, 32))}))
    torch.save({"state_dict": instantiate_from_config(model).state_dict()}, tmp_path / "x.ckpt")
    given = ["-b", str(tmp_path / "c.yaml"), "-n", "2"]
    for words, size in (([], (64, 32)), (["--text", "a hill"], (32, 32)), (["--size", "48", "16"], (48, 16))):
        assert sampled(capsys, tmp_path / "x.ckpt", *given, *words) == (2, *size, 3)
