"""The compiled kernels on tensors: checks, work buffers, packed weights. No autograd.

Dims as in ops.py; further X heads times head size, Q query heads, B blocks of rows.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Sequence
from ctypes import byref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lapis.kernels.batch import PAGE, Batch, LayerCache
from lapis.kernels.cpu_library import COLUMNS, NORM_STEP, PANEL_ROWS, SUM_ROWS, CAdamW, CBatch, CMuon, bind
from lapis.kernels.memory import LargePages
from lapis.kernels.ops import Matrix, Rope
from lapis.kernels.quantized import GROUP, Quantized

BF16, FP32 = torch.bfloat16, torch.float32
Sizes = tuple[int, int, int]  # query heads, key/value heads, head size


@dataclass
class _Packed:
    """A weight in the linear kernel's layout, and what tells whether it still is that weight."""

    owner: weakref.ref[Tensor]
    data: Tensor
    pointer: int  # of data
    version: int = -1
    source: int = 0  # pointer of the weight
    generation: int = -1


@dataclass
class Descriptor:
    """What C needs to know of a Batch, made once per batch."""

    tokens: CBatch
    reference: Any  # byref(tokens)
    spans_S2: Tensor  # int64
    private: LayerCache | None = None


class Kernels:
    """One build's kernels. Rows are contiguous bf16, their widths multiples of 16 (inputs of linear: of 2)."""

    dtype = BF16  # of rows and weights
    _pack_name = "pack"
    _gather_add_name = "gather_add"

    def __init__(self, library: ctypes.CDLL) -> None:
        self._c = bind(library)
        self._packed: dict[int, _Packed] = {}
        self._generation = 0
        self._sealed = LargePages()
        self._lock = threading.Lock()

    # ---- linear

    def linear(
        self,
        x_TK: Tensor,
        w_NK: Tensor,
        residual_TN: Tensor | None,
        fp32: bool,
        bias_N: Tensor | None = None,
    ) -> Tensor:
        """x Wᵀ (+ bias) (+ residual) in bf16, or the unrounded sums."""
        tokens, inner = x_TK.shape
        columns = w_NK.shape[0]
        assert x_TK.dtype is BF16 and x_TK.is_contiguous() and w_NK.shape[1] == inner and inner % 2 == 0
        y_TN = torch.empty(tokens, columns, dtype=FP32 if fp32 else BF16)
        bias, residual = addend(bias_N, (columns,)), addend(residual_TN, y_TN.shape)
        packed = self._pack(w_NK)
        self._c.linear(x_TK.data_ptr(), tokens, inner, packed, columns, bias, residual, y_TN.data_ptr(), fp32)
        return y_TN

    def linear_quantized(
        self,
        x_TK: Tensor,
        w_NK: Quantized,
        residual_TN: Tensor | None,
        fp32: bool,
        bias_N: Tensor | None = None,
    ) -> Tensor:
        """As linear, the weight in 8 or 4 bits, each group of inputs rounded to 8."""
        (tokens, inner), (columns, width) = x_TK.shape, w_NK.shape
        assert x_TK.dtype is BF16 and x_TK.is_contiguous() and inner == width
        y_TN = torch.empty(tokens, columns, dtype=FP32 if fp32 else BF16)
        bias, residual = addend(bias_N, (columns,)), addend(residual_TN, y_TN.shape)
        work = torch.empty(tokens, -(-inner // GROUP), GROUP + 8, dtype=torch.uint8)
        minimums = None if w_NK.minimums is None else w_NK.minimums.data_ptr()
        self._c.linear_quantized(
            x_TK.data_ptr(),
            tokens,
            inner,
            w_NK.values.data_ptr(),
            w_NK.scales.data_ptr(),
            minimums,
            columns,
            bias,
            residual,
            y_TN.data_ptr(),
            fp32,
            work.data_ptr(),
        )
        return y_TN

    def transposed(self, w_NK: Tensor) -> Tensor:
        """A weight as `linear_backward` reads it. Nothing keeps it: all of them would be as large as the model."""
        assert w_NK.dtype is BF16 and w_NK.is_contiguous()
        columns, inner = w_NK.shape
        packed = torch.empty(-(-inner // COLUMNS) * COLUMNS * (columns + columns % 2), dtype=BF16)
        self._c.pack_rows(w_NK.data_ptr(), packed.data_ptr(), columns, inner)
        return packed

    def linear_backward(
        self, g_TN: Tensor, w_NK: Tensor, dx_TK: Tensor, transposed: Tensor | None = None
    ) -> None:
        """Fills dx = g W; the transposed weight is made here if it is not given."""
        tokens, columns = g_TN.shape
        if columns % 2:  # the kernel takes its inner width in pairs
            torch.mm(g_TN, w_NK.detach(), out=dx_TK)
            return
        assert g_TN.dtype is BF16 and g_TN.is_contiguous() and dx_TK.is_contiguous()
        packed = self.transposed(w_NK) if transposed is None else transposed
        pointers = (g_TN.data_ptr(), packed.data_ptr(), dx_TK.data_ptr())
        self._c.linear(
            pointers[0], tokens, columns, pointers[1], w_NK.shape[1], None, None, pointers[2], False
        )

    def add_weight_gradient(self, g_TN: Tensor, x_TK: Tensor, dw_NK: Tensor) -> None:
        """dw += gᵀ x."""
        (tokens, columns), inner = g_TN.shape, x_TK.shape[1]
        assert g_TN.dtype is BF16 and g_TN.is_contiguous() and x_TK.is_contiguous() and dw_NK.is_contiguous()
        work = torch.empty((tokens + 1) // 2 * 2 * (columns + PANEL_ROWS + inner + COLUMNS), dtype=BF16)
        pointers = (tensor.data_ptr() for tensor in (g_TN, x_TK, dw_NK, work))
        self._c.linear_weight_gradient(*pointers, tokens, columns, inner)

    def add_bias_gradient(self, g_TN: Tensor, db_N: Tensor) -> None:
        """db += the sum of the rows of g."""
        assert g_TN.dtype is BF16 and g_TN.is_contiguous() and db_N.dtype is BF16 and db_N.is_contiguous()
        self._c.linear_bias_gradient(g_TN.data_ptr(), db_N.data_ptr(), *g_TN.shape)

    def forget(self, w_NK: Tensor) -> None:
        """Free the packed copy of a weight, which training changes before it is used much more.

        All copies together are as large as the model; to make one anew costs a thousandth of its product.
        """
        self._packed.pop(id(w_NK), None)

    def weights_changed(self) -> None:
        """Every packed copy is renewed, in place, when it is next used."""
        self._generation += 1

    def sealed(self, w_NK: Tensor) -> Tensor:
        """A stand-in that only linear can use, for a weight that will not change: its values exist packed alone."""
        self._pack(w_NK)
        packed = self._packed[id(w_NK)]
        stand_in = torch.nn.Parameter(
            torch.empty(w_NK.shape, dtype=self.dtype, device="meta"), requires_grad=False
        )
        key = id(stand_in)
        owner: weakref.ref[Tensor] = weakref.ref(stand_in, lambda _: self._packed.pop(key, None))
        version, source = weight_version(stand_in), stand_in.data_ptr()
        data = self._sealed.copy(packed.data)
        self._packed[key] = _Packed(owner, data, data.data_ptr(), version, source, self._generation)
        return stand_in

    def _pack(self, w_NK: Tensor) -> int:
        """Pointer to a weight in tiles of the linear kernel; renewed if the weight changed."""
        packed = self._packed.get(id(w_NK))
        if (
            packed is not None
            and packed.version == weight_version(w_NK)
            and packed.source == w_NK.data_ptr()
            and packed.generation == self._generation
        ):
            return packed.pointer
        with self._lock:
            return self._repack(w_NK)

    def _repack(self, w_NK: Tensor) -> int:
        assert w_NK.dtype is self.dtype and w_NK.is_contiguous()
        key = id(w_NK)
        columns, inner = w_NK.shape
        size = -(-columns // COLUMNS) * COLUMNS * inner
        packed = self._packed.get(key)
        if w_NK.is_meta:
            assert packed is not None, "a sealed weight was packed when it was sealed"
            packed.generation = self._generation
            return packed.pointer
        if packed is None or packed.data.numel() != size:
            data = torch.empty(size, dtype=self.dtype)
            owner = weakref.ref(w_NK, lambda _: self._packed.pop(key, None))
            packed = self._packed[key] = _Packed(owner, data, data.data_ptr())
        version, source, generation = weight_version(w_NK), w_NK.data_ptr(), self._generation
        getattr(self._c, self._pack_name)(source, packed.pointer, columns, inner)
        packed.version, packed.source, packed.generation = version, source, generation
        return packed.pointer

    # ---- single rows

    def gather(self, index_R: Tensor, table_CH: Tensor) -> Tensor:
        """Rows of a table; all NaN for an index that is not there."""
        assert index_R.dtype is torch.int64 and index_R.is_contiguous() and table_CH.is_contiguous()
        y_RH = torch.empty(*index_R.shape, *table_CH.shape[1:], dtype=table_CH.dtype)
        row_bytes = table_CH.stride(0) * table_CH.element_size()
        pointers = (table_CH.data_ptr(), len(table_CH), index_R.data_ptr(), y_RH.data_ptr())
        self._c.gather(*pointers, index_R.numel(), row_bytes)
        return y_RH

    def gather_add(self, index_R: Tensor, table_CH: Tensor, place_R: Tensor, other_PH: Tensor) -> Tensor:
        """Rows of a table plus rows of another by int32 places, rounded once; NaN where one is not there."""
        assert (
            index_R.dtype is torch.int64 and place_R.dtype is torch.int32 and index_R.shape == place_R.shape
        )
        assert table_CH.dtype is other_PH.dtype is self.dtype and table_CH.shape[1] == other_PH.shape[1]
        assert all(tensor.is_contiguous() for tensor in (index_R, place_R, table_CH, other_PH))
        y_RH = torch.empty(len(index_R), table_CH.shape[1], dtype=self.dtype)
        first = (table_CH.data_ptr(), len(table_CH), index_R.data_ptr())
        second = (other_PH.data_ptr(), len(other_PH), place_R.data_ptr())
        getattr(self._c, self._gather_add_name)(*first, *second, y_RH.data_ptr(), *y_RH.shape)
        return y_RH

    def rms_norm(self, x_TH: Tensor, w_H: Tensor, eps: float) -> Tensor:
        """x · (1 / sqrt(mean(x²) + eps)) · w."""
        assert x_TH.dtype is BF16 and x_TH.is_contiguous() and w_H.dtype is BF16 and x_TH.shape[1] % 16 == 0
        y_TH = torch.empty_like(x_TH)
        self._c.rms_norm(x_TH.data_ptr(), w_H.data_ptr(), y_TH.data_ptr(), *x_TH.shape, eps)
        return y_TH

    def rms_norm_backward(self, x_TH: Tensor, w_H: Tensor, g_TH: Tensor, dw_H: Tensor, eps: float) -> Tensor:
        """Returns dx and adds to dw."""
        tokens, width = x_TH.shape
        dx_TH = torch.empty_like(x_TH)
        partial_BH = torch.empty(-(-tokens // SUM_ROWS), width, dtype=FP32)
        pointers = (tensor.data_ptr() for tensor in (x_TH, w_H, g_TH, dx_TH, dw_H, partial_BH))
        self._c.rms_norm_backward(*pointers, tokens, width, eps)
        return dx_TH

    def silu_mul(self, x_T2F: Tensor) -> Tensor:
        """silu(gate) · up."""
        tokens, width = x_T2F.shape[0], x_T2F.shape[1] // 2
        assert x_T2F.dtype is BF16 and x_T2F.is_contiguous() and width % 16 == 0
        y_TF = torch.empty(tokens, width, dtype=BF16)
        self._c.silu_mul(x_T2F.data_ptr(), y_TF.data_ptr(), tokens, width)
        return y_TF

    def silu_mul_backward(self, x_T2F: Tensor, g_TF: Tensor) -> Tensor:
        """Gradient of gate and up, joined as they came."""
        dx_T2F = torch.empty_like(x_T2F)
        self._c.silu_mul_backward(x_T2F.data_ptr(), g_TF.data_ptr(), dx_T2F.data_ptr(), *g_TF.shape)
        return dx_T2F

    def layer_norm(self, x_TH: Tensor, w_H: Tensor, b_H: Tensor, eps: float) -> Tensor:
        """((x - mean) · (1 / sqrt(mean of squares + eps))) · w + b."""
        assert (
            x_TH.dtype is w_H.dtype is b_H.dtype is BF16 and x_TH.is_contiguous() and x_TH.shape[1] % 16 == 0
        )
        y_TH = torch.empty_like(x_TH)
        pointers = (tensor.data_ptr() for tensor in (x_TH, w_H, b_H, y_TH))
        self._c.layer_norm(*pointers, *x_TH.shape, eps)
        return y_TH

    def layer_norm_backward(
        self, x_TH: Tensor, w_H: Tensor, g_TH: Tensor, dw_H: Tensor, db_H: Tensor, eps: float
    ) -> Tensor:
        """Returns dx and adds to dw and db."""
        tokens, width = x_TH.shape
        dx_TH = torch.empty_like(x_TH)
        partial_B2H = torch.empty(-(-tokens // SUM_ROWS), 2, width, dtype=FP32)
        pointers = (tensor.data_ptr() for tensor in (x_TH, w_H, g_TH, dx_TH, dw_H, db_H, partial_B2H))
        self._c.layer_norm_backward(*pointers, tokens, width, eps)
        return dx_TH

    def gelu(self, x_TF: Tensor) -> Tensor:
        """x / (1 + exp(-2u)), u = sqrt(2/pi) (x + 0.044715 x³)."""
        assert x_TF.dtype is BF16 and x_TF.is_contiguous() and x_TF.shape[1] % 16 == 0
        y_TF = torch.empty_like(x_TF)
        self._c.gelu(x_TF.data_ptr(), y_TF.data_ptr(), *x_TF.shape)
        return y_TF

    def gelu_backward(self, x_TF: Tensor, g_TF: Tensor) -> Tensor:
        """Gradient of x."""
        dx_TF = torch.empty_like(x_TF)
        self._c.gelu_backward(x_TF.data_ptr(), g_TF.data_ptr(), dx_TF.data_ptr(), *x_TF.shape)
        return dx_TF

    def head_norm(self, qkv_TW: Tensor, q_norm: Tensor, k_norm: Tensor, sizes: Sizes, eps: float) -> Tensor:
        """rms_norm of each query and key part; a part is as wide as its weight."""
        assert qkv_TW.dtype is q_norm.dtype is k_norm.dtype is BF16 and qkv_TW.is_contiguous()
        y_TW = torch.empty_like(qkv_TW)
        pointers = (tensor.data_ptr() for tensor in (qkv_TW, q_norm, k_norm, y_TW))
        self._c.head_norm(*pointers, len(qkv_TW), *parts_of(q_norm, k_norm, sizes), eps)
        return y_TW

    def head_norm_backward(
        self,
        saved: tuple[Tensor, Tensor, Tensor],
        g_TW: Tensor,
        dq: Tensor,
        dk: Tensor,
        sizes: Sizes,
        eps: float,
    ) -> Tensor:
        """Returns the gradient of the rows and adds to those of the weights; `saved` holds rows and weights."""
        qkv_TW, q_norm, k_norm = saved
        tokens, dqkv_TW = len(qkv_TW), torch.empty_like(qkv_TW)
        partial = torch.empty(-(-tokens // SUM_ROWS), q_norm.numel() + k_norm.numel(), dtype=FP32)
        tensors = (qkv_TW, q_norm, k_norm, g_TW, dqkv_TW, dq, dk, partial)
        pointers = (tensor.data_ptr() for tensor in tensors)
        self._c.head_norm_backward(*pointers, tokens, *parts_of(q_norm, k_norm, sizes), eps)
        return dqkv_TW

    def embedding_backward(self, ids_T: Tensor, g_TH: Tensor, dw_VH: Tensor) -> None:
        """Adds to dw: for each id the fp32 sum of its rows of g, in the order of T."""
        order_T = ids_T.argsort(stable=True)
        pointers = (tensor.data_ptr() for tensor in (ids_T, order_T, g_TH, dw_VH))
        self._c.embedding_backward(*pointers, *g_TH.shape)

    def logprobs(self, logits_TV: Tensor, ids_T: Tensor) -> Tensor:
        """Log softmax picked at ids: 0 where the id is -1, NaN where it is beyond the row."""
        assert logits_TV.dtype is FP32 and logits_TV.is_contiguous() and ids_T.dtype is torch.int64
        ids_T = ids_T.contiguous()
        out_T = torch.empty(ids_T.shape, dtype=FP32)
        self._c.logprobs(logits_TV.data_ptr(), *logits_TV.shape, ids_T.data_ptr(), out_T.data_ptr())
        return out_T

    def argmax(self, logits_TV: Tensor, count: int) -> Tensor:
        """Index of the first maximum among the first `count` of each row; -1 for a row that is not finite."""
        assert logits_TV.dtype is FP32 and logits_TV.is_contiguous() and 0 < count <= logits_TV.shape[1]
        out_T = torch.empty(logits_TV.shape[0], dtype=torch.int64)
        self._c.argmax(logits_TV.data_ptr(), *logits_TV.shape, count, out_T.data_ptr())
        return out_T

    def cross_entropy(
        self, logits_TV: Tensor, targets_T: Tensor, weights_T: Tensor, losses_T: Tensor
    ) -> Tensor:
        """Fills the losses and returns the gradient of logits, which are overwritten."""
        assert targets_T.dtype is torch.int64 and weights_T.dtype is losses_T.dtype is FP32
        grad_TV = torch.empty(logits_TV.shape, dtype=BF16)
        pointers = (tensor.data_ptr() for tensor in (targets_T, weights_T, grad_TV, losses_T))
        self._c.cross_entropy(logits_TV.data_ptr(), *logits_TV.shape, *pointers)
        return grad_TV

    # ---- attention

    def new_cache(self, pages: int, kv_heads: int, head_size: int, int8: bool = False) -> LayerCache:
        """Keys as [page][head][dim pair][key][2], values as [page][head][key pair][dim][2].

        In int8: [page][head][dim][key] and [page][head][key][dim], each followed by the keys' scales in fp32.
        """
        if int8:
            shape = (pages, kv_heads, (head_size + 4) * PAGE)
            return LayerCache(torch.empty(shape, dtype=torch.int8), torch.empty(shape, dtype=torch.int8))
        # not zeroed: a page is cleared with its first key, and takes no memory before
        keys = torch.empty(pages, kv_heads, head_size // 2, PAGE, 2, dtype=BF16)
        return LayerCache(keys, torch.empty(pages, kv_heads, PAGE // 2, head_size, 2, dtype=BF16))

    def attention(
        self,
        qkv_TW: Tensor,
        batch: Batch,
        layer: int,
        sizes: Sizes,
        rope: Rope | None,
        window: int | None = None,
        k_TX: Tensor | None = None,
        lse_TQ: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Output and rotated queries; rotated keys and log denominators are filled in if given."""
        heads, kv_heads, head_size = sizes
        assert qkv_TW.dtype is self.dtype and qkv_TW.is_contiguous()
        assert qkv_TW.shape == (batch.tokens, (heads + 2 * kv_heads) * head_size)
        descriptor, cache = describe(batch, rope), self._cache(batch, layer, sizes, rope)
        assert rope is None or rope.cos_PD2.shape[1] * 2 == head_size, "the tables cover whole heads"
        assert window is None or window > 0
        o_TX, q_TX = (torch.empty(batch.tokens, heads * head_size, dtype=self.dtype) for _ in range(2))
        inputs = (descriptor.reference, qkv_TW.data_ptr(), *sizes, window or 0, *tables_of(rope))
        outputs = [None if tensor is None else tensor.data_ptr() for tensor in (q_TX, k_TX, o_TX, lse_TQ)]
        self._attend(inputs, cache, outputs)
        return o_TX, q_TX

    def _attend(self, inputs: Sequence[Any], cache: LayerCache, outputs: Sequence[int | None]) -> None:
        keys, values = cache.keys.data_ptr(), cache.values.data_ptr()
        self._c.attention(*inputs, keys, values, cache.keys.dtype is torch.int8, *outputs)

    def _cache(self, batch: Batch, layer: int, sizes: Sizes, rope: Rope | None) -> LayerCache:
        """A layer's pages: the batch's own, or private ones that all layers share."""
        if batch.caches is not None:
            return batch.caches[layer]
        descriptor = describe(batch, rope)
        if descriptor.private is None:
            descriptor.private = self.new_cache(batch.private_pages, sizes[1], sizes[2])
        return descriptor.private

    def attention_backward(
        self,
        batch: Batch,
        saved: tuple[Tensor, ...],
        g_TX: Tensor,
        sizes: Sizes,
        rope: Rope | None,
        window: int | None = None,
    ) -> Tensor:
        """Gradient of the joined rows; `saved` holds q, k, qkv, o and log denominators of the forward."""
        spans_S2 = describe(batch, rope).spans_S2
        dqkv_TW = torch.empty_like(saved[2])
        inputs = (tensor.data_ptr() for tensor in (batch.position_T, *saved, g_TX))
        pointers = (*inputs, *tables_of(rope), dqkv_TW.data_ptr())
        self._c.attention_backward(spans_S2.data_ptr(), len(spans_S2), *pointers, *sizes, window or 0)
        return dqkv_TW

    # ---- optimizer

    def adamw(self, buffers: tuple[Tensor, ...], numbers: CAdamW) -> None:
        """One pass over weight, gradient, master weight and both moments."""
        for buffer, dtype in zip(buffers, (BF16, BF16, FP32, FP32, FP32), strict=True):
            assert buffer.dtype is dtype and buffer.is_contiguous() and buffer.numel() == buffers[0].numel()
        self._c.adamw(*(buffer.data_ptr() for buffer in buffers), buffers[0].numel(), byref(numbers))

    def muon(self, buffers: tuple[Tensor, ...], matrices: Sequence[Matrix], numbers: CMuon) -> None:
        """Each matrix by one thread, the largest first. Raises MemoryError where the threads get no work space."""
        for buffer, dtype in zip(buffers, (BF16, BF16, FP32, FP32), strict=True):
            assert buffer.dtype is dtype and buffer.is_contiguous()
            assert all(at.start + at.rows * at.columns <= buffer.numel() for at in matrices)
        ordered = sorted(
            matrices, key=lambda at: at.rows * at.columns * min(at.rows, at.columns), reverse=True
        )
        table_N3 = torch.tensor([(at.start, at.rows, at.columns) for at in ordered], dtype=torch.int64)
        pointers = (buffer.data_ptr() for buffer in (*buffers, table_N3))
        if self._c.muon(*pointers, len(ordered), byref(numbers)):
            raise MemoryError("no work space for the Newton-Schulz iteration")

    def squared_norm(self, grad: Tensor) -> float:
        """Steps of fixed size in fp32 lanes, then in double in order."""
        assert grad.dtype is BF16 and grad.is_contiguous()
        partial = torch.empty(-(-grad.numel() // NORM_STEP), dtype=torch.float64)
        return float(self._c.squared_norm(grad.data_ptr(), grad.numel(), partial.data_ptr()))


def addend(x: Tensor | None, shape: Sequence[int], dtype: torch.dtype = BF16) -> int | None:
    """Pointer to what is added to finished sums, if anything is."""
    if x is None:
        return None
    assert x.dtype is dtype and x.is_contiguous() and x.shape == tuple(shape)
    return x.data_ptr()


def parts_of(q_norm: Tensor, k_norm: Tensor, sizes: Sizes) -> tuple[int, int, int, int, int]:
    """Number and width of the normed query parts, of the key parts, and the width of the values."""
    heads, kv_heads, head_size = sizes
    query, key = q_norm.numel(), k_norm.numel()
    assert query in (head_size, heads * head_size) and key in (head_size, kv_heads * head_size)
    assert head_size % 16 == 0
    return heads * head_size // query, query, kv_heads * head_size // key, key, kv_heads * head_size


def weight_version(weight: Tensor) -> int:
    """How often autograd saw the weight change; weights made in inference mode have no count."""
    return 0 if weight.is_inference() else weight._version


def tables_of(rope: Rope | None) -> tuple[int | None, int | None]:
    """Pointers to cosines and sines, if heads are rotated."""
    return (None, None) if rope is None else (rope.cos_PD2.data_ptr(), rope.sin_PD2.data_ptr())


def describe(batch: Batch, rope: Rope | None) -> Descriptor:
    """What C needs to know of a batch, made at its first use."""
    found: Descriptor | None = batch.prepared.get("cpu")
    if found is not None:
        return found
    table = batch.page_table_SP
    if batch.tokens:
        last = int(batch.position_T.max())
        if rope is not None:
            assert last < len(rope.cos_PD2), (
                f"position {last} lies beyond the {len(rope.cos_PD2)} rotary rows"
            )
        assert last < table.shape[1] * PAGE, f"position {last} lies beyond {table.shape[1]} pages"
    pointers = (tensor.data_ptr() for tensor in (batch.sequence_T, batch.position_T, table))
    tokens = CBatch(*pointers, batch.tokens, table.shape[1])
    spans_S2 = torch.tensor(batch.spans, dtype=torch.int64).reshape(-1, 2)
    batch.prepared["cpu"] = descriptor = Descriptor(tokens, byref(tokens), spans_S2)
    return descriptor
