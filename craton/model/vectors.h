// Vectors of 16 floats or integers, in one register or two: what the engine's kernels are written in. Their sums are
// added in one order on every instruction set.
#pragma once
#include <immintrin.h>

#include <algorithm>

#include "simd.h"

typedef float f16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t i16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint8_t u64 __attribute__((vector_size(64), aligned(1), may_alias));

static const int64_t ROWS = 16, GROUP = 32, BLOCK = 16;

static inline f16 load16(const float* p) {
    return *(const f16*)p;
}
static inline void store16(float* p, f16 v) {
    *(f16*)p = v;
}
static inline f16 splat16(float x) {
    return x - f16{};
}

static inline f16 load16(const uint16_t* p) {  // bf16
    typedef uint16_t h16 __attribute__((vector_size(32), aligned(2), may_alias));
    return (f16)(__builtin_convertvector(*(const h16*)p, i16) << 16);
}

static inline float single(float x) {
    return x;
}
static inline float single(uint16_t x) {  // bf16
    const uint32_t bits = (uint32_t)x << 16;
    float out;
    memcpy(&out, &bits, 4);
    return out;
}

struct Half {  // IEEE fp16
    uint16_t bits;
};

static inline f16 load_half16(const uint16_t* p) {
#if defined(__AVX512F__)
    return (f16)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#else
    f16 out;
    _mm256_storeu_ps((float*)&out, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)));
    _mm256_storeu_ps((float*)&out + 8, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8))));
    return out;
#endif
}

static inline f16 load16(const Half* p) {
    return load_half16((const uint16_t*)p);
}

static inline f16 exp16(f16 x) {
#if defined(__AVX512F__)
    return (f16)vexp((vec)x);
#else
    store((float*)&x, vexp(load((float*)&x)));
    store((float*)&x + 8, vexp(load((float*)&x + 8)));
    return x;
#endif
}

// The sum of 16 lanes, in one order everywhere: in each quarter (0 + 2) + (1 + 3), then the quarters alike.
static inline float sum16(f16 v) {
    const float* p = (const float*)&v;
    float q[4];
    for (int i = 0; i < 4; i++) q[i] = (p[4 * i] + p[4 * i + 2]) + (p[4 * i + 1] + p[4 * i + 3]);
    return (q[0] + q[2]) + (q[1] + q[3]);
}

// The sums of 16 vectors, as lanes of one.
static inline f16 sums16(const f16* v) {
#if defined(__AVX512F__)
    __m512 t[8], u[4], w[2];
    for (int i = 0; i < 8; i++)
        t[i] = _mm512_add_ps(_mm512_unpacklo_ps((__m512)v[2 * i], (__m512)v[2 * i + 1]),
                             _mm512_unpackhi_ps((__m512)v[2 * i], (__m512)v[2 * i + 1]));
    for (int i = 0; i < 4; i++) {
        __m512d a = _mm512_castps_pd(t[2 * i]), b = _mm512_castps_pd(t[2 * i + 1]);
        u[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    for (int i = 0; i < 2; i++)
        w[i] = _mm512_add_ps(_mm512_shuffle_f32x4(u[2 * i], u[2 * i + 1], 0x44),
                             _mm512_shuffle_f32x4(u[2 * i], u[2 * i + 1], 0xee));
    return (f16)_mm512_add_ps(_mm512_shuffle_f32x4(w[0], w[1], 0x88), _mm512_shuffle_f32x4(w[0], w[1], 0xdd));
#else
    f16 out;
    for (int i = 0; i < 16; i++) ((float*)&out)[i] = sum16(v[i]);
    return out;
#endif
}
