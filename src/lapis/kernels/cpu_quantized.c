// Products with quantised weights under the numerical contract (contract.md). Inputs become int8 row by row, sums of
// products inside a group are integers, so they are exact; fp32 enters once per group, in the order of K.
#include "cpu_product.h"

#define GROUP 64          // inputs with one scale; inner widths are padded to it
#define HALF (GROUP / 2)  // 4-bit weights with one scale and minimum
#define LOCAL_BYTES 16384  // inputs up to this size are quantised by every thread for itself: no barrier
#define TINY 1e-30f       // a group of inputs below it counts as zero
#define FETCH_ROWS 5     // fewer rows leave nothing to do while weights come
#if defined(__AVX512F__)
#define TILE_ROWS 12
#else
#define TILE_ROWS 2
#endif

typedef int32_t wide_int __attribute__((vector_size(4 * WIDE)));
typedef int16_t wide_short __attribute__((vector_size(4 * WIDE)));
typedef int8_t i8x16 __attribute__((vector_size(16)));

struct quantized {
    int64_t rows, groups;    // groups of K
    const uint8_t *weights;  // 8 bits: w + 128 as [tile][K/4][32][4]; 4 bits: [tile][K/4][16][4], column + 16 in the high half
    const bf16 *scales;      // [tile][K/64 or K/32][32]
    const bf16 *minimums;    // 4 bits only: [tile][K/64][32][2]
    int8_t *inputs;          // panel by panel: [K/4][rows of the panel][4]
    float *input_scales;     // panel by panel: [groups][rows of the panel]
    int32_t *extras;         // likewise: -128 times the sum of a group; 4 bits: its two half sums, scaled, a pair of bf16
    struct output out;
};

// The rows that a register tile takes, with their inputs side by side.
struct panel { int64_t first, rows; };

INLINE int64_t panel_count(int64_t rows) { return (rows + TILE_ROWS - 1) / TILE_ROWS; }

// Full panels, and the last rows in two nearly equal ones.
INLINE struct panel panel_at(int64_t rows, int64_t index) {
    const int64_t full = rows / TILE_ROWS - (rows % TILE_ROWS && rows > TILE_ROWS), start = full * TILE_ROWS;
    if (index < full) return (struct panel){index * TILE_ROWS, TILE_ROWS};
    const int64_t half = rows - start > TILE_ROWS ? (rows - start + 1) / 2 : rows - start;
    return index == full ? (struct panel){start, half} : (struct panel){start + half, rows - start - half};
}

// ---- the primitive: four products of an unsigned and a signed byte per lane, added to an int32

#if defined(__AVX512VNNI__)
typedef wide_pairs weight_quads, input_quads;
INLINE weight_quads split_weights(wide_pairs w) { return w; }
INLINE input_quads split_input(uint32_t x) { return x - (wide_pairs){0}; }
INLINE wide_int dot4(wide_int sum, weight_quads w, input_quads x) {
    return (wide_int)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, (__m512i)x);
}
#elif defined(__x86_64__)
typedef struct { wide_short even, odd; } weight_quads, input_quads;  // bytes 0, 2 and bytes 1, 3 as 16-bit numbers
INLINE weight_quads split_weights(wide_pairs w) {
    return (weight_quads){(wide_short)(w & 0x00ff00ffu), (wide_short)((w >> 8) & 0x00ff00ffu)};
}
INLINE input_quads split_input(uint32_t x) {
    const wide_short bytes = (wide_short)(x - (wide_pairs){0});
    return (input_quads){(bytes << 8) >> 8, bytes >> 8};
}
INLINE wide_int multiply_pairs(wide_short a, wide_short b) {
#if WIDE == 16
    return (wide_int)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif WIDE == 8
    return (wide_int)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
    return (wide_int)_mm_madd_epi16((__m128i)a, (__m128i)b);
#endif
}
INLINE wide_int dot4(wide_int sum, weight_quads w, input_quads x) {
    return sum + multiply_pairs(w.even, x.even) + multiply_pairs(w.odd, x.odd);
}
#else
typedef wide_pairs weight_quads;
typedef uint32_t input_quads;
INLINE weight_quads split_weights(wide_pairs w) { return w; }
INLINE input_quads split_input(uint32_t x) { return x; }
INLINE wide_int dot4(wide_int sum, weight_quads w, input_quads x) {
    for (int i = 0; i < 4; i++) sum += (wide_int)((w >> (8 * i)) & 0xffu) * (int32_t)(int8_t)(x >> (8 * i));
    return sum;
}
#endif

// ---- inputs

INLINE int32_t sum_ints(i32x16 v) {
    v = v + CROSS(v, 8);
    v = v + CROSS(v, 4);
    v = v + CROSS(v, 2);
    v = v + CROSS(v, 1);
    return v[0];
}
INLINE i32x16 larger_ints(i32x16 a, i32x16 b) {
#if defined(__AVX512F__)
    return (i32x16)_mm512_max_epi32((__m512i)a, (__m512i)b);
#else
    return (a & (a > b)) | (b & ~(a > b));
#endif
}
// The largest |x|; a NaN is larger than any number.
INLINE float most_of(const f32x16 v[GROUP / LANES]) {
    i32x16 most = (i32x16){0};
    for (int i = 0; i < GROUP / LANES; i++) most = larger_ints(most, (i32x16)v[i] & 0x7fffffff);
    most = larger_ints(most, CROSS(most, 8));
    most = larger_ints(most, CROSS(most, 4));
    most = larger_ints(most, CROSS(most, 2));
    most = larger_ints(most, CROSS(most, 1));
    return ((f32x16)most)[0];
}

// One row of K inputs into its place in a panel.
static void quantize_row(const struct quantized *op, const bf16 *x, int64_t K, struct panel panel, int64_t row) {
    int8_t *out = op->inputs + panel.first * op->groups * GROUP + 4 * row;
    for (int64_t g = 0; g < op->groups; g++) {
        bf16 part[GROUP] = {0};
        const int64_t at = panel.first * op->groups + g * panel.rows + row, left = K - g * GROUP;
        const bf16 *in = x + g * GROUP;
        if (left < GROUP) in = memcpy(part, in, (size_t)left * 2);
        f32x16 v[GROUP / LANES];
        i32x16 total[2] = {{0}, {0}};
        for (int i = 0; i < GROUP / LANES; i++) v[i] = load_bf16(in + i * LANES);
        const float most = most_of(v), inverse = most > TINY ? 127.0f / most : 0;
        const float scale = most <= TINY ? 0 : most / 127.0f;
        for (int i = 0; i < GROUP / LANES; i++) {
            const i32x16 q = (i32x16)(v[i] * inverse + 12582912.0f) - 0x4b400000;  // to nearest even
            const i8x16 bytes = __builtin_convertvector(q, i8x16);
            for (int j = 0; j < 4; j++, out += 4 * panel.rows) memcpy(out, (const int8_t *)&bytes + 4 * j, 4);
            total[i / 2] += q;
        }
        op->input_scales[at] = scale;
        if (op->minimums) {
            const float even = (float)sum_ints(total[0]) * scale, odd = (float)sum_ints(total[1]) * scale;
            op->extras[at] = (int32_t)(round_one(even) | (uint32_t)round_one(odd) << 16);
        } else op->extras[at] = -128 * sum_ints(total[0] + total[1]);
    }
}

// ---- tiles

INLINE void load_scales(const bf16 *scales, wide *out) {
    const f32x16 both[2] = {load_bf16(scales), load_bf16(scales + LANES)};
    memcpy(out, both, sizeof both);
}

// Integer sums of `rows` rows times 32 columns over `quads` steps of four.
INLINE void integer_sums(const int rows, const int four, const int quads, const uint8_t *w, const int8_t *x, struct fetch fetch,
                         wide_int sum[TILE_ROWS][TILE_VECTORS]) {
    for (int q = 0; q < quads; q++, x += 4 * rows, w += (four ? LANES : COLUMNS) * 4) {
        weight_quads weight[TILE_VECTORS];
        if (rows >= FETCH_ROWS) fetch_step(fetch, q);
#pragma GCC unroll 8
        for (int v = 0; v < TILE_VECTORS / (four ? 2 : 1); v++) {
            const wide_pairs bytes = load_wide_pairs(w + v * WIDE * 4);
            if (four) {
                weight[v] = split_weights(bytes & 0x0f0f0f0fu);
                weight[v + TILE_VECTORS / 2] = split_weights((bytes >> 4) & 0x0f0f0f0fu);
            } else weight[v] = split_weights(bytes);
        }
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++) {
            uint32_t four_bytes;
            memcpy(&four_bytes, x + 4 * r, 4);
            const input_quads input = split_input(four_bytes);
#pragma GCC unroll 8
            for (int v = 0; v < TILE_VECTORS; v++) sum[r][v] = dot4(sum[r][v], weight[v], input);
        }
    }
}

// 4 bits: the minimums' part of each output, one chain of dp over the pairs of half groups.
INLINE void minimum_chains(const int rows, const struct quantized *op, const int32_t *extras, int64_t tile,
                           wide sum[TILE_ROWS][TILE_VECTORS]) {
    const bf16 *minimums = op->minimums + tile * op->groups * COLUMNS * 2;
    for (int64_t g = 0; g < op->groups; g++, extras += rows)
#pragma GCC unroll 8
        for (int v = 0; v < TILE_VECTORS; v++) {
            const wide_pairs pairs = load_wide_pairs(minimums + (g * COLUMNS + v * WIDE) * 2);
#pragma GCC unroll 12
            for (int r = 0; r < rows; r++) sum[r][v] = dp(sum[r][v], (uint32_t)extras[r], pairs);
        }
}

INLINE void quantized_tile(const int rows, const int four, const struct quantized *op, int64_t row, int64_t tile, struct fetch fetch) {
    const int64_t groups = op->groups, tile_bytes = groups * GROUP * (four ? LANES : COLUMNS);
    const int8_t *x = op->inputs + row * groups * GROUP;
    const float *input_scales = op->input_scales + row * groups;
    const int32_t *extras = op->extras + row * groups;
    const uint8_t *w = op->weights + tile * tile_bytes;
    const bf16 *scales = op->scales + tile * groups * COLUMNS * (four ? 2 : 1);
    wide sum[TILE_ROWS][TILE_VECTORS];
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < TILE_VECTORS; v++) sum[r][v] = (wide){0};
    claim_output(rows, &op->out, row, tile);
    if (four) minimum_chains(rows, op, extras, tile, sum);
    for (int64_t g = 0; g < groups; g++, input_scales += rows, extras += rows) {
        wide part[TILE_ROWS][TILE_VECTORS], scale[TILE_VECTORS];
        for (int half = 0; half <= four; half++) {
            const int quads = four ? HALF / 4 : GROUP / 4;
            wide_int dots[TILE_ROWS][TILE_VECTORS];
#pragma GCC unroll 12
            for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
                for (int v = 0; v < TILE_VECTORS; v++) dots[r][v] = (four ? 0 : extras[r]) - (wide_int){0};
            integer_sums(rows, four, quads, w, x, fetch, dots);
            fetch.from += fetch.step * quads;
            x += 4 * quads * rows;
            w += 4 * quads * (four ? LANES : COLUMNS);
            load_scales(scales, scale);
            scales += COLUMNS;
#pragma GCC unroll 12
            for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
                for (int v = 0; v < TILE_VECTORS; v++) {  // 4 bits: 16 bits times 8, an exact product
                    const wide dot = __builtin_convertvector(dots[r][v], wide);
                    part[r][v] = half ? fused(part[r][v], dot, scale[v]) : dot * scale[v];
                }
        }
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
            for (int v = 0; v < TILE_VECTORS; v++) sum[r][v] = sum[r][v] + part[r][v] * input_scales[r];
    }
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < COLUMNS; c += LANES)
            finish(&op->out, row + r, tile * COLUMNS + c, join(sum[r] + c / WIDE));
}

#define DEFINE_TILE(rows)                                                                                         \
    static __attribute__((noinline)) void tile8_##rows(const struct quantized *op, int64_t row, int64_t tile, struct fetch fetch) {    \
        quantized_tile(rows, 0, op, row, tile, fetch);                                                                    \
    }                                                                                                              \
    static __attribute__((noinline)) void tile4_##rows(const struct quantized *op, int64_t row, int64_t tile, struct fetch fetch) {    \
        quantized_tile(rows, 1, op, row, tile, fetch);                                                                    \
    }
DEFINE_TILE(1)
DEFINE_TILE(2)
#if TILE_ROWS == 12
DEFINE_TILE(3)
DEFINE_TILE(4)
DEFINE_TILE(5)
DEFINE_TILE(6)
DEFINE_TILE(7)
DEFINE_TILE(8)
DEFINE_TILE(9)
DEFINE_TILE(10)
DEFINE_TILE(11)
DEFINE_TILE(12)
#define TILES(n) {NULL, n##1, n##2, n##3, n##4, n##5, n##6, n##7, n##8, n##9, n##10, n##11, n##12}
#else
#define TILES(n) {NULL, n##1, n##2}
#endif
typedef void (*tile_function)(const struct quantized *, int64_t, int64_t, struct fetch);
static const tile_function tiles[2][TILE_ROWS + 1] = {TILES(tile8_), TILES(tile4_)};

// ---- the whole product

// Panels from `first` to `end` times one weight tile; if they are few, they ask for the next tile.
static void panels_by_tile(const struct quantized *op, int64_t first, int64_t end, int64_t tile, int few) {
    const tile_function *by_rows = tiles[op->minimums != NULL];
    for (int64_t index = first; index < end; index++) {
        const struct panel panel = panel_at(op->rows, index);
        const int64_t bytes = op->groups * GROUP * (op->minimums ? LANES : COLUMNS);
        const uint8_t *next = op->weights + (tile + 1) * bytes;
        const struct fetch fetch = fetch_part(next, bytes, op->groups * GROUP / 4, index - first, end - first);
        by_rows[panel.rows](op, panel.first, tile, few ? fetch : fetch_nothing(op->weights));
    }
}

static void quantized_blocks(const struct quantized *op) {
    const int64_t fitting = BLOCK_BYTES / (op->groups * (GROUP + 8)) / TILE_ROWS, block = fitting < 8 ? 8 : fitting;
    const int64_t panels = panel_count(op->rows), count = (op->out.N + COLUMNS - 1) / COLUMNS;
#pragma omp for collapse(2) schedule(dynamic, 1) nowait
    for (int64_t first = 0; first < panels; first += block)
        for (int64_t tile = 0; tile < count; tile++)
            panels_by_tile(op, first, first + block < panels ? first + block : panels, tile, 0);
    team_barrier();
}

static void quantized_few_rows(const struct quantized *op) {
    const int64_t count = (op->out.N + COLUMNS - 1) / COLUMNS;
#pragma omp for schedule(static) nowait
    for (int64_t tile = 0; tile < count; tile++) panels_by_tile(op, 0, panel_count(op->rows), tile, 1);
    team_barrier();
}

static void quantize_panel(const struct quantized *op, const bf16 *x, int64_t K, int64_t index) {
    const struct panel panel = panel_at(op->rows, index);
    for (int64_t row = 0; row < panel.rows; row++) quantize_row(op, x + (panel.first + row) * K, K, panel, row);
}

static void place_inputs(struct quantized *op, char *memory) {
    op->inputs = (int8_t *)memory;
    op->input_scales = (float *)(op->inputs + op->rows * op->groups * GROUP);
    op->extras = (int32_t *)(op->input_scales + op->rows * op->groups);
}

// y[rows][N] = x[rows][K] w^T (+ bias) (+ residual). work: rows * ceil(K/64) * 72 bytes.
EXPORT void lapis_linear_quantized_team(const bf16 *x, int64_t rows, int64_t K, const uint8_t *weights, const bf16 *scales,
                                        const bf16 *minimums, int64_t N, const bf16 *bias, const bf16 *residual, void *y,
                                        int fp32, char *work) {
    const int64_t groups = (K + GROUP - 1) / GROUP, bytes = rows * groups * (GROUP + 8);
    struct quantized op = {rows, groups, weights, scales, minimums, NULL, NULL, NULL, {.y = y, .bias = bias, .residual = residual, .N = N, .fp32 = fp32}};
    const int64_t panels = panel_count(rows);
    char local[LOCAL_BYTES] __attribute__((aligned(64)));
    if (bytes <= LOCAL_BYTES) {
        place_inputs(&op, local);
        for (int64_t index = 0; index < panels; index++) quantize_panel(&op, x, K, index);
    } else {
        place_inputs(&op, work);
#pragma omp for schedule(static) nowait
        for (int64_t index = 0; index < panels; index++) quantize_panel(&op, x, K, index);
        team_barrier();
    }
    if (rows <= 2 * TILE_ROWS) quantized_few_rows(&op);
    else quantized_blocks(&op);
}

EXPORT void lapis_linear_quantized(const bf16 *x, int64_t rows, int64_t K, const uint8_t *weights, const bf16 *scales,
                                   const bf16 *minimums, int64_t N, const bf16 *bias, const bf16 *residual, void *y, int fp32,
                                   char *work) {
#pragma omp parallel
    {
        const uint64_t mode = flush_subnormals();
        lapis_linear_quantized_team(x, rows, K, weights, scales, minimums, N, bias, residual, y, fp32, work);
        restore_mode(mode);
    }
}

// ---- each row by the weight of its group out of a stack (experts)

struct stack {
    struct quantized all;  // inputs in sorted order, panels group by group
    int64_t groups;
    int64_t *starts;       // [groups + 1]: the first sorted row of each group
    int32_t *order;        // the row that each sorted row was
};

static struct quantized member(const struct stack *op, int64_t group) {
    struct quantized one = op->all;
    const int64_t start = op->starts[group], inner = one.groups, tiles = (one.out.N + COLUMNS - 1) / COLUMNS;
    const int64_t before = group * tiles * inner * COLUMNS;  // groups of 64 weights
    one.rows = op->starts[group + 1] - start;
    one.weights += before * (one.minimums ? GROUP / 2 : GROUP);
    one.scales += before * (one.minimums ? 2 : 1);
    if (one.minimums) one.minimums += before * 2;
    one.inputs += start * inner * GROUP;
    one.input_scales += start * inner;
    one.extras += start * inner;
    one.out.order = op->order + start;
    return one;
}

// The inputs of a sorted row, into its panel.
static void quantize_sorted(const struct stack *op, const bf16 *x, int64_t shared, int64_t K, const int32_t *group, int64_t at) {
    const int64_t row = op->order[at];
    const struct quantized one = member(op, group[row]);
    const int64_t inside = at - op->starts[group[row]];
    int64_t index = inside / TILE_ROWS ? inside / TILE_ROWS - 1 : 0;
    while (panel_at(one.rows, index).first + panel_at(one.rows, index).rows <= inside) index++;
    const struct panel panel = panel_at(one.rows, index);
    quantize_row(&one, x + row / shared * K, K, panel, inside - panel.first);
}

static void stack_tiles(const struct stack *op) {
    const int64_t tiles = (op->all.out.N + COLUMNS - 1) / COLUMNS;
    if (op->all.rows <= 2 * TILE_ROWS) {  // few groups have rows: threads share the tiles of each
#pragma omp for schedule(static) nowait
        for (int64_t tile = 0; tile < tiles; tile++)
            for (int64_t g = 0; g < op->groups; g++) {
                const struct quantized one = member(op, g);
                panels_by_tile(&one, 0, panel_count(one.rows), tile, 1);
            }
    } else {
#pragma omp for collapse(2) schedule(dynamic, 4) nowait
        for (int64_t g = 0; g < op->groups; g++)
            for (int64_t tile = 0; tile < tiles; tile++) {
                const struct quantized one = member(op, g);
                panels_by_tile(&one, 0, panel_count(one.rows), tile, 0);
            }
    }
    team_barrier();
}

// Row r of y[rows][N] = row r / shared of x[..][K] times the weight of group[r] in a stack of them.
// work: 8 * (groups + 2) + rows * (8 + ceil(K/64) * 72) bytes.
EXPORT void lapis_linear_quantized_stack_team(const bf16 *x, int64_t rows, int64_t shared, int64_t K, const int32_t *group,
                                              int64_t groups, const uint8_t *weights, const bf16 *scales, const bf16 *minimums,
                                              int64_t N, void *y, int fp32, char *work) {
    struct stack op = {{rows, (K + GROUP - 1) / GROUP, weights, scales, minimums, NULL, NULL, NULL, {.y = y, .N = N, .fp32 = fp32}},
                       groups, (int64_t *)work, NULL};
    op.order = (int32_t *)(op.starts + groups + 1);
    place_inputs(&op.all, (char *)(op.order + 2 * rows));
#pragma omp single nowait
    sort_by_group(group, rows, groups, op.starts, op.order);
    team_barrier();
#pragma omp for schedule(static) nowait
    for (int64_t at = 0; at < op.starts[groups]; at++) quantize_sorted(&op, x, shared, K, group, at);
    team_barrier();
    stack_tiles(&op);
}

EXPORT void lapis_linear_quantized_stack(const bf16 *x, int64_t rows, int64_t shared, int64_t K, const int32_t *group,
                                         int64_t groups, const uint8_t *weights, const bf16 *scales, const bf16 *minimums,
                                         int64_t N, void *y, int fp32, char *work) {
#pragma omp parallel
    {
        const uint64_t mode = flush_subnormals();
        lapis_linear_quantized_stack_team(x, rows, shared, K, group, groups, weights, scales, minimums, N, y, fp32, work);
        restore_mode(mode);
    }
}
