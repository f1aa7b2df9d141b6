// How weights of 2 to 8 bits lie in memory, and the way there from GGUF's blocks. Kinds are GGUF's numbers of its
// types.
//
// Matrices are stored in panels of 16 rows, a panel in groups of 32 columns. A group is its values, four columns of 16
// rows at a time (one vector of 64 bytes), then 16 scales and, where the kind has them, 16 offsets:
// value = scale * (q - zero) + offset. Of values of 4 to 6 bits a vector holds the low four bits of columns c..c+3, and
// of c+16..c+19 in its high half; further bits follow in vectors of their own. Kinds that GGUF stores in blocks of 256
// have scales of 8 bits; what they are multiplied with comes before every eight groups.
#pragma once
#include "vectors.h"

enum Kind { F32 = 0, F16 = 1, Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8, Q2_K = 10, Q3_K = 11, Q4_K = 12,
            Q5_K = 13, Q6_K = 14, IQ4_NL = 20, IQ4_XS = 23, BF16 = 30, MXFP4 = 39 };

enum Scale { HALF, SUPER, POWER };  // fp16; 8 bits times fp16 of eight groups; a power of two

struct Layout {
    int bits, zero;
    int parts;    // 2: columns 0-15 and 16-31 of a group have scales of their own
    bool offset;  // whether there is one; it is subtracted where the scales are of SUPER
    Scale scale;
    const uint8_t* table;  // what values stand for, plus zero; 0: themselves
};

static constexpr uint8_t IQ4_TABLE[16] = {1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241};
static constexpr uint8_t FP4_TABLE[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

static constexpr Layout layout_of(int64_t kind) {
    switch (kind) {
        case Q4_0: return {4, 8, 1, false, HALF, nullptr};
        case Q4_1: return {4, 0, 1, true, HALF, nullptr};
        case Q5_0: return {5, 16, 1, false, HALF, nullptr};
        case Q5_1: return {5, 0, 1, true, HALF, nullptr};
        case Q8_0: return {8, 128, 1, false, HALF, nullptr};
        case Q2_K: return {4, 0, 2, true, SUPER, nullptr};
        case Q4_K: return {4, 0, 1, true, SUPER, nullptr};
        case Q5_K: return {5, 0, 1, true, SUPER, nullptr};
        case Q3_K:  // as if of 6 bits
        case Q6_K: return {6, 32, 2, false, SUPER, nullptr};
        case IQ4_NL: return {4, 128, 1, false, HALF, IQ4_TABLE};
        case IQ4_XS: return {4, 128, 1, false, SUPER, IQ4_TABLE};
        case MXFP4: return {4, 12, 1, false, POWER, FP4_TABLE};
        default: return {0, 0, 0, false, HALF, nullptr};
    }
}

static constexpr int64_t scale_bytes(Layout l) {  // of 16 rows
    return l.scale == HALF ? 32 : 16;
}
static constexpr int64_t group_bytes(Layout l) {
    return l.bits * 64 + l.parts * scale_bytes(l) * (l.offset ? 2 : 1);
}
static constexpr int64_t block_bytes(Layout l) {  // before every eight groups
    return l.scale == SUPER ? (l.offset ? 64 : 32) : 0;
}
static constexpr int64_t group_at(Layout l, int64_t g) {
    return g * group_bytes(l) + (g / 8 + 1) * block_bytes(l);
}
static constexpr int64_t panel_bytes(Layout l, int64_t groups) {
    return groups * group_bytes(l) + (groups + 7) / 8 * block_bytes(l);
}

// ---- from GGUF --------------------------------------------------------------------------------------------------

// A group of one row. scale and offset: one for each 16 columns, or the first for all; fp16, 8 bits or a power.
struct Group {
    uint8_t q[32];
    uint16_t scale[2], offset[2], times, offset_times;
};

static inline uint16_t half_at(const uint8_t* p) {
    uint16_t x;
    memcpy(&x, p, 2);
    return x;
}

static void nibbles(const uint8_t* bytes, uint8_t* q) {
    for (int j = 0; j < 16; j++) q[j] = bytes[j] & 15, q[j + 16] = bytes[j] >> 4;
}

static void fifth_bits(const uint8_t* bytes, uint8_t* q) {
    for (int j = 0; j < 32; j++) q[j] |= (bytes[j / 8] >> (j % 8) & 1) << 4;
}

// The sixth bits of Q4_K's and Q5_K's scales and offsets lie with others of theirs.
static void six_bits(const uint8_t* s, int i, Group& x) {
    x.scale[0] = i < 4 ? s[i] & 63 : (s[i + 4] & 15) | (s[i - 4] >> 6) << 4;
    x.offset[0] = i < 4 ? s[i + 4] & 63 : s[i + 4] >> 4 | (s[i] >> 6) << 4;
}

static int64_t row_bytes(int64_t kind, int64_t cols) {
    switch (kind) {
        case Q4_0: return cols / 32 * 18;
        case Q4_1: return cols / 32 * 20;
        case Q5_0: return cols / 32 * 22;
        case Q5_1: return cols / 32 * 24;
        case Q8_0: return cols / 32 * 34;
        case IQ4_NL: return cols / 32 * 18;
        case MXFP4: return cols / 32 * 17;
        case Q2_K: return cols / 256 * 84;
        case Q3_K: return cols / 256 * 110;
        case Q4_K: return cols / 256 * 144;
        case Q5_K: return cols / 256 * 176;
        case Q6_K: return cols / 256 * 210;
        case IQ4_XS: return cols / 256 * 136;
        default: return 0;
    }
}

// Group g of a row; of blocks of 256 the group i of block g / 8, in which 128 columns share their bytes.
static void read_group(int64_t kind, const uint8_t* row, int64_t g, Group& x) {
    const bool block = layout_of(kind).scale == SUPER;
    const uint8_t* p = row + row_bytes(kind, block ? 256 : 32) * (block ? g / 8 : g);
    const int i = g % 8, n = i / 4, k = i % 4;
    switch (kind) {
        case Q4_0:
        case IQ4_NL:
            x.scale[0] = half_at(p);
            nibbles(p + 2, x.q);
            break;
        case Q4_1:
            x.scale[0] = half_at(p), x.offset[0] = half_at(p + 2);
            nibbles(p + 4, x.q);
            break;
        case Q5_0:
            x.scale[0] = half_at(p);
            nibbles(p + 6, x.q);
            fifth_bits(p + 2, x.q);
            break;
        case Q5_1:
            x.scale[0] = half_at(p), x.offset[0] = half_at(p + 2);
            nibbles(p + 8, x.q);
            fifth_bits(p + 4, x.q);
            break;
        case Q8_0:
            x.scale[0] = half_at(p);
            for (int j = 0; j < 32; j++) x.q[j] = p[2 + j] ^ 128;
            break;
        case MXFP4:
            x.scale[0] = p[0];
            nibbles(p + 1, x.q);
            break;
        case Q2_K:
            x.times = half_at(p + 80), x.offset_times = half_at(p + 82);
            for (int h = 0; h < 2; h++) x.scale[h] = p[2 * i + h] & 15, x.offset[h] = p[2 * i + h] >> 4;
            for (int j = 0; j < 32; j++) x.q[j] = p[16 + 32 * n + j] >> 2 * k & 3;
            break;
        case Q3_K:
            x.times = half_at(p + 108);
            for (int h = 0; h < 2; h++) {
                const int s = 2 * i + h;
                const int low = s < 8 ? p[96 + s] & 15 : p[88 + s] >> 4;
                x.scale[h] = (uint8_t)((low | (p[104 + s % 4] >> 2 * (s / 4) & 3) << 4) - 32);
            }
            for (int j = 0; j < 32; j++) x.q[j] = (p[32 + 32 * n + j] >> 2 * k & 3) + (p[j] >> i & 1) * 4 + 28;
            break;
        case Q4_K:
            x.times = half_at(p), x.offset_times = half_at(p + 2);
            six_bits(p + 4, i, x);
            for (int j = 0; j < 32; j++) x.q[j] = p[16 + 32 * (i / 2) + j] >> 4 * (i % 2) & 15;
            break;
        case Q5_K:
            x.times = half_at(p), x.offset_times = half_at(p + 2);
            six_bits(p + 4, i, x);
            for (int j = 0; j < 32; j++)
                x.q[j] = (p[48 + 32 * (i / 2) + j] >> 4 * (i % 2) & 15) | (p[16 + j] >> i & 1) << 4;
            break;
        case Q6_K:
            x.times = half_at(p + 208);
            for (int h = 0; h < 2; h++) x.scale[h] = p[192 + 2 * i + h];
            for (int j = 0; j < 32; j++)
                x.q[j] = (p[64 * n + 32 * (k % 2) + j] >> 4 * (k / 2) & 15) | (p[128 + 32 * n + j] >> 2 * k & 3) << 4;
            break;
        case IQ4_XS:
            x.times = half_at(p);
            x.scale[0] = (uint8_t)(((p[4 + i / 2] >> 4 * (i % 2) & 15) | (half_at(p + 2) >> 2 * i & 3) << 4) - 32);
            nibbles(p + 8 + 16 * i, x.q);
            break;
    }
}

static void put_scale(uint8_t* area, bool half, int64_t row, uint16_t value) {
    if (half)
        memcpy(area + 2 * row, &value, 2);
    else
        area[row] = (uint8_t)value;
}

// A group of one row to its place in a panel.
static void put_group(Layout l, const Group& x, uint8_t* panel, int64_t g, int64_t row) {
    uint8_t* w = panel + group_at(l, g);
    for (int j = 0; j < 32; j++) {
        const int high = j / 16, c = j % 16 / 4;
        const int64_t lane = 4 * row + j % 4;
        if (l.bits == 8) {
            w[64 * (j / 4) + lane] = x.q[j];
            continue;
        }
        w[64 * c + lane] |= (x.q[j] & 15) << 4 * high;
        if (l.bits == 5) w[256 + lane] |= (x.q[j] >> 4) << (4 * high + c);
        if (l.bits == 6) w[256 + 64 * high + lane] |= (x.q[j] >> 4) << 2 * c;
    }
    uint8_t* area = w + 64 * l.bits;
    for (int part = 0; part < l.parts; part++, area += scale_bytes(l))
        put_scale(area, l.scale == HALF, row, x.scale[part]);
    for (int part = 0; part < l.parts && l.offset; part++, area += scale_bytes(l))
        put_scale(area, l.scale == HALF, row, x.offset[part]);
    if (l.scale == SUPER && g % 8 == 0) {
        put_scale(w - block_bytes(l), true, row, x.times);
        if (l.offset) put_scale(w - 32, true, row, x.offset_times);
    }
}

// ---- and back ---------------------------------------------------------------------------------------------------

static inline float half_to_float(uint16_t bits) {
    float out[16];
    uint16_t in[16] = {bits};
    store16(out, load_half16(in));
    return out[0];
}

static inline float power_of_two(uint8_t e) {  // 2^(e - 128), e8m0 of values that are counted twice
    const uint32_t bits = e < 2 ? 0x00200000u << e : (uint32_t)(e - 1) << 23;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

// The 32 values of one row of a group, in fp32: what the file says, rounded once for a scale and once for a value.
static void unpack_group(Layout l, const uint8_t* panel, int64_t g, int64_t row, float* out) {
    const uint8_t *w = panel + group_at(l, g), *area = w + 64 * l.bits;
    const uint8_t* block = panel + group_at(l, g / 8 * 8) - block_bytes(l);
    float scale[2], offset[2] = {0, 0};
    for (int part = 0; part < l.parts; part++) {
        const uint8_t *s = area + part * scale_bytes(l), *o = s + l.parts * scale_bytes(l);
        if (l.scale == HALF) {
            scale[part] = half_to_float(half_at(s + 2 * row));
            if (l.offset) offset[part] = half_to_float(half_at(o + 2 * row));
        } else if (l.scale == SUPER) {
            scale[part] = half_to_float(half_at(block + 2 * row)) * (int8_t)s[row];
            if (l.offset) offset[part] = -(half_to_float(half_at(block + 32 + 2 * row)) * (int8_t)o[row]);
        } else {
            scale[part] = power_of_two(s[row]);
        }
    }
    for (int j = 0; j < 32; j++) {
        const int high = j / 16, c = j % 16 / 4, part = l.parts == 2 ? high : 0;
        const int64_t lane = 4 * row + j % 4;
        int q = l.bits == 8 ? w[64 * (j / 4) + lane] : w[64 * c + lane] >> 4 * high & 15;
        if (l.bits == 5) q |= (w[256 + lane] >> (4 * high + c) & 1) << 4;
        if (l.bits == 6) q |= (w[256 + 64 * high + lane] >> 2 * c & 3) << 4;
        if (l.table) q = l.table[q];
        const float product = scale[part] * (q - l.zero);
        out[j] = l.offset ? product + offset[part] : product;
    }
}
