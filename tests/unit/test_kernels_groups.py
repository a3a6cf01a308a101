"""Experts and adapters: the judge's bits in every build, a row alone as among others, and their gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lapis.kernels import cpu, reference_products, variants
from lapis.kernels.batch import AdapterPair
from lapis.kernels.gradient import keep_gradient
from lapis.kernels.ops import Ops
from lapis.kernels.stock import StockOps
from lapis.kernels.variants import IN_TILES

USABLE = variants.status().usable
ALL_OPS = [pytest.param(variant, id=variant) for variant in (*USABLE, "stock")]
BUILDS = [pytest.param(variant, id=variant) for variant in USABLE]


def make(name: str) -> Ops:
    return StockOps() if name == "stock" else cpu.load(name)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def rows(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape) * scale).bfloat16()


def mixture(tokens: int, count: int = 6, width: int = 64, ffn: int = 48) -> tuple[Tensor, ...]:
    """Inputs, expert weights and residual."""
    gate_up, down = rows(count, 2 * ffn, width, scale=0.2), rows(count, width, ffn, scale=0.2)
    return rows(tokens, width), gate_up, down, rows(tokens, width)


def adapters() -> list[AdapterPair]:
    ranks = (8, 2, None, 40)
    return [None if r is None else (rows(r, 64, scale=0.2), rows(50, r, scale=0.2)) for r in ranks]


@pytest.mark.parametrize("name", BUILDS)
@pytest.mark.parametrize("normalise", [True, False])
def test_route_keeps_the_contract(name: str, normalise: bool) -> None:
    logits = torch.randn(20, 60) * 3
    logits[4] = 1.0  # all equal: the smaller index first
    logits[5, 7] = logits[5, 30] = 9.0
    expert, weight = make(name).route(logits, 4, normalise)
    want_expert, want_weight = reference_products.route(logits, 4, normalise)
    assert torch.equal(expert, want_expert)
    assert torch.equal(weight, want_weight)
    assert expert[4].tolist() == [0, 1, 2, 3]
    stock_expert, stock_weight = StockOps().route(logits, 4, normalise)
    assert torch.equal(expert, stock_expert)
    assert torch.allclose(weight, stock_weight, rtol=1e-5)


@pytest.mark.parametrize("name", BUILDS)
def test_experts_keep_the_contract(name: str) -> None:
    ops = make(name)
    x, gate_up, down, residual = mixture(30)
    expert, weight = ops.route(torch.randn(30, 6), 2, True)
    want = reference_products.experts(x, expert, weight, gate_up, down, residual, name in IN_TILES)
    assert torch.equal(ops.experts(x, expert, weight, gate_up, down, residual), want)
    for part in (slice(0, 1), slice(4, 9), slice(5, 30)):  # alone, in any batch
        inputs = (x[part], expert[part], weight[part], gate_up, down, residual[part])
        assert torch.equal(ops.experts(*inputs), want[part])


@pytest.mark.parametrize("name", BUILDS)
def test_changed_experts_are_packed_anew(name: str) -> None:
    ops = make(name)
    x, gate_up, down, residual = mixture(3)
    expert, weight = ops.route(torch.randn(3, 6), 2, False)
    ops.experts(x, expert, weight, gate_up, down, residual)
    with torch.no_grad():
        gate_up *= 2
        down.copy_(down.flip(0))
    want = reference_products.experts(x, expert, weight, gate_up, down, residual, name in IN_TILES)
    assert torch.equal(ops.experts(x, expert, weight, gate_up, down, residual), want)
    assert isinstance(ops, cpu.CpuOps)
    kept = len(ops.groups._tables), len(ops.kernels._packed)
    del gate_up, down
    assert (len(ops.groups._tables), len(ops.kernels._packed)) == (kept[0] - 2, kept[1] - 12)


@pytest.mark.parametrize("name", BUILDS)
def test_lora_keeps_the_contract(name: str) -> None:
    ops, pairs = make(name), adapters()
    y, x = rows(40, 50), rows(40, 64)
    adapter = torch.randint(-1, 4, (40,), dtype=torch.int32)
    out = ops.lora(y, x, pairs, adapter)
    assert torch.equal(out, reference_products.lora(y, x, pairs, adapter, name in IN_TILES))
    untouched = (adapter == -1) | (adapter == 2)
    assert torch.equal(out[untouched], y[untouched])
    assert not torch.equal(out[~untouched], y[~untouched])
    for row in (0, 7, 39):
        part = slice(row, row + 1)
        assert torch.equal(ops.lora(y[part], x[part], pairs, adapter[part]), out[part])
    assert torch.equal(ops.lora(y, x, pairs, torch.full((40,), -1, dtype=torch.int32)), y)


@pytest.mark.parametrize("name", ALL_OPS)
def test_plain_torch_agrees_to_bf16(name: str) -> None:
    ops, stock, pairs = make(name), StockOps(), adapters()
    x, gate_up, down, residual = mixture(30)
    expert, weight = ops.route(torch.randn(30, 6), 2, True)
    inputs = (x, expert, weight, gate_up, down, residual)
    near(ops.experts(*inputs), stock.experts(*inputs))
    adapter = torch.randint(-1, 4, (30,), dtype=torch.int32)
    lora = (rows(30, 50), x, pairs, adapter)
    near(ops.lora(*lora), stock.lora(*lora))


def near(mine: Tensor, theirs: Tensor) -> None:
    assert mine.dtype == theirs.dtype
    assert ((mine - theirs).float().norm() / theirs.float().norm()).item() < 0.01


def check(mine: Tensor | None, theirs: Tensor | None) -> None:
    assert mine is not None
    assert theirs is not None
    a, b = mine.float().flatten(), theirs.float().flatten()
    assert F.cosine_similarity(a, b, 0).item() >= 0.99
    assert a.norm().item() == pytest.approx(b.norm().item(), rel=0.02)


@pytest.mark.parametrize("name", ALL_OPS)
@pytest.mark.parametrize("in_place", [True, False])
def test_gradients_of_experts_and_their_router(name: str, in_place: bool) -> None:
    ops, stock = make(name), StockOps()
    x, gate_up, down, residual = mixture(50)
    router = torch.randn(6, 64) * 0.1
    g = rows(50, 64)

    def run(ops: Ops, tensors: list[Tensor]) -> None:
        x, gate_up, down, residual, router = tensors
        expert, weight = ops.route(F.linear(x.float(), router), 2, True)
        served = ops.experts(x, expert, weight, gate_up, down, residual)
        with torch.no_grad():
            assert torch.equal(served, ops.experts(x, expert, weight, gate_up, down, residual))
        served.backward(g.to(served.dtype))

    mine = [t.clone().requires_grad_() for t in (x, gate_up, down, residual, router)]
    if in_place:
        for leaf in mine[1:3]:
            keep_gradient(leaf, torch.zeros_like(leaf))
    theirs = [t.float().requires_grad_() for t in (x, gate_up, down, residual, router)]
    run(ops, mine)
    run(stock, theirs)
    for leaf, other in zip(mine, theirs, strict=True):
        check(leaf.grad, other.grad)


@pytest.mark.parametrize("one", [False, True])
@pytest.mark.parametrize("name", ALL_OPS)
def test_gradients_of_lora(name: str, one: bool) -> None:
    ops, stock = make(name), StockOps()
    adapter = torch.randint(-1, 3, (60,), dtype=torch.int32).clamp(0, 0 if one else 2)
    tensors = [rows(60, 50), rows(60, 64), rows(8, 64), rows(50, 8), rows(4, 64), rows(50, 4)]
    mine = [t.clone().requires_grad_() for t in tensors]
    theirs = [t.float().requires_grad_() for t in tensors]
    g = rows(60, 50)
    for made, (y, x, a, b, c, d) in ((ops, mine), (stock, theirs)):
        out = made.lora(y, x, [(a, b), None, (c, d)], adapter)
        out.backward(g.to(out.dtype))
    used = 4 if one else 6
    for leaf, other in zip(mine[:used], theirs[:used], strict=True):
        check(leaf.grad, other.grad)
    assert not any(bool(leaf.grad.any()) for leaf in mine[used:] if leaf.grad is not None)
