// What every product with weights shares: tiles of 32 output columns, and what happens to finished sums.
#ifndef LAPIS_CPU_PRODUCT_H
#define LAPIS_CPU_PRODUCT_H

#include "cpu_vector.h"

#define COLUMNS 32               // output columns of a weight tile
#define TILE_VECTORS (COLUMNS / WIDE)
#define BLOCK_BYTES (512 << 10)  // rows of x that stay in the second-level cache while weight tiles pass

struct output {
    void *y;  // [rows][N], bf16 or fp32
    const bf16 *bias, *residual;
    int64_t N;
    int fp32;
    int64_t stride;        // from row to row of y and residual; 0: N
    const int32_t *order;  // the row of y and residual that each row is; NULL: itself
};

// What a pass over a weight tile asks for meanwhile: few rows would wait for the weights otherwise.
struct fetch {
    const char *from;  // of the next tile
    int64_t step;      // bytes for each step along K: a whole step of weights, or half if two passes share them; 0: nothing
};
INLINE struct fetch fetch_part(const void *next, int64_t bytes, int64_t steps, int64_t pass, int64_t passes) {
    return (struct fetch){(const char *)next + pass * (bytes / passes), bytes / steps / passes};
}
INLINE struct fetch fetch_nothing(const void *mapped) { return (struct fetch){mapped, 0}; }
INLINE void fetch_step(struct fetch fetch, int64_t index) {
    __builtin_prefetch(fetch.from + index * fetch.step, 0, 2);
    __builtin_prefetch(fetch.from + index * fetch.step + fetch.step / 2, 0, 2);
}

INLINE int64_t output_start(const struct output *out, int64_t row) {
    return (out->order ? out->order[row] : row) * (out->stride ? out->stride : out->N);
}

// Adds bias and residual to `vectors` times 16 finished sums, all of them inside the matrix, rounds and stores them.
INLINE void finish_row(const struct output *out, int64_t row, int64_t column, const int vectors, const f32x16 *sums) {
    const int64_t start = output_start(out, row);
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v++, column += LANES) {
        f32x16 sum = sums[v];
        if (out->bias) sum = sum + load_bf16(out->bias + column);
        if (out->residual) sum = sum + load_bf16(out->residual + start + column);
        if (out->fp32) store((float *)out->y + start + column, sum);
        else store_bf16((bf16 *)out->y + start + column, sum);
    }
}

// As finish_row, of 16 sums of which some or all may lie beyond the matrix.
INLINE void finish(const struct output *out, int64_t row, int64_t column, f32x16 sum) {
    if (column >= out->N) return;
    const int64_t left = out->N - column;
    if (left >= LANES) {
        finish_row(out, row, column, 1, &sum);
        return;
    }
    const int64_t at = output_start(out, row) + column;
    for (int64_t i = 0; i < left; i++) {
        float value = out->bias ? sum[i] + widen_one(out->bias[column + i]) : sum[i];
        if (out->residual) value = value + widen_one(out->residual[at + i]);
        if (out->fp32) ((float *)out->y)[at + i] = value;
        else ((bf16 *)out->y)[at + i] = round_one(value);
    }
}

// Asks for the output lines before the sums start: with many rows, waiting for them costs a sixth of the time.
INLINE void claim_output(const int rows, const struct output *out, int64_t row, int64_t tile) {
    const int64_t size = out->fp32 ? 4 : 2;
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++) {
        const char *line = (const char *)out->y + (output_start(out, row + r) + tile * COLUMNS) * size;
        __builtin_prefetch(line, 1);
        if (out->fp32) __builtin_prefetch(line + 64, 1);
    }
}

// Counting sort of rows by their group, -1 for none: the first sorted row of each of `groups` + 1, the row that each one was.
INLINE void sort_by_group(const int32_t *group, int64_t rows, int64_t groups, int64_t *starts, int32_t *order) {
    memset(starts, 0, (size_t)(groups + 1) * 8);
    for (int64_t row = 0; row < rows; row++)
        if (group[row] >= 0) starts[group[row] + 1]++;
    for (int64_t g = 0; g < groups; g++) starts[g + 1] += starts[g];
    for (int64_t row = 0; row < rows; row++)
        if (group[row] >= 0) order[starts[group[row]]++] = (int32_t)row;
    for (int64_t g = groups; g > 0; g--) starts[g] = starts[g - 1];
    starts[0] = 0;
}

// Rows of the next register tile of at most `most`: a full one, or the rest in equal parts.
INLINE int64_t tile_rows(int64_t left, int64_t most) {
    if (left <= most) return left;
    return left < 2 * most ? (left + 1) / 2 : most;
}

#endif
