"""The compiled forward ops against the slow judge, bit for bit, in every build that this CPU can run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from lapis.kernels import cpu, reference, variants
from lapis.kernels.batch import PAGE, Batch, packed
from lapis.kernels.ops import Ops, Rope
from lapis.kernels.stock import StockOps

USABLE = variants.status().usable
BF16 = torch.bfloat16
pytestmark = pytest.mark.skipif(not USABLE, reason="no compiled kernels: plain torch has no bit contract")


@pytest.fixture(params=USABLE)
def ops(request: pytest.FixtureRequest) -> cpu.CpuOps:
    return cpu.load(request.param)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    torch.manual_seed(0)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def rows(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape) * scale).bfloat16()


def judged(ops: cpu.CpuOps, *tensors: Tensor, **options: Any) -> Tensor:
    """The judge's linear, in the order of these ops."""
    tiles = ops.name.removeprefix("cpu-") in variants.IN_TILES
    return reference.linear(*tensors, tiles=tiles, **options)


def decode(
    ops: Ops, qkv_TW: Tensor, heads: int, kv_heads: int, head_size: int, rope: Rope, chunk: int
) -> Tensor:
    """One sequence served in chunks, on pages handed out in a shuffled order."""
    pages = torch.randperm(-(-len(qkv_TW) // PAGE) + 3).to(torch.int32)
    cache = ops.new_cache(len(pages), kv_heads, head_size)
    outputs = []
    for start in range(0, len(qkv_TW), chunk):
        position_T = torch.arange(start, min(start + chunk, len(qkv_TW)), dtype=torch.int32)
        spans = ((0, len(position_T)),)
        batch = Batch(torch.zeros_like(position_T), position_T, pages[None, :-3].contiguous(), [cache], spans)
        part = qkv_TW[start : start + chunk].contiguous()
        outputs.append(ops.attention(part, batch, 0, heads, kv_heads, head_size, rope))
    return torch.cat(outputs)


@pytest.mark.parametrize(
    ("tokens", "inner", "columns"),
    [
        (1, 64, 96),
        (2, 64, 64),
        (3, 64, 33),
        (4, 66, 50),
        (5, 2, 64),
        (13, 96, 96),
        (25, 96, 32),
        (33, 80, 40),
        (70, 64, 64),
        (130, 34, 7),
    ],
)
def test_linear_keeps_the_contract(ops: cpu.CpuOps, tokens: int, inner: int, columns: int) -> None:
    x, w, residual, bias = (
        rows(tokens, inner),
        rows(columns, inner),
        rows(tokens, columns),
        rows(columns),
    )
    assert torch.equal(ops.linear(x, w), judged(ops, x, w))
    assert torch.equal(ops.linear(x, w, residual), judged(ops, x, w, residual))
    assert torch.equal(ops.linear(x, w, fp32=True), judged(ops, x, w, fp32=True))
    with_bias = judged(ops, x, w, residual, bias_N=bias)
    assert torch.equal(ops.linear(x, w, residual, bias_N=bias), with_bias)
    logits = judged(ops, x, w, bias_N=bias, fp32=True)
    assert torch.equal(ops.linear(x, w, bias_N=bias, fp32=True), logits)


def test_row_ops_keep_the_contract(ops: cpu.CpuOps) -> None:
    x, w, joined = rows(9, 96), rows(96), rows(9, 96, scale=30)
    assert torch.equal(ops.rms_norm(x, w, 1e-5), reference.rms_norm(x, w, 1e-5))
    assert torch.equal(ops.silu_mul(joined), reference.silu_mul(joined))


def test_layer_norm_and_gelu_keep_the_contract(ops: cpu.CpuOps) -> None:
    x, w, b = rows(9, 96, scale=3) + 2, rows(96), rows(96)
    assert torch.equal(ops.layer_norm(x, w, b, 1e-5), reference.layer_norm(x, w, b, 1e-5))
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(BF16)
    finite = every[(every.float().abs() > 1e-37) & (every.float().abs() < 1e9)]
    x = finite[: len(finite) // 32 * 32].view(-1, 32)
    assert torch.equal(ops.gelu(x), reference.gelu(x))


@pytest.mark.parametrize("whole", [False, True])
def test_head_norm_keeps_the_contract(ops: cpu.CpuOps, whole: bool) -> None:
    heads, kv_heads, size = 4, 2, 48
    q_norm, k_norm = rows(heads * size if whole else size), rows(kv_heads * size if whole else size)
    qkv = rows(7, (heads + 2 * kv_heads) * size)
    arguments = (qkv, q_norm, k_norm, heads, kv_heads, size, 1e-6)
    assert torch.equal(ops.head_norm(*arguments), reference.head_norm(*arguments))


@pytest.mark.parametrize("vocabulary", [1, 16, 1003])
def test_logprobs_keep_the_contract(ops: cpu.CpuOps, vocabulary: int) -> None:
    logits, ids = torch.randn(7, vocabulary) * 9, torch.randint(0, vocabulary, (7,))
    assert torch.equal(ops.logprobs(logits, ids), reference.logprobs(logits, ids))
    assert torch.equal(ops.argmax(logits), logits.argmax(-1))


def test_logprobs_of_masked_and_wrong_ids(ops: cpu.CpuOps) -> None:
    logits = torch.tensor([[0.0, -torch.inf, 0.0], [1.0, 1.0, 0.0]])
    half = ops.logprobs(logits, torch.tensor([0, 1]))
    assert half[0].item() == pytest.approx(-0.6931472)
    assert ops.logprobs(logits, torch.tensor([1, -1])).tolist() == [-torch.inf, 0.0]
    assert ops.logprobs(logits, torch.tensor([3, 0])).isnan().tolist() == [True, False]
    assert ops.argmax(logits).tolist() == [0, 0]  # the first of equals


@pytest.mark.parametrize("head_size", variants.HEAD_SIZES)
def test_attention_keeps_the_contract(ops: cpu.CpuOps, head_size: int) -> None:
    rope, lengths = Rope.make(head_size, 1e4, 128), [5, 33, 1]
    qkv, lse = rows(sum(lengths), 8 * head_size), torch.empty(sum(lengths), 4)
    batch = packed(lengths)
    o, _ = ops.kernels.attention(qkv, batch, 0, (4, 2, head_size), rope, lse_TQ=lse)
    want_o, want_lse = reference.attention(qkv, batch.spans, 4, 2, head_size, rope)
    assert torch.equal(o, want_o)
    assert torch.equal(lse, want_lse)


@pytest.mark.parametrize("chunk", [1, 7, 32, 40])
def test_decode_and_chunks_give_the_bits_of_the_whole(ops: cpu.CpuOps, chunk: int) -> None:
    rope, qkv = Rope.make(64, 1e4, 128), rows(75, (6 + 2 * 2) * 64)
    whole = ops.attention(qkv, packed([75]), 0, 6, 2, 64, rope)
    assert torch.equal(decode(ops, qkv, 6, 2, 64, rope, chunk), whole)


def test_plain_torch_fails_the_same_test() -> None:
    rope, qkv = Rope.make(64, 1e4, 256), rows(100, 3 * 64 * 2)
    stock = StockOps()
    whole = stock.attention(qkv, packed([100]), 0, 2, 2, 64, rope)
    served = decode(stock, qkv, 2, 2, 64, rope, 5)
    assert not torch.equal(served, whole)  # the bit tests can tell
    assert torch.allclose(served.float(), whole.float(), atol=2e-2)


def test_what_lay_in_the_pages_before_does_not_matter(ops: cpu.CpuOps) -> None:
    rope, qkv = Rope.make(64, 1e4, 64), rows(40, 3 * 64)
    outputs = []
    for content in (0.0, float("nan")):
        cache = ops.new_cache(2, 1, 64)
        cache.keys.fill_(content)
        cache.values.fill_(content)
        batch = packed([40])
        batch.caches = [cache]
        outputs.append(ops.attention(qkv, batch, 0, 1, 1, 64, rope))
    assert torch.equal(*outputs)


def test_a_nan_spoils_its_own_row_only(ops: cpu.CpuOps) -> None:
    x, w = rows(6, 64), rows(64, 64)
    clean = ops.linear(ops.rms_norm(x, w[0], 1e-5), w)
    x[3, 7] = float("nan")
    spoiled = ops.linear(ops.rms_norm(x, w[0], 1e-5), w)
    assert spoiled[3].isnan().all()
    assert torch.equal(spoiled[[0, 1, 2, 4, 5]], clean[[0, 1, 2, 4, 5]])
    logits = torch.zeros(2, 20)
    logits[0, 19] = float("nan")
    assert ops.logprobs(logits, torch.tensor([0, 0])).isnan().tolist() == [True, False]


def test_subnormal_numbers_count_as_zero(ops: cpu.CpuOps) -> None:
    tiny = torch.full((1, 32), 1e-39, dtype=BF16)
    assert ops.linear(tiny, torch.ones(32, 32, dtype=BF16), fp32=True).count_nonzero() == 0
    assert torch.tensor(1e-39).item() != 0  # the process keeps its own mode


def test_builds_of_one_order_give_the_same_bits() -> None:
    x, w, head = rows(37, 384), rows(1152, 384), rows(500, 384)
    rope, ids = Rope.make(64, 1e4, 64), torch.randint(0, 500, (37,))
    results: dict[bool, list[Tensor]] = {False: [], True: []}
    for variant in USABLE:
        ops = cpu.load(variant)
        o = ops.attention(ops.linear(x, w), packed([37]), 0, 6, 6, 64, rope)
        logprobs = ops.logprobs(ops.linear(ops.rms_norm(o, w[0], 1e-5), head, fp32=True), ids)
        results[variant in variants.IN_TILES].append(logprobs)
    for same in results.values():
        assert all(torch.equal(same[0], other) for other in same[1:])


def test_grad_mode_changes_no_bit(ops: cpu.CpuOps) -> None:
    rope, x, w, norm = Rope.make(32, 1e4, 64), rows(40, 64), rows(192, 64), rows(64)
    ids = torch.randint(0, 192, (40,))

    def forward() -> list[Tensor]:
        h = ops.rms_norm(ops.embedding(ids, w), norm, 1e-5)
        qkv = ops.linear(h, w)
        o = ops.attention(qkv, packed([40]), 0, 2, 2, 32, rope)
        logits = ops.linear(ops.silu_mul(torch.cat([o, x], 1)), w[:, :64].contiguous(), fp32=True)
        return [qkv, o, logits, ops.logprobs(logits, ids)]

    served = forward()
    for tensor in (x, w, norm):
        tensor.requires_grad_()
    trained = forward()
    assert all(tensor.requires_grad for tensor in trained)
    assert all(torch.equal(a, b.detach()) for a, b in zip(served, trained, strict=True))


def test_plain_torch_agrees_to_bf16(ops: cpu.CpuOps) -> None:
    stock, rope = StockOps(), Rope.make(64, 1e4, 128)
    x, w, qkv, logits = rows(40, 64), rows(96, 64, scale=0.1), rows(40, 8 * 64), torch.randn(40, 50) * 5
    ids, batch, norms = torch.randint(0, 50, (40,)), packed([3, 37]), (rows(64), rows(128))
    pairs = [
        (ops.linear(x, w), stock.linear(x, w)),
        (ops.linear(x, w, fp32=True), stock.linear(x, w, fp32=True)),
        (ops.linear(x, w, bias_N=w[:, 0].contiguous()), stock.linear(x, w, bias_N=w[:, 0].contiguous())),
        (ops.rms_norm(x, w[0, :64].contiguous(), 1e-5), stock.rms_norm(x, w[0, :64], 1e-5)),
        (ops.silu_mul(x), stock.silu_mul(x)),
        (ops.gelu(x), stock.gelu(x)),
        (ops.layer_norm(x, w[0], w[1], 1e-5), stock.layer_norm(x, w[0], w[1], 1e-5)),
        (ops.head_norm(qkv, *norms, 4, 2, 64, 1e-5), stock.head_norm(qkv, *norms, 4, 2, 64, 1e-5)),
        (ops.attention(qkv, batch, 0, 4, 2, 64, rope), stock.attention(qkv, batch, 0, 4, 2, 64, rope)),
        (ops.logprobs(logits, ids), stock.logprobs(logits, ids)),
        (ops.linear_logprobs(x, w, ids), stock.linear_logprobs(x, w, ids)),
        (ops.linear_cross_entropy(x, w, ids), stock.linear_cross_entropy(x, w, ids)),
    ]
    for compiled, plain in pairs:
        assert compiled.dtype == plain.dtype
        assert compiled.shape == plain.shape
        assert torch.allclose(compiled.float(), plain.float(), rtol=2e-2, atol=2e-2)


def test_a_changed_weight_is_packed_anew(ops: cpu.CpuOps) -> None:
    x, w = rows(2, 32), torch.nn.Parameter(rows(32, 32))
    with torch.no_grad():
        ops.linear(x, w)
        w.mul_(2)  # autograd's version counter tells
        assert torch.equal(ops.linear(x, w), judged(ops, x, w))
        flat = rows(32 * 32)
        w.data = flat.view(32, 32)  # the pointer tells
        assert torch.equal(ops.linear(x, w), judged(ops, x, w))
        flat.copy_(rows(32 * 32))  # only the trainer can tell
        ops.weights_changed()
        assert torch.equal(ops.linear(x, w), judged(ops, x, w))


def test_packed_copies_die_with_their_weight(ops: cpu.CpuOps) -> None:
    before = len(ops.kernels._packed)
    w = rows(32, 32)
    ops.linear(rows(1, 32), w)
    assert len(ops.kernels._packed) == before + 1
    del w
    assert len(ops.kernels._packed) == before
