"""Many small draws of factors at once, on the very random stream of drawing them one by one.

``RandomState.randint(n, size)`` takes 32-bit words of the generator, masks each to the bits of ``n - 1`` and throws
those away that are still too large. NumPy keeps that stream fixed for ever (NEP 19). A compiled loop therefore makes
the same draws from one long array of words that thousands of calls from Python would make, 15 times as fast; then the
generator is put where those calls would have left it.
"""

from __future__ import annotations

import numpy as np

from ldm.metrics.boosting.compiled import compiled

SPARE_WORDS = 4096  # more than expected; what is not needed is given back


def draw_points(
    sizes: tuple[int, ...], random_state: np.random.RandomState, num_points: int, num_sets: int, batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """For each point a factor, ``randint(F)``, then ``num_sets`` times a batch of values of every factor.

    Args:
        sizes: number of values of each of the F factors.
        random_state: generator; afterwards it stands where single draws would have left it.
        num_points: points P.
        num_sets: batches S per point.
        batch_size: values B of a factor per batch, drawn factor after factor.

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
        words = _words(random_state, num_words)
        used = _replay(words, largest, masks, chosen, values)
        random_state.set_state(start)
        if used >= 0:
            _words(random_state, used)
            return chosen, values
        num_words *= 2


def _words(random_state: np.random.RandomState, num: int) -> np.ndarray:
    """The generator's next ``num`` words of 32 bits, uint32."""
    return random_state.randint(0, 1 << 32, size=num, dtype=np.uint32)


@compiled()
def _replay(words: np.ndarray, largest: np.ndarray, masks: np.ndarray, chosen: np.ndarray, values: np.ndarray) -> int:
    """Fill ``chosen`` and ``values``; returns the number of words used, or -1 if they do not suffice."""
    num_points, num_sets, batch_size, num_factors = values.shape
    position = 0
    for point in range(num_points):
        chosen[point] = 0
        accepted = largest[0] == 0  # a single value takes no word
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
