/* The words of words.py and their hashes, in one pass over lower-cased text. */
#include "text.h"

static const uint64_t BASE = 0x9E3779B97F4A7C15u;

/* Bytes of the character that begins here if it is a word of its own, else 0. */
static size_t alone(const uint8_t *at) {
    if (at[0] >= 0xF0) return 4;
    if (at[0] >= 0xE3 && at[0] <= 0xED) return 3;
    return at[0] == 0xE0 && at[1] >= 0xB8 && at[1] <= 0xBB ? 3 : 0;
}

static int in_word(uint8_t byte) {
    return (byte >= 'a' && byte <= 'z') || (byte >= '0' && byte <= '9') || byte >= 0x80 || byte == '_';
}

/* Hash, first byte and end of each word; how many there are. The text ends with a byte that is in no word. */
EXPORT int64_t lapis_words(const uint8_t *text, int64_t bytes, uint64_t *hashes, int64_t *starts, int64_t *ends) {
    int64_t words = 0;
    for (int64_t at = 0; at < bytes;) {
        if (!in_word(text[at])) {
            at++;
            continue;
        }
        int64_t start = at, end = at + (int64_t)alone(text + at);
        if (end == at)
            do end++;
            while (in_word(text[end]) && !alone(text + end));
        uint64_t hash = 0; /* of the bytes as digits, the first one lowest */
        for (at = end; at > start;) hash = hash * BASE + text[--at];
        hashes[words] = stir(hash);
        starts[words] = start;
        ends[words++] = at = end;
    }
    return words;
}
