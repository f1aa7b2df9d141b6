// Attention over keys and values that lie in blocks of 16 tokens (craton/model/cache.py).
#pragma once
#include "vectors.h"

struct Step {  // craton/model/cache.py: TokenBatch
    int64_t tokens, sequences, most_blocks;
    const int32_t *positions, *slots, *starts, *lengths, *tables;
    const int32_t* adapters;  // of each token its adapter's number, -1 for none; or null
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
static inline void score_blocks(const float* const* q, const float* const* kb, int64_t size, float scale, float* scores,
                                int64_t stride) {
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
static inline void mix_part(const float* const* vb, const float* p, int64_t stride, int64_t from, int64_t to,
                            int64_t first_block, int64_t value, int64_t d, float* const* out, const float* inverse) {
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
static inline void mix_values(const float* const* vb, const float* p, int64_t stride, int64_t from, int64_t to,
                              int64_t first_block, int64_t value, float* const* out, const float* inverse) {
    constexpr int D = Q <= 4 ? 4 : 2;  // enough sums at once to hide an addition's latency
    int64_t d = 0;
    for (; d + D * 16 <= value; d += D * 16)
        mix_part<Q, D>(vb, p, stride, from, to, first_block, value, d, out, inverse);
    for (; d < value; d += 16) mix_part<Q, 1>(vb, p, stride, from, to, first_block, value, d, out, inverse);
}

// One tile of queries of one kv head. q, out: rows of all heads of a token, strides between tokens.
static void attend(const Step& s, const Heads& h, const Tile& tile, int64_t kv, const float* q, int64_t q_stride,
                   const float* keys, const float* values, float* out, int64_t out_stride, std::vector<float>& scratch,
                   std::vector<const float*>& pointers) {
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
    if (n == 1)
        for (; b + 8 <= blocks; b += 8) score_blocks<1, 8>(queries, kb + b, h.key, h.scale, p + b * BLOCK, stride);
    else if (n == 2)
        for (; b + 4 <= blocks; b += 4) score_blocks<2, 4>(queries, kb + b, h.key, h.scale, p + b * BLOCK, stride);
    else if (n <= 4)
        for (; b + 2 <= blocks; b += 2) score_blocks<4, 2>(queries, kb + b, h.key, h.scale, p + b * BLOCK, stride);
    for (; b < blocks; b++) {
        if (n == 1)
            score_blocks<1, 1>(queries, kb + b, h.key, h.scale, p + b * BLOCK, stride);
        else if (n <= 4)
            score_blocks<4, 1>(queries, kb + b, h.key, h.scale, p + b * BLOCK, stride);
        else
            score_blocks<8, 1>(queries, kb + b, h.key, h.scale, p + b * BLOCK, stride);
    }
    float inverse[8];
    const int64_t base = first * BLOCK;
    for (int i = 0; i < n; i++) {
        float* row = p + i * stride;
        if (h.softcap > 0)
            for (int64_t j = low[i] - base; j < high[i] - base; j++) row[j] = std::tanh(row[j] / h.softcap) * h.softcap;
        for (int64_t j = 0; j < low[i] - base; j++) row[j] = -INFINITY;
        for (int64_t j = high[i] - base; j < stride; j++) row[j] = -INFINITY;
        f16 most = splat16(-INFINITY);
        for (int64_t j = 0; j < stride; j += 16) {
            f16 v = load16(row + j);
            most = v > most ? v : most;
        }
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
    if (n == 8)
        mix_values<8>(vb, p, stride, from, to, first, h.value, outs, inverse);
    else {
        int i = 0;
        for (; i + 4 <= n; i += 4)
            mix_values<4>(vb, p + i * stride, stride, from, to, first, h.value, outs + i, inverse + i);
        for (; i + 2 <= n; i += 2)
            mix_values<2>(vb, p + i * stride, stride, from, to, first, h.value, outs + i, inverse + i);
        for (; i < n; i++) mix_values<1>(vb, p + i * stride, stride, from, to, first, h.value, outs + i, inverse + i);
    }
}
