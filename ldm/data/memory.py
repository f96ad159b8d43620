"""Images of small sets, kept in memory after they were decoded once."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from torch.utils.data import get_worker_info

MAX_BYTES = 512 * 2**20
_THREADS = 4  # decoding releases the interpreter lock


class DecodedImages:
    """Images that are decoded when they are first read. A copy in another process starts empty.

    Args:
        count: number of images of the set.
        side: side of the images in pixels.
    """

    def __init__(self, count: int, side: int) -> None:
        self._shape = (count, side, side, 3)
        self._pixels: np.ndarray | None = None
        self._is_decoded = np.zeros(count, dtype=bool)

    @property
    def fits(self) -> bool:
        """Whether all images take at most 512 MB."""
        return int(np.prod(self._shape, dtype=np.int64)) <= MAX_BYTES

    def read(self, rows: np.ndarray, decode: Callable[[int], np.ndarray]) -> np.ndarray:
        """Return a copy of images, (n,) int -> (n, side, side, 3) uint8; ``decode`` returns the image of a row.

        A loader process keeps nothing, because each would hold a copy of the set.
        """
        if not self.fits or get_worker_info() is not None:
            return np.stack([decode(row) for row in rows.tolist()])
        if self._pixels is None:
            self._pixels = np.empty(self._shape, dtype=np.uint8)
        missing = np.unique(rows[~self._is_decoded[rows]])
        if len(missing) > 1:
            with ThreadPoolExecutor(_THREADS) as pool:
                for row, image in zip(missing.tolist(), pool.map(decode, missing.tolist())):
                    self._pixels[row], self._is_decoded[row] = image, True
        elif len(missing):
            self._pixels[missing[0]], self._is_decoded[missing] = decode(int(missing[0])), True
        return self._pixels[rows]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_pixels": None, "_is_decoded": np.zeros_like(self._is_decoded)}
