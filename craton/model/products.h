// Products of activations with stored weights: fp32, bf16 and fp16 row by row, fewer bits in panels (formats.h).
//
// For panels activations are rounded to signed 8 bits with one scale for 32 columns, so that unsigned times signed
// products (VNNI) apply without sign fix-ups; what the zero of a format adds is a multiple of the row's own sum,
// subtracted beforehand.
#pragma once
#include "formats.h"

// ---- integer products -------------------------------------------------------------------------------------------

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
constexpr bool VNNI = true;
#else
constexpr bool VNNI = false;
#endif

// acc + the four products of each lane; u unsigned (at most 15 without VNNI), s signed.
static inline i16 dot4(i16 acc, u64 u, i16 s) {
#if defined(__AVX512VNNI__)
    return (i16)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)u, (__m512i)s);
#elif defined(__AVX512BW__)
    return acc + (i16)_mm512_madd_epi16(_mm512_maddubs_epi16((__m512i)u, (__m512i)s), _mm512_set1_epi16(1));
#else
    for (int h = 0; h < 2; h++) {
        __m256i* a = (__m256i*)&acc + h;
        __m256i x = _mm256_loadu_si256((__m256i*)&u + h), y = _mm256_loadu_si256((__m256i*)&s + h),
                z = _mm256_loadu_si256(a);
#if defined(__AVXVNNI__)
        z = _mm256_dpbusd_avx_epi32(z, x, y);
#else
        z = _mm256_add_epi32(z, _mm256_madd_epi16(_mm256_maddubs_epi16(x, y), _mm256_set1_epi16(1)));
#endif
        _mm256_storeu_si256(a, z);
    }
    return acc;
#endif
}

// The same for signed w, where 16-bit sums of unsigned bytes would overflow: |w| times x with w's sign.
static inline i16 dot4_signed(i16 acc, u64 w, i16 s) {
    typedef int8_t b64 __attribute__((vector_size(64), may_alias));
    b64 neg = (b64)w < 0, x = (b64)s;
    u64 magnitude = (u64)(((b64)w ^ neg) - neg);
    x = (x ^ neg) - neg;
    return dot4(acc, magnitude, (i16)x);
}

// Bytes of a table by the low four bits of each lane.
static inline u64 look_up(const uint8_t* table, u64 index) {
    const __m128i t = _mm_loadu_si128((const __m128i*)table);
#if defined(__AVX512BW__)
    return (u64)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(t), (__m512i)index);
#else
    const __m256i wide = _mm256_broadcastsi128_si256(t);
    for (int h = 0; h < 2; h++) {
        __m256i* p = (__m256i*)&index + h;
        _mm256_storeu_si256(p, _mm256_shuffle_epi8(wide, _mm256_loadu_si256(p)));
    }
    return index;
#endif
}

// 16 numbers of 8 bits, signed.
static inline f16 load_bytes(const uint8_t* p) {
    typedef int8_t b16 __attribute__((vector_size(16), aligned(1), may_alias));
    return __builtin_convertvector(__builtin_convertvector(*(const b16*)p, i16), f16);
}

static inline f16 load_powers(const uint8_t* p) {
    float x[16];
    for (int i = 0; i < 16; i++) x[i] = power_of_two(p[i]);
    return load16(x);
}

// Rows of activations in 8 bits, in tiles of 8 rows (at the end of 4, 2 and 1): in a tile each four columns of all its
// rows lie together, then those of the next four; so do the scales of a group, the sums of its values and of its first
// 16.
struct Quantised {
    int8_t* x;
    float* scale;
    int32_t *sum, *first;  // -8 times
};

static inline int64_t tile_size(int64_t left) {
    return left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
}

// Columns 4c..4c+3 of 16 rows, and 16 columns further on: a format's values from where a group begins.
template <int KIND>
static inline void load_values(const uint8_t* w, int c, u64& low, u64& high) {
    constexpr Layout L = layout_of(KIND);
    if (L.bits == 8) {
        low = *(const u64*)(w + 64 * c), high = *(const u64*)(w + 64 * (c + 4));
        return;
    }
    const u64 v = *(const u64*)(w + 64 * c);
    low = v & 15, high = (u64)((i16)v >> 4) & 15;
    if (L.bits == 5) {
        const i16 more = *(const i16*)(w + 256);
        low |= (u64)(more << (4 - c)) & 16, high |= (u64)(more >> c) & 16;
    }
    if (L.bits == 6) {
        const i16 a = *(const i16*)(w + 256), b = *(const i16*)(w + 320);
        low |= (u64)(c < 3 ? a << (4 - 2 * c) : a >> 2) & 48;
        high |= (u64)(c < 3 ? b << (4 - 2 * c) : b >> 2) & 48;
    }
    if (L.table) low = look_up(L.table, low), high = look_up(L.table, high);
}

// -ZERO times a sum, from -8 times it.
template <int ZERO>
static inline i16 times_zero(i16 sum) {
    if (ZERO == 0) return i16{};
    if (ZERO == 12) return sum + (sum >> 1);
    return ZERO == 8 ? sum : ZERO == 16 ? sum << 1 : ZERO == 32 ? sum << 2 : sum << 4;
}

// T rows of activations, a whole tile, times R panels of 16 weight rows.
template <int KIND, int R, int T, int STRIDE>
static inline void dot_panels(const uint8_t* w, int64_t panel, int64_t groups, const int8_t* x, const float* xs,
                              const int32_t* sum, const int32_t* first, f16 (*out)[T]) {
    constexpr Layout L = layout_of(KIND);
    constexpr int P = L.parts;
    constexpr bool SIGNED = !VNNI && L.zero == 128;  // too large for 16-bit sums of unsigned bytes
    f16 acc[R][T], times[R], offset_times[R];
    for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++) acc[r][t] = f16{};
    for (int64_t g = 0; g < groups; g++) {
        if (L.scale == SUPER && g % 8 == 0) {
            for (int r = 0; r < R; r++) {
                times[r] = load_half16((const uint16_t*)(w + r * panel));
                if (L.offset) offset_times[r] = load_half16((const uint16_t*)(w + r * panel + 32));
            }
            w += block_bytes(L);
        }
        i16 a[P][R][T];
        for (int t = 0; t < T; t++) {
            const int32_t own[2] = {P == 2 ? first[t] : sum[t], P == 2 ? sum[t] - first[t] : 0};
            for (int p = 0; p < P; p++)
                for (int r = 0; r < R; r++) a[p][r][t] = SIGNED ? i16{} : times_zero<L.zero>(own[p] - i16{});
        }
        for (int64_t line = 0; line < group_bytes(L) * R; line += 64) __builtin_prefetch(w + 4096 + line);
        const int32_t* q = (const int32_t*)x;
        for (int c = 0; c < 4; c++) {
            u64 low[R], high[R];
            for (int r = 0; r < R; r++) load_values<KIND>(w + r * panel, c, low[r], high[r]);
            for (int t = 0; t < T; t++) {
                const i16 x0 = q[c * STRIDE + t] - i16{}, x1 = q[(4 + c) * STRIDE + t] - i16{};
                for (int r = 0; r < R; r++) {
                    if (SIGNED) {
                        a[0][r][t] = dot4_signed(dot4_signed(a[0][r][t], low[r] ^ 128, x0), high[r] ^ 128, x1);
                    } else {
                        a[0][r][t] = dot4(a[0][r][t], low[r], x0);
                        a[P - 1][r][t] = dot4(a[P - 1][r][t], high[r], x1);
                    }
                }
            }
        }
        for (int r = 0; r < R; r++) {
            const uint8_t* area = w + r * panel + 64 * L.bits;
            for (int p = 0; p < P; p++) {
                const uint8_t *s = area + p * scale_bytes(L), *o = s + P * scale_bytes(L);
                f16 scale, offset;
                if (L.scale == HALF) {
                    scale = load_half16((const uint16_t*)s);
                    if (L.offset) offset = load_half16((const uint16_t*)o);
                } else if (L.scale == SUPER) {
                    scale = times[r] * load_bytes(s);
                    if (L.offset) offset = -(offset_times[r] * load_bytes(o));
                } else {
                    scale = load_powers(s);
                }
                for (int t = 0; t < T; t++) {
                    acc[r][t] += __builtin_convertvector(a[p][r][t], f16) * (scale * xs[t]);
                    if (L.offset) {
                        const int32_t own = P == 1 ? sum[t] : p ? sum[t] - first[t] : first[t];
                        acc[r][t] += offset * (xs[t] * -0.125f * (float)own);
                    }
                }
            }
        }
        w += group_bytes(L), x += 32 * STRIDE, xs += STRIDE, sum += STRIDE;
        if (P == 2) first += STRIDE;
    }
    for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++) out[r][t] = acc[r][t];
}

// Where the tile that holds a row begins: rows go in eights, at the end in one four, one two and one.
static inline int64_t tile_start(int64_t row, int64_t rows) {
    int64_t start = rows & ~7;
    if (row < start) return row & ~7;
    for (int64_t size = 4; size > 1; size /= 2) {
        if (!(rows & size)) continue;
        if (row < start + size) return start;
        start += size;
    }
    return start;
}

// A group of 32 columns of one row, to its place in the tile; x is not changed. A group with NaN or infinity gets a
// scale of NaN, so that every sum it takes part in is NaN.
static void quantise_group(const float* x, int64_t row, int64_t rows, int64_t cols, int64_t g, const Quantised& q) {
    const int64_t groups = cols / GROUP, first = tile_start(row, rows), size = tile_size(rows - first);
    const int64_t lane = row - first;
    f16 a = load16(x), b = load16(x + 16);
    i16 ma = (i16)a & 0x7fffffff, mb = (i16)b & 0x7fffffff;  // magnitudes are ordered as integers; NaN is the largest
    ma = ma > mb ? ma : mb;
    int32_t bits = 0;
    for (int i = 0; i < 16; i++) bits = std::max(bits, ((int32_t*)&ma)[i]);
    float most;
    memcpy(&most, &bits, 4);
    if (bits >= 0x7f800000) {
        most = NAN;
        a = b = f16{};
    }
    const float inverse = most > 0 ? 127.f / most : 0.f;
    const f16 magic = splat16(12582912.f);  // adding it rounds to the nearest integer
    a = (a * inverse + magic) - magic;
    b = (b * inverse + magic) - magic;
    typedef int8_t b16 __attribute__((vector_size(16), aligned(1), may_alias));
    b16 bytes[2] = {__builtin_convertvector(__builtin_convertvector(a, i16), b16),
                    __builtin_convertvector(__builtin_convertvector(b, i16), b16)};
    int32_t* out = (int32_t*)(q.x + first * cols) + g * 8 * size + lane;
    const int32_t* words = (const int32_t*)bytes;
    for (int c = 0; c < 8; c++) out[c * size] = words[c];
    q.scale[first * groups + g * size + lane] = most / 127.f;
    q.sum[first * groups + g * size + lane] = -8 * (int32_t)sum16(a + b);
    if (q.first) q.first[first * groups + g * size + lane] = -8 * (int32_t)sum16(a);
}

static void quantise(const float* x, int64_t row, int64_t rows, int64_t cols, const Quantised& q) {
    for (int64_t g = 0; g < cols / GROUP; g++) quantise_group(x + g * GROUP, row, rows, cols, g, q);
}

// ---- products ---------------------------------------------------------------------------------------------------

struct Low {  // an adapter's part of a matrix: scale * B (A x). kind: F32 or BF16
    const void *a, *b;  // (rank, cols), and B in panels of 16 rows, (rows / 16, rank, 16); null: this matrix stays
    int64_t rank, kind;
    float scale;
};

struct Matrix {  // kind: of formats.h; fp32, bf16 and fp16 lie row by row, the others in panels
    const void* data;
    const float* bias;
    int64_t rows, cols, kind;
    const Low* low;  // by the adapters' numbers, or null
};

// R weight rows and T activation rows, R * T = 16: each sum has 16 lanes, which are joined at the end. Meanwhile AHEAD
// lines are fetched from `next` on for every 16 columns.
template <typename Weight, int R, int T, int AHEAD>
static inline void dot_rows(const Weight* w, const float* x, int64_t cols, float* out, int64_t stride,
                            const float* bias, const char* next) {
    f16 acc[T][R];
    for (int t = 0; t < T; t++)
        for (int r = 0; r < R; r++) acc[t][r] = f16{};
    const int64_t whole = cols & ~int64_t(15);
    for (int64_t c = 0; c < whole; c += 16) {
        f16 v[T];
        for (int i = 0; i < AHEAD; i++) __builtin_prefetch(next + c * 4 * AHEAD + i * 64, 0, 2);
        for (int t = 0; t < T; t++) v[t] = load16(x + t * cols + c);
        for (int r = 0; r < R; r++) {
            f16 u = load16(w + r * cols + c);
            for (int t = 0; t < T; t++) acc[t][r] += u * v[t];
        }
    }
    if (whole < cols) {
        for (int r = 0; r < R; r++) {
            Weight a[16] = {};
            memcpy(a, w + r * cols + whole, (cols - whole) * sizeof(Weight));
            for (int t = 0; t < T; t++) {
                float b[16] = {};
                memcpy(b, x + t * cols + whole, (cols - whole) * sizeof(float));
                acc[t][r] += load16(a) * load16(b);
            }
        }
    }
    const f16 sums = sums16(&acc[0][0]);
    for (int t = 0; t < T; t++)
        for (int r = 0; r < R; r++) out[t * stride + r] = ((const float*)&sums)[t * R + r] + (bias ? bias[r] : 0.f);
}

// One weight row and one activation row, the same sum.
template <typename Weight>
static inline float dot_row(const Weight* w, const float* x, int64_t cols) {
    f16 acc = f16{};
    const int64_t whole = cols & ~int64_t(15);
    for (int64_t c = 0; c < whole; c += 16) acc += load16(w + c) * load16(x + c);
    if (whole < cols) {
        Weight a[16] = {};
        float b[16] = {};
        memcpy(a, w + whole, (cols - whole) * sizeof(Weight));
        memcpy(b, x + whole, (cols - whole) * sizeof(float));
        acc += load16(a) * load16(b);
    }
    return sum16(acc);
}

template <typename Weight>
static void rows_block(const Weight* w, const float* bias, int64_t rows, const float* x, int64_t tokens, int64_t cols,
                       float* out, int64_t stride) {
    if (rows == 16) {
        const int64_t fours = tokens / 4 * 4;
        const auto four = [&](auto ahead) {  // the next four rows are fetched while these are multiplied
            for (int r = 0; r < 16; r += 4) {
                const char* next = (const char*)(w + (r + 4) * cols);
                for (int64_t t = 0; t < fours; t += 4, next += ahead * cols * 4)
                    dot_rows<Weight, 4, 4, ahead>(w + r * cols, x + t * cols, cols, out + t * stride + r, stride,
                                                  bias ? bias + r : 0, next);
            }
        };
        if (fours >= 64)
            four(std::integral_constant<int, 0>());
        else if (fours >= 16)
            four(std::integral_constant<int, 1>());
        else if (fours >= 8)
            four(std::integral_constant<int, 2>());
        else if (fours)
            four(std::integral_constant<int, 4>());
        for (int64_t t = fours; t < tokens; t++)
            dot_rows<Weight, 16, 1, 0>(w, x + t * cols, cols, out + t * stride, stride, bias, 0);
    } else {  // the last rows of a matrix
        for (int64_t r = 0; r < rows; r++)
            for (int64_t t = 0; t < tokens; t++)
                out[t * stride + r] = dot_row(w + r * cols, x + t * cols, cols) + (bias ? bias[r] : 0.f);
    }
}

template <int KIND, int R, int T, int STRIDE>
static inline void panel_tile(const uint8_t* w, int64_t panel, const float* bias, int64_t groups, const int8_t* x,
                              const float* xs, const int32_t* sum, const int32_t* first, float* out, int64_t stride) {
    f16 y[R][T];
    dot_panels<KIND, R, T, STRIDE>(w, panel, groups, x, xs, sum, first, y);
    for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++)
            store16(out + t * stride + r * ROWS, bias ? y[r][t] + load16(bias + r * ROWS) : y[r][t]);
}

// R panels for some tokens, which begin at a tile.
template <int KIND, int R>
static void panel_tiles(const uint8_t* w, int64_t panel, const float* bias, Quantised q, int64_t tokens, int64_t cols,
                        float* out, int64_t stride) {
    const int64_t groups = cols / GROUP;
    for (int64_t t = 0, n; t < tokens; t += n) {
        n = tile_size(tokens - t);
        const int8_t* x = q.x + t * cols;
        const float* xs = q.scale + t * groups;
        const int32_t *sum = q.sum + t * groups, *first = q.first ? q.first + t * groups : 0;
        float* o = out + t * stride;
        if (n == 8 && R == 1)
            panel_tile<KIND, 1, 8, 8>(w, panel, bias, groups, x, xs, sum, first, o, stride);
        else if (n == 8) {  // two panels share what is read of the activations
            panel_tile<KIND, R, 4, 8>(w, panel, bias, groups, x, xs, sum, first, o, stride);
            panel_tile<KIND, R, 4, 8>(w, panel, bias, groups, x + 16, xs + 4, sum + 4, first ? first + 4 : 0,
                                      o + 4 * stride, stride);
        } else if (n == 4)
            panel_tile<KIND, R, 4, 4>(w, panel, bias, groups, x, xs, sum, first, o, stride);
        else if (n == 2)
            panel_tile<KIND, R, 2, 2>(w, panel, bias, groups, x, xs, sum, first, o, stride);
        else
            panel_tile<KIND, R, 1, 1>(w, panel, bias, groups, x, xs, sum, first, o, stride);
    }
}

static void panels_of_kind(int64_t kind, bool pair, const uint8_t* w, int64_t panel, const float* bias, Quantised q,
                           int64_t tokens, int64_t cols, float* out, int64_t stride) {
#define CASE(KIND)                                                                    \
    case KIND:                                                                        \
        if (pair)                                                                     \
            panel_tiles<KIND, 2>(w, panel, bias, q, tokens, cols, out, stride);       \
        else                                                                          \
            panel_tiles<KIND, 1>(w, panel, bias, q, tokens, cols, out, stride);       \
        break;
    switch (kind) {
        CASE(Q4_0)
        CASE(Q4_1)
        CASE(Q5_0)
        CASE(Q5_1)
        CASE(Q8_0)
        CASE(Q2_K)
        CASE(Q4_K)
        CASE(Q5_K)
        case Q3_K:  // lies as Q6_K does
        CASE(Q6_K)
        CASE(IQ4_NL)
        CASE(IQ4_XS)
        CASE(MXFP4)
    }
#undef CASE
}

static inline bool packed(const Matrix& m) {
    return layout_of(m.kind).bits > 0;
}

// Panels [from, to) of 16 rows of a matrix, for all tokens. out: (tokens, stride), the matrix's first column at out[0].
static void product(const Matrix& m, int64_t from, int64_t to, const float* x, Quantised q, int64_t tokens, float* out,
                    int64_t stride) {
    const bool whole = packed(m);
    const int64_t item = whole ? 1 : 4, groups = m.cols / GROUP;
    const int64_t panel = whole ? panel_bytes(layout_of(m.kind), groups) : 0;
    const int64_t part =
        std::max<int64_t>(8, ((384 << 10) / (m.cols * item)) & ~7);  // tokens whose rows stay in the second cache
    for (int64_t t = 0; t < tokens; t += part) {
        const int64_t n = std::min(part, tokens - t);
        for (int64_t p = from; p < to;) {
            const int64_t row = p * ROWS, rows = std::min(ROWS, m.rows - row), pair = whole && n > 8 && p + 2 <= to;
            const float* bias = m.bias ? m.bias + row : 0;
            float* o = out + t * stride + row;
            const float* own = x + t * m.cols;
            Quantised here = {q.x + t * m.cols, q.scale + t * groups, q.sum + t * groups,
                              q.first ? q.first + t * groups : 0};
            if (whole)
                panels_of_kind(m.kind, pair, (const uint8_t*)m.data + p * panel, panel, bias, here, n, m.cols, o,
                               stride);
            else if (m.kind == BF16)
                rows_block((const uint16_t*)m.data + row * m.cols, bias, rows, own, n, m.cols, o, stride);
            else if (m.kind == F16)
                rows_block((const Half*)m.data + row * m.cols, bias, rows, own, n, m.cols, o, stride);
            else
                rows_block((const float*)m.data + row * m.cols, bias, rows, own, n, m.cols, o, stride);
            p += pair ? 2 : 1;
        }
    }
}

// R rows of A at once, so that no sum waits for another. next: what will be read after it, as far away as a is long.
template <typename Weight, int R>
static inline void narrow_rows(const Weight* a, const Weight* next, int64_t cols, float scale, const float* x,
                               float* z) {
    f16 acc[R] = {};
    const int64_t whole = cols & ~int64_t(15);
    for (int64_t i = 0; i < whole; i += 16) {
        const f16 v = load16(x + i);
        if (i % (64 / (int64_t)sizeof(Weight)) == 0)
            for (int r = 0; r < R; r++) __builtin_prefetch(next + r * cols + i, 0, 2);
        for (int r = 0; r < R; r++) acc[r] += load16(a + r * cols + i) * v;
    }
    for (int r = 0; r < R; r++) {
        float total = sum16(acc[r]);
        for (int64_t i = whole; i < cols; i++) total += single(a[r * cols + i]) * x[i];
        z[r] = total * scale;
    }
}

// scale * A x of one row for one adapter: z (rank,).
template <typename Weight>
static inline void narrow_row(const Low& l, const Low& next, int64_t cols, const float* x, float* z) {
    const Weight *a = (const Weight*)l.a, *n = (const Weight*)(next.a ? next.a : l.a);
    int64_t r = 0;
    for (; r + 8 <= l.rank; r += 8) narrow_rows<Weight, 8>(a + r * cols, n + r * cols, cols, l.scale, x, z + r);
    for (; r < l.rank; r++) narrow_rows<Weight, 1>(a + r * cols, n + r * cols, cols, l.scale, x, z + r);
}

// y += B z for panels [from, to) of one matrix of so many rows.
template <typename Weight>
static inline void widen_row(const Low& l, int64_t rows, int64_t from, int64_t to, const float* z, float* y) {
    for (int64_t p = from; p < to; p++) {
        const Weight* b = (const Weight*)l.b + p * l.rank * ROWS;
        f16 even = f16{}, odd = f16{};
        int64_t j = 0;
        for (; j + 2 <= l.rank; j += 2) {
            even += load16(b + j * ROWS) * z[j];
            odd += load16(b + (j + 1) * ROWS) * z[j + 1];
        }
        if (j < l.rank) even += load16(b + j * ROWS) * z[j];
        even += odd;
        if ((p + 1) * ROWS <= rows) {
            store16(y + p * ROWS, load16(y + p * ROWS) + even);
        } else {
            for (int64_t r = p * ROWS; r < rows; r++) y[r] += even[r - p * ROWS];
        }
    }
}

// What `widen_row` will read of these panels, on its way to the cache.
static inline void fetch_panels(const Low& l, int64_t from, int64_t to) {
    const int64_t panel = l.rank * ROWS * (l.kind == F32 ? 4 : 2);
    const char* b = (const char*)l.b;
    for (int64_t i = from * panel; i < to * panel; i += 64) __builtin_prefetch(b + i, 0, 2);
}

static inline int64_t panels(const Matrix& m) {
    return (m.rows + ROWS - 1) / ROWS;
}

// A row of a matrix in fp32.
static void load_row(const Matrix& m, int64_t row, float* out) {
    if (packed(m)) {
        const Layout l = layout_of(m.kind);
        const uint8_t* panel = (const uint8_t*)m.data + row / ROWS * panel_bytes(l, m.cols / GROUP);
        for (int64_t g = 0; g < m.cols / GROUP; g++) unpack_group(l, panel, g, row % ROWS, out + g * GROUP);
    } else if (m.kind == F32) {
        memcpy(out, (const float*)m.data + row * m.cols, m.cols * sizeof(float));
    } else {
        for (int64_t i = 0; i < m.cols; i += 16) {
            const uint16_t* p = (const uint16_t*)m.data + row * m.cols + i;
            store16(out + i, m.kind == BF16 ? load16(p) : load_half16(p));
        }
    }
}
