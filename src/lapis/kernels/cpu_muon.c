// One Muon step (Jordan et al. 2024): momentum, Newton-Schulz, weight. Not part of the bit contract, but the same on
// any number of threads: a matrix belongs to one thread from its gradient to its new weight.
//
// The iteration runs on X[m][n], m <= n, which is the matrix or its transpose. Matrices lie in "pair form", tiles of
// 32 columns: [columns/32][rows/2][32][2], that is, words of two neighbouring rows. It is the layout of both operands
// of a product over the rows. X is kept twice: `pairs` is the pair form of X, `turned` that of its transpose.
// A symmetric matrix needs one form only, and only its blocks on and below the diagonal are computed.
#include "cpu_transpose.h"

#define SIDE 32               // a block is SIDE x SIDE elements
#define WORDS (SIDE * SIDE / 2)  // of a block
#define DEPTH 128             // pairs of an inner width that are summed at a time: both operands stay in the first-level cache
#define PRODUCT_VECTORS (SIDE / WIDE)
#if defined(__AVX512F__)
#define PRODUCT_ROWS 8
#else
#define PRODUCT_ROWS 2
#endif

struct muon {  // mirrored in cpu_library.py
    float lr, beta, weight_decay, a, b, c;
    int64_t iterations;
};

struct matrix {
    bf16 *weight, *grad;
    float *master, *momentum;
    int64_t rows, columns;
};

struct scratch {
    uint32_t *pairs, *turned;      // m n / 2 words each
    uint32_t *gram, *polynomial;   // m m / 2 words each
    uint32_t *column;              // 16 m words: one tile of columns
};

INLINE f32x16 even_row(u32x16 words) { return (f32x16)(words << 16); }
INLINE f32x16 odd_row(u32x16 words) { return (f32x16)(words & 0xffff0000u); }
INLINE void store_rows(uint32_t *words, f32x16 even, f32x16 odd) {
    const u32x16 joined = rounded_bits(even) | (rounded_bits(odd) << 16);
    memcpy(words, &joined, 64);
}

// ---- the transpose of a block in pair form

#if defined(__AVX512F__)
static void turn(const uint32_t *in, uint32_t *out) {
    u32x16 even[16], odd[16];
    for (int q = 0; q < 16; q++) {
        const u32x16 low = load_pairs(in + q * SIDE), high = load_pairs(in + q * SIDE + 16);
        const u32x16 left = SHUFFLE(low, high, EVERY_OTHER, 0), right = SHUFFLE(low, high, EVERY_OTHER, 1);
        even[q] = (left & 0xffffu) | (right << 16);
        odd[q] = (left >> 16) | (right & 0xffff0000u);
    }
    transpose_words(even);
    transpose_words(odd);
    for (int k = 0; k < 16; k++) {
        const u32x16 low = SHUFFLE(even[k], odd[k], ZIP, 0), high = SHUFFLE(even[k], odd[k], ZIP, 16);
        memcpy(out + k * SIDE, &low, 64);
        memcpy(out + k * SIDE + 16, &high, 64);
    }
}
#else
static void turn(const uint32_t *in, uint32_t *out) {
    for (int k = 0; k < 16; k++)
        for (int r = 0; r < SIDE; r++) {
            const uint32_t left = in[r / 2 * SIDE + 2 * k], right = in[r / 2 * SIDE + 2 * k + 1];
            out[k * SIDE + r] = r & 1 ? (left >> 16) | (right & 0xffff0000u) : (left & 0xffffu) | (right << 16);
        }
}
#endif

// ---- products of blocks: sum[SIDE][SIDE] = a^T w, both [depth][SIDE][2], one chain of dp for each sum

static __attribute__((noinline)) void product_rows(const uint32_t *a, const uint32_t *w, int64_t depth, float *sum,
                                                   int add) {
    wide s[PRODUCT_ROWS][PRODUCT_VECTORS];
#pragma GCC unroll 8
    for (int r = 0; r < PRODUCT_ROWS; r++)
#pragma GCC unroll 8
        for (int v = 0; v < PRODUCT_VECTORS; v++) s[r][v] = add ? load_wide(sum + r * SIDE + v * WIDE) : (wide){0};
    for (int64_t k = 0; k < depth; k++, a += SIDE, w += SIDE) {
        wide_pairs weight[PRODUCT_VECTORS];
#pragma GCC unroll 8
        for (int v = 0; v < PRODUCT_VECTORS; v++) weight[v] = load_wide_pairs(w + v * WIDE);
#pragma GCC unroll 8
        for (int r = 0; r < PRODUCT_ROWS; r++)
#pragma GCC unroll 8
            for (int v = 0; v < PRODUCT_VECTORS; v++) s[r][v] = dp(s[r][v], a[r], weight[v]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < PRODUCT_ROWS; r++)
#pragma GCC unroll 8
        for (int v = 0; v < PRODUCT_VECTORS; v++) store_wide(sum + r * SIDE + v * WIDE, s[r][v]);
}

static void product(const uint32_t *a, const uint32_t *w, int64_t pairs, float *sum) {
    for (int64_t start = 0; start < pairs; start += DEPTH) {
        const int64_t depth = pairs - start < DEPTH ? pairs - start : DEPTH;
        for (int r = 0; r < SIDE; r += PRODUCT_ROWS)
            product_rows(a + start * SIDE + r, w + start * SIDE, depth, sum + r * SIDE, start > 0);
    }
}

// out = factor * own + sum_factor * sum, rounded once; without `own` the first term is left out.
static void combine(const float *sum, float sum_factor, const uint32_t *own, float factor, uint32_t *out) {
    for (int q = 0; q < SIDE / 2; q++)
        for (int c = 0; c < SIDE; c += LANES) {
            f32x16 even = load(sum + 2 * q * SIDE + c) * sum_factor;
            f32x16 odd = load(sum + (2 * q + 1) * SIDE + c) * sum_factor;
            if (own) {
                const u32x16 words = load_pairs(own + q * SIDE + c);
                even = even_row(words) * factor + even;
                odd = odd_row(words) * factor + odd;
            }
            store_rows(out + q * SIDE + c, even, odd);
        }
}

// out[m][m] = factor * own + sum_factor * x^T x, where x is [2 * pairs][m]: the half below the diagonal, mirrored.
static void symmetric_product(const uint32_t *x, int64_t pairs, int64_t m, float sum_factor, const uint32_t *own,
                              float factor, uint32_t *out) {
    float sum[SIDE * SIDE] __attribute__((aligned(64)));
    const int64_t tile = pairs * SIDE, out_tile = m / 2 * SIDE;
    for (int64_t i = 0; i < m / SIDE; i++)
        for (int64_t j = 0; j <= i; j++) {
            const int64_t at = j * out_tile + i * WORDS;
            product(x + i * tile, x + j * tile, pairs, sum);
            combine(sum, sum_factor, own ? own + at : NULL, factor, out + at);
            if (i != j) turn(out + at, out + i * out_tile + j * WORDS);
        }
}

// X <- a X + polynomial X, in both forms, tile by tile of its columns.
static void update(const struct scratch *s, int64_t m, int64_t n, float a) {
    float sum[SIDE * SIDE] __attribute__((aligned(64)));
    const int64_t tile = m / 2 * SIDE;
    for (int64_t j = 0; j < n / SIDE; j++) {
        uint32_t *x = s->pairs + j * tile;
        for (int64_t i = 0; i < m / SIDE; i++) {
            product(s->polynomial + i * tile, x, m / 2, sum);
            combine(sum, 1.0f, x + i * WORDS, a, s->column + i * WORDS);
            turn(s->column + i * WORDS, s->turned + i * (n / 2 * SIDE) + j * WORDS);
        }
        memcpy(x, s->column, (size_t)tile * 4);
    }
}

static void newton_schulz(const struct muon *o, const struct scratch *s, int64_t m, int64_t n) {
    for (int64_t step = 0; step < o->iterations; step++) {
        symmetric_product(s->turned, n / 2, m, 1.0f, NULL, 0.0f, s->gram);
        symmetric_product(s->gram, m / 2, m, o->c, s->gram, o->b, s->polynomial);
        update(s, m, n, o->a);
    }
}

// ---- between the flat buffers and the forms

// Momentum, and its Nesterov form into the pair form of the matrix as it lies in memory. Returns the sum of squares.
static double momentum(const struct muon *o, const struct matrix *x, uint32_t *form) {
    double squares = 0;
    for (int64_t row = 0; row < x->rows; row += 2) {
        f32x16 sums = all(0);
        for (int64_t column = 0; column < x->columns; column += LANES) {
            f32x16 next[2];
            for (int odd = 0; odd < 2; odd++) {
                const int64_t at = (row + odd) * x->columns + column;
                const f32x16 part = load_bf16(x->grad + at) * (1.0f - o->beta);
                const f32x16 m = load(x->momentum + at) * o->beta + part;
                store(x->momentum + at, m);
                next[odd] = m * o->beta + part;
                sums += next[odd] * next[odd];
            }
            store_rows(form + column / SIDE * (x->rows / 2 * SIDE) + row / 2 * SIDE + column % SIDE, next[0], next[1]);
        }
        squares += sum_lanes(sums);
    }
    return squares;
}

// Scales one form and makes the other of it.
static void scale_and_turn(const struct matrix *x, float scale, uint32_t *form, uint32_t *other) {
    for (int64_t i = 0; i < x->rows / SIDE; i++)
        for (int64_t j = 0; j < x->columns / SIDE; j++) {
            uint32_t *block = form + j * (x->rows / 2 * SIDE) + i * WORDS;
            for (int k = 0; k < WORDS; k += LANES) {
                const u32x16 words = load_pairs(block + k);
                store_rows(block + k, even_row(words) * scale, odd_row(words) * scale);
            }
            turn(block, other + i * (x->columns / 2 * SIDE) + j * WORDS);
        }
}

// The step onto the master weight, the bf16 weight of it; zeroes the gradient.
static void apply(const struct muon *o, const struct matrix *x, const uint32_t *form) {
    const float ratio = (float)x->rows / (float)x->columns;
    const float keep = 1.0f - o->lr * o->weight_decay, size = o->lr * sqrtf(ratio > 1.0f ? ratio : 1.0f);
    for (int64_t row = 0; row < x->rows; row += 2)
        for (int64_t column = 0; column < x->columns; column += LANES) {
            const uint32_t *from = form + column / SIDE * (x->rows / 2 * SIDE) + row / 2 * SIDE + column % SIDE;
            const u32x16 words = load_pairs(from);
            const f32x16 steps[2] = {even_row(words), odd_row(words)};
            for (int odd = 0; odd < 2; odd++) {
                const int64_t at = (row + odd) * x->columns + column;
                const f32x16 value = load(x->master + at) * keep - steps[odd] * size;
                store(x->master + at, value);
                store_bf16(x->weight + at, value);
            }
        }
    memset(x->grad, 0, (size_t)(x->rows * x->columns) * 2);
}

static void step(const struct muon *o, const struct matrix *x, const struct scratch *s) {
    const int tall = x->rows > x->columns;  // then X is the transpose, whose pair form is the other one
    uint32_t *form = tall ? s->turned : s->pairs, *other = tall ? s->pairs : s->turned;
    const double squares = momentum(o, x, form);
    scale_and_turn(x, (float)(1.0 / (sqrt(squares) + 1e-7)), form, other);
    newton_schulz(o, s, tall ? x->columns : x->rows, tall ? x->rows : x->columns);
    apply(o, x, form);
}

// blocks: [count][3], start in the flat buffers, rows, columns (multiples of 32), best the largest first.
// Returns 0, or 1 where memory was short: some matrices then lack their step.
EXPORT int lapis_muon(bf16 *weight, bf16 *grad, float *master, float *first, const int64_t *blocks, int64_t count,
                      const struct muon *o) {
    int64_t elements = 0, side = 0;
    int failed = 0;
    for (int64_t i = 0; i < count; i++) {
        const int64_t rows = blocks[3 * i + 1], columns = blocks[3 * i + 2], least = rows < columns ? rows : columns;
        if (rows * columns > elements) elements = rows * columns;
        if (least > side) side = least;
    }
#pragma omp parallel reduction(| : failed)
    {
        const uint64_t mode = flush_subnormals();
        uint32_t *work = aligned_alloc(64, (size_t)(elements + side * side + side / 2 * SIDE) * 4);
        const struct scratch s = {work, work + elements / 2, work + elements, work + elements + side * side / 2,
                                  work + elements + side * side};
        failed |= work == NULL;
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < count; i++) {
            const int64_t at = blocks[3 * i];
            const struct matrix x = {weight + at, grad + at,         master + at,
                                     first + at,  blocks[3 * i + 1], blocks[3 * i + 2]};
            if (work) step(o, &x, &s);
        }
        free(work);
        restore_mode(mode);
    }
    return failed;
}
