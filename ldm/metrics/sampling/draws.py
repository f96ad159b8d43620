"""Many small draws of factors at once, with the random stream of drawing them one by one.

``RandomState.randint(n, size)`` takes 32-bit words of the generator, masks each to the bits of ``n - 1`` and rejects
those that are still too large; NumPy guarantees that this stream never changes (NEP 19). A compiled loop replays it
on one long array of words, 15 times as fast, and leaves the generator in the same state.
"""

from __future__ import annotations

import numpy as np

from ldm.metrics.boosting.compiled import compiled

SPARE_WORDS = 4096  # drawn in addition to the expected number; unused words are returned to the generator


def draw_points(
    sizes: tuple[int, ...], random_state: np.random.RandomState, num_points: int, num_sets: int, batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draw a factor for each point, ``randint(F)``, then ``num_sets`` batches of values of every factor.

    Args:
        sizes: number of values of each of the F factors.
        random_state: generator; it is left in the state after single draws.
        num_points: number of points P.
        num_sets: number of batches S per point.
        batch_size: number of values B of a factor per batch, drawn factor by factor.

    Returns:
        chosen factors (P,) int64 and values (P, S, B, F) int64.
    """
    largest = np.array([len(sizes), *sizes], dtype=np.uint32) - np.uint32(1)
    masks = np.array([(1 << int(value).bit_length()) - 1 for value in largest], dtype=np.uint32)
    chosen = np.empty(num_points, dtype=np.int64)
    values = np.empty((num_points, num_sets, batch_size, len(sizes)), dtype=np.int64)
    tries = np.where(largest > 0, (masks + 1.0) / (largest + 1.0), 0.0)  # words per draw, on average
    expected = num_points * (tries[0] + num_sets * batch_size * tries[1:].sum())
    start = random_state.get_state()
    num_words = int(1.01 * expected) + SPARE_WORDS
    while True:
        words = random_state.randint(0, 1 << 32, size=num_words, dtype=np.uint32)
        used = _replay(words, largest, masks, chosen, values)
        random_state.set_state(start)
        if used >= 0:
            random_state.randint(0, 1 << 32, size=used, dtype=np.uint32)  # moves the generator on
            return chosen, values
        num_words *= 2


@compiled()
def _replay(words: np.ndarray, largest: np.ndarray, masks: np.ndarray, chosen: np.ndarray, values: np.ndarray) -> int:
    """Fill ``chosen`` and ``values``; return the number of words used, or -1 if there are too few."""
    num_points, num_sets, batch_size, num_factors = values.shape
    position = 0
    for point in range(num_points):
        chosen[point] = 0
        accepted = largest[0] == 0  # a single value needs no word
        while not accepted:
            if position == len(words):
                return -1
            word = words[position] & masks[0]
            position += 1
            accepted = word <= largest[0]
            chosen[point] = word
        for part in range(num_sets):
            for factor in range(num_factors):
                limit, mask = largest[factor + 1], masks[factor + 1]
                done = 0
                if limit == 0:
                    values[point, part, :, factor] = 0
                    done = batch_size
                while done < batch_size:
                    if position == len(words):
                        return -1
                    word = words[position] & mask
                    position += 1
                    values[point, part, done, factor] = word  # overwritten by the next word if it is too large
                    done += word <= limit
    return position
