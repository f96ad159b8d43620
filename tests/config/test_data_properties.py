"""``${data:KEY}`` in configs: properties of the training data, and errors that name the key at fault."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch.utils.data import Dataset

from ldm.config.loading import load_config
from ldm.runs.find import find_run
from ldm.util import ConfigError, UserError

FOLDER = "ldm.data.formats.folder.ImageFolder"


class Items(Dataset):
    """A user's data set of one kind of item."""

    def __init__(self, kind: str = "image", shape: tuple[int, ...] = (8, 8, 3), count: int = 4) -> None:
        self.item, self.count = {kind: torch.zeros(*shape)}, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.item


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "p").mkdir()
    for k in range(12):
        Image.new("RGB", (16, 16)).save(tmp_path / "p" / f"{k:02d}.png")
    write_table(tmp_path / "p", "abc")
    return tmp_path / "p"


def write_table(folder: Path, words: str) -> None:
    lines = [f"{k:02d}.png,{words[k % len(words)]}" for k in range(12)]
    (folder / "t.csv").write_text("\n".join(["image,hue", *lines]))


def resolve(folder: Path, value: str, train: Any = None) -> Any:
    params = {"path": str(folder), "attributes": "t.csv", "image_size": 16}
    content = {"model": {"params": {"x": value}}, "data": {"params": {"train": {"target": FOLDER, "params": params}}}}
    if train is not None:
        own = params if "target" not in train else {}
        section = {"target": FOLDER, **train, "params": {**own, **train.get("params", {})}}
        content["data"]["params"]["train"] = section
    OmegaConf.save(OmegaConf.create(content), folder / "c.yaml")
    return load_config([folder / "c.yaml"]).content["model"]["params"]["x"]


def test_properties_follow_the_files(folder: Path) -> None:
    assert resolve(folder, "${data:image_size,4}") == 4 and resolve(folder, "${data:num_images}") == 12
    assert resolve(folder, "${data:vocabulary}")["words"] == [["a", "b", "c"]]
    write_table(folder, "abcd")
    assert resolve(folder, "${data:vocabulary}")["words"] == [["a", "b", "c", "d"]]


@pytest.mark.parametrize(
    ("value", "train", "message"),
    [
        ("${data:image_size}", {"params": {"image_sze": 16}}, r"c.yaml: data.params.train.params.image_sze: .*Did you"),
        ("${data:image_size}", {"target": f"{FOLDER}s"}, r"c.yaml: data.params.train.target: .*ImageFolders"),
        ("${data:image_size}", {"params": {"augment": {"target": "torch.nn.Nope"}}}, r"params.augment.target: .*Nope"),
        ("${data:image_size}", {"target": "test_data_properties.Items", "params": {"kind": "jpg"}}, "'image'.*'jpg'"),
        (
            "${data:image_size}",
            {"target": "test_data_properties.Items", "params": {"shape": [3, 8, 8]}},
            r"model.params.x: .*\(H, W, C\) .* got \(3, 8, 8\)",
        ),
        ("${data:image_size}", {"target": "test_data_properties.Items", "params": {"count": 0}}, "got None"),
        ("${data:image_size,5}", None, r"model.params.x: \$\{data:image_size,5\}: expected a multiple of 5, got 16"),
        ("${data:image_size,0}", None, "expected a multiple of 0, got 16"),
        ("${data:vocabulary,2}", None, "expected a multiple of 2, got {"),
    ],
)
def test_errors_name_the_key(folder: Path, value: str, train: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(folder, value, train)


@pytest.mark.parametrize("first_stage", ["vq", "pixels"])
def test_advice_names_the_configs_at_hand(first_stage: str, tmp_path: Path) -> None:
    files = ["x/data.yaml", f"configs/own_data/first_stage_{first_stage}.yaml", "configs/own_data/clip_disdiff.yaml"]
    wanted = f"--base x/data.yaml configs/own_data/first_stage_{first_stage}.yaml configs/own_data/ldm.yaml -t -n ldm"
    with pytest.raises(UserError, match=wanted):
        find_run("ldm", [tmp_path], files, "x/data.yaml")
