"""Flat buffers, Muon and AdamW against slow plain forms."""

from __future__ import annotations

import pytest
import torch

from lapis.kernels.batch import packed
from lapis.kernels.torch_steps import orthogonal
from lapis.model.config import NAMED
from lapis.model.families import Llama, build
from lapis.train.average import Average
from lapis.train.flat import FlatParameters
from lapis.train.optimizer import ITERATIONS, MOMENTUM, NEWTON_SCHULZ, Optimizer
from tests import small_models


def tiny() -> Llama:
    model = Llama(NAMED["tiny"])
    model.init_weights(3)
    return model


def step(optimizer: Optimizer, lr: float, embed_lr: float) -> float:
    norm = optimizer.norm()
    optimizer.step(norm=norm, lr=lr, embed_lr=embed_lr)
    return norm


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
    optimizer = Optimizer(flat, model.ops, muon=True, clip=1.0, weight_decay=0.0, betas=(0.8, 0.95))
    gradient = torch.randn(len(flat.grad), generator=torch.Generator().manual_seed(1)).bfloat16()
    flat.grad.copy_(gradient)
    before = flat.master.clone()
    step(optimizer, 0.1, 0.0)
    for block in flat.blocks:
        raw = block.of(gradient).float()
        nesterov = (
            raw * (1 - MOMENTUM) + raw * (1 - MOMENTUM) * MOMENTUM
        )  # first step: momentum is the gradient's part
        moves = orthogonal(nesterov, NEWTON_SCHULZ, ITERATIONS) * max(1.0, block.rows / block.columns) ** 0.5
        moved = block.of(before) - block.of(flat.master)
        torch.testing.assert_close(moved, 0.1 * moves, atol=2e-3, rtol=2e-2)
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
        Optimizer(flat, model.ops, muon=muon, clip=1.0, weight_decay=0.0, betas=(0.8, 0.95))
        for flat, model in zip(flats, models, strict=True)
    )
    for seed in (1, 2):
        flats[0].grad.normal_(generator=torch.Generator().manual_seed(seed))
        step(first, 0.1, 0.1)
    state = {name: tensor.clone() for name, tensor in first.state().items()}
    for name, parameter in models[0].named_parameters():
        assert torch.equal(state[f"master.{name}"].bfloat16(), parameter)
        assert state[f"first.{name}"].any()
        hidden = parameter.ndim >= 2 and name.startswith("layers.")
        assert (f"second.{name}" in state) == (not muon or not hidden)  # Muon has one moment
    for name, view in second.state().items():
        view.copy_(state[name])
    second.resumed(2)
    for flat, optimizer in zip(flats, (first, second), strict=True):
        flat.grad.normal_(generator=torch.Generator().manual_seed(3))
        step(optimizer, 0.1, 0.1)
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
    optimizer = Optimizer(flat, model.ops, muon=True, clip=1.0, weight_decay=0.0, betas=(0.8, 0.95))
    ids = torch.randint(0, 300, (33,), generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(25):
        x_TH = model.hidden(ids[:-1], packed([32]))
        assert isinstance(model.head_weight, torch.Tensor)
        loss = model.ops.linear_cross_entropy(x_TH, model.head_weight, ids[1:]) / 32
        loss.backward()  # type: ignore[no-untyped-call]
        step(optimizer, 0.02, 0.02)
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_adamw_is_torchs_adamw_and_norms_do_not_decay(dtype: torch.dtype) -> None:
    model = build(small_models.families()["gpt2"], dtype=dtype)
    model.init_weights(3)
    flat = FlatParameters(model)
    optimizer = Optimizer(flat, model.ops, muon=False, clip=1e9, weight_decay=0.5, betas=(0.9, 0.95))
    judges = {name: torch.nn.Parameter(view.clone()) for name, view in flat.views(flat.master).items()}
    groups = [
        {"params": [judge for judge in judges.values() if (judge.ndim > 1) is matrix], "weight_decay": decay}
        for matrix, decay in ((True, 0.5), (False, 0.0))
    ]
    torch_adamw = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), eps=1e-8)
    for seed in range(3):
        flat.grad.copy_(torch.randn(len(flat.grad), generator=torch.Generator().manual_seed(seed)))
        for name, view in flat.views(flat.grad).items():
            judges[name].grad = view.float().clone()
        step(optimizer, 0.01, 0.01)
        torch_adamw.step()
    for name, view in flat.views(flat.master).items():
        torch.testing.assert_close(view, judges[name].detach(), atol=1e-5, rtol=1e-5)


def test_clipping_scales_the_whole_gradient() -> None:
    steps = []
    for clip in (1e9, 1e-3):
        model = tiny()
        flat = FlatParameters(model)
        optimizer = Optimizer(flat, model.ops, muon=False, clip=clip, weight_decay=0.0, betas=(0.8, 0.95))
        flat.grad.fill_(1.0)
        norm = step(optimizer, 0.01, 0.01)
        assert norm == pytest.approx(len(flat.grad) ** 0.5, rel=1e-3)
        steps.append(optimizer.first.norm() / min(1.0, clip / norm))
    torch.testing.assert_close(steps[0], steps[1], rtol=1e-3, atol=0)


def test_micro_batches_add_up_without_rounding_to_bf16() -> None:
    flat = FlatParameters(tiny())
    for _ in range(300):  # one by one, 256 + 1 would stay 256 in bf16
        flat.grad.fill_(1.0)
        flat.set_aside()
    flat.grad.fill_(4.0)
    flat.gather()
    assert flat.grad.unique().tolist() == [304.0]


def test_the_average_follows_the_weights_and_forgets_the_start() -> None:
    flat = FlatParameters(tiny())
    average, start = Average(flat, 0.9), flat.master.clone()
    expected = start.clone()
    for number in range(1, 101):
        flat.master += 0.01
        average.update(number)
        decay = min(0.9, (1 + number) / (10 + number))
        expected = decay * expected + (1 - decay) * flat.master
    torch.testing.assert_close(average.mean, expected)
    assert set(average.state()) == set(flat.places)
    assert float((flat.master - average.mean).mean()) == pytest.approx(
        0.01 * 9, rel=0.05
    )  # steps it lags behind
