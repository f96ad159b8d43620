"""Class labels of folders of class folders and of a column of a table."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from ldm.data.collate import collate
from ldm.data.formats.folder import ImageFolder
from ldm.util import ConfigError, UserError


def draw(root, *names):
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(root / name)
    return root


def classes_of(dataset):
    batch = next(iter(DataLoader(dataset, batch_size=len(dataset), collate_fn=collate)))
    assert batch["class_label"].dtype == torch.int64 and batch["class_label"].shape == (len(dataset),)
    return list(zip(batch["class_label"].tolist(), batch["human_label"], strict=True))


def test_folders_are_classes_in_sorted_order(tmp_path):
    draw(tmp_path, "dog/a.png", "cat/b.png", "cat/siamese/c.png", "bird/d.png")
    dataset = ImageFolder(tmp_path, image_size=8, label="folder")
    assert dataset.class_names == {0: "bird", 1: "cat", 2: "dog"}
    assert classes_of(dataset) == [(0, "bird"), (1, "cat"), (1, "cat"), (2, "dog")]
    item = dataset[3]
    assert int(item["class_label"]) == 2 and item["human_label"] == "dog"
    assert "class_label" not in ImageFolder(tmp_path, image_size=8)[0]


def test_numbers_are_those_of_all_splits(tmp_path):
    draw(tmp_path, "train/n01440764/a.JPEG", "train/n01443537/b.JPEG", "val/n01443537/c.JPEG", "cover.png")
    options = {"image_size": 8, "label": "folder"}
    assert classes_of(ImageFolder(tmp_path, split="train", **options)) == [(0, "n01440764"), (1, "n01443537")]
    assert classes_of(ImageFolder(tmp_path, split="validation", **options)) == [(1, "n01443537")]
    assert classes_of(ImageFolder(tmp_path / "train", **options)) == [(0, "n01440764"), (1, "n01443537")]
    (tmp_path / "cover.png").unlink()
    assert [number for number, _ in classes_of(ImageFolder(tmp_path, **options))] == [0, 1, 1]


def test_held_out_and_repeated_rows_keep_their_class(tmp_path):
    draw(tmp_path, *(f"{'ab'[i % 2]}/{i:02}.png" for i in range(20)))
    options = {"image_size": 8, "label": "folder"}
    dataset = ImageFolder(tmp_path, split="train", repeat=2, **options)
    for item in (dataset[i] for i in range(len(dataset))):
        assert dataset.pictures[item["index"]].startswith(item["human_label"])
        assert int(item["class_label"]) == "ab".index(item["human_label"])


def test_pictures_outside_class_folders_are_named(tmp_path):
    draw(tmp_path, "cat/a.png", "b.png")
    with pytest.raises(UserError, match="folder named after its class .label: folder., got b.png"):
        ImageFolder(tmp_path, label="folder")


def write_table(root, *lines):
    (root / "table.csv").write_text("\n".join(lines) + "\n")


def test_columns_of_words(tmp_path):
    draw(tmp_path, "a.png", "b.png", "c.png")
    write_table(tmp_path, "image,kind,hue", "a.png,mug,red", "c.png,cup,red", "b.png,mug,blue")
    dataset = ImageFolder(tmp_path, "table.csv", image_size=8, label="kind", factors=[])
    assert dataset.class_names == {0: "cup", 1: "mug"}
    assert classes_of(dataset) == [(1, "mug"), (0, "cup"), (1, "mug")]


def test_columns_follow_the_order_of_factors(tmp_path):
    draw(tmp_path, "a.png", "b.png", "c.png", "d.png")
    write_table(tmp_path, "image,hue,kind", "d.png,red,cup", "a.png,red,mug", "b.png,blue,mug", "c.png,blue,cup")
    dataset = ImageFolder(tmp_path, "table.csv", image_size=8, label="kind")
    assert dataset.space is not None
    texts = {"cup": 0, "mug": 1}
    for item in (dataset[i] for i in range(4)):
        assert item["text"][1] == item["human_label"] and texts[item["human_label"]] == int(item["class_label"])


def test_columns_of_integers_are_the_classes(tmp_path):
    draw(tmp_path, "a.png", "b.png", "c.png")
    write_table(tmp_path, "image,class_id", "a.png,10", "b.png,2", "c.png,2")
    dataset = ImageFolder(tmp_path, "table.csv", image_size=8, label="class_id", factors=[])
    assert [number for number, _ in classes_of(dataset)] == [10, 2, 2] and dataset.class_names == {2: "2", 10: "10"}


def test_a_table_in_class_folders(tmp_path):
    draw(tmp_path, "cat/a.png", "dog/b.png", "dog/c.png")
    write_table(tmp_path, "image,hue", "dog/b.png,red", "cat/a.png,blue")
    dataset = ImageFolder(tmp_path, "table.csv", image_size=8, label="folder", factors=[])
    assert classes_of(dataset) == [(1, "dog"), (0, "cat")]


def test_wrong_options(tmp_path):
    draw(tmp_path, "a.png", "b.png")
    with pytest.raises(ConfigError, match="label other than 'folder'"):
        ImageFolder(tmp_path, label="kind")
    write_table(tmp_path, "image,kind", "a.png,mug", "b.png,")
    with pytest.raises(ConfigError, match="label: expected one of kind; got 'kinds'"):
        ImageFolder(tmp_path, "table.csv", label="kinds")
    with pytest.raises(UserError, match="'kind' .label. for every image, got none for b.png"):
        ImageFolder(tmp_path, "table.csv", label="kind")
