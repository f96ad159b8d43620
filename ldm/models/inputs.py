"""Conversion of a batch of the data loader to the tensors that a model computes with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ldm.data.collate import collate, is_channel_first
from ldm.data.traits import unwrap, vocabulary_of
from ldm.data.vocabulary import AttributeVocabulary
from ldm.util import UserError

_MOST = 16.0  # absolute value of normalized pixels; those in [0, 255] exceed it


def batch_value(batch: Mapping[str, Any], key: str) -> Any:
    """Return ``batch[key]``.

    Raises:
        UserError: the batch has no ``key``; its entries are listed.
    """
    if key not in batch:
        raise UserError(
            f"batch: expected an entry {key!r}, got {', '.join(sorted(batch))}. Choose a data set (data.params.train) "
            f"with {key!r}, or set the model's first_stage_key, cond_stage_key or image_key to another entry"
        )
    return batch[key]


def attribute_values(batch: Mapping[str, Any], names: Sequence[str], sizes: Sequence[int]) -> Tensor:
    """Return the values of the attributes of a batch, (B, U) int64, ``UNKNOWN`` where not known.

    Batches of a user's data set may contain ``factors`` instead of ``attributes``: these are taken if they fit.

    Args:
        batch: batch of the data loader.
        names: names of the U attributes of the model.
        sizes: number of values of each of them.

    Raises:
        UserError: there is neither entry, or the number of attributes or a value does not fit the model.
    """
    key = "attributes" if "attributes" in batch or "factors" not in batch else "factors"
    values, expected = batch_value(batch, key), f"batch[{key!r}]: expected values of {len(names)} attributes "
    expected += f"({', '.join(f'{name}: 0 to {size - 1}' for name, size in zip(names, sizes))})"
    advice = "Train the model with the vocabulary of this data set (model.params.vocabulary: ${data:vocabulary})"
    if values.ndim != 2 or values.shape[1] != len(names):
        raise UserError(f"{expected}, got a tensor of shape {tuple(values.shape)}. {advice}")
    if key == "factors" and (values.amax(dim=0).cpu() >= torch.tensor(sizes)).any():
        raise UserError(f"{expected}, got values up to {values.amax(dim=0).tolist()}. {advice}")
    return values


def check_words(loader: Any, vocabulary: AttributeVocabulary | None) -> None:
    """Raise a ``UserError`` if a data set, or that of a loader, has other attributes or words than a model."""
    dataset = loader.dataset if isinstance(loader, DataLoader) else loader
    found = vocabulary_of(dataset)
    if found is None or vocabulary is None:
        return
    own, other = ({**each.to_dict(), "templates": None} for each in (vocabulary, found))
    if own != other:
        raise UserError(
            f"{type(unwrap(dataset)).__name__}: expected the attributes and words of the model, "
            f"{dict(zip(own['factor_names'], own['words']))}, got {dict(zip(other['factor_names'], other['words']))}. "
            "Use one table for the images of all splits, or train a model on these"
        )


def images_from_batch(batch: Mapping[str, Any], key: str = "image") -> Tensor:
    """Return the images of a batch for a network.

    Args:
        batch: ``batch[key]`` is (B, H, W, C) or (B, H, W), uint8 in [0, 255] or float in [-1, 1]; (B, C, H, W) is
            recognized if C is 1 or 3 (``is_channel_first``).
        key: entry of the batch.

    Returns:
        (B, C, H, W) contiguous float in [-1, 1] on the batch's device.

    Raises:
        UserError: the key is missing or the shape is not one of an image batch.
    """
    images = batch_value(batch, key)
    if not isinstance(images, Tensor) or images.ndim not in (3, 4):
        found = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise UserError(f"batch['{key}']: expected images of shape (B, H, W, C) or (B, H, W), got {found}")
    if images.ndim == 3:
        images = images.unsqueeze(-1)
    if not is_channel_first(images.shape[1:]):
        images = images.permute(0, 3, 1, 2)
    if images.dtype == torch.uint8:
        images = images.float() / 127.5 - 1.0
    return images.float().contiguous()


def check_item(item: Any, key: str | None) -> None:
    """Check an item of a data set as it is before collation.

    Args:
        item: the item.
        key: entry with the image of the model; ``None`` if it is not known.

    Raises:
        UserError: the item is no dict, or the pixels of its image are not numbers in about [-1, 1] or uint8.
    """
    if not isinstance(item, Mapping):
        found = f"{type(item).__name__} of {len(item)}" if isinstance(item, (list, tuple)) else type(item).__name__
        raise UserError(f"expected a dict of entries such as 'image' for each image, got a {found}. Return a dict")
    image = collate([item]).get(key)
    if not isinstance(image, Tensor) or image.dtype in (torch.uint8, torch.bool):
        return
    if not torch.isfinite(image).all():
        raise UserError(f"expected finite numbers in {key!r}, got NaN or infinity. Correct the files or the data set")
    if image.abs().amax() > _MOST:
        raise UserError(
            f"expected uint8 in [0, 255] or float in [-1, 1] in {key!r}, got {image.dtype} from {image.amin():g} to "
            f"{image.amax():g}. Return uint8, or x / 127.5 - 1"
        )


def some_images(dataset: Any, count: int, seed: int, key: str = "image") -> Tensor:
    """Return at most ``count`` random images of a data set, (n, 3, H, W) in [-1, 1]; ``key`` is their entry."""
    rows = np.random.RandomState(seed).permutation(len(dataset))[:count].tolist()
    loader = DataLoader(dataset, batch_size=64, sampler=rows, collate_fn=collate)
    return torch.cat([images_from_batch(batch, key) for batch in loader])


def mask_from_batch(batch: Mapping[str, Any], key: str, lowest: float) -> Tensor:
    """Return masks (B, H, W, C) or (B, H, W) of a batch as (B, C, H, W) float.

    Bool masks, and uint8 masks in [0, 255] or [0, 1], become ``lowest`` to 1; float values are not changed.
    """
    value = batch_value(batch, key)
    if not isinstance(value, Tensor) or value.dtype not in (torch.bool, torch.uint8):
        return images_from_batch(batch, key)
    value = value.byte()
    value = value * torch.where(value.amax() > 1, 1, 255).byte()  # without waiting for the device
    return (images_from_batch({key: value}, key) + 1) * (1 - lowest) / 2 + lowest


def check_image_size(images: Tensor, expected: int, where: str) -> None:
    """Compare the images' height and width with the network's configuration.

    Raises:
        UserError: they differ.
    """
    height, width = images.shape[-2:]
    if (height, width) != (expected, expected):
        raise UserError(
            f"{where}: expected images of {expected} x {expected} pixels, got {height} x {width}. Set the data set's "
            f"size (data.params.*.params.size) to {expected}, or {where} to {height}"
        )
