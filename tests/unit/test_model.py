"""The model definition: against a plain judge, and the same logits by every schedule."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lapis.errors import UnavailableError
from lapis.kernels.batch import PAGE, Batch, LayerCache, packed
from lapis.kernels.ops import Ops, select
from lapis.kernels.stock import StockOps
from lapis.model.config import ModelConfig
from lapis.model.families import Llama
from tests import small_models


def judge(config: ModelConfig, state: dict[str, Tensor], ids: list[int]) -> Tensor:
    """Llama in float64, written from the equations of its paper: no cache, no joined kernels."""
    weights = {name: weight.double() for name, weight in state.items()}
    length, size, group = len(ids), config.head_size, config.heads // config.kv_heads
    angles = torch.arange(length)[:, None] * config.rope_base ** -(torch.arange(0, size, 2).double() / size)
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * weight

    def rotate(x: Tensor) -> Tensor:
        turned = torch.complex(x[..., : size // 2].contiguous(), x[..., size // 2 :].contiguous()) * turn
        return torch.cat([turned.real, turned.imag], -1)

    x = weights["embed"][torch.tensor(ids)]
    for index in range(config.layers):
        w = {name: weights[f"layers.{index}.{name}"] for name in ("qkv", "out", "gate_up", "down")}
        rows = norm(x, weights[f"layers.{index}.attn_norm"]) @ w["qkv"].T
        q, k, v = rows.view(length, -1, size).split([config.heads, config.kv_heads, config.kv_heads], 1)
        q, k = rotate(q), rotate(k).repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) / size**0.5
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
        o = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v.repeat_interleave(group, 1))
        x = x + o.reshape(length, -1) @ w["out"].T
        gate, up = (norm(x, weights[f"layers.{index}.ffn_norm"]) @ w["gate_up"].T).chunk(2, -1)
        x = x + (F.silu(gate) * up) @ w["down"].T
    return norm(x, weights["norm"]) @ weights["embed" if config.tied else "head"].T


def make(
    config: ModelConfig, ops: Ops, state: dict[str, Tensor], dtype: torch.dtype = torch.bfloat16
) -> Llama:
    model = Llama(config, ops, dtype)
    model.load_state_dict({name: weight.to(dtype) for name, weight in state.items()})
    return model


def available(name: str) -> Ops:
    if name == "stock":
        return StockOps()
    ops = select(32, widths=(128, 256))
    if not ops.bit_exact:
        pytest.skip(f"no compiled kernels here: {ops.reason}")
    return ops


def ids_of(length: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 320, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def serve(
    model: Llama, ids: list[int], chunks: list[int], table: list[int], caches: list[LayerCache]
) -> Tensor:
    """Logits of a sequence that comes in chunks, its keys and values in the pages of `table`."""
    logits, start = [], 0
    for size in chunks:
        batch = Batch(
            torch.zeros(size, dtype=torch.int32),
            torch.arange(start, start + size, dtype=torch.int32),
            torch.tensor([table], dtype=torch.int32),
            caches,
            ((0, size),),
        )
        logits.append(model(torch.tensor(ids[start : start + size]), batch))
        start += size
    return torch.cat(logits)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rope_base", [10000.0, 1e6])
def test_float32_logits_are_those_of_the_equations(tied: bool, rope_base: float) -> None:
    config = small_models.config(tied=tied, rope_base=rope_base)
    state, ids = small_models.random_state(config), ids_of(50)
    logits = make(config, StockOps(), state, torch.float32)(torch.tensor(ids), packed([50])).detach()
    assert torch.allclose(logits.double(), judge(config, state, ids), atol=1e-4)


@pytest.mark.parametrize("kernels", ["stock", "compiled"])
def test_bfloat16_logits_are_close_to_those_of_the_equations(kernels: str) -> None:
    config = small_models.config()
    state, ids = small_models.random_state(config), ids_of(70)
    expected = judge(config, state, ids)
    logits = make(config, available(kernels), state)(torch.tensor(ids), packed([70])).detach()
    assert logits.dtype == torch.float32
    error = (logits - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert error < 0.02


@pytest.mark.parametrize("kernels", ["stock", "compiled"])
@pytest.mark.parametrize("chunks", [[1] * 70, [64, 6], [33, 1, 1, 35]])
@torch.no_grad()
def test_decoding_through_pages_equals_the_packed_forward(kernels: str, chunks: list[int]) -> None:
    config = small_models.config()
    model = make(config, available(kernels), small_models.random_state(config))
    ids = ids_of(70)
    whole = model(torch.tensor(ids), packed([70]))
    caches = model.new_caches(5)
    served = serve(model, ids, chunks, [4, 0, 2], caches)  # pages in any order
    if model.ops.bit_exact:
        assert torch.equal(served, whole)
    else:
        assert torch.allclose(served, whole, atol=0.05)


@pytest.mark.parametrize("kernels", ["stock", "compiled"])
def test_packed_sequences_do_not_see_each_other(kernels: str) -> None:
    config = small_models.config()
    model = make(config, available(kernels), small_models.random_state(config))
    first, second = ids_of(40, 1), ids_of(PAGE + 5, 2)
    with torch.no_grad():
        together = model(torch.tensor(first + second), packed([len(first), len(second)]))
        alone = model(torch.tensor(second), packed([len(second)]))
    if model.ops.bit_exact:
        assert torch.equal(together[40:], alone)
    else:
        assert torch.allclose(together[40:], alone, atol=0.05)


def test_rows_pick_logits_without_changing_them() -> None:
    config = small_models.config()
    model = make(config, StockOps(), small_models.random_state(config), torch.float32)
    ids, rows = torch.tensor(ids_of(20)), torch.tensor([3, 19])
    with torch.no_grad():
        assert torch.allclose(model(ids, packed([20]), rows), model(ids, packed([20]))[rows], atol=1e-6)


def test_a_seed_decides_all_weights() -> None:
    config = small_models.config()
    models = [Llama(config, StockOps()) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        model.init_weights(seed)
    first, same, other = (model.state_dict() for model in models)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["embed"], other["embed"])
    assert first["layers.1.down"].float().std() < first["layers.1.qkv"].float().std() < 0.021
    assert bool((first["norm"] == 1).all())


def test_gradients_reach_every_weight_and_lower_the_loss() -> None:
    config = small_models.config(tied=False)
    model = Llama(config, StockOps())
    model.init_weights(0)
    ids = torch.tensor(ids_of(32))

    def loss() -> Tensor:
        return F.cross_entropy(model(ids[:-1], packed([31])), ids[1:])

    before = loss()
    before.backward()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for name, weight in model.named_parameters():
            assert weight.grad is not None and bool(weight.grad.any()), name
            weight -= 0.5 * weight.grad
    assert loss() < before - 0.1


def test_weights_may_live_in_a_buffer_of_the_trainer() -> None:
    config = small_models.config()
    model = make(config, StockOps(), small_models.random_state(config))
    ids = torch.tensor(ids_of(8))
    before = model(ids, packed([8])).detach()
    flat = torch.cat([weight.detach().flatten() for weight in model.parameters()])
    start = 0
    for weight in model.parameters():
        weight.data = flat[start : start + weight.numel()].view(weight.shape)
        start += weight.numel()
    assert torch.equal(model(ids, packed([8])).detach(), before)
    flat.zero_()
    assert not bool(model(ids, packed([8])).any())


def test_a_variant_that_is_asked_for_and_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAPIS_KERNELS", "avx2")
    with pytest.raises(UnavailableError):
        Llama(small_models.config(head_size=30, width=120))
