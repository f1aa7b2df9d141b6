// The engine's kernels for CPUs, as a plain C interface that craton/model/native.py calls: a decoder's whole step in
// one call, so that a small model does not wait for Python, and its parts for networks that run module by module.
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "choose.h"
#include "step.h"

extern "C" {

int64_t craton_workspace(const Model* m, int64_t tokens, int64_t threads) {
    return workspace_bytes(*m, tokens, threads);
}

// ids (tokens,) in; logits (outputs, vocabulary) of the tokens in `rows`, and their last hidden states (outputs,
// hidden), either may be null. The cache gets the step's keys and values.
void craton_step(const Model* m, const Step* s, const int32_t* ids, int64_t outputs, const int32_t* rows, float* logits,
                 float* hidden, char* workspace, int64_t threads) {
    Shared shared(*m, *s, workspace, threads);
#pragma omp parallel num_threads(threads)
    Thread(shared).run(ids, outputs, rows, logits, hidden);
}

// out (tokens, rows) = x (tokens, cols) times the matrix transposed.
void craton_linear(const Matrix* m, const float* x, int64_t tokens, float* out, int64_t threads) {
    std::vector<int8_t> q(packed(*m) ? tokens * m->cols : 0);
    std::vector<float> scale(packed(*m) ? tokens * (m->cols / GROUP) : 0);
    std::vector<int32_t> minus(scale.size());
    Work work;
#pragma omp parallel num_threads(threads)
    {
        if (packed(*m)) {
#pragma omp for
            for (int64_t t = 0; t < tokens; t++)
                quantise(x + t * m->cols, t, tokens, m->cols, {q.data(), scale.data(), minus.data()});
        }
        const int64_t n = panels(*m), size = std::max<int64_t>(1, n / (omp_get_num_threads() * 8));
        for (;;) {
            int64_t from = work.next.fetch_add(size);
            if (from >= n) break;
            product(*m, from, std::min(n, from + size), x, {q.data(), scale.data(), minus.data()}, tokens, out,
                    m->rows);
        }
    }
}

// Stores k and v (tokens, kv_heads, size) in the pools and attends: q (tokens, heads, key) -> out (tokens, heads,
// value).
void craton_attention(const Step* s, const Heads* h, const float* q, const float* k, const float* v, float* keys,
                      float* values, float* out, int64_t threads) {
    std::vector<Tile> tiles;
    make_tiles(*s, h->heads / h->kv_heads, tiles);
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> scratch;
        std::vector<const float*> pointers;
#pragma omp for
        for (int64_t t = 0; t < s->tokens; t++)
            write_cache(*h, k + t * h->kv_heads * h->key, v + t * h->kv_heads * h->value, s->slots[t], keys, values);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < (int64_t)tiles.size() * h->kv_heads; i++)
            attend(*s, *h, tiles[i / h->kv_heads], i % h->kv_heads, q, h->heads * h->key, keys, values, out,
                   h->heads * h->value, scratch, pointers);
    }
}

// A token for each row of logits (rows, vocabulary), by its own filter.
void craton_choose(const float* logits, int64_t rows, int64_t vocabulary, const float* temperature,
                   const int64_t* top_k, const double* top_p, const double* min_p, const double* u, int64_t* tokens,
                   int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t r = 0; r < rows; r++) {
        const Filter filter = {temperature[r], top_k[r], top_p[r], min_p[r], u[r]};
        tokens[r] = Row(logits + r * vocabulary, vocabulary, filter).choose();
    }
}

// Asks for large pages under memory that is about to be filled: fewer page tables to walk while it streams.
void craton_advise(char* data, int64_t bytes) {
#if defined(__linux__)
    const uintptr_t size = 2 << 20, from = ((uintptr_t)data + size - 1) / size * size,
                    to = ((uintptr_t)data + bytes) / size * size;
    if (from < to) madvise((void*)from, to - from, MADV_HUGEPAGE);
#endif
}

// Rows as they lie in files (4 bits: two columns a byte, the first low, value + 8; 8 bits: value + 128) and their fp16
// scales (rows, cols / 32) to panels. rows must be a multiple of 16, cols of 32.
void craton_pack(int64_t bits, const uint8_t* values, const uint16_t* scales, int64_t rows, int64_t cols, uint8_t* out,
                 int64_t threads) {
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
                        uint8_t *o = w + 64 * c + 4 * r, a = row[2 * c], b = row[2 * c + 1], e = row[8 + 2 * c],
                                f = row[8 + 2 * c + 1];
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

}  // extern "C"
