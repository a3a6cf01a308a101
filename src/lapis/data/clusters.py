"""Clusters of near-duplicates among all documents: bands → candidate pairs → verification → components.

Two documents are candidates if their sketches agree in a whole band. A candidate pair is joined if the sketches
agree far more often than the threshold asks, left if far less, and in between the Jaccard similarity of the
shingles themselves decides: 112 hashes know a similarity of 0.75 to ±0.04 only. Unverified bands would chain
unrelated texts together. Pairs that other sure pairs have joined already are not looked at again, which changes
no component, so what comes out does not depend on how bands are shared among workers.

Documents are numbered in the order of who survives, best first. Letters: D documents, H = 112 hashes, P pairs,
M documents that are not alone in their bucket.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lapis.data.dedup import HASHES
from lapis.data.words import mixed
from lapis.data.workers import run_tasks, workers_at_hand

BANDS, ROWS = (
    22,
    5,
)  # a pair at 0.75 shares a band with 0.997, at 0.8 with 0.9998; 14 x 8 finds 0.92 of the latter
UNSURE = 0.13  # three standard deviations of the sketch's estimate
WHOLE_BUCKET = 64  # up to this many documents in a bucket every pair is compared
HEADS = 8  # in larger ones each is compared with so many of the best, and with its neighbour
BLOCK = 8_192  # pairs or documents handled at once
BYTES_EACH = 40  # of one document in the tables of a band
WORTH_WORKERS = 200_000  # documents; fewer are done before a process has started

Pairs = NDArray[np.int64]
Sketches = NDArray[np.uint32] | Path
"""Sketches (D, H), or the .npy file that holds them: workers map it into memory."""
Shingles = Callable[[NDArray[np.int64]], list[NDArray[np.uint32]]]
"""Gives the sorted different shingles of some rows. It is sent to workers."""


def near_duplicates(
    sketches: Sketches,
    rows_D: NDArray[np.int64],
    shingles: Shingles,
    threshold: float,
    *,
    workers: int = 1,
    memory: int = 1 << 30,
) -> NDArray[np.int64]:
    """For each document the one that stands for its cluster: itself, or an earlier one.

    `rows_D` are what `shingles` knows the documents by.
    """
    count = len(opened(sketches))
    workers = workers if count >= WORTH_WORKERS else workers_at_hand(workers)
    passes = max(1, math.ceil(workers * BYTES_EACH * count / memory))
    shares = np.array_split(np.arange(BANDS), workers)
    tasks = [_BandTask(sketches, tuple(share.tolist()), threshold, passes) for share in shares]
    parent_D = np.arange(count, dtype=np.int64)
    unsure = [np.empty((0, 2), dtype=np.int64)]
    for joined_P2, unsure_P2 in run_tasks(_join_bands, tasks, workers):
        _join(parent_D, joined_P2)
        unsure.append(unsure_P2)
    unsure_P2 = np.unique(np.concatenate(unsure), axis=0)
    unsure_P2 = unsure_P2[_apart(parent_D, unsure_P2)]
    checks = [
        _CheckTask(block_P2, rows_D[block_P2], shingles, threshold) for block_P2 in _blocks(unsure_P2, 256)
    ]
    for near_P2 in run_tasks(_check, checks, workers):
        _join(parent_D, near_P2)
    return _roots(parent_D, np.arange(count))


def close_to(sketches: Sketches, others_OH: NDArray[np.uint32], threshold: float) -> NDArray[np.bool_]:
    """Which documents reach a similarity to any of the others, going by the sketches: no pair is left out."""
    hashes_DH = opened(sketches)
    needed = math.ceil(threshold * HASHES)
    seen_HV = np.zeros((HASHES, 1 << 16), dtype=np.uint8)  # the low halves of the others' hashes
    for h in range(HASHES):
        seen_HV[h, others_OH[:, h] & 0xFFFF] = 1
    close_D = np.zeros(len(hashes_DH), dtype=bool)
    for low in range(0, len(hashes_DH), BLOCK):
        block_HB = np.ascontiguousarray(hashes_DH[low : low + BLOCK].T)
        most_B = np.zeros(block_HB.shape[1], dtype=np.uint8)  # hashes shared with any of the others
        for h in range(HASHES):
            most_B += seen_HV[h, block_HB[h] & 0xFFFF]
        for place in np.flatnonzero(most_B >= needed).tolist():
            equal_O = np.sum(others_OH == block_HB[:, place], axis=1)
            close_D[low + place] = bool((equal_O >= needed).any())
    return close_D


@dataclass(frozen=True)
class _BandTask:
    sketches: Sketches
    bands: tuple[int, ...]
    threshold: float
    passes: int


@dataclass(frozen=True)
class _CheckTask:
    pairs_P2: Pairs
    rows_P2: Pairs
    shingles: Shingles
    threshold: float


def _join_bands(task: _BandTask) -> tuple[Pairs, Pairs]:
    """The pairs that surely belong together by some bands (a spanning forest of them), and the unsure ones."""
    hashes_DH = opened(task.sketches)
    sure = math.ceil((task.threshold + UNSURE) * HASHES)
    possible = math.ceil((task.threshold - UNSURE) * HASHES)
    parent_D = np.arange(len(hashes_DH), dtype=np.int64)
    unsure = [np.empty((0, 2), dtype=np.int64)]
    for band in task.bands:
        for number in range(task.passes):
            key_S, place_S = _keys(hashes_DH, band, number, task.passes)
            for pairs_P2 in _candidates(key_S, place_S):
                for block_P2 in _blocks(pairs_P2[_apart(parent_D, pairs_P2)], BLOCK):
                    equal_P = np.sum(hashes_DH[block_P2[:, 0]] == hashes_DH[block_P2[:, 1]], axis=1)
                    _join(parent_D, block_P2[equal_P >= sure])
                    unsure.append(block_P2[(equal_P >= possible) & (equal_P < sure)])
    unsure_P2 = np.unique(np.concatenate(unsure), axis=0)
    root_D = _roots(parent_D, np.arange(len(parent_D)))
    child = np.flatnonzero(root_D != np.arange(len(root_D)))
    return np.stack([root_D[child], child], axis=1), unsure_P2[_apart(parent_D, unsure_P2)]


def _check(task: _CheckTask) -> Pairs:
    """The pairs whose shingles reach the threshold."""
    rows, places = np.unique(task.rows_P2, return_inverse=True)
    found = task.shingles(rows)
    near = []
    for a, b in places.reshape(-1, 2).tolist():
        left, right = found[a], found[b]
        both = len(left) + len(right) - len(np.union1d(left, right))
        near.append(both >= task.threshold * (len(left) + len(right) - both))
    near_P2: Pairs = task.pairs_P2[np.array(near, dtype=bool)]
    return near_P2


def _keys(
    hashes_DH: NDArray[np.uint32], band: int, number: int, passes: int
) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """The bucket keys of one band that fall to a pass, and whose they are."""
    keys, places = [np.empty(0, dtype=np.uint64)], [np.empty(0, dtype=np.int64)]
    for low in range(0, len(hashes_DH), BLOCK):
        rows_BR = np.asarray(hashes_DH[low : low + BLOCK, band * ROWS : (band + 1) * ROWS])
        key_B = np.zeros(len(rows_BR), dtype=np.uint64)
        for r in range(ROWS):
            key_B = mixed(key_B + rows_BR[:, r] + np.uint64(r + 1))
        chosen = np.flatnonzero(key_B % np.uint64(passes) == number)
        keys.append(key_B[chosen])
        places.append(low + chosen)
    return np.concatenate(keys), np.concatenate(places)


def _candidates(key_S: NDArray[np.uint64], place_S: NDArray[np.int64]) -> Iterator[Pairs]:
    """Pairs (better, worse) of documents with one key: all in small buckets, some in large ones."""
    order_S = np.argsort(key_S, kind="stable")  # keeps the order of survival inside a bucket
    key_S = key_S[order_S]
    same = key_S[1:] == key_S[:-1]
    shared = np.flatnonzero(np.r_[False, same] | np.r_[same, False])
    key_M, member_M = key_S[shared], place_S[order_S[shared]]
    starts = (
        np.flatnonzero(np.r_[True, key_M[1:] != key_M[:-1]]) if len(key_M) else np.empty(0, dtype=np.int64)
    )
    sizes = np.diff(np.r_[starts, len(key_M)])
    start_M, size_M = np.repeat(starts, sizes), np.repeat(sizes, sizes)
    rank_M = np.arange(len(key_M)) - start_M
    for back in range(1, min(WHOLE_BUCKET, int(size_M.max(initial=0)))):
        later = np.flatnonzero((rank_M >= back) & ((size_M <= WHOLE_BUCKET) | (back == 1)))
        yield np.stack([member_M[later - back], member_M[later]], axis=1)
    for head in range(HEADS):
        later = np.flatnonzero((rank_M > head) & (size_M > WHOLE_BUCKET))
        if len(later):
            yield np.stack([member_M[start_M[later] + head], member_M[later]], axis=1)


def _roots(parent_D: NDArray[np.int64], documents: NDArray[np.int64]) -> NDArray[np.int64]:
    """The best document of each one's tree; paths become shorter on the way."""
    root = parent_D[documents]
    while True:
        above = parent_D[root]
        if np.array_equal(above, root):
            parent_D[documents] = root
            return root
        parent_D[root] = parent_D[above]
        root = above


def _join(parent_D: NDArray[np.int64], pairs_P2: Pairs) -> None:
    """Put the trees of each pair together, under the better root."""
    while len(pairs_P2):
        root_P2 = np.stack([_roots(parent_D, pairs_P2[:, 0]), _roots(parent_D, pairs_P2[:, 1])], axis=1)
        apart = root_P2[:, 0] != root_P2[:, 1]
        pairs_P2, root_P2 = pairs_P2[apart], root_P2[apart]
        np.minimum.at(parent_D, root_P2.max(axis=1), root_P2.min(axis=1))


def _apart(parent_D: NDArray[np.int64], pairs_P2: Pairs) -> NDArray[np.bool_]:
    """Which pairs are in two different trees."""
    apart: NDArray[np.bool_] = _roots(parent_D, pairs_P2[:, 0]) != _roots(parent_D, pairs_P2[:, 1])
    return apart


def _blocks(pairs_P2: Pairs, size: int) -> Sequence[Pairs]:
    return [pairs_P2[low : low + size] for low in range(0, len(pairs_P2), size)]


def opened(sketches: Sketches) -> NDArray[np.uint32]:
    """The matrix itself, mapped into memory."""
    if isinstance(sketches, Path):
        mapped: NDArray[np.uint32] = np.load(sketches, mmap_mode="r")
        return mapped
    return sketches
