// Paged attention for head sizes of any multiple of 16. Order of sums: contract.md.
#include "cpu_attention.h"

#if defined(__AVX512F__)
#define ROWS 12       // (query, head) rows that share the loads of a page's keys
#define VALUE_ROWS 6  // and of its values
#else
#define ROWS 2
#define VALUE_ROWS 2
#endif
#define EXP_ROWS 4    // whose exponentials are computed side by side
#define BLOCK_ROWS 24  // rows that walk the pages together, ROWS at a time
#define KEY_VECTORS (PAGE / WIDE < 4 ? PAGE / WIDE : 4)  // keys whose scores are in registers at a time
#define SUM_VECTORS 4                                    // dims whose sums are

struct walk {  // some (query, head) rows of one KV head and one run on their way through the pages
    const uint32_t *q[BLOCK_ROWS];
    int64_t from[BLOCK_ROWS], position[BLOCK_ROWS];  // first and last key that the row sees
    float max[BLOCK_ROWS + LANES], total[BLOCK_ROWS + LANES], sum[BLOCK_ROWS * MAX_HEAD];
};
struct block {  // what a page holds of one KV head
    const char *keys, *values;
    const float *key_scales, *value_scales;    // NULL: the numbers stand for themselves
    const char *next_keys, *next_values;       // of the page to come
    int64_t first;                             // position of the first key
};

INLINE wide load_bytes(const int8_t *p) {
#if defined(__AVX512F__)
    return (wide)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
#elif defined(__AVX2__)
    return (wide)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
#else
    return (wide){p[0], p[1], p[2], p[3]};
#endif
}
// Pairs of bf16 from two rows of whole numbers: exact, since they have at most 8 bits.
INLINE wide_pairs pairs_of(const int8_t *even, const int8_t *odd) {
    return (wide_pairs)load_bytes(even) >> 16 | (wide_pairs)load_bytes(odd);
}
INLINE wide_pairs load_keys(const struct block *b, const int int8, int64_t pair, int key) {
    const int8_t *bytes = (const int8_t *)b->keys + 2 * pair * PAGE + key;
    return int8 ? pairs_of(bytes, bytes + PAGE) : load_wide_pairs(b->keys + 4 * (pair * PAGE + key));
}
INLINE wide_pairs load_values(const struct block *b, const int int8, int64_t size, int64_t pair, int64_t dim) {
    const int8_t *bytes = (const int8_t *)b->values + 2 * pair * size + dim;
    return int8 ? pairs_of(bytes, bytes + size) : load_wide_pairs(b->values + 4 * (pair * size + dim));
}

#define LANE ((i32x16){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15})

// Which of 16 keys of a page a row sees.
INLINE i32x16 seen(const struct walk *w, int64_t row, const struct block *b, int32_t key) {
    const int32_t from = (int32_t)(w->from[row] - b->first) - key, last = (int32_t)(w->position[row] - b->first) - key;
    return (LANE <= last) & (LANE >= from);
}

// Online softmax (Milakov & Gimelshein 2018) of one page's scores: new maxima and sums, probabilities as bf16, and what
// the sums of values so far are to be multiplied by. Lane r of a vector of maxima, sums or factors is row r.
INLINE void softmax_page(const int rows, struct walk *w, int64_t row, const struct block *b, float scale,
                         float score[][PAGE], uint32_t pairs[][PAGE / 2], float *factor) {
    const i32x16 own = LANE < rows;
    const int masked = w->position[row] - b->first < PAGE - 1 || w->from[row + rows - 1] > b->first;
    f32x16 part[ROWS];
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++) {
        f32x16 s0 = load(score[r]) * scale, s1 = load(score[r] + LANES) * scale;
        if (b->key_scales) {
            s0 = s0 * load(b->key_scales);
            s1 = s1 * load(b->key_scales + LANES);
        }
        if (masked) {
            s0 = choose(seen(w, row + r, b, 0), s0, all(-INFINITY));
            s1 = choose(seen(w, row + r, b, LANES), s1, all(-INFINITY));
        }
        store(score[r], s0);
        store(score[r] + LANES, s1);
        part[r] = larger(s0, s1);
    }
    float maximum[LANES];
    const f32x16 page_max = max_lanes_of(rows, part), before = load(w->max + row);
    const i32x16 raised = (page_max > before) & own;
    f32x16 change = before - page_max;
    exp_falling(1, &change);
    const f32x16 factors = choose(raised, change, all(1.0f));
    store(maximum, choose(raised, page_max, before));
    store(w->max + row, load(maximum));
    store(factor, factors);
#pragma GCC unroll 12
    for (int first = 0; first < rows; first += EXP_ROWS) {
        f32x16 p[2 * EXP_ROWS];
        const int some = rows - first < EXP_ROWS ? rows - first : EXP_ROWS;
#pragma GCC unroll 12
        for (int i = 0; i < 2 * some; i++)
            p[i] = load(score[first + i / 2] + i % 2 * LANES) - maximum[first + i / 2];
        exp_falling(2 * some, p);
#pragma GCC unroll 12
        for (int i = 0; i < 2 * some; i++) {
            const int r = first + i / 2, key = i % 2 * LANES;
            if (masked) p[i] = (f32x16)((i32x16)p[i] & seen(w, row + r, b, key));
            if (key) part[r] = p[i - 1] + p[i];
        }
#pragma GCC unroll 12
        for (int i = 0; i < 2 * some; i++) {
            const int key = i % 2 * LANES;
            if (b->value_scales) p[i] = p[i] * load(b->value_scales + key);
            store_bf16((bf16 *)pairs[first + i / 2] + key, p[i]);
        }
    }
    const f32x16 total = load(w->total + row);
    store(w->total + row, choose(own, total * factors + sum_lanes_of(rows, part), total));
}

// Adds a page's values to the sums of some dims.
INLINE void add_values(const int rows, const int int8, const int vectors, const struct block *b, float *sums,
                       int64_t size, int64_t dim, uint32_t pairs[][PAGE / 2], const float *factor,
                       const char *ahead) {
    wide sum[VALUE_ROWS][SUM_VECTORS];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int i = 0; i < vectors; i++) sum[r][i] = load_wide(sums + r * size + dim + i * WIDE) * factor[r];
#pragma GCC unroll 1
    for (int j = 0; j < PAGE / 2; j++) {
        wide_pairs v[SUM_VECTORS];
#pragma GCC unroll 8
        for (int i = 0; i < vectors; i++) v[i] = load_values(b, int8, size, j, dim + i * WIDE);
        if (ahead)
#pragma GCC unroll 8
            for (int i = 0; i < vectors; i++)
                __builtin_prefetch(ahead + (int8 ? 2 : 4) * (j * size + dim + i * WIDE));
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
            for (int i = 0; i < vectors; i++) sum[r][i] = dp(sum[r][i], pairs[r][j], v[i]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int i = 0; i < vectors; i++) store_wide(sums + r * size + dim + i * WIDE, sum[r][i]);
}

// Adds a page's values to the sums of a few rows.
INLINE void add_page(const int rows, const int int8, const struct block *b, float *sums, int64_t size,
                     uint32_t pairs[][PAGE / 2], const float *factor, const char *ahead) {
    int64_t dim = 0;
    for (; dim + SUM_VECTORS * WIDE <= size; dim += SUM_VECTORS * WIDE)
        add_values(rows, int8, SUM_VECTORS, b, sums, size, dim, pairs, factor, ahead);
    if (SUM_VECTORS * WIDE > 32 && dim + 32 <= size) {
        add_values(rows, int8, SUM_VECTORS * WIDE > 32 ? 32 / WIDE : 1, b, sums, size, dim, pairs, factor, ahead);
        dim += 32;
    }
    if (SUM_VECTORS * WIDE > 16 && dim < size)
        add_values(rows, int8, SUM_VECTORS * WIDE > 16 ? 16 / WIDE : 1, b, sums, size, dim, pairs, factor, ahead);
}

// One step of some rows: scores of a page's keys, softmax, its values.
INLINE void tile(const int rows, const int int8, const struct attention *a, struct walk *w, const struct block *b,
                 int64_t row) {
    const int64_t size = a->size;
    float score[ROWS][PAGE], factor[LANES];
    uint32_t pairs[ROWS][PAGE / 2];
    for (int key = 0; key < PAGE; key += KEY_VECTORS * WIDE) {
        wide sum[ROWS][KEY_VECTORS];
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
            for (int i = 0; i < KEY_VECTORS; i++) sum[r][i] = (wide){0};
#pragma GCC unroll 1
        for (int64_t d = 0; d < size / 2; d++) {
            wide_pairs k[KEY_VECTORS];
#pragma GCC unroll 8
            for (int i = 0; i < KEY_VECTORS; i++) k[i] = load_keys(b, int8, d, key + i * WIDE);
            if (row == 0 && key == 0) {
                const int64_t at = d * (int8 ? 64 : 128);
                __builtin_prefetch(b->next_keys + at);
                if (!int8) __builtin_prefetch(b->next_keys + at + 64);
            }
#pragma GCC unroll 12
            for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
                for (int i = 0; i < KEY_VECTORS; i++) sum[r][i] = dp(sum[r][i], w->q[row + r][d], k[i]);
        }
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
            for (int i = 0; i < KEY_VECTORS; i++) store_wide(&score[r][key + i * WIDE], sum[r][i]);
    }
    softmax_page(rows, w, row, b, a->scale, score, pairs, factor);
    const int some = rows <= VALUE_ROWS ? rows : (rows + 1) / 2;
    float *sums = w->sum + row * size;
    add_page(some, int8, b, sums, size, pairs, factor, row == 0 ? b->next_values : NULL);
    if (rows > some) add_page(rows - some, int8, b, sums + some * size, size, pairs + some, factor + some, NULL);
}

typedef void (*tile_function)(const struct attention *, struct walk *, const struct block *, int64_t);
#define DEFINE_TILE(n)                                                                                           \
    static __attribute__((noinline)) void tile##n(const struct attention *a, struct walk *w, const struct block *b, \
                                                  int64_t row) {                                                 \
        tile(n, 0, a, w, b, row);                                                                                \
    }                                                                                                            \
    static __attribute__((noinline)) void tile##n##_int8(const struct attention *a, struct walk *w,              \
                                                         const struct block *b, int64_t row) {                   \
        tile(n, 1, a, w, b, row);                                                                                \
    }
DEFINE_TILE(1)
DEFINE_TILE(2)
#if ROWS > 2
DEFINE_TILE(3)
DEFINE_TILE(4)
DEFINE_TILE(5)
DEFINE_TILE(6)
DEFINE_TILE(7)
DEFINE_TILE(8)
DEFINE_TILE(9)
DEFINE_TILE(10)
DEFINE_TILE(11)
DEFINE_TILE(12)
#endif
static const tile_function tiles[2][ROWS + 1] = {
#if ROWS > 2
    {NULL, tile1, tile2, tile3, tile4, tile5, tile6, tile7, tile8, tile9, tile10, tile11, tile12},
    {NULL, tile1_int8, tile2_int8, tile3_int8, tile4_int8, tile5_int8, tile6_int8, tile7_int8, tile8_int8, tile9_int8,
     tile10_int8, tile11_int8, tile12_int8},
#else
    {NULL, tile1, tile2},
    {NULL, tile1_int8, tile2_int8},
#endif
};

// A block of whole numbers in the layout of bf16, for when several tiles will read it.
static void unpack_block(int64_t size, struct block *b, uint32_t *keys, uint32_t *values) {
    for (int64_t d = 0; d < size / 2; d++)
        for (int key = 0; key < PAGE; key += WIDE) {
            const wide_pairs pairs = load_keys(b, 1, d, key);
            memcpy(keys + d * PAGE + key, &pairs, sizeof pairs);
        }
    for (int64_t j = 0; j < PAGE / 2; j++)
        for (int64_t d = 0; d < size; d += WIDE) {
            const wide_pairs pairs = load_values(b, 1, size, j, d);
            memcpy(values + j * size + d, &pairs, sizeof pairs);
        }
    b->keys = (const char *)keys;
    b->values = (const char *)values;
}

static void begin(const struct attention *a, struct walk *w, int64_t kv_head, int64_t first, int64_t row,
                  int64_t rows) {
    const int64_t group = a->heads / a->kv_heads;
    for (int64_t r = 0; r < rows; r++) {
        const int64_t token = first + (row + r) / group, position = a->batch->position[token];
        const int64_t at = token * a->heads + kv_head * group + (row + r) % group;
        w->q[r] = (const uint32_t *)(a->q + at * a->size);
        w->position[r] = position;
        w->from[r] = a->window && position >= a->window ? position - a->window + 1 : 0;
    }
    for (int64_t r = 0; r < BLOCK_ROWS + LANES; r++) {
        w->max[r] = -INFINITY;
        w->total[r] = 0;
    }
    memset(w->sum, 0, (size_t)(rows * a->size) * 4);
}

// Up to BLOCK_ROWS rows of one run, all in the same page of positions, walk the pages that they see.
static void attend(const struct attention *a, int64_t kv_head, int64_t first, int64_t row, int64_t rows) {
    struct walk w;
    uint32_t keys[MAX_HEAD * PAGE / 2], values[MAX_HEAD * PAGE / 2];
    const int64_t count = (rows + ROWS - 1) / ROWS, scales = a->size * PAGE;
    begin(a, &w, kv_head, first, row, rows);
    const int64_t last = w.position[0] / PAGE;
    for (int64_t page = w.from[0] / PAGE; page <= last; page++) {
        const int64_t here = block_of(a, page_of(a->batch, first, page), kv_head);
        const int64_t ahead = page + (a->int8 ? 2 : 1);  // by then it has come from memory
        const int64_t next = block_of(a, page_of(a->batch, first, ahead < last ? ahead : last), kv_head);
        struct block b = {a->keys + here, a->values + here, NULL, NULL, a->keys + next, a->values + next, page * PAGE};
        if (a->int8) {
            b.key_scales = (const float *)(b.keys + scales);
            b.value_scales = (const float *)(b.values + scales);
            if (count > 1) unpack_block(a->size, &b, keys, values);
        }
        for (int64_t i = 0; i < count; i++)  // tiles of about equal size
            tiles[a->int8 && count == 1][rows * (i + 1) / count - rows * i / count](a, &w, &b, rows * i / count);
    }
    const int64_t group = a->heads / a->kv_heads;
    for (int64_t r = 0; r < rows; r++) {
        const int64_t at = (first + (row + r) / group) * a->heads + kv_head * group + (row + r) % group;
        const float inverse = 1.0f / w.total[r];
        for (int64_t i = 0; i < a->size; i += LANES)
            store_bf16(a->o + at * a->size + i, load(w.sum + r * a->size + i) * inverse);
        if (a->lse) a->lse[at] = row_lse(w.max[r], w.total[r]);
    }
}

// All rows of one run for one KV head: tokens x query heads of the group.
static void attend_run(const struct attention *a, int64_t kv_head, int64_t first, int64_t end) {
    const int64_t rows = (end - first) * (a->heads / a->kv_heads);
    for (int64_t row = 0; row < rows; row += BLOCK_ROWS)
        attend(a, kv_head, first, row, rows - row < BLOCK_ROWS ? rows - row : BLOCK_ROWS);
}

// The threads of a region share the work.
EXPORT void lapis_attention_team(const struct batch *batch, const bf16 *qkv, int64_t heads, int64_t kv_heads,
                                 int64_t size, int64_t window, const float *cos, const float *sin, char *keys,
                                 char *values, int int8, bf16 *q, bf16 *k, bf16 *o, float *lse) {
    const struct attention a = {batch, qkv,      cos,  sin,    keys, values, q, k, o, lse,
                                heads, kv_heads, size, window, int8, (float)(1.0 / sqrt((double)size))};
    const int alone = runs_are_alone(batch), chunk = batch->tokens < 1920 ? 1 + (int)(batch->tokens / 128) : 16;
    if (!alone) {
#pragma omp for schedule(static) nowait
        for (int64_t t = 0; t < batch->tokens; t++)
            for (int64_t h = 0; h < kv_heads && starts_run(batch, t); h++)
                attention_write(&a, h, t, end_of_run(batch, t));
        team_barrier();
    }
#pragma omp for schedule(dynamic, chunk) nowait
    for (int64_t item = batch->tokens * kv_heads - 1; item >= 0; item--) {  // later runs have more keys: they go first
        const int64_t first = item / kv_heads, h = item % kv_heads;
        if (!starts_run(batch, first)) continue;
        const int64_t end = end_of_run(batch, first);
        if (alone) attention_write(&a, h, first, end);
        attend_run(&a, h, first, end);
    }
    team_barrier();
}

EXPORT void lapis_attention(const struct batch *batch, const bf16 *qkv, int64_t heads, int64_t kv_heads, int64_t size,
                            int64_t window, const float *cos, const float *sin, char *keys, char *values, int int8,
                            bf16 *q, bf16 *k, bf16 *o, float *lse) {
    int64_t keys_read = 0;
    for (int64_t t = 0; t < batch->tokens; t++)
        keys_read += (window && window < batch->position[t] ? window : batch->position[t]) + PAGE;
#pragma omp parallel if (keys_read * heads > 2048)
    {
        const uint64_t mode = flush_subnormals();
        lapis_attention_team(batch, qkv, heads, kv_heads, size, window, cos, sin, keys, values, int8, q, k, o, lse);
        restore_mode(mode);
    }
}
