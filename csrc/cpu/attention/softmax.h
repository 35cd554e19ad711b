// Exponential, soft cap and the online softmax of one row.
#pragma once

#include <math.h>
#include <stdint.h>

#include "common/simd.h"

namespace xquant {
namespace {

// exp of x <= 0 with a relative error of about 1e-7; exactly 1 at 0, exactly 0 below -87.3, NaN of NaN.
inline vf exp_nonpositive(vf x) {
    const vf shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the sum is rounded to an integer
    const vf n = shifted - 12582912.0f;
    const vf r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts, the first exact in a product
    vf p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    const vf power = (vf)(((vi)shifted + 127) << 23);
    return select(x < -87.3f, vf{}, p * power);
}

inline float exp_nonpositive(float x) { return exp_nonpositive(broadcast(x))[0]; }

// cap * tanh(x / cap), through exp of a nonpositive number.
inline vf soft_cap(vf x, float cap) {
    const vf t = x / cap;
    const vf e = exp_nonpositive(select(t > 0.0f, -t, t) * 2.0f);
    const vf magnitude = (1.0f - e) / (1.0f + e) * cap;
    return select(t > 0.0f, magnitude, -magnitude);
}

// Scores [first, last) of a row's `columns` become weights exp(score - max), the others 0, with
// 0 <= first <= last <= columns. Updates the row's maximum and sum; returns the factor by which what was accumulated
// under the old maximum must shrink.
inline float softmax_row(float* scores, int64_t columns, int64_t first, int64_t last, float cap, float& max,
                         float& sum) {
    if (first == last) {
        for (int64_t j = 0; j < columns; j += kLanes) store(scores + j, vf{});
        return 1.0f;
    }
    if (cap > 0.0f) {
        for (int64_t j = 0; j < columns; j += kLanes) store(scores + j, soft_cap(load(scores + j), cap));
    }
    for (int64_t j = 0; j < first; ++j) scores[j] = -INFINITY;
    for (int64_t j = last; j < columns; ++j) scores[j] = -INFINITY;
    vf top = broadcast(max);
    for (int64_t j = 0; j < columns; j += kLanes) top = maximum(load(scores + j), top);
    const float new_max = reduce_max(top);
    if (new_max == -INFINITY) {  // every visible score is NaN or -inf, of which no weights can be made
        for (int64_t j = 0; j < columns; j += kLanes) store(scores + j, vf{});
        sum = NAN;
        return 1.0f;
    }
    vf total = {};
    for (int64_t j = 0; j < columns; j += kLanes) {
        const vf weight = exp_nonpositive(load(scores + j) - new_max);
        store(scores + j, weight);
        total += weight;
    }
    const float factor = max == new_max ? 1.0f : exp_nonpositive(max - new_max);
    max = new_max;
    sum = sum * factor + reduce_add(total);
    return factor;
}

}  // namespace
}  // namespace xquant
