// The forward operations of the numerical contract (contract.md), for rows of bf16 with fp32 sums.
// Every output row is a function of its own inputs only: rows never share a sum, threads never split one.
#include "cpu_vector.h"

#define COLUMNS 32  // output columns of a packed weight tile
#define BLOCK_BYTES (512 << 10)  // rows of x that stay in the second-level cache while weight tiles pass
#define PAGE 32     // keys per page of the KV cache
#if defined(__AVX512F__)
#define TILE_ROWS 12  // 24 sums of 16 lanes in 32 registers
#define WIDE_ROWS 4   // so few rows take two weight tiles at once, to have enough sums under way
#else
#define TILE_ROWS 3
#define WIDE_ROWS 1
#endif

EXPORT const char *lapis_source(void) { return LAPIS_SOURCE; }
EXPORT const char *lapis_compiler(void) { return __VERSION__; }
EXPORT int lapis_threaded(void) {
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}

// Does this CPU's dot product add as the contract says? 0 if so. Ordinary numbers and near-subnormal ones.
EXPORT int lapis_check(void) {
    uint64_t mode = flush_subnormals(), state = 88172645463325252u;
    int differing = 0;
    for (int round = 0; round < 4096; round++) {
        uint32_t w[LANES], a = 0, exponents = round % 2 ? 0x3f803f80u : 0x20002000u;
        float start[LANES];
        for (int i = 0; i <= LANES; i++) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            uint32_t word = ((uint32_t)state & 0x87ff87ffu) + exponents;
            if (i == LANES) a = word;
            else {
                w[i] = word;
                uint32_t bits = ((uint32_t)(state >> 32) & 0x87ffffffu) + (round % 2 ? 0x3f800000u : 0x00800000u);
                memcpy(&start[i], &bits, 4);
            }
        }
        f32x16 sum = load(start);
        i32x16 differ = (i32x16)dp(sum, a, load_pairs(w)) != (i32x16)dp_plain(sum, a, load_pairs(w));
        for (int i = 0; i < LANES; i++) differing += differ[i] != 0;
    }
    restore_mode(mode);
    return differing;
}

// ---- linear: y[M,N] = x[M,K] w[N,K]^T (+ residual). w is packed as [ceil(N/32)][K/2][32][2], padded with zeros.

struct linear {
    const bf16 *x, *packed, *residual;
    void *y;
    int64_t rows, K, N;
    int fp32;
};

EXPORT void lapis_pack(const bf16 *w, bf16 *packed, int64_t N, int64_t K) {
    const int64_t tiles = (N + COLUMNS - 1) / COLUMNS, pairs = K / 2;
#pragma omp parallel for schedule(static)
    for (int64_t tile = 0; tile < tiles; tile++) {
        uint32_t *out = (uint32_t *)packed + tile * COLUMNS * pairs;
        for (int64_t n = 0; n < COLUMNS; n++) {
            const int64_t column = tile * COLUMNS + n;
            const uint32_t *row = (const uint32_t *)w + column * pairs;
            for (int64_t k = 0; k < pairs; k++) out[k * COLUMNS + n] = column < N ? row[k] : 0;
        }
    }
}

// Adds the residual to 16 finished sums, rounds, stores those that lie inside the matrix.
INLINE void finish(const struct linear *op, int64_t row, int64_t column, f32x16 sum) {
    if (column >= op->N) return;
    const int64_t at = row * op->N + column, left = op->N - column;
    if (left >= LANES) {
        if (op->residual) sum = sum + load_bf16(op->residual + at);
        if (op->fp32) store((float *)op->y + at, sum);
        else store_bf16((bf16 *)op->y + at, sum);
        return;
    }
    for (int64_t i = 0; i < left; i++) {
        float value = op->residual ? sum[i] + widen_one(op->residual[at + i]) : sum[i];
        if (op->fp32) ((float *)op->y)[at + i] = value;
        else ((bf16 *)op->y)[at + i] = round_one(value);
    }
}

// Asks for the output lines before the sums start: with many rows, waiting for them costs a sixth of the time.
INLINE void claim_output(const int rows, const struct linear *op, int64_t row, int64_t tile) {
    const int64_t size = op->fp32 ? 4 : 2;
    const char *line = (const char *)op->y + (row * op->N + tile * COLUMNS) * size;
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++) {
        __builtin_prefetch(line + r * op->N * size, 1);
        if (op->fp32) __builtin_prefetch(line + r * op->N * size + 64, 1);
    }
}

// `rows` rows times `tiles` neighbouring weight tiles: one chain of dp over all of K for each output.
INLINE void linear_tile(const int rows, const int tiles, const struct linear *op, int64_t row, int64_t tile) {
    f32x16 sum[TILE_ROWS][4];
    const int64_t pairs = op->K / 2;
    const uint32_t *x = (const uint32_t *)op->x + row * pairs;
    const uint32_t *w = (const uint32_t *)op->packed + tile * COLUMNS * pairs;
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < 2 * tiles; v++) sum[r][v] = all(0);
    if (rows > WIDE_ROWS) claim_output(rows, op, row, tile);
    for (int64_t k = 0; k < pairs; k++, w += COLUMNS) {
        u32x16 weight[4];
#pragma GCC unroll 4
        for (int v = 0; v < 2 * tiles; v++) weight[v] = load_pairs(w + (v / 2) * COLUMNS * pairs + (v % 2) * LANES);
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
            for (int v = 0; v < 2 * tiles; v++) sum[r][v] = dp(sum[r][v], x[r * pairs + k], weight[v]);
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < 2 * tiles; v++) finish(op, row + r, tile * COLUMNS + v * LANES, sum[r][v]);
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

// Rows of the next register tile: a full one, or the rest in equal parts.
INLINE int64_t tile_rows(int64_t left) {
    if (left <= TILE_ROWS) return left;
    return left < 2 * TILE_ROWS ? (left + 1) / 2 : TILE_ROWS;
}

static void linear_few_rows(const struct linear *op, int64_t tiles) {
    const int64_t pairs_of_tiles = (tiles + 1) / 2;
#pragma omp for schedule(static)
    for (int64_t pair = 0; pair < pairs_of_tiles; pair++) {
        if (2 * pair + 1 < tiles) wide_tiles[op->rows](op, 0, 2 * pair);
        else tiles_by_rows[op->rows](op, 0, 2 * pair);
    }
}

static void linear_blocks(const struct linear *op, int64_t tiles) {
    const int64_t fitting = BLOCK_BYTES / 2 / op->K / TILE_ROWS * TILE_ROWS;
    const int64_t block_rows = fitting < 8 * TILE_ROWS ? 8 * TILE_ROWS : fitting;
    const int64_t blocks = (op->rows + block_rows - 1) / block_rows;
#pragma omp for collapse(2) schedule(dynamic, 4)
    for (int64_t block = 0; block < blocks; block++)
        for (int64_t tile = 0; tile < tiles; tile++) {
            const int64_t start = block * block_rows;
            const int64_t end = start + block_rows < op->rows ? start + block_rows : op->rows;
            for (int64_t row = start; row < end;) {
                const int64_t n = tile_rows(end - row);
                tiles_by_rows[n](op, row, tile);
                row += n;
            }
        }
}

EXPORT void lapis_linear(const bf16 *x, int64_t rows, int64_t K, const bf16 *packed, int64_t N, const bf16 *residual,
                         void *y, int fp32) {
    const struct linear op = {x, packed, residual, y, rows, K, N, fp32};
    const int64_t tiles = (N + COLUMNS - 1) / COLUMNS;
#pragma omp parallel
    {
        const uint64_t mode = flush_subnormals();
        if (rows <= WIDE_ROWS) linear_few_rows(&op, tiles);
        else linear_blocks(&op, tiles);
        restore_mode(mode);
    }
}

// ---- operations on single rows

EXPORT void lapis_rms_norm(const bf16 *x, const bf16 *w, bf16 *y, int64_t rows, int64_t width, float eps) {
#pragma omp parallel if (rows > 8)
    {
        const uint64_t mode = flush_subnormals();
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row++) {
            const bf16 *in = x + row * width;
            f32x16 squares = all(0);
            for (int64_t i = 0; i < width; i += LANES) squares = squares + load_bf16(in + i) * load_bf16(in + i);
            const float scale = 1.0f / sqrtf(sum_lanes(squares) / (float)width + eps);
            for (int64_t i = 0; i < width; i += LANES)
                store_bf16(y + row * width + i, (load_bf16(in + i) * scale) * load_bf16(w + i));
        }
        restore_mode(mode);
    }
}

EXPORT void lapis_silu_mul(const bf16 *x, bf16 *y, int64_t rows, int64_t width) {
#pragma omp parallel if (rows > 4)
    {
        const uint64_t mode = flush_subnormals();
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row++) {
            const bf16 *gate = x + row * 2 * width, *up = gate + width;
            for (int64_t i = 0; i < width; i += LANES) {
                const f32x16 g = load_bf16(gate + i);
                store_bf16(y + row * width + i, (g / (1.0f + exp16(-g))) * load_bf16(up + i));
            }
        }
        restore_mode(mode);
    }
}

// Log softmax at ids (0 where the id is -1, NaN where it is beyond the row) and the first index of the maximum; either output may be absent.
EXPORT void lapis_logprobs(const float *logits, int64_t rows, int64_t width, const int64_t *ids, float *logprobs,
                           int64_t *argmax) {
#pragma omp parallel if (rows > 1)
    {
        const uint64_t mode = flush_subnormals();
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row++) {
            const float *in = logits + row * width, max = row_max(in, width);
            if (argmax) {
                int64_t i = 0;
                while (i < width - 1 && in[i] != max) i++;
                argmax[row] = i;
            }
            if (!logprobs) continue;
            logprobs[row] = ids[row] < 0 ? 0.0f : NAN;
            if (ids[row] < 0 || ids[row] >= width) continue;
            f32x16 sum = all(0);
            for (int64_t i = 0; i < width; i += LANES) sum = sum + exp_below(load_row(in, i, width), max);
            logprobs[row] = in[ids[row]] - row_lse(max, sum_lanes(sum));
        }
        restore_mode(mode);
    }
}

// ---- attention over pages

struct batch {  // mirrored in cpu.py
    const int32_t *sequence, *position, *page_table;
    int64_t tokens, columns;  // columns of the page table
};
struct attention {
    const struct batch *batch;
    const bf16 *qkv;
    const float *cos, *sin;
    bf16 *keys, *values;  // pages of this layer
    bf16 *q, *k;          // rotated queries, and keys when a backward pass will want them
    bf16 *o;
    float *lse;           // log of each row's softmax denominator, or NULL
    int64_t heads, kv_heads;
    float scale;
};

INLINE int64_t page_of(const struct batch *batch, int64_t token, int64_t index) {
    return batch->page_table[batch->sequence[token] * batch->columns + index];
}

#define HEAD 32
#include "cpu_attention.h"
#undef HEAD
#define HEAD 64
#include "cpu_attention.h"
#undef HEAD
#define HEAD 128
#include "cpu_attention.h"
#undef HEAD

typedef void (*run_function)(const struct attention *, int64_t, int64_t);
typedef void (*head_function)(const struct attention *, int64_t, int64_t, int64_t);

// A run: tokens of one sequence, consecutive positions, one page. starts[n] is the end; returns n.
static int64_t find_runs(const struct batch *batch, int64_t *starts) {
    int64_t runs = 0;
    for (int64_t t = 0; t < batch->tokens; t++)
        if (t == 0 || batch->sequence[t] != batch->sequence[t - 1] ||
            batch->position[t] != batch->position[t - 1] + 1 || batch->position[t] % PAGE == 0)
            starts[runs++] = t;
    starts[runs] = batch->tokens;
    return runs;
}

EXPORT void lapis_attention(const struct batch *batch, const bf16 *qkv, int64_t heads, int64_t kv_heads, int64_t size,
                            const float *cos, const float *sin, bf16 *keys, bf16 *values, bf16 *q, bf16 *k, bf16 *o,
                            float *lse) {
    const struct attention a = {batch, qkv,  cos, sin,   keys,     values, q, k, o, lse, heads, kv_heads,
                                (float)(1.0 / sqrt((double)size))};
    const run_function write_run = size == 32 ? write_run_32 : size == 64 ? write_run_64 : write_run_128;
    const head_function attend = size == 32 ? attend_run_32 : size == 64 ? attend_run_64 : attend_run_128;
    int64_t *starts = malloc(sizeof(int64_t) * (size_t)(batch->tokens + 1));
    if (!starts) abort();
    const int64_t runs = find_runs(batch, starts);
    int64_t keys_read = 0;
    for (int64_t i = 0; i < runs; i++) keys_read += (starts[i + 1] - starts[i]) * (batch->position[starts[i]] + PAGE);
#pragma omp parallel if (keys_read * heads > 2048)
    {
        const uint64_t mode = flush_subnormals();
#pragma omp for schedule(static)
        for (int64_t i = 0; i < runs; i++) write_run(&a, starts[i], starts[i + 1]);
#pragma omp for schedule(dynamic, 1)
        for (int64_t item = runs * kv_heads - 1; item >= 0; item--)  // later runs have more keys: they go first
            attend(&a, item % kv_heads, starts[item / kv_heads], starts[item / kv_heads + 1]);
        restore_mode(mode);
    }
    free(starts);
}
