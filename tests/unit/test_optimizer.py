"""Flat buffers, Muon and AdamW against slow plain forms."""

from __future__ import annotations

import pytest
import torch

from lapis.kernels.batch import packed
from lapis.kernels.torch_steps import orthogonal
from lapis.model.config import NAMED
from lapis.model.families import Llama, build
from lapis.train.optimizer import ITERATIONS, MOMENTUM, NEWTON_SCHULZ, FlatParameters, Optimizer
from tests import small_models


def tiny() -> Llama:
    model = Llama(NAMED["tiny"])
    model.init_weights(3)
    return model


def test_moving_into_flat_buffers_changes_no_output() -> None:
    model = tiny()
    ids, batch = torch.arange(40) % 500, packed([40])
    with torch.no_grad():
        before = model(ids, batch).clone()
        flat = FlatParameters(model)
        model.ops.weights_changed()
        assert torch.equal(model(ids, batch), before)
    assert {parameter.data_ptr() // 2 % 32 for parameter in model.parameters()} == {
        flat.weight.data_ptr() // 2 % 32
    }


def test_muon_moves_each_matrix_by_its_own_orthogonal_step() -> None:
    model = tiny()
    flat = FlatParameters(model)
    optimizer = Optimizer(flat, model.ops, muon=True, clip=1.0, weight_decay=0.0)
    gradient = torch.randn(len(flat.grad), generator=torch.Generator().manual_seed(1)).bfloat16()
    flat.grad.copy_(gradient)
    before = flat.master.clone()
    optimizer.step(lr=0.1, embed_lr=0.0)
    for block in flat.blocks:
        raw = block.of(gradient).float()
        nesterov = (
            raw * (1 - MOMENTUM) + raw * (1 - MOMENTUM) * MOMENTUM
        )  # first step: momentum is the gradient's part
        step = orthogonal(nesterov, NEWTON_SCHULZ, ITERATIONS) * max(1.0, block.rows / block.columns) ** 0.5
        moved = block.of(before) - block.of(flat.master)
        torch.testing.assert_close(moved, 0.1 * step, atol=2e-3, rtol=2e-2)
    assert torch.equal(flat.weight, flat.master.bfloat16())
    assert not flat.grad.any()


def test_query_key_value_and_gate_up_are_matrices_of_their_own() -> None:
    config = NAMED["tiny"]
    flat = FlatParameters(tiny())
    assert len(flat.blocks) == config.layers * (3 + 1 + 2 + 1)
    assert sum(
        block.rows * block.columns for block in flat.blocks
    ) == config.layers * config.layer_parameters(0)


@pytest.mark.parametrize("muon", [True, False])
def test_the_state_is_a_tensor_per_parameter_and_another_optimizer_goes_on_from_it(muon: bool) -> None:
    models = tiny(), Llama(NAMED["tiny"])
    flats = [FlatParameters(model) for model in models]
    first, second = (
        Optimizer(flat, model.ops, muon=muon, clip=1.0, weight_decay=0.0)
        for flat, model in zip(flats, models, strict=True)
    )
    for seed in (1, 2):
        flats[0].grad.normal_(generator=torch.Generator().manual_seed(seed))
        first.step(lr=0.1, embed_lr=0.1)
    state = {name: tensor.clone() for name, tensor in first.state().items()}
    for name, parameter in models[0].named_parameters():
        assert torch.equal(state[f"master.{name}"].bfloat16(), parameter)
        assert state[f"first.{name}"].any()
        hidden = parameter.ndim >= 2 and name.startswith("layers.")
        assert (f"second.{name}" in state) == (not muon or not hidden)  # Muon has one moment
    second.load(state, steps=2)
    for flat, optimizer in zip(flats, (first, second), strict=True):
        flat.grad.normal_(generator=torch.Generator().manual_seed(3))
        optimizer.step(lr=0.1, embed_lr=0.1)
    assert torch.equal(flats[0].weight, flats[1].weight)
    assert all(torch.equal(tensor, second.state()[name]) for name, tensor in first.state().items())


@pytest.mark.parametrize("name", ["biases", "qwen3", "gpt2", "olmoe", "qwen3 moe"])
def test_every_family_learns_its_text_by_heart(name: str) -> None:
    config = small_models.families()[name]
    model = build(config)
    model.init_weights(0)
    flat = FlatParameters(model)
    if config.family == "moe":  # gate and up of every expert, its down, and the router
        mixtures = [layer for layer in range(config.layers) if config.is_mixture(layer)]
        plain = 4 * config.layers + 3 * (config.layers - len(mixtures))
        assert len(flat.blocks) == plain + len(mixtures) * (3 * config.experts + 1)
    optimizer = Optimizer(flat, model.ops, muon=True, clip=1.0, weight_decay=0.0)
    ids = torch.randint(0, 300, (33,), generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(25):
        x_TH = model.hidden(ids[:-1], packed([32]))
        assert isinstance(model.head_weight, torch.Tensor)
        loss = model.ops.linear_cross_entropy(x_TH, model.head_weight, ids[1:]) / 32
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step(lr=0.02, embed_lr=0.02)
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.1 * losses[0]


def test_adamw_is_torchs_adamw() -> None:
    model = tiny()
    flat = FlatParameters(model)
    optimizer = Optimizer(flat, model.ops, muon=False, clip=1e9, weight_decay=0.1)
    judge = torch.nn.Parameter(flat.master[: flat.matrices].clone())
    torch_adamw = torch.optim.AdamW([judge], lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for seed in range(3):
        gradient = torch.randn(len(flat.grad), generator=torch.Generator().manual_seed(seed)).bfloat16()
        flat.grad.copy_(gradient)
        judge.grad = gradient[: flat.matrices].float()
        optimizer.step(lr=0.01, embed_lr=0.01)
        torch_adamw.step()
    torch.testing.assert_close(flat.master[: flat.matrices], judge.detach(), atol=1e-5, rtol=1e-5)


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    model = tiny()
    flat = FlatParameters(model)
    optimizer = Optimizer(flat, model.ops, muon=True, clip=1.0, weight_decay=0.0)
    flat.grad[7] = float("nan")
    before = flat.master.clone()
    norm = optimizer.step(lr=0.1, embed_lr=0.1)
    assert norm != norm
    assert torch.equal(flat.master, before)


def test_clipping_scales_the_whole_gradient() -> None:
    steps = []
    for clip in (1e9, 1e-3):
        model = tiny()
        flat = FlatParameters(model)
        optimizer = Optimizer(flat, model.ops, muon=False, clip=clip, weight_decay=0.0)
        flat.grad.fill_(1.0)
        norm = optimizer.step(lr=0.01, embed_lr=0.01)
        assert norm == pytest.approx(len(flat.grad) ** 0.5, rel=1e-3)
        steps.append(optimizer.first.norm() / min(1.0, clip / norm))
    torch.testing.assert_close(steps[0], steps[1], rtol=1e-3, atol=0)
