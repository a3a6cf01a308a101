/* What the tokenizer's C files share: how text is cut into words, and hashing. */
#ifndef LAPIS_BPE_H
#define LAPIS_BPE_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
#define UNLIKELY(x) __builtin_expect(!!(x), 0)

enum { LETTER = 1, NUMBER = 2, SPACE = 4, DIGIT = 8 }; /* of a code point; DIGIT: cut off by itself beforehand */
enum { GPT2 = 0, LLAMA3 = 1 };                         /* the two families of split patterns */
enum { PADDING = 16 };                                 /* readable bytes behind every text */

typedef struct {
    const uint8_t *classes; /* one byte for each of 0x110000 code points */
    int32_t family;
    int32_t number; /* most digits of a word, of the Llama 3 family */
    int32_t digits; /* whether characters of class DIGIT stand alone, and nothing looks past them */
} splitter;

/* Where the word that begins at p ends. [p, end) is valid UTF-8 and not empty. */
const uint8_t *lapis_word_end(const splitter *split, const uint8_t *p, const uint8_t *end);

/* The first place in [p, end) behind which the splitter does not look: end, or a character that stands alone. */
const uint8_t *lapis_piece_end(const splitter *split, const uint8_t *p, const uint8_t *end);

static inline uint64_t mix(uint64_t a, uint64_t b) {
    __uint128_t product = (__uint128_t)(a ^ 0x9E3779B97F4A7C15u) * (b ^ 0xD6E8FEB86659FD93u);
    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

static inline uint64_t load8(const uint8_t *p) {
    uint64_t value;
    memcpy(&value, p, 8);
    return value;
}

/* May read up to PADDING bytes behind the word, which do not count. */
static inline void load_short(const uint8_t *p, unsigned length, uint64_t key[2]) {
    static const uint8_t mask[32] = {255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255};
    key[0] = load8(p) & load8(mask + 16 - length);
    key[1] = load8(p + 8) & load8(mask + 24 - length);
}

static inline uint64_t hash_bytes(const uint8_t *p, size_t length) {
    uint64_t hash = length, key[2];
    for (; length > 16; p += 16, length -= 16) hash = mix(hash ^ load8(p), load8(p + 8));
    load_short(p, (unsigned)length, key);
    return mix(hash ^ key[0], key[1] ^ 0xA0761D6478BD642Fu);
}

#endif
