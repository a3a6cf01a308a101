// Gradient of causal attention for head sizes of any multiple of 16; not part of the bit contract.
// Blocks of 32 queries and 32 keys, recomputing the probabilities from the saved log denominators (Dao et al. 2022).
// Scores are kept transposed, [key][query], so that every product is the same panel: broadcast pairs x vectors.
#include "cpu_transpose.h"

#define BLOCK 32     // queries and keys per block
#define COLUMNS 32   // of a panel
#define LOG2_E 1.44269504f
#if defined(__AVX512F__)
#define PANEL_ROWS 8
#else
#define PANEL_ROWS 2
#endif

struct attention_backward {
    const bf16 *q, *k, *qkv, *o, *grad_o;
    const float *lse, *cos, *sin;  // cos, sin NULL: no rotation
    const int32_t *position;
    bf16 *grad_qkv;
    int64_t heads, kv_heads, size, window;
    float scale;
};
struct workspace {       // of one span of n tokens (padded to whole blocks) and one KV head; all zero-padded
    float *dk, *dv;      // [n][size]
    float *dq;           // [32 queries][size]
    bf16 *k, *v;         // [n][size]
    bf16 *k_rows;        // [n/2 key pairs][size][2]
    bf16 *q_pairs, *do_pairs;                                             // [size/2][32 queries][2]
    bf16 *q_rows, *do_rows;                                               // [16 query pairs][size][2]
    bf16 p[BLOCK * BLOCK], ds[BLOCK * BLOCK], ds_queries[BLOCK * BLOCK];  // [key][query] twice, [query][key]
    float s[BLOCK * BLOCK], dp[BLOCK * BLOCK], lse[BLOCK], delta[BLOCK];
};

INLINE void panel_part(const int vectors, const bf16 *a, int64_t a_stride, const bf16 *b, int64_t columns,
                       int64_t depth, float *out, int64_t out_stride, int add) {
    wide sum[PANEL_ROWS][COLUMNS / WIDE];
#pragma GCC unroll 8
    for (int r = 0; r < PANEL_ROWS; r++)
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) sum[r][v] = add ? load_wide(out + r * out_stride + v * WIDE) : (wide){0};
    for (int64_t k = 0; k < depth; k += 2) {
        wide_pairs weight[COLUMNS / WIDE];
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) weight[v] = load_wide_pairs(b + k * columns + 2 * v * WIDE);
#pragma GCC unroll 8
        for (int r = 0; r < PANEL_ROWS; r++) {
            uint32_t pair;
            memcpy(&pair, a + r * a_stride + k, 4);
#pragma GCC unroll 8
            for (int v = 0; v < vectors; v++) sum[r][v] = dp(sum[r][v], pair, weight[v]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < PANEL_ROWS; r++)
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) store_wide(out + r * out_stride + v * WIDE, sum[r][v]);
}

// out[rows][width] (+)= a[rows][depth] b, where b is laid out as [depth/2][width][2]; rows a multiple of 8, width of 16.
INLINE void panel(const bf16 *a, int64_t a_stride, const bf16 *b, int64_t depth, float *out, int64_t rows,
                  int64_t width, int add) {
    for (int64_t c = 0; c < width; c += COLUMNS)
        for (int64_t r = 0; r < rows; r += PANEL_ROWS) {
            float *to = out + r * width + c;
            if (c + COLUMNS <= width)
                panel_part(COLUMNS / WIDE, a + r * a_stride, a_stride, b + 2 * c, width, depth, to, width, add);
            else panel_part(COLUMNS / WIDE / 2, a + r * a_stride, a_stride, b + 2 * c, width, depth, to, width, add);
        }
}

// Gradient of what was rotated, from that of the rotated. Lanes beyond the head's half hold nothing.
INLINE void unrotate_part(const struct attention_backward *a, const float *x, int64_t half, int64_t table, bf16 *y,
                          const int lanes) {
    bf16 low[LANES], high[LANES];
    f32x16 first = all(0), second = all(0), c = all(1), s = all(0);
    memcpy(&first, x, (size_t)lanes * 4);
    memcpy(&second, x + half, (size_t)lanes * 4);
    if (a->cos) {
        memcpy(&c, a->cos + table, (size_t)lanes * 4);
        memcpy(&s, a->sin + table, (size_t)lanes * 4);
    }
    store_bf16(low, first * c + second * s);
    store_bf16(high, second * c - first * s);
    memcpy(y, low, (size_t)lanes * 2);
    memcpy(y + half, high, (size_t)lanes * 2);
}
INLINE void unrotate(const struct attention_backward *a, const int64_t size, const float *x, int64_t token, bf16 *y) {
    const int64_t half = size / 2, table = a->position[token] * half;
    int64_t i = 0;
    for (; i + LANES <= half; i += LANES) unrotate_part(a, x + i, half, table + i, y + i, LANES);
    if (i < half) unrotate_part(a, x + i, half, table + i, y + i, LANES / 2);
}

// Two rows as pairs of their elements: [size][2].
INLINE void pair_rows(const bf16 *even, const bf16 *odd, const int64_t size, bf16 *pairs) {
    for (int64_t d = 0; d < size; d += LANES) interleave(even + d, odd + d, pairs + 2 * d);
}

// Copies up to 32 rows into both pair layouts; missing rows are zero.
INLINE void pack_block(const bf16 *rows, const int64_t size, int64_t stride, int64_t count, bf16 *pairs, bf16 *interleaved) {
    static const bf16 zeros[256];
    const bf16 *row[BLOCK];
    for (int64_t r = 0; r < BLOCK; r++) row[r] = r < count ? rows + r * stride : zeros;
    for (int64_t r = 0; r < BLOCK; r += 2) pair_rows(row[r], row[r + 1], size, interleaved + r * size);
    for (int64_t r = 0; r < BLOCK; r += LANES) {
        int64_t d = 0;
        for (; d + 2 * LANES <= size; d += 2 * LANES) {
            u32x16 words[LANES];
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++) words[i] = load_pairs(row[r + i] + d);
            transpose_words(words);
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++) memcpy(pairs + (d + 2 * i) * BLOCK + 2 * r, &words[i], 64);
        }
        for (; d < size; d += 2)
            for (int i = 0; i < LANES; i++) memcpy(pairs + d * BLOCK + 2 * (r + i), row[r + i] + d, 4);
    }
}

INLINE void load_span(const struct attention_backward *a, const int64_t size, struct workspace *w, int64_t h,
                      int64_t first, int64_t count, int64_t padded) {
    const int64_t width = (a->heads + 2 * a->kv_heads) * size;
    memset(w->k, 0, (size_t)(padded * size) * 2);
    memset(w->v, 0, (size_t)(padded * size) * 2);
    memset(w->dk, 0, (size_t)(padded * size) * 4);
    memset(w->dv, 0, (size_t)(padded * size) * 4);
    for (int64_t t = 0; t < count; t++) {
        const bf16 *value = a->qkv + (first + t) * width + (a->heads + a->kv_heads + h) * size;
        memcpy(w->k + t * size, a->k + ((first + t) * a->kv_heads + h) * size, (size_t)size * 2);
        memcpy(w->v + t * size, value, (size_t)size * 2);
    }
    for (int64_t t = 0; t < padded; t += 2) pair_rows(w->k + t * size, w->k + (t + 1) * size, size, w->k_rows + t * size);
}

// 2^x to about 2e-6 of it, which bf16 does not see: these bits are not in the contract.
INLINE f32x16 exp2_near(f32x16 x) {
#if defined(__AVX512F__)
    static const float series[] = {9.61812911e-3f, 5.55041087e-2f, 2.40226507e-1f, 6.93147181e-1f, 1.0f};  // ln(2)^k / k!
    const f32x16 whole = (f32x16)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const f32x16 rest = x - whole;
    f32x16 sum = all(1.33335581e-3f);
#pragma GCC unroll 5
    for (int k = 0; k < 5; k++) sum = fused(all(series[k]), sum, rest);
    return (f32x16)_mm512_scalef_ps((__m512)sum, (__m512)whole);
#else
    return exp16(x * 0.693147181f);
#endif
}

// Two rows of a block as bf16, and their pairs.
INLINE u32x16 store_pair(bf16 *rows, const f32x16 *v) {
    u32x16 pairs;
#ifdef __AVX512BF16__
    static const uint16_t zip[] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                   8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)v[1], (__m512)v[0]);
    const __m256i first = _mm512_castsi512_si256(both), second = _mm512_extracti64x4_epi64(both, 1);
    memcpy(rows, &first, 32);
    memcpy(rows + BLOCK, &second, 32);
    pairs = (u32x16)_mm512_permutexvar_epi16(_mm512_loadu_si512(zip), both);
#else
    store_bf16(rows, v[0]);
    store_bf16(rows + BLOCK, v[1]);
    interleave(rows, rows + BLOCK, (bf16 *)&pairs);
#endif
    return pairs;
}

// Probabilities and score gradients (without the factor of the scores) of one block pair from its scores, in the layouts
// that the products want. distance: of the first query from the first key.
static void score_gradient(const struct attention_backward *a, struct workspace *w, int64_t distance) {
    const i32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const int32_t window = a->window && a->window < INT32_MAX ? (int32_t)a->window : INT32_MAX;
    const int masked = distance < BLOCK || distance + BLOCK > window;
    const float scale = a->scale * LOG2_E;
    for (int half = 0; half < BLOCK; half += LANES) {
        const f32x16 lse = load(w->lse + half) * LOG2_E, delta = load(w->delta + half);
        u32x16 words[LANES];  // [key pair][query] of two
#pragma GCC unroll 2
        for (int key = 0; key < BLOCK; key += 2) {
            f32x16 p[2], ds[2];
#pragma GCC unroll 2
            for (int i = 0; i < 2; i++) {
                const int at = (key + i) * BLOCK + half;
                p[i] = exp2_near(load(w->s + at) * scale - lse);
                if (masked) {
                    const i32x16 back = lane + (half - key - i + (int32_t)distance);
                    p[i] = (f32x16)((i32x16)p[i] & (back >= 0) & (back < window));
                }
                ds[i] = p[i] * (load(w->dp + at) - delta);
            }
            store_pair(w->p + key * BLOCK + half, p);
            words[key / 2] = store_pair(w->ds + key * BLOCK + half, ds);
        }
        transpose_words(words);
        memcpy(w->ds_queries + half * BLOCK, words, sizeof words);
    }
}

// One block of queries of one head against all key blocks that it sees, up to its own.
INLINE void query_block(const struct attention_backward *a, const int64_t size, struct workspace *w, int64_t head,
                        int64_t first, int64_t count, int64_t padded, int64_t block) {
    const int64_t start = block * BLOCK, here = count - start < BLOCK ? count - start : BLOCK;
    const int64_t stride = a->heads * size, at = (first + start) * stride + head * size;
    pack_block(a->q + at, size, stride, here, w->q_pairs, w->q_rows);
    pack_block(a->grad_o + at, size, stride, here, w->do_pairs, w->do_rows);
    for (int64_t r = 0; r < BLOCK; r++) {
        f32x16 sum = all(0);
        for (int64_t d = 0; d < size && r < here; d += LANES)
            sum += load_bf16(a->grad_o + at + r * stride + d) * load_bf16(a->o + at + r * stride + d);
        w->delta[r] = sum_lanes(sum);
        w->lse[r] = r < here ? a->lse[(first + start + r) * a->heads + head] : 1e30f;  // padding: probability 0
    }
    memset(w->dq, 0, (size_t)(size * BLOCK) * 4);
    for (int64_t key_block = a->window && start >= a->window ? (start - a->window + 1) / BLOCK : 0; key_block <= block;
         key_block++) {
        const int64_t keys = key_block * BLOCK * size;
        panel(w->k + keys, size, w->q_pairs, size, w->s, BLOCK, BLOCK, 0);
        panel(w->v + keys, size, w->do_pairs, size, w->dp, BLOCK, BLOCK, 0);
        score_gradient(a, w, (block - key_block) * BLOCK);
        panel(w->p, BLOCK, w->do_rows, BLOCK, w->dv + keys, BLOCK, size, 1);
        panel(w->ds, BLOCK, w->q_rows, BLOCK, w->dk + keys, BLOCK, size, 1);
        panel(w->ds_queries, BLOCK, w->k_rows + keys, BLOCK, w->dq, BLOCK, size, 1);
    }
    const int64_t width = (a->heads + 2 * a->kv_heads) * size;
    for (int64_t r = 0; r < here; r++) {
        float *dq = w->dq + r * size;
        for (int64_t d = 0; d < size; d += LANES) store(dq + d, load(dq + d) * a->scale);
        unrotate(a, size, dq, first + start + r, a->grad_qkv + (first + start + r) * width + head * size);
    }
}

// Gradients of one span for one KV head and its group of query heads.
INLINE void span(const struct attention_backward *a, const int64_t size, int64_t h, int64_t first, int64_t end) {
    const int64_t group = a->heads / a->kv_heads, width = (a->heads + 2 * a->kv_heads) * size;
    const int64_t count = end - first, padded = (count + BLOCK - 1) / BLOCK * BLOCK, all_keys = padded * size;
    struct workspace *w = malloc(sizeof *w + (size_t)(all_keys * (2 * 4 + 3 * 2) + size * BLOCK * (4 + 4 * 2)));
    if (!w) abort();
    w->dk = (float *)(w + 1);
    w->dv = w->dk + all_keys;
    w->dq = w->dv + all_keys;
    w->k = (bf16 *)(w->dq + size * BLOCK);
    w->v = w->k + all_keys;
    w->k_rows = w->v + all_keys;
    w->q_pairs = w->k_rows + all_keys;
    w->do_pairs = w->q_pairs + size * BLOCK;
    w->q_rows = w->do_pairs + size * BLOCK;
    w->do_rows = w->q_rows + size * BLOCK;
    load_span(a, size, w, h, first, count, padded);
    for (int64_t head = h * group; head < (h + 1) * group; head++)
        for (int64_t block = 0; block < padded / BLOCK; block++) query_block(a, size, w, head, first, count, padded, block);
    for (int64_t t = 0; t < count; t++) {
        bf16 *out = a->grad_qkv + (first + t) * width + (a->heads + h) * size;
        float *dk = w->dk + t * size;
        for (int64_t d = 0; d < size; d += LANES) store(dk + d, load(dk + d) * a->scale);
        unrotate(a, size, dk, first + t, out);
        for (int64_t d = 0; d < size; d += LANES)
            store_bf16(out + a->kv_heads * size + d, load(w->dv + t * size + d));
    }
    free(w);
}

static void span_backward(const struct attention_backward *a, int64_t h, int64_t first, int64_t end) {
    if (a->size == 32) span(a, 32, h, first, end);  // the compiler unrolls loops of known length
    else if (a->size == 64) span(a, 64, h, first, end);
    else if (a->size == 128) span(a, 128, h, first, end);
    else span(a, a->size, h, first, end);
}

// spans: [count][2] tokens. grad_qkv is filled completely for the tokens of the spans.
EXPORT void lapis_attention_backward(const int64_t *spans, int64_t count, const int32_t *position, const bf16 *q,
                                     const bf16 *k, const bf16 *qkv, const bf16 *o, const float *lse,
                                     const bf16 *grad_o, const float *cos, const float *sin, bf16 *grad_qkv,
                                     int64_t heads, int64_t kv_heads, int64_t size, int64_t window) {
    const struct attention_backward a = {q,        k,        qkv,   o,        grad_o,
                                         lse,      cos,      sin,   position, grad_qkv,
                                         heads,    kv_heads, size,  window,   (float)(1.0 / sqrt((double)size))};
#pragma omp parallel
    {
        const uint64_t mode = flush_subnormals();
#pragma omp for schedule(dynamic, 1)
        for (int64_t item = 0; item < count * kv_heads; item++)
            span_backward(&a, item % kv_heads, spans[2 * (item / kv_heads)], spans[2 * (item / kv_heads) + 1]);
        restore_mode(mode);
    }
}
