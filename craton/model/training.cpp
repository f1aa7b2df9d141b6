// The decoder's small operations, fused, for training on CPUs. Plain C interface, loaded by kernels.py.
//
// PyTorch runs each of these as several passes over memory; here each is one pass. Matrix products stay with
// oneDNN (ops_cpu.py), except inside attention, where the operands are too small for a library call.
//
// One source, compiled once per instruction set (-march=x86-64-v3, -v4); the loader picks. The object has no OpenMP
// runtime of its own: it binds to the one that PyTorch has loaded, because two thread pools on the same cores would
// spin against each other. Sums are added in an order fixed by the shapes: results do not depend on the threads.
#include "simd.h"

static inline float dot(const float* a, const float* b, int64_t n) {
    vec s0{}, s1{};
    int64_t i = 0;
    for (; i + 2 * W <= n; i += 2 * W) {
        s0 += load(a + i) * load(b + i);
        s1 += load(a + i + W) * load(b + i + W);
    }
    float s = sum(s0 + s1);
    for (; i < n; i++) s += a[i] * b[i];
    return s;
}

// Sums over rows: CHUNKS runs of rows each have a partial sum, added up in order whatever thread made them.
constexpr int64_t CHUNKS = 32;
struct Partials {
    int64_t n;
    std::vector<float> sums;
    explicit Partials(int64_t n) : n(n), sums(CHUNKS * n, 0.f) {}
    float* of(int64_t chunk) { return sums.data() + chunk * n; }
    void into(float* out) {
        std::memset(out, 0, n * sizeof(float));
        for (int64_t c = 0; c < CHUNKS; c++)
            for (int64_t i = 0; i < n; i++) out[i] += sums[c * n + i];
    }
};

extern "C" {

// s = x + delta (skipped when delta is null); y = s / rms(s) * w. Rows of n.
void add_rms_norm_forward(const float* x, const float* delta, const float* w, float* s, float* y, float* rstd,
                          int64_t rows, int64_t n, float eps) {
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        const float* src = x + r * n;
        if (delta) {
            float* sum_row = s + r * n;
            for (int64_t i = 0; i < n; i++) sum_row[i] = src[i] + delta[r * n + i];
            src = sum_row;
        }
        float k = 1.f / std::sqrt(dot(src, src, n) / n + eps);
        rstd[r] = k;
        for (int64_t i = 0; i < n; i++) y[r * n + i] = src[i] * k * w[i];
    }
}

// dx = dresidual (skipped when null) + d(rms_norm); dw summed over rows.
void rms_norm_backward(const float* dy, const float* s, const float* w, const float* rstd, const float* dresidual,
                       float* dx, float* dw, int64_t rows, int64_t n) {
    Partials partial(n);
#pragma omp parallel for schedule(static)
    for (int64_t chunk = 0; chunk < CHUNKS; chunk++) {
        float* pw = partial.of(chunk);
        for (int64_t r = chunk * rows / CHUNKS; r < (chunk + 1) * rows / CHUNKS; r++) {
            const float *g = dy + r * n, *v = s + r * n;
            float k = rstd[r], c = 0;
            vec acc{};
            int64_t i = 0;
            for (; i + W <= n; i += W) acc += load(g + i) * load(w + i) * load(v + i);
            c = sum(acc);
            for (; i < n; i++) c += g[i] * w[i] * v[i];
            c *= k * k * k / n;
            float* out = dx + r * n;
            if (dresidual) {
                const float* dr = dresidual + r * n;
                for (i = 0; i < n; i++) {
                    pw[i] += g[i] * v[i] * k;
                    out[i] = dr[i] + g[i] * w[i] * k - v[i] * c;
                }
            } else {
                for (i = 0; i < n; i++) {
                    pw[i] += g[i] * v[i] * k;
                    out[i] = g[i] * w[i] * k - v[i] * c;
                }
            }
        }
    }
    partial.into(dw);
}

// One head: y = x / rms(x) * w (null: x), then its halves rotated by position; returns 1 / rms.
static inline float norm_rope(const float* x, const float* w, const float* c, const float* s, float* y, int64_t d,
                              float eps) {
    int64_t half = d / 2;
    if (!w) {
        for (int64_t i = 0; i < half; i++) {
            float p = x[i], q = x[i + half];
            y[i] = p * c[i] - q * s[i];
            y[i + half] = q * c[i] + p * s[i];
        }
        return 1;
    }
    float k = 1.f / std::sqrt(dot(x, x, d) / d + eps);
    for (int64_t i = 0; i < half; i++) {
        float p = x[i] * k * w[i], q = x[i + half] * k * w[i + half];
        y[i] = p * c[i] - q * s[i];
        y[i + half] = q * c[i] + p * s[i];
    }
    return k;
}

static inline void norm_rope_gradient(const float* dy, const float* x, const float* w, const float* c, const float* s,
                                      float k, float* dx, float* dw, int64_t d) {
    int64_t half = d / 2;
    float g[1024];
    float* t = w ? g : dx;
    for (int64_t i = 0; i < half; i++) {
        float p = dy[i], q = dy[i + half];
        t[i] = p * c[i] + q * s[i];
        t[i + half] = q * c[i] - p * s[i];
    }
    if (!w) return;
    vec acc{};
    for (int64_t i = 0; i < d; i += W) acc += load(g + i) * load(w + i) * load(x + i);
    float z = sum(acc) * k * k * k / d;
    for (int64_t i = 0; i < d; i++) {
        dw[i] += g[i] * x[i] * k;
        dx[i] = g[i] * w[i] * k - x[i] * z;
    }
}

// x: (rows, heads + 2 kv_heads, d) holds a row's q, k and v heads. q (rows, heads, d) and k (rows, kv_heads, d) are
// normed with wq, wk (null: not) and rotated, v is copied. cos, sin: (period, d/2), row r uses position r % period.
void split_norm_rope_forward(const float* x, const float* wq, const float* wk, const float* cos, const float* sin,
                             float* q, float* k, float* v, float* rstd, int64_t rows, int64_t heads, int64_t kv_heads,
                             int64_t d, int64_t period, float eps) {
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        const float *c = cos + (r % period) * (d / 2), *s = sin + (r % period) * (d / 2);
        const float* from = x + r * (heads + 2 * kv_heads) * d;
        float* scale = rstd + r * (heads + kv_heads);
        for (int64_t h = 0; h < heads; h++)
            scale[h] = norm_rope(from + h * d, wq, c, s, q + (r * heads + h) * d, d, eps);
        from += heads * d, scale += heads;
        for (int64_t h = 0; h < kv_heads; h++)
            scale[h] = norm_rope(from + h * d, wk, c, s, k + (r * kv_heads + h) * d, d, eps);
        std::memcpy(v + r * kv_heads * d, from + kv_heads * d, kv_heads * d * sizeof(float));
    }
}

void split_norm_rope_backward(const float* dq, const float* dk, const float* dv, const float* x, const float* wq,
                              const float* wk, const float* cos, const float* sin, const float* rstd, float* dx,
                              float* dwq, float* dwk, int64_t rows, int64_t heads, int64_t kv_heads, int64_t d,
                              int64_t period) {
    Partials pq(d), pk(d);
#pragma omp parallel for schedule(static)
    for (int64_t chunk = 0; chunk < CHUNKS; chunk++) {
        for (int64_t r = chunk * rows / CHUNKS; r < (chunk + 1) * rows / CHUNKS; r++) {
            const float *c = cos + (r % period) * (d / 2), *s = sin + (r % period) * (d / 2);
            int64_t at = r * (heads + 2 * kv_heads) * d;
            const float* scale = rstd + r * (heads + kv_heads);
            for (int64_t h = 0; h < heads; h++, at += d)
                norm_rope_gradient(dq + (r * heads + h) * d, x + at, wq, c, s, scale[h], dx + at, pq.of(chunk), d);
            scale += heads;
            for (int64_t h = 0; h < kv_heads; h++, at += d)
                norm_rope_gradient(dk + (r * kv_heads + h) * d, x + at, wk, c, s, scale[h], dx + at, pk.of(chunk), d);
            std::memcpy(dx + at, dv + r * kv_heads * d, kv_heads * d * sizeof(float));
        }
    }
    if (wq) pq.into(dwq);
    if (wk) pk.into(dwk);
}

// x: (rows, 2n), gate then up; y = silu(gate) * up: (rows, n). n a multiple of 16.
void swiglu_forward(const float* x, float* y, int64_t rows, int64_t n) {
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        const float *gate = x + r * 2 * n, *up = gate + n;
        for (int64_t i = 0; i < n; i += W) {
            vec g = load(gate + i);
            store(y + r * n + i, g / (1.f + vexp(-g)) * load(up + i));
        }
    }
}

void swiglu_backward(const float* dy, const float* x, float* dx, int64_t rows, int64_t n) {
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        const float *gate = x + r * 2 * n, *up = gate + n, *in = dy + r * n;
        float *dgate = dx + r * 2 * n, *dup = dgate + n;
        for (int64_t i = 0; i < n; i += W) {
            vec g = load(gate + i), d = load(in + i), sig = 1.f / (1.f + vexp(-g)), silu = g * sig;
            store(dup + i, d * silu);
            store(dgate + i, d * load(up + i) * (sig + silu * (1.f - sig)));
        }
    }
}

// Rows of logits become, in place, the gradient weight[r] * (softmax - onehot(target)); loss[r] is the negative log
// likelihood in nats. Rows with weight 0 get gradient 0; rows with a negative target are left out: loss and gradient 0.
void cross_entropy(float* logits, const int64_t* target, const float* weight, float* loss, int64_t rows, int64_t n) {
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        float *x = logits + r * n, top = -INFINITY, z = 0;
        if (target[r] < 0) {
            std::memset(x, 0, n * sizeof(float));
            loss[r] = 0;
            continue;
        }
        int64_t i = 0;
        vec m = splat(-INFINITY), acc{};
        for (; i + W <= n; i += W) {
            vec v = load(x + i);
            m = v > m ? v : m;
        }
        for (int j = 0; j < W; j++) top = m[j] > top ? m[j] : top;
        for (; i < n; i++) top = x[i] > top ? x[i] : top;
        float at_target = x[target[r]] - top;
        for (i = 0; i + W <= n; i += W) {
            vec e = vexp(load(x + i) - top);
            store(x + i, e);
            acc += e;
        }
        z = sum(acc);
        for (; i < n; i++) z += x[i] = std::exp(x[i] - top);
        loss[r] = std::log(z) - at_target;
        float k = weight[r] / z;
        for (i = 0; i < n; i++) x[i] *= k;
        x[target[r]] -= weight[r];
    }
}

}  // extern "C"

// C[m, n] (+)= sum_k A[m, k] * B[k, n]; A has any strides, B and C have contiguous columns; n a multiple of W.
template <int M, int N>
static inline void tile(const float* a, int64_t am, int64_t ak, const float* b, int64_t ldb, float* c, int64_t ldc,
                        int64_t depth, bool add) {
    vec acc[M][N];
    for (int i = 0; i < M; i++)
        for (int j = 0; j < N; j++) acc[i][j] = add ? load(c + i * ldc + j * W) : vec{};
    for (int64_t k = 0; k < depth; k++) {
        vec col[N];
        for (int j = 0; j < N; j++) col[j] = load(b + k * ldb + j * W);
        for (int i = 0; i < M; i++) {
            vec row = splat(a[i * am + k * ak]);
            for (int j = 0; j < N; j++) acc[i][j] += row * col[j];
        }
    }
    for (int i = 0; i < M; i++)
        for (int j = 0; j < N; j++) store(c + i * ldc + j * W, acc[i][j]);
}

constexpr int TM = W == 16 ? 8 : 4;

template <int N>
static void columns(int64_t m, const float* a, int64_t am, int64_t ak, const float* b, int64_t ldb, float* c,
                    int64_t ldc, int64_t depth, bool add) {
    int64_t i = 0;
    for (; i + TM <= m; i += TM) tile<TM, N>(a + i * am, am, ak, b, ldb, c + i * ldc, ldc, depth, add);
    for (; i < m; i++) tile<1, N>(a + i * am, am, ak, b, ldb, c + i * ldc, ldc, depth, add);
}

static void gemm(int64_t m, int64_t n, int64_t depth, const float* a, int64_t am, int64_t ak, const float* b,
                 int64_t ldb, float* c, int64_t ldc, bool add) {
    int64_t j = 0;
    for (; j + 2 * W <= n; j += 2 * W) columns<2>(m, a, am, ak, b + j, ldb, c + j, ldc, depth, add);
    for (; j < n; j += W) columns<1>(m, a, am, ak, b + j, ldb, c + j, ldc, depth, add);
}

static inline int64_t up_to(int64_t n, int64_t step) {
    return (n + step - 1) / step * step;
}

// (time, d) with row stride -> (d, ld), columns from time to ld zero.
static void transpose(const float* x, int64_t stride, int64_t time, int64_t d, int64_t ld, float* out) {
    for (int64_t t0 = 0; t0 < time; t0 += 16)
        for (int64_t i = 0; i < d; i++)
            for (int64_t t = t0; t < time && t < t0 + 16; t++) out[i * ld + t] = x[t * stride + i];
    for (int64_t i = 0; i < d; i++) std::memset(out + i * ld + time, 0, (ld - time) * sizeof(float));
}

// (time, d) with row stride -> rows one after another.
static void compact(const float* x, int64_t stride, int64_t time, int64_t d, float* out) {
    for (int64_t t = 0; t < time; t++) std::memcpy(out + t * d, x + t * stride, d * sizeof(float));
}

static void spread(const float* x, int64_t stride, int64_t time, int64_t d, float* out) {
    for (int64_t t = 0; t < time; t++) std::memcpy(out + t * stride, x + t * d, d * sizeof(float));
}

constexpr int64_t BQ = 32;  // queries a block

// Rows of scores are this long: whole tiles, and an odd number of cache lines, so that columns do not share sets.
static inline int64_t score_row(int64_t time) {
    return up_to(time, 2 * W) + 16;
}

// The keys that a block of queries may see: from the first query's document start to the last query, in whole tiles.
struct Span {
    int64_t from, to;
    Span(const int32_t* start, int64_t q0, int64_t q1) {
        from = start ? start[q0] / (2 * W) * (2 * W) : 0;
        to = up_to(q1, 2 * W);
    }
    int64_t size() const { return to - from; }
};

extern "C" {

// Causal attention, exact softmax, one document per query: start[b, t] is the first position that t may see (null: 0).
// q, o: (batch, time, heads, d); k, v: (batch, time, kv_heads, d); lse: (batch, heads, time). d a multiple of 16.
void attention_forward(const float* q, const float* k, const float* v, const int32_t* start, float* o, float* lse,
                       int64_t batch, int64_t time, int64_t heads, int64_t kv_heads, int64_t d, float scale) {
    int64_t group = heads / kv_heads, ld = score_row(time), qs = heads * d, ks = kv_heads * d;
#pragma omp parallel
    {
        std::vector<float> kt(d * ld), vc(time * d), score(BQ * ld), qc(BQ * d), oc(BQ * d);
#pragma omp for collapse(2) schedule(dynamic, 1)
        for (int64_t b = 0; b < batch; b++)
            for (int64_t g = 0; g < kv_heads; g++) {
                const int32_t* first = start ? start + b * time : nullptr;
                transpose(k + b * time * ks + g * d, ks, time, d, ld, kt.data());
                compact(v + b * time * ks + g * d, ks, time, d, vc.data());
                for (int64_t h = g * group; h < (g + 1) * group; h++)
                    for (int64_t q0 = 0; q0 < time; q0 += BQ) {
                        int64_t q1 = q0 + BQ < time ? q0 + BQ : time, m = q1 - q0;
                        Span span(first, q0, q1);
                        float* s = score.data();
                        compact(q + (b * time + q0) * qs + h * d, qs, m, d, qc.data());
                        gemm(m, span.size(), d, qc.data(), d, 1, kt.data() + span.from, ld, s, ld, false);
                        float inverse[BQ];
                        for (int64_t i = 0; i < m; i++) {
                            float* row = s + i * ld;
                            int64_t lo = first ? first[q0 + i] - span.from : 0, hi = q0 + i + 1 - span.from;
                            for (int64_t j = 0; j < lo; j++) row[j] = -INFINITY;
                            for (int64_t j = hi; j < span.size(); j++) row[j] = -INFINITY;
                            vec best = splat(-INFINITY), acc{};
                            for (int64_t j = 0; j < span.size(); j += W) {
                                vec x = load(row + j);
                                best = x > best ? x : best;
                            }
                            float top = -INFINITY;
                            for (int j = 0; j < W; j++) top = best[j] > top ? best[j] : top;
                            for (int64_t j = 0; j < span.size(); j += W) {
                                vec x = load(row + j), e = vexp((x - top) * scale);
                                store(row + j, e);
                                acc += e;
                            }
                            float z = sum(acc);
                            lse[(b * heads + h) * time + q0 + i] = top * scale + std::log(z);
                            inverse[i] = 1.f / z;
                        }
                        gemm(m, d, q1 - span.from, s, ld, 1, vc.data() + span.from * d, d, oc.data(), d, false);
                        for (int64_t i = 0; i < m; i++)
                            for (int64_t j = 0; j < d; j++) oc[i * d + j] *= inverse[i];
                        spread(oc.data(), qs, m, d, o + (b * time + q0) * qs + h * d);
                    }
            }
    }
}

void attention_backward(const float* dout, const float* q, const float* k, const float* v, const float* o,
                        const float* lse, const int32_t* start, float* dq, float* dk, float* dv, int64_t batch,
                        int64_t time, int64_t heads, int64_t kv_heads, int64_t d, float scale) {
    int64_t group = heads / kv_heads, ld = score_row(time), qs = heads * d, ks = kv_heads * d;
#pragma omp parallel
    {
        std::vector<float> kt(d * ld), vt(d * ld), kc(time * d), dkc(time * d), dvc(time * d);
        std::vector<float> prob(BQ * ld), grad(BQ * ld), qc(BQ * d), doc(BQ * d), dqc(BQ * d);
#pragma omp for collapse(2) schedule(dynamic, 1)
        for (int64_t b = 0; b < batch; b++)
            for (int64_t g = 0; g < kv_heads; g++) {
                int64_t at = b * time * ks + g * d;
                const int32_t* first = start ? start + b * time : nullptr;
                transpose(k + at, ks, time, d, ld, kt.data());
                transpose(v + at, ks, time, d, ld, vt.data());
                compact(k + at, ks, time, d, kc.data());
                std::memset(dkc.data(), 0, time * d * sizeof(float));
                std::memset(dvc.data(), 0, time * d * sizeof(float));
                for (int64_t h = g * group; h < (g + 1) * group; h++)
                    for (int64_t q0 = 0; q0 < time; q0 += BQ) {
                        int64_t q1 = q0 + BQ < time ? q0 + BQ : time, m = q1 - q0;
                        Span span(first, q0, q1);
                        float *p = prob.data(), *ds = grad.data();
                        int64_t qat = (b * time + q0) * qs + h * d, depth = q1 - span.from;
                        compact(q + qat, qs, m, d, qc.data());
                        compact(dout + qat, qs, m, d, doc.data());
                        gemm(m, span.size(), d, qc.data(), d, 1, kt.data() + span.from, ld, p, ld, false);
                        gemm(m, span.size(), d, doc.data(), d, 1, vt.data() + span.from, ld, ds, ld, false);
                        for (int64_t i = 0; i < m; i++) {
                            float *pr = p + i * ld, *dr = ds + i * ld;
                            int64_t lo = first ? first[q0 + i] - span.from : 0, hi = q0 + i + 1 - span.from;
                            float norm = lse[(b * heads + h) * time + q0 + i];
                            float delta = dot(doc.data() + i * d, o + qat + i * qs, d);
                            for (int64_t j = 0; j < span.size(); j += W) {
                                vec e = vexp(load(pr + j) * scale - norm);
                                store(pr + j, e);
                                store(dr + j, e * (load(dr + j) - delta) * scale);
                            }
                            for (int64_t j = 0; j < lo; j++) pr[j] = dr[j] = 0;
                            for (int64_t j = hi; j < span.size(); j++) pr[j] = dr[j] = 0;
                        }
                        gemm(m, d, depth, ds, ld, 1, kc.data() + span.from * d, d, dqc.data(), d, false);
                        spread(dqc.data(), qs, m, d, dq + qat);
                        gemm(depth, d, m, p, 1, ld, doc.data(), d, dvc.data() + span.from * d, d, true);
                        gemm(depth, d, m, ds, 1, ld, qc.data(), d, dkc.data() + span.from * d, d, true);
                    }
                spread(dkc.data(), ks, time, d, dk + at);
                spread(dvc.data(), ks, time, d, dv + at);
            }
    }
}

}  // extern "C"
