// Row-wise operations of other families than Llama's: layer norm and gelu (GPT-2), norms of query and key heads
// (Qwen3, OLMoE). The forward is under the contract (contract.md); gradients sum rows in an order that sizes decide.
#include "cpu_vector.h"

#define SUM_ROWS 64  // as in cpu_train.c

// ---- layer norm

struct layer_norm {
    const bf16 *x, *w, *b;
    bf16 *y;
    int64_t rows, width;
    float eps;
};

INLINE void layer_norm_statistics(const bf16 *x, int64_t width, float eps, float *mean, float *scale) {
    f32x16 sums = all(0), squares = all(0);
    for (int64_t i = 0; i < width; i += LANES) sums = sums + load_bf16(x + i);
    *mean = sum_lanes(sums) / (float)width;
    for (int64_t i = 0; i < width; i += LANES) {
        const f32x16 centred = load_bf16(x + i) - *mean;
        squares = squares + centred * centred;
    }
    *scale = 1.0f / sqrtf(sum_lanes(squares) / (float)width + eps);
}

static void layer_norm_team(const struct layer_norm *n) {
#pragma omp for schedule(static) nowait
    for (int64_t row = 0; row < n->rows; row++) {
        const bf16 *in = n->x + row * n->width;
        float mean, scale;
        layer_norm_statistics(in, n->width, n->eps, &mean, &scale);
        for (int64_t i = 0; i < n->width; i += LANES)
            store_bf16(n->y + row * n->width + i,
                       ((load_bf16(in + i) - mean) * scale) * load_bf16(n->w + i) + load_bf16(n->b + i));
    }
    team_barrier();
}

EXPORT void lapis_layer_norm_team(const bf16 *x, const bf16 *w, const bf16 *b, bf16 *y, int64_t rows, int64_t width,
                                  float eps) {
    const struct layer_norm n = {x, w, b, y, rows, width, eps};
    layer_norm_team(&n);
}

EXPORT void lapis_layer_norm(const bf16 *x, const bf16 *w, const bf16 *b, bf16 *y, int64_t rows, int64_t width,
                             float eps) {
    const struct layer_norm n = {x, w, b, y, rows, width, eps};
#pragma omp parallel if (rows > 8)
    {
        const uint64_t mode = flush_subnormals();
        layer_norm_team(&n);
        restore_mode(mode);
    }
}

// dw and db get the sums over rows added. partial: fp32 [ceil(rows/SUM_ROWS)][2][width].
EXPORT void lapis_layer_norm_backward(const bf16 *x, const bf16 *w, const bf16 *g, bf16 *dx, bf16 *dw, bf16 *db,
                                      float *partial, int64_t rows, int64_t width, float eps) {
    const int64_t blocks = (rows + SUM_ROWS - 1) / SUM_ROWS;
#pragma omp parallel
    {
        const uint64_t mode = flush_subnormals();
#pragma omp for schedule(static)
        for (int64_t block = 0; block < blocks; block++) {
            float *sum_w = partial + block * 2 * width, *sum_b = sum_w + width;
            memset(sum_w, 0, (size_t)width * 8);
            for (int64_t row = block * SUM_ROWS; row < rows && row < (block + 1) * SUM_ROWS; row++) {
                const bf16 *in = x + row * width, *grad = g + row * width;
                float mean, scale;
                layer_norm_statistics(in, width, eps, &mean, &scale);
                f32x16 plain = all(0), along = all(0);  // of g·w, and of g·w times the normed x
                for (int64_t i = 0; i < width; i += LANES) {
                    const f32x16 normed = (load_bf16(in + i) - mean) * scale, d = load_bf16(grad + i);
                    plain += d * load_bf16(w + i);
                    along += d * load_bf16(w + i) * normed;
                    store(sum_w + i, load(sum_w + i) + d * normed);
                    store(sum_b + i, load(sum_b + i) + d);
                }
                const float shift = sum_lanes(plain) / (float)width, pull = sum_lanes(along) / (float)width;
                for (int64_t i = 0; i < width; i += LANES) {
                    const f32x16 normed = (load_bf16(in + i) - mean) * scale;
                    const f32x16 d = load_bf16(grad + i) * load_bf16(w + i);
                    store_bf16(dx + row * width + i, (d - shift - normed * pull) * scale);
                }
            }
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < width; i += LANES) {
            f32x16 sum_w = all(0), sum_b = all(0);
            for (int64_t block = 0; block < blocks; block++) {
                sum_w += load(partial + block * 2 * width + i);
                sum_b += load(partial + block * 2 * width + width + i);
            }
            store_bf16(dw + i, load_bf16(dw + i) + sum_w);
            store_bf16(db + i, load_bf16(db + i) + sum_b);
        }
        restore_mode(mode);
    }
}

// ---- gelu

struct gelu {
    const bf16 *x;
    bf16 *y;
    int64_t rows, width;
};

static void gelu_team(const struct gelu *n) {
#pragma omp for schedule(static) nowait
    for (int64_t row = 0; row < n->rows; row++)
        for (int64_t i = row * n->width; i < (row + 1) * n->width; i += LANES) {
            const f32x16 x = load_bf16(n->x + i);
            store_bf16(n->y + i, x / gelu_gate(x));
        }
    team_barrier();
}

EXPORT void lapis_gelu_team(const bf16 *x, bf16 *y, int64_t rows, int64_t width) {
    const struct gelu n = {x, y, rows, width};
    gelu_team(&n);
}

EXPORT void lapis_gelu(const bf16 *x, bf16 *y, int64_t rows, int64_t width) {
    const struct gelu n = {x, y, rows, width};
#pragma omp parallel if (rows > 4)
    {
        const uint64_t mode = flush_subnormals();
        gelu_team(&n);
        restore_mode(mode);
    }
}

EXPORT void lapis_gelu_backward(const bf16 *x, const bf16 *g, bf16 *dx, int64_t rows, int64_t width) {
#pragma omp parallel
    {
        const uint64_t mode = flush_subnormals();
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row++)
            for (int64_t i = row * width; i < (row + 1) * width; i += LANES) {
                const f32x16 v = load_bf16(x + i), gate = 1.0f / gelu_gate(v);
                const f32x16 slope = gate + v * (gate * (1.0f - gate)) * (GELU_1 + 3.0f * GELU_3 * (v * v));
                store_bf16(dx + i, load_bf16(g + i) * slope);
            }
        restore_mode(mode);
    }
}

// ---- head norm: RMS norm of parts of a joined row. A row is q_parts x q_width, k_parts x k_width, and a rest that stays.

struct head_norm {
    const bf16 *x, *q_norm, *k_norm;
    bf16 *y;
    int64_t rows, q_parts, q_width, k_parts, k_width, rest;
    float eps;
};

static void head_norm_team(const struct head_norm *n) {
    const int64_t query = n->q_parts * n->q_width, key = n->k_parts * n->k_width, width = query + key + n->rest;
#pragma omp for schedule(static) nowait
    for (int64_t row = 0; row < n->rows; row++) {
        const bf16 *in = n->x + row * width;
        bf16 *out = n->y + row * width;
        for (int64_t i = 0; i < query; i += n->q_width) rms_norm_row(in + i, n->q_norm, out + i, n->q_width, n->eps);
        for (int64_t i = query; i < query + key; i += n->k_width)
            rms_norm_row(in + i, n->k_norm, out + i, n->k_width, n->eps);
        memcpy(out + query + key, in + query + key, (size_t)n->rest * 2);
    }
    team_barrier();
}

EXPORT void lapis_head_norm_team(const bf16 *x, const bf16 *q_norm, const bf16 *k_norm, bf16 *y, int64_t rows,
                                 int64_t q_parts, int64_t q_width, int64_t k_parts, int64_t k_width, int64_t rest,
                                 float eps) {
    const struct head_norm n = {x, q_norm, k_norm, y, rows, q_parts, q_width, k_parts, k_width, rest, eps};
    head_norm_team(&n);
}

EXPORT void lapis_head_norm(const bf16 *x, const bf16 *q_norm, const bf16 *k_norm, bf16 *y, int64_t rows,
                            int64_t q_parts, int64_t q_width, int64_t k_parts, int64_t k_width, int64_t rest,
                            float eps) {
    const struct head_norm n = {x, q_norm, k_norm, y, rows, q_parts, q_width, k_parts, k_width, rest, eps};
#pragma omp parallel if (rows > 4)
    {
        const uint64_t mode = flush_subnormals();
        head_norm_team(&n);
        restore_mode(mode);
    }
}

// Gradient of one part; the weight's is added to sum_w.
static void rms_norm_part_backward(const bf16 *x, const bf16 *w, const bf16 *g, bf16 *dx, float *sum_w, int64_t width,
                                   float eps) {
    f32x16 squares = all(0), products = all(0);
    for (int64_t i = 0; i < width; i += LANES) {
        const f32x16 v = load_bf16(x + i);
        squares += v * v;
        products += v * (load_bf16(g + i) * load_bf16(w + i));
    }
    const float scale = 1.0f / sqrtf(sum_lanes(squares) / (float)width + eps);
    const float pull = sum_lanes(products) / (float)width * scale * scale * scale;
    for (int64_t i = 0; i < width; i += LANES) {
        const f32x16 v = load_bf16(x + i), grad = load_bf16(g + i);
        store_bf16(dx + i, grad * load_bf16(w + i) * scale - v * pull);
        store(sum_w + i, load(sum_w + i) + grad * (v * scale));
    }
}

// dq and dk (of the weights) get the sums over rows and parts added. partial: fp32 [ceil(rows/SUM_ROWS)][q_width + k_width].
EXPORT void lapis_head_norm_backward(const bf16 *x, const bf16 *q_norm, const bf16 *k_norm, const bf16 *g, bf16 *dx,
                                     bf16 *dq, bf16 *dk, float *partial, int64_t rows, int64_t q_parts,
                                     int64_t q_width, int64_t k_parts, int64_t k_width, int64_t rest, float eps) {
    const int64_t blocks = (rows + SUM_ROWS - 1) / SUM_ROWS, both = q_width + k_width;
    const int64_t query = q_parts * q_width, key = k_parts * k_width, width = query + key + rest;
#pragma omp parallel
    {
        const uint64_t mode = flush_subnormals();
#pragma omp for schedule(static)
        for (int64_t block = 0; block < blocks; block++) {
            float *sums = partial + block * both;
            memset(sums, 0, (size_t)both * 4);
            for (int64_t row = block * SUM_ROWS; row < rows && row < (block + 1) * SUM_ROWS; row++) {
                const int64_t at = row * width, end = at + query + key;
                for (int64_t i = at; i < at + query; i += q_width)
                    rms_norm_part_backward(x + i, q_norm, g + i, dx + i, sums, q_width, eps);
                for (int64_t i = at + query; i < end; i += k_width)
                    rms_norm_part_backward(x + i, k_norm, g + i, dx + i, sums + q_width, k_width, eps);
                memcpy(dx + end, g + end, (size_t)rest * 2);
            }
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < both; i += LANES) {
            f32x16 sum = all(0);
            for (int64_t block = 0; block < blocks; block++) sum += load(partial + block * both + i);
            bf16 *out = i < q_width ? dq + i : dk + i - q_width;
            store_bf16(out, load_bf16(out) + sum);
        }
        restore_mode(mode);
    }
}
