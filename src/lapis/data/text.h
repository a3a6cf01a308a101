/* What the C of the data path shares: growing arrays, UTF-8, character classes, a hash for tables in memory.

   No result depends on a hash value, on the order of bytes in a number or on the width of a vector: hashes only find
   the place where equality is then checked. */
#ifndef LAPIS_TEXT_H
#define LAPIS_TEXT_H

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))

/* as in characters.py */
enum { LETTER = 1, PLAIN = 2, TERMINAL = 4, UNSPACED = 8, SPACE = 16, CLOSER = 32 };

/* Makes room for `count` items of `size` bytes in *array; 0 without memory, and *array stays as it was. */
static inline int reserve(void *array, size_t *room, size_t count, size_t size) {
    void **place = array;
    if (count <= *room && *place) return 1;
    size_t wanted = count + count / 2 + 64;
    void *grown = realloc(*place, wanted * size);
    if (!grown) return 0;
    *place = grown;
    *room = wanted;
    return 1;
}

/* The code point at *at of valid UTF-8; moves *at behind it. */
static inline uint32_t next_point(const uint8_t *text, size_t *at) {
    const uint8_t *s = text + *at;
    if (s[0] < 0x80) { *at += 1; return s[0]; }
    if (s[0] < 0xE0) { *at += 2; return (uint32_t)(s[0] & 0x1F) << 6 | (s[1] & 0x3F); }
    if (s[0] < 0xF0) {
        *at += 3;
        return (uint32_t)(s[0] & 0x0F) << 12 | (uint32_t)(s[1] & 0x3F) << 6 | (s[2] & 0x3F);
    }
    *at += 4;
    return (uint32_t)(s[0] & 0x07) << 18 | (uint32_t)(s[1] & 0x3F) << 12 | (uint32_t)(s[2] & 0x3F) << 6 | (s[3] & 0x3F);
}

/* Eight bytes as a number, the first one lowest, on any machine. */
static inline uint64_t eight_bytes(const uint8_t *bytes) {
    uint64_t eight;
    memcpy(&eight, bytes, 8);
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    eight = __builtin_bswap64(eight);
#endif
    return eight;
}

static inline int32_t count_chars(const uint8_t *text, size_t bytes) {
    int32_t chars = 0;
    for (size_t i = 0; i < bytes; i++) chars += (text[i] & 0xC0) != 0x80;
    return chars;
}

static inline uint64_t stir(uint64_t value) {
    value ^= value >> 32;
    value *= 0xD6E8FEB86659FD93u;
    return value ^ value >> 29;
}

/* Of strings of up to 8 bytes two of one length never share a hash: every step can be undone. Reads up to 8 bytes
   behind the string. */
static inline uint64_t hash_bytes(const uint8_t *bytes, size_t count) {
    uint64_t hash = count * 0x9E3779B97F4A7C15u;
    for (; count > 32; bytes += 16, count -= 16) /* two chains, so that one need not wait for the other */
        hash = stir(hash ^ eight_bytes(bytes)) + stir(eight_bytes(bytes + 8)) * 0xA0761D6478BD642Fu;
    for (; count > 8; bytes += 8, count -= 8) hash = stir(hash ^ eight_bytes(bytes));
    return count ? stir(hash ^ (eight_bytes(bytes) & ~(uint64_t)0 >> (64 - 8 * count))) : hash;
}

#endif
