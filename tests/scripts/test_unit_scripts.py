"""The scripts that name units and score a PCA of the pixels: words, images, errors."""

from __future__ import annotations

import pytest
import yaml
from script_modules import load_script

from ldm.data.world import World3D
from ldm.util import ConfigError, UserError


def test_words_come_from_the_data_set_or_a_file(tmp_path):
    script = load_script("name_units")
    world = World3D(size=32, split="validation")
    assert script.choose_vocabulary(None, world) is world.vocabulary
    path = tmp_path / "words.yaml"
    path.write_text(yaml.safe_dump({"floor": ["a red floor", "a blue floor"], "shape": ["a cube", "a ball"]}))
    assert script.choose_vocabulary(str(path), world).factor_names == ("floor", "shape")
    with pytest.raises(UserError, match="--vocabulary"):
        script.choose_vocabulary(None, [])
    for words in ({}, {"face": ["a"], "hair": ["b", "c"]}, {"face": "smiling", "hair": ["b", "c"]}):
        path.write_text(yaml.safe_dump(words))
        with pytest.raises(ConfigError, match="words.yaml: "):
            script.choose_vocabulary(str(path), world)
    images = script.some_images(world, 5, seed=0)
    assert images.shape == (5, 3, 32, 32) and images.abs().max() <= 1


def test_pca_needs_a_number_of_components_and_a_test_set(capsys, tmp_path):
    script = load_script("pca_baseline")
    assert script.main(["-b", "configs/quickstart/world.yaml"]) == 1
    assert "-k" in capsys.readouterr().err
    (tmp_path / "no_test.yaml").write_text("data: {params: {batch_size: 2}}")
    assert script.main(["-b", str(tmp_path / "no_test.yaml"), "-k", "3"]) == 1
    assert "data.params.test" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        script.main([])
