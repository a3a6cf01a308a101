"""Products with 8-bit and 4-bit weights: the judge's bits in every build, and close to the bf16 weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lapis.kernels import cpu, reference_products, variants
from lapis.kernels.quantized import Kind, Quantized, quantize
from lapis.kernels.stock import StockOps

USABLE = variants.status().usable
KINDS: tuple[Kind, ...] = ("int8", "int4")
compiled = pytest.mark.skipif(not USABLE, reason="no compiled kernels: plain torch has no bit contract")


@pytest.fixture(params=USABLE or ["none"])
def ops(request: pytest.FixtureRequest) -> cpu.CpuOps:
    return cpu.load(request.param)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def rows(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape) * scale).bfloat16()


@compiled
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("tokens", "inner", "columns"), [(1, 64, 64), (3, 130, 33), (7, 192, 96), (13, 2, 40), (30, 576, 32)]
)
def test_linear_keeps_the_contract(
    ops: cpu.CpuOps, kind: Kind, tokens: int, inner: int, columns: int
) -> None:
    x, w = rows(tokens, inner), quantize(rows(columns, inner), kind)
    x[0, : inner // 2] *= 100  # groups differ in scale
    residual, bias = rows(tokens, columns), rows(columns)
    assert torch.equal(ops.linear(x, w), reference_products.linear_quantized(x, w))
    want = reference_products.linear_quantized(x, w, residual, bias_N=bias)
    assert torch.equal(ops.linear(x, w, residual, bias_N=bias), want)
    assert torch.equal(ops.linear(x, w, fp32=True), reference_products.linear_quantized(x, w, fp32=True))


@compiled
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_the_same_in_any_batch_on_any_build(kind: Kind) -> None:
    x, w = rows(300, 320), quantize(rows(100, 320), kind)
    whole, before = cpu.load(USABLE[0]).linear(x, w), torch.get_num_threads()
    for variant in USABLE:
        ops = cpu.load(variant)
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for part in (slice(0, 1), slice(7, 20), slice(250, 300), slice(0, 300)):
                assert torch.equal(ops.linear(x[part], w), whole[part])
    torch.set_num_threads(before)


@compiled
@pytest.mark.parametrize("kind", KINDS)
def test_a_nan_spoils_its_own_row_and_zeros_stay_zero(ops: cpu.CpuOps, kind: Kind) -> None:
    x, w = rows(20, 128), quantize(rows(64, 128), kind)
    x[5] = 0
    clean = ops.linear(x, w)
    assert clean[5].count_nonzero() == 0
    x[3, 100] = float("nan")
    spoiled = ops.linear(x, w)
    assert spoiled[3].isnan().all()
    others = [row for row in range(20) if row != 3]
    assert torch.equal(spoiled[others], clean[others])


@pytest.mark.parametrize(("kind", "close"), [("int8", 0.012), ("int4", 0.11)])
def test_products_are_near_those_of_the_weight(kind: Kind, close: float) -> None:
    x, w = rows(64, 576), rows(96, 576)
    exact = x.double() @ w.double().T
    for ops in (StockOps(), *map(cpu.load, USABLE[:1])):
        y = ops.linear(x, quantize(w, kind), fp32=True).double()
        assert ((y - exact).norm() / exact.norm()).item() < close


def test_weights_come_back_within_half_a_level() -> None:
    w = rows(70, 200)
    w[3] = 0
    for kind, levels in (("int8", 254), ("int4", 15)):
        meant = quantize(w, kind).dequantize()  # type: ignore[arg-type]
        assert meant.shape == w.shape
        assert not meant[3].any()
        assert ((meant - w.float()).abs().max() < 0.62 * 2 * w.abs().max() / levels).item()


def test_a_weight_with_sixteen_levels_survives_four_bits() -> None:
    minimum, step = -torch.rand(64, 4, 1) - 0.5, torch.rand(64, 4, 1) * 0.1 + 0.05
    level = torch.randint(0, 16, (64, 4, 32))
    level[..., 0], level[..., 1] = 0, 15  # a group of such a file has its minimum and its maximum
    w = (level * step + minimum).flatten(1)
    q = quantize(w.bfloat16(), "int4")
    assert torch.equal(q.levels().view(64, 4, 32), level.to(torch.int16))
    assert torch.allclose(q.dequantize(), w, rtol=0, atol=0.02)


def test_bytes_of_a_weight() -> None:
    w = rows(64, 128)
    assert [quantize(w, kind).nbytes / w.numel() for kind in KINDS] == [1 + 1 / 32, 0.625]


@compiled
@pytest.mark.parametrize("kind", KINDS)
def test_quantised_experts_keep_the_contract(ops: cpu.CpuOps, kind: Kind) -> None:
    """Stacks of a width that fills no tiles, rows that few or many others share an expert with, unused experts."""
    x, residual = rows(70, 80), rows(70, 80)
    gate_up = quantize(rows(5, 96, 80, scale=0.2), kind)
    down = quantize(rows(5, 80, 48, scale=0.2), kind)
    logits = torch.randn(70, 5)
    logits[:, 3] += 3  # a favourite
    logits[:, 1] -= 20
    expert, weight = ops.route(logits, 2, True)
    want = reference_products.experts(x, expert, weight, gate_up, down, residual)
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        for part in (slice(0, 70), slice(0, 1), slice(5, 14), slice(20, 60)):
            inputs = (x[part], expert[part], weight[part], gate_up, down, residual[part])
            assert torch.equal(ops.experts(*inputs), want[part])
    torch.set_num_threads(before)
    near = StockOps().experts(x, expert, weight, gate_up, down, residual)
    assert ((near - want).float().norm() / want.float().norm()).item() < 0.02


def test_a_stack_holds_the_weights_it_was_made_of() -> None:
    w = rows(3, 40, 70)
    for kind in KINDS:
        stack = quantize(w, kind)
        assert stack.dequantize().shape == w.shape
        for index in range(3):
            alone = quantize(w[index], kind)
            assert torch.equal(stack.part(index).values, alone.values)
            assert torch.equal(stack.dequantize()[index], alone.dequantize())


@compiled
def test_quantised_products_have_no_gradient() -> None:
    x, w = rows(2, 64).requires_grad_(), quantize(rows(32, 64), "int8")
    assert isinstance(w, Quantized)
    with pytest.raises(AssertionError, match="no gradient"):
        cpu.load(USABLE[0]).linear(x, w)
