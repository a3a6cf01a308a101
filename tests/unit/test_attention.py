"""Attention in all its forms: against the slow judge bit by bit, served in chunks, and by quality in int8."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lapis.kernels import cpu, reference, variants
from lapis.kernels.batch import PAGE, Batch, LayerCache, packed
from lapis.kernels.ops import Ops, Rope
from lapis.kernels.stock import StockOps

USABLE = variants.status().usable
BF16 = torch.bfloat16
HEADS, KV_HEADS = 6, 2
pytestmark = pytest.mark.skipif(not USABLE, reason="no compiled kernels: plain torch has no bit contract")


@pytest.fixture(params=USABLE)
def ops(request: pytest.FixtureRequest) -> cpu.CpuOps:
    torch.manual_seed(0)
    return cpu.load(request.param)


def rows(tokens: int, size: int, heads: int = HEADS, kv_heads: int = KV_HEADS) -> Tensor:
    return torch.randn(tokens, (heads + 2 * kv_heads) * size).bfloat16()


def serve(
    ops: Ops,
    qkv_TW: Tensor,
    size: int,
    rope: Rope | None,
    *,
    window: int | None = None,
    int8: bool = False,
    chunks: list[int] | None = None,
    heads: int = HEADS,
    kv_heads: int = KV_HEADS,
) -> Tensor:
    """One sequence in chunks, on pages handed out in a shuffled order."""
    pages = torch.randperm(-(-len(qkv_TW) // PAGE) + 2).to(torch.int32)
    cache, outputs, start = ops.new_cache(len(pages), kv_heads, size, int8=int8), [], 0
    for chunk in chunks or [len(qkv_TW)]:
        batch = one_sequence(range(start, start + chunk), pages[:-2], cache)
        part = qkv_TW[start : start + chunk].contiguous()
        outputs.append(ops.attention(part, batch, 0, heads, kv_heads, size, rope, window=window))
        start += chunk
    return torch.cat(outputs)


def one_sequence(positions: range, pages: Tensor, cache: LayerCache) -> Batch:
    position_T = torch.tensor(positions, dtype=torch.int32)
    table_SP = pages[None].contiguous()
    return Batch(torch.zeros_like(position_T), position_T, table_SP, [cache], ((0, len(position_T)),))


@pytest.mark.parametrize("window", [None, 1, 20, 32, 45])
@pytest.mark.parametrize("rotated", [False, True])
def test_windows_and_no_rotation_keep_the_contract(
    ops: cpu.CpuOps, window: int | None, rotated: bool
) -> None:
    lengths, rope = [33, 100], Rope.make(64, 1e4, 128) if rotated else None
    qkv, lse, batch = rows(133, 64, 2, 1), torch.empty(133, 2), packed(lengths)
    o, _ = ops.kernels.attention(qkv, batch, 0, (2, 1, 64), rope, window, lse_TQ=lse)
    want_o, want_lse = reference.attention(qkv, batch.spans, 2, 1, 64, rope, window=window)
    assert torch.equal(o, want_o)
    assert torch.equal(lse, want_lse)


@pytest.mark.parametrize("size", [16, 48, 64, 80, 128, 256])
@pytest.mark.parametrize("window", [None, 20])
def test_int8_pages_keep_the_contract(ops: cpu.CpuOps, size: int, window: int | None) -> None:
    rope, qkv = Rope.make(size, 1e4, 128), rows(45, size)
    qkv[3] = 0  # a row without a scale
    want = reference.attention(qkv, ((0, 45),), HEADS, KV_HEADS, size, rope, window=window, int8=True)[0]
    for chunks in ([45], [1] * 45, [40, 5]):
        assert torch.equal(serve(ops, qkv, size, rope, window=window, int8=True, chunks=chunks), want)


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_any_chunks_give_the_bits_of_the_whole(data: st.DataObject) -> None:
    size = data.draw(st.sampled_from(variants.HEAD_SIZES))
    kv_heads, group = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 3, 4, 13]))
    window = data.draw(st.one_of(st.none(), st.integers(1, 150)))
    int8, rotated = data.draw(st.booleans()), data.draw(st.booleans())
    chunks = data.draw(st.lists(st.integers(1, 70), min_size=1, max_size=5))
    heads, ops = kv_heads * group, cpu.load(data.draw(st.sampled_from(USABLE)))
    qkv, rope = rows(sum(chunks), size, heads, kv_heads), Rope.make(size, 1e4, 512) if rotated else None

    def served(parts: list[int] | None) -> Tensor:
        shape = (qkv, size, rope)
        return serve(ops, *shape, window=window, int8=int8, chunks=parts, heads=heads, kv_heads=kv_heads)

    whole = served(None)
    assert torch.equal(served(chunks), whole)
    if not int8:
        trained = ops.attention(qkv, packed([len(qkv)]), 0, heads, kv_heads, size, rope, window=window)
        assert torch.equal(trained, whole)


@pytest.mark.parametrize("int8", [False, True])
def test_rows_do_not_depend_on_the_batch_or_the_threads(ops: cpu.CpuOps, int8: bool) -> None:
    lengths, rope = [70, 1, 33, 64], Rope.make(64, 1e4, 128)
    batch, qkv = packed(lengths), rows(168, 64)
    alone = [serve(ops, part.contiguous(), 64, rope, int8=int8) for part in qkv.split(lengths)]
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            batch.caches = [ops.new_cache(batch.private_pages, KV_HEADS, 64, int8=int8)]
            together = ops.attention(qkv, batch, 0, HEADS, KV_HEADS, 64, rope)
            assert torch.equal(together, torch.cat(alone))
    finally:
        torch.set_num_threads(before)


def test_every_build_gives_the_same_bits() -> None:
    torch.manual_seed(0)
    qkv, rope = rows(100, 96), Rope.make(96, 1e4, 128)
    results = [
        [serve(cpu.load(variant), qkv, 96, rope, window=50, int8=int8) for int8 in (False, True)]
        for variant in USABLE
    ]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_pages_before_the_window_are_not_read(ops: cpu.CpuOps) -> None:
    rope, qkv, pages = Rope.make(64, 1e4, 256), rows(200, 64), torch.arange(7, dtype=torch.int32)
    cache = ops.new_cache(8, KV_HEADS, 64)
    outputs = []
    for table in (pages, torch.where(pages < 4, 7, pages).to(torch.int32)):  # 160 - 32 is the first key seen
        whole = one_sequence(range(199), pages, cache)
        ops.attention(qkv[:199].contiguous(), whole, 0, HEADS, KV_HEADS, 64, rope, window=32)
        cache.keys[7].fill_(float("nan"))
        cache.values[7].fill_(float("nan"))
        last = one_sequence(range(199, 200), table, cache)
        outputs.append(ops.attention(qkv[199:], last, 0, HEADS, KV_HEADS, 64, rope, window=32))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("int8", [False, True])
def test_what_lay_in_the_pages_before_does_not_matter(ops: cpu.CpuOps, int8: bool) -> None:
    rope, qkv, outputs = Rope.make(64, 1e4, 64), rows(40, 64), []
    for filling in (0, -1):  # all bits set: NaN as bf16 and as a scale
        cache = ops.new_cache(2, KV_HEADS, 64, int8=int8)
        for part in cache:
            part.view(torch.int8).fill_(filling)
        batch = one_sequence(range(40), torch.arange(2, dtype=torch.int32), cache)
        outputs.append(ops.attention(qkv, batch, 0, HEADS, KV_HEADS, 64, rope))
    assert torch.equal(*outputs)


def test_int8_is_close_to_bf16_and_half_as_large(ops: cpu.CpuOps) -> None:
    rope, qkv = Rope.make(64, 1e4, 512), rows(300, 64)
    for kind in (ops, StockOps()):
        exact, close = (serve(kind, qkv, 64, rope, int8=int8).float() for int8 in (False, True))
        assert F.cosine_similarity(exact, close, dim=1).min() > 0.999
    full, small = (sum(part.nbytes for part in ops.new_cache(5, 2, 64, int8=int8)) for int8 in (False, True))
    assert small < 0.54 * full


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("window", [None, 40])
def test_plain_torch_agrees(ops: cpu.CpuOps, window: int | None, int8: bool) -> None:
    rope, qkv, stock = Rope.make(48, 1e4, 128), rows(100, 48), StockOps()
    for rotation in (rope, None):
        compiled = serve(ops, qkv, 48, rotation, window=window, int8=int8, chunks=[70, 30])
        plain = serve(stock, qkv, 48, rotation, window=window, int8=int8, chunks=[70, 30])
        assert torch.allclose(compiled.float(), plain.float(), rtol=2e-2, atol=2e-2)
