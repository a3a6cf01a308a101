// What a call of attention is about. Layout of pages and order of sums: contract.md.
#ifndef LAPIS_CPU_ATTENTION_H
#define LAPIS_CPU_ATTENTION_H

#include "cpu_vector.h"

#define PAGE 32       // keys per page of the KV cache
#define MAX_HEAD 256  // head sizes are multiples of 16 up to this

struct batch {  // mirrored in cpu_library.py
    const int32_t *sequence, *position, *page_table;
    int64_t tokens, columns;  // columns of the page table
};

// Page and KV head by KV head lie a block of keys and one of values:
// bf16: keys [size/2 dim pairs][32 keys][2], values [16 key pairs][size][2];
// int8: keys [size][32 keys], values [32 keys][size], each followed by 32 fp32 scales, one per key.
struct attention {
    const struct batch *batch;
    const bf16 *qkv;
    const float *cos, *sin;  // NULL: no rotation
    char *keys, *values;     // pages of this layer
    bf16 *q, *k;             // rotated queries, and keys when a backward pass will want them
    bf16 *o;
    float *lse;              // log of each row's softmax denominator, or NULL
    int64_t heads, kv_heads, size;
    int64_t window;          // a query sees that many keys, its own the last; 0: all
    int int8;                // form of the pages
    float scale;
};

INLINE int64_t page_of(const struct batch *batch, int64_t token, int64_t index) {
    return batch->page_table[batch->sequence[token] * batch->columns + index];
}
// Offset in bytes of a page's block of one KV head, in keys and in values.
INLINE int64_t block_of(const struct attention *a, int64_t page, int64_t kv_head) {
    return (page * a->kv_heads + kv_head) * (a->int8 ? (a->size + 4) * PAGE : a->size * PAGE * 2);
}
// A run: tokens of one sequence, consecutive positions, one page.
INLINE int starts_run(const struct batch *batch, int64_t t) {
    return t == 0 || batch->sequence[t] != batch->sequence[t - 1] ||
           batch->position[t] != batch->position[t - 1] + 1 || batch->position[t] % PAGE == 0;
}
INLINE int64_t end_of_run(const struct batch *batch, int64_t first) {
    int64_t end = first + 1;
    while (end < batch->tokens && !starts_run(batch, end)) end++;
    return end;
}

// Whether no sequence has more than one run: then no KV head waits for what another item writes.
INLINE int runs_are_alone(const struct batch *batch) {
    for (int64_t t = 1; t < batch->tokens; t++)
        if (batch->sequence[t] == batch->sequence[t - 1] && starts_run(batch, t)) return 0;
    return 1;
}

void attention_write(const struct attention *a, int64_t kv_head, int64_t first, int64_t end);

#endif
