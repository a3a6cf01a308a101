// Vectors in GCC/Clang vector extensions, and the pieces whose order contract.md fixes. The contract knows vectors
// of 16 fp32 lanes (f32x16); products run on the vectors that the machine has (`wide`), column by column the same.
// Compiled once per instruction set from the same text; `wide`, `dp` and the subnormal mode are all that differ.
#ifndef LAPIS_CPU_VECTOR_H
#define LAPIS_CPU_VECTOR_H

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "cpu_team.h"
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define EXPORT __attribute__((visibility("default")))
#define LANES 16

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef uint16_t bf16;  // the high half of an fp32

#if defined(__AVX512F__)
#define WIDE 16
#elif defined(__AVX2__)
#define WIDE 8
#else
#define WIDE 4
#endif
typedef float wide __attribute__((vector_size(4 * WIDE)));
typedef uint32_t wide_pairs __attribute__((vector_size(4 * WIDE)));  // WIDE pairs of bf16

INLINE f32x16 load(const float *p) { f32x16 v; memcpy(&v, p, 64); return v; }
INLINE void store(float *p, f32x16 v) { memcpy(p, &v, 64); }
INLINE u32x16 load_pairs(const void *p) { u32x16 v; memcpy(&v, p, 64); return v; }
INLINE f32x16 all(float x) { return x - (f32x16){0}; }

// ---- bf16 <-> fp32, round to nearest even
INLINE f32x16 widen(u16x16 h) { return (f32x16)(__builtin_convertvector(h, u32x16) << 16); }
INLINE u32x16 rounded_bits(f32x16 v) {
    u32x16 bits = (u32x16)v;
    return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}
INLINE f32x16 load_bf16(const bf16 *p) { u16x16 h; memcpy(&h, p, 32); return widen(h); }
INLINE void store_bf16(bf16 *p, f32x16 v) {
#ifdef __AVX512BF16__
    u16x16 h = (u16x16)_mm512_cvtneps_pbh((__m512)v);  // the same bits, since subnormals are zero already
#else
    u16x16 h = __builtin_convertvector(rounded_bits(v), u16x16);
#endif
    memcpy(p, &h, 32);
}
// 16 pairs (even[i], odd[i])
INLINE void interleave(const bf16 *even, const bf16 *odd, bf16 *out) {
    const u32x16 joined = ((u32x16)load_bf16(even) >> 16) | (u32x16)load_bf16(odd);
    memcpy(out, &joined, 64);
}
INLINE float widen_one(bf16 h) { uint32_t bits = (uint32_t)h << 16; float f; memcpy(&f, &bits, 4); return f; }
INLINE bf16 round_one(float f) {
    uint32_t bits; memcpy(&bits, &f, 4);
    return (bf16)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// ---- the primitive: two fused multiply-adds per lane, odd element of each pair first
INLINE wide load_wide(const float *p) { wide v; memcpy(&v, p, 4 * WIDE); return v; }
INLINE void store_wide(float *p, wide v) { memcpy(p, &v, 4 * WIDE); }
INLINE wide_pairs load_wide_pairs(const void *p) { wide_pairs v; memcpy(&v, p, 4 * WIDE); return v; }
INLINE f32x16 join(const wide *parts) {  // 16 lanes of neighbouring vectors
#if WIDE == LANES
    return (f32x16)parts[0];
#else
    f32x16 v;
    memcpy(&v, parts, 64);
    return v;
#endif
}
INLINE wide fused(wide sum, wide a, wide b) {
#if defined(__AVX512F__)
    return (wide)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif defined(__AVX2__)
    return (wide)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#elif defined(__aarch64__)
    return (wide)vfmaq_f32((float32x4_t)sum, (float32x4_t)a, (float32x4_t)b);
#else
    return sum + a * b;  // a product of two bf16 is exact in fp32 unless it is subnormal
#endif
}
INLINE wide dp_plain(wide sum, uint32_t a, wide_pairs w) {
    wide_pairs pair = a - (wide_pairs){0};
    sum = fused(sum, (wide)(pair & 0xffff0000u), (wide)(w & 0xffff0000u));
    return fused(sum, (wide)(pair << 16), (wide)(w << 16));
}
INLINE wide dp(wide sum, uint32_t a, wide_pairs w) {
#ifdef __AVX512BF16__
    return (wide)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)w);
#else
    return dp_plain(sum, a, w);
#endif
}

// ---- butterflies over the 16 lanes: distance 8, 4, 2, 1
#define CROSS(v, d) __builtin_shufflevector(v, v, 0 ^ d, 1 ^ d, 2 ^ d, 3 ^ d, 4 ^ d, 5 ^ d, 6 ^ d, 7 ^ d, \
                                            8 ^ d, 9 ^ d, 10 ^ d, 11 ^ d, 12 ^ d, 13 ^ d, 14 ^ d, 15 ^ d)
INLINE float sum_lanes(f32x16 v) {
    v = v + CROSS(v, 8);
    v = v + CROSS(v, 4);
    v = v + CROSS(v, 2);
    v = v + CROSS(v, 1);
    return v[0];
}
INLINE f32x16 choose(i32x16 mask, f32x16 yes, f32x16 no) {
    return (f32x16)(((i32x16)yes & mask) | ((i32x16)no & ~mask));
}
#if defined(__AVX512F__)  // one instruction with the same rule: the second operand unless the first is beyond it
INLINE f32x16 larger(f32x16 a, f32x16 b) { return (f32x16)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE f32x16 smaller(f32x16 a, f32x16 b) { return (f32x16)_mm512_min_ps((__m512)a, (__m512)b); }
#else
INLINE f32x16 larger(f32x16 a, f32x16 b) { return choose(a > b, a, b); }
INLINE f32x16 smaller(f32x16 a, f32x16 b) { return choose(a < b, a, b); }
#endif
INLINE float max_lanes(f32x16 v) {
    v = larger(v, CROSS(v, 8));
    v = larger(v, CROSS(v, 4));
    v = larger(v, CROSS(v, 2));
    v = larger(v, CROSS(v, 1));
    return v[0];
}

// The butterflies of up to 16 vectors at once: lane r is the result of vector r, made of the same pairs in the same order.
#define HALVES(op, a, b) op(__builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23), \
                            __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31))
#define QUARTERS(op, a, b) op(__builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27), \
                              __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31))
#define PAIRS(op, a, b) op(__builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29), \
                           __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31))
#define SINGLES(op, a, b) op(__builtin_shufflevector(a, b, 0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30), \
                             __builtin_shufflevector(a, b, 1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31))
#define DEFINE_LANES_OF(name, op)                                                                              \
    INLINE f32x16 name(const int count, const f32x16 *v) {                                                     \
        f32x16 four[4]; /* of vectors j, j + 4, j + 8, j + 12; those that are missing are others again */      \
        _Pragma("GCC unroll 4") for (int j = 0; j < 4; j++) {                                                  \
            const int a = j < count ? j : 0, b = j + 4 < count ? j + 4 : a;                                    \
            const int c = j + 8 < count ? j + 8 : a, d = j + 12 < count ? j + 12 : c;                          \
            const f32x16 low = HALVES(op, v[a], v[b]), high = c == a ? low : HALVES(op, v[c], v[d]);           \
            four[j] = QUARTERS(op, low, high);                                                                 \
        }                                                                                                      \
        const f32x16 even = PAIRS(op, four[0], four[1]), odd = count > 2 ? PAIRS(op, four[2], four[3]) : even; \
        return SINGLES(op, even, odd);                                                                         \
    }
INLINE f32x16 plus(f32x16 a, f32x16 b) { return a + b; }
DEFINE_LANES_OF(max_lanes_of, larger)
DEFINE_LANES_OF(sum_lanes_of, plus)

// ---- exp and log of our own, so that no library version enters the bits (Cephes polynomial; odd atanh series)
#define MOST_EXPS 12
#define EACH(count) _Pragma("GCC unroll 12") for (int i = 0; i < (count); i++)
// Of several vectors, step by step for all of them: a chain of dependent steps leaves most of the machine idle.
INLINE void exp_clamped(const int count, f32x16 *x) {
    static const float horner[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
    f32x16 n[MOST_EXPS], p[MOST_EXPS];
    EACH(count) n[i] = (x[i] * 1.44269504f + 12582912.0f) - 12582912.0f;  // nearest integer to x / ln 2
    EACH(count) x[i] = x[i] - n[i] * 0.693359375f;
    EACH(count) x[i] = x[i] - n[i] * -2.12194440e-4f;
    EACH(count) p[i] = all(1.9875691500e-4f);
    _Pragma("GCC unroll 5") for (int k = 0; k < 5; k++) EACH(count) p[i] = p[i] * x[i] + horner[k];
    EACH(count) p[i] = p[i] * (x[i] * x[i]) + x[i] + 1.0f;
#if defined(__AVX512F__)
    EACH(count) x[i] = (f32x16)_mm512_scalef_ps((__m512)p[i], (__m512)n[i]);
#else
    EACH(count) x[i] = p[i] * (f32x16)((__builtin_convertvector(n[i], i32x16) + 127) << 23);
#endif
}
INLINE f32x16 exp16(f32x16 x) {
    x = smaller(all(88.0f), larger(all(-87.0f), x));
    exp_clamped(1, &x);
    return x;
}
INLINE void exp_falling(const int count, f32x16 *x) {  // of what is not above 0
    EACH(count) x[i] = larger(all(-87.0f), x[i]);
    exp_clamped(count, x);
}
// gelu, tanh form: x (1 + tanh u) / 2 is x / (1 + exp(-2u)); 2u = x (GELU_1 + GELU_3 x²); this is the divisor
#define GELU_1 1.5957691216057308f  // 2 sqrt(2 / pi)
#define GELU_3 0.0713548162726009f  // that times 0.044715
INLINE f32x16 gelu_gate(f32x16 x) { return 1.0f + exp16(-(x * (GELU_1 + GELU_3 * (x * x)))); }
INLINE double log_double(double x) {
    int exponent;
    double m = frexp(x, &exponent);
    if (m < 0.70710678118654752) {
        m *= 2;
        exponent--;
    }
    double s = (m - 1) / (m + 1), z = s * s, series = 0;
    for (int k = 25; k >= 1; k -= 2) series = series * z + 1.0 / k;
    return 2 * s * series + exponent * 0.69314718055994531;
}

// ---- log of the summed exponentials of a row of any width; lanes beyond the row hold -inf
INLINE f32x16 load_row(const float *row, int64_t i, int64_t width) {
    if (i + LANES <= width) return load(row + i);
    f32x16 v = all(-INFINITY);
    memcpy(&v, row + i, (size_t)(width - i) * 4);
    return v;
}
INLINE float row_max(const float *row, int64_t width) {
    f32x16 v = all(-INFINITY);
    for (int64_t i = 0; i < width; i += LANES) v = larger(v, load_row(row, i, width));
    return max_lanes(v);
}
INLINE f32x16 exp_below(f32x16 x, float max) {  // exp(x - max), and +0 for lanes beyond the row
    return (f32x16)((i32x16)exp16(x - max) & (x != -INFINITY));
}
// x · (1 / sqrt(mean(x²) + eps)) · w of one row
INLINE void rms_norm_row(const bf16 *x, const bf16 *w, bf16 *y, int64_t width, float eps) {
    f32x16 squares = all(0);
    for (int64_t i = 0; i < width; i += LANES) squares = squares + load_bf16(x + i) * load_bf16(x + i);
    const float scale = 1.0f / sqrtf(sum_lanes(squares) / (float)width + eps);
    for (int64_t i = 0; i < width; i += LANES) store_bf16(y + i, (load_bf16(x + i) * scale) * load_bf16(w + i));
}
INLINE float row_lse(float max, float sum) { return (float)(max + log_double(sum)); }

// ---- subnormals count as zero, in every build as vdpbf16ps has it
#if defined(__x86_64__)
INLINE uint64_t flush_subnormals(void) { uint32_t old = _mm_getcsr(); _mm_setcsr(old | 0x8040u); return old; }
INLINE void restore_mode(uint64_t old) { _mm_setcsr((uint32_t)old); }
#elif defined(__aarch64__)
INLINE uint64_t flush_subnormals(void) {
    uint64_t old;
    __asm__ volatile("mrs %0, fpcr" : "=r"(old));
    __asm__ volatile("msr fpcr, %0" : : "r"(old | (1ull << 24)));
    return old;
}
INLINE void restore_mode(uint64_t old) { __asm__ volatile("msr fpcr, %0" : : "r"(old)); }
#else
INLINE uint64_t flush_subnormals(void) { return 0; }
INLINE void restore_mode(uint64_t old) { (void)old; }
#endif

#endif
