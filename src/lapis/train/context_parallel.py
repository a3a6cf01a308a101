"""Context parallel, as ops around ops: every rank holds two pieces of the rows, an early one and a late one.

So every rank has about as many keys to see (the later a query, the more of them). Keys and values are gathered before
attention; queries stay where they are. Everything else is row by row.

Dims: T rows of all cp ranks, R rows of one; H, V, W as in kernels/ops.py; X heads, D head size.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from lapis.kernels import stock
from lapis.kernels.batch import Batch
from lapis.kernels.ops import Ops, Rope
from lapis.train.collectives import gathered
from lapis.train.ops_around import OpsAround


def rows_of(rank: int, ranks: int, tokens: int) -> tuple[range, range]:
    """The two pieces of T rows that a rank holds: piece `rank` from the start and from the end."""
    piece = tokens // (2 * ranks)
    last = 2 * ranks - 1 - rank
    return range(rank * piece, (rank + 1) * piece), range(last * piece, (last + 1) * piece)


class ContextParallelOps(OpsAround):
    """Ops over a part of the rows; a batch tells of all of them. T divides by twice the ranks."""

    def __init__(self, inner: Ops, group: dist.ProcessGroup) -> None:
        super().__init__(inner)
        self.group, self.rank, self.ranks = group, group.rank(), group.size()

    @property
    def sharers(self) -> dist.ProcessGroup | None:
        """All ranks of the group."""
        return self.group

    def own(self, x_T: Tensor) -> Tensor:
        """The rows of this rank: an early piece and a late one."""
        pieces = x_T.chunk(2 * self.ranks)
        return torch.cat([pieces[self.rank], pieces[-1 - self.rank]])

    def _in_order(self, x_T: Tensor) -> Tensor:
        """Gathered rows in the order of the batch."""
        pieces = x_T.chunk(2 * self.ranks)
        return torch.cat([*pieces[::2], *reversed(pieces[1::2])])

    def embedding(self, ids_T: Tensor, w_VH: Tensor, add: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """The table's rows of this rank's ids: (R, H)."""
        own = None if add is None else (self.own(add[0]), add[1])
        return self.inner.embedding(self.own(ids_T), w_VH, own)

    def attention(
        self,
        qkv_TW: Tensor,
        batch: Batch,
        layer: int,
        heads: int,
        kv_heads: int,
        head_size: int,
        rope: Rope | None,
        *,
        window: int | None = None,
    ) -> Tensor:
        """This rank's queries over the keys and values of all rows: (R, heads·head_size)."""
        assert batch.caches is None, "gradients need the keys of whole sequences"
        qkv_RXD = qkv_TW.view(len(qkv_TW), heads + 2 * kv_heads, head_size)
        rotated_RXD = stock.rotate(qkv_RXD[:, : heads + kv_heads], rope, self.own(batch.position_T))
        q_RXD, k_RXD = torch.split(rotated_RXD, [heads, kv_heads], dim=1)
        own_RXD = torch.cat([k_RXD, qkv_RXD[:, heads + kv_heads :]], dim=1)
        k_TXD, v_TXD = self._in_order(gathered(own_RXD, self.group)).chunk(2, dim=1)
        outputs, at = [], 0
        for rows in rows_of(self.rank, self.ranks, batch.tokens):
            for start, end in batch.spans:
                low, high = max(start, rows.start), min(end, rows.stop)
                if low < high:
                    own_RXD, at = q_RXD[at : at + high - low], at + high - low
                    seen = slice(start, high)
                    outputs.append(stock.attend(own_RXD, k_TXD[seen], v_TXD[seen], low - start, window))
        return torch.cat(outputs).reshape(len(qkv_TW), heads * head_size)

    def linear_cross_entropy(
        self, x_TH: Tensor, w_VH: Tensor, targets_T: Tensor, weights_T: Tensor | None = None
    ) -> Tensor:
        """The loss of this rank's rows: a part of the sum."""
        weights = None if weights_T is None else self.own(weights_T)
        return self.inner.linear_cross_entropy(x_TH, w_VH, self.own(targets_T), weights)


def around(inner: Ops, group: dist.ProcessGroup) -> Ops:
    """Ops for one rank of a context-parallel group."""
    return cast(Ops, ContextParallelOps(inner, group))
