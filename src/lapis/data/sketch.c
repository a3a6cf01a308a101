/* Shingles and MinHash sketches: the same numbers as dedup.py gives in numpy. */
#include "text.h"

#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__)
#define FOR_EVERY_CPU __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FOR_EVERY_CPU
#endif

enum { HASHES = 112, NGRAM = 5 }; /* as in dedup.py */

/* The shingles of each document from the hashes of its words, given where its words and its shingles begin.
   A document with too few words has one shingle, which is left as it is. */
EXPORT void lapis_shingles(
    const uint64_t *words, const int64_t *first_word, const int64_t *first, int64_t documents, uint32_t *shingles) {
    for (int64_t d = 0; d < documents; d++) {
        const uint64_t *word = words + first_word[d];
        int64_t count = first_word[d + 1] - first_word[d] - (NGRAM - 1);
        for (int64_t g = 0; g < count; g++) {
            uint64_t value = word[g];
            for (int n = 1; n < NGRAM; n++) value = value * 0xA0761D6478BD642Fu + word[g + n];
            shingles[first[d] + g] = (uint32_t)(stir(value) >> 32);
        }
    }
}

/* For each document and hash the smallest value of factor * shingle + offset over the document's shingles. */
FOR_EVERY_CPU EXPORT void lapis_sketches(
    const uint32_t *shingles, const int64_t *first, int64_t documents, const uint32_t *factors,
    const uint32_t *offsets, uint32_t *sketches) {
    for (int64_t d = 0; d < documents; d++) {
        uint32_t least[HASHES];
        for (int h = 0; h < HASHES; h++) least[h] = UINT32_MAX;
        for (int64_t g = first[d]; g < first[d + 1]; g++)
            for (int h = 0; h < HASHES; h++) {
                uint32_t value = factors[h] * shingles[g] + offsets[h];
                least[h] = value < least[h] ? value : least[h];
            }
        for (int h = 0; h < HASHES; h++) sketches[d * HASHES + h] = least[h];
    }
}
