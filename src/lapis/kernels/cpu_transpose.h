// Transposes of 16 x 16 words in registers.
#ifndef LAPIS_CPU_TRANSPOSE_H
#define LAPIS_CPU_TRANSPOSE_H

#include "cpu_vector.h"

#if defined(__AVX512F__)
#define LANE(d, l) ((l) & d ? 16 + ((l) ^ d) : (l))
#define LANE_BACK(d, l) ((l) & d ? 16 + (l) : ((l) ^ d))
#define SHUFFLE(x, y, f, d)                                                                                     \
    __builtin_shufflevector(x, y, f(d, 0), f(d, 1), f(d, 2), f(d, 3), f(d, 4), f(d, 5), f(d, 6), f(d, 7), f(d, 8), \
                            f(d, 9), f(d, 10), f(d, 11), f(d, 12), f(d, 13), f(d, 14), f(d, 15))
#define EVERY_OTHER(first, l) (2 * (l) + first)
#define ZIP(first, l) ((first + (l)) / 2 + ((l) & 1 ? 16 : 0))
#define SWAP(v, d)                                                    \
    _Pragma("GCC unroll 16") for (int i = 0; i < 16; i++) if (!(i & d)) { \
        const u32x16 upper = v[i], lower = v[i + d];                  \
        v[i] = SHUFFLE(upper, lower, LANE, d);                        \
        v[i + d] = SHUFFLE(upper, lower, LANE_BACK, d);               \
    }

INLINE void transpose_words(u32x16 *v) {
    SWAP(v, 8)
    SWAP(v, 4)
    SWAP(v, 2)
    SWAP(v, 1)
}
#else
INLINE void transpose_words(u32x16 *v) {
    uint32_t rows[LANES][LANES], columns[LANES][LANES];
    memcpy(rows, v, sizeof rows);
    for (int r = 0; r < LANES; r++)
        for (int c = 0; c < LANES; c++) columns[c][r] = rows[r][c];
    memcpy(v, columns, sizeof columns);
}
#endif

#endif
