"""Loaders of the data module: order, shards, workers, messages."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ldm.data.collate import collate
from ldm.data.module import DataModuleFromConfig, WrappedDataset
from ldm.data.sampler import ResumableShuffle
from ldm.util import ConfigError, UserError

WORLD = "ldm.data.world.World3D"


def world(**params) -> dict:
    return {"target": WORLD, "params": {"size": 32, **params}}


def test_training_covers_everything_in_an_order_of_its_own_per_seed():
    def epoch(seed):
        data = DataModuleFromConfig(16, train=world(split="train", limit=50), seed=seed)
        return torch.cat([batch["index"] for batch in data.train_dataloader()]).tolist()

    rows = DataModuleFromConfig(16, train=world(split="train", limit=50)).dataset("train").rows.tolist()
    assert sorted(epoch(1)) == sorted(rows) and epoch(1) != rows
    assert epoch(1) == epoch(1) != epoch(2)


def test_test_and_validation_run_in_order_and_whole():
    data = DataModuleFromConfig(
        16, validation=world(split="validation", limit=40), test=world(split="test", limit=40, text="attributes")
    )
    batches = list(data.test_dataloader())
    assert [len(b["index"]) for b in batches] == [16, 16, 8]
    assert torch.cat([b["index"] for b in batches]).tolist() == data.datasets["test"].rows.tolist()
    assert len(batches[0]["text"]) == 16 and len(batches[0]["text"][0]) == 6
    validation = torch.cat([b["index"] for b in data.val_dataloader()])
    assert validation.tolist() == data.datasets["validation"].rows.tolist()


@pytest.mark.parametrize("world_size", [2, 3])
def test_shards_of_devices_are_disjoint_and_equally_long(world_size):
    shards = [
        ResumableShuffle(range(25), 4, 0, lambda: (3, 0), rank=r, world_size=world_size) for r in range(world_size)
    ]
    seen = [list(s) for s in shards]
    assert {len(s) for s in seen} == {25 // world_size} == {len(s) for s in shards}
    joined = sum(seen, [])
    assert len(set(joined)) == len(joined)


def test_a_shard_can_be_entered_at_any_batch():
    whole = list(ResumableShuffle(range(40), 4, 7, lambda: (2, 0), rank=1, world_size=2))
    assert list(ResumableShuffle(range(40), 4, 7, lambda: (2, 3), rank=1, world_size=2)) == whole[12:]
    assert list(ResumableShuffle(range(40), 4, 7, lambda: (1, 0), rank=1, world_size=2)) != whole


def test_number_of_workers():
    data = DataModuleFromConfig(4, train=world(limit=8), num_workers=None)
    assert data.train_dataloader().num_workers == 0
    data = DataModuleFromConfig(4, train=world(limit=8), num_workers=2, use_worker_init_fn=True)
    loader = data.train_dataloader()
    assert loader.num_workers == 2 and loader.worker_init_fn is not None


class Noise(list):
    """Items that draw from numpy's global generator."""

    def __getitem__(self, index):
        return {"noise": np.random.rand()}


def test_worker_processes_are_seeded_from_torch():
    data = DataModuleFromConfig(
        1, test={"target": "test_module.Noise", "params": {}}, num_workers=2, use_worker_init_fn=True
    )
    data.datasets["test"] = Noise(range(4))
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append([batch["noise"].item() for batch in data.test_dataloader()])
    assert draws[0] == draws[1] != draws[2] and len(set(draws[0])) == 4


def test_wrapped_data_gives_the_same_batches():
    plain = DataModuleFromConfig(4, test=world(limit=10, text="attributes", phrasing="canonical"))
    wrapped = DataModuleFromConfig(4, test=world(limit=10, text="attributes", phrasing="canonical"), wrap=True)
    for a, b in zip(plain.test_dataloader(), wrapped.test_dataloader(), strict=True):
        assert torch.equal(a["image"], b["image"]) and a["text"] == b["text"]
        assert torch.equal(a["index"], b["index"]) and torch.equal(a["factors"], b["factors"])
    assert isinstance(wrapped.datasets["test"], WrappedDataset)


def test_setup_builds_only_what_a_stage_needs():
    data = DataModuleFromConfig(4, train=world(limit=8), test=world(limit=8))
    data.setup("fit")
    assert set(data.datasets) == {"train"}
    data.setup()
    assert set(data.datasets) == {"train", "test"}


def test_messages():
    with pytest.raises(ConfigError, match="one batch of 64 images, got 8 images. Set .*batch_size to at most 8"):
        DataModuleFromConfig(64, train=world(limit=8)).train_dataloader()
    with pytest.raises(ConfigError, match="data.params.test: expected the test images, got only train"):
        DataModuleFromConfig(4, train=world(limit=8)).test_dataloader()
    with pytest.raises(ConfigError, match="batch_size"):
        DataModuleFromConfig(0)
    with pytest.raises(ConfigError, match="num_workers"):
        DataModuleFromConfig(4, num_workers=-1)


def test_collate_keeps_texts_and_stacks_the_rest():
    items = [
        {"image": np.full((2, 2, 3), i, np.uint8), "text": [f"a{i}", "b"], "index": i, "name": "x"} for i in range(3)
    ]
    batch = collate(items)
    assert batch["image"].shape == (3, 2, 2, 3) and batch["image"].dtype == torch.uint8
    assert batch["text"] == [["a0", "b"], ["a1", "b"], ["a2", "b"]]
    assert batch["index"].tolist() == [0, 1, 2] and batch["name"] == ["x"] * 3
    assert collate(batch) == batch


def test_collate_keeps_lists_of_several_lengths():
    boxes = [[[0, 0, 4, 4]], [[1, 1, 2, 2], [3, 3, 5, 5]]]
    assert collate([{"boxes": boxes[0]}, {"boxes": boxes[1]}])["boxes"] == boxes
    assert collate([{"boxes": boxes[1]}, {"boxes": boxes[1]}])["boxes"].shape == (2, 2, 4)
    ragged = [[1, 2], [3]]
    assert collate([{"points": boxes[0]}, {"points": ragged}])["points"] == [boxes[0], ragged]


def test_collate_names_what_does_not_fit():
    items = [{"image": torch.zeros(2, 2, 3), "index": 7}, {"image": torch.zeros(4, 4, 3), "index": 9}]
    with pytest.raises(UserError, match=r"one shape.*\(2, 2, 3\) of item 0.*index 7.*\(4, 4, 3\).*index 9"):
        collate(items)
    with pytest.raises(UserError, match="dicts with the same keys, got .* and tuple"):
        collate([{"image": 0}, (0, 1)])
    with pytest.raises(UserError, match="the same keys"):
        collate([{"image": 0}, {"picture": 0}])
