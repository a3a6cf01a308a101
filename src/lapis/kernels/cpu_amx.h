// Matrix tiles (AMX): 32 rows of x times 32 columns of weights in four 16 x 16 tiles of sums.
// The tile product adds in an order of its own (contract.md, "In tiles"), so the builds with it have other bits.
#ifndef LAPIS_CPU_AMX_H
#define LAPIS_CPU_AMX_H

#include "cpu_product.h"
#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>

#define TILE 16   // rows of a tile, and columns of a tile of sums
#define BLOCK 32  // elements of K that one tile product takes
#define AHEAD 4   // blocks of K whose lines are asked for beforehand

struct tiles {  // as LDTILECFG reads it
    uint8_t palette, start, none[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} __attribute__((aligned(64)));

extern __thread int64_t tiles_rows;  // rows of x that this thread's tiles are set for; 0: none are

// Sums are tiles 0 … 3 (row tile by row tile), x is 4 and 5, weights are 6 and 7.
INLINE void set_tiles(int64_t rows) {
    if (rows == tiles_rows) return;
    const int64_t first = rows < TILE ? rows : TILE, second = rows - first;
    const int64_t of_tile[] = {first, first, second, second, first, second, TILE, TILE};
    struct tiles tiles = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        tiles.rows[i] = (uint8_t)of_tile[i];
        tiles.bytes[i] = of_tile[i] ? 64 : 0;
    }
    _tile_loadconfig(&tiles);
    tiles_rows = rows;
}

// Others may have used the tiles since, so every operation sets them anew.
INLINE void begin_tiles(void) { tiles_rows = 0; }
INLINE void end_tiles(void) {
    if (tiles_rows) _tile_release();
    tiles_rows = 0;
}

INLINE void clear_sums(const int halves) {
    _tile_zero(0);
    _tile_zero(1);
    if (halves == 2) {
        _tile_zero(2);
        _tile_zero(3);
    }
}

INLINE void add_products(const int halves, const bf16 *x, int64_t x_bytes, const bf16 *w) {
    _tile_loadd(6, w, 4 * COLUMNS);
    _tile_loadd(7, w + COLUMNS, 4 * COLUMNS);
    _tile_loadd(4, x, x_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (halves == 2) {
        _tile_loadd(5, (const char *)x + TILE * x_bytes, x_bytes);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
}

// The last elements of K, fewer than a block: as if zeros followed.
static __attribute__((noinline)) void add_rest(const int halves, const bf16 *x, int64_t rows, int64_t K, const bf16 *w) {
    bf16 x_part[2 * TILE][BLOCK] = {{0}}, w_part[BLOCK * COLUMNS] = {0};
    const int64_t rest = K % BLOCK;
    for (int64_t row = 0; row < rows; row++) memcpy(x_part[row], x + row * K, (size_t)rest * 2);
    memcpy(w_part, w, (size_t)(rest * COLUMNS) * 2);
    __asm__ volatile("" ::: "memory");  // the compiler does not know that tile loads read memory
    if (halves == 2) add_products(2, x_part[0], BLOCK * 2, w_part);
    else add_products(1, x_part[0], BLOCK * 2, w_part);
}

// sum[rows][COLUMNS] of x[rows][K] and a weight tile w[K/2][COLUMNS][2]; at most 2 * TILE rows.
INLINE void tile_product(const int halves, const bf16 *x, int64_t rows, int64_t K, const bf16 *w, float *sum) {
    set_tiles(rows);
    clear_sums(halves);
    const int64_t whole = K / BLOCK;
    for (int64_t block = 0; block < whole; block++) {
        for (int64_t line = 0; line < BLOCK; line++)
            __builtin_prefetch(w + (block + AHEAD) * BLOCK * COLUMNS + line * COLUMNS, 0, 3);
        add_products(halves, x + block * BLOCK, K * 2, w + block * BLOCK * COLUMNS);
    }
    if (K % BLOCK) add_rest(halves, x + whole * BLOCK, rows, K, w + whole * BLOCK * COLUMNS);
    _tile_stored(0, sum, 4 * COLUMNS);
    _tile_stored(1, sum + TILE, 4 * COLUMNS);
    if (halves == 2) {
        _tile_stored(2, sum + TILE * COLUMNS, 4 * COLUMNS);
        _tile_stored(3, sum + TILE * COLUMNS + TILE, 4 * COLUMNS);
    }
}
#endif

#endif
