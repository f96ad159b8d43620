"""Base classes of the data sets: splits, repeats, batches; and texts generated from factors where these are known.

A subclass implements ``images`` (read by row). Batches are read whole, which is much cheaper than B single items.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ldm.data.attributes import AttributeTexts
from ldm.data.factors import FactorSpace
from ldm.data.formats.picture_files import Decoding
from ldm.data.options import require_choice, require_count, require_share
from ldm.data.vocabulary import AttributeVocabulary
from ldm.ranges import Count, Fraction, PositiveInt, Seed, Share, Weight
from ldm.util import ConfigError, instantiate_from_config

HELD_OUT = 5_000
VALIDATION = 1_000
SPLITS = ("train", "validation", "evaluation", "test", None)
_SPLIT_SEED = 20_030
_MIRROR_SEED, _AUGMENT_SEED = 7, 17  # they have random streams of their own, so that they do not change the texts
Targets = Mapping[str, Any] | Sequence[Mapping[str, Any]]


def split_rows(size: int, split: str | None, limit: int | None = None) -> np.ndarray:
    """Return the rows of a split, the same on every machine and in every run.

    * "train": all but 5,000 held-out rows (a tenth of sets below 50,000), in a fixed shuffled order, so that
      ``limit`` takes a random sample;
    * "validation", "evaluation": 1,000 of the held-out rows (these splits differ with ``holdout`` only);
    * "test" or None: all rows in order; with ``limit``, a random sample of the whole set in rising order (an even
      stride would keep some factors constant).

    The rows of a smaller limit are always contained in those of a larger one.

    Args:
        size: number of rows of the whole set.
        split: see above.
        limit: number of rows to keep; None keeps all.

    Returns:
        (n,) int64 rows.

    Raises:
        ConfigError: the split is unknown, the limit is below 1, or the set is too small to be split.
    """
    require_choice("split", split, SPLITS)
    require_count("limit", limit, or_null=True)
    everything = split in (None, "test")
    if everything and (limit is None or limit >= size):
        return np.arange(size)
    shuffled = np.random.RandomState(_SPLIT_SEED).permutation(size)
    if everything:
        return np.sort(shuffled[:limit])
    held_out = min(HELD_OUT, size // 10)
    if not held_out:
        raise ConfigError(f"split: {split} needs at least 10 images, but the set has only {size}. Use split: null.")
    return (shuffled[held_out:] if split == "train" else shuffled[: min(VALIDATION, held_out)])[:limit]


def held_out_rows(
    rows: np.ndarray, is_unseen: np.ndarray, split: str, limit: int | None, draws: np.random.RandomState
) -> np.ndarray:
    """Return the rows of a split of a set of which some combinations are held out.

    * "train": the rows with other combinations;
    * "validation": the rows with combinations that are held out;
    * "evaluation": those, and as many rows of the training split.

    Args:
        rows: (n,) rows of the set.
        is_unseen: (n,) bool, whether the combination of each row is held out.
        split, limit: see ``split_rows``.
        draws: generator of the order.

    Raises:
        ConfigError: the split is unknown, or the limit is below 1.
    """
    require_choice("split", split, SPLITS)
    require_count("limit", limit, or_null=True)
    if split != "evaluation":
        return draws.permutation(rows[is_unseen == (split == "validation")])[:limit]
    unseen, seen = rows[is_unseen], draws.permutation(rows[~is_unseen])
    return np.sort(np.concatenate([unseen, seen[: len(unseen)]]))[:limit]


class ImageDataset(Dataset):
    """Images that are read by row. Items and batches are dicts:

    * image: (H, W, 3) or (B, H, W, 3) uint8, unless ``reads_images`` is False;
    * index: row in the whole set, int or (B,) int64;
    * the entries that ``labels`` of the subclass adds.

    Args:
        rows: (n,) row of the whole set for each position of this data set.
        repeat: number of times each image is shown in succession, which makes epochs of a tiny set longer.
        do_augment: mirror each image with probability 1/2. The choice depends only on ``seed`` and the rows of the
            batch, so a resumed run repeats it.
        seed: seed of all random choices.
        augment: ``{target, params}`` of a transform, or a list of them in order: any that maps (3, H, W) uint8 to the
            same, such as ``torchvision.transforms.v2.RandomAffine``. Its draws depend only on ``seed`` and the rows of
            the batch, and leave torch's generators unchanged.

    Attributes:
        rows: (n,) int64, row in the whole set for each position.
        space: factor space of the whole set; None if the factors are not known.
        vocabulary: words of the attributes, or None.
        missing_vocabulary: reason why attributes in the files do not make a vocabulary, without a full stop; or "".
        in_memory: whether reading images costs so little that loader processes would only slow it down.
        path: file or folder of the images, or None.
        reads_images: whether batches contain the images.
        more_labels: functions of rows like ``labels``, of embeddings and latents that were computed before.
        attribute_texts: labels and texts of the attributes; None without a vocabulary.
        holdout: share of the combinations of words that the training split does not contain.
        decoding: how ``original`` is decoded, if it is an encoded file.
        skipped: rows that are left out -> reason.
        notes: further facts for ``scripts/dataset.py check``.

    Raises:
        ConfigError: an option is outside its choices.
    """

    space: FactorSpace | None = None
    vocabulary: AttributeVocabulary | None = None
    missing_vocabulary = ""
    in_memory = False
    path: Path | None = None
    reads_images = True
    more_labels: Sequence[Callable[[np.ndarray], dict[str, Any]]] = ()
    attribute_texts: AttributeTexts | None = None
    holdout: float = 0.0
    decoding = Decoding()
    skipped: Mapping[int, str] = {}
    notes: Mapping[str, str] = {}

    def __init__(
        self,
        rows: np.ndarray,
        repeat: Count = 1,
        do_augment: bool = False,
        seed: Seed = 0,
        augment: Targets | None = None,
    ) -> None:
        require_count("repeat", repeat)
        listed = [augment] if isinstance(augment, Mapping) else augment or []
        self._transforms = [instantiate_from_config(section) for section in listed]
        for transform in self._transforms:
            if not callable(transform):
                raise ConfigError(f"augment: expected a transform, got {type(transform).__name__}. Correct its target.")
        self.rows = np.repeat(np.asarray(rows, dtype=np.int64), repeat)
        self.do_augment, self.seed = do_augment, seed

    def images(self, rows: np.ndarray) -> np.ndarray:
        """Return the images of rows of the whole set: (n,) int -> (n, H, W, 3) uint8."""
        raise NotImplementedError(f"{type(self).__name__} must implement images()")

    def labels(self, rows: np.ndarray) -> dict[str, Any]:
        """Return the other entries of a batch: (n,) int -> {key: n values}."""
        return {}

    def attribute_values(self, rows: np.ndarray) -> np.ndarray:
        """Return the values of the attributes of rows, (n,) int -> (n, U) int64, ``UNKNOWN`` where not known.

        Data sets with a ``vocabulary`` implement it.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement attribute_values()")

    def attribute_labels(self, values: np.ndarray, rows: np.ndarray) -> dict[str, Any]:
        """Return the entries of ``AttributeTexts``, and ``unseen`` (n,) bool with ``holdout``."""
        labels = self.attribute_texts.labels(values, self._rng(rows))
        return labels | {"unseen": torch.from_numpy(self.is_unseen(values))} if self.holdout else labels

    def is_unseen(self, values: np.ndarray) -> np.ndarray:
        """Return which values of attributes, (n, U) int64, make a combination of words that was held out: (n,) bool."""
        return np.zeros(len(values), dtype=bool)

    def rows_of(self, split: str | None, limit: int | None = None) -> np.ndarray:
        """Return the rows (n,) of any split, independently of the split of this data set."""
        raise NotImplementedError(f"{type(self).__name__} must implement rows_of()")

    def without_skipped(self, rows: np.ndarray) -> np.ndarray:
        """Return the rows (n,) that are not left out."""
        return rows[~np.isin(rows, list(self.skipped))] if self.skipped else rows

    def original(self, row: int) -> bytes | np.ndarray:
        """Return an image as it is stored: an encoded file, or (H, W, 3) uint8 before it is resized."""
        return self.images(np.array([row]))[0]

    @property
    def random_options(self) -> tuple[str, ...]:
        """Options with which an image of a row differs from one reading to the next."""
        given = {"do_augment": self.do_augment, "augment": self._transforms}
        return tuple(name for name, value in given.items() if value)

    def row_name(self, row: int) -> str:
        """Return the name by which files of embeddings refer to a row: the path of its image, or its number."""
        return f"image_{row:06d}"

    @property
    def position_space(self) -> FactorSpace | None:
        """The factor space whose row i is position i, provided that split, limit and repeat are not used."""
        return self.space

    def whole(self) -> ImageDataset:
        """Return a view of all images of a set with factors, whose position i is row i of ``position_space``."""
        view = copy.copy(self)
        view.rows = self._whole_rows()
        return view

    def _whole_rows(self) -> np.ndarray:
        return np.arange(self.space.size)

    def _rng(self, rows: np.ndarray, *stream: int) -> np.random.Generator:
        """Return a generator that depends only on the seed and the rows, so that a resumed run repeats its draws."""
        return np.random.default_rng([self.seed, *stream, *rows.tolist()])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, positions: Sequence[int]) -> dict[str, Any]:
        """Return a whole batch, already collated."""
        rows = self.rows[np.asarray(positions, dtype=np.int64)]
        batch = {"image": torch.from_numpy(self._pixels(rows))} if self.reads_images else {}
        batch |= {"index": torch.from_numpy(rows), **self.labels(rows)}
        for labels in self.more_labels:
            batch |= labels(rows)
        return batch

    def _pixels(self, rows: np.ndarray) -> np.ndarray:
        """Return the images of rows with all random changes: (n,) int -> (n, H, W, 3) uint8."""
        pixels = self.images(rows)
        if self.do_augment:
            mirrored = self._rng(rows, _MIRROR_SEED).random(len(rows)) < 0.5
            pixels[mirrored] = pixels[mirrored][:, :, ::-1]
        return self._augmented(pixels, rows) if self._transforms else pixels

    def _augmented(self, pixels: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Return transformed images: (n, H, W, 3) uint8 -> (n, H, W, 3) uint8."""
        generator = torch.default_generator  # that of the CPU, which the transforms draw from
        before = generator.get_state()
        generator.manual_seed(int(self._rng(rows, _AUGMENT_SEED).integers(2**63)))
        try:
            images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
            for transform in self._transforms:
                images = torch.stack([_transformed(transform, image) for image in images])
        finally:
            generator.set_state(before)
        return images.permute(0, 2, 3, 1).contiguous().numpy()

    def __getitem__(self, position: int) -> dict[str, Any]:
        if not -len(self) <= position < len(self):
            raise IndexError(f"position {position} is out of range for a data set with {len(self)} images")
        batch = self.__getitems__([position])
        item = {key: value[0] for key, value in batch.items()}
        item["index"] = int(item["index"])
        return item


def _transformed(transform: Callable[[torch.Tensor], Any], image: torch.Tensor) -> torch.Tensor:
    """Apply a transform to an image, (3, H, W) uint8; raise a ``ConfigError`` if the result is no such image."""
    try:
        changed = transform(image)
        found = f"{tuple(changed.shape)} {changed.dtype}" if torch.is_tensor(changed) else type(changed).__name__
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        changed, found = None, f"the error: {error}"
    if not isinstance(changed, torch.Tensor) or changed.shape != image.shape or changed.dtype != torch.uint8:
        raise ConfigError(
            f"augment: expected {tuple(image.shape)} uint8 from {type(transform).__name__}, got {found}. Use a "
            "transform that keeps size and type."
        )
    return changed


class FactorDataset(ImageDataset):
    """Images with known factors, and texts generated from them.

    Args:
        space: factor space of the rows.
        vocabulary: words of the factors; None if the data set has no texts.
        split, limit: see ``split_rows``.
        text, phrasing, unset_prob, caption_weights, single_caption_share: see ``AttributeTexts``.
        seed: seed of the texts. They depend only on it and the rows of the batch, so a resumed run repeats them.
        keep: values of the factors to keep, which select a smaller full product that metrics can be computed on:
            factor name -> number of values (evenly spread) or list of values (``FactorSpace.restrict``). Rows,
            factors and texts remain those of the whole set; splits divide the part.
        repeat, augment: see ``ImageDataset``.
        name: name of the data set in tables of scores; None takes the name of the space, else of the class.
        holdout: share of the combinations of words that the training split does not contain, and of which the
            validation split consists, in [0, 1). They are the same for every seed. Then items and batches contain
            ``unseen``, () or (B,) bool: whether the combination was held out.

    Attributes:
        available: factor name -> values in the files, where these do not contain all; set before ``__init__``.
        kept: the part selected by ``keep``.

    In addition to those of ``ImageDataset``, items and batches contain:
        factors: (F,) or (B, F) int64.
        attributes, text, caption_mask: see ``AttributeTexts``; an attribute is a factor (with a vocabulary).

    Raises:
        ConfigError: an option is outside its choices.
    """

    available: Mapping[str, Sequence[int]] | None = None

    def __init__(
        self,
        space: FactorSpace,
        vocabulary: AttributeVocabulary | None = None,
        split: str | None = None,
        limit: PositiveInt | None = None,
        text: str | None = None,
        phrasing: str = "random",
        unset_prob: Fraction = 0.0,
        seed: Seed = 0,
        caption_weights: Sequence[Weight] | None = None,
        single_caption_share: Fraction = 0.5,
        keep: Mapping[str, int | Sequence[int]] | None = None,
        repeat: Count = 1,
        name: str | None = None,
        holdout: Share = 0.0,
        augment: Targets | None = None,
    ) -> None:
        if text is not None and vocabulary is None:
            raise ConfigError(f"text: {text} needs a vocabulary, and {type(self).__name__} has none. Set text: null.")
        self.attribute_texts = None
        if vocabulary is not None:
            options = (text, phrasing, unset_prob, caption_weights, single_caption_share)
            self.attribute_texts = AttributeTexts(vocabulary, *options)
        self.space = space.named(name or space.name or type(self).__name__)
        self.vocabulary = vocabulary
        self.kept = self.space.restrict(keep or {}, self.available)
        require_share("holdout", holdout)
        if holdout and vocabulary is None:
            raise ConfigError(f"holdout: expected a data set with a vocabulary, got {type(self).__name__}.")
        self.holdout = holdout
        super().__init__(self.rows_of(split, limit), repeat, seed=seed, augment=augment)

    @property
    def position_space(self) -> FactorSpace:
        """The factor space of the part selected by ``keep``; ``space`` if nothing is left out."""
        return self.kept.space

    def rows_of(self, split: str | None, limit: int | None = None) -> np.ndarray:
        """Return the rows (n,) of any split of the part, independently of the split of this data set."""
        rows = self.kept.rows
        if not self.holdout or split in (None, "test"):
            return rows[split_rows(len(rows), split, limit)]
        drawn, draws = self._held_out()
        words = self.vocabulary.word_labels(self.space.factors_of(rows))
        return held_out_rows(rows, drawn[tuple(words.T)], split, limit, draws)

    def is_unseen(self, values: np.ndarray) -> np.ndarray:
        """See ``ImageDataset``: each combination of words is held out with probability ``holdout``."""
        return self._held_out()[0][tuple(self.vocabulary.word_labels(values).T)]

    def _held_out(self) -> tuple[np.ndarray, np.random.RandomState]:
        """Return which combinations of words are held out, (W_1, ..., W_F) bool, and the generator after the draw."""
        draws = np.random.RandomState(_SPLIT_SEED)
        return draws.random([len(words) for words in self.vocabulary.words]) < self.holdout, draws

    def _whole_rows(self) -> np.ndarray:
        return self.kept.rows

    def attribute_values(self, rows: np.ndarray) -> np.ndarray:
        """See ``ImageDataset``: the attributes are the factors."""
        return self.space.factors_of(rows)

    def labels(self, rows: np.ndarray) -> dict[str, Any]:
        """Return factors, attributes and texts of rows."""
        factors = self.space.factors_of(rows)
        labels: dict[str, Any] = {"factors": torch.from_numpy(factors)}
        return labels if self.attribute_texts is None else labels | self.attribute_labels(factors, rows)


class WrappedDataset(Dataset):
    """Any indexable object with a length as a torch data set; other attributes are those of the object."""

    def __init__(self, dataset: Any) -> None:
        self.data = dataset

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        return self.data[index]

    def __getattr__(self, name: str) -> Any:
        if name == "data" or name.startswith("__") and name != "__getitems__":  # unpickling looks before data is set
            raise AttributeError(name)
        return getattr(self.data, name)
