/* Cuts text into words exactly as the published split patterns do, whose alternatives are tried in this order:
 *
 *   Llama 3  (?i:'s|'t|'re|'ve|'m|'ll|'d) | [^\r\n\p{L}\p{N}]?\p{L}+ | \p{N}{1,3} | ?[^\s\p{L}\p{N}]+[\r\n]*
 *            | \s*[\r\n]+ | \s+(?!\S) | \s+                                     (Qwen 2: \p{N} in place of \p{N}{1,3})
 *   GPT-2    's|'t|'re|'ve|'m|'ll|'d | ?\p{L}+ | ?\p{N}+ | ?[^\s\p{L}\p{N}]+ | \s+(?!\S) | \s+
 */
#include "bpe.h"

static inline unsigned decode(const uint8_t *p, uint32_t *code) {
    if (p[0] < 0x80) return *code = p[0], 1;
    if (p[0] < 0xE0) return *code = (p[0] & 0x1Fu) << 6 | (p[1] & 0x3Fu), 2;
    if (p[0] < 0xF0) return *code = (p[0] & 0x0Fu) << 12 | (p[1] & 0x3Fu) << 6 | (p[2] & 0x3Fu), 3;
    return *code = (p[0] & 0x07u) << 18 | (p[1] & 0x3Fu) << 12 | (p[2] & 0x3Fu) << 6 | (p[3] & 0x3Fu), 4;
}

static inline unsigned class_of(const splitter *split, const uint8_t *p, unsigned *length) {
    uint32_t code;
    *length = decode(p, &code);
    return split->classes[code];
}

/* Behind the longest run of characters whose class, seen through `mask`, is `wanted`. */
static inline const uint8_t *run(const splitter *split, const uint8_t *p, const uint8_t *end, unsigned mask,
                                 unsigned wanted) {
    unsigned length;
    while (p < end && (class_of(split, p, &length) & mask) == wanted) p += length;
    return p;
}

static inline int is_newline(const uint8_t *p) { return *p == '\n' || *p == '\r'; }

/* Length of the contraction that begins at the apostrophe p, or 0. Without case the long s counts as an s. */
static inline size_t contraction(const uint8_t *p, const uint8_t *end, int any_case) {
    size_t left = (size_t)(end - p);
    if (left < 2) return 0;
    uint8_t fold = any_case ? 0x20 : 0, first = p[1] | fold;
    if (first == 's' || first == 't' || first == 'm' || first == 'd') return 2;
    if (left < 3) return 0;
    if (any_case && p[1] == 0xC5 && p[2] == 0xBF) return 3;
    uint8_t second = p[2] | fold;
    if ((first == 'r' || first == 'v') && second == 'e') return 3;
    return first == 'l' && second == 'l' ? 3 : 0;
}

/* p is white space. */
static const uint8_t *spaces_end(const splitter *split, const uint8_t *p, const uint8_t *end) {
    const uint8_t *q = p, *last = p, *line = NULL; /* last: where the last character begins */
    unsigned length;
    while (q < end && class_of(split, q, &length) & SPACE) {
        last = q;
        q += length;
        if (is_newline(last)) line = q;
    }
    if (line && split->family == LLAMA3) return line;
    return q == end || last == p ? q : last;
}

static const unsigned KIND = LETTER | NUMBER | SPACE;

static const uint8_t *gpt2_end(const splitter *split, const uint8_t *p, const uint8_t *end) {
    if (*p == '\'') {
        size_t found = contraction(p, end, 0);
        if (found) return p + found;
    }
    unsigned length, kind;
    const uint8_t *first = p + (*p == ' ' && p + 1 < end);
    kind = class_of(split, first, &length) & KIND;
    if (!(kind & SPACE)) return run(split, first + length, end, KIND, kind);
    return spaces_end(split, p, end);
}

static const uint8_t *llama3_end(const splitter *split, const uint8_t *p, const uint8_t *end) {
    if (*p == '\'') {
        size_t found = contraction(p, end, 1);
        if (found) return p + found;
    }
    unsigned length, next_length, next = SPACE;
    unsigned kind = class_of(split, p, &length) & KIND;
    const uint8_t *q = p + length;
    if (kind == LETTER) return run(split, q, end, LETTER, LETTER);
    if (kind == NUMBER) {
        for (int n = 1; n < split->number && q < end && class_of(split, q, &length) & NUMBER; n++) q += length;
        return q;
    }
    if (q < end) next = class_of(split, q, &next_length) & KIND;
    if (next == LETTER && !is_newline(p)) return run(split, q + next_length, end, LETTER, LETTER);
    if (kind == 0 || (*p == ' ' && next == 0)) {
        q = run(split, q, end, KIND, 0);
        while (q < end && is_newline(q)) q++;
        return q;
    }
    return spaces_end(split, p, end);
}

const uint8_t *lapis_word_end(const splitter *split, const uint8_t *p, const uint8_t *end) {
    return split->family == LLAMA3 ? llama3_end(split, p, end) : gpt2_end(split, p, end);
}

const uint8_t *lapis_piece_end(const splitter *split, const uint8_t *p, const uint8_t *end) {
    unsigned length;
    if (!split->digits || p >= end) return end;
    if (class_of(split, p, &length) & DIGIT) return p + length;
    return run(split, p, end, DIGIT, 0);
}

/* Where each word of [text, text + size) ends, into `ends`, which has room for `size` of them; how many. */
EXPORT int64_t lapis_bpe_split(const splitter *split, const uint8_t *text, int64_t size, int64_t *ends) {
    const uint8_t *p = text, *end = text + size;
    int64_t count = 0;
    while (p < end) {
        const uint8_t *piece = lapis_piece_end(split, p, end);
        while (p < piece) {
            p = lapis_word_end(split, p, piece);
            ends[count++] = p - text;
        }
    }
    return count;
}

/* The digest of the sources that this library was built from. */
EXPORT const char *lapis_bpe_source(void) { return LAPIS_SOURCE; }
