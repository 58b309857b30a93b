/* y[m, o] = sum over k of x[m, k] w[o, k], for few rows of x.

   A panel is COLUMNS outputs: packed[panel][k][column]. A tile, some rows of x by one panel, is summed
   in registers. While it is, the next panel is fetched from memory; a library's product of 16 rows
   waits for memory instead, for as long again as it multiplies. */

#include "decode.h"

#ifndef LANES
#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif
#endif
#define COLUMNS (2 * LANES)
#if LANES == 16
#define TILE_ROWS 8 /* 16 sums, 2 weights and 1 input, of 32 registers: 16 rows are two tiles */
#else
#define TILE_ROWS 6 /* 12 sums, 2 weights and 1 input: 15 of 16 registers */
#endif
#define LARGE 100000  /* below it, threads cost more than they save */
#ifndef BLOCK
#define BLOCK (1 << 17) /* numbers of x, which stay in the second cache over all panels */
#endif

typedef float vector __attribute__((vector_size(4 * LANES), aligned(4)));

#define TILE(ROWS)                                                                                 \
    static void tile_##ROWS(const float *x, long depth, const float *panel, float *y, long width,  \
                            const float *ahead, long stride) {                                     \
        vector sum[ROWS][2] = {0};                                                                 \
        for (long k = 0; k < depth; k++, panel += COLUMNS, ahead += stride) {                      \
            __builtin_prefetch(ahead, 0, 2); /* to the second cache: two panels exceed the first */ \
            vector left = *(const vector *)panel, right = *(const vector *)(panel + LANES);        \
            _Pragma("GCC unroll 8") for (int row = 0; row < ROWS; row++) {                         \
                sum[row][0] += x[row * depth + k] * left;                                          \
                sum[row][1] += x[row * depth + k] * right;                                         \
            }                                                                                      \
        }                                                                                          \
        _Pragma("GCC unroll 8") for (int row = 0; row < ROWS; row++) {                             \
            *(vector *)(y + row * width) = sum[row][0];                                            \
            *(vector *)(y + row * width + LANES) = sum[row][1];                                    \
        }                                                                                          \
    }
TILE(1)
TILE(2)
TILE(3)
TILE(4)
TILE(5)
TILE(6)
#if LANES == 16
TILE(7)
TILE(8)
#endif
typedef void tile(const float *, long, const float *, float *, long, const float *, long);
static tile *const TILES[] = {
    0, tile_1, tile_2, tile_3, tile_4, tile_5, tile_6,
#if LANES == 16
    tile_7, tile_8,
#endif
};

long columns(void) { return COLUMNS; }
long padded(long width) { return (width + COLUMNS - 1) / COLUMNS * COLUMNS; }

/* Rows of w beyond the last are zeros in the last panel. */
void pack(const float *w, long width, long depth, float *packed, int threads) {
#pragma omp parallel for num_threads(threads) if (width * depth >= LARGE)
    for (long first = 0; first < width; first += COLUMNS)
        for (long k = 0; k < depth; k++)
            for (long column = 0; column < COLUMNS; column++)
                packed[first * depth + k * COLUMNS + column] =
                    first + column < width ? w[(first + column) * depth + k] : 0;
}

/* width: of y, a multiple of COLUMNS. */
void multiply_team(const float *x, long rows, long depth, const float *packed, float *y,
                   long width) {
    long most = BLOCK / (depth > 0 ? depth : 1), blocks = most > 0 ? (rows + most - 1) / most : rows;
    for (long block = 0; block < blocks; block++) {
        long begin = rows * block / blocks, end = rows * (block + 1) / blocks;
        long tiles = (end - begin + TILE_ROWS - 1) / TILE_ROWS;
        long stride = (COLUMNS + tiles - 1) / tiles; /* each tile fetches its share */
#pragma omp for
        for (long first = 0; first < width; first += COLUMNS) {
            const float *panel = packed + first * depth, *next = panel + COLUMNS * depth;
            for (long row = begin, done = 0; row < end; done++) {
                long left = tiles - done, number = (end - row + left - 1) / left;
                TILES[number](x + row * depth, depth, panel, y + row * width + first, width,
                              next + done * stride * depth, stride);
                row += number;
            }
        }
    }
}

void multiply(const float *x, long rows, long depth, const float *packed, float *y, long width,
              int threads) {
#pragma omp parallel num_threads(threads) if (rows * width * depth >= LARGE)
    multiply_team(x, rows, depth, packed, y, width);
}
