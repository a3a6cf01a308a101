"""The Triton kernels: every one computes its rows in an order that the width alone decides. Order: contract.md.

M rows, N columns, K inner width, H row width, D head size, G query heads per key/value head. Numbers are bf16 in
memory and fp32 in registers. Launched by `triton.py`, always with fused multiply-add of separate operations off.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

# Triton's interpreter takes the bits of bf16 for whole numbers in tl.dot, sums as its BLAS likes, and rounds fp32 to
# bf16 towards zero: there, the three functions below do it as a GPU does.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
ROWS = 64  # rows of a tile of the matrix products: one tensor core instruction, whatever the batch


@triton.jit
def dot(a, b):
    """A product of two bf16 tiles, in fp32."""
    if INTERPRETED:
        return tl.sum(a.to(tl.float32)[:, :, None] * b.to(tl.float32)[None, :, :], axis=1)
    return tl.dot(a, b)


@triton.jit
def add_dot(total, a, b):
    """The same, added to what is there by the tensor cores."""
    if INTERPRETED:
        return total + tl.sum(a.to(tl.float32)[:, :, None] * b.to(tl.float32)[None, :, :], axis=1)
    return tl.dot(a, b, total)


@triton.jit
def rounded(x):
    """fp32 to bf16, to nearest even."""
    if INTERPRETED:
        bits = x.to(tl.int32, bitcast=True)
        x = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return x.to(tl.bfloat16)


@triton.jit
def linear(
    x, w, y, bias, residual, rows, experts, M, N, K, DIVIDE,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, GROUPED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y = x Wᵀ (+ bias) (+ residual): one chain over K in steps of BLOCK_K for each output, one rounding.

    GROUPED: `rows` names the rows of each tile (-1 none), `experts` its matrix; row r reads x[r // DIVIDE].
    """
    tile, n_N = tl.program_id(1), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_M = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    if GROUPED:
        m_M = tl.load(rows + m_M)
        w += tl.load(experts + tile).to(tl.int64) * N * K
        seen_M = m_M >= 0
    else:
        seen_M = m_M < M
    k_K = tl.arange(0, BLOCK_K)
    x_MK = x + (m_M // DIVIDE).to(tl.int64)[:, None] * K + k_K[None, :]
    w_KN = w + n_N.to(tl.int64)[None, :] * K + k_K[:, None]
    sum_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        inside_K = start + k_K < K
        a_MK = tl.load(x_MK + start, mask=seen_M[:, None] & inside_K[None, :], other=0.0)
        b_KN = tl.load(w_KN + start, mask=inside_K[:, None] & (n_N < N)[None, :], other=0.0)
        sum_MN = add_dot(sum_MN, a_MK, b_KN)
    inside_MN = seen_M[:, None] & (n_N < N)[None, :]
    at_MN = m_M.to(tl.int64)[:, None] * N + n_N[None, :]
    if HAS_BIAS:
        sum_MN += tl.load(bias + n_N, mask=n_N < N, other=0.0).to(tl.float32)[None, :]
    if HAS_RESIDUAL:
        sum_MN += tl.load(residual + at_MN, mask=inside_MN, other=0.0).to(tl.float32)
    if y.dtype.element_ty == tl.float32:
        tl.store(y + at_MN, sum_MN, mask=inside_MN)
    else:
        tl.store(y + at_MN, rounded(sum_MN), mask=inside_MN)


@triton.jit
def weighted_sum(y, weight, residual, out, A, H, BLOCK: tl.constexpr):
    """Residual + the sum over a token's A rows of y, in their order, each times its weight; one rounding."""
    t = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for a in range(0, A):
        total += tl.load(y + (t * A + a) * H + h, mask=h < H, other=0.0) * tl.load(weight + t * A + a)
    total += tl.load(residual + t * H + h, mask=h < H, other=0.0).to(tl.float32)
    tl.store(out + t * H + h, rounded(total), mask=h < H)


@triton.jit
def gather(table, index, out, COUNT, H, BLOCK: tl.constexpr):
    """Rows of a table; NaN where the index is not there."""
    row, h = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = tl.load(index + row)
    inside = tl.minimum(tl.maximum(at, 0), COUNT - 1)
    value = tl.load(table + inside * H + h, mask=h < H, other=0.0)
    if inside != at:
        value = tl.full((BLOCK,), float("nan"), value.dtype)
    tl.store(out + row * H + h, value, mask=h < H)


@triton.jit
def norm(
    x, w, b, y, STRIDE, START, H, eps,
    CENTRED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """RMS norm, or layer norm if CENTRED, of part `program 1` of each row, H wide, the first at START."""
    at = tl.program_id(0).to(tl.int64) * STRIDE + START + tl.program_id(1) * H
    h = tl.arange(0, BLOCK)
    value = tl.load(x + at + h, mask=h < H, other=0.0).to(tl.float32)
    if CENTRED:
        value = tl.where(h < H, value - tl.sum(value, axis=0) / H, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(value * value, axis=0) / H + eps)
    result = value * scale * tl.load(w + h, mask=h < H, other=0.0).to(tl.float32)
    if CENTRED:
        result += tl.load(b + h, mask=h < H, other=0.0).to(tl.float32)
    tl.store(y + at + h, rounded(result), mask=h < H)


@triton.jit
def silu_mul(x, y, F, BLOCK: tl.constexpr):
    """silu(gate) · up of rows that hold both side by side."""
    row, f = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(x + row * 2 * F + f, mask=f < F, other=0.0).to(tl.float32)
    up = tl.load(x + row * 2 * F + F + f, mask=f < F, other=0.0).to(tl.float32)
    tl.store(y + row * F + f, rounded(gate / (1.0 + tl.exp(-gate)) * up), mask=f < F)


@triton.jit
def gelu(x, y, COUNT, BLOCK: tl.constexpr):
    """The tanh form of GELU, as x / (1 + exp(-2u))."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < COUNT, other=0.0).to(tl.float32)
    double_u = value * (1.5957691216057308 + 0.07135481627159836 * (value * value))
    tl.store(y + at, rounded(value / (1.0 + tl.exp(-double_u))), mask=at < COUNT)


@triton.jit
def route(logits, expert, weight, E, TOP, NORMALISE: tl.constexpr, BLOCK: tl.constexpr):
    """Softmax of one row, then its TOP largest, the smaller index first among equals."""
    t, e = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    x = tl.load(logits + t * E + e, mask=e < E, other=float("-inf"))
    power = tl.exp(x - tl.max(x, axis=0))
    p = tl.where(e < E, power / tl.sum(power, axis=0), -1.0)
    total = 0.0
    left = p
    for _ in range(0, TOP):
        best = tl.max(left, axis=0)
        left = tl.where(e == tl.min(tl.where(left == best, e, BLOCK), axis=0), -2.0, left)
        total += best
    left = p
    for a in range(0, TOP):
        best = tl.max(left, axis=0)
        index = tl.min(tl.where(left == best, e, BLOCK), axis=0)
        index = tl.where(index < BLOCK, index, a)  # a row that is not finite
        left = tl.where(e == index, -2.0, left)
        tl.store(expert + t * TOP + a, index)
        if NORMALISE:
            best = best / total
        tl.store(weight + t * TOP + a, best)


@triton.jit
def logprobs(logits, ids, out, V, BLOCK: tl.constexpr):
    """Log softmax of one fp32 row at an id: 0 for the id -1, NaN beyond the row."""
    t, v = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    largest_B = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(0, V, BLOCK):
        inside = start + v < V
        largest_B = tl.maximum(
            largest_B, tl.load(logits + t * V + start + v, mask=inside, other=float("-inf"))
        )
    largest = tl.max(largest_B, axis=0)
    sum_B = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        inside = start + v < V
        x = tl.load(logits + t * V + start + v, mask=inside, other=float("-inf"))
        sum_B += tl.exp(x - largest)
    id = tl.load(ids + t)
    inside = tl.minimum(tl.maximum(id, 0), V - 1)
    picked = tl.load(logits + t * V + inside)
    value = tl.where(inside == id, picked, float("nan")) - (largest + tl.log(tl.sum(sum_B, axis=0)))
    tl.store(out + t, tl.where(id == -1, 0.0, value))


@triton.jit
def argmax(logits, out, V, COUNT, BLOCK: tl.constexpr):
    """First index of the maximum of the first COUNT columns; -1 if one of them is NaN or it is not finite."""
    t, v = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    best_B = tl.full((BLOCK,), float("-inf"), tl.float32)
    index_B = tl.zeros((BLOCK,), tl.int64)
    wrong_B = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, COUNT, BLOCK):
        x = tl.load(logits + t * V + start + v, mask=start + v < COUNT, other=float("-inf"))
        wrong_B = wrong_B | (x != x).to(tl.int32)
        better = x > best_B
        best_B = tl.where(better, x, best_B)
        index_B = tl.where(better, (start + v).to(tl.int64), index_B)
    best = tl.max(best_B, axis=0)
    first = tl.min(tl.where(best_B == best, index_B, V), axis=0)
    finite = (tl.abs(best) < float("inf")) & (tl.max(wrong_B, axis=0) == 0)
    tl.store(out + t, tl.where(finite, first, -1))


@triton.jit
def write_heads(
    qkv, q, keys, values, cosines, sines, sequence, position, table, P,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr,
    ROTATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rotate one head of one token; a query goes to q, a key and a value to their page."""
    t, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d, HALF = tl.arange(0, BLOCK), D // 2
    source = qkv + t * (HEADS + 2 * KV_HEADS) * D + head * D
    low = tl.load(source + d, mask=d < HALF, other=0.0)
    high = tl.load(source + HALF + d, mask=d < HALF, other=0.0)
    at = tl.load(position + t)
    if ROTATE:  # noqa: SIM102 - known before the kernel is compiled
        if head < HEADS + KV_HEADS:
            c = tl.load(cosines + at.to(tl.int64) * HALF + d, mask=d < HALF, other=0.0)
            s = tl.load(sines + at.to(tl.int64) * HALF + d, mask=d < HALF, other=0.0)
            a, b = low.to(tl.float32), high.to(tl.float32)
            low, high = rounded(a * c - b * s), rounded(b * c + a * s)
    if head < HEADS:
        target = q + (t * HEADS + head) * D
    else:
        page = tl.load(table + tl.load(sequence + t).to(tl.int64) * P + at // PAGE).to(tl.int64)
        if head < HEADS + KV_HEADS:
            target = keys + ((page * KV_HEADS + head - HEADS) * PAGE + at % PAGE) * D
        else:
            target = values + ((page * KV_HEADS + head - HEADS - KV_HEADS) * PAGE + at % PAGE) * D
    tl.store(target + d, low, mask=d < HALF)
    tl.store(target + HALF + d, high, mask=d < HALF)


@triton.jit
def attention(
    q, keys, values, out, starts, counts, sequence, position, table, P, scale, WINDOW,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A tile of adjacent tokens of one sequence, with all query heads of one key/value head.

    A row's pages come in order from the first that it sees; pages of which it sees nothing change nothing in it.
    """
    kv, G = tl.program_id(1), HEADS // KV_HEADS
    start, count = tl.load(starts + tl.program_id(0)), tl.load(counts + tl.program_id(0))
    r, d, j = tl.arange(0, ROWS), tl.arange(0, BLOCK_D), tl.arange(0, PAGE)
    first = tl.load(position + start)
    last = first + count - 1
    pos_R = first + r // G
    live_R = r // G < count
    at_R = ((start + r // G).to(tl.int64) * HEADS + kv * G + r % G) * D
    q_RD = tl.load(q + at_R[:, None] + d[None, :], mask=live_R[:, None] & (d < D)[None, :], other=0.0)
    m_R = tl.full((ROWS,), float("-inf"), tl.float32)
    l_R = tl.zeros((ROWS,), tl.float32)
    acc_RD = tl.zeros((ROWS, BLOCK_D), tl.float32)
    row = table + tl.load(sequence + start).to(tl.int64) * P
    for page in range(tl.maximum(first - WINDOW + 1, 0) // PAGE, last // PAGE + 1):
        base = (tl.load(row + page).to(tl.int64) * KV_HEADS + kv) * PAGE * D
        key_J = page * PAGE + j
        inside_JD = (key_J <= last)[:, None] & (d < D)[None, :]
        k_JD = tl.load(keys + base + j[:, None] * D + d[None, :], mask=inside_JD, other=0.0)
        v_JD = tl.load(values + base + j[:, None] * D + d[None, :], mask=inside_JD, other=0.0)
        s_RJ = dot(q_RD, tl.trans(k_JD)) * scale
        seen_RJ = (key_J[None, :] <= pos_R[:, None]) & (key_J[None, :] > pos_R[:, None] - WINDOW)
        s_RJ = tl.where(seen_RJ, s_RJ, float("-inf"))
        new_R = tl.maximum(m_R, tl.max(s_RJ, axis=1))
        safe_R = tl.where(new_R == float("-inf"), 0.0, new_R)  # nothing seen yet
        p_RJ = tl.where(seen_RJ, tl.exp(s_RJ - safe_R[:, None]), 0.0)
        c_R = tl.exp(m_R - safe_R)
        l_R = l_R * c_R + tl.sum(p_RJ, axis=1)
        acc_RD = acc_RD * c_R[:, None] + dot(rounded(p_RJ), v_JD)
        m_R = new_R
    o_RD = acc_RD / tl.where(live_R, l_R, 1.0)[:, None]
    tl.store(out + at_R[:, None] + d[None, :], rounded(o_RD), mask=live_R[:, None] & (d < D)[None, :])
