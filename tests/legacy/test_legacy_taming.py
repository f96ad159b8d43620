"""Classes and options of taming-transformers and of forks: first stages, lists of files, codes of units."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from taming_configs import DDCONFIG, SCHEDULE, save

import main as front_door
from ldm.legacy import translate
from ldm.models.autoencoder import AutoencoderKL
from ldm.training.cli import parse_arguments
from ldm.training.plan import make_plan
from ldm.util import ConfigError, UserError, instantiate_from_config


def vq(target: str = "ldm.models.autoencoder.VQModelInterface", **params: Any) -> Any:
    own = {"ddconfig": DDCONFIG, "lossconfig": {"target": "torch.nn.Identity"}, "n_embed": 16, "embed_dim": 3}
    return instantiate_from_config({"target": target, "params": {**own, **params}})


@pytest.mark.parametrize("target", ["taming.models.vqgan.GumbelVQ", "taming.models.vqgan.VQModel"])
def test_quantized_autoencoders_are_first_stages(target: str) -> None:
    extra = {"temperature_scheduler_config": SCHEDULE} if target.endswith("GumbelVQ") else {}
    stage = {"ddconfig": DDCONFIG, "lossconfig": {"target": "torch.nn.Identity"}, "n_embed": 16, "embed_dim": 4}
    unet = {"image_size": 8, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": 1}
    unet |= {"attention_resolutions": [], "channel_mult": [1], "num_heads": 1}
    params = {
        "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": unet},
        "first_stage_config": {"target": target, "params": {**stage, **extra}},
        "cond_stage_config": "__is_unconditional__",
        "image_size": 8,
        "channels": 4,
        "timesteps": 10,
    }
    model = instantiate_from_config({"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params})
    z = model.get_input({"image": torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)})
    codes = model.first_stage_model.state_dict()[f"quantize.embed{'' if extra else 'ding'}.weight"]
    distance = (z.movedim(1, 3)[..., None, :] - codes).abs().sum(-1).amin(-1)
    assert z.shape == (2, 4, 8, 8) and distance.max() < 1e-6
    assert model.decode_first_stage(z).shape == (2, 3, 16, 16)
    assert torch.equal(model.decode_first_stage(z), model.decode_first_stage(z, force_not_quantize=True))


def test_codes_of_units_beside_the_latent(tmp_path: Path) -> None:
    narrow = vq().eval()
    path = save(narrow, tmp_path / "narrow.ckpt")
    wide = vq(use_disentangled_concat=True, disentangled_dim=5, ckpt_path=path).eval()
    assert wide.post_quant_conv.weight.shape == (4, 8, 1, 1)
    z, units = torch.randn(2, 3, 8, 8), torch.randn(2, 5)
    assert torch.equal(wide.decode(z), narrow.decode(z))  # zeros in place of units
    full = wide.post_quant_conv(torch.cat([wide.quantize(z)[0], units[:, :, None, None].expand(-1, -1, 8, 8)], 1))
    assert torch.allclose(wide.decode(z, disentangled_repr=units), wide.decoder(full))
    again = vq(use_disentangled_concat=True, disentangled_dim=5, ckpt_path=save(wide, tmp_path / "wide.ckpt"))
    assert torch.equal(again.post_quant_conv.weight, wide.post_quant_conv.weight)
    off = vq(use_disentangled_concat=False, disentangled_dim=5, ckpt_path=path)
    assert off.post_quant_conv.weight.shape == (4, 3, 1, 1)
    with pytest.raises(UserError, match="post_quant_conv.weight: expected .4, 9, 1, 1., got .4, 8, 1, 1."):
        vq(use_disentangled_concat=True, disentangled_dim=6, ckpt_path=str(tmp_path / "wide.ckpt"))


def test_a_contrastive_loss_is_refused_unless_switched_off() -> None:
    model = {"target": "ldm.models.diffusion.ddpm_enc.LatentDiffusion", "params": {"use_mcl": True, "lambda_mcl": 0.1}}
    with pytest.raises(ConfigError, match=r"^params.use_mcl: the contrastive loss.*is not supported.*use_mcl: false"):
        instantiate_from_config(model)
    off = {**model["params"], "use_mcl": False}
    assert not {"use_mcl", "lambda_mcl"} & translate(model["target"], off)[1].keys()


def pictures(folder: Path, *names: str) -> Path:
    for index, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        array = np.zeros((20, 30, 3), np.uint8)
        array[..., 0], array[..., 1] = index, np.arange(30)
        Image.fromarray(array).save(folder / name)
    return folder


def image_list(target: str, **params: Any) -> Any:
    return instantiate_from_config({"target": f"taming.data.{target}", "params": params})


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_lists_of_files(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    umlaut = unicodedata.normalize("NFC", "bilder/äpfel grün.png")
    pictures(tmp_path / "data", "a.png", umlaut, "bilder/c.png")
    pictures(tmp_path, "here/d.png")
    text = [
        "a.png",
        "",
        unicodedata.normalize(form, umlaut),
        str(tmp_path / "data" / "bilder" / "c.png"),
        "here/d.png ",
    ]
    (tmp_path / "data" / "train.txt").write_bytes(("\ufeff" + "\r\n".join(text) + "\n\n").encode())
    monkeypatch.chdir(tmp_path)
    for name, key in (("CustomTrain", "training_images_list_file"), ("CustomTest", "test_images_list_file")):
        data = image_list(f"custom.{name}", size=10, **{key: "data/train.txt"})
        assert len(data) == 4
        batch = data.__getitems__([2, 0, 1])
        assert batch["image"].shape == (3, 10, 10, 3) and batch["image"].dtype == torch.uint8
        assert batch["image"][:, 0, 0, 0].tolist() == [2, 0, 1]
        assert batch["file_path_"][1] == "a.png"
        assert abs(float(batch["image"][0, 0, :, 1].float().mean()) - 14.5) <= 1  # the centre


def test_paths(tmp_path: Path) -> None:
    folder = pictures(tmp_path, "a.png", "b.png", "c.png")
    paths = [str(folder / name) for name in ("a.png", "b.png", "c.png")]
    data = image_list("base.ImagePaths", paths=paths, size=20)
    assert data[1]["file_path_"] == paths[1] and data[1]["image"].shape == (20, 20, 3)
    whole = image_list("base.ImagePaths", paths=paths)
    assert whole[0]["image"].shape == (20, 30, 3)
    Image.new("RGB", (9, 9)).save(paths[2])
    with pytest.raises(UserError, match="expected images of one size"):
        whole.__getitems__([0, 2])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("a.png\nb.png\nc.png\n", r"train.txt: expected paths of images, .* got 2 that do not exist, such as b.png"),
        ("\n\n", r"train.txt: expected paths of images, .* got none"),
        (None, r"train.txt: expected a UTF-8 file, got no such file"),
    ],
)
def test_lists_with_slips(tmp_path: Path, lines: str | None, message: str) -> None:
    pictures(tmp_path, "a.png")
    if lines is not None:
        (tmp_path / "train.txt").write_text(lines)
    with pytest.raises(UserError, match=message):
        image_list("custom.CustomTrain", size=8, training_images_list_file=str(tmp_path / "train.txt"))


def kl(**ddconfig: Any) -> dict[str, Any]:
    networks = {**DDCONFIG, "double_z": True, **ddconfig}
    params = {"ddconfig": networks, "lossconfig": {"target": "torch.nn.Identity"}, "embed_dim": 4}
    return {"target": "ldm.models.autoencoder.AutoencoderKL", "params": params}


def run(tmp_path: Path, capsys: pytest.CaptureFixture, model: dict[str, Any], *words: str, **sections: Any) -> tuple:
    """Exit code and output of ``main.py``."""
    OmegaConf.save(OmegaConf.create({"model": model, **sections}), tmp_path / "c.yaml")
    code = front_door.main(["-b", str(tmp_path / "c.yaml"), "-l", str(tmp_path / "logs"), *words])
    return code, *capsys.readouterr()


@pytest.mark.parametrize(
    ("ddconfig", "message"),
    [
        ({"attn_type": "linear"}, "ddconfig.attn_type: expected vanilla, none, got 'linear'"),
        ({"use_linear_attn": True}, "ddconfig.use_linear_attn: expected false"),
        ({"give_pre_end": True}, "ddconfig.give_pre_end: expected false"),
        ({"chmult": [1, 2]}, "ddconfig.chmult: unknown key. Did you mean 'ch_mult'"),
        ({"z_channels": "4"}, "ddconfig.z_channels: expected an integer from 1 to 65536, got '4'"),
        ({"ch_mult": 4}, "ddconfig.ch_mult: expected a list, got 4"),
        ({"double_z": False}, "ddconfig.double_z: expected true for AutoencoderKL"),
    ],
)
def test_networks_are_checked_early_and_late_alike(
    tmp_path: Path, capsys: pytest.CaptureFixture, ddconfig: dict[str, Any], message: str
) -> None:
    data = {"data": {"target": "main.DataModuleFromConfig", "params": {"batch_size": 1}}}
    for words in ([], ["-t"]):
        code, _, error = run(tmp_path, capsys, kl(**ddconfig), *words, **data)
        assert code == 1 and error.startswith(f"error: {tmp_path}/c.yaml: model.params.{message}"), error
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        instantiate_from_config(kl(**ddconfig))


@pytest.mark.parametrize("losses", [{}, {"disc_in_channels": 3}, {"disc_in_channels": 4, "disc_weight": 0.5}])
def test_a_discriminator_judges_the_channels_of_the_decoder(
    tmp_path: Path, capsys: pytest.CaptureFixture, losses: dict[str, Any]
) -> None:
    model = kl(in_channels=1, out_ch=1)
    model["params"]["lossconfig"] = {
        "target": "ldm.modules.losses.LPIPSWithDiscriminator",
        "params": {"disc_start": 0, "perceptual_weight": 0.0, **losses},
    }
    code, _, error = run(tmp_path, capsys, model)
    given = losses.get("disc_in_channels", 3)
    message = f"lossconfig.params.disc_in_channels: expected 1, as ddconfig.out_ch, got {given}"
    assert code == 1 and f"model.params.{message}" in error
    with pytest.raises(ConfigError, match=message):
        instantiate_from_config(model)
    for fitting in ({"disc_in_channels": 1}, {"disc_weight": 0.0}, {"disc_factor": 0.0}):
        model["params"]["lossconfig"]["params"] = {"disc_start": 0, "perceptual_weight": 0.0, **fitting}
        assert run(tmp_path, capsys, model)[0] == 0


def test_scripts_pass_omegaconf_to_the_class_itself() -> None:
    model = AutoencoderKL(**OmegaConf.create(kl()["params"]))
    assert model.state_dict().keys() == instantiate_from_config(kl()).state_dict().keys()


@pytest.mark.parametrize(
    ("ddconfig", "ignored"),
    [
        ({"give_pre_end": False, "use_linear_attn": False, "attn_type": "vanilla-xformers"}, ""),
        ({"use_timestep": True, "some_note": 3}, "use_timestep"),
    ],
)
def test_keys_that_ldm_ignores(caplog: pytest.LogCaptureFixture, ddconfig: dict[str, Any], ignored: str) -> None:
    model = instantiate_from_config(kl(**ddconfig))
    assert model.state_dict().keys() == instantiate_from_config(kl()).state_dict().keys()
    assert (f"ddconfig: {ignored} ignored" in caplog.text) if ignored else not caplog.text


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"target": "taming.models.cond_transformer.Net2NetTransformer"}, "target: .*transformers over codes are not"),
        ({"target": "taming.models.vqgan.VQSegmentationModel"}, "target: .*label maps are not supported"),
        ({"target": "taming.models.vqgan.EMAVQ"}, "target: .*updated by averages are not supported"),
        ({"target": "taming.models.vqgan.VQNoDiscModel"}, "target: .*disc_weight: 0"),
        (
            {"target": "ldm.models.diffusion.ddpm_enc.LatentDiffusion", "params": {"use_mcl": True, "lambda_mcl": 1.0}},
            "params.use_mcl: the contrastive loss",
        ),
    ],
)
def test_what_cannot_be_built_is_refused_early(
    tmp_path: Path, capsys: pytest.CaptureFixture, model: dict[str, Any], message: str
) -> None:
    data = {"data": {"target": "main.DataModuleFromConfig", "params": {"batch_size": 1}}}
    answers = [run(tmp_path, capsys, model, *words, **data) for words in ([], ["-t"])]
    assert answers[0] == answers[1] and answers[0][0] == 1
    assert re.search(f"c.yaml: model.{message}", answers[0][2])


def test_a_config_for_inference_has_no_data(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    code, out, _ = run(tmp_path, capsys, kl())
    assert code == 0 and "none: training and testing need a `data` section" in out
    code, _, error = run(tmp_path, capsys, kl(), "-t")
    assert code == 1 and "the section `data` is missing" in error
    code, _, error = run(tmp_path, capsys, kl(attn_type="x"))
    assert code == 1 and "attn_type" in error


def test_data_sets_that_do_not_come_with_the_package_are_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    train = {"target": "ldm.data.lsun.LSUNChurchesTrain", "params": {"size": 256}}
    data = {"target": "main.DataModuleFromConfig", "params": {"batch_size": 1, "train": train}}
    code, out, _ = run(tmp_path, capsys, kl(), data=data)
    assert code == 0 and "missing: data.params.train: ldm.data.lsun.LSUNChurchesTrain does not come with" in out


@pytest.mark.parametrize(
    ("lightning", "finds"),
    [
        ({"find_unused_parameters": True}, True),
        ({"trainer": {"find_unused_parameters": True}}, True),
        ({"find_unused_parameters": True, "trainer": {"find_unused_parameters": False}}, False),
        ({"find_unused_parameters": False, "trainer": {"enable_autocast": True}}, False),
    ],
)
def test_unused_parameters_at_both_places(tmp_path: Path, lightning: dict[str, Any], finds: bool) -> None:
    OmegaConf.save(OmegaConf.create({"model": kl(), "lightning": lightning}), tmp_path / "c.yaml")
    plan = make_plan(parse_arguments(["-b", str(tmp_path / "c.yaml")]))
    assert plan.settings.find_unused is finds
    assert plan.settings.arguments == {"precision": "auto"} and plan.settings.dropped in ([], ["enable_autocast"])


@pytest.mark.parametrize("key", ["training_images_list_file", "list_file"])
def test_a_missing_list_is_named_before_a_run_is_made(tmp_path: Path, capsys: pytest.CaptureFixture, key: str) -> None:
    train = {"target": "taming.data.custom.CustomTrain", "params": {key: str(tmp_path / "none.txt"), "size": 32}}
    data = {"target": "main.DataModuleFromConfig", "params": {"batch_size": 1, "train": train}}
    code, _, error = run(tmp_path, capsys, kl(), "-t", data=data)
    assert code == 1 and f"data.params.train.params.{key}: the list of images" in error and "c.yaml" in error
    assert not (tmp_path / "logs").exists()
