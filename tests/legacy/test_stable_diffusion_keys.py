"""Names and shapes of the published Stable Diffusion checkpoints, against models of full size without memory."""

from __future__ import annotations

import pytest
import stable_diffusion_layout as layout
import torch
from stable_diffusion_configs import STAGE_2, UNET_2, model

from ldm.modules.encoders import clip_loading
from ldm.util import instantiate_from_config

OURS = {"shift_coef", "ddim_coef"}  # constants that this package adds
MULT, LEVELS = (1, 2, 4, 4), (0, 1, 2)
KL_8 = layout.autoencoder(128, MULT)
TEXT_1, TEXT_2 = layout.clip_of_transformers(768, 12), layout.clip_of_open_clip(1024, 24)
UNET_1 = layout.unet(320, MULT, LEVELS, 768)


@pytest.fixture(autouse=True)
def no_weights(monkeypatch, tmp_path):
    """A machine without a CLIP."""
    monkeypatch.delenv(clip_loading.WEIGHTS_VARIABLE, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(clip_loading, "OPENAI_CACHE", str(tmp_path))


def shapes_of(config):
    with torch.device("meta"):
        built = instantiate_from_config(config)
    return {key: tuple(value.shape) for key, value in built.state_dict().items() if key not in OURS}


def compare(config, expected):
    found = shapes_of(config)
    assert sorted(found) == sorted(expected)
    assert found == expected


def test_number_of_weights():
    """The published numbers: of entries of each part, and of millions of parameters of the networks."""
    assert [len(part) for part in (UNET_1, KL_8, TEXT_1, TEXT_2)] == [686, 248, 197, 294]

    def millions(shapes):
        return round(sum(torch.Size(shape).numel() for shape in shapes.values()) / 1e6, 2)

    assert millions(UNET_1) == 859.52 and millions(KL_8) == 83.65 and millions(TEXT_1) == 123.06
    assert millions(layout.unet(320, MULT, LEVELS, 1024, is_linear=True)) == 865.91


def test_version_1_4():
    compare(model("FrozenCLIPEmbedder"), layout.checkpoint(UNET_1, KL_8, TEXT_1))
    full = layout.checkpoint(UNET_1, KL_8, TEXT_1, has_average=True)
    assert len(full) == 12 + 686 + 248 + 197 + 688
    compare(model("FrozenCLIPEmbedder", use_ema=True), full)


def test_version_1_5_inpainting():
    network = layout.unet(320, MULT, LEVELS, 768, in_channels=9)
    config = model("FrozenCLIPEmbedder", unet={"in_channels": 9}, conditioning_key="hybrid", use_ema=True)
    compare(config, layout.checkpoint(network, KL_8, TEXT_1, has_average=True))


def test_version_2_1_v():
    network = layout.unet(320, MULT, LEVELS, 1024, is_linear=True)
    unet = {**UNET_2, "use_fp16": True}
    config = model("FrozenOpenCLIPEmbedder", STAGE_2, unet=unet, parameterization="v")
    compare(config, layout.checkpoint(network, KL_8, TEXT_2))


def test_network_of_the_upscaler_of_version_2():
    disabled = [True, True, True, False]
    unet = {
        **{"num_classes": 1000, "image_size": 128, "in_channels": 7, "model_channels": 256, "context_dim": 1024},
        **{"attention_resolutions": [2, 4, 8], "channel_mult": [1, 2, 2, 4], "use_linear_in_transformer": True},
        **{"disable_self_attentions": disabled, "disable_middle_self_attn": False},
    }
    expected = layout.unet(256, (1, 2, 2, 4), (1, 2, 3), 1024, 7, is_linear=True, disabled=disabled)
    expected |= {"label_emb.weight": (1000, 1024)}
    found = shapes_of(model("FrozenOpenCLIPEmbedder", STAGE_2, unet=unet)["params"]["unet_config"])
    assert found == expected


def test_image_variations():
    stage = layout.clip_of_open_clip(768, 0) | layout.clip_images(1024, 24, 768, 14, 224)
    config = model("FrozenCLIPImageEmbedder", cond_stage_key="jpg", use_ema=True)
    compare(config, layout.checkpoint(UNET_1, KL_8, stage, has_average=True))
