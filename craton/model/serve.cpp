// The engine's kernels for CPUs: products with stored weights (fp32, bf16, 8 and 4 bits), attention over a paged cache,
// and a whole step of a decoder in one call, so that a small model does not wait for Python.
//
// A token's result never depends on what else is in the step: every sum runs over its own row in an order fixed by the
// shapes, integer sums are exact, and tiles only choose which rows are computed together.
//
// Weights of 8 and 4 bits have one fp16 scale for 32 values (the values of GGUF's Q8_0 and Q4_0). They are stored in
// panels of 16 rows: for each group of 32 columns the values, four columns of 16 rows at a time (one vector), then the
// 16 scales. 4 bits: value + 8; a vector holds columns c..c+3 in its low nibbles and c+16..c+19 in its high ones.
// 8 bits: value + 128. Activations are rounded to signed 8 bits with one scale for 32 columns, so that unsigned times
// signed products (VNNI) apply without sign fix-ups; what the offset adds is the row's own sum, subtracted beforehand.
#include <immintrin.h>
#include <omp.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>

#include "simd.h"

typedef float f16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t i16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint8_t u64 __attribute__((vector_size(64), aligned(1), may_alias));

static const int64_t ROWS = 16, GROUP = 32, BLOCK = 16;

static inline f16 load16(const float* p) { return *(const f16*)p; }
static inline void store16(float* p, f16 v) { *(f16*)p = v; }
static inline f16 splat16(float x) { return x - f16{}; }

static inline f16 load16(const uint16_t* p) {  // bf16
    typedef uint16_t h16 __attribute__((vector_size(32), aligned(2), may_alias));
    return (f16)(__builtin_convertvector(*(const h16*)p, i16) << 16);
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

static inline f16 load16(const Half* p) { return load_half16((const uint16_t*)p); }

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
    for (int i = 0; i < 8; i++) t[i] = _mm512_add_ps(_mm512_unpacklo_ps((__m512)v[2 * i], (__m512)v[2 * i + 1]), _mm512_unpackhi_ps((__m512)v[2 * i], (__m512)v[2 * i + 1]));
    for (int i = 0; i < 4; i++) {
        __m512d a = _mm512_castps_pd(t[2 * i]), b = _mm512_castps_pd(t[2 * i + 1]);
        u[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    for (int i = 0; i < 2; i++) w[i] = _mm512_add_ps(_mm512_shuffle_f32x4(u[2 * i], u[2 * i + 1], 0x44), _mm512_shuffle_f32x4(u[2 * i], u[2 * i + 1], 0xee));
    return (f16)_mm512_add_ps(_mm512_shuffle_f32x4(w[0], w[1], 0x88), _mm512_shuffle_f32x4(w[0], w[1], 0xdd));
#else
    f16 out;
    for (int i = 0; i < 16; i++) ((float*)&out)[i] = sum16(v[i]);
    return out;
#endif
}

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
        __m256i x = _mm256_loadu_si256((__m256i*)&u + h), y = _mm256_loadu_si256((__m256i*)&s + h), z = _mm256_loadu_si256(a);
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

static inline int64_t group_bytes(int bits) { return bits == 4 ? 256 + 32 : 512 + 32; }

// Rows of activations in 8 bits, in tiles of 8 rows (at the end of 4, 2 and 1): in a tile each four columns of all its
// rows lie together, then those of the next four; so do the scales of a group and minus 8 times the sums of its values.
struct Quantised {
    int8_t* x;
    float* scale;
    int32_t* minus;  // 8 times
};

static inline int64_t tile_size(int64_t left) { return left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1; }

// T rows of activations, a whole tile, times R panels of 16 weight rows. ahead: bytes to fetch before they are needed.
template <int BITS, int R, int T, int STRIDE>
static inline void dot_panels(const uint8_t* w, int64_t panel, int64_t groups, const int8_t* x, const float* xs, const int32_t* minus, f16 (*out)[T]) {
    f16 acc[R][T];
    for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++) acc[r][t] = f16{};
    for (int64_t g = 0; g < groups; g++, w += group_bytes(BITS), x += 32 * STRIDE, xs += STRIDE, minus += STRIDE) {
        i16 a[R][T];
        for (int t = 0; t < T; t++) {
            i16 begin = minus[t] - i16{};
            if (BITS == 8) begin = VNNI ? begin << 4 : i16{};
            for (int r = 0; r < R; r++) a[r][t] = begin;
        }
        for (int64_t line = 0; line < group_bytes(BITS) * R; line += 64) __builtin_prefetch(w + 4096 + line);
        const int32_t* q = (const int32_t*)x;
        if (BITS == 4) {
            for (int c = 0; c < 4; c++) {
                u64 low[R], high[R];
                for (int r = 0; r < R; r++) {
                    u64 v = *(const u64*)(w + r * panel + 64 * c);
                    low[r] = v & 15, high[r] = (u64)((i16)v >> 4) & 15;
                }
                for (int t = 0; t < T; t++) {
                    i16 x0 = q[c * STRIDE + t] - i16{}, x1 = q[(4 + c) * STRIDE + t] - i16{};
                    for (int r = 0; r < R; r++) a[r][t] = dot4(dot4(a[r][t], low[r], x0), high[r], x1);
                }
            }
        } else {
            for (int c = 0; c < 8; c++) {
                u64 v[R];
                for (int r = 0; r < R; r++) v[r] = *(const u64*)(w + r * panel + 64 * c);
                for (int t = 0; t < T; t++) {
                    i16 x0 = q[c * STRIDE + t] - i16{};
                    for (int r = 0; r < R; r++) a[r][t] = VNNI ? dot4(a[r][t], v[r], x0) : dot4_signed(a[r][t], v[r] ^ 128, x0);
                }
            }
        }
        for (int r = 0; r < R; r++) {
            f16 scale = load_half16((const uint16_t*)(w + r * panel + group_bytes(BITS) - 32));
            for (int t = 0; t < T; t++) acc[r][t] += __builtin_convertvector(a[r][t], f16) * (scale * xs[t]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++) out[r][t] = acc[r][t];
}

// A group of 32 columns of one row, to its place in the tile; x is not changed.
static void quantise_group(const float* x, int64_t row, int64_t rows, int64_t cols, int64_t g, const Quantised& q) {
    const int64_t groups = cols / GROUP, first = row < (rows & ~7) ? row & ~7 : rows - (rows & 7) + (row - (rows & ~7) < (rows & 4) ? 0 : (rows & 4) + (row - (rows & ~7) - (rows & 4) < (rows & 2) ? 0 : (rows & 2)));
    const int64_t size = tile_size(rows - first), lane = row - first;
    f16 a = load16(x), b = load16(x + 16);
    f16 ma = (f16)((i16)a & 0x7fffffff), mb = (f16)((i16)b & 0x7fffffff);
    ma = ma > mb ? ma : mb;
    float most = 0;
    for (int i = 0; i < 16; i++) most = std::max(most, ((float*)&ma)[i]);
    const float inverse = most > 0 ? 127.f / most : 0.f;
    const f16 magic = splat16(12582912.f);  // adding it rounds to the nearest integer
    a = (a * inverse + magic) - magic;
    b = (b * inverse + magic) - magic;
    typedef int8_t b16 __attribute__((vector_size(16), aligned(1), may_alias));
    b16 bytes[2] = {__builtin_convertvector(__builtin_convertvector(a, i16), b16), __builtin_convertvector(__builtin_convertvector(b, i16), b16)};
    int32_t* out = (int32_t*)(q.x + first * cols) + g * 8 * size + lane;
    const int32_t* words = (const int32_t*)bytes;
    for (int c = 0; c < 8; c++) out[c * size] = words[c];
    q.scale[first * groups + g * size + lane] = most / 127.f;
    q.minus[first * groups + g * size + lane] = -8 * (int32_t)sum16(a + b);
}

static void quantise(const float* x, int64_t row, int64_t rows, int64_t cols, const Quantised& q) {
    for (int64_t g = 0; g < cols / GROUP; g++) quantise_group(x + g * GROUP, row, rows, cols, g, q);
}

// ---- products ---------------------------------------------------------------------------------------------------

struct Matrix {  // kind: 0 fp32, 1 bf16, 2 fp16 (row by row), 4, 8 (panels)
    const void* data;
    const float* bias;
    int64_t rows, cols, kind;
};

// R weight rows and T activation rows, R * T = 16: each sum has 16 lanes, which are joined at the end. Meanwhile AHEAD
// lines are fetched from `next` on for every 16 columns.
template <typename Weight, int R, int T, int AHEAD>
static inline void dot_rows(const Weight* w, const float* x, int64_t cols, float* out, int64_t stride, const float* bias, const char* next) {
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
static void rows_block(const Weight* w, const float* bias, int64_t rows, const float* x, int64_t tokens, int64_t cols, float* out, int64_t stride) {
    if (rows == 16) {
        const int64_t fours = tokens / 4 * 4;
        const auto four = [&](auto ahead) {  // the next four rows are fetched while these are multiplied
            for (int r = 0; r < 16; r += 4) {
                const char* next = (const char*)(w + (r + 4) * cols);
                for (int64_t t = 0; t < fours; t += 4, next += ahead * cols * 4)
                    dot_rows<Weight, 4, 4, ahead>(w + r * cols, x + t * cols, cols, out + t * stride + r, stride, bias ? bias + r : 0, next);
            }
        };
        if (fours >= 64) four(std::integral_constant<int, 0>());
        else if (fours >= 16) four(std::integral_constant<int, 1>());
        else if (fours >= 8) four(std::integral_constant<int, 2>());
        else if (fours) four(std::integral_constant<int, 4>());
        for (int64_t t = fours; t < tokens; t++) dot_rows<Weight, 16, 1, 0>(w, x + t * cols, cols, out + t * stride, stride, bias, 0);
    } else {  // the last rows of a matrix
        for (int64_t r = 0; r < rows; r++)
            for (int64_t t = 0; t < tokens; t++) out[t * stride + r] = dot_row(w + r * cols, x + t * cols, cols) + (bias ? bias[r] : 0.f);
    }
}

template <int BITS, int R, int T, int STRIDE>
static inline void panel_tile(const uint8_t* w, int64_t panel, const float* bias, int64_t groups, const int8_t* x, const float* xs, const int32_t* minus, float* out, int64_t stride) {
    f16 y[R][T];
    dot_panels<BITS, R, T, STRIDE>(w, panel, groups, x, xs, minus, y);
    for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++) store16(out + t * stride + r * ROWS, bias ? y[r][t] + load16(bias + r * ROWS) : y[r][t]);
}

// R panels for some tokens, which begin at a tile.
template <int BITS, int R>
static void panel_tiles(const uint8_t* w, int64_t panel, const float* bias, Quantised q, int64_t tokens, int64_t cols, float* out, int64_t stride) {
    const int64_t groups = cols / GROUP;
    for (int64_t t = 0, n; t < tokens; t += n) {
        n = tile_size(tokens - t);
        const int8_t* x = q.x + t * cols;
        const float* xs = q.scale + t * groups;
        const int32_t* minus = q.minus + t * groups;
        float* o = out + t * stride;
        if (n == 8 && R == 1) panel_tile<BITS, 1, 8, 8>(w, panel, bias, groups, x, xs, minus, o, stride);
        else if (n == 8) {  // two panels share what is read of the activations
            panel_tile<BITS, R, 4, 8>(w, panel, bias, groups, x, xs, minus, o, stride);
            panel_tile<BITS, R, 4, 8>(w, panel, bias, groups, x + 16, xs + 4, minus + 4, o + 4 * stride, stride);
        }
        else if (n == 4) panel_tile<BITS, R, 4, 4>(w, panel, bias, groups, x, xs, minus, o, stride);
        else if (n == 2) panel_tile<BITS, R, 2, 2>(w, panel, bias, groups, x, xs, minus, o, stride);
        else panel_tile<BITS, R, 1, 1>(w, panel, bias, groups, x, xs, minus, o, stride);
    }
}

// Panels [from, to) of 16 rows of a matrix, for all tokens. out: (tokens, stride), the matrix's first column at out[0].
static void product(const Matrix& m, int64_t from, int64_t to, const float* x, Quantised q, int64_t tokens, float* out, int64_t stride) {
    const bool whole = m.kind == 4 || m.kind == 8;
    const int64_t item = whole ? 1 : 4, groups = m.cols / GROUP, panel = groups * group_bytes(m.kind);
    const int64_t part = std::max<int64_t>(8, ((384 << 10) / (m.cols * item)) & ~7);  // tokens whose rows stay in the second cache
    for (int64_t t = 0; t < tokens; t += part) {
        const int64_t n = std::min(part, tokens - t);
        for (int64_t p = from; p < to;) {
            const int64_t row = p * ROWS, rows = std::min(ROWS, m.rows - row), pair = whole && n > 8 && p + 2 <= to;
            const float* bias = m.bias ? m.bias + row : 0;
            float* o = out + t * stride + row;
            const uint8_t* w = (const uint8_t*)m.data + p * panel;
            Quantised here = {q.x + t * m.cols, q.scale + t * groups, q.minus + t * groups};
            if (m.kind == 4 && pair) panel_tiles<4, 2>(w, panel, bias, here, n, m.cols, o, stride);
            else if (m.kind == 8 && pair) panel_tiles<8, 2>(w, panel, bias, here, n, m.cols, o, stride);
            else if (m.kind == 4) panel_tiles<4, 1>(w, panel, bias, here, n, m.cols, o, stride);
            else if (m.kind == 8) panel_tiles<8, 1>(w, panel, bias, here, n, m.cols, o, stride);
            else if (m.kind == 1) rows_block((const uint16_t*)m.data + row * m.cols, bias, rows, x + t * m.cols, n, m.cols, o, stride);
            else if (m.kind == 2) rows_block((const Half*)m.data + row * m.cols, bias, rows, x + t * m.cols, n, m.cols, o, stride);
            else rows_block((const float*)m.data + row * m.cols, bias, rows, x + t * m.cols, n, m.cols, o, stride);
            p += pair ? 2 : 1;
        }
    }
}

static inline int64_t panels(const Matrix& m) { return (m.rows + ROWS - 1) / ROWS; }
static inline bool packed(const Matrix& m) { return m.kind == 4 || m.kind == 8; }

// ---- attention over a paged cache -------------------------------------------------------------------------------

struct Step {  // craton/model/cache.py
    int64_t tokens, sequences, most_blocks;
    const int32_t *positions, *slots, *starts, *lengths, *tables;
};

struct Heads {
    int64_t heads, kv_heads, key, value;  // key and value: sizes of a head, multiples of 16 (value)
    int64_t window;                       // 0: all positions
    float scale, softcap;                 // softcap 0: none
    const float* sinks;                   // per head, or null
};

struct Tile {  // rows of queries that are computed together: row = token * group + head in group
    int32_t sequence, row, rows;
};

static void make_tiles(const Step& s, int64_t group, std::vector<Tile>& tiles) {
    tiles.clear();
    for (int32_t i = 0; i < s.sequences; i++) {
        int32_t rows = (s.starts[i + 1] - s.starts[i]) * group;
        for (int32_t r = 0; r < rows; r += 8) tiles.push_back({i, r, std::min(8, rows - r)});
    }
}

static void write_cache(const Heads& h, const float* k, const float* v, int64_t slot, float* keys, float* values) {
    const int64_t block = slot / BLOCK, at = slot % BLOCK;
    for (int64_t n = 0; n < h.kv_heads; n++) {
        float* kb = keys + (block * h.kv_heads + n) * h.key * BLOCK + at;
        for (int64_t i = 0; i < h.key; i++) kb[i * BLOCK] = k[n * h.key + i];
        memcpy(values + ((block * h.kv_heads + n) * BLOCK + at) * h.value, v + n * h.value, h.value * sizeof(float));
    }
}

template <int Q, int B>  // scores of Q queries with B blocks of 16 keys
static inline void score_blocks(const float* const* q, const float* const* kb, int64_t size, float scale, float* scores, int64_t stride) {
    f16 acc[Q][B];
    for (int i = 0; i < Q; i++)
        for (int b = 0; b < B; b++) acc[i][b] = f16{};
    for (int64_t d = 0; d < size; d++)
        for (int b = 0; b < B; b++) {
            f16 k = load16(kb[b] + d * BLOCK);
            for (int i = 0; i < Q; i++) acc[i][b] += k * q[i][d];
        }
    for (int i = 0; i < Q; i++)
        for (int b = 0; b < B; b++) store16(scores + i * stride + b * BLOCK, acc[i][b] * scale);
}

template <int Q, int D>  // D vectors of the values of Q queries; each sum is over the positions in their order
static inline void mix_part(const float* const* vb, const float* p, int64_t stride, int64_t from, int64_t to, int64_t first_block, int64_t value, int64_t d, float* const* out, const float* inverse) {
    f16 acc[Q][D];
    for (int i = 0; i < Q; i++)
        for (int k = 0; k < D; k++) acc[i][k] = f16{};
    for (int64_t j = from; j < to;) {
        const int64_t b = j / BLOCK - first_block, end = std::min(to, (b + first_block + 1) * BLOCK);
        const float *v = vb[b] + (j % BLOCK) * value + d, *w = p + j - first_block * BLOCK;
        for (; j < end; j++, v += value, w++) {
            f16 x[D];
            for (int k = 0; k < D; k++) x[k] = load16(v + k * 16);
            for (int i = 0; i < Q; i++)
                for (int k = 0; k < D; k++) acc[i][k] += x[k] * w[i * stride];
        }
    }
    for (int i = 0; i < Q; i++)
        for (int k = 0; k < D; k++) store16(out[i] + d + k * 16, acc[i][k] * inverse[i]);
}

template <int Q>
static inline void mix_values(const float* const* vb, const float* p, int64_t stride, int64_t from, int64_t to, int64_t first_block, int64_t value, float* const* out, const float* inverse) {
    constexpr int D = Q <= 4 ? 4 : 2;  // enough sums at once to hide an addition's latency
    int64_t d = 0;
    for (; d + D * 16 <= value; d += D * 16) mix_part<Q, D>(vb, p, stride, from, to, first_block, value, d, out, inverse);
    for (; d < value; d += 16) mix_part<Q, 1>(vb, p, stride, from, to, first_block, value, d, out, inverse);
}

// One tile of queries of one kv head. q, out: rows of all heads of a token, strides between tokens.
static void attend(const Step& s, const Heads& h, const Tile& tile, int64_t kv, const float* q, int64_t q_stride, const float* keys, const float* values, float* out, int64_t out_stride, std::vector<float>& scratch, std::vector<const float*>& pointers) {
    const int64_t group = h.heads / h.kv_heads, first_token = s.starts[tile.sequence];
    const int n = tile.rows;
    const float* queries[8];
    float *outs[8], sink[8];
    int64_t low[8], high[8], from = INT64_MAX, to = 0;
    for (int i = 0; i < n; i++) {
        const int64_t token = first_token + (tile.row + i) / group, head = kv * group + (tile.row + i) % group;
        queries[i] = q + token * q_stride + head * h.key;
        outs[i] = out + token * out_stride + head * h.value;
        sink[i] = h.sinks ? h.sinks[head] : -INFINITY;
        high[i] = s.positions[token] + 1;
        low[i] = h.window ? std::max<int64_t>(0, high[i] - h.window) : 0;
        from = std::min(from, low[i]);
        to = std::max(to, high[i]);
    }
    for (int i = n; i < 8; i++) queries[i] = queries[0];
    const int64_t first = from / BLOCK, blocks = (to + BLOCK - 1) / BLOCK - first, stride = blocks * BLOCK;
    scratch.resize(8 * stride);
    pointers.resize(2 * blocks);
    const float **kb = pointers.data(), **vb = kb + blocks;
    const int32_t* table = s.tables + tile.sequence * s.most_blocks + first;
    for (int64_t b = 0; b < blocks; b++) {
        kb[b] = keys + (table[b] * h.kv_heads + kv) * h.key * BLOCK;
        vb[b] = values + (table[b] * h.kv_heads + kv) * BLOCK * h.value;
    }
    float* p = scratch.data();
    int64_t b = 0;
    if (n == 1) for (; b + 8 <= blocks; b += 8) score_blocks<1, 8>(queries, kb + b, h.key, h.scale, p + b * BLOCK, stride);
    else if (n == 2) for (; b + 4 <= blocks; b += 4) score_blocks<2, 4>(queries, kb + b, h.key, h.scale, p + b * BLOCK, stride);
    else if (n <= 4) for (; b + 2 <= blocks; b += 2) score_blocks<4, 2>(queries, kb + b, h.key, h.scale, p + b * BLOCK, stride);
    for (; b < blocks; b++) {
        if (n == 1) score_blocks<1, 1>(queries, kb + b, h.key, h.scale, p + b * BLOCK, stride);
        else if (n <= 4) score_blocks<4, 1>(queries, kb + b, h.key, h.scale, p + b * BLOCK, stride);
        else score_blocks<8, 1>(queries, kb + b, h.key, h.scale, p + b * BLOCK, stride);
    }
    float inverse[8];
    const int64_t base = first * BLOCK;
    for (int i = 0; i < n; i++) {
        float* row = p + i * stride;
        if (h.softcap > 0) for (int64_t j = low[i] - base; j < high[i] - base; j++) row[j] = std::tanh(row[j] / h.softcap) * h.softcap;
        for (int64_t j = 0; j < low[i] - base; j++) row[j] = -INFINITY;
        for (int64_t j = high[i] - base; j < stride; j++) row[j] = -INFINITY;
        f16 most = splat16(-INFINITY);
        for (int64_t j = 0; j < stride; j += 16) { f16 v = load16(row + j); most = v > most ? v : most; }
        float m = sink[i];
        for (int l = 0; l < 16; l++) m = std::max(m, ((float*)&most)[l]);
        f16 total = f16{};
        for (int64_t j = 0; j < stride; j += 16) {
            f16 e = exp16(load16(row + j) - m);
            store16(row + j, e);
            total += e;
        }
        inverse[i] = 1.f / (sum16(total) + (h.sinks ? std::exp(sink[i] - m) : 0.f));
    }
    if (n == 8) mix_values<8>(vb, p, stride, from, to, first, h.value, outs, inverse);
    else {
        int i = 0;
        for (; i + 4 <= n; i += 4) mix_values<4>(vb, p + i * stride, stride, from, to, first, h.value, outs + i, inverse + i);
        for (; i + 2 <= n; i += 2) mix_values<2>(vb, p + i * stride, stride, from, to, first, h.value, outs + i, inverse + i);
        for (; i < n; i++) mix_values<1>(vb, p + i * stride, stride, from, to, first, h.value, outs + i, inverse + i);
    }
}

// ---- a whole step -----------------------------------------------------------------------------------------------

struct Layer {
    Matrix q, k, v, o, gate, up, down;
    const float *norm, *mlp_norm, *q_norm, *k_norm;  // the last two may be null
    float *keys, *values;
    int64_t window, rope;  // rope 0: a layer without positions
};

struct Model {
    int64_t layers, hidden, heads, kv_heads, head_dim, intermediate, vocabulary, embedding_kind;
    float eps, scale;
    const Layer* layer;
    Matrix head;
    const void* embedding;
    const float *norm, *cos, *sin;  // cos, sin: (context, head_dim / 2)
};

struct alignas(64) Work {  // dynamic sharing of a phase's pieces between threads
    std::atomic<int64_t> next{0};
};

static void rms_norm(const float* x, const float* delta, const float* w, int64_t n, float eps, float* total, float* y) {
    f16 squares = f16{};
    for (int64_t i = 0; i < n; i += 16) {
        f16 v = load16(x + i);
        if (delta) v += load16(delta + i);
        store16(y + i, v);
        squares += v * v;
    }
    if (total) memcpy(total, y, n * sizeof(float));
    const float r = 1.f / std::sqrt(sum16(squares) / n + eps);
    for (int64_t i = 0; i < n; i += 16) store16(y + i, load16(y + i) * r * load16(w + i));
}

static void rotate_head(const float* x, const float* norm, int64_t d, float eps, const float* cos, const float* sin, float* out) {
    if (norm) {
        rms_norm(x, 0, norm, d, eps, 0, out);
        x = out;
    }
    if (!cos) {
        if (x != out) memcpy(out, x, d * sizeof(float));
        return;
    }
    const int64_t half = d / 2;
    for (int64_t i = 0; i < half; i++) {
        float a = x[i], b = x[i + half];
        out[i] = a * cos[i] - b * sin[i];
        out[i + half] = b * cos[i] + a * sin[i];
    }
}

extern "C" {

int64_t serve_workspace(const Model* m, int64_t tokens, int64_t threads) {
    const int64_t q = m->heads * m->head_dim, kv = m->kv_heads * m->head_dim, h = m->hidden, most = std::max({h, q, m->intermediate});
    const int64_t floats = tokens * (3 * h + (q + 2 * kv) + 2 * q + 3 * m->intermediate) + (threads + 1) * tokens * h;
    return floats * 4 + (threads + 1) * tokens * (most + (most / GROUP) * 8) + (threads + 8) * 4096;
}

// ids (tokens,) in; logits (outputs, vocabulary) of the tokens in `rows`, and their last hidden states (outputs,
// hidden), either may be null. The cache gets the step's keys and values.
void serve_step(const Model* mp, const Step* sp, const int32_t* ids, int64_t outputs, const int32_t* rows, float* logits, float* hidden, char* workspace, int64_t threads) {
    const Model& m = *mp;
    const Step& s = *sp;
    const int64_t T = s.tokens, h = m.hidden, d = m.head_dim, qn = m.heads * d, kvn = m.kv_heads * d, I = m.intermediate, group = m.heads / m.kv_heads;
    const int64_t most = std::max({h, qn, I}), width = qn + 2 * kvn;
    char* at = workspace;
    auto take = [&](int64_t bytes) { char* p = at; at += (bytes + 127) & ~int64_t(63); return p; };
    float* x[2] = {(float*)take(T * h * 4), (float*)take(T * h * 4)};
    float* delta = (float*)take(T * h * 4);
    float* qkv = (float*)take(T * width * 4);
    float* rotated = (float*)take(T * qn * 4);
    float* mixed = (float*)take(T * qn * 4);
    float* act = (float*)take(T * I * 4);
    const bool alone = T <= 2;  // then each thread normalises for itself instead of waiting
    std::vector<float*> y(threads);
    std::vector<Quantised> yq(threads);
    auto rounded = [&]() {
        Quantised q;
        q.x = (int8_t*)take(T * most);
        q.scale = (float*)take(T * (most / GROUP) * 4);
        q.minus = (int32_t*)take(T * (most / GROUP) * 4);
        return q;
    };
    for (int64_t i = 0; i < (alone ? threads : 1); i++) { y[i] = (float*)take(T * h * 4); yq[i] = rounded(); }
    for (int64_t i = alone ? threads : 1; i < threads; i++) { y[i] = y[0]; yq[i] = yq[0]; }
    const Quantised mid = rounded();
    std::vector<Tile> tiles;
    make_tiles(s, group, tiles);
    std::vector<Work> work(m.layers * 9 + 2);  // a layer: four products, two norms, rotation, attention, rounding

#pragma omp parallel num_threads(threads)
    {
        const int me = omp_get_thread_num(), team = omp_get_num_threads();
        std::vector<float> scratch;
        std::vector<const float*> pointers;
        Work* phase = work.data();
        int now = 0;
        auto mine = [&](int64_t n, int64_t& from, int64_t& to) { from = n * me / team; to = n * (me + 1) / team; };
        // Pieces of [0, n), `size` at a time, to whichever thread is free.
        auto share = [&](int64_t n, int64_t size, auto&& body) {
            for (;;) {
                int64_t from = phase->next.fetch_add(size, std::memory_order_relaxed);
                if (from >= n) break;
                body(from, std::min(n, from + size));
            }
            phase++;
        };
        // Few pieces where reading the weights is the work, more where computing is, so that nobody waits long.
        auto chunk = [&](int64_t n) { return std::max<int64_t>(1, n / (team * (T >= 24 ? 8 : 3))); };
        const int64_t few = std::max<int64_t>(1, T / (team * 4));  // tokens
        auto normalise = [&](const float* add, const float* w, bool round) {
            auto rows = [&](int64_t from, int64_t to) {
                for (int64_t t = from; t < to; t++) {
                    float* sum = add && (!alone || me == 0) ? x[1 - now] + t * h : 0;
                    rms_norm(x[now] + t * h, add ? add + t * h : 0, w, h, m.eps, sum, y[me] + t * h);
                    if (round) quantise(y[me] + t * h, t, T, h, yq[me]);
                }
            };
            if (alone) rows(0, T);
            else share(T, few, rows);
            if (add) now = 1 - now;
            if (!alone) {
#pragma omp barrier
            }
        };
        {
            int64_t from, to;
            mine(T, from, to);
            for (int64_t t = from; t < to; t++) {
                if (m.embedding_kind == 0) memcpy(x[0] + t * h, (const float*)m.embedding + ids[t] * h, h * 4);
                else if (m.embedding_kind == 1) for (int64_t i = 0; i < h; i += 16) store16(x[0] + t * h + i, load16((const uint16_t*)m.embedding + ids[t] * h + i));
                else for (int64_t i = 0; i < h; i += 16) store16(x[0] + t * h + i, load16((const Half*)m.embedding + ids[t] * h + i));
            }
#pragma omp barrier
        }
        for (int64_t l = 0; l < m.layers; l++) {
            const Layer& L = m.layer[l];
            normalise(l ? delta : 0, L.norm, packed(L.q));
            const Matrix* parts[3] = {&L.q, &L.k, &L.v};
            const int64_t pq = panels(L.q), pk = panels(L.k);
            share(pq + 2 * pk, chunk(pq + 2 * pk), [&](int64_t from, int64_t to) {
                const int64_t begin[4] = {0, pq, pq + pk, pq + 2 * pk}, column[3] = {0, qn, qn + kvn};
                for (int i = 0; i < 3; i++) {
                    int64_t a = std::max(from, begin[i]), b = std::min(to, begin[i + 1]);
                    if (a < b) product(*parts[i], a - begin[i], b - begin[i], y[me], yq[me], T, qkv + column[i], width);
                }
            });
#pragma omp barrier
            const Heads heads = {m.heads, m.kv_heads, d, d, L.window, m.scale, 0.f, 0};
            share(T * (m.heads + 1), few * (m.heads + 1) / (T < 8 ? 2 : 1), [&](int64_t from, int64_t to) {
                for (int64_t i = from; i < to; i++) {
                    const int64_t t = i / (m.heads + 1), head = i % (m.heads + 1), pos = s.positions[t];
                    const float *row = qkv + t * width, *c = L.rope ? m.cos + pos * (d / 2) : 0, *sn = L.rope ? m.sin + pos * (d / 2) : 0;
                    if (head < m.heads) rotate_head(row + head * d, L.q_norm, d, m.eps, c, sn, rotated + t * qn + head * d);
                    else {
                        scratch.resize(std::max<size_t>(scratch.size(), kvn));
                        for (int64_t n = 0; n < m.kv_heads; n++) rotate_head(row + qn + n * d, L.k_norm, d, m.eps, c, sn, scratch.data() + n * d);
                        write_cache(heads, scratch.data(), row + qn + kvn, s.slots[t], L.keys, L.values);
                    }
                }
            });
#pragma omp barrier
            share((int64_t)tiles.size() * m.kv_heads, 1, [&](int64_t i, int64_t) {
                attend(s, heads, tiles[i / m.kv_heads], i % m.kv_heads, rotated, qn, L.keys, L.values, mixed, qn, scratch, pointers);
            });
#pragma omp barrier
            if (packed(L.o)) {
                auto rows = [&](int64_t from, int64_t to) {
                    for (int64_t t = from; t < to; t++) quantise(mixed + t * qn, t, T, qn, yq[me]);
                };
                if (alone) rows(0, T);
                else share(T, few, rows);
                if (!alone) {
#pragma omp barrier
                }
            }
            share(panels(L.o), chunk(panels(L.o)), [&](int64_t from, int64_t to) { product(L.o, from, to, mixed, yq[me], T, delta, h); });
#pragma omp barrier
            normalise(delta, L.mlp_norm, packed(L.gate));
            // Two panels of gate and of up give a group of 32, which this thread can round at once.
            share((I + 31) / 32, chunk((I + 31) / 32), [&](int64_t from, int64_t to) {
                const int64_t part = 64;
                float g[64 * 32], u[64 * 32];
                for (int64_t b = from; b < to; b++) {
                    const int64_t n = std::min<int64_t>(32, I - b * 32), last = b * 2 + (n + 15) / 16;
                    for (int64_t t = 0; t < T; t += part) {
                        const int64_t c = std::min(part, T - t);
                        Quantised here = {yq[me].x + t * h, yq[me].scale + t * (h / GROUP), yq[me].minus + t * (h / GROUP)};
                        product(L.gate, b * 2, last, y[me] + t * h, here, c, g - b * 32, 32);
                        product(L.up, b * 2, last, y[me] + t * h, here, c, u - b * 32, 32);
                        for (int64_t i = 0; i < c; i++) {
                            float* o = act + (t + i) * I + b * 32;
                            for (int64_t j = 0; j < n; j += 16) {
                                f16 a = load16(g + i * 32 + j);
                                store16(o + j, a / (1.f + exp16(-a)) * load16(u + i * 32 + j));
                            }
                            if (packed(L.down)) quantise_group(o, t + i, T, I, b, mid);
                        }
                    }
                }
            });
#pragma omp barrier
            share(panels(L.down), chunk(panels(L.down)), [&](int64_t from, int64_t to) { product(L.down, from, to, act, mid, T, delta, h); });
#pragma omp barrier
        }
        {  // the last norm, of the rows that are asked for
            int64_t from, to;
            mine(outputs, from, to);
            for (int64_t i = from; i < to; i++) {
                const int64_t t = rows[i];
                float* out = x[1 - now] + i * h;
                rms_norm(x[now] + t * h, delta + t * h, m.norm, h, m.eps, 0, out);
                if (hidden) memcpy(hidden + i * h, out, h * 4);
                if (logits && packed(m.head)) quantise(out, i, outputs, h, mid);
            }
#pragma omp barrier
            if (logits) {
                share(panels(m.head), chunk(panels(m.head)), [&](int64_t a, int64_t b) { product(m.head, a, b, x[1 - now], mid, outputs, logits, m.vocabulary); });
            }
        }
    }
}

// out (tokens, rows) = x (tokens, cols) times the matrix transposed.
void serve_linear(const Matrix* m, const float* x, int64_t tokens, float* out, int64_t threads) {
    std::vector<int8_t> q(packed(*m) ? tokens * m->cols : 0);
    std::vector<float> scale(packed(*m) ? tokens * (m->cols / GROUP) : 0);
    std::vector<int32_t> minus(scale.size());
    Work work;
#pragma omp parallel num_threads(threads)
    {
        if (packed(*m)) {
#pragma omp for
            for (int64_t t = 0; t < tokens; t++) quantise(x + t * m->cols, t, tokens, m->cols, {q.data(), scale.data(), minus.data()});
        }
        const int64_t n = panels(*m), size = std::max<int64_t>(1, n / (omp_get_num_threads() * 8));
        for (;;) {
            int64_t from = work.next.fetch_add(size);
            if (from >= n) break;
            product(*m, from, std::min(n, from + size), x, {q.data(), scale.data(), minus.data()}, tokens, out, m->rows);
        }
    }
}

// Stores k and v (tokens, kv_heads, size) in the pools and attends: q (tokens, heads, key) -> out (tokens, heads, value).
void serve_attention(const Step* s, const Heads* h, const float* q, const float* k, const float* v, float* keys, float* values, float* out, int64_t threads) {
    std::vector<Tile> tiles;
    make_tiles(*s, h->heads / h->kv_heads, tiles);
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> scratch;
        std::vector<const float*> pointers;
#pragma omp for
        for (int64_t t = 0; t < s->tokens; t++) write_cache(*h, k + t * h->kv_heads * h->key, v + t * h->kv_heads * h->value, s->slots[t], keys, values);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < (int64_t)tiles.size() * h->kv_heads; i++)
            attend(*s, *h, tiles[i / h->kv_heads], i % h->kv_heads, q, h->heads * h->key, keys, values, out, h->heads * h->value, scratch, pointers);
    }
}

// Asks for large pages under memory that is about to be filled: fewer page tables to walk while it streams.
void serve_advise(char* data, int64_t bytes) {
#if defined(__linux__)
    const uintptr_t size = 2 << 20, from = ((uintptr_t)data + size - 1) / size * size, to = ((uintptr_t)data + bytes) / size * size;
    if (from < to) madvise((void*)from, to - from, MADV_HUGEPAGE);
#endif
}

// Rows as they lie in files (4 bits: two columns a byte, the first low, value + 8; 8 bits: value + 128) and their fp16
// scales (rows, cols / 32) to panels. rows must be a multiple of 16, cols of 32.
void serve_pack(int64_t bits, const uint8_t* values, const uint16_t* scales, int64_t rows, int64_t cols, uint8_t* out, int64_t threads) {
    const int64_t groups = cols / GROUP, per_row = cols * bits / 8;
#pragma omp parallel for num_threads(threads)
    for (int64_t p = 0; p < rows / ROWS; p++) {
        uint8_t* w = out + p * groups * group_bytes(bits);
        for (int64_t g = 0; g < groups; g++, w += group_bytes(bits)) {
            for (int64_t r = 0; r < ROWS; r++) {
                const uint8_t* row = values + (p * ROWS + r) * per_row + g * GROUP * bits / 8;
                if (bits == 8) {
                    for (int c = 0; c < 8; c++) memcpy(w + 64 * c + 4 * r, row + 4 * c, 4);
                } else {
                    for (int c = 0; c < 4; c++) {  // columns 4c..4c+3 and 16 + those
                        uint8_t *o = w + 64 * c + 4 * r, a = row[2 * c], b = row[2 * c + 1], e = row[8 + 2 * c], f = row[8 + 2 * c + 1];
                        o[0] = (a & 15) | (e & 15) << 4;
                        o[1] = (a >> 4) | (e & 0xf0);
                        o[2] = (b & 15) | (f & 15) << 4;
                        o[3] = (b >> 4) | (f & 0xf0);
                    }
                }
                memcpy(w + group_bytes(bits) - 32 + 2 * r, scales + (p * ROWS + r) * groups + g, 2);
            }
        }
    }
}

// Bytes read by each thread as four streams, which is what the memory gives the most for. Returns a sum, so that
// nothing is left out.
int64_t serve_read(const uint8_t* data, int64_t bytes, int64_t threads) {
    int64_t total = 0;
#pragma omp parallel num_threads(threads) reduction(+ : total)
    {
        const int64_t per = bytes / omp_get_num_threads() / 4 / 256 * 256;
        const uint8_t* own = data + omp_get_thread_num() * per * 4;
        i16 a[4] = {};
        for (int64_t at = 0; at < per; at += 256)
            for (int s = 0; s < 4; s++)
                for (int i = 0; i < 4; i++) a[i] += *(const i16*)(own + s * per + at + 64 * i);
        for (int i = 0; i < 4; i++)
            for (int j = 0; j < 16; j++) total += a[i][j];
    }
    return total;
}
}
