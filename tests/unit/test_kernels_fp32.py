"""fp32 storage: the compiled forward ops against the slow judge, bit for bit, and gradients against torch's own."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from lapis.errors import UnavailableError
from lapis.kernels import cpu, reference, variants
from lapis.kernels import reference_fp32 as judge
from lapis.kernels.batch import PAGE, Batch, packed
from lapis.kernels.ops import Rope, select
from lapis.kernels.quantized import quantize
from lapis.kernels.replay import Replay
from lapis.kernels.stock import StockOps

USABLE = variants.status().usable
FP32 = torch.float32
ROPE = Rope.make(64, 1e4, 128)
pytestmark = pytest.mark.skipif(not USABLE, reason="no compiled kernels: plain torch has no bit contract")


@pytest.fixture(params=USABLE)
def ops(request: pytest.FixtureRequest) -> cpu.CpuOps:
    return cpu.load(request.param, FP32)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    torch.manual_seed(0)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def near_ties(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Factors and addends whose exact result lies beside the middle of two fp32 numbers, closer than fp64 can tell."""
    steps = torch.arange(1, count + 1, dtype=torch.float64) * 2**-23
    sign = torch.tensor([1.0, -1.0]).repeat(count)[:count]
    addend = (1 + torch.randint(0, 1 << 22, (count,)).double() * 2**-22 + 2**-23) * sign
    return (2**-24 * (1 + steps) * sign).float(), (1 - steps).float(), addend.float()


def test_the_judge_rounds_once_as_the_c_library_does() -> None:
    fmaf = ctypes.CDLL(None).fmaf
    fmaf.restype, fmaf.argtypes = ctypes.c_float, [ctypes.c_float] * 3
    wide = torch.randn(3, 2000) * torch.randn(3, 2000).mul(9).exp()
    a, b, c = (torch.cat([*pair]).numpy() for pair in zip(wide, near_ties(2000), strict=True))
    exact = np.array(
        [fmaf(*three) for three in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)], np.float32
    )
    assert np.array_equal(judge.fused(a, b, c), exact)
    twice = (a.astype(np.float64) * b + c).astype(np.float32)
    assert not np.array_equal(twice, exact)  # the cases can tell


def test_products_are_rounded_once(ops: cpu.CpuOps) -> None:
    a, b, c = near_ties(64)
    x, w = torch.stack([c, a], 1), torch.stack([torch.ones(64), b], 1)
    assert np.array_equal(ops.linear(x, w).diagonal().numpy(), judge.fused(a.numpy(), b.numpy(), c.numpy()))


@pytest.mark.parametrize(
    ("tokens", "inner", "columns"),
    [
        (1, 64, 96),
        (2, 63, 64),
        (3, 64, 33),
        (4, 66, 50),
        (5, 1, 64),
        (13, 96, 96),
        (25, 40, 32),
        (130, 34, 7),
    ],
)
def test_linear_keeps_the_contract(ops: cpu.CpuOps, tokens: int, inner: int, columns: int) -> None:
    x, w, residual, bias = (
        torch.randn(tokens, inner),
        torch.randn(columns, inner),
        torch.randn(tokens, columns),
        torch.randn(columns),
    )
    assert torch.equal(ops.linear(x, w), judge.linear(x, w))
    assert torch.equal(ops.linear(x, w, fp32=True), judge.linear(x, w))
    assert torch.equal(ops.linear(x, w, residual, bias_N=bias), judge.linear(x, w, residual, bias_N=bias))


def test_row_ops_keep_the_contract(ops: cpu.CpuOps) -> None:
    x, w, b = torch.randn(9, 96) * 5 + 1, torch.randn(96), torch.randn(96)
    assert torch.equal(ops.rms_norm(x, w, 1e-5), reference.rms_norm(x, w, 1e-5))
    assert torch.equal(ops.layer_norm(x, w, b, 1e-5), reference.layer_norm(x, w, b, 1e-5))
    assert torch.equal(ops.silu_mul(x), reference.silu_mul(x))
    assert torch.equal(ops.gelu(x), reference.gelu(x))
    assert torch.equal(ops.embedding(torch.tensor([2, 0]), x), x[[2, 0]])
    places = torch.tensor([1, 8], dtype=torch.int32)
    assert torch.equal(ops.embedding(torch.tensor([2, 0]), x, (places, 3 * x)), x[[2, 0]] + (3 * x)[[1, 8]])


@pytest.mark.parametrize("whole", [False, True])
def test_head_norm_keeps_the_contract(ops: cpu.CpuOps, whole: bool) -> None:
    heads, kv_heads, size = 4, 2, 48
    norms = torch.randn(heads * size if whole else size), torch.randn(kv_heads * size if whole else size)
    arguments = (torch.randn(7, (heads + 2 * kv_heads) * size), *norms, heads, kv_heads, size, 1e-6)
    assert torch.equal(ops.head_norm(*arguments), reference.head_norm(*arguments))


@pytest.mark.parametrize(("head_size", "window"), [(16, None), (48, 10), (64, None), (112, 10)])
def test_attention_keeps_the_contract(ops: cpu.CpuOps, head_size: int, window: int | None) -> None:
    rope = Rope.make(head_size, 1e4, 128) if head_size != 48 else None
    qkv, lse = torch.randn(39, 5 * head_size), torch.empty(39, 3)
    batch, sizes = packed([5, 33, 1]), (3, 1, head_size)
    o, _ = ops.kernels.attention(qkv, batch, 0, sizes, rope, window, lse_TQ=lse)
    want_o, want_lse = judge.attention(qkv, batch.spans, *sizes, rope, window=window)
    assert torch.equal(o, want_o)
    assert torch.equal(lse, want_lse)


def test_every_head_size_of_the_bf16_kernels_is_taken(ops: cpu.CpuOps) -> None:
    for size in variants.HEAD_SIZES:
        qkv = torch.randn(35, 3 * size)
        plain = StockOps().attention(qkv, packed([35]), 0, 1, 1, size, None)
        assert torch.allclose(ops.attention(qkv, packed([35]), 0, 1, 1, size, None), plain, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 7, 32, 40])
def test_decode_and_chunks_give_the_bits_of_the_whole(ops: cpu.CpuOps, chunk: int) -> None:
    qkv = torch.randn(75, (6 + 2 * 2) * 64)
    whole = ops.attention(qkv, packed([75]), 0, 6, 2, 64, ROPE)
    pages = torch.randperm(6).to(torch.int32)
    cache = ops.new_cache(6, 2, 64)
    cache.keys.fill_(math.nan)  # what lay there before does not matter
    cache.values.fill_(math.nan)
    served = []
    for start in range(0, 75, chunk):
        position_T = torch.arange(start, min(start + chunk, 75), dtype=torch.int32)
        spans = ((0, len(position_T)),)
        batch = Batch(torch.zeros_like(position_T), position_T, pages[None, :3].contiguous(), [cache], spans)
        served.append(ops.attention(qkv[start : start + chunk].contiguous(), batch, 0, 6, 2, 64, ROPE))
    assert torch.equal(torch.cat(served), whole)


def forward(ops: cpu.CpuOps, weights: list[Tensor], ids_T: Tensor, batch: Batch) -> Tensor:
    """One layer of everything: logits (T, V)."""
    embed, qkv, out, gate_up, down, norm = weights[:6]
    x = ops.embedding(ids_T, embed)
    o = ops.attention(ops.linear(ops.layer_norm(x, norm, norm, 1e-5), qkv), batch, 0, 2, 1, 64, ROPE)
    x = ops.linear(o, out, x, bias_N=norm)
    x = ops.linear(ops.silu_mul(ops.gelu(ops.linear(ops.rms_norm(x, norm, 1e-5), gate_up))), down, x)
    return ops.linear(x, embed, fp32=True)


def some_weights() -> list[Tensor]:
    shapes = ((50, 64), (256, 64), (64, 128), (192, 64), (64, 96), (64,), (50, 48))
    return [torch.randn(*shape) * 0.2 for shape in shapes]


def test_every_build_and_any_number_of_threads_give_the_same_bits() -> None:
    weights, ids = some_weights(), torch.randint(0, 50, (70,))
    results = []
    for variant in USABLE:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(forward(cpu.load(variant, FP32), weights, ids, packed([37, 33])))
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_a_row_alone_has_the_bits_it_has_in_any_batch(ops: cpu.CpuOps) -> None:
    weights, ids = some_weights(), torch.randint(0, 50, (70,))
    together = forward(ops, weights, ids, packed([20, 9, 41]))
    for start, end in ((0, 20), (20, 29), (29, 70)):
        assert torch.equal(forward(ops, weights, ids[start:end], packed([end - start])), together[start:end])


def test_grad_mode_changes_no_bit_and_gradients_are_those_of_torch(ops: cpu.CpuOps) -> None:
    weights, ids, lengths = some_weights(), torch.randint(0, 50, (40,)), [3, 37]
    targets = torch.randint(-1, 50, (40,))
    served = forward(ops, weights, ids, packed(lengths))
    found = []
    for maker in (ops, StockOps(dtype=FP32)):
        leaves = [weight.clone().requires_grad_() for weight in weights]
        logits = forward(maker, leaves, ids, packed(lengths))  # type: ignore[arg-type]
        if maker is ops:
            assert torch.equal(logits.detach(), served)
        loss = maker.linear_cross_entropy(logits[:, :48].contiguous(), leaves[6], targets)
        loss = loss + maker.logprobs(logits, ids).sum()
        loss.backward()
        found.append([loss.detach(), *(leaf.grad for leaf in leaves)])
    for ours, torchs in zip(*found, strict=True):
        assert ours is not None
        assert torchs is not None
        assert torch.allclose(ours, torchs, rtol=1e-4, atol=1e-4 * float(torchs.abs().max()))


@pytest.mark.parametrize("window", [None, 5])
def test_gradients_of_attention_and_of_head_norms(ops: cpu.CpuOps, window: int | None) -> None:
    qkv, norms = torch.randn(40, 6 * 32), (torch.randn(32), torch.randn(64))
    rope, g = Rope.make(32, 1e4, 64), torch.randn(40, 2 * 32)

    def gradients(maker: cpu.CpuOps | StockOps) -> list[Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in (qkv, *norms)]
        normed = maker.head_norm(leaves[0], leaves[1], leaves[2], 2, 2, 32, 1e-5)
        maker.attention(normed, packed([7, 33]), 0, 2, 2, 32, rope, window=window).backward(g)
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    for ours, torchs in zip(gradients(ops), gradients(StockOps(dtype=FP32)), strict=True):
        assert torch.allclose(ours, torchs, rtol=1e-4, atol=1e-4)


def grouped(maker: cpu.CpuOps | StockOps, tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Two experts of four for each row, then an adapter for some rows."""
    x, router, gate_up, down, a, b = tensors
    expert, weight = maker.route(maker.linear(x, router, fp32=True), 2, True)
    y = maker.experts(x, expert, weight, gate_up, down, x)
    adapter = torch.arange(len(x), dtype=torch.int32) % 3 - 1
    return y, maker.lora(y, x, [None, (a, b)], adapter)


def group_tensors(rows: int) -> list[Tensor]:
    shapes = ((rows, 32), (4, 32), (4, 64, 32), (4, 32, 32), (3, 32), (32, 3))
    return [torch.randn(*shape) for shape in shapes]


def test_experts_and_adapters_keep_the_contract(ops: cpu.CpuOps) -> None:
    x, router, gate_up, down, a, b = tensors = group_tensors(11)
    expert, weight = ops.route(ops.linear(x, router, fp32=True), 2, True)
    y, adapted = grouped(ops, tensors)
    assert torch.equal(y, judge.experts(x, expert, weight, gate_up, down, x))
    adapter = torch.arange(len(x), dtype=torch.int32) % 3 - 1
    assert torch.equal(adapted, judge.lora(y, x, [None, (a, b)], adapter))
    for t in range(0, 11, 3):  # a row alone, without and with neighbours
        assert torch.equal(grouped(ops, [x[t : t + 1], *tensors[1:]])[0], y[t : t + 1])


def test_gradients_of_experts_and_adapters(ops: cpu.CpuOps) -> None:
    tensors, g = group_tensors(20), torch.randn(20, 32)

    def gradients(maker: cpu.CpuOps | StockOps) -> list[Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        grouped(maker, leaves)[1].backward(g)
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    ours, torchs = gradients(ops), gradients(StockOps(dtype=FP32))
    assert len(ours) == len(torchs) == len(tensors)
    for one, other in zip(ours, torchs, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


def test_gradients_are_added_to_what_is_there(ops: cpu.CpuOps) -> None:
    x, w = torch.randn(5, 32), torch.randn(32, 32).requires_grad_()
    ops.linear(x, w).sum().backward()
    assert w.grad is not None
    once = w.grad.clone()
    ops.linear(x, w).sum().backward()
    assert torch.equal(w.grad, 2 * once)


def test_the_optimizers_step_in_fp32(ops: cpu.CpuOps) -> None:
    before, grad = torch.randn(64), torch.randn(64)
    weight, moments = before.clone(), (torch.zeros(64), torch.zeros(64))
    numbers = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "correction1": 0.1, "correction2": 0.05}
    ops.adamw(weight, grad.clone(), before.clone(), *moments, lr=0.1, weight_decay=0.1, clip=1.0, **numbers)
    assert torch.allclose(weight, before * 0.99 - 0.1 * grad.sign(), atol=1e-6)  # Adam's first step
    assert ops.squared_norm(torch.full((64,), 2.0)) == 256


def test_a_forward_is_replayed_with_the_same_bits(ops: cpu.CpuOps) -> None:
    weights, ids, batch = some_weights(), torch.randint(0, 50, (8,)), packed([5, 3])
    replay = Replay(ops, weights, 8)
    with torch.inference_mode():
        for _ in range(3):
            ids.random_(0, 50)
            expected = forward(ops, weights, ids, packed([5, 3]))
            assert torch.equal(
                replay.run("step", 8, lambda: (forward(ops, weights, ids, batch),))[0], expected
            )


def test_a_sealed_weight_has_the_same_bits(ops: cpu.CpuOps) -> None:
    x, w = torch.randn(3, 32), torch.nn.Parameter(torch.randn(40, 32), requires_grad=False)
    expected = ops.linear(x, w)
    assert torch.equal(ops.linear(x, ops.sealed(w)), expected)


def test_a_nan_spoils_its_own_row_only_and_subnormals_are_zero(ops: cpu.CpuOps) -> None:
    x, w = torch.randn(6, 64), torch.randn(64, 64)
    clean = ops.linear(x, w)
    x[3, 7] = math.nan
    spoiled = ops.linear(x, w)
    assert spoiled[3].isnan().all()
    assert torch.equal(spoiled[[0, 1, 2, 4, 5]], clean[[0, 1, 2, 4, 5]])
    assert ops.linear(torch.full((1, 32), 1e-39), torch.ones(32, 32)).count_nonzero() == 0
    assert ops.linear(torch.full((1, 1), 1e-20), torch.full((32, 1), 1e-20)).count_nonzero() == 0
    infinite = ops.linear(torch.full((1, 2), math.inf), torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
    assert infinite[0, 0] == math.inf
    assert infinite[0, 1].isnan()


@pytest.mark.parametrize(
    "ask",
    [
        lambda ops: ops.new_cache(1, 1, 64, int8=True),
        lambda ops: ops.linear(torch.randn(1, 64), quantize(torch.randn(32, 64), "int8")),
    ],
    ids=["keys and values", "weights"],
)
def test_what_is_not_offered_for_fp32_says_so(ops: cpu.CpuOps, ask: Callable[[cpu.CpuOps], object]) -> None:
    with pytest.raises(UnavailableError, match="fp32"):
        ask(ops)


def test_fp32_is_bit_exact_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LAPIS_KERNELS", raising=False)
    ops = select(64, widths=(384, 1024), dtype=FP32)
    assert (ops.name, ops.bit_exact, ops.reason) == (f"cpu-{USABLE[0]}", True, "")
    assert ops is not select(64, widths=(384, 1024))


def test_plain_torch_keeps_fp32_keys_and_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAPIS_KERNELS", "stock")
    stock, qkv = select(64, dtype=FP32), torch.randn(40, 3 * 64)
    batch = packed([40])
    batch.caches = [stock.new_cache(2, 1, 64)]
    assert batch.caches[0].keys.shape[1] == PAGE
    served = stock.attention(qkv, batch, 0, 1, 1, 64, ROPE)
    assert torch.allclose(served, stock.attention(qkv, packed([40]), 0, 1, 1, 64, ROPE), atol=1e-6)
