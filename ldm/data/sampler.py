"""Order of the training images as a pure function of (seed, epoch) that can be entered at any batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sized

import numpy as np
from torch.utils.data import DistributedSampler


class ResumableShuffle(DistributedSampler):
    """Sampler that shuffles by (seed, epoch) and starts at the position of the training, so that runs can be resumed.

    It is a ``DistributedSampler`` because Lightning does not replace those. Each rank takes every world-size-th image
    of one permutation: shards are disjoint and equally long, and the last ``len(dataset) % world_size`` images of a
    permutation are left out of that epoch.

    Args:
        dataset: any object with a length.
        batch_size: images per batch and rank.
        seed: seed of the permutations.
        position: function that returns (epoch, number of its batches already trained). It is called whenever an
            iteration starts, because Lightning creates the iterator of a resumed epoch before ``set_epoch``.
        shuffle: if False, the order of the data set is kept.
        rank: rank of this process.
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
        """Return the positions in the data set that this rank visits in ``epoch``: (num_samples,) int64."""
        count = len(self.dataset)
        order = np.random.default_rng([self.seed, epoch]).permutation(count) if self.shuffle else np.arange(count)
        return order[self.rank : self.num_samples * self.num_replicas : self.num_replicas]

    def __iter__(self) -> Iterator[int]:
        epoch, batches = self.position()
        return iter(self.order(epoch)[batches * self.batch_size :].tolist())

    def __len__(self) -> int:
        return self.num_samples
