"""The examples of docs/datasets.md for one's own images."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from ldm.config.loading import load_config
from ldm.data.formats.folder import ImageFolder
from ldm.data.module import DataModuleFromConfig

DOCS = (Path(__file__).parents[2] / "docs" / "datasets.md").read_text()


@pytest.fixture
def photos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "photos"
    folder.mkdir()
    lines = ["image,colour,shape,age,wears,part"]
    for k in range(40):
        Image.fromarray(np.full((8, 8, 3), k, np.uint8)).save(folder / f"{k}.png")
        wears = ("hat;glasses", "hat", ";", "")[k % 4]
        lines.append(f"{k}.png,{'red' if k % 2 else 'blue'},{'mug' if k % 3 else 'plate'},{k},{wears},train")
    (folder / "table.csv").write_text("\n".join(lines))
    return folder


def test_the_config(photos, tmp_path):
    text = next(block for block in re.findall(r"```yaml\n(.*?)```", DOCS, re.S) if "&pictures" in block)
    (tmp_path / "mine.yaml").write_text(text)
    section = load_config(["mine.yaml"], ["data.params.batch_size=4"]).section("data")
    module = DataModuleFromConfig(**section["params"])
    module.setup()
    sizes = {name: len(data) for name, data in module.datasets.items()}
    assert sizes == {"train": 36, "validation": 4, "test": 4}
    assert not set(module.datasets["train"].rows) & set(module.datasets["test"].rows)


def test_the_options_of_columns(photos):
    rows = re.findall(r"^\| `(\w+: .*?)` \|", DOCS.partition("**Columns.**")[2], re.M)
    options = [yaml.safe_load(row) for row in rows]
    of_columns = {"columns", "templates", "bins", "several", "max_words"}
    assert {name for option in options for name in option} >= of_columns
    for option in (option for option in options if set(option) <= of_columns):
        data = ImageFolder(photos, "table.csv", image_size=8, **option)
        assert data.vocabulary is not None and len(data[0]["text"]) == data.vocabulary.num_units
    augment = yaml.safe_load(re.search(r"```yaml\n(augment: .*?)```", DOCS, re.S)[1])
    assert ImageFolder(photos, image_size=8, **augment)[0]["image"].shape == (8, 8, 3)
