"""The check of a config refuses params that a judge cannot be built from."""

from pathlib import Path

import pytest

from ldm.config.loading import load_config
from ldm.config.validation import validate
from ldm.models.judge import AttributeJudge
from ldm.util import ConfigError

QUICKSTART = Path(__file__).resolve().parents[2] / "configs" / "quickstart"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["model.params.space=anything", "model.params.vocabulary=null"],
            "model.params.space: expected one of shapes3d",
        ),
        (["model.params.space=shapes3d"], "model.params.space: expected a vocabulary or a space, got both"),
        (["model.params.vocabulary=null"], "model.params.space: expected a vocabulary or a space, got neither"),
        (["model.params.image_size=6"], "model.params.image_size: expected at least 8 pixels, got 6"),
    ],
)
def test_params_of_a_judge_are_checked(words, message):
    config = load_config([QUICKSTART / "world.yaml", QUICKSTART / "judge.yaml"], words)
    with pytest.raises(ConfigError, match=f".yaml: {message}|command line: {message}"):
        validate(config, check_files=False)
    with pytest.raises(ConfigError, match=message.removeprefix("model.params.")):
        AttributeJudge(**config.section("model")["params"])
