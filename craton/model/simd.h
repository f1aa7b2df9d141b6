// Vectors of floats as wide as the instruction set has them, for the kernels of training and of the engine.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX512F__)
#include <immintrin.h>
constexpr int W = 16;
#else
constexpr int W = 8;
#endif
typedef float vec __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef int32_t veci __attribute__((vector_size(W * 4), aligned(4), may_alias));

static inline vec load(const float* p) {
    return *(const vec*)p;
}
static inline void store(float* p, vec v) {
    *(vec*)p = v;
}
static inline vec splat(float x) {
    return x - vec{};
}  // not x + 0, which would be an addition (-0 + 0 is not -0)

// exp(x), relative error 2e-7, 0 for -inf: 2^n by exponent, the rest by a degree-6 polynomial (Cephes expf).
static inline vec vexp(vec x) {
#if defined(__AVX512F__)
    x = (vec)_mm512_max_ps(_mm512_set1_ps(-110.f), (__m512)x);  // in this order NaN stays NaN
    vec n = (vec)_mm512_roundscale_ps((__m512)(x * 1.44269504f), 8);
#else
    vec zero = x == -INFINITY ? vec{} : splat(1.f);
    x = x < -87.f ? splat(-87.f) : x;
    x = x > 88.f ? splat(88.f) : x;
    const vec magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to the nearest integer
    vec n = (x * 1.44269504f + magic) - magic;
#endif
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.f;
#if defined(__AVX512F__)
    return (vec)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    veci e = (__builtin_convertvector(n, veci) + 127) << 23;
    return p * (vec)e * zero;
#endif
}

static inline float sum(vec v) {
    float s = 0;
    for (int i = 0; i < W; i++) s += v[i];
    return s;
}
