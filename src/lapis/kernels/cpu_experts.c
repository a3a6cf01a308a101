// Mixture of experts beside its products: which experts a token has, and the sum of what they say.
#include "cpu_vector.h"

#define MOST_EXPERTS 1024

static void route_row(const float *logits, int64_t count, int64_t top, int normalise, int32_t *experts, float *weights) {
    float p[MOST_EXPERTS];
    const float max = row_max(logits, count);
    f32x16 lanes = all(0);
    for (int64_t i = 0; i < count; i += LANES) {
        const f32x16 e = exp_below(load_row(logits, i, count), max);
        lanes = lanes + e;
        store(p + i, e);
    }
    const float sum = sum_lanes(lanes);
    float chosen = 0;
    for (int64_t i = 0; i < count; i++) p[i] = p[i] / sum;
    for (int64_t a = 0; a < top; a++) {
        int64_t best = -1;
        for (int64_t i = 0; i < count; i++) {
            int taken = 0;
            for (int64_t b = 0; b < a; b++) taken |= experts[b] == i;
            if (!taken && (best < 0 || p[i] > p[best])) best = i;
        }
        experts[a] = (int32_t)best;
        weights[a] = p[best];
        chosen = chosen + p[best];
    }
    for (int64_t a = 0; a < top && normalise; a++) weights[a] = weights[a] / chosen;
}

// Softmax of logits[rows][count], the `top` largest, best first, the first of equals first; divided by their sum if asked.
EXPORT void lapis_route_team(const float *logits, int64_t rows, int64_t count, int64_t top, int normalise, int32_t *experts,
                             float *weights) {
#pragma omp for schedule(static) nowait
    for (int64_t row = 0; row < rows; row++)
        route_row(logits + row * count, count, top, normalise, experts + row * top, weights + row * top);
    team_barrier();
}

EXPORT void lapis_route(const float *logits, int64_t rows, int64_t count, int64_t top, int normalise, int32_t *experts,
                        float *weights) {
#pragma omp parallel if (rows > 8)
    {
        const uint64_t mode = flush_subnormals();
        lapis_route_team(logits, rows, count, top, normalise, experts, weights);
        restore_mode(mode);
    }
}

// y[rows][width] = sum over a of weights[rows][top] times z[rows][top][width], in order, + residual, rounded once.
EXPORT void lapis_weighted_sum_team(const float *z, const float *weights, const bf16 *residual, bf16 *y, int64_t rows,
                                    int64_t top, int64_t width) {
#pragma omp for schedule(static) nowait
    for (int64_t row = 0; row < rows; row++)
        for (int64_t i = 0; i < width; i += LANES) {
            f32x16 sum = all(0);
            for (int64_t a = 0; a < top; a++)
                sum = sum + load(z + (row * top + a) * width + i) * weights[row * top + a];
            store_bf16(y + row * width + i, sum + load_bf16(residual + row * width + i));
        }
    team_barrier();
}

EXPORT void lapis_weighted_sum(const float *z, const float *weights, const bf16 *residual, bf16 *y, int64_t rows, int64_t top,
                               int64_t width) {
#pragma omp parallel if (rows > 8)
    {
        const uint64_t mode = flush_subnormals();
        lapis_weighted_sum_team(z, weights, residual, y, rows, top, width);
        restore_mode(mode);
    }
}
