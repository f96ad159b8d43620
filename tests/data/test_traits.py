"""Traits of data sets: ours, wrapped ones, and users' own torch data sets."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import Dataset

from ldm.data.check import check_dataset
from ldm.data.dataset import WrappedDataset
from ldm.data.factors import FactorSpace
from ldm.data.traits import is_in_memory, position_space_of, space_of, unwrap, vocabulary_of
from ldm.data.world import World3D


class Blobs(Dataset):
    """A user's data set with factors but without words, whose raw images are called ``data``."""

    space = FactorSpace(("hue", "size"), (3, 2))
    data = torch.zeros(6, 4, 4, 3, dtype=torch.uint8)

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return {"image": self.data[index]}


@pytest.mark.parametrize("wrap", [lambda dataset: dataset, WrappedDataset])
def test_traits_of_our_data_sets(wrap):
    world = World3D(size=32, keep={"floor_hue": 2})
    dataset = wrap(world)
    assert unwrap(dataset) is world and vocabulary_of(dataset) is world.vocabulary and is_in_memory(dataset)
    assert space_of(dataset).size == 480_000 and position_space_of(dataset).size == len(world)


@pytest.mark.parametrize("wrap", [lambda dataset: dataset, WrappedDataset])
def test_traits_of_a_users_data_set(wrap):
    dataset = wrap(Blobs())
    assert isinstance(unwrap(dataset), Blobs) and vocabulary_of(dataset) is None and not is_in_memory(dataset)
    assert space_of(dataset).name == position_space_of(dataset).name == "Blobs"
    assert position_space_of(dataset).all_sizes == (3, 2) and Blobs.space.name == ""


def test_an_object_without_traits():
    for dataset in ([1, 2, 3], WrappedDataset([1, 2, 3])):
        assert unwrap(dataset) == [1, 2, 3] and vocabulary_of(dataset) is None and space_of(dataset) is None
        assert position_space_of(dataset) is None and not is_in_memory(dataset)


def test_the_check_reads_a_users_data_set():
    report = check_dataset(WrappedDataset(Blobs()))
    assert report.checked == 6 and not report.problems
    assert dict(report.facts)["data set"] == "Blobs" and dict(report.facts)["factors"] == "hue 3, size 2"
    assert dict(report.facts)["image"] == "4 x 4 x 3 uint8, values 0 to 0"
