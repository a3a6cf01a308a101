"""The Triton kernels: on a GPU where there is one, else in Triton's interpreter, which shows what they compute.

Each op beside plain torch in fp32, a row alone beside the same row in a batch, a whole model beside itself. What only a
GPU can show is in tests/integration/test_gpu.py.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the Triton kernels need the gpu extra: pip install 'lapis[gpu]'")

from lapis.inference.engine import LocalEngine
from lapis.inference.request import Request, SamplingParams
from lapis.kernels import triton
from lapis.kernels.batch import PAGE, Batch, packed
from lapis.kernels.ops import Rope
from lapis.kernels.stock import StockOps
from lapis.kernels.triton_launch import FEW_ROWS
from lapis.model.families import build
from lapis.model.manifest import Source
from lapis.model.weights import read_model, write_model
from tests import small_models

OPS = triton.load()
DEVICE = OPS.device
STOCK = StockOps(dtype=torch.float32)
SHAPES = [(3, 64, 48), (70, 96, 80), (FEW_ROWS + 5, 80, 160)]


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(DEVICE, torch.bfloat16)


def close(found: Tensor, expected: Tensor) -> None:
    """Equal but for one rounding to bf16."""
    torch.testing.assert_close(found.float(), expected.float(), rtol=2**-8, atol=2e-3)


def test_a_row_alone_has_the_bits_of_the_row_in_any_batch() -> None:
    assert OPS.bit_exact
    assert OPS.name == "cuda-triton"


@pytest.mark.parametrize(("rows", "inner", "columns"), SHAPES)
def test_linear(rows: int, inner: int, columns: int) -> None:
    x, w, bias, residual = random(rows, inner), random(columns, inner), random(columns), random(rows, columns)
    y = OPS.linear(x, w, residual, bias_N=bias)
    close(y, x.float() @ w.float().T + bias.float() + residual.float())
    logits = OPS.linear(x, w, fp32=True)
    torch.testing.assert_close(logits, x.float() @ w.float().T, rtol=1e-5, atol=1e-4)
    for t in (0, rows // 2, rows - 1):
        row = slice(t, t + 1)
        assert torch.equal(OPS.linear(x[row], w, residual[row], bias_N=bias), y[row])


def test_what_is_done_to_single_rows() -> None:
    x, w, b = random(9, 96), random(96, seed=1), random(96, seed=2)
    pairs = {
        "rms_norm": (OPS.rms_norm(x, w, 1e-5), STOCK.rms_norm(x.float(), w.float(), 1e-5)),
        "layer_norm": (
            OPS.layer_norm(x, w, b, 1e-5),
            STOCK.layer_norm(x.float(), w.float(), b.float(), 1e-5),
        ),
        "silu_mul": (OPS.silu_mul(x), STOCK.silu_mul(x.float())),
        "gelu": (OPS.gelu(x), STOCK.gelu(x.float())),
    }
    for found, expected in pairs.values():
        close(found, expected)
    assert torch.equal(OPS.rms_norm(x[4:5], w, 1e-5), OPS.rms_norm(x, w, 1e-5)[4:5])
    ids = torch.tensor([2, 0, 99, 8])
    rows = OPS.embedding(ids, x)
    assert torch.equal(rows[[0, 1, 3]], x[[2, 0, 8]])
    assert rows[2].isnan().all()


@pytest.mark.parametrize("whole", [False, True])
def test_head_norm(whole: bool) -> None:
    qkv, q, k = random(5, 128), random(64 if whole else 16), random(32 if whole else 16, seed=1)
    found = OPS.head_norm(qkv, q, k, 4, 2, 16, 1e-6)
    close(found, STOCK.head_norm(qkv.float(), q.float(), k.float(), 4, 2, 16, 1e-6))
    assert torch.equal(found[:, 96:], qkv[:, 96:])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter's numpy
def test_logprobs_and_argmax() -> None:
    logits = random(4, 5000).float()
    logits[1, 7] = logits[1, 4900] = 50.0
    logits[2, 3], logits[3, 9] = math.nan, math.inf
    ids = torch.tensor([4999, -1, 0, 5000])
    found = OPS.logprobs(logits, ids)
    torch.testing.assert_close(found[0], logits[0].log_softmax(-1)[4999], rtol=1e-5, atol=1e-5)
    assert found[1] == 0
    assert found[2:].isnan().all()
    assert OPS.argmax(logits).tolist() == [int(logits[0].argmax()), 7, -1, -1]
    assert OPS.argmax(logits, 3).tolist()[2] == int(logits[2, :3].argmax())
    assert torch.equal(OPS.logprobs(logits[:1], ids[:1]), found[:1])


@pytest.mark.parametrize("tokens", [1, 40])
def test_experts_and_their_choice(tokens: int) -> None:
    logits = random(tokens, 6).float()
    logits[0] = 0.0  # all equal: the smaller index first
    expert, weight = OPS.route(logits, 2, True)
    assert expert[0].tolist() == [0, 1]
    same, expected = STOCK.route(logits, 2, True)
    assert torch.equal(expert, same)
    torch.testing.assert_close(weight, expected)
    x, gate_up, down, residual = random(tokens, 32), random(6, 96, 32), random(6, 32, 48), random(tokens, 32)
    y = OPS.experts(x, expert, weight, gate_up * 0.2, down * 0.2, residual)
    gate_up, down = (gate_up * 0.2).float(), (down * 0.2).float()
    wide = STOCK.experts(x.float(), expert, weight, gate_up, down, residual.float())
    torch.testing.assert_close(y.float(), wide, rtol=0.02, atol=0.05)
    alone = OPS.experts(x[-1:], expert[-1:], weight[-1:], gate_up.bfloat16(), down.bfloat16(), residual[-1:])
    assert torch.equal(alone, y[-1:])


def test_adapters_change_their_own_rows_only() -> None:
    x, y, a, b = random(5, 64), random(5, 48), random(4, 64), random(48, 4)
    which = torch.tensor([-1, 1, 0, 1, -1], dtype=torch.int32)
    found = OPS.lora(y, x, [None, (a, b)], which)
    assert torch.equal(found[[0, 2, 4]], y[[0, 2, 4]])
    small = (x.float() @ a.float().T).bfloat16().float()
    close(found[[1, 3]], (y.float() + small @ b.float().T)[[1, 3]])
    assert torch.equal(OPS.lora(y[3:4], x[3:4], [None, (a, b)], which[3:4]), found[3:4])


def paged(qkv: Tensor, cut: list[int], rope: Rope | None, window: int | None) -> Tensor:
    """One sequence computed in pieces over pages that lie in no order."""
    pages = -(-len(qkv) // PAGE)
    table = torch.arange(pages, dtype=torch.int32).flip(0)[None].contiguous() + 1
    cache = OPS.new_cache(pages + 1, 1, 32)
    for part in cache:
        part.fill_(math.nan)  # what lies there before it is written does not matter
    outputs, start = [], 0
    for count in cut:
        position = torch.arange(start, start + count, dtype=torch.int32)
        batch = Batch(torch.zeros(count, dtype=torch.int32), position, table, [cache], ((0, count),))
        outputs.append(OPS.attention(qkv[start : start + count], batch, 0, 2, 1, 32, rope, window=window))
        start += count
    return torch.cat(outputs)


@pytest.mark.parametrize("window", [None, 12])
def test_attention_in_chunks_is_attention_at_once(window: int | None) -> None:
    qkv = random(43, 4 * 32)
    rope = Rope.make(32, 1e4, 128, device=DEVICE)
    whole = OPS.attention(qkv, packed([43]), 0, 2, 1, 32, rope, window=window)
    wide = STOCK.attention(qkv.float(), packed([43]).on(DEVICE), 0, 2, 1, 32, rope, window=window)
    torch.testing.assert_close(whole.float(), wide, rtol=0.02, atol=0.02)
    assert torch.equal(paged(qkv, [11, 28, 1, 1, 1, 1], rope, window), whole)
    beside = OPS.attention(
        torch.cat([random(7, 128), qkv]), packed([7, 43]), 0, 2, 1, 32, rope, window=window
    )
    assert torch.equal(beside[7:], whole)


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
def test_gradients_are_those_of_plain_torch(name: str) -> None:
    shape = small_models.families()[name]
    shape = replace(shape, layers=1, width=64, heads=2, kv_heads=2 if name == "gpt2" else 1, ffn=64)
    if shape.experts:
        shape = replace(shape, experts=3, expert_ffn=32)
    ids = torch.tensor([5, 9, 200, 31, 7, 250, 3])
    targets = torch.tensor([9, 200, 31, -1, 250, 3, 1])
    found = []
    for ops in (OPS, StockOps()):
        model = build(shape, ops)
        model.load_state_dict(small_models.random_state(shape))
        hidden = model.hidden(ids, packed([4, 3]))
        head = model.head_weight
        assert isinstance(head, Tensor)
        loss = ops.linear_cross_entropy(hidden, head, targets.to(ops.device))
        loss.backward()  # type: ignore[no-untyped-call]
        norms = [float(p.grad.float().norm()) for p in model.parameters() if p.grad is not None]
        found.append([float(loss.detach()), *norms])
    assert found[0] == pytest.approx(found[1], rel=0.05, abs=0.02)


def test_an_engine_serves_what_was_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAPIS_KERNELS", "triton")
    shape = small_models.config(layers=1, width=64, heads=2, kv_heads=1, ffn=64)
    state = small_models.random_state(shape)
    write_model(tmp_path / "m", shape, state, small_models.tokenizer(), source=Source("run", "test"))
    loaded = read_model(tmp_path / "m")
    assert loaded.model.ops is OPS
    requests = [
        Request(str(n), list(range(3 + n, 3 + n + length)), SamplingParams(2, seed=n, logprobs=0))
        for n, length in enumerate((33, 2))
    ]
    with closing(LocalEngine(loaded, "tiny", step_tokens=32)) as engine:
        assert engine.bit_exact
        outputs = [stream.result() for stream in [engine.submit(request) for request in requests]]
    for request, output in zip(requests, outputs, strict=True):
        text = [*request.prompt_ids, *output.token_ids]
        ids = torch.tensor(text)
        logprobs = OPS.logprobs(loaded.model(ids, packed([len(text)])), ids.roll(-1)).tolist()
        served = [token.logprob for token in output.logprobs]
        assert served == logprobs[len(request.prompt_ids) - 1 : -1]


COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lapis.kernels import triton_kernels as kernels

FLAGS = {"HAS_BIAS": True, "HAS_RESIDUAL": True, "GROUPED": True, "BLOCK_M": 64, "BLOCK_N": 16, "BLOCK_K": 64,
         "BLOCK": 128, "CENTRED": True, "NORMALISE": True, "HEADS": 8, "KV_HEADS": 2, "D": 64, "PAGE": 32,
         "ROTATE": True, "ROWS": 64, "BLOCK_D": 64}
KINDS = {"weight": "*fp32", "logits": "*fp32", "cosines": "*fp32", "sines": "*fp32", "eps": "fp32", "scale": "fp32",
         "rows": "*i32", "experts": "*i32", "expert": "*i32", "index": "*i64", "ids": "*i64", "sequence": "*i32",
         "position": "*i32", "table": "*bf16", "starts": "*i32", "counts": "*i32"}
PER_KERNEL = {"write_heads": {"table": "*i32"}, "attention": {"table": "*i32"}, "argmax": {"out": "*i64"},
              "logprobs": {"out": "*fp32"}, "weighted_sum": {"y": "*fp32"}}
NAMES = ("linear", "weighted_sum", "gather", "norm", "silu_mul", "gelu", "route", "logprobs", "argmax",
         "write_heads", "attention")

def compiled(name, arch, changes, **options):
    function = getattr(kernels, name)
    values = {**FLAGS, **changes}
    kinds = {**KINDS, **PER_KERNEL.get(name, {})}
    constants = {(i,): values[p.name] for i, p in enumerate(function.params) if p.is_constexpr}
    signature = {p.name: "constexpr" if p.is_constexpr else
                 kinds.get(p.name, "i32" if p.name.isupper() else "*bf16") for p in function.params}
    aligned = {(i,): [["tt.divisibility", 16]] for i, p in enumerate(function.params)
               if signature[p.name].startswith("*") or p.name in ("K", "N")}
    source = ASTSource(function, signature, constants, aligned)
    target = GPUTarget("cuda", arch, 32)
    return triton.compile(source, target=target, options={"enable_fp_fusion": False, **options}).asm["ptx"]

for arch in (80, 90):
    for name in NAMES if arch == 90 else ():
        compiled(name, arch, {})
    few = compiled("linear", arch, {"GROUPED": False}, num_warps=4, num_stages=5)
    many = compiled("linear", arch, {"GROUPED": False, "BLOCK_M": 128, "BLOCK_N": 128}, num_warps=8, num_stages=4)
    instruction = "wgmma.mma_async" if arch == 90 else "mma.sync"
    for text in (few, many, compiled("attention", arch, {}, num_warps=4)):
        kinds = {word for word in ("wgmma.mma_async", "mma.sync") if word + ".sync" in text or word + ".al" in text}
        assert kinds == {instruction}, (arch, kinds)
"""


def test_the_kernels_compile_for_gpus_with_one_kind_of_product(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
