"""Linear maps in 8-bit floats: what they compute, on the CPU, and where they are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lapis import config
from lapis.errors import ConfigError, UnavailableError
from lapis.kernels.batch import packed
from lapis.kernels.ops import select
from lapis.kernels.stock import StockOps
from lapis.model.families import build
from lapis.train.float8 import E4M3, E5M2, Float8Ops, around, product, scaled
from lapis.train.recipe import Recipe
from tests import small_models


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def away(found: Tensor, expected: Tensor) -> float:
    """The error's size beside the expected."""
    found, expected = found.detach().float(), expected.detach().float()
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(("dtype", "step"), [(E4M3, 2**-4), (E5M2, 2**-3)])
def test_a_matrix_keeps_its_range_and_rounds_within_its_type(dtype: torch.dtype, step: float) -> None:
    x = numbers(64, 48) * 1e-6
    values, scale = scaled(x, dtype)
    assert float(values.float().abs().max()) == torch.finfo(dtype).max
    normal = x.abs() > x.abs().max() * 1e-3  # smaller ones lose bits
    assert float(((values.float() * scale - x).abs() / x.abs())[normal].max()) <= step * 1.001
    nothing = scaled(torch.zeros(16, 16), dtype)
    assert not torch.count_nonzero(nothing.values.float() * nothing.scale)


def test_a_product_is_that_of_the_rounded_matrices() -> None:
    a, b = scaled(numbers(40, 64), E5M2), scaled(numbers(48, 64, seed=1), E4M3)
    exact = (a.values.double() * a.scale) @ (b.values.double() * b.scale).T
    assert away(product(a, b, torch.float32), exact) < 1e-5


@pytest.mark.parametrize("rows", [64, 37])
def test_output_and_gradients_are_those_of_the_plain_map(rows: int) -> None:
    shapes = ((rows, 128), (256, 128), (rows, 256), (256,))  # rows, weight, residual, bias
    found = []
    for ops in (StockOps(), Float8Ops(StockOps())):
        x, w, residual, bias = inputs = [
            numbers(*shape, seed=n).bfloat16().requires_grad_() for n, shape in enumerate(shapes)
        ]
        y = ops.linear(x, w, residual, bias_N=bias)
        y.backward(numbers(rows, 256, seed=9).bfloat16())  # type: ignore[no-untyped-call]
        found.append([y, *(tensor.grad for tensor in inputs)])
    for (plain, eight), bound in zip(zip(*found, strict=True), (0.05, 0.08, 0.08, 0, 0), strict=True):
        assert plain is not None and eight is not None
        assert away(eight, plain) <= bound
    assert not torch.equal(*(outputs[0] for outputs in found))  # 8 bits were there


def test_what_has_no_gradient_or_is_small_is_the_inner_ops_own() -> None:
    inner, x, w = StockOps(), numbers(32, 64).bfloat16(), numbers(256, 64).bfloat16().requires_grad_()
    ops = Float8Ops(inner)
    assert (ops.name, ops.bit_exact, ops.device) == ("stock fp8", False, inner.device)
    with torch.no_grad():
        assert torch.equal(ops.linear(x, w), inner.linear(x, w))
    router = numbers(64, 64).bfloat16().requires_grad_()
    assert torch.equal(ops.linear(x, router), inner.linear(x, router))
    assert torch.equal(ops.linear(x, w, fp32=True), inner.linear(x, w, fp32=True))


def test_a_model_learns_as_in_bf16() -> None:
    shape = small_models.config(width=256, heads=4, head_size=64, kv_heads=4, ffn=512)
    ids = torch.randint(0, 300, (65,), generator=torch.Generator().manual_seed(5))
    losses = []
    for ops in (StockOps(), Float8Ops(StockOps())):
        model = build(shape, ops)  # type: ignore[arg-type]
        model.init_weights(0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(12):
            optimizer.zero_grad()
            loss = model.ops.linear_cross_entropy(
                model.hidden(ids[:-1], packed([64])), model.head_weight, ids[1:]
            )
            (loss / 64).backward()
            optimizer.step()
        losses.append(float(loss.detach()) / 64)
    assert losses[0] < 4.5  # from ln 320 = 5.8
    assert losses[1] == pytest.approx(losses[0], rel=0.03)


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9),
    reason="this GPU has 8-bit floats",
)
def test_without_the_hardware_it_is_refused_with_the_way_out() -> None:
    with pytest.raises(UnavailableError, match=r"compute capability 8\.9 or more.*: ") as caught:
        around(select(64))
    assert "--set train.fp8=false" in str(caught.value)


@pytest.mark.parametrize("setting", ['dtype = "fp32"', 'objective = "grpo"'])
def test_a_recipe_that_cannot_have_it_is_refused(tmp_path: Path, setting: str) -> None:
    (tmp_path / "r.toml").write_text(f"[train]\nsteps = 1\nfp8 = true\n{setting}\n")
    with pytest.raises(ConfigError, match="fp8"):
        config.load(tmp_path / "r.toml", Recipe)
