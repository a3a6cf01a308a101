// The forward operations of the numerical contract (contract.md), for rows of bf16 with fp32 sums.
// Every output row is a function of its own inputs only: rows never share a sum, threads never split one.
#include "cpu_amx.h"

EXPORT const char *lapis_source(void) { return LAPIS_SOURCE; }
EXPORT const char *lapis_compiler(void) { return __VERSION__; }

static uint64_t next_random(uint64_t *state) {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    return *state ^= *state << 17;
}
// Numbers around 1, or near-subnormal ones: a pair of bf16, and an fp32.
static uint32_t random_pair(uint64_t *state, int ordinary) {
    return ((uint32_t)next_random(state) & 0x87ff87ffu) + (ordinary ? 0x3f803f80u : 0x20002000u);
}
static float random_sum(uint64_t *state, int ordinary) {
    const uint32_t bits = ((uint32_t)next_random(state) & 0x87ffffffu) + (ordinary ? 0x3f800000u : 0x00800000u);
    float sum;
    memcpy(&sum, &bits, 4);
    return sum;
}

static int dot_differs(uint64_t *state, int ordinary) {
    uint32_t w[LANES];
    float start[LANES];
    const uint32_t a = random_pair(state, ordinary);
    for (int i = 0; i < LANES; i++) {
        w[i] = random_pair(state, ordinary);
        start[i] = random_sum(state, ordinary);
    }
    int differing = 0;
    for (int i = 0; i < LANES; i += WIDE) {
        const wide sum = load_wide(start + i), fast = dp(sum, a, load_wide_pairs(w + i));
        const wide slow = dp_plain(sum, a, load_wide_pairs(w + i));
        differing |= memcmp(&fast, &slow, sizeof fast) != 0;
    }
    return differing;
}

#if defined(__AMX_BF16__)
// Leave to use tiles, which Linux gives a process that asks. 0 if it is given.
static int ask_for_tiles(void) { return (int)syscall(SYS_arch_prctl, 0x1023, 18); }

static int tile_differs(uint64_t *state, int ordinary) {
    uint32_t x[TILE][TILE], w[TILE][COLUMNS];
    float sum[TILE * COLUMNS];
    for (int row = 0; row < TILE; row++)
        for (int i = 0; i < TILE; i++) x[row][i] = random_pair(state, ordinary);
    for (int pair = 0; pair < TILE; pair++)
        for (int i = 0; i < COLUMNS; i++) w[pair][i] = random_pair(state, ordinary);
    __asm__ volatile("" ::: "memory");  // as in add_rest
    begin_tiles();
    tile_product(1, (const bf16 *)x, TILE, BLOCK, (const bf16 *)w, sum);
    end_tiles();
    int differing = 0;
    for (int row = 0; row < TILE; row++)
        for (int i = 0; i < COLUMNS; i += WIDE) {
            wide even = {0}, odd = {0};
            for (int pair = 0; pair < TILE; pair++) {
                const wide_pairs a = x[row][pair] - (wide_pairs){0}, b = load_wide_pairs(&w[pair][i]);
                even = fused(even, (wide)(a << 16), (wide)(b << 16));
                odd = fused(odd, (wide)(a & 0xffff0000u), (wide)(b & 0xffff0000u));
            }
            const wide slow = (wide){0} + (even + odd), fast = load_wide(sum + row * COLUMNS + i);
            differing |= memcmp(&fast, &slow, sizeof fast) != 0;
        }
    return differing;
}
#else
static int ask_for_tiles(void) { return 0; }
static int tile_differs(uint64_t *state, int ordinary) { return (void)state, (void)ordinary, 0; }
#endif

// Do this CPU's dot product and tile product add as the contract says? 0 if so.
EXPORT int lapis_check(void) {
    if (ask_for_tiles()) return -1;
    const uint64_t mode = flush_subnormals();
    uint64_t state = 88172645463325252u;
    int differing = 0;
    for (int round = 0; round < 4096; round++) differing += dot_differs(&state, round % 2);
    for (int round = 0; round < 16; round++) differing += tile_differs(&state, round % 2);
    restore_mode(mode);
    return differing;
}

// ---- operations on single rows
//
// A function `<op>_team` is the body of `<op>`: called by all threads of a region, in flush_subnormals() mode, it shares
// the work among them and ends with a barrier. A replayed step (cpu_replay.c) is one region that calls the bodies.

EXPORT void lapis_rms_norm_team(const bf16 *x, const bf16 *w, bf16 *y, int64_t rows, int64_t width, float eps) {
#pragma omp for schedule(static) nowait
    for (int64_t row = 0; row < rows; row++) rms_norm_row(x + row * width, w, y + row * width, width, eps);
    team_barrier();
}

EXPORT void lapis_rms_norm(const bf16 *x, const bf16 *w, bf16 *y, int64_t rows, int64_t width, float eps) {
#pragma omp parallel if (rows > 8)
    {
        const uint64_t mode = flush_subnormals();
        lapis_rms_norm_team(x, w, y, rows, width, eps);
        restore_mode(mode);
    }
}

#if defined(__AVX512F__)
#define SILU_VECTORS 8  // whose exponentials are computed side by side
#else
#define SILU_VECTORS 1
#endif

INLINE void silu_mul_vectors(const int count, const bf16 *gate, const bf16 *up, bf16 *y) {
    f32x16 e[SILU_VECTORS];
    EACH(count) e[i] = smaller(all(88.0f), larger(all(-87.0f), -load_bf16(gate + i * LANES)));
    exp_clamped(count, e);
    EACH(count) store_bf16(y + i * LANES, (load_bf16(gate + i * LANES) / (1.0f + e[i])) * load_bf16(up + i * LANES));
}

EXPORT void lapis_silu_mul_team(const bf16 *x, bf16 *y, int64_t rows, int64_t width) {
#pragma omp for schedule(static) nowait
    for (int64_t row = 0; row < rows; row++) {
        const bf16 *gate = x + row * 2 * width, *up = gate + width;
        int64_t i = 0;
        for (; i + SILU_VECTORS * LANES <= width; i += SILU_VECTORS * LANES)
            silu_mul_vectors(SILU_VECTORS, gate + i, up + i, y + row * width + i);
        for (; i < width; i += LANES) silu_mul_vectors(1, gate + i, up + i, y + row * width + i);
    }
    team_barrier();
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
#pragma omp for schedule(static) nowait
    for (int64_t row = 0; row < rows; row++) {
        if (index[row] >= 0 && index[row] < count) memcpy(y + row * bytes, table + index[row] * bytes, (size_t)bytes);
        else memset(y + row * bytes, 0xff, (size_t)bytes);
    }
    team_barrier();
}

EXPORT void lapis_gather(const char *table, int64_t count, const int64_t *index, char *y, int64_t rows,
                         int64_t bytes) {
#pragma omp parallel if (rows > 64)
    lapis_gather_team(table, count, index, y, rows, bytes);
}

// Sums of a row of one table and a row of another, rounded once; NaN where one of them is not there.
EXPORT void lapis_gather_add_team(const bf16 *table, int64_t count, const int64_t *index, const bf16 *other,
                                  int64_t others, const int32_t *place, bf16 *y, int64_t rows, int64_t width) {
#pragma omp for schedule(static) nowait
    for (int64_t row = 0; row < rows; row++) {
        bf16 *out = y + row * width;
        if (index[row] < 0 || index[row] >= count || place[row] < 0 || place[row] >= others) {
            memset(out, 0xff, (size_t)width * 2);
            continue;
        }
        const bf16 *a = table + index[row] * width, *b = other + place[row] * width;
        for (int64_t i = 0; i < width; i += LANES) store_bf16(out + i, load_bf16(a + i) + load_bf16(b + i));
    }
    team_barrier();
}

EXPORT void lapis_gather_add(const bf16 *table, int64_t count, const int64_t *index, const bf16 *other,
                             int64_t others, const int32_t *place, bf16 *y, int64_t rows, int64_t width) {
#pragma omp parallel if (rows > 64)
    {
        const uint64_t mode = flush_subnormals();
        lapis_gather_add_team(table, count, index, other, others, place, y, rows, width);
        restore_mode(mode);
    }
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
#pragma omp for schedule(static) nowait
    for (int64_t row = 0; row < rows; row++) argmax[row] = first_maximum(logits + row * width, count);
    team_barrier();
}

EXPORT void lapis_argmax(const float *logits, int64_t rows, int64_t width, int64_t count, int64_t *argmax) {
#pragma omp parallel if (rows > 1)
    lapis_argmax_team(logits, rows, width, count, argmax);
}
