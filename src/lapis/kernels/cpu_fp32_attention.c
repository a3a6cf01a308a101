// Paged attention over fp32 keys and values: the walk of cpu_attention.c, nothing rounded in between (contract.md).
// Page and KV head by KV head lie a block of keys [size][32 keys] and one of values [32 keys][size].
#include "cpu_attention.h"
#include "cpu_fp32.h"

#if defined(__AVX512F__)
#define ROWS 6  // (query, head) rows that share the loads of a page
#else
#define ROWS 2
#endif
#define BLOCK_ROWS 24  // rows that walk the pages together, ROWS at a time
#define KEY_VECTORS (PAGE / WIDE < 4 ? PAGE / WIDE : 4)  // keys whose scores are in registers at a time
#define SUM_VECTORS 4                                    // dims whose sums are

struct call {
    const struct batch *batch;
    const float *qkv, *cos, *sin;  // tables NULL: no rotation
    float *keys, *values;          // pages of this layer
    float *q, *k;                  // rotated queries, and keys if they are wanted
    float *o, *lse;                // log of each row's softmax denominator, or NULL
    int64_t heads, kv_heads, size, window;
    float scale;
};
struct walk {  // some (query, head) rows of one KV head and one run on their way through the pages
    const float *q[BLOCK_ROWS];
    int64_t from[BLOCK_ROWS], position[BLOCK_ROWS];  // first and last key that the row sees
    float max[BLOCK_ROWS], total[BLOCK_ROWS], sum[BLOCK_ROWS * MAX_HEAD];
};

static void rotate(const struct call *a, const float *x, int64_t position, float *y) {
    const int64_t half = a->size / 2;
    if (!a->cos) {
        memcpy(y, x, (size_t)a->size * 4);
        return;
    }
    const float *cos = a->cos + position * half, *sin = a->sin + position * half;
    for (int64_t i = 0; i < half; i++) {
        y[i] = x[i] * cos[i] - x[half + i] * sin[i];
        y[half + i] = x[half + i] * cos[i] + x[i] * sin[i];
    }
}

// One KV head of one run: rotates its group of queries and its keys, puts keys and values into the run's page.
static void write_run(const struct call *a, int64_t h, int64_t first, int64_t end) {
    const int64_t size = a->size, group = a->heads / a->kv_heads, width = (a->heads + 2 * a->kv_heads) * size;
    const int64_t page = page_of(a->batch, first, a->batch->position[first] / PAGE);
    const int64_t block = (page * a->kv_heads + h) * size * PAGE;
    if (a->batch->position[first] % PAGE == 0) {  // what an earlier owner left must not matter, not even NaN
        memset(a->keys + block, 0, (size_t)(size * PAGE) * 4);
        memset(a->values + block, 0, (size_t)(size * PAGE) * 4);
    }
    for (int64_t t = first; t < end; t++) {
        const int64_t position = a->batch->position[t], j = position % PAGE;
        const float *row = a->qkv + t * width;
        float key[MAX_HEAD];
        for (int64_t i = h * group; i < (h + 1) * group; i++)
            rotate(a, row + i * size, position, a->q + (t * a->heads + i) * size);
        rotate(a, row + (a->heads + h) * size, position, key);
        if (a->k) memcpy(a->k + (t * a->kv_heads + h) * size, key, (size_t)size * 4);
        for (int64_t d = 0; d < size; d++) a->keys[block + d * PAGE + j] = key[d];
        memcpy(a->values + block + j * size, row + (a->heads + a->kv_heads + h) * size, (size_t)size * 4);
    }
}

// Online softmax of one page's scores: new maximum and sum, probabilities in place of the scores.
INLINE float softmax_page(struct walk *w, int64_t row, int64_t first, float *score, float scale) {
    const i32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const int64_t from = w->from[row] - first, last = w->position[row] - first;
    f32x16 s[2] = {load(score) * scale, load(score + LANES) * scale};
    i32x16 seen[2];
    for (int i = 0; i < 2; i++) {
        const i32x16 key = lane + i * LANES;
        seen[i] = (key <= (int32_t)(last < PAGE ? last : PAGE)) & (key >= (int32_t)(from > 0 ? from : 0));
        s[i] = choose(seen[i], s[i], all(-INFINITY));
    }
    float page_max = max_lanes(larger(s[0], s[1])), factor = 1.0f;
    if (page_max > w->max[row]) {
        factor = exp16(all(w->max[row] - page_max))[0];
        w->max[row] = page_max;
    }
    for (int i = 0; i < 2; i++) {
        s[i] = (f32x16)((i32x16)exp16(s[i] - w->max[row]) & seen[i]);
        store(score + i * LANES, s[i]);
    }
    w->total[row] = w->total[row] * factor + sum_lanes(s[0] + s[1]);
    return factor;
}

// Adds a page's values to the sums of some dims.
INLINE void add_values(const int rows, const int vectors, const float *values, float *sums, int64_t size, int64_t dim,
                       float p[][PAGE], const float *factor) {
    wide sum[ROWS][SUM_VECTORS];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int i = 0; i < vectors; i++) sum[r][i] = load_wide(sums + r * size + dim + i * WIDE) * factor[r];
#pragma GCC unroll 1
    for (int j = 0; j < PAGE; j++) {
        wide v[SUM_VECTORS];
#pragma GCC unroll 8
        for (int i = 0; i < vectors; i++) v[i] = load_wide(values + j * size + dim + i * WIDE);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            const wide weight = p[r][j] - (wide){0};
#pragma GCC unroll 8
            for (int i = 0; i < vectors; i++) sum[r][i] = fused_fp32(sum[r][i], weight, v[i]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int i = 0; i < vectors; i++) store_wide(sums + r * size + dim + i * WIDE, sum[r][i]);
}

// One step of a few rows: scores of a page's keys, softmax, its values.
INLINE void tile(const int rows, const struct call *a, struct walk *w, int64_t block, int64_t first, int64_t row) {
    const int64_t size = a->size;
    const float *keys = a->keys + block, *values = a->values + block;
    float score[ROWS][PAGE], factor[ROWS], *sums = w->sum + row * size;
    for (int key = 0; key < PAGE; key += KEY_VECTORS * WIDE) {
        wide sum[ROWS][KEY_VECTORS];
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
            for (int i = 0; i < KEY_VECTORS; i++) sum[r][i] = (wide){0};
#pragma GCC unroll 1
        for (int64_t d = 0; d < size; d++) {
            wide k[KEY_VECTORS];
#pragma GCC unroll 8
            for (int i = 0; i < KEY_VECTORS; i++) k[i] = load_wide(keys + d * PAGE + key + i * WIDE);
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++) {
                const wide q = w->q[row + r][d] - (wide){0};
#pragma GCC unroll 8
                for (int i = 0; i < KEY_VECTORS; i++) sum[r][i] = fused_fp32(sum[r][i], q, k[i]);
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
            for (int i = 0; i < KEY_VECTORS; i++) store_wide(&score[r][key + i * WIDE], sum[r][i]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) factor[r] = softmax_page(w, row + r, first, score[r], a->scale);
    int64_t dim = 0;
    for (; dim + SUM_VECTORS * WIDE <= size; dim += SUM_VECTORS * WIDE)
        add_values(rows, SUM_VECTORS, values, sums, size, dim, score, factor);
    for (; dim < size; dim += LANES) add_values(rows, LANES / WIDE, values, sums, size, dim, score, factor);
}

typedef void (*tile_function)(const struct call *, struct walk *, int64_t, int64_t, int64_t);
#define DEFINE_TILE(n)                                                                                              \
    static __attribute__((noinline)) void tile##n(const struct call *a, struct walk *w, int64_t block, int64_t first, \
                                                  int64_t row) {                                                    \
        tile(n, a, w, block, first, row);                                                                           \
    }
DEFINE_TILE(1)
DEFINE_TILE(2)
#if ROWS > 2
DEFINE_TILE(3)
DEFINE_TILE(4)
DEFINE_TILE(5)
DEFINE_TILE(6)
#endif
static const tile_function tiles[] = {
    NULL, tile1, tile2,
#if ROWS > 2
    tile3, tile4, tile5, tile6,
#endif
};

// Up to BLOCK_ROWS rows of one run walk the pages that they see.
static void attend(const struct call *a, int64_t kv_head, int64_t first, int64_t row, int64_t rows) {
    struct walk w;
    const int64_t size = a->size, group = a->heads / a->kv_heads, count = (rows + ROWS - 1) / ROWS;
    int64_t at[BLOCK_ROWS];
    for (int64_t r = 0; r < rows; r++) {
        const int64_t token = first + (row + r) / group, position = a->batch->position[token];
        at[r] = token * a->heads + kv_head * group + (row + r) % group;
        w.q[r] = a->q + at[r] * size;
        w.position[r] = position;
        w.from[r] = a->window && position >= a->window ? position - a->window + 1 : 0;
        w.max[r] = -INFINITY;
        w.total[r] = 0;
    }
    memset(w.sum, 0, (size_t)(rows * size) * 4);
    for (int64_t page = w.from[0] / PAGE; page <= w.position[0] / PAGE; page++) {
        const int64_t block = (page_of(a->batch, first, page) * a->kv_heads + kv_head) * size * PAGE;
        for (int64_t i = 0; i < count; i++)  // tiles of about equal size
            tiles[rows * (i + 1) / count - rows * i / count](a, &w, block, page * PAGE, rows * i / count);
    }
    for (int64_t r = 0; r < rows; r++) {
        const float inverse = 1.0f / w.total[r];
        for (int64_t i = 0; i < size; i += LANES)
            store(a->o + at[r] * size + i, load(w.sum + r * size + i) * inverse);
        if (a->lse) a->lse[at[r]] = row_lse(w.max[r], w.total[r]);
    }
}

static void attend_run(const struct call *a, int64_t kv_head, int64_t first, int64_t end) {
    const int64_t rows = (end - first) * (a->heads / a->kv_heads);
    for (int64_t row = 0; row < rows; row += BLOCK_ROWS)
        attend(a, kv_head, first, row, rows - row < BLOCK_ROWS ? rows - row : BLOCK_ROWS);
}

EXPORT void lapis_attention_fp32_team(const struct batch *batch, const float *qkv, int64_t heads, int64_t kv_heads,
                                      int64_t size, int64_t window, const float *cos, const float *sin, float *keys,
                                      float *values, float *q, float *k, float *o, float *lse) {
    const struct call a = {batch, qkv,      cos,  sin,    keys,   values, q, k, o, lse,
                           heads, kv_heads, size, window, (float)(1.0 / sqrt((double)size))};
    const int alone = runs_are_alone(batch);
    if (!alone) {
#pragma omp for schedule(static) nowait
        for (int64_t t = 0; t < batch->tokens; t++)
            for (int64_t h = 0; h < kv_heads && starts_run(batch, t); h++) write_run(&a, h, t, end_of_run(batch, t));
        team_barrier();
    }
#pragma omp for schedule(dynamic) nowait
    for (int64_t item = batch->tokens * kv_heads - 1; item >= 0; item--) {  // later runs have more keys: they go first
        const int64_t first = item / kv_heads, h = item % kv_heads;
        if (!starts_run(batch, first)) continue;
        const int64_t end = end_of_run(batch, first);
        if (alone) write_run(&a, h, first, end);
        attend_run(&a, h, first, end);
    }
    team_barrier();
}

EXPORT void lapis_attention_fp32(const struct batch *batch, const float *qkv, int64_t heads, int64_t kv_heads,
                                 int64_t size, int64_t window, const float *cos, const float *sin, float *keys,
                                 float *values, float *q, float *k, float *o, float *lse) {
#pragma omp parallel if (batch->tokens * heads > 8)
    {
        const uint64_t mode = flush_subnormals();
        lapis_attention_fp32_team(batch, qkv, heads, kv_heads, size, window, cos, sin, keys, values, q, k, o, lse);
        restore_mode(mode);
    }
}
