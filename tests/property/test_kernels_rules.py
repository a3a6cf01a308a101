"""Whatever the batch: a row's bits depend on the row alone, and serving gives the bits of training."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lapis.kernels import cpu, variants
from lapis.kernels.batch import PAGE, Batch, LayerCache, packed
from lapis.kernels.ops import Rope

USABLE = variants.status().usable
compiled = pytest.mark.skipif(not USABLE, reason="no compiled kernels: plain torch has no bit contract")
examples = settings(derandomize=True, deadline=None, max_examples=25)
builds = st.sampled_from(USABLE or ("none",))

HEADS, KV_HEADS, HEAD = 4, 2, 32
ROPE = Rope.make(HEAD, 1e4, 256)


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape).bfloat16()


@compiled
@examples
@given(
    builds,
    st.integers(1, 60),
    st.integers(0, 40),
    st.integers(1, 3),
    st.sampled_from((16, 48, 130)),
    st.integers(1, 99),
)
def test_a_row_is_the_same_in_any_batch(
    build: str, count: int, first: int, threads: int, inner: int, columns: int
) -> None:
    torch.manual_seed(count)
    ops, before = cpu.load(build), torch.get_num_threads()
    x, w, residual = rows(100, inner), rows(columns, inner), rows(100, columns)
    wide, norm, ids = rows(100, 96), rows(96), torch.randint(0, columns, (100,))
    part = slice(first, first + count)

    def forward(rows_: slice) -> list[Tensor]:
        y = ops.linear(x[rows_], w, residual[rows_])
        logits = ops.linear(x[rows_], w, fp32=True)
        picked = ops.logprobs(logits, ids[rows_])
        return [y, picked, ops.rms_norm(wide[rows_], norm, 1e-5), ops.silu_mul(wide[rows_])]

    whole = forward(slice(None))
    torch.set_num_threads(threads)
    alone = forward(part)
    torch.set_num_threads(before)
    assert all(torch.equal(a, b[part]) for a, b in zip(alone, whole, strict=True))


class Server:
    """Sequences served together: each step takes a chunk of some of them, on pages from a shuffled free list."""

    def __init__(self, ops: cpu.CpuOps, sequences: list[Tensor]) -> None:
        self.ops, self.sequences = ops, sequences
        self.done = [0] * len(sequences)
        needed = sum(-(-len(sequence) // PAGE) for sequence in sequences)
        self.free = torch.randperm(needed + 2).tolist()
        self.table_SP = torch.zeros(len(sequences), 8, dtype=torch.int32)
        self.caches: list[LayerCache] = [ops.new_cache(needed + 2, KV_HEADS, HEAD)]
        self.outputs: list[list[Tensor]] = [[] for _ in sequences]

    def step(self, chunks: dict[int, int]) -> None:
        parts, sequence, position, spans, start = [], [], [], [], 0
        for s, n in chunks.items():
            for p in range(self.done[s], self.done[s] + n):
                if p % PAGE == 0:
                    self.table_SP[s, p // PAGE] = self.free.pop()
            parts.append(self.sequences[s][self.done[s] : self.done[s] + n])
            sequence += [s] * n
            position += range(self.done[s], self.done[s] + n)
            spans.append((start, start + n))
            start += n
        token_T, position_T = (torch.tensor(x, dtype=torch.int32) for x in (sequence, position))
        batch = Batch(token_T, position_T, self.table_SP, self.caches, tuple(spans))
        o = self.ops.attention(torch.cat(parts), batch, 0, HEADS, KV_HEADS, HEAD, ROPE)
        for (s, n), (first, end) in zip(chunks.items(), spans, strict=True):
            self.outputs[s].append(o[first:end])
            self.done[s] += n


@compiled
@examples
@given(st.data(), builds, st.lists(st.integers(1, 110), min_size=1, max_size=5), st.integers(1, 3))
def test_any_serving_schedule_gives_the_bits_of_training(
    data: st.DataObject, build: str, lengths: list[int], threads: int
) -> None:
    torch.manual_seed(sum(lengths))
    ops, before = cpu.load(build), torch.get_num_threads()
    sequences = [rows(length, (HEADS + 2 * KV_HEADS) * HEAD) for length in lengths]
    joined = torch.cat(sequences).requires_grad_()
    batch = packed(lengths)
    trained = ops.attention(joined, batch, 0, HEADS, KV_HEADS, HEAD, ROPE)
    assert trained.requires_grad
    torch.set_num_threads(threads)
    server = Server(ops, sequences)
    while any(done < length for done, length in zip(server.done, lengths, strict=True)):
        live = [s for s, length in enumerate(lengths) if server.done[s] < length]
        chosen = data.draw(st.lists(st.sampled_from(live), min_size=1, unique=True))
        sizes = {s: min(data.draw(st.integers(1, 70)), lengths[s] - server.done[s]) for s in chosen}
        server.step(sizes)
    torch.set_num_threads(before)
    for (start, end), parts in zip(batch.spans, server.outputs, strict=True):
        assert torch.equal(torch.cat(parts), trained.detach()[start:end])


@examples
@given(st.lists(st.integers(1, 100), min_size=1, max_size=6))
def test_packed_sequences_have_their_own_pages_and_positions(lengths: list[int]) -> None:
    batch = packed(lengths)
    assert batch.tokens == sum(lengths)
    pages = set()
    for s, (start, end) in enumerate(batch.spans):
        assert end - start == lengths[s]
        assert batch.sequence_T[start:end].tolist() == [s] * lengths[s]
        assert batch.position_T[start:end].tolist() == list(range(lengths[s]))
        own = batch.page_table_SP[s, : -(-lengths[s] // PAGE)].tolist()
        assert not pages & set(own)
        pages |= set(own)
    assert pages == set(range(batch.private_pages))
