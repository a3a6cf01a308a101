"""What is free on the nodes now, and what the running jobs will give back when. Only arithmetic.

Amounts are rows of CPUs, GPUs and bytes of memory. Finding room must be quick for ten thousand jobs: within one
decision a room only shrinks, so a node that was too small for a shape is never looked at for it again.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from lapis.jobs.columns import Matrix, Numbers
from lapis.jobs.placement import EPSILON
from lapis.jobs.shares import Amounts

Placement = list[tuple[int, int]]  # node's index, ranks there
STALE = 64  # placements after which nodes are put in order anew


def counts(free: Matrix, each: Amounts) -> Numbers:
    """How many ranks fit into each row of what is free."""
    fitting = np.full(len(free), np.inf)
    for resource, amount in enumerate(each):
        if amount:
            fitting = np.minimum(fitting, free[:, resource] / amount + EPSILON)
    whole: Numbers = np.clip(fitting, 0, 2**31).astype(np.int64)
    return whole


def fits(free: Sequence[float], each: Amounts) -> int:
    """How many ranks fit into one row of what is free."""
    fitting = float(2**31)
    for resource, amount in enumerate(each):
        if amount:
            fitting = min(fitting, free[resource] / amount + EPSILON)
    return max(0, int(fitting))


def gather(free: Matrix, each: Amounts, ranks: int) -> Placement | None:
    """Places for all ranks on as few nodes as can be, the emptiest first; None if they do not all fit."""
    fitting = counts(free, each)
    if int(fitting.sum()) < ranks:
        return None
    alone = np.flatnonzero(fitting >= ranks)
    if len(alone):  # one node is enough: the fullest of those that can
        return [(int(alone[np.argmin(fitting[alone])]), ranks)]
    most = int(fitting.max())
    emptiest = np.flatnonzero(fitting == most)
    if most * len(emptiest) < ranks:
        emptiest = np.argsort(-fitting, kind="stable")
    placement, left = [], ranks
    for node in emptiest.tolist():
        taken = min(left, int(fitting[node]))
        placement.append((node, taken))
        left -= taken
        if not left:
            break
    return placement


def amounts(placement: Placement, each: Amounts, nodes: int) -> Matrix:
    """What a placement takes of every node."""
    taken = np.zeros((nodes, 3))
    for node, ranks in placement:
        taken[node] += np.multiply(each, ranks)
    return taken


class Room:
    """What is free on each node. Shrinks while jobs are placed."""

    def __init__(self, free: Matrix, has_gpus: npt.NDArray[np.bool_]) -> None:
        self.rows: list[list[float]] = free.tolist()
        self._has_gpus = has_gpus
        self._free = free.copy()
        self._changed: set[int] = set()  # nodes whose rows are no longer those of `_free`
        self._since_order = 0
        self._orders: dict[bool, Numbers] = {}
        self._cursors: dict[Amounts, tuple[list[int], int]] = {}
        self._failed: dict[Amounts, int] = {}  # ranks of this shape that did not fit
        self._most: list[float] = free.max(axis=0).tolist() if len(free) else [0.0, 0.0, 0.0]

    def place(self, each: Amounts, ranks: int) -> Placement | None:
        """Places for all ranks, or None. Takes nothing yet."""
        failed = self._failed.get(each)
        if failed is not None and ranks >= failed:
            return None
        placement = self._on_one_node(each, ranks)
        if placement is None and ranks > 1:
            self._renew()
            placement = gather(self._free, each, ranks)
        if placement is None:
            self._failed[each] = ranks
        return placement

    def take(self, placement: Placement, each: Amounts) -> None:
        """Make the room smaller by a placement."""
        for node, ranks in placement:
            row = self.rows[node]
            row[0] -= each[0] * ranks
            row[1] -= each[1] * ranks
            row[2] -= each[2] * ranks
            self._changed.add(node)
        self._since_order += 1

    def cap(self, node: int, row: Sequence[float]) -> None:
        """Leave at most this much on a node."""
        self.rows[node] = [min(mine, other) for mine, other in zip(self.rows[node], row, strict=True)]
        self._changed.add(node)

    def matrix(self) -> Matrix:
        """What is free now, as a matrix of its own."""
        self._renew()
        return self._free.copy()

    def _renew(self) -> None:
        if self._changed:
            nodes = list(self._changed)
            self._free[nodes] = [self.rows[node] for node in nodes]
            self._changed.clear()

    def _on_one_node(self, each: Amounts, ranks: int) -> Placement | None:
        cpus, gpus, memory = each[0] * ranks, each[1] * ranks, each[2] * ranks
        most = self._most
        if cpus > most[0] + EPSILON or gpus > most[1] or (memory and memory > most[2]):
            return None
        shape = (cpus, gpus, memory)
        candidates, at = self._cursors.get(shape) or (self._candidates(shape), 0)
        rows, placement = self.rows, None
        while at < len(candidates):
            row = rows[candidates[at]]
            if cpus <= row[0] + EPSILON and gpus <= row[1] and (not memory or memory <= row[2]):
                placement = [(candidates[at], ranks)]
                break
            at += 1
        self._cursors[shape] = (candidates, at)
        return placement

    def _candidates(self, shape: Amounts) -> list[int]:
        """Nodes that may have room for the shape: the fullest first, and for CPUs alone those without GPUs."""
        if self._since_order >= STALE:
            self._renew()
            self._most = self._free.max(axis=0).tolist()
            self._orders.clear()
            self._since_order = 0
        wants_gpus = shape[1] > 0
        if wants_gpus not in self._orders:
            free = self._free
            first = free[:, 1] if wants_gpus else self._has_gpus
            self._orders[wants_gpus] = np.lexsort((free[:, 2], free[:, 0], first))
        order = self._orders[wants_gpus]
        free = self._free[order]
        fits = (free[:, 0] + EPSILON >= shape[0]) & (free[:, 1] >= shape[1])
        if shape[2]:
            fits &= free[:, 2] >= shape[2]
        found: list[int] = order[fits].tolist()
        return found


class Releases:
    """When what runs will give back what it has: a time, a node and amounts for each entry."""

    def __init__(self, times: Matrix, where: Numbers, given: Matrix, nodes: int) -> None:
        self._nodes = nodes
        self._times, self._where, self._given = times, where, given
        self._new: list[tuple[float, int, float, float, float]] = []
        self._sorted: tuple[Matrix, Numbers, Matrix] | None = None

    def add(self, at: float, placement: Placement, each: Amounts) -> None:
        """A job that starts now and ends at this time."""
        for node, ranks in placement:
            self._new.append((at, node, each[0] * ranks, each[1] * ranks, each[2] * ranks))
        self._sorted = None

    def hasten(self, first: int, last: int, at: float) -> None:
        """Some of the entries of the beginning will come at this time."""
        self._times[first:last] = at
        self._sorted = None

    def earliest(self, free: Matrix, each: Amounts, ranks: int) -> tuple[float, Matrix] | None:
        """When all ranks will fit if nothing else starts, and what is free then; None if they never will."""
        times, _, _ = self._in_order()
        low, high = 0, len(times)
        if int(counts(self._after(free, high), each).sum()) < ranks:
            return None
        while low < high:  # the least number of releases after which they fit
            middle = (low + high) // 2
            if int(counts(self._after(free, middle), each).sum()) >= ranks:
                high = middle
            else:
                low = middle + 1
        if not high:
            return None  # they fit now: whoever asks has another reason to wait
        at = float(times[high - 1])
        together = int(np.searchsorted(times, at, side="right"))  # all that end at that moment
        return at, self._after(free, together)

    def profile(self) -> tuple[Matrix, Matrix]:
        """The times of all releases in order, and what will have been given back at each (summed)."""
        times, _, given = self._in_order()
        return times, np.cumsum(given, axis=0)

    def _after(self, free: Matrix, number: int) -> Matrix:
        _, where, given = self._in_order()
        gained = [
            np.bincount(where[:number], weights=given[:number, resource], minlength=self._nodes)
            for resource in range(3)
        ]
        return free + np.stack(gained, axis=1)

    def _in_order(self) -> tuple[Matrix, Numbers, Matrix]:
        if self._sorted is None:
            if self._new:
                new = np.array(self._new)
                self._times = np.concatenate((self._times, new[:, 0]))
                self._where = np.concatenate((self._where, new[:, 1].astype(np.int64)))
                self._given = np.concatenate((self._given, new[:, 2:]))
                self._new = []
            order = np.argsort(self._times, kind="stable")
            self._sorted = (self._times[order], self._where[order], self._given[order])
        return self._sorted
