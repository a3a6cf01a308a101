// Rotation of queries and keys, and the way of keys and values into their pages. Order and layout: contract.md.
#include "cpu_attention.h"

typedef int8_t i8x16 __attribute__((vector_size(16)));

// The head's half is a multiple of 8: where it ends with 8 elements, lanes beyond them are loaded as zero and not stored.
INLINE f32x16 load_part(const bf16 *p, const int lanes) {
    u16x16 h = {0};
    memcpy(&h, p, (size_t)lanes * 2);
    return widen(h);
}
INLINE void store_part(bf16 *p, f32x16 v, const int lanes) {
    bf16 all_lanes[LANES];
    if (lanes == LANES) store_bf16(p, v);
    else {
        store_bf16(all_lanes, v);
        memcpy(p, all_lanes, (size_t)lanes * 2);
    }
}
INLINE void rotate_part(const bf16 *x, const float *cos, const float *sin, bf16 *y, int64_t half, const int lanes) {
    const f32x16 a = load_part(x, lanes), b = load_part(x + half, lanes);
    f32x16 c = all(0), s = all(0);
    memcpy(&c, cos, (size_t)lanes * 4);
    memcpy(&s, sin, (size_t)lanes * 4);
    store_part(y, a * c - b * s, lanes);
    store_part(y + half, b * c + a * s, lanes);
}

INLINE void rotate(const struct attention *a, const int64_t size, const bf16 *x, int64_t position, bf16 *y) {
    const int64_t half = size / 2;
    if (!a->cos) {
        memcpy(y, x, (size_t)size * 2);
        return;
    }
    const float *cos = a->cos + position * half, *sin = a->sin + position * half;
    int64_t i = 0;
    for (; i + LANES <= half; i += LANES) rotate_part(x + i, cos + i, sin + i, y + i, half, LANES);
    if (i < half) rotate_part(x + i, cos + i, sin + i, y + i, half, LANES / 2);
}

// Whole numbers of up to 127 in steps of the scale that is returned.
static float quantize(const bf16 *x, int64_t size, int8_t *y) {
    f32x16 largest = all(0);
    for (int64_t i = 0; i < size; i += LANES) {
        const f32x16 v = load_bf16(x + i);
        largest = larger(larger(v, -v), largest);
    }
    const float scale = max_lanes(largest) / 127.0f, inverse = scale > 0 ? 1.0f / scale : 0.0f;
    for (int64_t i = 0; i < size; i += LANES) {
        const f32x16 whole = (load_bf16(x + i) * inverse + 12582912.0f) - 12582912.0f;
        const i8x16 bytes = __builtin_convertvector(__builtin_convertvector(whole, i32x16), i8x16);
        memcpy(y + i, &bytes, LANES);
    }
    return scale;
}

INLINE void put_bf16(const struct attention *a, const int64_t size, const bf16 *key, const bf16 *value, int64_t block,
                     int64_t j) {
    uint32_t *keys = (uint32_t *)(a->keys + block);
    for (int64_t d = 0; d < size / 2; d++) memcpy(keys + d * PAGE + j, key + 2 * d, 4);
    bf16 *values = (bf16 *)(a->values + block) + (j / 2) * size * 2;
    for (int64_t d = 0; d < size; d += LANES) {  // one half of each pair; the other one stays
        const u32x16 high = (u32x16)load_bf16(value + d), pair = load_pairs(values + 2 * d);
        const u32x16 joined = j % 2 ? (pair & 0xffffu) | high : (pair & 0xffff0000u) | high >> 16;
        memcpy(values + 2 * d, &joined, 64);
    }
}

static void put_int8(const struct attention *a, const bf16 *key, const bf16 *value, int64_t block, int64_t j) {
    int8_t bytes[MAX_HEAD], *keys = (int8_t *)a->keys + block, *values = (int8_t *)a->values + block;
    const float key_scale = quantize(key, a->size, bytes), value_scale = quantize(value, a->size, values + j * a->size);
    for (int64_t d = 0; d < a->size; d++) keys[d * PAGE + j] = bytes[d];
    memcpy(keys + a->size * PAGE + 4 * j, &key_scale, 4);
    memcpy(values + a->size * PAGE + 4 * j, &value_scale, 4);
}

INLINE void write(const struct attention *a, const int64_t size, int64_t h, int64_t first, int64_t end) {
    const int64_t group = a->heads / a->kv_heads, width = (a->heads + 2 * a->kv_heads) * size;
    const int64_t block = block_of(a, page_of(a->batch, first, a->batch->position[first] / PAGE), h);
    if (a->batch->position[first] % PAGE == 0) {  // what an earlier owner left must not matter, not even NaN
        const size_t bytes = (size_t)block_of(a, 0, 1);
        memset(a->keys + block, 0, bytes);
        memset(a->values + block, 0, bytes);
    }
    for (int64_t t = first; t < end; t++) {
        const int64_t position = a->batch->position[t];
        const bf16 *row = a->qkv + t * width, *value = row + (a->heads + a->kv_heads + h) * size;
        bf16 key[MAX_HEAD];
        for (int64_t i = h * group; i < (h + 1) * group; i++)
            rotate(a, size, row + i * size, position, a->q + (t * a->heads + i) * size);
        rotate(a, size, row + (a->heads + h) * size, position, key);
        if (a->k) memcpy(a->k + (t * a->kv_heads + h) * size, key, (size_t)size * 2);
        if (a->int8) put_int8(a, key, value, block, position % PAGE);
        else put_bf16(a, size, key, value, block, position % PAGE);
    }
}

// One KV head of one run: rotates its group of queries and its keys, puts keys and values into the run's page.
void attention_write(const struct attention *a, int64_t kv_head, int64_t first, int64_t end) {
    if (a->size == 64) write(a, 64, kv_head, first, end);  // the compiler unrolls loops of known length
    else if (a->size == 128) write(a, 128, kv_head, first, end);
    else write(a, a->size, kv_head, first, end);
}
