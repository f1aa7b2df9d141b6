// One token from a row of logits: temperature, then top_k, top_p and min_p, then the first id, in the order of the ids,
// at which the cumulative probability exceeds a number in [0, 1). craton/model/plain.py: choose_tokens has the meaning.
//
// No sorting: the smallest value that is kept is found by looking at 11, 11 and 10 bits of it in turn. Equal values are
// kept in the order of their ids.
#pragma once
#include <climits>

#include "vectors.h"

struct Filter {
    float temperature;
    int64_t top_k;  // 0: all
    double top_p, min_p, u;
};

// The least key that is kept, and how many of those equal to it.
struct Cut {
    uint32_t key;
    int64_t ties;
};

// Floats as unsigned numbers of the same order.
static inline uint32_t order_key(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (bits == 0x80000000u) bits = 0;  // -0 is no less than 0
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

class Row {
  public:
    Row(const float* logits, int64_t n, const Filter& f) : x(logits), n(n), f(f) {}

    int64_t choose() {
        const int64_t best = likeliest();
        if (f.temperature == 0) return best;
        exponentiate(x[best]);
        Cut cut = {0, INT64_MAX};
        if (f.top_k > 0 && f.top_k < n) cut = by_count(f.top_k);
        if (f.top_p < 1) cut = by_mass(cut);
        return draw(cut);
    }

  private:
    const float* x;
    int64_t n;
    const Filter& f;
    std::vector<float> e;  // exp((x - most) / temperature)

    // The first of the largest. Parts are looked at in whole vectors, and only the best of them value by value.
    int64_t likeliest() const {
        const int64_t size = 512;
        int64_t part = 0;
        float top = -INFINITY;
        for (int64_t at = 0; at < n; at += size) {
            const float most = largest(at, std::min(n, at + size));
            if (most > top) top = most, part = at;
        }
        if (top == -INFINITY) return 0;
        int64_t best = part;
        while (best < n - 1 && x[best] != top) best++;
        return best;
    }

    float largest(int64_t at, int64_t end) const {
        f16 a = splat16(-INFINITY), b = a;
        for (; at + 32 <= end; at += 32) {
            const f16 v = load16(x + at), w = load16(x + at + 16);
            a = v > a ? v : a;
            b = w > b ? w : b;
        }
        a = b > a ? b : a;
        float most = -INFINITY;
        for (int l = 0; l < 16; l++) most = std::max(most, ((float*)&a)[l]);
        for (; at < end; at++) most = std::max(most, x[at]);
        return most;
    }

    void exponentiate(float most) {
        e.resize(n);
        const float inverse = 1.f / f.temperature;
        int64_t i = 0;
        for (; i + 16 <= n; i += 16) store16(e.data() + i, exp16((load16(x + i) - most) * inverse));
        if (i < n) {
            float part[16];
            for (int l = 0; l < 16; l++) part[l] = i + l < n ? (x[i + l] - most) * inverse : -INFINITY;
            store16(part, exp16(load16(part)));
            memcpy(e.data() + i, part, (n - i) * sizeof(float));
        }
    }

    // The cut that keeps `wanted` values, the largest.
    Cut by_count(int64_t wanted) const {
        uint32_t prefix = 0, mask = 0;
        int64_t above = 0;
        const int shifts[3] = {21, 10, 0}, widths[3] = {11, 11, 10};
        for (int level = 0; level < 3; level++) {
            std::vector<int64_t> counts(1 << widths[level], 0);
            const uint32_t low = (1u << widths[level]) - 1;
            for (int64_t i = 0; i < n; i++) {
                const uint32_t key = order_key(x[i]);
                if ((key & mask) == prefix) counts[key >> shifts[level] & low]++;
            }
            int64_t b = low;
            for (; b > 0 && above + counts[b] < wanted; b--) above += counts[b];
            prefix |= (uint32_t)b << shifts[level];
            mask |= low << shifts[level];
        }
        return {prefix, wanted - above};
    }

    // Of what `before` keeps: the cut after which as much probability is kept as top_p, the value that reaches it
    // included.
    Cut by_mass(Cut before) const {
        double total = 0;
        each_kept(before, [&](int64_t i) { total += e[i]; });
        const double wanted = f.top_p * total;
        uint32_t prefix = 0, mask = 0;
        double above = 0;
        const int shifts[3] = {21, 10, 0}, widths[3] = {11, 11, 10};
        std::vector<double> mass;
        for (int level = 0; level < 3; level++) {
            mass.assign(1 << widths[level], 0.0);
            const uint32_t low = (1u << widths[level]) - 1;
            each_kept(before, [&](int64_t i) {
                const uint32_t key = order_key(x[i]);
                if ((key & mask) == prefix) mass[key >> shifts[level] & low] += e[i];
            });
            int64_t b = low, last = low;
            for (; b >= 0; b--) {
                if (mass[b] > 0) {
                    last = b;
                    if (above + mass[b] >= wanted) break;
                    above += mass[b];
                }
            }
            if (b < 0) {  // rounding: all of it is needed, up to the last that has any
                b = last;
                above -= mass[b];
            }
            prefix |= (uint32_t)b << shifts[level];
            mask |= low << shifts[level];
        }
        double one = 0;
        int64_t ties = 0;
        each_kept(before, [&](int64_t i) {
            if (order_key(x[i]) == prefix) ties++, one = e[i];
        });
        const double needed = one > 0 ? std::ceil((wanted - above) / one) : 1;
        return {prefix, std::max<int64_t>(1, std::min<int64_t>(ties, needed < 1e18 ? (int64_t)needed : ties))};
    }

    template <typename Body>
    void each_kept(Cut cut, Body&& body) const {
        int64_t ties = cut.ties;
        for (int64_t i = 0; i < n; i++) {
            const uint32_t key = order_key(x[i]);
            if (key < cut.key || (key == cut.key && ties-- <= 0)) continue;
            body(i);
        }
    }

    int64_t draw(Cut cut) const {
        const float least = f.min_p > 0 ? (float)f.min_p : 0.f;  // the likeliest has exp(0) = 1
        double total = 0;
        if (cut.key == 0 && least == 0) {  // all of it: no order to look at
            for (int64_t i = 0; i < n; i++) total += e[i];
        } else {
            each_kept(cut, [&](int64_t i) { total += e[i] >= least ? e[i] : 0.f; });
        }
        const double wanted = f.u * total;
        double sum = 0;
        int64_t token = -1, last = 0;
        int64_t ties = cut.ties;
        for (int64_t i = 0; i < n; i++) {
            const uint32_t key = order_key(x[i]);
            if (key < cut.key || (key == cut.key && ties-- <= 0) || e[i] < least || e[i] == 0) continue;
            sum += e[i];
            last = i;
            if (sum > wanted) {
                token = i;
                break;
            }
        }
        return token < 0 ? last : token;
    }
};
