"""What is free on the nodes now, and what the running jobs will give back when. Only arithmetic.

Amounts are rows of CPUs, GPUs and bytes of memory. Finding room must be quick for ten thousand jobs: within one
decision a room only shrinks, so a node that was too small for a shape is never looked at for it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lapis.jobs.columns import Matrix, Numbers
from lapis.jobs.placement import EPSILON
from lapis.jobs.shares import Amounts

Placement = dict[int, int]  # ranks by the index of their node
MANY = 2.0**31  # more ranks than any job has
STALE = 64  # placements after which nodes are put in order anew


def counts(free: Matrix, each: Amounts) -> Numbers:
    """How many ranks fit into each row of what is free."""
    whole: Numbers = np.maximum(_fitting(free, each), 0.0).astype(np.int64)
    return whole


def _fitting(free: Matrix, each: Amounts) -> Matrix:
    """The same with its fractions; less than 0 where more is taken than there is."""
    fitting: Matrix | None = None
    for resource, amount in enumerate(each):
        if amount:
            ratio = free[:, resource] / amount
            fitting = ratio if fitting is None else np.minimum(fitting, ratio, out=fitting)
    if fitting is None:
        return np.full(len(free), MANY)
    np.minimum(fitting, MANY, out=fitting)
    fitting += EPSILON
    return fitting


def fits(free: Sequence[float], each: Amounts) -> int:
    """How many ranks fit into one row of what is free."""
    fitting = MANY
    for resource, amount in enumerate(each):
        if amount:
            fitting = min(fitting, free[resource] / amount + EPSILON)
    return max(0, int(fitting))


def gather(free: Matrix, each: Amounts, ranks: int) -> Placement | None:
    """Places for all ranks on as few nodes as can be, the emptiest first; None if they do not all fit."""
    fitting = _fitting(free, each)
    most = int(np.maximum.reduce(fitting, initial=0.0))
    if most >= ranks:  # one node is enough: the fullest of those that can
        alone = (fitting >= ranks).nonzero()[0]
        return {int(alone[fitting[alone].astype(np.int64).argmin()]): ranks}
    emptiest = (fitting >= most).nonzero()[0]
    if most * len(emptiest) >= ranks:
        nodes = emptiest[: -(-ranks // most)].tolist()
        placement = dict.fromkeys(nodes, most)
        placement[nodes[-1]] = ranks - most * (len(nodes) - 1)
        return placement
    whole = counts(free, each)
    if int(whole.sum()) < ranks:
        return None
    placement, left = {}, ranks
    for node in np.argsort(-whole, kind="stable")[:ranks].tolist():
        placement[node] = min(left, int(whole[node]))
        left -= placement[node]
        if not left:
            break
    return placement


def places(placements: Sequence[Placement], each: Sequence[Amounts]) -> tuple[Numbers, Numbers, Matrix]:
    """Of each node of some placements: of which one it is, the node, and what it gives."""
    of: Numbers = np.repeat(
        np.arange(len(placements)), np.array([len(nodes) for nodes in placements], np.int64)
    )
    nodes: Numbers = np.array([node for nodes in placements for node in nodes], np.int64)
    ranks: Numbers = np.array([ranks for nodes in placements for ranks in nodes.values()], np.int64)
    given: Matrix = np.array(each, float).reshape(-1, 3)[of] * ranks[:, None]
    return of, nodes, given


@dataclass(slots=True)
class Cursor:
    """The nodes to try for a shape, and how many of them have no room for it any more."""

    nodes: list[int]
    at: int = 0


class Room:
    """What is free on each node. Shrinks while jobs are placed.

    All nodes at once are compared by what was free at the last look at them, single ones by what is free now.
    """

    def __init__(self, free: Matrix, has_gpus: npt.NDArray[np.bool_]) -> None:
        # The same numbers twice: lists are quick to read one at a time, columns of a matrix all at once.
        self.cpus, self.gpus, self.memory = (free[:, resource].tolist() for resource in range(3))
        self._free: Matrix = np.array(free, order="F")
        self._columns: list[memoryview[Any]] = [self._free[:, resource].data for resource in range(3)]
        self._has_gpus = has_gpus
        self._seen = np.copy(self._free)  # at the last look
        self._since_order = 0
        self._orders: dict[bool, Numbers] = {}
        self._cursors: dict[Amounts, Cursor] = {}
        self._failed: dict[Amounts, int] = {}  # ranks of this shape that did not fit
        self._most: list[float] = free.max(axis=0).tolist() if len(free) else [0.0, 0.0, 0.0]

    def place(self, each: Amounts, ranks: int) -> Placement | None:
        """Places for all ranks, or None. Takes nothing yet."""
        failed = self._failed.get(each)
        if failed is not None and ranks >= failed:
            return None
        node = self._one_node(each[0] * ranks, each[1] * ranks, each[2] * ranks)
        if node is not None:
            return {node: ranks}
        placement = gather(self._look(), each, ranks) if ranks > 1 else None
        if placement is None:
            self._failed[each] = ranks
        return placement

    def take(self, placement: Placement, each: Amounts) -> None:
        """Make the room smaller by a placement."""
        cpus, gpus, memory = each
        of_cpus, of_gpus, of_memory = self._columns
        for node, ranks in placement.items():
            of_cpus[node] = self.cpus[node] = self.cpus[node] - cpus * ranks
            of_gpus[node] = self.gpus[node] = self.gpus[node] - gpus * ranks
            of_memory[node] = self.memory[node] = self.memory[node] - memory * ranks
        self._since_order += 1

    def row(self, node: int) -> Amounts:
        """What is free on a node."""
        return self.cpus[node], self.gpus[node], self.memory[node]

    def cap(self, node: int, most: Amounts) -> None:
        """Leave at most this much on a node."""
        for column, numbers, amount in zip(
            self._columns, (self.cpus, self.gpus, self.memory), most, strict=True
        ):
            if amount < numbers[node]:
                column[node] = numbers[node] = amount

    def matrix(self) -> Matrix:
        """What is free now, as a matrix of its own."""
        return self._look().copy(order="K")

    def _look(self) -> Matrix:
        self._seen = self._free.copy(order="K")
        return self._seen

    def _one_node(self, cpus: float, gpus: float, memory: float) -> int | None:
        """The first node that has room for all of it."""
        most = self._most
        if cpus > most[0] + EPSILON or gpus > most[1] or (memory and memory > most[2]):
            return None
        shape = (cpus, gpus, memory)
        cursor = self._cursors.get(shape)
        if cursor is None:
            cursor = self._cursors[shape] = Cursor(self._candidates(shape))
        nodes = cursor.nodes
        free_cpus, free_gpus, free_memory = self.cpus, self.gpus, self.memory
        for at in range(cursor.at, len(nodes)):
            node = nodes[at]
            if (
                gpus <= free_gpus[node]
                and cpus <= free_cpus[node] + EPSILON
                and (not memory or memory <= free_memory[node])
            ):
                cursor.at = at
                return node
        cursor.at = len(nodes)
        return None

    def _candidates(self, shape: Amounts) -> list[int]:
        """Nodes that may have room for the shape: the fullest first, and for CPUs alone those without GPUs."""
        if self._since_order >= STALE:
            self._most = self._look().max(axis=0).tolist()
            self._orders.clear()
            self._since_order = 0
        cpus, gpus, memory = self._seen.T
        wants_gpus = shape[1] > 0
        if wants_gpus not in self._orders:
            self._orders[wants_gpus] = np.lexsort((memory, cpus, gpus if wants_gpus else self._has_gpus))
        order = self._orders[wants_gpus]
        fits = (cpus + EPSILON >= shape[0]) & (gpus >= shape[1])
        if shape[2]:
            fits &= memory >= shape[2]
        found: list[int] = order[fits[order]].tolist()
        return found


class Releases:
    """When what runs will give back what it has: a time, a node and amounts for each entry."""

    def __init__(self, times: Matrix, where: Numbers, given: Matrix, nodes: int) -> None:
        self._nodes = nodes
        self._times, self._where, self._given = times, where, given
        self._new: tuple[list[float], list[Placement], list[Amounts]] = ([], [], [])
        self._sorted: tuple[Matrix, Numbers, Matrix] | None = None

    def add(self, at: float, placement: Placement, each: Amounts) -> None:
        """A job that starts now and ends at this time."""
        times, placements, amounts = self._new
        times.append(at)
        placements.append(placement)
        amounts.append(each)
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
            times, placements, amounts = self._new
            if times:
                of, where, given = places(placements, amounts)
                self._times = np.concatenate((self._times, np.array(times)[of]))
                self._where = np.concatenate((self._where, where))
                self._given = np.concatenate((self._given, given))
                self._new = ([], [], [])
            order = np.argsort(self._times, kind="stable")
            self._sorted = (self._times[order], self._where[order], self._given[order])
        return self._sorted
