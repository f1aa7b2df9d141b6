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
    std::vector<int32_t> sum(scale.size()), first(scale.size());
    Work work;
#pragma omp parallel num_threads(threads)
    {
        if (packed(*m)) {
#pragma omp for
            for (int64_t t = 0; t < tokens; t++)
                quantise(x + t * m->cols, t, tokens, m->cols, {q.data(), scale.data(), sum.data(), first.data()});
        }
        const int64_t n = panels(*m), size = std::max<int64_t>(1, n / (omp_get_num_threads() * 8));
        for (;;) {
            int64_t from = work.next.fetch_add(size);
            if (from >= n) break;
            const Quantised rounded = {q.data(), scale.data(), sum.data(), first.data()};
            product(*m, from, std::min(n, from + size), x, rounded, tokens, out, m->rows);
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

// Bytes of a matrix in panels; 0 where its kind or shape does not allow it.
int64_t craton_packed_bytes(int64_t kind, int64_t rows, int64_t cols) {
    const Layout l = layout_of(kind);
    if (!l.bits || rows % ROWS || cols % (l.scale == SUPER ? 8 * GROUP : GROUP)) return 0;
    return rows / ROWS * panel_bytes(l, cols / GROUP);
}

// GGUF's rows of blocks to panels. out: zeros.
void craton_pack(int64_t kind, const uint8_t* blocks, int64_t rows, int64_t cols, uint8_t* out, int64_t threads) {
    const Layout l = layout_of(kind);
    const int64_t groups = cols / GROUP;
#pragma omp parallel for num_threads(threads)
    for (int64_t p = 0; p < rows / ROWS; p++) {
        for (int64_t r = 0; r < ROWS; r++) {
            const uint8_t* row = blocks + (p * ROWS + r) * row_bytes(kind, cols);
            for (int64_t g = 0; g < groups; g++) {
                Group x;
                read_group(kind, row, g, x);
                put_group(l, x, out + p * panel_bytes(l, groups), g, r);
            }
        }
    }
}

// Rows of a matrix, by their numbers, in fp32. out: (n, columns).
void craton_rows(const Matrix* m, const int64_t* numbers, int64_t n, float* out, int64_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < n; i++) load_row(*m, numbers[i], out + i * m->cols);
}

}  // extern "C"
