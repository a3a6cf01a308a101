// Products with weights: y = x w^T under the numerical contract (contract.md), and their gradients.
// Rows never share a sum and threads never split one, so tiles, blocks and threads cannot be seen in the bits.
#include "cpu_amx.h"
#include "cpu_transpose.h"

#define PACK_PAIRS 64            // pairs of rows that are packed at a time
#define PACK_PANELS 8             // panels that are packed at a time
#define PANEL_ROWS 12             // as in cpu_library.py: sizes the work of the weight gradient
#define ROW_GROUP 3               // rows that are reached from one pointer: a pointer each would not fit the registers
#if defined(__AMX_BF16__)
#define TILE_ROWS 32
#define WIDE_ROWS 0
#define FETCH_ROWS 64  // never
#define FEW_ROWS 32
#elif defined(__AVX512F__)
#define TILE_ROWS 12  // 24 sums of 16 lanes in 32 registers
#define WIDE_ROWS 4   // so few rows take two weight tiles at once, to have enough sums under way
#define FETCH_ROWS 5  // from so many to FEW_ROWS, a pass over a tile asks for the next one
#define FEW_ROWS 24
#else
#define TILE_ROWS 3
#define WIDE_ROWS 1
#define FETCH_ROWS 4  // never
#define FEW_ROWS 0
#endif
#if defined(__AVX2__) && !defined(__AVX512F__)
#define IN_TWOS 1  // two rows at a time are faster, each, than three
#else
#define IN_TWOS 0
#endif

// ---- linear: y[M,N] = x[M,K] w[N,K]^T (+ bias) (+ residual). w is packed as [ceil(N/32)][K/2][32][2], padded with zeros.

struct linear {
    const bf16 *x, *packed;
    int64_t rows, K;
    struct output out;
};

EXPORT void lapis_pack(const bf16 *w, bf16 *packed, int64_t N, int64_t K) {
    const int64_t tiles = (N + COLUMNS - 1) / COLUMNS, pairs = K / 2;
#pragma omp parallel for schedule(static)
    for (int64_t tile = 0; tile < tiles; tile++) {
        uint32_t *out = (uint32_t *)packed + tile * COLUMNS * pairs;
        const uint32_t *first = (const uint32_t *)w + tile * COLUMNS * pairs;
        const int64_t columns = N - tile * COLUMNS < COLUMNS ? N - tile * COLUMNS : COLUMNS;
        if (columns < COLUMNS) memset(out, 0, (size_t)(COLUMNS * pairs) * 4);
        for (int64_t k = 0; k < pairs; k++)  // lines of the output one by one: those of the rows stay near meanwhile
            for (int64_t n = 0; n < columns; n++) out[k * COLUMNS + n] = first[n * pairs + k];
    }
}

#if defined(__AMX_BF16__)
__thread int64_t tiles_rows;

static __attribute__((noinline)) void rows_of_tile(int64_t rows, const struct linear *op, int64_t row, int64_t tile,
                                                   struct fetch fetch) {
    float sum[TILE_ROWS * COLUMNS] __attribute__((aligned(64)));
    const bf16 *x = op->x + row * op->K, *w = op->packed + tile * COLUMNS * op->K;
    (void)fetch;
    claim_output((int)rows, &op->out, row, tile);
    if (rows > TILE) tile_product(2, x, rows, op->K, w, sum);
    else tile_product(1, x, rows, op->K, w, sum);
    for (int64_t r = 0; r < rows; r++)
        for (int c = 0; c < COLUMNS; c += LANES) finish(&op->out, row + r, tile * COLUMNS + c, load(sum + r * COLUMNS + c));
}
INLINE int64_t next_rows(int64_t left) { return left < TILE_ROWS ? left : TILE_ROWS; }
#else
INLINE void begin_tiles(void) {}
INLINE void end_tiles(void) {}

// The odd elements of pairs (shift 0) or the even ones (16) as fp32.
INLINE wide widen_half(wide_pairs pairs, const int shift) { return (wide)((pairs << shift) & 0xffff0000u); }

// Rows of the next tile; never one alone after others.
INLINE int64_t next_rows(int64_t left) {
    if (!IN_TWOS) return tile_rows(left, TILE_ROWS);
    return left <= 3 ? left : 2;
}

// `rows` rows times `tiles` neighbouring weight tiles: one chain of dp over all of K for each output.
// With `panels`, x is packed as [rows/TILE_ROWS][K/2][TILE_ROWS][2] and rows beyond the matrix are not stored.
INLINE void linear_tile(const int rows, const int tiles, const int panels, const struct linear *op, int64_t row,
                        int64_t tile, struct fetch fetch) {
    wide sum[TILE_ROWS][2 * TILE_VECTORS];
    float out[TILE_ROWS][2 * COLUMNS];
    const int vectors = tiles * TILE_VECTORS;
    const int64_t pairs = op->K / 2;
    const uint32_t *x = (const uint32_t *)op->x + row * pairs;
    const uint32_t *w = (const uint32_t *)op->packed + tile * COLUMNS * pairs;
    const uint32_t *group[(TILE_ROWS + ROW_GROUP - 1) / ROW_GROUP];
    int64_t stride = pairs;
#pragma GCC unroll 4
    for (int r = 0; r < rows; r += ROW_GROUP) group[r / ROW_GROUP] = x + r * pairs;
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 16
        for (int v = 0; v < vectors; v++) sum[r][v] = (wide){0};
    if (rows > WIDE_ROWS) claim_output(rows, &op->out, row, tile);
    for (int64_t k = 0; k < pairs; k++, w += COLUMNS) {
        if (rows >= FETCH_ROWS && !panels) fetch_step(fetch, k);
        wide_pairs weight[2 * TILE_VECTORS];
#pragma GCC unroll 16
        for (int v = 0; v < vectors; v++)
            weight[v] = load_wide_pairs(w + v / TILE_VECTORS * COLUMNS * pairs + v % TILE_VECTORS * WIDE);
        if (IN_TWOS && rows == 2) {  // all odd elements first: then 8 sums and what they need fit 16 registers
#pragma GCC unroll 2
            for (int shift = 0; shift <= 16; shift += 16) {
                const wide first = widen_half(x[k] - (wide_pairs){0}, shift);
                const wide second = widen_half(x[pairs + k] - (wide_pairs){0}, shift);
#pragma GCC unroll 16
                for (int v = 0; v < vectors; v++) {
                    const wide half = widen_half(weight[v], shift);
                    sum[0][v] = fused(sum[0][v], first, half);
                    sum[1][v] = fused(sum[1][v], second, half);
                }
            }
            continue;
        }
        if (!panels)
#pragma GCC unroll 4
            for (int r = 0; r < rows; r += ROW_GROUP)  // hidden from the compiler, which makes 12 pointers of them again
                __asm__("" : "+r"(group[r / ROW_GROUP]), "+r"(stride));
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++) {
            const uint32_t pair = panels ? x[k * TILE_ROWS + r] : group[r / ROW_GROUP][r % ROW_GROUP * stride];
#pragma GCC unroll 16
            for (int v = 0; v < vectors; v++) sum[r][v] = dp(sum[r][v], pair, weight[v]);
        }
#pragma GCC unroll 4
        for (int r = 0; r < rows; r += ROW_GROUP) group[r / ROW_GROUP]++;
    }
    if (WIDE == LANES && (tile + tiles) * COLUMNS <= op->out.N && (!panels || row + rows <= op->rows)) {
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++) finish_row(&op->out, row + r, tile * COLUMNS, vectors, (const f32x16 *)sum[r]);
        return;
    }
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 16
        for (int v = 0; v < vectors; v++) store_wide(out[r] + v * WIDE, sum[r][v]);
    for (int r = 0; r < rows && (!panels || row + r < op->rows); r++)
        for (int c = 0; c < tiles * COLUMNS; c += LANES) finish(&op->out, row + r, tile * COLUMNS + c, load(out[r] + c));
}

#define DEFINE_TILE(rows, tiles)                                                                            \
    static __attribute__((noinline)) void tile_##rows##x##tiles(const struct linear *op, int64_t row,       \
                                                                int64_t tile, struct fetch fetch) {         \
        linear_tile(rows, tiles, 0, op, row, tile, fetch);                                                    \
    }
DEFINE_TILE(1, 1)
DEFINE_TILE(1, 2)
DEFINE_TILE(2, 1)
DEFINE_TILE(3, 1)
#if TILE_ROWS == 12
DEFINE_TILE(2, 2)
DEFINE_TILE(3, 2)
DEFINE_TILE(4, 2)
DEFINE_TILE(4, 1)
DEFINE_TILE(5, 1)
DEFINE_TILE(6, 1)
DEFINE_TILE(7, 1)
DEFINE_TILE(8, 1)
DEFINE_TILE(9, 1)
DEFINE_TILE(10, 1)
DEFINE_TILE(11, 1)
DEFINE_TILE(12, 1)
#endif

typedef void (*tile_function)(const struct linear *, int64_t, int64_t, struct fetch);
static const tile_function wide_tiles[] = {
    NULL, tile_1x2,
#if TILE_ROWS == 12
    tile_2x2, tile_3x2, tile_4x2,
#endif
};
static const tile_function tiles_by_rows[] = {
    NULL, tile_1x1, tile_2x1, tile_3x1,
#if TILE_ROWS == 12
    tile_4x1, tile_5x1, tile_6x1, tile_7x1, tile_8x1, tile_9x1, tile_10x1, tile_11x1, tile_12x1,
#endif
};

INLINE void rows_of_tile(int64_t rows, const struct linear *op, int64_t row, int64_t tile, struct fetch fetch) {
    tiles_by_rows[rows](op, row, tile, fetch);
}

static void linear_few_rows(const struct linear *op, int64_t tiles) {
    const int64_t pairs_of_tiles = (tiles + 1) / 2;
#pragma omp for schedule(static) nowait
    for (int64_t pair = 0; pair < pairs_of_tiles; pair++) {
        if (2 * pair + 1 < tiles) wide_tiles[op->rows](op, 0, 2 * pair, fetch_nothing(op->packed));
        else tiles_by_rows[op->rows](op, 0, 2 * pair, fetch_nothing(op->packed));
    }
    team_barrier();
}
#endif

// Some rows: they wait for the weights, so the last of them ask for the next tile.
static void linear_some_rows(const struct linear *op, int64_t tiles) {
#pragma omp for schedule(static) nowait
    for (int64_t tile = 0; tile < tiles; tile++)
        for (int64_t row = 0, n; row < op->rows; row += n) {
            n = tile_rows(op->rows - row, TILE_ROWS);
            const int64_t bytes = op->K * COLUMNS * 2;
            const char *next = (const char *)op->packed + (tile + 1) * bytes;
            rows_of_tile(n, op, row, tile, fetch_part(next, bytes, op->K / 2, row > 0, op->rows > TILE_ROWS ? 2 : 1));
        }
    team_barrier();
}

INLINE int64_t rows_of_block(int64_t K) {
    const int64_t tiles = BLOCK_BYTES / 2 / K / TILE_ROWS;
    return (tiles < 8 ? 8 : tiles) * TILE_ROWS;
}

static void linear_blocks(const struct linear *op, int64_t tiles) {
    const int64_t block_rows = rows_of_block(op->K);
    const int64_t blocks = (op->rows + block_rows - 1) / block_rows;
#pragma omp for collapse(2) schedule(dynamic, 1) nowait
    for (int64_t block = 0; block < blocks; block++)
        for (int64_t tile = 0; tile < tiles; tile++) {
            const int64_t start = block * block_rows;
            const int64_t end = start + block_rows < op->rows ? start + block_rows : op->rows;
            for (int64_t row = start; row < end;) {
                const int64_t n = next_rows(end - row);
                rows_of_tile(n, op, row, tile, fetch_nothing(op->packed));
                row += n;
            }
        }
    team_barrier();
}

EXPORT void lapis_linear_team(const bf16 *x, int64_t rows, int64_t K, const bf16 *packed, int64_t N,
                              const bf16 *bias, const bf16 *residual, void *y, int fp32) {
    const struct linear op = {x, packed, rows, K, {.y = y, .bias = bias, .residual = residual, .N = N, .fp32 = fp32}};
    const int64_t tiles = (N + COLUMNS - 1) / COLUMNS;
    begin_tiles();
#if WIDE_ROWS
    if (rows <= WIDE_ROWS) linear_few_rows(&op, tiles);
    else
#endif
    if (rows <= FEW_ROWS) linear_some_rows(&op, tiles);
    else linear_blocks(&op, tiles);
    end_tiles();
}

EXPORT void lapis_linear(const bf16 *x, int64_t rows, int64_t K, const bf16 *packed, int64_t N, const bf16 *bias,
                         const bf16 *residual, void *y, int fp32) {
#pragma omp parallel
    {
        const uint64_t mode = flush_subnormals();
        lapis_linear_team(x, rows, K, packed, N, bias, residual, y, fp32);
        restore_mode(mode);
    }
}

// ---- grouped linear: each row by the weight of its group (experts, adapters). Rows are sorted by group first.

struct weight {  // of one group, packed; a row of a table that Python makes
    const bf16 *packed;
    int64_t N, K;  // at most the widths of y and x
};
struct segment {  // neighbouring sorted rows of one group
    int64_t group, first, rows, end;  // end: of its tiles in the count of all tiles
};
struct grouped {
    const struct weight *weights;
    int64_t rows, groups, K, segments;
    int64_t *starts;  // [groups + 1]: the first sorted row of each group
    struct segment *segment;
    int32_t *order;   // the row that each sorted row was
    bf16 *sorted;
};

static struct grouped place_groups(char *work, const struct weight *weights, int64_t rows, int64_t groups, int64_t K) {
    struct grouped op = {.weights = weights, .rows = rows, .groups = groups, .K = K};
    op.starts = (int64_t *)work + 1;
    op.segment = (struct segment *)(op.starts + groups + 1);
    op.order = (int32_t *)(op.segment + rows);
    op.sorted = (bf16 *)(op.order + (rows + 1) / 2 * 2);
    return op;
}

// Sorts rows by group, then makes segments of at most a block of rows. Returns how many.
static int64_t sort_rows(const struct grouped *op, const int32_t *group) {
    int64_t segments = 0, tiles = 0;
    sort_by_group(group, op->rows, op->groups, op->starts, op->order);
    for (int64_t g = 0; g < op->groups; g++) {
        const int64_t block = rows_of_block(op->weights[g].K), end = op->starts[g + 1];
        for (int64_t first = op->starts[g]; first < end; first += block) {
            tiles += (op->weights[g].N + COLUMNS - 1) / COLUMNS;
            op->segment[segments++] = (struct segment){g, first, end - first < block ? end - first : block, tiles};
        }
    }
    return segments;
}

static void grouped_tile(const struct grouped *op, const struct output *out, int64_t item) {
    const struct segment *s = op->segment;
    while (s->end <= item) s++;
    const struct weight *w = op->weights + s->group;
    const int64_t start = op->starts[s->group];
    struct linear one = {op->sorted + start * op->K + (s->first - start) * w->K, w->packed, s->rows, w->K, *out};
    one.out.N = w->N;
    one.out.order = op->order + s->first;
    const int64_t tile = (w->N + COLUMNS - 1) / COLUMNS - (s->end - item);
    for (int64_t row = 0, n; row < s->rows; row += n) {
        n = tile_rows(s->rows - row, TILE_ROWS);
        rows_of_tile(n, &one, row, tile, fetch_nothing(w->packed));
    }
}

// Row r of y[rows][N] = row r / shared of x[..][K] times the weight of group[r] (+ residual), in its first columns. Rows of
// group -1, or of one without columns, are the residual, or left as they are without one. work: 8 * groups + rows * (2 K + 36) + 32 bytes.
EXPORT void lapis_linear_grouped_team(const bf16 *x, int64_t rows, int64_t shared, int64_t K, const int32_t *group,
                                      const struct weight *weights, int64_t groups, int64_t N, const bf16 *residual, void *y,
                                      int fp32, char *work) {
    struct grouped op = place_groups(work, weights, rows, groups, K);
    int64_t *segments = (int64_t *)work;
#pragma omp single nowait
    *segments = sort_rows(&op, group);
    team_barrier();
    const int64_t chosen = op.starts[groups], items = *segments ? op.segment[*segments - 1].end : 0;
#pragma omp for schedule(static) nowait
    for (int64_t row = 0; row < rows; row++)
        if (residual && (group[row] < 0 || weights[group[row]].N == 0))
            memcpy((bf16 *)y + row * N, residual + row * N, (size_t)N * 2);
#pragma omp for schedule(static) nowait
    for (int64_t at = 0; at < chosen; at++) {
        const int64_t row = op.order[at], g = group[row], first = op.starts[g], width = weights[g].K;
        memcpy(op.sorted + first * K + (at - first) * width, x + row / shared * K, (size_t)width * 2);
    }
    team_barrier();
    const struct output out = {.y = y, .residual = residual, .fp32 = fp32, .stride = N};
    begin_tiles();
    if (rows <= TILE_ROWS) {
#pragma omp for schedule(static) nowait
        for (int64_t item = 0; item < items; item++) grouped_tile(&op, &out, item);
        team_barrier();
    } else {
#pragma omp for schedule(dynamic, 4) nowait
        for (int64_t item = 0; item < items; item++) grouped_tile(&op, &out, item);
        team_barrier();
    }
    end_tiles();
}

EXPORT void lapis_linear_grouped(const bf16 *x, int64_t rows, int64_t shared, int64_t K, const int32_t *group,
                                 const struct weight *weights, int64_t groups, int64_t N, const bf16 *residual, void *y,
                                 int fp32, char *work) {
#pragma omp parallel
    {
        const uint64_t mode = flush_subnormals();
        lapis_linear_grouped_team(x, rows, shared, K, group, weights, groups, N, residual, y, fp32, work);
        restore_mode(mode);
    }
}

// ---- gradients of linear, as products of the forward's kernel (one fp32 chain each, any number of threads)

// Rows of x[rows][width] in pairs, as weight tiles whose inner width is the rows: [ceil(width/32)][ceil(rows/2)][32][2].
EXPORT void lapis_pack_rows(const bf16 *x, bf16 *packed, int64_t rows, int64_t width) {
    static const bf16 zeros[COLUMNS];
    const int64_t tiles = (width + COLUMNS - 1) / COLUMNS, pairs = (rows + 1) / 2;
    const int64_t blocks = (pairs + PACK_PAIRS - 1) / PACK_PAIRS;
#pragma omp parallel for collapse(2) schedule(static)
    for (int64_t block = 0; block < blocks; block++)
        for (int64_t tile = 0; tile < tiles; tile++) {
            const int64_t last = (block + 1) * PACK_PAIRS < pairs ? (block + 1) * PACK_PAIRS : pairs;
            const int64_t columns = width - tile * COLUMNS;
            for (int64_t pair = block * PACK_PAIRS; pair < last; pair++) {
                bf16 part[2][COLUMNS] = {{0}};
                const bf16 *even = x + 2 * pair * width + tile * COLUMNS, *odd = even + width;
                if (2 * pair + 1 == rows) odd = zeros;
                if (columns < COLUMNS) {
                    memcpy(part[0], even, (size_t)columns * 2);
                    memcpy(part[1], odd, odd == zeros ? 0 : (size_t)columns * 2);
                    even = part[0];
                    odd = part[1];
                }
                interleave(even, odd, packed + (tile * pairs + pair) * 2 * COLUMNS);
                interleave(even + LANES, odd + LANES, packed + ((tile * pairs + pair) * 2 + 1) * COLUMNS);
            }
        }
}

#if defined(__AMX_BF16__)
// 32 rows from `row` on and 16 columns of g[rows][N] as 16 words of pairs for each column; zeros beyond the matrix.
INLINE void turn_part(const bf16 *g, int64_t rows, int64_t N, int64_t row, int64_t first, u32x16 *words) {
    const bf16 *from = g + row * N + first;
    if (row + 2 * LANES <= rows && first + LANES <= N) {
#pragma GCC unroll 16
        for (int64_t pair = 0; pair < LANES; pair++)
            words[pair] = ((u32x16)load_bf16(from + 2 * pair * N) >> 16) | (u32x16)load_bf16(from + (2 * pair + 1) * N);
    } else {
        const int64_t columns = N - first < LANES ? N - first : LANES;
        for (int64_t pair = 0; pair < LANES; pair++) {
            bf16 part[2][LANES] = {{0}};
            for (int64_t i = 0; i < 2; i++)
                if (row + 2 * pair + i < rows) memcpy(part[i], from + (2 * pair + i) * N, (size_t)columns * 2);
            interleave(part[0], part[1], (bf16 *)&words[pair]);
        }
    }
    transpose_words(words);
}

// g[rows][N] transposed: [N][inner], inner even, padded with zeros.
static void turn_rows(const bf16 *g, bf16 *turned, int64_t rows, int64_t N, int64_t inner) {
#pragma omp parallel for schedule(static)
    for (int64_t first = 0; first < N; first += LANES)
        for (int64_t row = 0; row < inner; row += 2 * LANES) {
            u32x16 words[LANES];
            turn_part(g, rows, N, row, first, words);
            const size_t bytes = inner - row < 2 * LANES ? (size_t)(inner - row) * 2 : 64;
            bf16 *out = turned + first * inner + row;
            for (int64_t i = 0; i < LANES && first + i < N; i++) memcpy(out + i * inner, &words[i], bytes);
        }
}

static void product_of_turned(const bf16 *g, bf16 *dw, bf16 *work, const bf16 *packed, int64_t rows, int64_t N, int64_t K,
                              int64_t inner) {
    const struct linear op = {work, packed, N, inner, {.y = dw, .residual = dw, .N = K}};
    turn_rows(g, work, rows, N, inner);
#pragma omp parallel
    {
        const uint64_t mode = flush_subnormals();
        begin_tiles();
        linear_blocks(&op, (K + COLUMNS - 1) / COLUMNS);
        end_tiles();
        restore_mode(mode);
    }
}
#else
// g[rows][N] transposed into panels [ceil(N/TILE_ROWS)][ceil(rows/2)][TILE_ROWS][2], padded with zeros.
static void pack_panels(const bf16 *g, bf16 *panels, int64_t rows, int64_t N) {
    const int64_t pairs = (rows + 1) / 2, count = (N + TILE_ROWS - 1) / TILE_ROWS;
#pragma omp parallel for collapse(2) schedule(static)
    for (int64_t panel = 0; panel < count; panel += PACK_PANELS)
        for (int64_t pair = 0; pair < pairs; pair++) {
            const int64_t first = panel * TILE_ROWS, left = N - first;
            const int64_t width = left < PACK_PANELS * TILE_ROWS ? left : PACK_PANELS * TILE_ROWS;
            const bf16 *even = g + 2 * pair * N + first, *odd = even + N;
            uint32_t words[PACK_PANELS * TILE_ROWS] = {0};
            int64_t i = 0;
            if (2 * pair + 1 < rows)
                for (; i + LANES <= width; i += LANES) interleave(even + i, odd + i, (bf16 *)(words + i));
            for (; i < width; i++) words[i] = even[i] | (2 * pair + 1 < rows ? (uint32_t)odd[i] << 16 : 0);
            for (int p = 0; p < PACK_PANELS && panel + p < count; p++)
                memcpy((uint32_t *)panels + ((panel + p) * pairs + pair) * TILE_ROWS, words + p * TILE_ROWS,
                       TILE_ROWS * 4);
        }
}

static void linear_panels(const struct linear *op) {
    const int64_t tiles = (op->out.N + COLUMNS - 1) / COLUMNS, block_rows = rows_of_block(op->K);
#pragma omp parallel
    {
        const uint64_t mode = flush_subnormals();
#pragma omp for collapse(2) schedule(dynamic, 4)
        for (int64_t start = 0; start < op->rows; start += block_rows)
            for (int64_t tile = 0; tile < tiles; tile++)
                for (int64_t row = start; row < start + block_rows && row < op->rows; row += TILE_ROWS)
                    linear_tile(TILE_ROWS, 1, 1, op, row, tile, fetch_nothing(op->packed));
        restore_mode(mode);
    }
}

static void product_of_turned(const bf16 *g, bf16 *dw, bf16 *work, const bf16 *packed, int64_t rows, int64_t N, int64_t K,
                              int64_t inner) {
    const struct linear op = {work, packed, N, inner, {.y = dw, .residual = dw, .N = K}};
    pack_panels(g, work, rows, N);
    linear_panels(&op);
}
#endif

// dw[N][K] += g[rows][N]^T x[rows][K]. work: bf16 [2 * ceil(rows/2)][N + 12 + K + 32].
EXPORT void lapis_linear_weight_gradient(const bf16 *g, const bf16 *x, bf16 *dw, bf16 *work, int64_t rows, int64_t N,
                                         int64_t K) {
    const int64_t inner = (rows + 1) / 2 * 2;
    bf16 *packed = work + (N + PANEL_ROWS - 1) / PANEL_ROWS * PANEL_ROWS * inner;
    lapis_pack_rows(x, packed, rows, K);
    product_of_turned(g, dw, work, packed, rows, N, K, inner);
}
