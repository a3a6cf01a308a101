/* Repeated n-grams of one document, after Gopher (arXiv 2112.11446, table A1), exactly.

   An n-gram occurs twice only if both (n-1)-grams in it do, so each size looks at what is left of the one before. A
   repeated n-gram is known by a number, and the pair of two such numbers is the next longer one: no hash can be wrong. */
#include "statistics.h"

enum { LONGEST = 10 };

/* The number of an n-gram: its place in the table, which has room for it. */
static size_t number_of(Gram *grams, size_t mask, uint64_t pair) {
    size_t slot = (size_t)stir(pair) & mask;
    while (grams[slot].count && grams[slot].pair != pair) slot = (slot + 1) & mask;
    grams[slot].pair = pair;
    grams[slot].count++;
    return slot;
}

/* From the places of repeated (n-1)-grams to those of repeated n-grams: how many are left; -1 without memory. */
static int64_t lengthen(Work *work, size_t left) {
    int32_t *gram_of = work->gram_of, *at = work->at;
    size_t slots = 64, perhaps = 0, kept = 0, again = 0;
    for (size_t i = 0; i < left; i++) perhaps += gram_of[at[i] + 1] >= 0;
    while (slots < 2 * perhaps) slots *= 2;
    if (!reserve(&work->grams, &work->grams_room, slots, sizeof *work->grams)) return -1;
    memset(work->grams, 0, slots * sizeof *work->grams);
    for (size_t i = 0; i < left; i++) {
        int32_t p = at[i], one = gram_of[p], two = gram_of[p + 1]; /* the last of all is -1: nothing goes beyond it */
        if (two < 0) {
            gram_of[p] = -1;
            continue;
        }
        gram_of[p] = (int32_t)number_of(work->grams, slots - 1, (uint64_t)(uint32_t)one << 32 | (uint32_t)two);
        at[kept++] = p;
    }
    for (size_t i = 0; i < kept; i++) {
        int32_t p = at[i], repeated = work->grams[gram_of[p]].count > 1;
        gram_of[p] = repeated ? gram_of[p] : -1;
        at[again] = p;
        again += (size_t)repeated;
    }
    return (int64_t)again;
}

/* Characters of the commonest n-gram, with the spaces in it, times its count; of equally common ones the first. */
static int32_t top(const Work *work, size_t n, size_t left) {
    int32_t most = 0, place = 0;
    for (size_t i = 0; i < left; i++) {
        int32_t count = work->grams[work->gram_of[work->at[i]]].count;
        if (count > most) {
            most = count;
            place = work->at[i];
        }
    }
    return most * (work->before[place + (int32_t)n * !!most] - work->before[place] + (int32_t)n - 1);
}

/* Characters in n-grams seen before; after one of them the search goes on behind it. */
static int32_t again(Work *work, size_t n, size_t left) {
    int32_t chars = 0, next = 0;
    for (size_t i = 0; i < left; i++) {
        int32_t p = work->at[i];
        Gram *gram = work->grams + work->gram_of[p];
        if (p < next) continue;
        if (gram->met) {
            next = p + (int32_t)n;
            chars += work->before[next] - work->before[p];
        }
        gram->met = 1;
    }
    return chars;
}

int count_ngrams(Work *work, size_t words, int32_t *row) {
    if (!reserve(&work->gram_of, &work->gram_of_room, words + 1, sizeof *work->gram_of) ||
        !reserve(&work->at, &work->at_room, words + 1, sizeof *work->at))
        return 0;
    int64_t left = 0;
    for (size_t p = 0; p < words; p++) {
        int32_t id = work->id_of[p], repeated = work->words[id].count > 1;
        work->gram_of[p] = repeated ? id : -1;
        work->at[left] = (int32_t)p;
        left += repeated;
    }
    work->gram_of[words] = -1;
    for (size_t n = 2; n <= LONGEST && left; n++) {
        left = lengthen(work, (size_t)left);
        if (left < 0) return 0;
        if (n <= 4)
            row[TOP_2GRAM + n - 2] = top(work, n, (size_t)left);
        else
            row[DUPLICATE_5GRAMS + n - 5] = again(work, n, (size_t)left);
    }
    return 1;
}
