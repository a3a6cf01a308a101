// Gradient of causal attention for one head size; included once per size with HEAD defined.
// Blocks of 32 queries and 32 keys, recomputing the probabilities from the saved log denominators (Dao et al. 2022).
// Scores are kept transposed, [key][query], so that every product is the same panel: broadcast pairs x vectors.

#define GLUE_(name, head) name##_##head
#define GLUE(name, head) GLUE_(name, head)
#define NAME(name) GLUE(name, HEAD)

struct NAME(workspace) {  // of one span of n tokens (padded to whole blocks) and one KV head; all zero-padded
    bf16 *k, *v;          // [n][HEAD]
    bf16 *k_transposed;   // [HEAD][n]
    float *dk, *dv;       // [n][HEAD]
    bf16 q_pairs[HEAD * BLOCK], do_pairs[HEAD * BLOCK];      // [HEAD/2][32 queries][2]
    bf16 q_rows[HEAD * BLOCK], do_rows[HEAD * BLOCK];        // [16 query pairs][HEAD][2]
    bf16 p[BLOCK * BLOCK], ds[BLOCK * BLOCK], ds_pairs[BLOCK * BLOCK];  // [key][query] twice, [16 key pairs][query][2]
    float s[BLOCK * BLOCK], dp[BLOCK * BLOCK], dq[HEAD * BLOCK];        // the last one [HEAD][32 queries]
    float lse[BLOCK], delta[BLOCK];
};

static void NAME(unrotate)(const float *x, const float *cos, const float *sin, bf16 *y) {
    for (int i = 0; i < HEAD / 2; i += LANES) {
        f32x16 a = load(x + i), b = load(x + i + HEAD / 2), c = load(cos + i), s = load(sin + i);
        store_bf16(y + i, a * c + b * s);
        store_bf16(y + i + HEAD / 2, b * c - a * s);
    }
}

// Copies up to 32 rows of HEAD into both pair layouts; missing rows are zero.
static void NAME(pack_block)(const bf16 *rows, int64_t stride, int64_t count, bf16 *pairs, bf16 *interleaved) {
    static const bf16 zeros[HEAD];
    for (int64_t r = 0; r < BLOCK; r += 2) {
        const bf16 *even = r < count ? rows + r * stride : zeros, *odd = r + 1 < count ? rows + (r + 1) * stride : zeros;
        uint32_t *out = (uint32_t *)pairs + r;
        for (int d = 0; d < HEAD / 2; d++) {
            memcpy(out + d * BLOCK, even + 2 * d, 4);
            memcpy(out + d * BLOCK + 1, odd + 2 * d, 4);
        }
        for (int d = 0; d < HEAD; d += LANES) interleave(even + d, odd + d, interleaved + r * HEAD + 2 * d);
    }
}

static void NAME(load_span)(const struct attention_backward *a, struct NAME(workspace) *w, int64_t h, int64_t first,
                            int64_t count, int64_t padded) {
    const int64_t width = (a->heads + 2 * a->kv_heads) * HEAD;
    memset(w->k, 0, (size_t)(padded * HEAD) * 2);
    memset(w->v, 0, (size_t)(padded * HEAD) * 2);
    memset(w->dk, 0, (size_t)(padded * HEAD) * 4);
    memset(w->dv, 0, (size_t)(padded * HEAD) * 4);
    for (int64_t t = 0; t < count; t++) {
        memcpy(w->k + t * HEAD, a->k + ((first + t) * a->kv_heads + h) * HEAD, HEAD * 2);
        memcpy(w->v + t * HEAD, a->qkv + (first + t) * width + (a->heads + a->kv_heads + h) * HEAD, HEAD * 2);
    }
    for (int64_t t = 0; t < padded; t++)
        for (int d = 0; d < HEAD; d++) w->k_transposed[d * padded + t] = w->k[t * HEAD + d];
}

// Probabilities and score gradients of one block pair from its scores, in the layouts that the products want.
static void NAME(score_gradient)(struct NAME(workspace) *w, float scale, int diagonal) {
    const i32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    for (int half = 0; half < BLOCK; half += LANES) {
        const f32x16 lse = load(w->lse + half), delta = load(w->delta + half);
        u32x16 even = (u32x16){0};
        for (int key = 0; key < BLOCK; key++) {
            const int at = key * BLOCK + half;
            f32x16 p = exp16(load(w->s + at) * scale - lse);
            if (diagonal) p = (f32x16)((i32x16)p & (lane + half >= key));
            const f32x16 ds = p * (load(w->dp + at) - delta) * scale;
            store_bf16(w->p + at, p);
            store_bf16(w->ds + at, ds);
            const u32x16 bits = rounded_bits(ds);
            if (key % 2 == 0) even = bits;
            else {
                const u32x16 joined = (even & 0xffffu) | (bits << 16);
                memcpy(w->ds_pairs + (key - 1) * BLOCK + 2 * half, &joined, 64);
            }
        }
    }
}

// One block of queries of one head against all key blocks up to its own.
static void NAME(query_block)(const struct attention_backward *a, struct NAME(workspace) *w, int64_t head,
                              int64_t first, int64_t count, int64_t padded, int64_t block) {
    const int64_t start = block * BLOCK, here = count - start < BLOCK ? count - start : BLOCK;
    const int64_t stride = a->heads * HEAD, at = (first + start) * stride + head * HEAD;
    NAME(pack_block)(a->q + at, stride, here, w->q_pairs, w->q_rows);
    NAME(pack_block)(a->grad_o + at, stride, here, w->do_pairs, w->do_rows);
    for (int64_t r = 0; r < BLOCK; r++) {
        f32x16 sum = all(0);
        for (int d = 0; d < HEAD && r < here; d += LANES)
            sum += load_bf16(a->grad_o + at + r * stride + d) * load_bf16(a->o + at + r * stride + d);
        w->delta[r] = sum_lanes(sum);
        w->lse[r] = r < here ? a->lse[(first + start + r) * a->heads + head] : 1e30f;  // padding: probability 0
    }
    memset(w->dq, 0, sizeof w->dq);
    for (int64_t key_block = 0; key_block <= block; key_block++) {
        const int64_t keys = key_block * BLOCK * HEAD;
        panel(w->k + keys, HEAD, w->q_pairs, BLOCK, HEAD, w->s, BLOCK, BLOCK, BLOCK, 0);
        panel(w->v + keys, HEAD, w->do_pairs, BLOCK, HEAD, w->dp, BLOCK, BLOCK, BLOCK, 0);
        NAME(score_gradient)(w, a->scale, key_block == block);
        panel(w->p, BLOCK, w->do_rows, HEAD, BLOCK, w->dv + keys, HEAD, BLOCK, HEAD, 1);
        panel(w->ds, BLOCK, w->q_rows, HEAD, BLOCK, w->dk + keys, HEAD, BLOCK, HEAD, 1);
        panel(w->k_transposed + key_block * BLOCK, padded, w->ds_pairs, BLOCK, BLOCK, w->dq, BLOCK, HEAD, BLOCK, 1);
    }
    const int64_t width = (a->heads + 2 * a->kv_heads) * HEAD;
    for (int64_t r = 0; r < here; r++) {
        const int64_t token = first + start + r, table = a->position[token] * (HEAD / 2);
        float dq[HEAD];
        for (int d = 0; d < HEAD; d++) dq[d] = w->dq[d * BLOCK + r];
        NAME(unrotate)(dq, a->cos + table, a->sin + table, a->grad_qkv + token * width + head * HEAD);
    }
}

// Gradients of one span for one KV head and its group of query heads.
static void NAME(attention_backward)(const struct attention_backward *a, int64_t h, int64_t first, int64_t end) {
    const int64_t count = end - first, padded = (count + BLOCK - 1) / BLOCK * BLOCK, group = a->heads / a->kv_heads;
    const int64_t width = (a->heads + 2 * a->kv_heads) * HEAD;
    struct NAME(workspace) *w = malloc(sizeof *w);
    char *memory = malloc((size_t)(padded * HEAD) * (3 * 2 + 2 * 4));
    if (!w || !memory) abort();
    w->dk = (float *)memory;
    w->dv = w->dk + padded * HEAD;
    w->k = (bf16 *)(w->dv + padded * HEAD);
    w->v = w->k + padded * HEAD;
    w->k_transposed = w->v + padded * HEAD;
    NAME(load_span)(a, w, h, first, count, padded);
    for (int64_t head = h * group; head < (h + 1) * group; head++)
        for (int64_t block = 0; block < padded / BLOCK; block++)
            NAME(query_block)(a, w, head, first, count, padded, block);
    for (int64_t t = 0; t < count; t++) {
        const int64_t table = a->position[first + t] * (HEAD / 2);
        bf16 *out = a->grad_qkv + (first + t) * width + (a->heads + h) * HEAD;
        NAME(unrotate)(w->dk + t * HEAD, a->cos + table, a->sin + table, out);
        for (int d = 0; d < HEAD; d += LANES)
            store_bf16(out + a->kv_heads * HEAD + d, load(w->dv + t * HEAD + d));
    }
    free(memory);
    free(w);
}

#undef NAME
#undef GLUE
#undef GLUE_
