// The forward operations of the numerical contract (contract.md), for rows of bf16 with fp32 sums.
// Every output row is a function of its own inputs only: rows never share a sum, threads never split one.
#include "cpu_vector.h"

#define PAGE 32  // keys per page of the KV cache

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
        for (int i = 0; i < LANES; i += WIDE) {
            const wide sum = load_wide(start + i), fast = dp(sum, a, load_wide_pairs(w + i));
            const wide slow = dp_plain(sum, a, load_wide_pairs(w + i));
            differing += memcmp(&fast, &slow, sizeof fast) != 0;
        }
    }
    restore_mode(mode);
    return differing;
}

// ---- operations on single rows
//
// A function `<op>_team` is the body of `<op>`: called by all threads of a region, in flush_subnormals() mode, it shares
// the work among them and ends with a barrier. A replayed step (cpu_replay.c) is one region that calls the bodies.

EXPORT void lapis_rms_norm_team(const bf16 *x, const bf16 *w, bf16 *y, int64_t rows, int64_t width, float eps) {
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; row++) rms_norm_row(x + row * width, w, y + row * width, width, eps);
}

EXPORT void lapis_rms_norm(const bf16 *x, const bf16 *w, bf16 *y, int64_t rows, int64_t width, float eps) {
#pragma omp parallel if (rows > 8)
    {
        const uint64_t mode = flush_subnormals();
        lapis_rms_norm_team(x, w, y, rows, width, eps);
        restore_mode(mode);
    }
}

EXPORT void lapis_silu_mul_team(const bf16 *x, bf16 *y, int64_t rows, int64_t width) {
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        const bf16 *gate = x + row * 2 * width, *up = gate + width;
        for (int64_t i = 0; i < width; i += LANES) {
            const f32x16 g = load_bf16(gate + i);
            store_bf16(y + row * width + i, (g / (1.0f + exp16(-g))) * load_bf16(up + i));
        }
    }
}

EXPORT void lapis_silu_mul(const bf16 *x, bf16 *y, int64_t rows, int64_t width) {
#pragma omp parallel if (rows > 4)
    {
        const uint64_t mode = flush_subnormals();
        lapis_silu_mul_team(x, y, rows, width);
        restore_mode(mode);
    }
}

// Rows of a table, `bytes` long each; a row that is not there becomes all ones: NaN in any format.
EXPORT void lapis_gather_team(const char *table, int64_t count, const int64_t *index, char *y, int64_t rows,
                              int64_t bytes) {
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        if (index[row] >= 0 && index[row] < count) memcpy(y + row * bytes, table + index[row] * bytes, (size_t)bytes);
        else memset(y + row * bytes, 0xff, (size_t)bytes);
    }
}

EXPORT void lapis_gather(const char *table, int64_t count, const int64_t *index, char *y, int64_t rows,
                         int64_t bytes) {
#pragma omp parallel if (rows > 64)
    lapis_gather_team(table, count, index, y, rows, bytes);
}

// Log softmax at ids: 0 where the id is -1, NaN where it is beyond the row.
EXPORT void lapis_logprobs(const float *logits, int64_t rows, int64_t width, const int64_t *ids, float *logprobs) {
#pragma omp parallel if (rows > 1)
    {
        const uint64_t mode = flush_subnormals();
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row++) {
            const float *in = logits + row * width, max = row_max(in, width);
            logprobs[row] = ids[row] < 0 ? 0.0f : NAN;
            if (ids[row] < 0 || ids[row] >= width) continue;
            f32x16 sum = all(0);
            for (int64_t i = 0; i < width; i += LANES) sum = sum + exp_below(load_row(in, i, width), max);
            logprobs[row] = in[ids[row]] - row_lse(max, sum_lanes(sum));
        }
        restore_mode(mode);
    }
}

// First index of the maximum among the first `count` of a row's `width` numbers; -1 if one of them is NaN or it is infinite.
static int64_t first_maximum(const float *row, int64_t count) {
    const int64_t part = 64 * LANES;
    float max = -INFINITY;
    int64_t at = 0;
    i32x16 unordered = {0};
    for (int64_t start = 0; start < count; start += part) {
        const int64_t end = start + part < count ? start + part : count;
        f32x16 largest = all(-INFINITY);
        for (int64_t i = start; i < end; i += LANES) {
            const f32x16 x = load_row(row, i, end);
            largest = larger(largest, x);
            unordered |= x != x;
        }
        const float part_max = max_lanes(largest);
        if (part_max > max) {
            max = part_max;
            at = start;
        }
    }
    int odd = 0;
    for (int i = 0; i < LANES; i++) odd |= unordered[i];
    if (odd || !(max - max == 0)) return -1;
    while (row[at] != max) at++;
    return at;
}

EXPORT void lapis_argmax_team(const float *logits, int64_t rows, int64_t width, int64_t count, int64_t *argmax) {
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; row++) argmax[row] = first_maximum(logits + row * width, count);
}

EXPORT void lapis_argmax(const float *logits, int64_t rows, int64_t width, int64_t count, int64_t *argmax) {
#pragma omp parallel if (rows > 1)
    lapis_argmax_team(logits, rows, width, count, argmax);
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

EXPORT void lapis_attention_team(const struct batch *batch, const bf16 *qkv, int64_t heads, int64_t kv_heads,
                                 int64_t size, const float *cos, const float *sin, bf16 *keys, bf16 *values, bf16 *q,
                                 bf16 *k, bf16 *o, float *lse) {
    const struct attention a = {batch, qkv,  cos, sin,   keys,     values, q, k, o, lse, heads, kv_heads,
                                (float)(1.0 / sqrt((double)size))};
    const run_function write_run = size == 32 ? write_run_32 : size == 64 ? write_run_64 : write_run_128;
    const head_function attend = size == 32 ? attend_run_32 : size == 64 ? attend_run_64 : attend_run_128;
    int64_t *starts = malloc(sizeof(int64_t) * (size_t)(batch->tokens + 1));  // each thread finds the same runs
    if (!starts) abort();
    const int64_t runs = find_runs(batch, starts);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < runs; i++) write_run(&a, starts[i], starts[i + 1]);
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = runs * kv_heads - 1; item >= 0; item--)  // later runs have more keys: they go first
        attend(&a, item % kv_heads, starts[item / kv_heads], starts[item / kv_heads + 1]);
    free(starts);
}

EXPORT void lapis_attention(const struct batch *batch, const bf16 *qkv, int64_t heads, int64_t kv_heads, int64_t size,
                            const float *cos, const float *sin, bf16 *keys, bf16 *values, bf16 *q, bf16 *k, bf16 *o,
                            float *lse) {
    int64_t keys_read = 0;
    for (int64_t t = 0; t < batch->tokens; t++) keys_read += batch->position[t] + PAGE;
#pragma omp parallel if (keys_read * heads > 2048)
    {
        const uint64_t mode = flush_subnormals();
        lapis_attention_team(batch, qkv, heads, kv_heads, size, cos, sin, keys, values, q, k, o, lse);
        restore_mode(mode);
    }
}
