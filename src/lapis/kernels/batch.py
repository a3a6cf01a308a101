"""Where the tokens of a forward pass live: the only thing that differs between training and serving.

Dims: T tokens of the pass, S sequences, P pages of the longest sequence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

PAGE = 32  # keys per page of the KV cache; part of the numerical contract


class LayerCache(NamedTuple):
    """Keys and values of one layer in pages. The first dim counts pages, the rest is the ops' own layout."""

    keys: Tensor
    values: Tensor


# A and B of a low-rank adapter of one weight (R rank: A is (R, K), B is (N, R)); None: the weight is as it was
AdapterPair = tuple[Tensor, Tensor] | None


@dataclass(eq=False)
class Batch:
    """Tokens of one or more sequences, laid one after the other.

    A sequence has one span of adjacent tokens with consecutive positions. Token t belongs to row
    `sequence_T[t]` of the page table, where its keys and values go to page `position_T[t] // PAGE`.
    """

    sequence_T: Tensor  # int32: row of page_table_SP of each token
    position_T: Tensor  # int32: absolute position of each token in its sequence
    page_table_SP: Tensor  # int32: pages of each sequence, in order of position
    caches: Sequence[LayerCache] | None  # one per layer; None: private temporary pages (training, scoring)
    spans: tuple[tuple[int, int], ...]  # (start, end) of each sequence inside T
    adapter_T: Tensor | None = None  # int32: which adapter each token's weights have, -1 none
    # one per layer: by the name of a weight, the pair of each adapter (`Ops.lora`)
    adapters: Sequence[Mapping[str, Sequence[AdapterPair]]] | None = None
    prepared: dict[str, Any] = field(
        default_factory=dict, init=False, repr=False
    )  # what ops derive from this once

    def __post_init__(self) -> None:
        for tensor in (self.sequence_T, self.position_T, self.page_table_SP, self.adapter_T):
            if tensor is None:
                continue
            assert tensor.dtype is torch.int32, "a Batch holds int32 tensors"
            assert tensor.is_contiguous(), "a Batch holds contiguous tensors"

    def on(self, device: torch.device) -> Batch:
        """The same batch with its tensors on a device; itself where they are there already."""
        if self.sequence_T.device.type == device.type:
            return self
        key = f"on {device}"
        if key not in self.prepared:
            moved = Batch(
                self.sequence_T.to(device),
                self.position_T.to(device),
                self.page_table_SP.to(device),
                self.caches,
                self.spans,
                None if self.adapter_T is None else self.adapter_T.to(device),
                self.adapters,
            )
            # numbers that are known here, so that nobody waits for the device to ask it for them
            vars(moved).update(positions=self.positions, private_pages=self.private_pages)
            self.prepared[key] = moved
        found: Batch = self.prepared[key]
        return found

    @property
    def tokens(self) -> int:
        """Number of tokens in the pass (T)."""
        return self.sequence_T.shape[0]

    @cached_property
    def positions(self) -> int:
        """One more than the last position of any token."""
        return int(self.position_T.max()) + 1 if self.tokens else 0

    @cached_property
    def private_pages(self) -> int:
        """Pages that the page table counts on when there are no caches."""
        return int(self.page_table_SP.max()) + 1 if self.page_table_SP.numel() else 0


def packed(lengths: Sequence[int]) -> Batch:
    """A batch of whole sequences, positions from 0, in private pages: the form of training and of scoring."""
    assert min(lengths, default=0) > 0, "there is a sequence, and each has at least one token"
    counts = torch.tensor(lengths, dtype=torch.int32)
    ends = counts.cumsum(0, dtype=torch.int32)
    starts = ends - counts
    sequence_T = torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(counts)
    position_T = torch.arange(int(ends[-1]), dtype=torch.int32) - starts.repeat_interleave(counts)
    pages_S = (counts + PAGE - 1) // PAGE
    first_S = pages_S.cumsum(0, dtype=torch.int32) - pages_S
    column_P = torch.arange(int(pages_S.max()), dtype=torch.int32)
    # entries beyond a sequence's own pages are never read; 0 keeps them inside the pool
    table_SP = torch.where(column_P < pages_S[:, None], first_S[:, None] + column_P, 0).to(torch.int32)
    spans = tuple(zip(starts.tolist(), ends.tolist(), strict=True))
    return Batch(sequence_T, position_T, table_SP.contiguous(), None, spans)
