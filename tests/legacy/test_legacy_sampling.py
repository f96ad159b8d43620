"""Sampling settings of earlier configs become a sampler."""

import pytest

from ldm.legacy import sampling_options, translate
from ldm.util import ConfigError

DDIM = "ldm.diffusion.samplers.DDIMSampler"


def ddim(num_steps, eta):
    return {"target": DDIM, "params": {"num_steps": num_steps, "eta": eta}}


@pytest.mark.parametrize(
    "options, defaults, expected",
    [
        ({"N": 8}, {}, {"N": 8}),
        ({"sampler": {"target": "my.Sampler"}}, {}, {"sampler": {"target": "my.Sampler"}}),
        ({"ddim_steps": 20, "ddim_eta": 0.0, "N": 8}, {}, {"N": 8, "sampler": ddim(20, 0.0)}),
        ({"ddim_steps": 20}, {}, {"sampler": ddim(20, 1.0)}),
        ({"ddim_eta": 0.5}, {}, {"sampler": ddim(200, 0.5)}),
        ({"ddim_steps": None, "ddim_eta": 0.5}, {}, {"sampler": {"target": "ldm.diffusion.samplers.DDPMSampler"}}),
        ({"num_steps": 16}, {"num_steps": 50, "eta": 0.0}, {"sampler": ddim(16, 0.0)}),
        ({"eta": 1.0}, {"num_steps": 50, "eta": 0.0}, {"sampler": ddim(50, 1.0)}),
    ],
)
def test_old_settings_become_a_sampler(options, defaults, expected):
    before = dict(options)
    assert sampling_options(options, **defaults) == expected
    assert options == before


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sampler": {"target": DDIM}, "ddim_steps": 20}, "got both. Remove ddim_steps"),
        ({"ddim_steps": 20, "num_steps": 10}, "expected ddim_steps or num_steps, got both"),
    ],
)
def test_two_forms_of_one_setting_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        sampling_options(options)


def test_an_edit_score_of_an_earlier_config_gets_a_sampler():
    current = "ldm.evaluation.editing.callback.EditScore"
    for target in ("ldm.evaluation.edit.EditScore", current):
        today, params = translate(target, {"judge": "x", "num_steps": 16})
        assert (today, params) == (
            "ldm.evaluation.editing.callback.EditScore",
            {"judge": "x", "sampler": ddim(16, 0.0)},
        )
        assert translate(target, {"judge": "x"})[1] == {"judge": "x"}
