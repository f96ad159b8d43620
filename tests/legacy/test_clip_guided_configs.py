"""Configs and network layouts of the CLIP-guided DDPM's reference code, translated."""

from __future__ import annotations

import pytest
import torch

from ldm.legacy.clip_guided import data_section, model_overrides, network_overrides, reference_values
from ldm.modules.diffusionmodules.clip_guided import UNet
from ldm.util import ConfigError, UserError, instantiate_from_config, load_config

SEED = """img_size img_channels timesteps beta_start beta_end epochs batch_size learning_rate c_drop_prob down_channels
t_embed_dim c_embed_dim clip_model""".split()
DEFAULTS = [32, 3, 400, 0.0001, 0.02, 10, 16, 0.0001, 0.1, [256, 256, 512], 8, 512, "ViT-B/32"]
CONFIG = "configs/_shared/clip_guided.yaml"


def test_the_seeds_defaults_are_those_of_the_shipped_config():
    values = reference_values(dict(zip(SEED, DEFAULTS, strict=True)), "default.yaml")
    assert len(values) == len(SEED)
    assert load_config(CONFIG, model_overrides(values)) == load_config(CONFIG)
    section = load_config("configs/text-to-image/tiny_imagenet.yaml")["data"]["params"]["train"]
    found = data_section(values)
    assert found["target"] == section["target"] and found["params"]["embeddings"] == section["params"]["embeddings"]
    found, expected = found["params"]["data"], section["params"]["data"]
    assert found["target"] == expected["target"]
    assert {**found["params"], **expected["params"]} == {**found["params"], "split": "train"}


def test_every_known_key_has_a_place():
    changed = [16, 1, 100, 0.001, 0.01, 3, 8, 0.01, 0.2, [32, 32, 64], 16, 64, "ViT-L/14"]
    words = model_overrides(reference_values(dict(zip(SEED, changed, strict=True)), "c.yaml"))
    config = load_config(CONFIG, words)
    params, network = config["model"]["params"], config["model"]["params"]["unet_config"]["params"]
    assert network == {"T": 100, "img_ch": 1, "img_size": 16, "down_chs": [32, 32, 64], "t_embed_dim": 16} | {
        "c_embed_dim": 64
    }
    assert (params["timesteps"], params["image_size"], params["channels"]) == (100, 16, 1)
    assert (params["linear_start"], params["linear_end"], params["cond_drop_prob"]) == (0.001, 0.01, 0.2)
    assert params["cond_stage_config"]["text_encoder"]["params"]["version"] == "ViT-L/14"
    assert (config["model"]["base_learning_rate"], config["data"]["params"]["batch_size"]) == (0.01, 8)
    assert config["lightning"]["trainer"]["max_epochs"] == 3


@pytest.mark.parametrize("key", ["save_frequency", "save_interval", "save_every"])
def test_other_names_of_a_key(key):
    (word,) = model_overrides(reference_values({key: 7}, "c.yaml"))
    assert word == "lightning.modelcheckpoint.params.every_n_epochs=7"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"beta_strat": 0.1}, "c.yaml: unknown key 'beta_strat'. Did you mean 'beta_start'?"),
        ({"training": {"ema": {"decai": 0.1}}}, "unknown key 'ema.decai'. Did you mean 'ema.decay'?"),
        ([1], r"c.yaml: expected a mapping of keys .*, got \[1\]"),
    ],
)
def test_unknown_keys(config, message):
    with pytest.raises(ConfigError, match=message):
        reference_values(config, "c.yaml")


def test_places_of_images(tmp_path):
    (tmp_path / "train" / "n01" / "images").mkdir(parents=True)
    root, train = str(tmp_path), f"{tmp_path}/train"
    for given, path, split in (
        ({"dataset_root": root}, root, "train"),
        ({"data_dir": train}, train, None),
        ({"data_paths": f"{root}/train/*/images/*.JPEG"}, train, None),
        ({"data_paths": [f"{root}/train/*/images/*.JPEG"], "data_dir": None}, train, None),
        ({"data_paths": "*.png"}, ".", None),
    ):
        params = data_section(given)["params"]["data"]["params"]
        assert (params["path"], params["split"]) == (path, split)
        assert params["fit"] == "random_crop" and params["do_augment"] and params["image_size"] == 32


def test_other_images():
    found = data_section({"h5_path": "a.h5", "dataset_root": "x", "csv_path": "b.csv", "max_samples": 9})["params"]
    assert found["embeddings"] == "b.csv" and found["data"]["target"].endswith("ArrayImages")
    assert (found["data"]["params"]["path"], found["data"]["params"]["limit"]) == ("a.h5", 9)
    with pytest.raises(ConfigError, match=r"data_paths: expected one folder, or one pattern of paths in it, got \["):
        data_section({"data_paths": ["a/*.png", "b/*.png"]})


@pytest.mark.parametrize("arch", ["package", "dli"])
@pytest.mark.parametrize("sizes", [(3, 32, (256, 256, 512), 8, 512), (1, 16, (32, 64, 96), 12, 40)])
def test_options_of_a_network_follow_from_its_weights(arch, sizes):
    with torch.device("meta"):
        network = UNet(400, *sizes, arch)
        config = load_config(CONFIG, network_overrides(network.state_dict(), "9.pth"))
        again = instantiate_from_config(config["model"]["params"]["unet_config"])
    assert again.shape == network.shape
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in network.state_dict().items()}
    if arch == "dli":  # the other names of the time embedding
        renamed = {key.replace("temb_", "t_emb"): value for key, value in network.state_dict().items()}
        assert network_overrides(renamed, "9.pth") == network_overrides(network.state_dict(), "9.pth")


def test_weights_of_another_network():
    with pytest.raises(UserError, match=r"9.pth: expected the network of a CLIP-guided DDPM .* \(with a, b, c, ...\)"):
        network_overrides(dict.fromkeys("abcd", torch.zeros(2)), "9.pth")
