import pytest
import torch
from torch import nn

from ldm.models import contracts
from ldm.models.diffusion.latent import LatentDiffusion
from ldm.util import ConfigError, UserError


class Units:
    latent_unit, latent_shape, unit_names = 2, (1, 4, 4), None

    def encode_units(self, images):
        return images

    def decode_units(self, codes, x_T, sampler=None, only=None):
        return codes


def test_missing_members_are_named():
    assert contracts.missing_members(Units(), contracts.HasUnits) == []
    assert contracts.missing_members(nn.Linear(1, 1), contracts.Editable) == [
        "latent_shape",
        "latent_unit",
        "sample_edit",
    ]
    contracts.require(Units(), contracts.HasUnits, "traversals")
    with pytest.raises(
        UserError, match=r"edit score: expected a model that .* got .*Linear, which lacks .*sample_edit"
    ):
        contracts.require(nn.Linear(1, 1), contracts.Editable, "edit score")
    with pytest.raises(ConfigError, match="openaimodel_shift"):
        contracts.require(nn.Linear(1, 1), contracts.ShiftNetwork, "unet_config.target", ConfigError)


def test_contracts_are_checked_without_a_base_class():
    assert isinstance(Units(), contracts.HasUnits) and not isinstance(Units(), contracts.Editable)


class TextlessStage(nn.Module):
    """A condition stage of a user's own: its texts are switched off, and it has no members for classes."""

    takes_texts = False

    def forward(self, value):
        return value

    encode_texts = unconditional = forward


def test_a_stage_without_texts_needs_no_members_for_classes():
    model = LatentDiffusion(
        first_stage_config={"target": "ldm.models.autoencoder.IdentityFirstStage"},
        cond_stage_config={"target": f"{__name__}.TextlessStage"},
        cond_stage_key="code",
        unet_config={"target": "torch.nn.Identity"},
        use_ema=False,
    )
    cond = model.get_condition({"code": torch.ones(2, 3)})
    assert torch.equal(cond.null().value, torch.zeros(2, 3))
