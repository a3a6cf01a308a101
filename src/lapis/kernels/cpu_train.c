// What training needs beside the forward: gradients, the loss, the optimizer step. Not part of the bit contract,
// but the same on any number of threads: every sum over tokens has an order that only the sizes decide.
#include "cpu_vector.h"

#define SUM_ROWS 64    // rows whose contributions to a norm's weight gradient are summed before others
#define NORM_STEP 4096 // elements of a gradient whose squares are summed before others
#define BIAS_COLUMNS 128 // whose sums over the rows are made at a time

INLINE void add_bf16(bf16 *p, f32x16 v) { store_bf16(p, load_bf16(p) + v); }

// ---- rms_norm: dx, and the weight's gradient added to dw. partial: fp32 [ceil(rows/SUM_ROWS)][width].

static void rms_norm_rows(const bf16 *x, const bf16 *w, const bf16 *g, bf16 *dx, float *partial, int64_t rows,
                          int64_t width, float eps) {
    memset(partial, 0, (size_t)width * 4);
    for (int64_t row = 0; row < rows; row++, x += width, g += width, dx += width) {
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
            store(partial + i, load(partial + i) + grad * (v * scale));
        }
    }
}

EXPORT void lapis_rms_norm_backward(const bf16 *x, const bf16 *w, const bf16 *g, bf16 *dx, bf16 *dw, float *partial,
                                    int64_t rows, int64_t width, float eps) {
    const int64_t blocks = (rows + SUM_ROWS - 1) / SUM_ROWS;
#pragma omp parallel
    {
        const uint64_t mode = flush_subnormals();
#pragma omp for schedule(static)
        for (int64_t block = 0; block < blocks; block++) {
            const int64_t first = block * SUM_ROWS, count = rows - first < SUM_ROWS ? rows - first : SUM_ROWS;
            const int64_t at = first * width;
            rms_norm_rows(x + at, w, g + at, dx + at, partial + block * width, count, width, eps);
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < width; i += LANES) {
            f32x16 sum = all(0);
            for (int64_t block = 0; block < blocks; block++) sum += load(partial + block * width + i);
            add_bf16(dw + i, sum);
        }
        restore_mode(mode);
    }
}

// ---- silu(gate) * up

EXPORT void lapis_silu_mul_backward(const bf16 *x, const bf16 *g, bf16 *dx, int64_t rows, int64_t width) {
#pragma omp parallel
    {
        const uint64_t mode = flush_subnormals();
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row++)
            for (int64_t i = 0; i < width; i += LANES) {
                const int64_t at = row * 2 * width + i;
                const f32x16 gate = load_bf16(x + at), up = load_bf16(x + at + width);
                const f32x16 grad = load_bf16(g + row * width + i), sigmoid = 1.0f / (1.0f + exp16(-gate));
                store_bf16(dx + at, grad * up * (sigmoid * (1.0f + gate * (1.0f - sigmoid))));
                store_bf16(dx + at + width, grad * (gate * sigmoid));
            }
        restore_mode(mode);
    }
}

// ---- bias of linear: db[N] += the sum of the rows of g[rows][N], each column one fp32 chain.
EXPORT void lapis_linear_bias_gradient(const bf16 *g, bf16 *db, int64_t rows, int64_t N) {
#pragma omp parallel
    {
        const uint64_t mode = flush_subnormals();
#pragma omp for schedule(static)
        for (int64_t column = 0; column < N; column += BIAS_COLUMNS) {
            const int64_t width = N - column < BIAS_COLUMNS ? N - column : BIAS_COLUMNS;
            float sum[BIAS_COLUMNS] = {0};
            if (width == BIAS_COLUMNS) {
                f32x16 sums[BIAS_COLUMNS / LANES];
                EACH(BIAS_COLUMNS / LANES) sums[i] = all(0);
                for (int64_t row = 0; row < rows; row++)
                    EACH(BIAS_COLUMNS / LANES) sums[i] += load_bf16(g + row * N + column + i * LANES);
                memcpy(sum, sums, sizeof sum);
            } else
                for (int64_t row = 0; row < rows; row++)
                    for (int64_t i = 0; i < width; i++) sum[i] += widen_one(g[row * N + column + i]);
            for (int64_t i = 0; i < width; i++) db[column + i] = round_one(widen_one(db[column + i]) + sum[i]);
        }
        restore_mode(mode);
    }
}

// ---- embedding: rows of g with equal ids are summed in fp32 in the order of tokens, then added to dw.
// order: tokens sorted by id, equal ids in order of tokens.

EXPORT void lapis_embedding_backward(const int64_t *ids, const int64_t *order, const bf16 *g, bf16 *dw, int64_t tokens,
                                     int64_t width) {
#pragma omp parallel
    {
        const uint64_t mode = flush_subnormals();
#pragma omp for schedule(dynamic, 16)
        for (int64_t start = 0; start < tokens; start++) {
            const int64_t id = ids[order[start]];
            if (start > 0 && ids[order[start - 1]] == id) continue;  // inside a group that its first token sums
            for (int64_t i = 0; i < width; i += LANES) {
                f32x16 sum = all(0);
                for (int64_t t = start; t < tokens && ids[order[t]] == id; t++)
                    sum += load_bf16(g + order[t] * width + i);
                add_bf16(dw + id * width + i, sum);
            }
        }
        restore_mode(mode);
    }
}

// ---- cross entropy of rows of logits (which are overwritten): losses with the serving path's bits, and gradients.
// losses[row] = weight * -logprob(target), 0 where the target is -1, NaN where it is beyond the row; grad = weight * (softmax - onehot).

EXPORT void lapis_cross_entropy(float *logits, int64_t rows, int64_t width, const int64_t *targets,
                                const float *weights, bf16 *grad, float *losses) {
#pragma omp parallel
    {
        const uint64_t mode = flush_subnormals();
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row++) {
            float *in = logits + row * width;
            bf16 *out = grad + row * width;
            if (targets[row] < 0 || targets[row] >= width) {
                memset(out, 0, (size_t)width * 2);
                losses[row] = targets[row] < 0 ? 0.0f : NAN;
                continue;
            }
            const int64_t target = targets[row];
            const float max = row_max(in, width), at_target = in[target], weight = weights[row];
            f32x16 sums = all(0);
            for (int64_t i = 0; i < width; i += LANES) {
                const f32x16 e = exp_below(load_row(in, i, width), max);
                sums = sums + e;
                memcpy(in + i, &e, (size_t)(width - i < LANES ? width - i : LANES) * 4);
            }
            const float sum = sum_lanes(sums), factor = weight / sum;
            losses[row] = -(at_target - row_lse(max, sum)) * weight;
            int64_t i = 0;
            for (; i + LANES <= width; i += LANES) store_bf16(out + i, load(in + i) * factor);
            for (; i < width; i++) out[i] = round_one(in[i] * factor);
            out[target] = round_one(in[target] * factor - weight);
        }
        restore_mode(mode);
    }
}

// ---- AdamW (Loshchilov & Hutter 2019) in one pass over flat buffers; zeroes the gradient

struct adamw {  // mirrored in cpu.py
    float lr, beta1, beta2, eps, weight_decay, correction1, correction2, clip;
};

INLINE void adamw_16(const struct adamw *o, bf16 *weight, bf16 *grad, float *master, float *first, float *second) {
    const f32x16 g = load_bf16(grad) * o->clip;
    const f32x16 m = load(first) * o->beta1 + g * (1.0f - o->beta1);
    const f32x16 v = load(second) * o->beta2 + g * g * (1.0f - o->beta2);
    f32x16 root = v / o->correction2;
    for (int i = 0; i < LANES; i++) root[i] = sqrtf(root[i]);
    const f32x16 value = load(master) * (1.0f - o->lr * o->weight_decay) - o->lr * (m / o->correction1) / (root + o->eps);
    store(first, m);
    store(second, v);
    store(master, value);
    store_bf16(weight, value);
    memset(grad, 0, LANES * 2);
}

EXPORT void lapis_adamw(bf16 *weight, bf16 *grad, float *master, float *first, float *second, int64_t n,
                        const struct adamw *o) {
#pragma omp parallel
    {
        const uint64_t mode = flush_subnormals();
#pragma omp for schedule(static)
        for (int64_t i = 0; i < n / LANES; i++) {
            const int64_t at = i * LANES;
            adamw_16(o, weight + at, grad + at, master + at, first + at, second + at);
        }
        restore_mode(mode);
    }
    const int64_t at = n / LANES * LANES, left = n - at;
    if (left == 0) return;
    bf16 w[LANES] = {0}, g[LANES] = {0};
    float p[LANES] = {0}, m[LANES] = {0}, v[LANES] = {0};
    memcpy(g, grad + at, (size_t)left * 2);
    memcpy(p, master + at, (size_t)left * 4);
    memcpy(m, first + at, (size_t)left * 4);
    memcpy(v, second + at, (size_t)left * 4);
    adamw_16(o, w, g, p, m, v);
    memcpy(weight + at, w, (size_t)left * 2);
    memcpy(grad + at, g, (size_t)left * 2);
    memcpy(master + at, p, (size_t)left * 4);
    memcpy(first + at, m, (size_t)left * 4);
    memcpy(second + at, v, (size_t)left * 4);
}

// Squares in fp32, sums of NORM_STEP elements in 16 fp32 lanes, their sums in double in order of the steps.
// partial: double [ceil(n/NORM_STEP)].
EXPORT double lapis_squared_norm(const bf16 *grad, int64_t n, double *partial) {
    const int64_t steps = (n + NORM_STEP - 1) / NORM_STEP;
#pragma omp parallel for schedule(static)
    for (int64_t step = 0; step < steps; step++) {
        const int64_t start = step * NORM_STEP, end = start + NORM_STEP < n ? start + NORM_STEP : n;
        f32x16 sums = all(0);
        int64_t i = start;
        for (; i + LANES <= end; i += LANES) sums += load_bf16(grad + i) * load_bf16(grad + i);
        double sum = sum_lanes(sums);
        for (; i < end; i++) sum += widen_one(grad[i]) * widen_one(grad[i]);
        partial[step] = sum;
    }
    double total = 0;
    for (int64_t step = 0; step < steps; step++) total += partial[step];
    return total;
}
