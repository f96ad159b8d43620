"""Rules for the options of autoencoders. They need no torch: the check of a config and the constructors apply them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ldm.util import ConfigError

# Class -> whether its encoder returns means and variances.
DOUBLE_Z = {"VQModel": False, "VQModelInterface": False, "GumbelVQ": False, "AutoencoderKL": True}


def check_first_stage(name: str, params: Mapping[str, Any]) -> None:
    """Raise a ``ConfigError`` if ``double_z``, the width of codes or the loss does not fit an autoencoder's class."""
    networks, wanted = params["ddconfig"], DOUBLE_Z[name]
    if bool(networks.get("double_z", True)) != wanted:
        returned, other = ("means and variances", "VQModel") if wanted else ("codes", "AutoencoderKL")
        raise ConfigError(
            f"ddconfig.double_z: expected {str(wanted).lower()} for {name}, whose encoder returns {returned}, got "
            f"{str(not wanted).lower()}. Set it to {str(wanted).lower()}, or use {other}."
        )
    width, wide = networks.get("z_channels"), params.get("embed_dim")
    if name == "GumbelVQ" and width != wide:
        raise ConfigError(f"embed_dim: expected {width}, as ddconfig.z_channels, for {name}, got {wide}. Change one.")
    lossconfig = params.get("lossconfig")
    losses = (lossconfig.get("params") or {}) if isinstance(lossconfig, Mapping) else {}
    if losses.get("disc_conditional"):
        reason = "because an autoencoder has no condition"
        raise ConfigError(f"lossconfig.params.disc_conditional: expected false, {reason}, got true. Remove the key.")
    given, channels = losses.get("disc_in_channels", 3), networks.get("out_ch")
    if has_discriminator(losses) and given != channels:
        raise ConfigError(
            f"lossconfig.params.disc_in_channels: expected {channels}, as ddconfig.out_ch, got {given}. Set it to "
            f"{channels}."
        )


def has_discriminator(losses: Mapping[str, Any]) -> bool:
    """Return whether the params of a loss describe an adversarial one."""
    return "disc_start" in losses and 0 not in (losses.get("disc_factor"), losses.get("disc_weight"))
