"""Weights in 8 or 4 bits, laid out as the compiled kernels read them; every maker of ops takes them in `linear`.

Dims: N output and K input width, both padded (T tiles of 32 columns, G groups of K), L 16 lanes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lapis.kernels.memory import LargePages

Kind = Literal["int8", "int4"]

TILE, GROUP, HALF = 32, 64, 32  # columns of a tile; inner widths with one scale: of inputs and int8, of int4
LEVELS8, LEVELS4 = 127, 15
NO_GRADIENT = "a product with quantised weights has no gradient: train with the bf16 weights"


@dataclass(frozen=True, eq=False)
class Quantized:
    """A weight (N, K), or a stack of them (E, N, K), without gradient: w ≈ q · scale + minimum, group by group of K.

    int8: q in -127 … 127, groups of 64, no minimum. int4: q in 0 … 15, groups of 32.
    """

    kind: Kind
    shape: torch.Size
    values: (
        Tensor  # uint8: int8 as q + 128 (T, K/4, 32, 4); int4 (T, K/4, 16, 4), column c + 16 in the high half
    )
    scales: Tensor  # bf16 (T, G, 32)
    minimums: Tensor | None  # bf16, pairs of groups: (T, K/64, 32, 2)

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        parts = (self.values, self.scales, *(() if self.minimums is None else (self.minimums,)))
        return sum(part.nbytes for part in parts)

    def in_large_pages(self, pages: LargePages) -> Quantized:
        """The same weight, to be read faster."""
        minimums = None if self.minimums is None else pages.copy(self.minimums)
        return Quantized(self.kind, self.shape, pages.copy(self.values), pages.copy(self.scales), minimums)

    def dequantize(self) -> Tensor:
        """The weight that is meant, fp32."""
        levels_NK = self.levels().float()
        scales_NG = self.scales.float().movedim(1, 2).flatten(0, 1)
        w_NK = levels_NK * scales_NG.repeat_interleave(levels_NK.shape[1] // scales_NG.shape[1], dim=1)
        if self.minimums is not None:
            minimums_NG = self.minimums.float().movedim(1, 2).flatten(0, 1).flatten(1)
            w_NK = w_NK + minimums_NG.repeat_interleave(HALF, dim=1)
        rows, inner = self.shape[-2:]
        padded = w_NK.view(*self.shape[:-2], -1, w_NK.shape[1])
        return padded[..., :rows, :inner].contiguous()

    def part(self, index: int) -> Quantized:
        """One weight (N, K) of a stack."""
        tiles = len(self.values) // self.shape[0]
        at = slice(index * tiles, (index + 1) * tiles)
        minimums = None if self.minimums is None else self.minimums[at]
        return Quantized(self.kind, self.shape[1:], self.values[at], self.scales[at], minimums)

    def levels(self) -> Tensor:
        """The whole numbers q as (N, K), both padded: int16."""
        values = self.values.to(torch.int16)
        if self.kind == "int4":
            values = torch.cat([values & 15, values >> 4], dim=2)
        tiles, quads = values.shape[:2]
        levels_NK = values.permute(0, 2, 1, 3).reshape(tiles * TILE, quads * 4)
        return levels_NK if self.kind == "int4" else levels_NK - 128


def quantize(w_NK: Tensor, kind: Kind) -> Quantized:
    """Rounds a weight (N, K), or a stack of weights (E, N, K), to 8 or 4 bits.

    int8 is symmetric; int4 keeps minimum and maximum of each group, so the levels of a Q4_1 file survive.
    """
    with torch.no_grad():
        padding = (0, -w_NK.shape[-1] % GROUP, 0, -w_NK.shape[-2] % TILE)
        rows_NK = F.pad(w_NK.detach().float(), padding).flatten(0, -2)
        parts = _int8(rows_NK) if kind == "int8" else _int4(rows_NK)
    return Quantized(kind, w_NK.shape, *parts)


def _int8(w_NK: Tensor) -> tuple[Tensor, Tensor, None]:
    groups_NGI = _split(w_NK, 1, GROUP)
    scales_NG = (groups_NGI.abs().amax(-1) / LEVELS8).bfloat16()
    levels_NGI = (groups_NGI / _divisor(scales_NG)).round().clamp(-LEVELS8, LEVELS8)
    return _tiles(levels_NGI.flatten(1) + 128), _by_tile(scales_NG), None


def _int4(w_NK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    groups_NGI = _split(w_NK, 1, HALF)
    minimums_NG = groups_NGI.amin(-1).bfloat16()
    scales_NG = ((groups_NGI.amax(-1) - minimums_NG.float()) / LEVELS4).bfloat16()
    levels_NGI = (
        ((groups_NGI - minimums_NG.float()[..., None]) / _divisor(scales_NG)).round().clamp(0, LEVELS4)
    )
    tiles = _tiles(levels_NGI.flatten(1))
    packed = tiles[:, :, : TILE // 2] | tiles[:, :, TILE // 2 :] << 4
    pairs = _split(_split(minimums_NG, 0, TILE), 2, 2).movedim(1, 2)
    return packed.contiguous(), _by_tile(scales_NG), pairs.contiguous()


def _divisor(scales_NG: Tensor) -> Tensor:
    scales = scales_NG.float()[..., None]
    return scales.where(scales > 0, 1.0)


def _tiles(levels_NK: Tensor) -> Tensor:
    tiles = _split(_split(levels_NK.to(torch.uint8), 0, TILE), 2, 4)
    return tiles.permute(0, 2, 1, 3).contiguous()


def _by_tile(scales_NG: Tensor) -> Tensor:
    return _split(scales_NG, 0, TILE).movedim(1, 2).contiguous()


def _split(x: Tensor, dim: int, size: int) -> Tensor:
    """A dim as blocks of that size."""
    return x.reshape(*x.shape[:dim], -1, size, *x.shape[dim + 1 :])
