"""Sizes of images against the networks of a config."""

from __future__ import annotations

from pathlib import Path

import pytest

from ldm.training.cli import Options
from ldm.training.plan import make_plan
from ldm.util import ConfigError

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart"
LOSS = "model.params.lossconfig.params"


def check(*files: str, **options: str) -> None:
    """Run the check of quickstart configs with overrides, whose dots are ``__``."""
    words = tuple(f"{key.replace('__', '.')}={value}" for key, value in options.items())
    make_plan(Options(base=tuple(str(QUICKSTART / f"{name}.yaml") for name in files), overrides=words))


@pytest.mark.parametrize(("layers", "most"), [(3, 3), (4, 3), (5, 3)])
def test_a_discriminator_is_not_deeper_than_its_picture(layers: int, most: int) -> None:
    adversarial = {"disc_weight": "0.5", "disc_factor": "1.0", "disc_start": "0", "disc_num_layers": str(layers)}
    options = {f"model__params__lossconfig__params__{name}": value for name, value in adversarial.items()}
    if layers <= most:
        check("world", "vq", **options)
        return
    with pytest.raises(ConfigError, match=f"{LOSS}.disc_num_layers: expected at most {most} for images of 32 pixels"):
        check("world", "vq", **options)


def test_networks_of_own_code_may_mean_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_loss.py").write_text("import torch\nclass Loss(torch.nn.Module):\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    loss = "{target: own_loss.Loss, params: {disc_start: 0, disc_num_layers: auto}}"
    check("world", "vq", model__params__lossconfig=loss)


def test_the_downsampling_of_a_first_stage_divides_the_images() -> None:
    message = r"model.params.ddconfig.ch_mult: expected images of a multiple of 128 pixels, got 64"
    with pytest.raises(ConfigError, match=message):
        check(
            "world",
            "vq",
            data__params__train__params__size="64",
            model__params__ddconfig__resolution="256",
            model__params__ddconfig__patch_size="4",
            model__params__ddconfig__ch_mult="[1,1,1,1,1,1]",
        )


def test_the_levels_of_a_unet_halve_its_latents() -> None:
    message = r"unet_config.params.channel_mult: expected levels that halve inputs of 8 pixels without a rest, got 5"
    with pytest.raises(ConfigError, match=message):
        check("world", "latents", "ldm", model__params__unet_config__params__channel_mult="[1,1,1,1,1]")
    check("world", "latents", "ldm", model__params__unet_config__params__channel_mult="[1,1,1,1]")
