// What the operations on fp32 rows share: the fused multiply-add, which every sum of products is made of.
#ifndef LAPIS_CPU_FP32_H
#define LAPIS_CPU_FP32_H

#include "cpu_vector.h"

#if defined(__AVX2__) || defined(__aarch64__)
INLINE wide fused_fp32(wide sum, wide a, wide b) { return fused(sum, a, b); }
#else
// Without the instruction: in fp64 the product is exact and the sum is rounded to odd, so that rounding it once more, to
// fp32, gives what one rounding of the exact value gives (Boldo & Melquiond 2008).
typedef float few __attribute__((vector_size(8)));  // as many as the machine's vectors have fp64 lanes for
typedef double doubles __attribute__((vector_size(16)));
typedef int64_t words __attribute__((vector_size(16)));

INLINE few fused_few(few sum, few a, few b) {
    const doubles product = __builtin_convertvector(a, doubles) * __builtin_convertvector(b, doubles);
    const doubles addend = __builtin_convertvector(sum, doubles);
    const doubles total = product + addend, part = total - product;
    const doubles error = (product - (total - part)) + (addend - part);
    const words inexact = (words)((error > 0) | (error < 0)), even = ((words)total & 1) - 1;
    const words step = ((((words)total ^ (words)error) < 0) << 1) | 1;  // towards the exact value: -1 or +1
    return __builtin_convertvector((doubles)((words)total + (step & inexact & even)), few);
}
INLINE wide fused_fp32(wide sum, wide a, wide b) {
    few parts[3][WIDE / 2];
    memcpy(parts[0], &sum, sizeof sum);
    memcpy(parts[1], &a, sizeof a);
    memcpy(parts[2], &b, sizeof b);
    for (int i = 0; i < WIDE / 2; i++) parts[0][i] = fused_few(parts[0][i], parts[1][i], parts[2][i]);
    memcpy(&sum, parts[0], sizeof sum);
    return sum;
}
#endif

#endif
