"""Launches the Triton kernels on tensors of one device. No gradients here.

Dims as in ops.py; further A experts of a token, E experts, X heads times head size, R rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
from torch import Tensor

from lapis.kernels import triton_kernels as kernels
from lapis.kernels.batch import PAGE, AdapterPair, Batch, LayerCache
from lapis.kernels.ops import Rope
from lapis.kernels.triton_kernels import ROWS

BF16, FP32 = torch.bfloat16, torch.float32
BLOCK_K = 64  # steps of the chain over K, for every weight
FEW_ROWS = 256  # up to here the weights are what takes the time
VOCABULARY_BLOCK = 4096
EXACT = {"enable_fp_fusion": False}  # a product and a sum stay two operations wherever they are written
Sizes = tuple[int, int, int]  # heads, kv_heads, head_size


def linear(
    x_MK: Tensor,
    w_NK: Tensor,
    residual_MN: Tensor | None = None,
    fp32: bool = False,
    bias_N: Tensor | None = None,
) -> Tensor:
    """x Wᵀ (+ bias) (+ residual), one chain over K for each output."""
    (rows, inner), columns = x_MK.shape, w_NK.shape[0]
    y_MN = torch.empty(rows, columns, dtype=FP32 if fp32 else BF16, device=x_MK.device)
    _product(x_MK, w_NK, y_MN, (rows, columns, inner), residual_MN, bias_N)
    return y_MN


def experts(
    x_TH: Tensor,
    expert_TA: Tensor,
    weight_TA: Tensor,
    gate_up_ENH: Tensor,
    down_EHF: Tensor,
    residual_TH: Tensor,
) -> Tensor:
    """The rows of an expert in tiles of their own; the weighted sum in the order of A, the residual last."""
    (tokens, width), chosen = x_TH.shape, expert_TA.shape[1]
    pairs, groups = tokens * chosen, _groups(expert_TA, len(gate_up_ENH))
    joined = gate_up_ENH.shape[1]
    hidden_PF = torch.empty(pairs, joined, dtype=BF16, device=x_TH.device)
    _product(x_TH, gate_up_ENH, hidden_PF, (pairs, joined, width), groups=groups, divide=chosen)
    y_PH = torch.empty(pairs, width, dtype=FP32, device=x_TH.device)
    _product(silu_mul(hidden_PF), down_EHF, y_PH, (pairs, width, joined // 2), groups=groups)
    out_TH = torch.empty_like(residual_TH)
    weight_TA, residual_TH = weight_TA.contiguous(), residual_TH.contiguous()
    block = _block(width, 1024)
    kernels.weighted_sum[tokens, triton.cdiv(width, block)](
        y_PH, weight_TA, residual_TH, out_TH, chosen, width, BLOCK=block, **EXACT
    )
    return out_TH


def lora(y_TN: Tensor, x_TK: Tensor, pairs: Sequence[AdapterPair], adapter_T: Tensor) -> Tensor:
    """Adapter by adapter for all rows; each row keeps the result of its own."""
    for index, pair in enumerate(pairs):
        if pair is not None:
            a_RK, b_NR = (weight.to(x_TK.device).contiguous() for weight in pair)
            added_TN = linear(linear(x_TK, a_RK), b_NR, y_TN)
            y_TN = torch.where((adapter_T == index)[:, None], added_TN, y_TN)
    return y_TN


def route(logits_TE: Tensor, top: int, normalise: bool) -> tuple[Tensor, Tensor]:
    """Softmax, the `top` best experts, the smaller index first among equals."""
    tokens, count = logits_TE.shape
    expert_TA = torch.empty(tokens, top, dtype=torch.int32, device=logits_TE.device)
    weight_TA = torch.empty(tokens, top, dtype=FP32, device=logits_TE.device)
    kernels.route[tokens,](
        logits_TE.contiguous(),
        expert_TA,
        weight_TA,
        count,
        top,
        NORMALISE=normalise,
        BLOCK=_block(count),
        **EXACT,
    )
    return expert_TA, weight_TA


def gather(index_R: Tensor, table_CH: Tensor) -> Tensor:
    """Rows of a table; all NaN for an index that is not there."""
    y_RH = torch.empty(len(index_R), table_CH.shape[1], dtype=table_CH.dtype, device=table_CH.device)
    block = _block(table_CH.shape[1], 1024)
    kernels.gather[len(index_R), triton.cdiv(table_CH.shape[1], block)](
        table_CH.contiguous(), index_R.contiguous(), y_RH, *table_CH.shape, BLOCK=block
    )
    return y_RH


def rms_norm(x_TH: Tensor, w_H: Tensor, eps: float) -> Tensor:
    """x · (1 / sqrt(mean(x²) + eps)) · w."""
    return _norm(x_TH, w_H, None, eps, torch.empty_like(x_TH), 0, 1)


def layer_norm(x_TH: Tensor, w_H: Tensor, b_H: Tensor, eps: float) -> Tensor:
    """((x - mean) · (1 / sqrt(mean of squares + eps))) · w + b."""
    return _norm(x_TH, w_H, b_H, eps, torch.empty_like(x_TH), 0, 1)


def head_norm(qkv_TW: Tensor, q_norm: Tensor, k_norm: Tensor, sizes: Sizes, eps: float) -> Tensor:
    """rms_norm of each query and key part; a part is as wide as its weight."""
    heads, kv_heads, head_size = sizes
    y_TW, query, key = qkv_TW.clone(), heads * head_size, kv_heads * head_size
    _norm(qkv_TW, q_norm, None, eps, y_TW, 0, query // q_norm.numel())
    return _norm(qkv_TW, k_norm, None, eps, y_TW, query, key // k_norm.numel())


def silu_mul(x_T2F: Tensor) -> Tensor:
    """silu(gate) · up."""
    tokens, width = x_T2F.shape[0], x_T2F.shape[1] // 2
    y_TF = torch.empty(tokens, width, dtype=BF16, device=x_T2F.device)
    block = _block(width, 1024)
    kernels.silu_mul[tokens, triton.cdiv(width, block)](x_T2F, y_TF, width, BLOCK=block, **EXACT)
    return y_TF


def gelu(x_TF: Tensor) -> Tensor:
    """x / (1 + exp(-2u)), u = sqrt(2/pi) (x + 0.044715 x³)."""
    y_TF = torch.empty_like(x_TF)
    kernels.gelu[triton.cdiv(x_TF.numel(), 1024),](x_TF, y_TF, x_TF.numel(), BLOCK=1024, **EXACT)
    return y_TF


def logprobs(logits_TV: Tensor, ids_T: Tensor) -> Tensor:
    """Log softmax picked at ids: 0 where the id is -1, NaN where it is beyond the row."""
    out_T = torch.empty(len(logits_TV), dtype=FP32, device=logits_TV.device)
    arguments = (logits_TV.contiguous(), ids_T.contiguous(), out_T, logits_TV.shape[1])
    kernels.logprobs[len(logits_TV),](*arguments, BLOCK=VOCABULARY_BLOCK, **EXACT)
    return out_T


def argmax(logits_TV: Tensor, count: int) -> Tensor:
    """Index of the first maximum among the first `count` of each row; -1 for a row that is not finite."""
    out_T = torch.empty(len(logits_TV), dtype=torch.int64, device=logits_TV.device)
    kernels.argmax[len(logits_TV),](
        logits_TV.contiguous(), out_T, logits_TV.shape[1], count, BLOCK=VOCABULARY_BLOCK
    )
    return out_T


def attention(
    qkv_TW: Tensor, batch: Batch, cache: LayerCache, sizes: Sizes, rope: Rope | None, window: int | None
) -> Tensor:
    """Rotated keys and values go to their pages, then each tile of queries walks the pages that it sees."""
    heads, kv_heads, head_size = sizes
    group, device = heads // kv_heads, qkv_TW.device
    assert group <= ROWS, f"at most {ROWS} query heads share a key/value head"
    assert rope is None or rope.cos_PD2.shape[1] * 2 == head_size, "the tables cover whole heads"
    where = (batch.sequence_T, batch.position_T, batch.page_table_SP, batch.page_table_SP.shape[1])
    shape = {"HEADS": heads, "KV_HEADS": kv_heads, "D": head_size, "PAGE": PAGE}
    q_TX = torch.empty(batch.tokens, heads * head_size, dtype=BF16, device=device)
    tables = (qkv_TW, qkv_TW) if rope is None else (rope.cos_PD2, rope.sin_PD2)
    kernels.write_heads[batch.tokens, heads + 2 * kv_heads](
        qkv_TW,
        q_TX,
        *cache,
        *tables,
        *where,
        **shape,
        ROTATE=rope is not None,
        BLOCK=_block(head_size // 2),
        **EXACT,
    )
    o_TX = torch.empty_like(q_TX)
    starts, counts = _tiles(batch, ROWS // group)
    kernels.attention[len(starts), kv_heads](
        q_TX,
        *cache,
        o_TX,
        starts,
        counts,
        *where,
        head_size**-0.5,
        window or 1 << 30,
        **shape,
        ROWS=ROWS,
        BLOCK_D=_block(head_size),
        num_warps=4,
        **EXACT,
    )
    return o_TX


def chunks(tokens: int, vocabulary: int) -> Iterator[slice]:
    """Rows whose logits exist at a time."""
    rows = max(256, (1 << 26) // vocabulary)
    return (slice(start, min(start + rows, tokens)) for start in range(0, tokens, rows))


def _product(
    x: Tensor,
    w: Tensor,
    y: Tensor,
    sizes: Sizes,
    residual: Tensor | None = None,
    bias: Tensor | None = None,
    groups: tuple[Tensor, Tensor] | None = None,
    divide: int = 1,
) -> None:
    """Rows x columns x inner, in tiles whose shape changes the speed and not the sums."""
    rows, columns, inner = sizes
    assert x.dtype is w.dtype is BF16 and x.is_contiguous() and w.is_contiguous()
    assert residual is None or (residual.dtype is BF16 and residual.is_contiguous())
    few = rows <= FEW_ROWS or groups is not None
    block_m = ROWS if few else 2 * ROWS
    block_n = (16 if columns < 8192 else 32) if few else 128
    if groups is not None and rows > FEW_ROWS:
        block_n = 64
    index, expert = groups if groups is not None else (x, x)
    row_tiles = len(expert) if groups is not None else triton.cdiv(rows, block_m)
    kernels.linear[triton.cdiv(columns, block_n), row_tiles](
        x,
        w,
        y,
        x if bias is None else bias,
        x if residual is None else residual,
        index,
        expert,
        rows,
        columns,
        inner,
        divide,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        GROUPED=groups is not None,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=BLOCK_K,
        num_warps=4 if few else 8,
        num_stages=5 if few else 4,
        **EXACT,
    )


def _groups(expert_TA: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Which pairs (token, choice) each tile of ROWS computes, -1 for none, and the tile's expert.

    The number of tiles depends on the shape alone, so that nothing waits for the device.
    """
    flat_P = expert_TA.reshape(-1).long()
    pairs, device = len(flat_P), flat_P.device
    tiles = min(pairs, count) + pairs // ROWS
    order_P = flat_P.argsort(stable=True)
    size_E = torch.zeros(count, dtype=torch.int64, device=device)
    size_E.scatter_add_(0, flat_P, torch.ones_like(flat_P))
    last_E = ((size_E + ROWS - 1) // ROWS).cumsum(0)  # one past each expert's last tile
    first_E = last_E - (size_E + ROWS - 1) // ROWS
    sorted_P = flat_P[order_P]
    place_P = torch.arange(pairs, device=device) - (size_E.cumsum(0) - size_E)[sorted_P]
    rows = torch.full((tiles * ROWS,), -1, dtype=torch.int32, device=device)
    rows[first_E[sorted_P] * ROWS + place_P] = order_P.to(torch.int32)
    tile = torch.searchsorted(last_E, torch.arange(tiles, device=device), right=True)
    return rows, tile.clamp(max=count - 1).to(torch.int32)


def _norm(x: Tensor, w: Tensor, b: Tensor | None, eps: float, y: Tensor, start: int, parts: int) -> Tensor:
    assert x.dtype is w.dtype is BF16 and x.is_contiguous()
    block = _block(w.numel())
    arguments = (x, w, w if b is None else b, y, x.shape[1], start, w.numel(), eps)
    warps = min(16, max(1, block // 512))
    kernels.norm[len(x), parts](*arguments, CENTRED=b is not None, BLOCK=block, num_warps=warps, **EXACT)
    return y


def _tiles(batch: Batch, most: int) -> tuple[Tensor, Tensor]:
    """First token and number of tokens of each tile: a span cut into pieces, or every token alone."""
    key = f"triton {most}"
    if key not in batch.prepared:
        spans = batch.spans or tuple((token, token + 1) for token in range(batch.tokens))
        cut = [(at, min(most, end - at)) for start, end in spans for at in range(start, end, most)]
        both = torch.tensor(cut, dtype=torch.int32).reshape(-1, 2).T.contiguous()
        batch.prepared[key] = tuple(both.to(batch.sequence_T.device))
    starts, counts = batch.prepared[key]
    return starts, counts


def _block(width: int, most: int = 1 << 20) -> int:
    """The power of two that a row of this width is read in."""
    return min(most, max(16, 1 << (width - 1).bit_length()))
