"""Gradients, loss and optimizer of the compiled kernels against torch in fp32."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lapis.kernels import cpu, stock, variants
from lapis.kernels.batch import packed
from lapis.kernels.gradient import keep_gradient
from lapis.kernels.ops import Matrix, Ops, Rope
from lapis.kernels.torch_steps import orthogonal

USABLE = variants.status().usable
BF16 = torch.bfloat16
ALL_OPS = [pytest.param(variant, id=variant) for variant in (*USABLE, "stock")]


def make(name: str) -> Ops:
    return stock.StockOps() if name == "stock" else cpu.load(name)


@pytest.fixture(params=ALL_OPS)
def ops(request: pytest.FixtureRequest) -> Ops:
    return make(request.param)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    torch.manual_seed(0)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def rows(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape) * scale).bfloat16()


def check_gradients(
    compiled: Callable[..., Tensor], judge: Callable[..., Tensor], *inputs: Tensor, cosine: float = 0.99
) -> None:
    """Gradients of all inputs point where those of the judge in fp32 do, and are as long."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    judges = [x.float().requires_grad_() for x in inputs]
    y, want = compiled(*leaves), judge(*judges)
    g = rows(*y.shape) if y.dim() else torch.tensor(0.5)
    y.backward(g.to(y.dtype))
    want.backward(g.float())
    for leaf, other in zip(leaves, judges, strict=True):
        assert leaf.grad is not None
        assert other.grad is not None
        mine, theirs = leaf.grad.float().flatten(), other.grad.flatten()
        assert F.cosine_similarity(mine, theirs, 0).item() >= cosine
        assert mine.norm().item() == pytest.approx(theirs.norm().item(), rel=0.02)


def test_gradients_of_linear(ops: Ops) -> None:
    check_gradients(ops.linear, lambda x, w, r: F.linear(x, w) + r, rows(70, 64), rows(96, 64), rows(70, 96))
    check_gradients(lambda x, w: ops.linear(x, w, fp32=True), F.linear, rows(5, 64), rows(96, 64))
    check_gradients(
        lambda x, w, b: ops.linear(x, w, bias_N=b), F.linear, rows(70, 64), rows(90, 64), rows(90)
    )


def test_gradients_of_row_ops(ops: Ops) -> None:
    x = rows(200, 64)
    check_gradients(
        lambda x, w: ops.rms_norm(x, w, 1e-5), lambda x, w: F.rms_norm(x, (64,), w, 1e-5), x, rows(64)
    )
    check_gradients(ops.silu_mul, lambda x: F.silu(x[:, :32]) * x[:, 32:], x)
    check_gradients(
        lambda x, w, b: ops.layer_norm(x, w, b, 1e-5),
        lambda x, w, b: F.layer_norm(x, (64,), w, b, 1e-5),
        *(x + 1, rows(64), rows(64)),
        cosine=0.999,
    )
    check_gradients(ops.gelu, lambda x: F.gelu(x, approximate="tanh"), x, cosine=0.999)
    ids = torch.randint(0, 40, (200,))
    check_gradients(lambda w: ops.embedding(ids, w), lambda w: F.embedding(ids, w), rows(50, 64))
    places = torch.randint(0, 30, (200,), dtype=torch.int32)
    check_gradients(
        lambda w, p: ops.embedding(ids, w, (places, p)),
        lambda w, p: F.embedding(ids, w) + F.embedding(places.long(), p),
        *(rows(50, 64), rows(30, 64)),
    )


@pytest.mark.parametrize("whole", [False, True])
def test_gradients_of_head_norm(ops: Ops, whole: bool) -> None:
    heads, kv_heads, size = 4, 2, 16
    weights = rows(heads * size if whole else size), rows(kv_heads * size if whole else size)
    check_gradients(
        lambda x, q, k: ops.head_norm(x, q, k, heads, kv_heads, size, 1e-5),
        lambda x, q, k: stock.StockOps().head_norm(x, q, k, heads, kv_heads, size, 1e-5),
        *(rows(150, (heads + 2 * kv_heads) * size), *weights),
        cosine=0.999,
    )


@pytest.mark.parametrize(
    ("head_size", "window", "rotated"),
    [
        (16, None, True),
        (32, 33, False),
        (48, 40, True),
        (64, None, True),
        (64, 1, True),
        (80, None, False),
        (112, 64, True),
        (128, None, True),
        (256, 90, True),
    ],
)
def test_gradients_of_attention(ops: Ops, head_size: int, window: int | None, rotated: bool) -> None:
    lengths, rope = [1, 33, 64, 7, 70, 130], Rope.make(head_size, 1e4, 256) if rotated else None
    batch = packed(lengths)

    def judge(qkv: Tensor) -> Tensor:
        return stock.StockOps().attention(qkv, packed(lengths), 0, 4, 2, head_size, rope, window=window)

    def compiled(qkv: Tensor) -> Tensor:
        return ops.attention(qkv, batch, 0, 4, 2, head_size, rope, window=window)

    check_gradients(compiled, judge, rows(sum(lengths), 8 * head_size), cosine=0.999)


@pytest.mark.parametrize(("vocabulary", "weighted"), [(90, False), (91, True)])
def test_gradients_of_the_loss(
    ops: Ops, vocabulary: int, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name in ((cpu, "CHUNK_LOGITS"), (cpu, "CHUNK_ROWS"), (stock, "CHUNK")):
        monkeypatch.setattr(module, name, 24)  # several chunks
    targets = torch.randint(0, vocabulary, (70,))
    targets[::9] = -1
    weights = torch.rand(70) if weighted else torch.ones(70)

    def judge(x: Tensor, w: Tensor) -> Tensor:
        losses = F.cross_entropy(F.linear(x, w), targets, ignore_index=-1, reduction="none")
        return (losses * weights).sum()

    def compiled(x: Tensor, w: Tensor) -> Tensor:
        return ops.linear_cross_entropy(x, w, targets, weights if weighted else None)

    x, w = rows(70, 64), rows(vocabulary, 64, scale=0.2)
    assert compiled(x, w).item() == pytest.approx(judge(x.float(), w.float()).item(), rel=1e-3)
    check_gradients(compiled, judge, x, w)


def test_gradients_of_logprobs(ops: Ops) -> None:
    ids, logits = torch.randint(0, 50, (6,)), torch.randn(6, 50)

    def judge(logits: Tensor) -> Tensor:
        return logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]

    check_gradients(lambda logits: ops.logprobs(logits, ids), judge, logits)


@pytest.mark.parametrize("variant", USABLE)
def test_the_loss_has_the_bits_of_serving(variant: str) -> None:
    ops, x, w = cpu.load(variant), rows(40, 64), rows(500, 64, scale=0.2)
    targets = torch.randint(0, 500, (40,))
    served = ops.logprobs(ops.linear(x, w, fp32=True), targets)
    expected = torch.tensor(math.fsum((-served).tolist()), dtype=torch.float32)
    assert torch.equal(ops.linear_logprobs(x, w, targets), served)
    assert torch.equal(ops.linear_cross_entropy(x, w, targets), expected)
    assert torch.equal(ops.linear_cross_entropy(x.requires_grad_(), w, targets).detach(), expected)


def test_a_frozen_weight_passes_the_same_gradient_on_and_gets_none(ops: Ops) -> None:
    x, inner, table = rows(70, 64), rows(64, 64), rows(96, 64)
    targets = torch.randint(0, 96, (70,))
    found = []
    for frozen in (False, True):
        leaf = x.clone().requires_grad_()
        weights = [weight.clone().requires_grad_(not frozen) for weight in (inner, table)]
        ops.linear_cross_entropy(ops.linear(leaf, weights[0]), weights[1], targets).backward()
        assert [weight.grad is None for weight in weights] == [frozen, frozen]
        found.append(leaf.grad)
    assert torch.equal(*found)


@pytest.mark.parametrize("variant", USABLE)
def test_activations_are_made_again_for_the_gradient_and_not_kept(variant: str) -> None:
    ops = cpu.load(variant)
    gelu, silu_mul, w = rows(70, 64), rows(70, 128), rows(96, 64)
    check_gradients(
        lambda x, w: ops.linear(ops.gelu(x), w),
        lambda x, w: F.linear(F.gelu(x, approximate="tanh"), w),
        gelu,
        w,
    )
    check_gradients(
        lambda x, w: ops.linear(ops.silu_mul(x), w),
        lambda x, w: F.linear(F.silu(x[:, :64]) * x[:, 64:], w),
        silu_mul,
        w,
    )
    made = ops.gelu(gelu.requires_grad_())
    place = weakref.ref(made)
    y = ops.linear(made, w.requires_grad_())
    del made
    assert place() is None
    y.sum().backward()


def test_ignored_targets_cost_nothing(ops: Ops) -> None:
    x, w = rows(4, 64).requires_grad_(), rows(50, 64).requires_grad_()
    loss = ops.linear_cross_entropy(x, w, torch.full((4,), -1))
    loss.backward()
    assert loss.item() == 0
    assert x.grad is not None
    assert x.grad.count_nonzero() == 0
    assert ops.linear_logprobs(x.detach(), w.detach(), torch.full((4,), -1)).tolist() == [0.0] * 4


@pytest.mark.parametrize("variant", USABLE)
def test_gradients_are_added_in_place_where_a_buffer_is(variant: str) -> None:
    ops, ids = cpu.load(variant), torch.randint(0, 64, (30,))
    table, norm, w = rows(64, 64, scale=0.1), rows(64), rows(64, 64, scale=0.1)

    def gradients(with_buffer: bool) -> list[Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in (table, norm, w)]
        buffers = [torch.zeros_like(leaf) for leaf in leaves]
        if with_buffer:
            for leaf, buffer in zip(leaves, buffers, strict=True):
                keep_gradient(leaf, buffer)
        x = ops.linear(ops.rms_norm(ops.embedding(ids, leaves[0]), leaves[1], 1e-5), leaves[2])
        ops.linear_cross_entropy(x, leaves[2], ids).backward()
        grads = [leaf.grad for leaf in leaves if leaf.grad is not None]
        assert not with_buffer or all(a is b for a, b in zip(grads, buffers, strict=True))
        return grads

    for returned, added in zip(gradients(False), gradients(True), strict=True):
        difference = (returned.float() - added.float()).norm()
        assert difference.item() < 0.01 * returned.float().norm().item()


@pytest.mark.parametrize("variant", USABLE)
def test_gradients_do_not_depend_on_the_number_of_threads(variant: str) -> None:
    ops, lengths, rope = cpu.load(variant), [70, 1, 129], Rope.make(32, 1e4, 256)
    batch, ids = packed(lengths), torch.randint(0, 96, (200,))
    weights = [rows(96, 64, scale=0.2), rows(64), rows(192, 64), rows(64, 64, scale=0.2)]
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        table, norm, qkv, out = (tensor.clone().requires_grad_() for tensor in weights)
        x = ops.embedding(ids, table)
        o = ops.attention(ops.linear(ops.rms_norm(x, norm, 1e-5), qkv), batch, 0, 2, 2, 32, rope)
        ops.linear_cross_entropy(ops.linear(o, out, x), table, ids).backward()
        results.append([leaf.grad for leaf in (table, norm, qkv, out)])
    for other in results[1:]:
        assert all(
            a is not None and b is not None and torch.equal(a, b)
            for a, b in zip(results[0], other, strict=True)
        )


@pytest.mark.parametrize("n", [1, 31, 4100])
def test_adamw_is_that_of_torch(ops: Ops, n: int) -> None:
    master = torch.randn(n)
    judge = torch.nn.Parameter(master.clone())
    optimizer = torch.optim.AdamW([judge], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    weight, grad = master.bfloat16(), torch.zeros(n, dtype=BF16)
    first, second = torch.zeros(n), torch.zeros(n)
    for step in range(1, 6):
        grad.copy_(torch.randn(n))
        judge.grad = grad.float() * 0.5
        optimizer.step()
        ops.adamw(
            weight,
            grad,
            master,
            first,
            second,
            lr=1e-2,
            beta1=0.9,
            beta2=0.95,
            eps=1e-8,
            weight_decay=0.1,
            correction1=1 - 0.9**step,
            correction2=1 - 0.95**step,
            clip=0.5,
        )
        assert grad.count_nonzero() == 0
    assert torch.allclose(master, judge, rtol=1e-5, atol=1e-6)
    assert torch.equal(weight, master.bfloat16())


# wide, tall, square, of one block, and one whose sides the compiled kernel leaves to torch
MATRICES = [
    Matrix(64, 64, 160),
    Matrix(64 + 10240, 352, 64),
    Matrix(64 + 32768, 96, 96),
    Matrix(64 + 41984, 32, 32),
    Matrix(64 + 43008, 48, 40),
]
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def muon(ops: Ops, steps: int = 2) -> tuple[Tensor, ...]:
    """Weight, gradient, master and momentum after some steps over flat buffers that also hold other numbers."""
    random = torch.Generator().manual_seed(5)
    master = torch.randn(64 + 43008 + 48 * 40 + 64, generator=random)
    weight, grad, momentum = (
        master.bfloat16(),
        torch.zeros(master.shape, dtype=BF16),
        torch.zeros(master.shape),
    )
    for _ in range(steps):
        grad.copy_(torch.randn(master.shape, generator=random) * 1e-3)
        ops.muon(
            weight,
            grad,
            master,
            momentum,
            MATRICES,
            lr=0.1,
            beta=0.95,
            weight_decay=0.2,
            coefficients=COEFFICIENTS,
            iterations=5,
        )
    return weight, grad, master, momentum


def test_muon_is_the_plain_form_in_fp32(ops: Ops) -> None:
    random = torch.Generator().manual_seed(5)
    want = torch.randn(64 + 43008 + 48 * 40 + 64, generator=random)
    mean = torch.zeros_like(want)
    for _ in range(2):
        gradient = (torch.randn(want.shape, generator=random) * 1e-3).bfloat16().float()
        mean = 0.95 * mean + 0.05 * gradient
        update = 0.05 * gradient + 0.95 * mean
        for at in MATRICES:
            step = orthogonal(at.of(update), COEFFICIENTS, 5) * max(1, at.rows / at.columns) ** 0.5
            at.of(want).mul_(1 - 0.1 * 0.2).sub_(0.1 * step)
    weight, grad, master, momentum = muon(ops)
    torch.testing.assert_close(master, want, atol=6e-3, rtol=0)  # a step's elements are up to 0.06
    inside = slice(64, -64)
    assert torch.equal(weight[inside], master[inside].bfloat16())
    assert not grad[inside].any()
    torch.testing.assert_close(momentum[inside], mean[inside], atol=1e-9, rtol=1e-5)
    for outside in (slice(0, 64), slice(-64, None)):
        assert torch.equal(master[outside], want[outside])
        assert grad[outside].any()
        assert not momentum[outside].any()


def test_muons_step_has_singular_values_near_one(ops: Ops) -> None:
    random = torch.Generator().manual_seed(6)
    for at in (Matrix(0, 64, 64), Matrix(0, 128, 64), Matrix(0, 64, 128)):
        master = torch.zeros(at.rows * at.columns)
        grad = torch.randn(master.shape, generator=random).bfloat16()
        buffers = (master.bfloat16(), grad, master, torch.zeros_like(master))
        ops.muon(*buffers, [at], lr=1.0, beta=0.95, weight_decay=0.0, coefficients=COEFFICIENTS, iterations=5)
        values = torch.linalg.svdvals(at.of(master)) / max(1, at.rows / at.columns) ** 0.5
        assert (
            values.quantile(0.1) > 0.5
        )  # a random square matrix has some that are near zero, and stay small
        assert values.max() < 1.4


def test_muon_of_a_zero_gradient_only_decays(ops: Ops) -> None:
    at, master = Matrix(0, 32, 64), torch.ones(32 * 64)
    buffers = (master.bfloat16(), torch.zeros(master.shape, dtype=BF16), master, torch.zeros_like(master))
    ops.muon(*buffers, [at], lr=0.5, beta=0.95, weight_decay=0.5, coefficients=COEFFICIENTS, iterations=5)
    assert torch.equal(master, torch.full_like(master, 0.75))


def test_muon_has_the_same_bits_in_every_build_and_on_any_number_of_threads() -> None:
    results = []
    for variant in USABLE:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(
                torch.cat([tensor[: MATRICES[-1].start].float() for tensor in muon(cpu.load(variant))])
            )
    assert all(torch.equal(other, results[0]) for other in results[1:])


def test_squared_norm(ops: Ops) -> None:
    grad = rows(100_003)
    sums = set()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        sums.add(ops.squared_norm(grad))
    assert len(sums) == 1
    assert sums.pop() == pytest.approx(grad.double().square().sum().item(), rel=1e-5)
