"""Exact regression trees of depth 3 that share one sorting of the codes; compiled with numba.

A tree is grown on residuals g (n,) and splits a node where the squared error decreases most, over *all* thresholds of
all units. Two facts make that cheap for the thousands of trees of a boosted classifier, whose codes do not change:

- Each unit is sorted once, into *buckets* of neighbouring values that end where a threshold is possible. The sums of
  count, g and g^2 up to the end of each bucket give the gain of every bucket boundary. The sums of the larger child of
  a node are its own minus those of the smaller child (as in histogram boosting), so few samples are visited.
- Inside a bucket of m samples with sum t and sum of squares q, the running sum deviates from the straight line
  between the ends by at most sqrt(m q - t^2) / 2 (Cauchy-Schwarz). If that cannot exceed the best gain, no threshold
  inside can; the few other buckets are searched sample by sample.

The result is exact: a bucket is skipped only if none of its thresholds could be chosen. Gains are those of
scikit-learn's DecisionTreeRegressor up to the rounding of sums. With N samples in the node, mean residual r, and n
samples of sum s on the left, ``gain = (s - n r)^2 / (n (N - n))``, and the squared error decreases by N gain.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ldm.metrics.boosting.compiled import compiled

DEPTH = 3
LEAVES = 2**DEPTH  # nodes are numbered as in a heap: root 1, children of a 2a and 2a + 1, the lowest 8 to 15
NUM_SLOTS = LEAVES // 2  # nodes of a level whose sums are kept at once
MIN_GAP = np.float32(1e-7)  # values that are closer are never separated, as in scikit-learn; float32 arithmetic
PURE = np.finfo(np.float64).eps  # variance up to which a node is a leaf, as in scikit-learn
TIE = 1e-10  # relative difference up to which gains are equal, because of the rounding of sums
ROUNDING = 1e-12  # upper bound of the error of sums formed by subtraction, relative to the root's sum of squares


class SortedCodes(NamedTuple):
    """Codes (n, K) sorted once for any number of trees; at most B buckets per unit."""

    codes: np.ndarray  # (K, n) float32
    order: np.ndarray  # (K, n) uint32: samples in ascending order of code
    values: np.ndarray  # (K, n) float32: codes in that order
    bucket: np.ndarray  # (K, n) uint16: 1 + the bucket of each sample
    starts: np.ndarray  # (K, B + 1) uint32: bucket b holds ranks starts[b] to starts[b + 1] - 1
    num_buckets: np.ndarray  # (K,) int64
    splittable: np.ndarray  # (K, B) bool: whether a threshold is possible inside the bucket
    marks: np.ndarray  # (K,) int64: checksums of the units' orders, which do not depend on the order of the units


class Workspace(NamedTuple):
    """Arrays of one thread."""

    samples: np.ndarray  # (n,) uint32: samples, grouped by node
    residuals: np.ndarray  # (n,) their residuals
    spare_samples: np.ndarray  # (n,) uint32
    spare_residuals: np.ndarray  # (n,)
    node: np.ndarray  # (n,) uint8: node of each sample while its children may still be split
    sums: np.ndarray  # (4, 3, K, B + 1): count, g and g^2 up to each bucket's end; a slot for each node of a level
    promising: np.ndarray  # (B, rounded up to eights) uint8: 1 for buckets to be searched
    members: np.ndarray  # (n,) uint32: ranks of a node's samples in a bucket
    starts: np.ndarray  # (16,) int64, by node: its samples are starts to stops - 1 of the list
    stops: np.ndarray  # (16,) int64
    wanted: np.ndarray  # (8,) bool: nodes to split, whose sums are valid
    means: np.ndarray  # (16,) mean residuals of the nodes
    slots: np.ndarray  # (8,) int64: slot of their sums


@compiled()
def _sum_and_squares(residuals, start, stop):
    """Return the sums of g and g^2 over the samples of a node, each from two independent sums: faster."""
    t0 = t1 = q0 = q1 = 0.0
    for j in range(start, stop - 1, 2):
        g0, g1 = residuals[j], residuals[j + 1]
        t0, t1, q0, q1 = t0 + g0, t1 + g1, q0 + g0 * g0, q1 + g1 * g1
    if (stop - start) % 2:
        g0 = residuals[stop - 1]
        t0, q0 = t0 + g0, q0 + g0 * g0
    return t0 + t1, q0 + q1


@compiled()
def _sum_root(order, starts, num_buckets, residuals, count, total, square):
    """Compute the running sums over the buckets of one unit for all samples, read in sorted order."""
    all_total = all_square = 0.0
    for b in range(num_buckets):
        part = part_square = 0.0
        for rank in range(starts[b], starts[b + 1]):
            g = residuals[order[rank]]
            part += g
            part_square += g * g
        all_total += part
        all_square += part_square
        count[b + 1] = starts[b + 1]
        total[b + 1] = all_total
        square[b + 1] = all_square


@compiled()
def _count_ends(count, total, num_buckets, mean, size, bar):
    """Return how many bucket ends of one unit have a gain of at least ``bar``; LLVM vectorises counts, not maxima."""
    found = 0
    for b in range(1, num_buckets):
        n = count[b]
        excess, weight = total[b] - mean * n, n * (size - n)
        found += (excess * excess >= bar * weight) & (weight > 0.0)
    return found


@compiled()
def _mark_promising(count, total, square, splittable, num_buckets, mean, size, error, bar, promising):
    """Mark the buckets of one unit that may contain a threshold with a gain of at least ``bar``.

    With excess e at the ends of a bucket and deviation d inside, the gain is at most (|e| + d)^2 / weight.
    """
    for b in range(num_buckets):
        n0, n1 = count[b], count[b + 1]
        excess0, excess1 = total[b] - mean * n0, total[b + 1] - mean * n1
        m, t = n1 - n0, total[b + 1] - total[b]
        spread = m * (square[b + 1] - square[b] + error) - t * t  # 4 d^2
        reach = max(abs(excess0), abs(excess1)) + 0.5 * np.sqrt(max(spread, 0.0))
        weight = min((n0 + 1.0) * (size - n0 - 1.0), (n1 - 1.0) * (size - n1 + 1.0))
        promising[b] = (1.000001 * reach * reach >= bar * weight) & (m > 1.5) & splittable[b]


@compiled()
def _turn(seed, mark):
    """Return the rank of a unit among equally good ones: fixed, but different in each node, to prefer none."""
    mixed = (mark * 0x9E3779B1 + seed * 0x85EBCA77) & 0xFFFFFFFF
    mixed = ((mixed ^ (mixed >> 15)) * 0x2C1B3C6D) & 0xFFFFFFFF
    mixed = ((mixed ^ (mixed >> 12)) * 0x297A2D39) & 0xFFFFFFFF
    return mixed ^ (mixed >> 15)


@compiled()
def _consider(best, gain, unit, rank, seed, mark):
    """Keep the better split in ``best``: gain, unit, last rank on the left, mark; ties: by mark, then lower rank."""
    if gain < best[0] * (1.0 - TIE):
        return
    if best[1] >= 0.0 and gain <= best[0] * (1.0 + TIE):
        turn, best_turn = _turn(seed, mark), _turn(seed, int(best[3]))
        if turn > best_turn or (turn == best_turn and rank > best[2]):
            return
    best[0] = max(gain, best[0])
    best[1] = unit
    best[2] = rank
    best[3] = mark


@compiled()
def _search_bucket(order, values, span, nodes, members, residuals, unit, node, n, s, mean, size, seed, mark, best):
    """Consider every threshold between two samples of the node in one bucket; n and s are the sums up to its start."""
    num = 0
    for rank in range(span[0], span[1]):
        members[num] = rank
        num += nodes[order[rank]] == node
    for k in range(num - 1):
        rank = members[k]
        n += 1.0
        s += residuals[order[rank]]
        excess = s - mean * n
        weight = n * (size - n)
        if excess * excess >= best[0] * (1.0 - TIE) * weight and values[members[k + 1]] > values[rank] + MIN_GAP:
            _consider(best, excess * excess / weight, unit, rank, seed, mark)


@compiled()
def _search(codes, work, residuals, node, mean, size, error, seed, best):
    """Find the best split of a node; ``best[1]`` remains -1 if no unit varies in it."""
    best[:] = -1.0
    slot = work.slots[node]
    counts, totals, squares = work.sums[slot, 0], work.sums[slot, 1], work.sums[slot, 2]
    promising, nodes, members = work.promising, work.node, work.members
    eights = promising.view(np.uint64)  # most are 0: no bucket of eight is promising
    for unit in range(len(codes.num_buckets)):
        count, total, num_buckets = counts[unit], totals[unit], codes.num_buckets[unit]
        if _count_ends(count, total, num_buckets, mean, size, best[0] * (1.0 - TIE)) == 0:
            continue
        for b in range(1, num_buckets):
            n = count[b]
            excess, weight = total[b] - mean * n, n * (size - n)
            if excess * excess >= best[0] * (1.0 - TIE) * weight and weight > 0.0 and n > count[b - 1]:
                _consider(best, excess * excess / weight, unit, int(codes.starts[unit, b]) - 1, seed, codes.marks[unit])
    for unit in range(len(codes.num_buckets)):
        count, total, square, num_buckets = counts[unit], totals[unit], squares[unit], codes.num_buckets[unit]
        splittable, bar = codes.splittable[unit], best[0] * (1.0 - TIE)
        _mark_promising(count, total, square, splittable, num_buckets, mean, size, error, bar, promising)
        order, values, starts, mark = codes.order[unit], codes.values[unit], codes.starts[unit], codes.marks[unit]
        for first in range(0, num_buckets, 8):
            if not eights[first // 8]:
                continue
            for b in range(first, min(first + 8, num_buckets)):
                if promising[b]:
                    span, sums = (starts[b], starts[b + 1]), (count[b], total[b])
                    own = order, values, span, nodes, members, residuals, unit, node
                    _search_bucket(*own, *sums, mean, size, seed, mark, best)


@compiled()
def _threshold(order, values, nodes, node, rank):
    """Return the mean of the node's neighbours on both sides of the split after ``rank``."""
    below = rank
    while nodes[order[below]] != node:
        below -= 1
    above = rank + 1
    while nodes[order[above]] != node:
        above += 1
    return values[below] / 2.0 + values[above] / 2.0


@compiled()
def _part(work, column, threshold, start, stop):
    """Move samples up to the threshold to the front of a node's part of the list; return the start of the others."""
    samples, residuals = work.samples, work.residuals
    left, right = start, 0
    for j in range(start, stop):
        sample, g = samples[j], residuals[j]
        samples[left] = work.spare_samples[right] = sample
        residuals[left] = work.spare_residuals[right] = g
        is_left = column[sample] <= threshold
        left += is_left
        right += 1 - is_left
    samples[left:stop] = work.spare_samples[:right]
    residuals[left:stop] = work.spare_residuals[:right]
    return left


@compiled()
def _sum_node(bucket, num_buckets, samples, residuals, start, stop, count, total, square):
    """Compute the running sums over the buckets of one unit; a function of its own: the inlined loop is slower."""
    for b in range(num_buckets + 1):
        count[b] = total[b] = square[b] = 0.0
    for j in range(start, stop):
        b = bucket[samples[j]]
        g = residuals[j]
        count[b] += 1.0
        total[b] += g
        square[b] += g * g
    n = t = q = 0.0  # in registers: `count[b + 1] += count[b]` waits for memory
    for b in range(1, num_buckets + 1):
        n, t, q = n + count[b], t + total[b], q + square[b]
        count[b], total[b], square[b] = n, t, q


@compiled()
def _sum_child(codes, work, slot, start, stop):
    """Compute the running sums over the buckets of every unit for the samples ``start`` to ``stop`` of the list."""
    for unit in range(len(codes.num_buckets)):
        count, total, square = work.sums[slot, 0, unit], work.sums[slot, 1, unit], work.sums[slot, 2, unit]
        bucket, num_buckets = codes.bucket[unit], codes.num_buckets[unit]
        _sum_node(bucket, num_buckets, work.samples, work.residuals, start, stop, count, total, square)


@compiled()
def _leaf_value(residuals, start, stop, scale):
    """Return one Newton step of the log loss; ``scale`` is (C - 1) / C for C > 2 classes, else 1."""
    total = curvature = 0.0
    for j in range(start, stop):
        g = residuals[j]
        total += g
        curvature += abs(g) * (1.0 - abs(g))  # p (1 - p), for |g| is p or 1 - p
    size = stop - start
    if abs(curvature / size) < 1e-150:
        return 0.0
    return scale * total / curvature


@compiled()
def _sum_children(codes, work, node):
    """Decide which children of a node will be split, and compute their sums."""
    small, large = 2 * node, 2 * node + 1
    if work.stops[small] - work.starts[small] > work.stops[large] - work.starts[large]:
        small, large = large, small
    for child in (small, large):
        start, stop = work.starts[child], work.stops[child]
        total, square = _sum_and_squares(work.residuals, start, stop)
        size = stop - start
        work.means[child] = total / size
        work.wanted[child] = size > 1 and square / size - work.means[child] ** 2 > PURE
        for j in range(start, stop):
            work.node[work.samples[j]] = child
    work.slots[large] = work.slots[node]
    work.slots[small] = work.slots[node] + (1 if node == 1 else 2)
    if work.wanted[small] or work.wanted[large]:
        _sum_child(codes, work, work.slots[small], work.starts[small], work.stops[small])
    if work.wanted[large]:  # the sums of the parent, in its slot, minus those of the other child
        rest, taken = work.sums[work.slots[large]], work.sums[work.slots[small]]
        rest -= taken  # through a name: numba would copy the result of `sums[i] -= ...` once more


@compiled()
def _split(codes, work, residuals, node, error, seed, feature, threshold, importance):
    """Split one node, unless no unit varies in it."""
    start, stop = work.starts[node], work.stops[node]
    size = stop - start
    best = np.empty(4)
    _search(codes, work, residuals, node, work.means[node], float(size), error, seed, best)
    if best[1] < 0.0:
        return
    unit, rank = int(best[1]), int(best[2])
    feature[node] = unit
    threshold[node] = _threshold(codes.order[unit], codes.values[unit], work.node, node, rank)
    importance[unit] += best[0] * size / len(residuals)
    middle = _part(work, codes.codes[unit], threshold[node], start, stop)
    work.starts[2 * node], work.stops[2 * node] = start, middle
    work.starts[2 * node + 1], work.stops[2 * node + 1] = middle, stop
    if 2 * node < LEAVES:
        _sum_children(codes, work, node)


@compiled()
def _plant(codes, work, residuals):
    """Put all samples into the root and its sums into the first slot; return the error bound of sums of squares."""
    num = len(residuals)
    work.samples[:] = np.arange(num)
    work.residuals[:] = residuals
    work.node[:] = 1
    work.starts[:] = 0
    work.stops[:] = 0
    work.wanted[:] = False
    work.stops[1], work.slots[1] = num, 0
    total, square = _sum_and_squares(residuals, 0, num)
    work.means[1] = total / num
    work.wanted[1] = num > 1 and square / num - work.means[1] ** 2 > PURE
    if work.wanted[1]:
        for unit in range(len(codes.num_buckets)):
            count, sums, squares = work.sums[0, 0, unit], work.sums[0, 1, unit], work.sums[0, 2, unit]
            count[0] = sums[0] = squares[0] = 0.0
            num_buckets = codes.num_buckets[unit]
            _sum_root(codes.order[unit], codes.starts[unit], num_buckets, residuals, count, sums, squares)
    return ROUNDING * square


@compiled()
def grow_trees(
    rows: np.ndarray,
    codes: SortedCodes,
    work: Workspace,
    residuals: np.ndarray,
    raw: np.ndarray,
    rate: float,
    scale: float,
    stage: int,
    feature: np.ndarray,
    threshold: np.ndarray,
    value: np.ndarray,
    importance: np.ndarray,
) -> None:
    """Grow some of a stage's R trees, each on its row of residuals, and add their leaves to the raw predictions.

    Args:
        rows: trees to grow, in 0 to R - 1.
        codes: n samples and K units.
        work: arrays of this thread.
        residuals: (R, n) label - probability, in [-1, 1].
        raw: (R, n) raw predictions, changed in place.
        rate: learning rate.
        scale: factor of the Newton step.
        stage: number of the stage; with row and node it decides between equally good splits.
        feature: (R, 8) int64 output: unit that splits each node, -1 for a leaf.
        threshold: (R, 8) output: values up to it go left.
        value: (R, 16) output: steps of the leaves, before multiplication by ``rate``.
        importance: (R, K), to which the decrease of the mean squared error at the splits of each unit is added.
    """
    for row in rows:
        error = _plant(codes, work, residuals[row])
        for node in range(1, LEAVES):
            feature[row, node] = -1
            if work.wanted[node]:
                seed = (stage * len(raw) + row) * LEAVES + node
                _split(codes, work, residuals[row], node, error, seed, feature[row], threshold[row], importance[row])
        for node in range(1, 2 * LEAVES):
            start, stop = work.starts[node], work.stops[node]
            if start < stop and (node >= LEAVES or feature[row, node] < 0):
                value[row, node] = _leaf_value(work.residuals, start, stop, scale)
                for j in range(start, stop):
                    raw[row, work.samples[j]] += rate * value[row, node]


@compiled()
def add_trees(codes, rate, feature, threshold, value, raw):
    """Add the steps of all stages' trees (stages, R, ...) to raw predictions (R, m) of float32 codes (m, K)."""
    for stage in range(len(feature)):
        for row in range(len(raw)):
            features, thresholds, values = feature[stage, row], threshold[stage, row], value[stage, row]
            for sample in range(len(codes)):
                node = 1
                while node < LEAVES and features[node] >= 0:
                    node = 2 * node + (codes[sample, features[node]] > thresholds[node])
                raw[row, sample] += rate * values[node]
