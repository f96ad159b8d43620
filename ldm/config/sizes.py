"""Sizes of images against the networks of a config, where the config shows both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ldm.config.loading import Config
from ldm.legacy import resolve_target
from ldm.models.first_stages import has_discriminator
from ldm.modules.diffusionmodules.shapes import AutoencoderShape, most_discriminator_layers

_AUTOENCODER, _UNET = "ddconfig", "unet_config"


def _params(section: Any) -> Mapping[str, Any]:
    return (section.get("params") or {}) if isinstance(section, Mapping) else {}


def _params_of_ours(section: Any) -> Mapping[str, Any]:
    target = section.get("target") if isinstance(section, Mapping) else None
    return _params(section) if resolve_target(str(target)).startswith("ldm.") else {}


def check_sizes(config: Config) -> None:
    """Compare the size of the training images with the downsampling of first stage, U-Net and discriminator.

    Raises:
        ConfigError: a factor does not divide the size, or the discriminator is deeper than the images allow.
    """
    data = _params(config.section("data")).get("train")
    data = _params(data).get("data") or data  # images with embeddings
    side, model = _params(data).get("size", _params(data).get("image_size")), _params(config.section("model"))
    if not isinstance(side, int) or not resolve_target(str(data.get("target"))).startswith("ldm.data."):
        return  # options of the classes of others may mean something else
    section = config.section("model") if _AUTOENCODER in model else model.get("first_stage_config")
    key, stage = f"model{'' if _AUTOENCODER in model else '.params.first_stage_config'}.params", _params(section)
    target = section.get("target") if isinstance(section, Mapping) else None
    if target is not None and not resolve_target(target).startswith("ldm.models.autoencoder."):
        return  # a class of others, whose downsampling is not known
    networks = stage.get(_AUTOENCODER)
    factor = stage.get("patch_size", 1) if networks is None else AutoencoderShape.from_config(networks).factor
    if side % factor:
        name = "patch_size" if networks is None else f"{_AUTOENCODER}.ch_mult"
        message = f"expected images of a multiple of {factor} pixels, got {side}. Change the size or the downsampling"
        raise config.error(f"{key}.{name}", message)
    losses = _params_of_ours(model.get("lossconfig"))
    depth = losses.get("disc_num_layers", 3)
    if has_discriminator(losses) and depth > (most := most_discriminator_layers(side)):
        message = f"expected at most {most} for images of {side} pixels, got {depth}. Set disc_num_layers"
        raise config.error("model.params.lossconfig.params.disc_num_layers", message)
    levels = len(_params_of_ours(model.get(_UNET)).get("channel_mult") or ())
    if levels and side // factor % 2 ** (levels - 1):
        expected = f"expected levels that halve inputs of {side // factor} pixels without a rest"
        message = f"{expected}, got {levels}. Change channel_mult or the size of the images"
        raise config.error(f"model.params.{_UNET}.params.channel_mult", message)
