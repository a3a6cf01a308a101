#include "bpe_merge.h"

enum { SHORT = 48 }; /* symbols up to which looking at every pair is faster than a heap */

static size_t merge_short(const pair_table *table, uint32_t *symbols, size_t count) {
    uint64_t ranks[SHORT];
    for (size_t n = 0; n + 1 < count; n++) ranks[n] = pair_rank(table, symbols[n], symbols[n + 1]);
    while (count > 1) {
        size_t best = 0;
        for (size_t n = 1; n + 1 < count; n++) best = ranks[n] < ranks[best] ? n : best;
        if (ranks[best] == NO_RANK) break;
        symbols[best] = (uint32_t)ranks[best];
        count--;
        memmove(symbols + best + 1, symbols + best + 2, (count - best - 1) * sizeof *symbols);
        memmove(ranks + best, ranks + best + 1, (count - best - 1) * sizeof *ranks);
        if (best + 1 < count) ranks[best] = pair_rank(table, symbols[best], symbols[best + 1]);
        if (best > 0) ranks[best - 1] = pair_rank(table, symbols[best - 1], symbols[best]);
    }
    return count;
}

/* A heap entry is rank << 32 | place, so the least one is the leftmost pair of the lowest rank. */
static void push(uint64_t *heap, size_t *size, uint64_t entry) {
    size_t n = (*size)++;
    for (; n && entry < heap[(n - 1) / 2]; n = (n - 1) / 2) heap[n] = heap[(n - 1) / 2];
    heap[n] = entry;
}

static uint64_t pop(uint64_t *heap, size_t *size) {
    uint64_t top = heap[0], moved = heap[--*size];
    size_t n = 0;
    for (size_t child; (child = 2 * n + 1) < *size; n = child) {
        if (child + 1 < *size && heap[child + 1] < heap[child]) child++;
        if (moved <= heap[child]) break;
        heap[n] = heap[child];
    }
    heap[n] = moved;
    return top;
}

static int make_room(merge_space *space, size_t count) {
    if (count <= space->room) return 1;
    lapis_merge_free(space);
    space->ranks = malloc(count * sizeof *space->ranks);
    space->heap = malloc(3 * count * sizeof *space->heap); /* a pair at first, two more with every merge */
    space->next = malloc(count * sizeof *space->next);
    space->previous = malloc(count * sizeof *space->previous);
    space->symbols = malloc(count * sizeof *space->symbols);
    if (!space->ranks || !space->heap || !space->next || !space->previous || !space->symbols) {
        lapis_merge_free(space);
        return 0;
    }
    space->room = count;
    return 1;
}

void lapis_merge_free(merge_space *space) {
    free(space->ranks);
    free(space->heap);
    free(space->next);
    free(space->previous);
    free(space->symbols);
    memset(space, 0, sizeof *space);
}

static size_t merge_long(const pair_table *table, uint32_t *symbols, size_t count, merge_space *space) {
    uint64_t *ranks = space->ranks; /* of the pair that begins at a place; NO_RANK at places that are gone */
    uint32_t *next = space->next, *previous = space->previous;
    size_t size = 0;
    for (size_t n = 0; n < count; n++) {
        next[n] = (uint32_t)(n + 1);
        previous[n] = (uint32_t)(n - 1);
        ranks[n] = n + 1 < count ? pair_rank(table, symbols[n], symbols[n + 1]) : NO_RANK;
        if (ranks[n] != NO_RANK) push(space->heap, &size, (ranks[n] & ~(uint64_t)UINT32_MAX) | n);
    }
    while (size) {
        uint64_t entry = pop(space->heap, &size);
        uint32_t place = (uint32_t)entry, right = next[place];
        if (ranks[place] == NO_RANK || ranks[place] >> 32 != entry >> 32) continue; /* the pair has changed since */
        symbols[place] = (uint32_t)ranks[place];
        next[place] = next[right];
        if (next[right] < count) previous[next[right]] = place;
        ranks[right] = NO_RANK;
        uint32_t changed[2] = {place ? previous[place] : place, place};
        for (int n = place ? 0 : 1; n < 2; n++) {
            uint32_t at = changed[n];
            ranks[at] = next[at] < count ? pair_rank(table, symbols[at], symbols[next[at]]) : NO_RANK;
            if (ranks[at] != NO_RANK) push(space->heap, &size, (ranks[at] & ~(uint64_t)UINT32_MAX) | at);
        }
    }
    size_t kept = 0;
    for (size_t n = 0; n < count; n = next[n]) symbols[kept++] = symbols[n];
    return kept;
}

int64_t lapis_merge(const pair_table *table, uint32_t *symbols, size_t count, merge_space *space) {
    if (count <= SHORT) return (int64_t)merge_short(table, symbols, count);
    if (count >= UINT32_MAX || !make_room(space, count)) return -1;
    return (int64_t)merge_long(table, symbols, count, space);
}
