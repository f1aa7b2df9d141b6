// A whole step of a decoder, shared by the threads: embedding, layers, the last norm and the head.
//
// A token's result never depends on what else is in the step: every sum runs over its own row in an order fixed by the
// shapes, integer sums are exact, and tiles only choose which rows are computed together.
#pragma once
#include <omp.h>

#include <atomic>

#include "paged_attention.h"
#include "products.h"

struct Layer {
    Matrix q, k, v, o, gate, up, down;
    const float *norm, *mlp_norm;
    const float *q_norm, *k_norm, *after, *mlp_after;  // may be null; the last two: of what is added to the residual
    float *keys, *values;
    int64_t window, rope;  // rope 0: a layer without positions; 1 and 2: which of the model's rotations
};

struct Model {
    int64_t layers, hidden, heads, kv_heads, head_dim, intermediate, gelu;  // gelu 0: SiLU
    float eps, scale, embedding_scale;
    const Layer* layer;
    Matrix embedding, head;
    const float *norm, *cos[2], *sin[2];  // cos, sin: (context, head_dim / 2)
    int64_t rank;                         // the largest of any adapter
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

static void rotate_head(const float* x, const float* norm, int64_t d, float eps, const float* cos, const float* sin,
                        float* out) {
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

constexpr int MATRICES = 7;  // of a layer that an adapter can change

static inline int64_t workspace_bytes(const Model& m, int64_t tokens, int64_t threads) {
    const int64_t q = m.heads * m.head_dim, kv = m.kv_heads * m.head_dim, h = m.hidden;
    const int64_t most = std::max({h, q, m.intermediate});
    const int64_t floats = tokens * (3 * h + (q + 2 * kv) + 2 * q + 3 * m.intermediate + MATRICES * m.rank) +
                           (threads + 1) * tokens * h;
    return floats * 4 + (threads + 1) * tokens * (most + (most / GROUP) * 12) + (threads + 8) * 4096;
}

static inline bool any_halves(const Model& m) {
    bool found = layout_of(m.head.kind).parts == 2;
    for (int64_t l = 0; l < m.layers; l++) {
        const Layer& a = m.layer[l];
        for (const Matrix* w : {&a.q, &a.k, &a.v, &a.o, &a.gate, &a.up, &a.down})
            found = found || layout_of(w->kind).parts == 2;
    }
    return found;
}

// What the threads of a step share: its tokens and where intermediate values lie.
struct Shared {
    const Model& m;
    const Step& s;
    const int64_t T, h, d, qn, kvn, I, width, most;
    const bool alone;   // few tokens: each thread normalises for itself instead of waiting
    const bool halves;  // whether a matrix has scales for 16 columns
    char* at;
    float *x[2], *delta, *qkv, *rotated, *mixed, *act, *low;  // low: (MATRICES, tokens, rank), what adapters made
    std::vector<float*> y;      // normalised rows, a copy a thread where alone
    std::vector<Quantised> yq;  // and in 8 bits
    Quantised mid;
    std::vector<Tile> tiles;
    std::vector<Work> work;  // a layer: four products, two norms, rotation, attention, rounding; four of adapters

    Shared(const Model& model, const Step& step, char* workspace, int64_t threads)
        : m(model),
          s(step),
          T(s.tokens),
          h(m.hidden),
          d(m.head_dim),
          qn(m.heads * d),
          kvn(m.kv_heads * d),
          I(m.intermediate),
          width(qn + 2 * kvn),
          most(std::max({h, qn, I})),
          alone(T <= 2),
          halves(any_halves(model)),
          at(workspace),
          y(threads),
          yq(threads),
          work(m.layers * 13 + 2) {
        for (auto& buffer : x) buffer = floats(T * h);
        delta = floats(T * h);
        qkv = floats(T * width);
        rotated = floats(T * qn);
        mixed = floats(T * qn);
        act = floats(T * I);
        low = floats(MATRICES * T * m.rank);
        for (int64_t i = 0; i < threads; i++) {
            const bool own = alone || i == 0;
            y[i] = own ? floats(T * h) : y[0];
            yq[i] = own ? rounded() : yq[0];
        }
        mid = rounded();
        make_tiles(s, m.heads / m.kv_heads, tiles);
    }

    char* take(int64_t bytes) {
        char* p = at;
        at += (bytes + 127) & ~int64_t(63);
        return p;
    }

    float* floats(int64_t n) { return (float*)take(n * 4); }

    Quantised rounded() {
        Quantised q;
        q.x = (int8_t*)take(T * most);
        q.scale = floats(T * (most / GROUP));
        q.sum = (int32_t*)take(T * (most / GROUP) * 4);
        q.first = halves ? (int32_t*)take(T * (most / GROUP) * 4) : 0;
        return q;
    }
};

// One thread's way through a step.
class Thread {
  public:
    explicit Thread(Shared& shared)
        : c(shared), me(omp_get_thread_num()), team(omp_get_num_threads()), phase(shared.work.data()) {
        few = std::max<int64_t>(1, c.T / (team * 4));
    }

    void run(const int32_t* ids, int64_t outputs, const int32_t* rows, float* logits, float* hidden) {
        embed(ids);
        for (int64_t l = 0; l < c.m.layers; l++) {
            const Layer& layer = c.m.layer[l];
            normalise(l ? c.delta : 0, l ? c.m.layer[l - 1].mlp_after : 0, layer.norm, packed(layer.q));
            attention(layer);
            normalise(c.delta, layer.after, layer.mlp_norm, packed(layer.gate));
            mlp(layer);
        }
        head(outputs, rows, logits, hidden);
    }

  private:
    Shared& c;
    const int me, team;
    Work* phase;
    int now = 0;  // which of the two residual streams is the newest
    int64_t few;  // tokens that a thread takes at a time
    std::vector<float> scratch;
    std::vector<const float*> pointers;

    static inline void barrier() {
#pragma omp barrier
    }

    void mine(int64_t n, int64_t& from, int64_t& to) const {
        from = n * me / team;
        to = n * (me + 1) / team;
    }

    // Pieces of [0, n), `size` at a time, to whichever thread is free.
    template <typename Body>
    void share(int64_t n, int64_t size, Body&& body) {
        for (;;) {
            int64_t from = phase->next.fetch_add(size, std::memory_order_relaxed);
            if (from >= n) break;
            body(from, std::min(n, from + size));
        }
        phase++;
    }

    // Few pieces where reading the weights is the work, more where computing is, so that nobody waits long.
    int64_t chunk(int64_t n) const { return std::max<int64_t>(1, n / (team * (c.T >= 24 ? 8 : 3))); }

    void embed(const int32_t* ids) {
        const Matrix& table = c.m.embedding;
        int64_t from, to;
        mine(c.T, from, to);
        for (int64_t t = from; t < to; t++) {
            float* out = c.x[0] + t * c.h;
            load_row(table, ids[t], out);
            if (c.m.embedding_scale != 1.f)
                for (int64_t i = 0; i < c.h; i++) out[i] *= c.m.embedding_scale;
        }
        barrier();
    }

    // What is added to the residual stream: a row as it is, or normalised where the model does that.
    const float* added(const float* row, const float* after) {
        if (!row || !after) return row;
        scratch.resize(std::max<size_t>(scratch.size(), c.h));
        rms_norm(row, 0, after, c.h, c.m.eps, 0, scratch.data());
        return scratch.data();
    }

    // The residual stream, `add` added where given, normalised into y; rounded too where a packed product follows.
    void normalise(const float* add, const float* after, const float* w, bool round) {
        const int64_t h = c.h;
        auto rows = [&](int64_t from, int64_t to) {
            for (int64_t t = from; t < to; t++) {
                float* sum = add && (!c.alone || me == 0) ? c.x[1 - now] + t * h : 0;
                const float* delta = added(add ? add + t * h : 0, after);
                rms_norm(c.x[now] + t * h, delta, w, h, c.m.eps, sum, c.y[me] + t * h);
                if (round) quantise(c.y[me] + t * h, t, c.T, h, c.yq[me]);
            }
        };
        in_rows(rows);
        if (add) now = 1 - now;
    }

    // body(from, to) over the step's tokens: all of them in each thread where alone, else shared.
    template <typename Body>
    void in_rows(Body&& body) {
        if (c.alone) {
            body(0, c.T);
        } else {
            share(c.T, few, body);
            barrier();
        }
    }

    float* narrowed(int place, int64_t t) { return c.low + (place * c.T + t) * c.m.rank; }

    // What the tokens' adapters of some matrices make of the rows x (tokens, cols), from `place` on.
    void narrow(std::initializer_list<const Matrix*> matrices, int place, const float* x) {
        if (!c.s.adapters) return;
        share(c.T, few, [&](int64_t from, int64_t to) {
            for (int64_t t = from; t < to; t++) {
                int here = place;
                for (const Matrix* m : matrices) {
                    const int32_t k = c.s.adapters[t], ahead = t + 1 < to ? c.s.adapters[t + 1] : -1;
                    const Low* l = k >= 0 && m->low ? m->low + k : 0;
                    if (l && l->a) {
                        const Low& next = ahead >= 0 ? m->low[ahead] : *l;
                        if (l->kind == BF16)
                            narrow_row<uint16_t>(*l, next, m->cols, x + t * m->cols, narrowed(here, t));
                        else
                            narrow_row<float>(*l, next, m->cols, x + t * m->cols, narrowed(here, t));
                    }
                    here++;
                }
            }
        });
        barrier();
    }

    // Adds what adapters give to panels [from, to) of a matrix's rows, for tokens from `first` on. out: as in product.
    void widen(const Matrix& m, int place, int64_t from, int64_t to, int64_t first, int64_t tokens, float* out,
               int64_t stride) {
        if (!c.s.adapters || !m.low) return;
        for (int64_t t = 0; t < tokens; t++) {
            const int32_t k = c.s.adapters[first + t], ahead = t + 4 < tokens ? c.s.adapters[first + t + 4] : -1;
            if (ahead >= 0 && m.low[ahead].a) fetch_panels(m.low[ahead], from, to);
            if (k < 0 || !m.low[k].a) continue;
            const Low& l = m.low[k];
            if (l.kind == BF16)
                widen_row<uint16_t>(l, m.rows, from, to, narrowed(place, first + t), out + t * stride);
            else
                widen_row<float>(l, m.rows, from, to, narrowed(place, first + t), out + t * stride);
        }
    }

    void attention(const Layer& layer) {
        narrow({&layer.q, &layer.k, &layer.v}, 0, c.y[me]);
        const Matrix* parts[3] = {&layer.q, &layer.k, &layer.v};
        const int64_t pq = panels(layer.q), pk = panels(layer.k);
        const int64_t begin[4] = {0, pq, pq + pk, pq + 2 * pk}, column[3] = {0, c.qn, c.qn + c.kvn};
        share(begin[3], chunk(begin[3]), [&](int64_t from, int64_t to) {
            for (int i = 0; i < 3; i++) {
                int64_t a = std::max(from, begin[i]), b = std::min(to, begin[i + 1]);
                if (a < b) {
                    product(*parts[i], a - begin[i], b - begin[i], c.y[me], c.yq[me], c.T, c.qkv + column[i], c.width);
                    widen(*parts[i], i, a - begin[i], b - begin[i], 0, c.T, c.qkv + column[i], c.width);
                }
            }
        });
        barrier();
        const Heads heads = {c.m.heads, c.m.kv_heads, c.d, c.d, layer.window, c.m.scale, 0.f, 0};
        const int64_t pieces = c.m.heads + 1;  // of a token: each query head, and its keys and values together
        share(c.T * pieces, few * pieces / (c.T < 8 ? 2 : 1), [&](int64_t from, int64_t to) {
            for (int64_t i = from; i < to; i++) rotate(layer, heads, i / pieces, i % pieces);
        });
        barrier();
        share((int64_t)c.tiles.size() * c.m.kv_heads, 1, [&](int64_t i, int64_t) {
            attend(c.s, heads, c.tiles[i / c.m.kv_heads], i % c.m.kv_heads, c.rotated, c.qn, layer.keys, layer.values,
                   c.mixed, c.qn, scratch, pointers);
        });
        barrier();
        if (packed(layer.o)) {
            in_rows([&](int64_t from, int64_t to) {
                for (int64_t t = from; t < to; t++) quantise(c.mixed + t * c.qn, t, c.T, c.qn, c.yq[me]);
            });
        }
        narrow({&layer.o}, 3, c.mixed);
        share(panels(layer.o), chunk(panels(layer.o)), [&](int64_t from, int64_t to) {
            product(layer.o, from, to, c.mixed, c.yq[me], c.T, c.delta, c.h);
            widen(layer.o, 3, from, to, 0, c.T, c.delta, c.h);
        });
        barrier();
    }

    // Query head `head` of a token normed and turned; the number after the last query head: keys, and values, to the
    // cache.
    void rotate(const Layer& layer, const Heads& heads, int64_t t, int64_t head) {
        const int64_t pos = c.s.positions[t], d = c.d;
        const float* row = c.qkv + t * c.width;
        const float *cosine = layer.rope ? c.m.cos[layer.rope - 1] + pos * (d / 2) : 0,
                    *sine = layer.rope ? c.m.sin[layer.rope - 1] + pos * (d / 2) : 0;
        if (head < c.m.heads) {
            rotate_head(row + head * d, layer.q_norm, d, c.m.eps, cosine, sine, c.rotated + t * c.qn + head * d);
            return;
        }
        scratch.resize(std::max<size_t>(scratch.size(), c.kvn));
        for (int64_t n = 0; n < c.m.kv_heads; n++)
            rotate_head(row + c.qn + n * d, layer.k_norm, d, c.m.eps, cosine, sine, scratch.data() + n * d);
        write_cache(heads, scratch.data(), row + c.qn + c.kvn, c.s.slots[t], layer.keys, layer.values);
    }

    void mlp(const Layer& layer) {
        narrow({&layer.gate, &layer.up}, 4, c.y[me]);
        // Two panels of gate and of up give a group of 32, which this thread can round at once.
        share((c.I + 31) / 32, chunk((c.I + 31) / 32), [&](int64_t from, int64_t to) {
            for (int64_t b = from; b < to; b++) gate_and_up(layer, b);
        });
        barrier();
        narrow({&layer.down}, 6, c.act);
        share(panels(layer.down), chunk(panels(layer.down)), [&](int64_t from, int64_t to) {
            product(layer.down, from, to, c.act, c.mid, c.T, c.delta, c.h);
            widen(layer.down, 6, from, to, 0, c.T, c.delta, c.h);
        });
        barrier();
    }

    // act(gate) * up for 32 of the inner columns and all tokens.
    void gate_and_up(const Layer& layer, int64_t b) {
        const int64_t part = 64, h = c.h, n = std::min<int64_t>(32, c.I - b * 32), last = b * 2 + (n + 15) / 16;
        float g[64 * 32], u[64 * 32];
        for (int64_t t = 0; t < c.T; t += part) {
            const int64_t tokens = std::min(part, c.T - t), group = t * (h / GROUP);
            Quantised here = {c.yq[me].x + t * h, c.yq[me].scale + group, c.yq[me].sum + group,
                              c.yq[me].first ? c.yq[me].first + group : 0};
            product(layer.gate, b * 2, last, c.y[me] + t * h, here, tokens, g - b * 32, 32);
            product(layer.up, b * 2, last, c.y[me] + t * h, here, tokens, u - b * 32, 32);
            widen(layer.gate, 4, b * 2, last, t, tokens, g - b * 32, 32);
            widen(layer.up, 5, b * 2, last, t, tokens, u - b * 32, 32);
            for (int64_t i = 0; i < tokens; i++) {
                float* o = c.act + (t + i) * c.I + b * 32;
                for (int64_t j = 0; j < n; j += 16) {
                    const f16 a = load16(g + i * 32 + j);
                    // GELU by tanh: a / (1 + exp(-2 v)), v = sqrt(2 / pi) (a + 0.044715 a^3)
                    const f16 v = c.m.gelu ? a * (1.5957691216f + 0.0713548163f * a * a) : a;
                    store16(o + j, a / (1.f + exp16(-v)) * load16(u + i * 32 + j));
                }
                if (packed(layer.down)) quantise_group(o, t + i, c.T, c.I, b, c.mid);
            }
        }
    }

    // The last norm and the head, of the rows that are asked for.
    void head(int64_t outputs, const int32_t* rows, float* logits, float* hidden) {
        const Model& m = c.m;
        int64_t from, to;
        mine(outputs, from, to);
        for (int64_t i = from; i < to; i++) {
            const int64_t t = rows[i], h = c.h;
            float* out = c.x[1 - now] + i * h;
            const float* delta = added(c.delta + t * h, m.layer[m.layers - 1].mlp_after);
            rms_norm(c.x[now] + t * h, delta, m.norm, h, m.eps, 0, out);
            if (hidden) memcpy(hidden + i * h, out, h * 4);
            if (logits && packed(m.head)) quantise(out, i, outputs, h, c.mid);
        }
        barrier();
        if (!logits) return;
        share(panels(m.head), chunk(panels(m.head)),
              [&](int64_t a, int64_t b) { product(m.head, a, b, c.x[1 - now], c.mid, outputs, logits, m.head.rows); });
    }
};
