// Paged attention for one head size; included once per size with HEAD defined. Order of sums: contract.md.
// A page holds 32 keys. Keys of a page and KV head: [HEAD/2 dim pairs][32 keys][2]; values: [16 key pairs][HEAD][2].

#define GLUE_(name, head) name##_##head
#define GLUE(name, head) GLUE_(name, head)
#define NAME(name) GLUE(name, HEAD)
#define VECTORS (HEAD / WIDE)
#if defined(__AVX512F__)
#define ATTENTION_ROWS (HEAD == 32 ? 8 : HEAD == 64 ? 6 : 3)  // (query, head) rows that share the loads of a page
#else
#define ATTENTION_ROWS (HEAD == 32 ? 2 : 1)
#endif

static void NAME(rotate)(const bf16 *x, const float *cos, const float *sin, bf16 *y) {
    for (int i = 0; i < HEAD / 2; i += LANES) {
        f32x16 a = load_bf16(x + i), b = load_bf16(x + i + HEAD / 2), c = load(cos + i), s = load(sin + i);
        store_bf16(y + i, a * c - b * s);
        store_bf16(y + i + HEAD / 2, b * c + a * s);
    }
}

// Rotates queries and keys of one run of tokens and puts its keys and values into the run's page.
static void NAME(write_run)(const struct attention *a, int64_t first, int64_t end) {
    const int64_t head_page = HEAD * PAGE, width = (a->heads + 2 * a->kv_heads) * HEAD;
    const int64_t page = page_of(a->batch, first, a->batch->position[first] / PAGE);
    bf16 *keys = a->keys + page * a->kv_heads * head_page, *values = a->values + page * a->kv_heads * head_page;
    if (a->batch->position[first] % PAGE == 0) {  // what an earlier owner left must not matter, not even NaN
        memset(keys, 0, (size_t)(a->kv_heads * head_page) * 2);
        memset(values, 0, (size_t)(a->kv_heads * head_page) * 2);
    }
    for (int64_t t = first; t < end; t++) {
        const int64_t position = a->batch->position[t], j = position % PAGE;
        const float *cos = a->cos + position * (HEAD / 2), *sin = a->sin + position * (HEAD / 2);
        const bf16 *row = a->qkv + t * width;
        for (int64_t h = 0; h < a->heads; h++)
            NAME(rotate)(row + h * HEAD, cos, sin, a->q + (t * a->heads + h) * HEAD);
        for (int64_t h = 0; h < a->kv_heads; h++) {
            uint32_t key[HEAD / 2];
            const bf16 *value = row + (a->heads + a->kv_heads + h) * HEAD;
            NAME(rotate)(row + (a->heads + h) * HEAD, cos, sin, (bf16 *)key);
            if (a->k) memcpy(a->k + (t * a->kv_heads + h) * HEAD, key, sizeof key);
            uint32_t *key_page = (uint32_t *)(keys + h * head_page);
            for (int d = 0; d < HEAD / 2; d++) key_page[d * PAGE + j] = key[d];
            bf16 *value_page = values + h * head_page + (j / 2) * HEAD * 2;
            for (int d = 0; d < HEAD; d += LANES) {  // one half of each pair; the other one stays
                const u32x16 high = (u32x16)load_bf16(value + d), pair = load_pairs(value_page + 2 * d);
                const u32x16 joined = j % 2 ? (pair & 0xffffu) | high : (pair & 0xffff0000u) | high >> 16;
                memcpy(value_page + 2 * d, &joined, 64);
            }
        }
    }
}

// Online softmax (Milakov & Gimelshein 2018) of one page's scores: new maximum and sum, probabilities as bf16.
INLINE float NAME(softmax_page)(f32x16 s0, f32x16 s1, int64_t last, float *max, float *sum, uint32_t *pairs) {
    const i32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    i32x16 seen0 = lane >= 0, seen1 = seen0;
    if (last < PAGE - 1) {
        seen0 = lane <= (int32_t)last;
        seen1 = lane + LANES <= (int32_t)last;
        s0 = choose(seen0, s0, all(-INFINITY));
        s1 = choose(seen1, s1, all(-INFINITY));
    }
    float page_max = max_lanes(larger(s0, s1)), factor = 1.0f;
    if (page_max > *max) {
        factor = exp16(all(*max - page_max))[0];
        *max = page_max;
    }
    f32x16 p0 = (f32x16)((i32x16)exp16(s0 - *max) & seen0), p1 = (f32x16)((i32x16)exp16(s1 - *max) & seen1);
    *sum = *sum * factor + sum_lanes(p0 + p1);
    store_bf16((bf16 *)pairs, p0);
    store_bf16((bf16 *)pairs + LANES, p1);
    return factor;
}

// A few (query, head) rows of one sequence, all in the same page of positions, walk the pages from position 0.
INLINE void NAME(attend)(const int rows, const struct attention *a, int64_t kv_head, int64_t first, int64_t row) {
    const int64_t group = a->heads / a->kv_heads, head_page = HEAD * PAGE;
    const uint32_t *q[ATTENTION_ROWS];
    int64_t at[ATTENTION_ROWS], position[ATTENTION_ROWS];
    wide sum[ATTENTION_ROWS][VECTORS];
    float max[ATTENTION_ROWS], total[ATTENTION_ROWS];
    for (int r = 0; r < rows; r++) {
        const int64_t token = first + (row + r) / group;
        at[r] = token * a->heads + kv_head * group + (row + r) % group;
        position[r] = a->batch->position[token];
        q[r] = (const uint32_t *)(a->q + at[r] * HEAD);
        max[r] = -INFINITY;
        total[r] = 0;
        for (int i = 0; i < VECTORS; i++) sum[r][i] = (wide){0};
    }
    const int64_t pages = position[0] / PAGE + 1;
    for (int64_t page = 0; page < pages; page++) {
        const int64_t next = page + 1 < pages ? page + 1 : page;
        const int64_t here = (page_of(a->batch, first, page) * a->kv_heads + kv_head) * head_page;
        const int64_t ahead = (page_of(a->batch, first, next) * a->kv_heads + kv_head) * head_page;
        wide score[ATTENTION_ROWS][PAGE / WIDE];
        uint32_t pairs[ATTENTION_ROWS][PAGE / 2];
        for (int r = 0; r < rows; r++)
            for (int i = 0; i < PAGE / WIDE; i++) score[r][i] = (wide){0};
        for (int d = 0; d < HEAD / 2; d++) {
            wide_pairs key[PAGE / WIDE];
#pragma GCC unroll 8
            for (int i = 0; i < PAGE / WIDE; i++) key[i] = load_wide_pairs(a->keys + here + d * 64 + i * 2 * WIDE);
            if (rows < ATTENTION_ROWS) {  // few rows: the pages come from memory
                __builtin_prefetch(a->keys + ahead + d * 64);
                __builtin_prefetch(a->keys + ahead + d * 64 + 32);
                __builtin_prefetch(a->values + ahead + d * 64);
                __builtin_prefetch(a->values + ahead + d * 64 + 32);
            }
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
                for (int i = 0; i < PAGE / WIDE; i++) score[r][i] = dp(score[r][i], q[r][d], key[i]);
        }
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            const int64_t last = position[r] - page * PAGE;
            const f32x16 s0 = join(score[r]) * a->scale, s1 = join(score[r] + LANES / WIDE) * a->scale;
            const float factor = NAME(softmax_page)(s0, s1, last, &max[r], &total[r], pairs[r]);
            for (int i = 0; i < VECTORS; i++) sum[r][i] = sum[r][i] * factor;
        }
#pragma GCC unroll 1
        for (int j = 0; j < PAGE / 2; j++) {
            const bf16 *value = a->values + here + j * HEAD * 2;
            wide_pairs v[VECTORS];
#pragma GCC unroll 16
            for (int i = 0; i < VECTORS; i++) v[i] = load_wide_pairs(value + i * 2 * WIDE);
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++)
#pragma GCC unroll 16
                for (int i = 0; i < VECTORS; i++) sum[r][i] = dp(sum[r][i], pairs[r][j], v[i]);
        }
    }
    for (int r = 0; r < rows; r++) {
        const float inverse = 1.0f / total[r];
        for (int i = 0; i < HEAD; i += LANES)
            store_bf16(a->o + at[r] * HEAD + i, join(sum[r] + i / WIDE) * inverse);
        if (a->lse) a->lse[at[r]] = row_lse(max[r], total[r]);
    }
}

#define DEFINE_ATTEND(n)                                                                                      \
    static __attribute__((noinline)) void NAME(attend##n)(const struct attention *a, int64_t h, int64_t t,    \
                                                          int64_t row) {                                      \
        NAME(attend)(n, a, h, t, row);                                                                        \
    }
DEFINE_ATTEND(1)
#if ATTENTION_ROWS >= 2
DEFINE_ATTEND(2)
#endif
#if ATTENTION_ROWS >= 3
DEFINE_ATTEND(3)
#endif
#if ATTENTION_ROWS >= 6
DEFINE_ATTEND(4)
DEFINE_ATTEND(5)
DEFINE_ATTEND(6)
#endif
#if ATTENTION_ROWS >= 8
DEFINE_ATTEND(7)
DEFINE_ATTEND(8)
#endif

static void (*const NAME(attend_rows)[])(const struct attention *, int64_t, int64_t, int64_t) = {
    NULL, NAME(attend1),
#if ATTENTION_ROWS >= 2
    NAME(attend2),
#endif
#if ATTENTION_ROWS >= 3
    NAME(attend3),
#endif
#if ATTENTION_ROWS >= 6
    NAME(attend4), NAME(attend5), NAME(attend6),
#endif
#if ATTENTION_ROWS >= 8
    NAME(attend7), NAME(attend8),
#endif
};

// All rows of one run of tokens for one KV head: tokens x query heads of the group, a few at a time.
static void NAME(attend_run)(const struct attention *a, int64_t kv_head, int64_t first, int64_t end) {
    const int64_t rows = (end - first) * (a->heads / a->kv_heads);
    for (int64_t row = 0; row < rows;) {
        const int64_t left = rows - row, tiles = (left + ATTENTION_ROWS - 1) / ATTENTION_ROWS;
        const int64_t n = (left + tiles - 1) / tiles;  // tiles of about equal size
        NAME(attend_rows)[n](a, kv_head, first, row);
        row += n;
    }
}

#undef DEFINE_ATTEND
#undef ATTENTION_ROWS
#undef VECTORS
#undef NAME
#undef GLUE
#undef GLUE_
