/* Byte pair merges of one word, and the table of the pairs that merge. */
#ifndef LAPIS_BPE_MERGE_H
#define LAPIS_BPE_MERGE_H

#include "bpe.h"

typedef struct {
    uint64_t pair; /* left id << 32 | right id */
    uint64_t rank; /* rank << 32 | id of what the two become; NO_RANK where the slot is empty */
} pair_slot;

typedef struct {
    pair_slot *slots;
    uint64_t mask;
} pair_table;

#define NO_RANK UINT64_MAX

static inline uint64_t pair_rank(const pair_table *table, uint32_t left, uint32_t right) {
    uint64_t pair = (uint64_t)left << 32 | right;
    for (uint64_t place = mix(pair, 0) & table->mask;; place = (place + 1) & table->mask) {
        const pair_slot *slot = table->slots + place;
        if (slot->pair == pair || slot->rank == NO_RANK) return slot->rank;
    }
}

/* Working memory for words of any length, kept from one to the next. */
typedef struct {
    uint64_t *ranks, *heap;
    uint32_t *next, *previous, *symbols;
    size_t room;
} merge_space;

/* Merges symbols[0..count) in place, lowest rank first and leftmost among equals; how many are left, or -1 without
 * memory. */
int64_t lapis_merge(const pair_table *table, uint32_t *symbols, size_t count, merge_space *space);
void lapis_merge_free(merge_space *space);

#endif
