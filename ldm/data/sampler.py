"""The order of training images: a pure function of (seed, epoch), to be entered at any batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sized

import numpy as np
from torch.utils.data import DistributedSampler


class ResumableShuffle(DistributedSampler):
    """Shuffles by (seed, epoch) and starts where training stands, so that a resumed run sees what it would have.

    It is a ``DistributedSampler`` because Lightning leaves those alone: each rank takes every world-size-th
    image of the one permutation. Shards are disjoint and equally long; the last ``len(dataset) % world size``
    images of a permutation are left out of that epoch.

    Args:
        dataset: anything with a length.
        batch_size: images per batch and rank.
        seed: of the permutations.
        position: asked whenever an iteration starts: (epoch, batches of it already trained). It is asked then,
            not told before, because Lightning makes the iterator of a resumed epoch before it calls
            ``set_epoch``.
        shuffle: False keeps the data set's order.
        rank: of this process.
        world_size: number of processes.
    """

    def __init__(
        self,
        dataset: Sized,
        batch_size: int,
        seed: int,
        position: Callable[[], tuple[int, int]],
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(dataset, num_replicas=world_size, rank=rank, shuffle=shuffle, seed=seed, drop_last=True)
        self.num_samples = len(dataset) // world_size
        self.batch_size = batch_size
        self.position = position

    def order(self, epoch: int) -> np.ndarray:
        """Positions in the data set that this rank visits in ``epoch``: (num_samples,) int64."""
        count = len(self.dataset)
        if self.shuffle:
            everything = np.random.default_rng([self.seed, epoch]).permutation(count)
        else:
            everything = np.arange(count)
        return everything[self.rank : self.num_samples * self.num_replicas : self.num_replicas]

    def __iter__(self) -> Iterator[int]:
        epoch, batches = self.position()
        return iter(self.order(epoch)[batches * self.batch_size :].tolist())

    def __len__(self) -> int:
        return self.num_samples
