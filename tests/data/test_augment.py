"""Transforms of training images: reproducible draws, and which transforms are refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.formats.folder import ImageFolder
from ldm.data.formats.h5_text import ArrayImages
from ldm.data.formats.image_list import ImageList
from ldm.data.module import DataModuleFromConfig
from ldm.data.world import World3D
from ldm.util import BuildError, ConfigError

V2 = "torchvision.transforms.v2"
AFFINE = {"target": f"{V2}.RandomAffine", "params": {"degrees": 30, "translate": [0.2, 0.2]}}
JITTER = {"target": f"{V2}.ColorJitter", "params": {"brightness": 0.5}}


@pytest.fixture
def folder(tmp_path):
    draws = np.random.RandomState(0)
    (tmp_path / "p").mkdir()
    for k in range(8):
        Image.fromarray(draws.randint(0, 256, (12, 12, 3), dtype=np.uint8)).save(tmp_path / "p" / f"{k}.png")
    return tmp_path / "p"


def test_draws_follow_from_seed_and_rows(folder):
    plain = ImageFolder(folder, image_size=12)
    data = ImageFolder(folder, image_size=12, augment=[AFFINE, JITTER])
    before = torch.get_rng_state()
    one, again, other = data.__getitems__(range(8)), data.__getitems__(range(8)), data.__getitems__(range(4))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one["image"], again["image"]) and one["image"].dtype == torch.uint8
    assert one["image"].shape == (8, 12, 12, 3) and one["image"].is_contiguous()
    assert not torch.equal(one["image"][:4], other["image"])
    assert not torch.equal(one["image"], plain.__getitems__(range(8))["image"])
    torch.manual_seed(5)
    assert torch.equal(data.__getitems__(range(8))["image"], one["image"])
    seeded = ImageFolder(folder, image_size=12, augment=[AFFINE, JITTER], seed=1)
    assert not torch.equal(seeded.__getitems__(range(8))["image"], one["image"])
    assert data[3]["image"].shape == (12, 12, 3)


def test_each_image_has_a_draw_of_its_own(tmp_path):
    np.save(tmp_path / "same.npy", np.tile(np.arange(144, dtype=np.uint8).reshape(1, 12, 12, 1), (6, 1, 1, 3)))
    images = ArrayImages(tmp_path / "same.npy", image_size=12, augment=AFFINE).__getitems__(range(6))["image"]
    assert len({image.numpy().tobytes() for image in images}) > 3


def test_mirroring_and_texts_are_unchanged(folder):
    (folder / "t.csv").write_text("image,kind\n" + "\n".join(f"{k}.png,{'ab'[k % 2]}" for k in range(8)))
    still = {"target": f"{V2}.RandomAffine", "params": {"degrees": 0}}
    options = {"image_size": 12, "do_augment": True, "unset_prob": 0.5}
    a, b = (ImageFolder(folder, "t.csv", augment=t, **options).__getitems__(range(8)) for t in (None, still))
    assert torch.equal(a["image"], b["image"]) and a["text"] == b["text"]


def test_every_kind_and_workers(folder, tmp_path):
    files = ImageList(paths=[str(folder / f"{k}.png") for k in range(8)], size=12, augment=[AFFINE])
    assert torch.equal(
        files.__getitems__(range(8))["image"],
        ImageFolder(folder, image_size=12, augment=AFFINE).__getitems__(range(8))["image"],
    )
    config = {"target": "ldm.data.formats.folder.ImageFolder"}
    config["params"] = {"path": str(folder), "image_size": 12, "augment": AFFINE}
    inline, workers = (list(DataModuleFromConfig(4, test=config, num_workers=n).test_dataloader()) for n in (0, 2))
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(inline, workers, strict=True))


@pytest.mark.parametrize(
    "augment, message",
    [
        ({"target": f"{V2}.Resize", "params": {"size": 6}}, r"augment: expected \(3, 12, 12\) uint8 from Resize, got"),
        ({"target": f"{V2}.Grayscale"}, r"from Grayscale, got \(1, 12, 12\) torch.uint8"),
        ({"target": f"{V2}.RandomAfine"}, "RandomAfine"),
        ({"params": {"degrees": 3}}, "target"),
        ({"target": "ldm.training.callbacks.record.Record"}, "augment: expected a transform, got Record"),
    ],
)
def test_unsuitable_transforms(folder, augment, message):
    with pytest.raises((ConfigError, BuildError), match=message):
        ImageFolder(folder, image_size=12, augment=augment).__getitems__([0])


@pytest.mark.parametrize("name, found", [("ToPILImage", "Image"), ("Normalize", "the error: ")])
def test_transforms_of_other_types(folder, name, found):
    params = {"mean": [0.0], "std": [1.0]} if name == "Normalize" else {}
    data = ImageFolder(folder, image_size=12, augment={"target": f"{V2}.{name}", "params": params})
    with pytest.raises(ConfigError, match=rf"augment: expected \(3, 12, 12\) uint8 from {name}, got {found}"):
        data.__getitems__([0])


def test_factor_sets_keep_their_texts():
    options = {"size": 32, "text": "caption", "holdout": 0.2, "split": "train", "limit": 8, "seed": 3}
    plain, data = World3D(**options), World3D(**options, augment=AFFINE)
    a, b = plain.__getitems__(range(8)), data.__getitems__(range(8))
    assert not torch.equal(a.pop("image"), b.pop("image"))
    assert all(a[key] == b[key] if key == "text" else torch.equal(a[key], b[key]) for key in a)
