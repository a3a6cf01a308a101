// The forward operations of the numerical contract for rows of fp32 (contract.md, "fp32 storage"): the orders of bf16, no
// rounding in between, and products in one chain of fused multiply-adds. Gradients are left to torch.
#include "cpu_fp32.h"

#define COLUMNS 32               // output columns of a weight tile
#define TILE_VECTORS (COLUMNS / WIDE)
#define BLOCK_BYTES (512 << 10)  // rows of x that stay in the second-level cache while weight tiles pass
#if defined(__AVX512F__)
#define TILE_ROWS 12
#define WIDE_ROWS 4  // so few rows take two weight tiles at once
#else
#define TILE_ROWS 3
#define WIDE_ROWS 1
#endif

// ---- linear: y[M,N] = x[M,K] w[N,K]^T (+ bias) (+ residual). w is packed as [ceil(N/32)][K][32], padded with zeros.

struct linear {
    const float *x, *packed, *bias, *residual;
    float *y;
    int64_t rows, K, N;
};

EXPORT void lapis_pack_fp32(const float *w, float *packed, int64_t N, int64_t K) {
    const int64_t tiles = (N + COLUMNS - 1) / COLUMNS;
#pragma omp parallel for schedule(static)
    for (int64_t tile = 0; tile < tiles; tile++)
        for (int64_t n = 0; n < COLUMNS; n++) {
            const int64_t column = tile * COLUMNS + n;
            for (int64_t k = 0; k < K; k++)
                packed[(tile * K + k) * COLUMNS + n] = column < N ? w[column * K + k] : 0;
        }
}

// Adds bias and residual to 16 finished sums and stores those that lie inside the matrix.
INLINE void finish(const struct linear *op, int64_t row, int64_t column, const float *sum) {
    const int64_t at = row * op->N + column, left = op->N - column;
    for (int64_t i = 0; i < (left < LANES ? left : LANES); i++) {
        float value = op->bias ? sum[i] + op->bias[column + i] : sum[i];
        if (op->residual) value = value + op->residual[at + i];
        op->y[at + i] = value;
    }
}

// `rows` rows times `tiles` neighbouring weight tiles: one chain over all of K for each output.
INLINE void linear_tile(const int rows, const int tiles, const struct linear *op, int64_t row, int64_t tile) {
    wide sum[TILE_ROWS][2 * TILE_VECTORS];
    float out[TILE_ROWS][2 * COLUMNS];
    const int vectors = tiles * TILE_VECTORS;
    const int64_t K = op->K;
    const float *x = op->x + row * K, *w = op->packed + tile * COLUMNS * K;
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 16
        for (int v = 0; v < vectors; v++) sum[r][v] = (wide){0};
    for (int64_t k = 0; k < K; k++, w += COLUMNS) {
        wide weight[2 * TILE_VECTORS];
#pragma GCC unroll 16
        for (int v = 0; v < vectors; v++)
            weight[v] = load_wide(w + v / TILE_VECTORS * COLUMNS * K + v % TILE_VECTORS * WIDE);
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++) {
            const wide input = x[r * K + k] - (wide){0};
#pragma GCC unroll 16
            for (int v = 0; v < vectors; v++) sum[r][v] = fused_fp32(sum[r][v], input, weight[v]);
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 16
        for (int v = 0; v < vectors; v++) store_wide(out[r] + v * WIDE, sum[r][v]);
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < tiles * COLUMNS; c += LANES) finish(op, row + r, tile * COLUMNS + c, out[r] + c);
}

#define DEFINE_TILE(rows, tiles)                                                                            \
    static __attribute__((noinline)) void tile_##rows##x##tiles(const struct linear *op, int64_t row,       \
                                                                int64_t tile) {                             \
        linear_tile(rows, tiles, op, row, tile);                                                            \
    }
DEFINE_TILE(1, 1)
DEFINE_TILE(1, 2)
DEFINE_TILE(2, 1)
DEFINE_TILE(3, 1)
#if TILE_ROWS == 12
DEFINE_TILE(2, 2)
DEFINE_TILE(3, 2)
DEFINE_TILE(4, 2)
DEFINE_TILE(4, 1)
DEFINE_TILE(5, 1)
DEFINE_TILE(6, 1)
DEFINE_TILE(7, 1)
DEFINE_TILE(8, 1)
DEFINE_TILE(9, 1)
DEFINE_TILE(10, 1)
DEFINE_TILE(11, 1)
DEFINE_TILE(12, 1)
#endif

typedef void (*tile_function)(const struct linear *, int64_t, int64_t);
static const tile_function wide_tiles[] = {
    NULL, tile_1x2,
#if TILE_ROWS == 12
    tile_2x2, tile_3x2, tile_4x2,
#endif
};
static const tile_function tiles_by_rows[] = {
    NULL, tile_1x1, tile_2x1, tile_3x1,
#if TILE_ROWS == 12
    tile_4x1, tile_5x1, tile_6x1, tile_7x1, tile_8x1, tile_9x1, tile_10x1, tile_11x1, tile_12x1,
#endif
};

static void linear_few_rows(const struct linear *op, int64_t tiles) {
    const int64_t pairs_of_tiles = (tiles + 1) / 2;
#pragma omp for schedule(static) nowait
    for (int64_t pair = 0; pair < pairs_of_tiles; pair++) {
        if (2 * pair + 1 < tiles) wide_tiles[op->rows](op, 0, 2 * pair);
        else tiles_by_rows[op->rows](op, 0, 2 * pair);
    }
    team_barrier();
}

static void linear_blocks(const struct linear *op, int64_t tiles) {
    const int64_t fitting = BLOCK_BYTES / 4 / op->K / TILE_ROWS, block_rows = (fitting < 8 ? 8 : fitting) * TILE_ROWS;
    const int64_t blocks = (op->rows + block_rows - 1) / block_rows;
#pragma omp for collapse(2) schedule(dynamic, 4) nowait
    for (int64_t block = 0; block < blocks; block++)
        for (int64_t tile = 0; tile < tiles; tile++) {
            const int64_t start = block * block_rows;
            const int64_t end = start + block_rows < op->rows ? start + block_rows : op->rows;
            for (int64_t row = start; row < end;) {
                const int64_t left = end - row;
                const int64_t n = left <= TILE_ROWS ? left : left < 2 * TILE_ROWS ? (left + 1) / 2 : TILE_ROWS;
                tiles_by_rows[n](op, row, tile);
                row += n;
            }
        }
    team_barrier();
}

EXPORT void lapis_linear_fp32_team(const float *x, int64_t rows, int64_t K, const float *packed, int64_t N,
                                   const float *bias, const float *residual, float *y) {
    const struct linear op = {x, packed, bias, residual, y, rows, K, N};
    const int64_t tiles = (N + COLUMNS - 1) / COLUMNS;
    if (rows <= WIDE_ROWS) linear_few_rows(&op, tiles);
    else linear_blocks(&op, tiles);
}

EXPORT void lapis_linear_fp32(const float *x, int64_t rows, int64_t K, const float *packed, int64_t N,
                              const float *bias, const float *residual, float *y) {
#pragma omp parallel
    {
        const uint64_t mode = flush_subnormals();
        lapis_linear_fp32_team(x, rows, K, packed, N, bias, residual, y);
        restore_mode(mode);
    }
}

// ---- operations on single rows

INLINE void norm_row(const float *x, const float *w, float *y, int64_t width, float eps) {
    f32x16 squares = all(0);
    for (int64_t i = 0; i < width; i += LANES) squares = squares + load(x + i) * load(x + i);
    const float scale = 1.0f / sqrtf(sum_lanes(squares) / (float)width + eps);
    for (int64_t i = 0; i < width; i += LANES) store(y + i, (load(x + i) * scale) * load(w + i));
}

EXPORT void lapis_rms_norm_fp32_team(const float *x, const float *w, float *y, int64_t rows, int64_t width,
                                     float eps) {
#pragma omp for schedule(static) nowait
    for (int64_t row = 0; row < rows; row++) norm_row(x + row * width, w, y + row * width, width, eps);
    team_barrier();
}

EXPORT void lapis_rms_norm_fp32(const float *x, const float *w, float *y, int64_t rows, int64_t width, float eps) {
#pragma omp parallel if (rows > 8)
    {
        const uint64_t mode = flush_subnormals();
        lapis_rms_norm_fp32_team(x, w, y, rows, width, eps);
        restore_mode(mode);
    }
}

EXPORT void lapis_layer_norm_fp32_team(const float *x, const float *w, const float *b, float *y, int64_t rows,
                                       int64_t width, float eps) {
#pragma omp for schedule(static) nowait
    for (int64_t row = 0; row < rows; row++) {
        const float *in = x + row * width;
        f32x16 sums = all(0), squares = all(0);
        for (int64_t i = 0; i < width; i += LANES) sums = sums + load(in + i);
        const float mean = sum_lanes(sums) / (float)width;
        for (int64_t i = 0; i < width; i += LANES) squares = squares + (load(in + i) - mean) * (load(in + i) - mean);
        const float scale = 1.0f / sqrtf(sum_lanes(squares) / (float)width + eps);
        for (int64_t i = 0; i < width; i += LANES)
            store(y + row * width + i, ((load(in + i) - mean) * scale) * load(w + i) + load(b + i));
    }
    team_barrier();
}

EXPORT void lapis_layer_norm_fp32(const float *x, const float *w, const float *b, float *y, int64_t rows,
                                  int64_t width, float eps) {
#pragma omp parallel if (rows > 8)
    {
        const uint64_t mode = flush_subnormals();
        lapis_layer_norm_fp32_team(x, w, b, y, rows, width, eps);
        restore_mode(mode);
    }
}

// Parts of a joined row: q_parts x q_width, k_parts x k_width, and a rest that stays.
EXPORT void lapis_head_norm_fp32_team(const float *x, const float *q_norm, const float *k_norm, float *y, int64_t rows,
                                      int64_t q_parts, int64_t q_width, int64_t k_parts, int64_t k_width, int64_t rest,
                                      float eps) {
    const int64_t query = q_parts * q_width, key = k_parts * k_width, width = query + key + rest;
#pragma omp for schedule(static) nowait
    for (int64_t row = 0; row < rows; row++) {
        const float *in = x + row * width;
        float *out = y + row * width;
        for (int64_t i = 0; i < query; i += q_width) norm_row(in + i, q_norm, out + i, q_width, eps);
        for (int64_t i = query; i < query + key; i += k_width) norm_row(in + i, k_norm, out + i, k_width, eps);
        memcpy(out + query + key, in + query + key, (size_t)rest * 4);
    }
    team_barrier();
}

EXPORT void lapis_head_norm_fp32(const float *x, const float *q_norm, const float *k_norm, float *y, int64_t rows,
                                 int64_t q_parts, int64_t q_width, int64_t k_parts, int64_t k_width, int64_t rest,
                                 float eps) {
#pragma omp parallel if (rows > 4)
    {
        const uint64_t mode = flush_subnormals();
        lapis_head_norm_fp32_team(x, q_norm, k_norm, y, rows, q_parts, q_width, k_parts, k_width, rest, eps);
        restore_mode(mode);
    }
}

EXPORT void lapis_silu_mul_fp32_team(const float *x, float *y, int64_t rows, int64_t width) {
#pragma omp for schedule(static) nowait
    for (int64_t row = 0; row < rows; row++) {
        const float *gate = x + row * 2 * width, *up = gate + width;
        for (int64_t i = 0; i < width; i += LANES) {
            const f32x16 g = load(gate + i);
            store(y + row * width + i, (g / (1.0f + exp16(-g))) * load(up + i));
        }
    }
    team_barrier();
}

EXPORT void lapis_silu_mul_fp32(const float *x, float *y, int64_t rows, int64_t width) {
#pragma omp parallel if (rows > 4)
    {
        const uint64_t mode = flush_subnormals();
        lapis_silu_mul_fp32_team(x, y, rows, width);
        restore_mode(mode);
    }
}

EXPORT void lapis_gelu_fp32_team(const float *x, float *y, int64_t rows, int64_t width) {
#pragma omp for schedule(static) nowait
    for (int64_t row = 0; row < rows; row++)
        for (int64_t i = row * width; i < (row + 1) * width; i += LANES) {
            const f32x16 v = load(x + i);
            store(y + i, v / gelu_gate(v));
        }
    team_barrier();
}

EXPORT void lapis_gelu_fp32(const float *x, float *y, int64_t rows, int64_t width) {
#pragma omp parallel if (rows > 4)
    {
        const uint64_t mode = flush_subnormals();
        lapis_gelu_fp32_team(x, y, rows, width);
        restore_mode(mode);
    }
}

// y[rows][width] = sum over a of weights[rows][top] times z[rows][top][width], in order, + residual.
EXPORT void lapis_weighted_sum_fp32(const float *z, const float *weights, const float *residual, float *y, int64_t rows,
                                    int64_t top, int64_t width) {
#pragma omp parallel if (rows > 8)
    {
        const uint64_t mode = flush_subnormals();
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row++)
            for (int64_t i = 0; i < width; i += LANES) {
                f32x16 sum = all(0);
                for (int64_t a = 0; a < top; a++)
                    sum = sum + load(z + (row * top + a) * width + i) * weights[row * top + a];
                store(y + row * width + i, sum + load(residual + row * width + i));
            }
        restore_mode(mode);
    }
}

// As gather_add of cpu.c.
EXPORT void lapis_gather_add_fp32_team(const float *table, int64_t count, const int64_t *index, const float *other,
                                       int64_t others, const int32_t *place, float *y, int64_t rows, int64_t width) {
#pragma omp for schedule(static) nowait
    for (int64_t row = 0; row < rows; row++) {
        float *out = y + row * width;
        if (index[row] < 0 || index[row] >= count || place[row] < 0 || place[row] >= others) {
            memset(out, 0xff, (size_t)width * 4);
            continue;
        }
        const float *a = table + index[row] * width, *b = other + place[row] * width;
        for (int64_t i = 0; i < width; i += LANES) store(out + i, load(a + i) + load(b + i));
    }
    team_barrier();
}

EXPORT void lapis_gather_add_fp32(const float *table, int64_t count, const int64_t *index, const float *other,
                                  int64_t others, const int32_t *place, float *y, int64_t rows, int64_t width) {
#pragma omp parallel if (rows > 64)
    {
        const uint64_t mode = flush_subnormals();
        lapis_gather_add_fp32_team(table, count, index, other, others, place, y, rows, width);
        restore_mode(mode);
    }
}
