"""A recorded forward gives the bits of the forward itself, or says why it cannot be recorded."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from lapis.kernels import replay as replays
from lapis.kernels import variants
from lapis.kernels.batch import PAGE, Batch, packed
from lapis.kernels.cpu import CpuOps, load
from lapis.kernels.replay import Replay, Unrecordable
from lapis.kernels.stock import StockOps
from lapis.model.families import Llama, build
from tests.small_models import config, families

CONFIG = config()
pytestmark = pytest.mark.skipif(not variants.status().bit_exact, reason="no compiled kernels here")


@pytest.fixture
def ops() -> CpuOps:
    return load(variants.status().chosen.removeprefix("cpu-"))


def run(replay: Replay, forward: Callable[[], Tensor], rows: int = 4) -> Tensor:
    with torch.inference_mode():
        return replay.run("step", rows, lambda: (forward(),))[0]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_decode_step_of_a_model_has_the_bits_of_its_forward(ops: CpuOps, name: str) -> None:
    model = build(families()[name], ops).eval()
    model.init_weights(3)
    rows, pages = 5, 4
    table = torch.randperm(rows * pages).view(rows, pages).to(torch.int32)
    ids = torch.zeros(rows, dtype=torch.int64)
    position = torch.zeros(rows, dtype=torch.int32)
    sequence = torch.arange(rows, dtype=torch.int32)
    replay = Replay(ops, list(model.parameters()), rows)
    recorded = model.new_caches(rows * pages), model.new_caches(rows * pages)
    random = np.random.default_rng(0)
    for step in range(2 * PAGE + 3):
        ids.copy_(torch.from_numpy(random.integers(0, CONFIG.vocab_size, rows)))
        position.fill_(step)
        plain, first = (Batch(sequence, position, table, caches, ()) for caches in recorded)

        def forward(batch: Batch = first) -> tuple[Tensor, ...]:
            logits = model(ids, batch)
            return logits, ops.argmax(logits)

        with torch.inference_mode():
            expected = model(ids, plain)
            logits, best = replay.run("decode", rows, forward)
        assert torch.equal(logits, expected)
        assert best.tolist() == expected.argmax(-1).tolist()


def test_sums_of_two_tables_are_replayed_in_fp32_too(ops: CpuOps) -> None:
    ops = load(ops.name.removeprefix("cpu-"), torch.float32)
    table, places = torch.randn(9, 64), torch.randn(90, 64)
    ids, place, norm = torch.zeros(90, dtype=torch.int64), torch.zeros(90, dtype=torch.int32), torch.randn(64)
    replay = Replay(ops, [], 90)
    for _ in range(3):
        ids.random_(9)
        place.random_(90)
        found = run(replay, lambda: ops.rms_norm(ops.embedding(ids, table, (place, places)), norm, 1e-5), 90)
        with torch.inference_mode():
            assert torch.equal(found, ops.rms_norm(table[ids] + places[place], norm, 1e-5))


def test_changed_weights_are_seen(ops: CpuOps) -> None:
    weight, x = torch.randn(64, 32).bfloat16(), torch.randn(4, 32).bfloat16()
    replay = Replay(ops, [weight], 4)
    before = run(replay, lambda: ops.linear(x, weight)).clone()
    with torch.no_grad():
        weight.mul_(2)
    assert torch.equal(run(replay, lambda: ops.linear(x, weight)), before * 2)
    weight.data.mul_(2)  # unseen by autograd
    ops.weights_changed()
    assert torch.equal(run(replay, lambda: ops.linear(x, weight)), before * 4)
    weight.data = torch.zeros(64, 32).bfloat16()
    assert not run(replay, lambda: ops.linear(x, weight)).any()


def test_inputs_may_change_between_replays(ops: CpuOps) -> None:
    weight, x = torch.randn(64, 32).bfloat16(), torch.randn(4, 32).bfloat16()
    replay = Replay(ops, [weight], 4)
    for _ in range(3):
        x.normal_()
        with torch.inference_mode():
            expected = ops.linear(ops.silu_mul(ops.linear(x, weight)), weight)
        assert torch.equal(
            run(replay, lambda: ops.linear(ops.silu_mul(ops.linear(x, weight)), weight)), expected
        )


def test_the_memory_of_intermediates_is_used_again(ops: CpuOps) -> None:
    weight, x = torch.randn(64, 64).bfloat16(), torch.randn(4, 64).bfloat16()

    def deep() -> Tensor:
        y = x
        for _ in range(20):
            y = ops.linear(y, weight)
        return y

    replay = Replay(ops, [weight], 4)
    with torch.inference_mode():
        expected = deep()
    assert torch.equal(run(replay, deep), expected)
    assert torch.equal(run(replay, deep), expected)
    assert replay.memory_bytes <= 3 * 4 * 64 * 2


@pytest.mark.parametrize(
    "forward",
    [lambda ops, x, w: ops.linear(x, w) + 1, lambda ops, x, w: ops.linear(x.clone(), w)],
    ids=["arithmetic", "copy"],
)
def test_what_happens_outside_the_kernels_is_refused(
    ops: CpuOps, forward: Callable[[CpuOps, Tensor, Tensor], Tensor]
) -> None:
    weight, x = torch.randn(64, 32).bfloat16(), torch.randn(4, 32).bfloat16()
    replay = Replay(ops, [weight], 4)
    with pytest.raises(Unrecordable, match="outside the compiled kernels"):
        run(replay, lambda: forward(ops, x, weight))
    with torch.inference_mode():
        assert ops.linear(x, weight).shape == (4, 64)  # the kernels work as before


def test_a_forward_of_any_number_of_rows_is_recorded_once(ops: CpuOps) -> None:
    weight, x = torch.randn(64, 64).bfloat16(), torch.randn(90, 64).bfloat16()
    made = []

    def forward(rows: int) -> tuple[Tensor, ...]:
        made.append(rows)
        return ops.linear(x[:rows], weight), ops.silu_mul(ops.linear(ops.linear(x[:rows], weight), weight))

    replay = Replay(ops, [weight], 90)
    with torch.inference_mode():
        for rows in (90, 4, 33):
            x.normal_()
            found = replay.run_rows(rows, forward)
            recorded = len(made)
            for result, expected in zip(found, forward(rows), strict=True):
                assert torch.equal(result, expected)
            made.pop()
        assert len(made) == recorded == 4
        assert max(made) < 5


def test_numbers_that_do_not_follow_the_rows_in_proportion_are_refused(ops: CpuOps) -> None:
    weight, x = torch.randn(64, 64).bfloat16(), torch.randn(90, 64).bfloat16()
    replay = Replay(ops, [weight], 90)
    with torch.inference_mode(), pytest.raises(Unrecordable, match="proportion"):
        replay.run_rows(90, lambda rows: (ops.linear(x[: rows + 1], weight),))
    with torch.inference_mode(), pytest.raises(Unrecordable, match="other kernels"):
        replay.run_rows(90, lambda rows: (ops.linear(x, weight) if rows % 2 else ops.silu_mul(x),))


def test_plain_torch_is_not_recorded() -> None:
    with pytest.raises(Unrecordable, match="stock"):
        Replay(StockOps(), [], 4)


def test_old_recordings_make_room(ops: CpuOps, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replays, "MOST_RECORDINGS", 2)
    weight, x = torch.randn(64, 32).bfloat16(), torch.randn(4, 32).bfloat16()
    replay = Replay(ops, [weight], 4)
    with torch.inference_mode():
        expected = ops.linear(x, weight)
        for key in (1, 2, 3, 1, 2, 3):
            assert torch.equal(replay.run(key, 4, lambda: (ops.linear(x, weight),))[0], expected)


def test_a_sealed_model_has_the_same_bits_and_keeps_its_matrices_packed_only(ops: CpuOps) -> None:
    model = Llama(CONFIG, ops).eval()
    model.init_weights(3)
    ids = torch.arange(40)
    with torch.inference_mode():
        expected = model(ids, packed([40]))
    model.seal()
    ops.weights_changed()
    with torch.inference_mode():
        assert torch.equal(model(ids, packed([40])), expected)
    assert all(
        layer.down.is_meta and layer.down.shape == (CONFIG.width, CONFIG.ffn) for layer in model.layers
    )
    with pytest.raises(TypeError, match="meta"):
        model.layers[0].down.float().numpy()  # values that are not there are never made up
