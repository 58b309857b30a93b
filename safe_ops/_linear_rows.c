/* Sums over the rows of a block of float32 logits, their slopes in place, and memory for both.

   What torch.compile makes of the same bodies calls a function for each vector's exponential and
   waits for one maximum after another. A row is read twice for its sums, from the core's cache the
   second time. Each row's sums are taken in one order, whatever the number of rows and threads.

   Compiled without contraction, since z * scale must round alike where the highest logit is found
   and where it is subtracted; fused operations are named. max(a, b) is b where b is not a number. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#define BYTES 64
typedef float V __attribute__((vector_size(BYTES)));
static inline V fma_of(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
static inline V max_of(V a, V b) { return _mm512_max_ps(a, b); }
#define TIMES_TWO_TO _mm512_scalef_ps
#elif defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#define BYTES 32
typedef float V __attribute__((vector_size(BYTES)));
static inline V fma_of(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
static inline V max_of(V a, V b) { return _mm256_max_ps(a, b); }
#else
#define BYTES 16
typedef float V __attribute__((vector_size(BYTES)));
typedef int32_t M __attribute__((vector_size(BYTES)));
static inline V fma_of(V a, V b, V c) { return a * b + c; }
static inline V max_of(V a, V b) {
  M first = a > b;
  return (V)(((M)a & first) | ((M)b & ~first));
}
#endif

typedef int32_t I __attribute__((vector_size(BYTES)));
enum { LANES = BYTES / 4 };

/* Numbers that are fetched before they are read: processors do not look beyond a page by themselves,
   and kept logits have left the cache. */
enum { AHEAD = 1024 };

#define LARGE 32768 /* below it, threads cost more than they save */

/* Stands for log 0 of a banned token, since 0 * -inf is nan. */
#define NEVER -200.0f
#define FAR 60.0f

static inline V all(float x) { return x - (V){0}; }

/* LANES numbers from p, of which `left` are there; -inf for the others. */
static inline V load(const float *p, long left) {
  V x = all(-INFINITY);
  if (left >= LANES)
    memcpy(&x, p, sizeof x);
  else
    memcpy(&x, p, left * sizeof *p);
  return x;
}

static inline void store(float *p, V x, long left) {
  if (left >= LANES)
    memcpy(p, &x, sizeof x);
  else
    memcpy(p, &x, left * sizeof *p);
}

static inline float sum_of(V x) {
  float total = 0;
  for (int i = 0; i < LANES; i++) total += x[i];
  return total;
}

#ifndef TIMES_TWO_TO
/* x 2^n, in two steps, since the result may be denormal where neither factor is. */
static inline V TIMES_TWO_TO(V x, V n) {
  I whole = __builtin_convertvector(n, I), half = whole >> 1;
  return x * (V)((half + 127) << 23) * (V)((whole - half + 127) << 23);
}
#endif

/* e^x for x of at most about 0: 2^n e^r, |r| <= log(2) / 2, with the polynomial of Cephes' expf. */
static inline V exp_of(V x) {
  const V shift = all(12582912.0f); /* 1.5 * 2^23: sums have no fraction */
  x = max_of(all(-105.0f), x); /* e^-105 is 0 */
  V n = fma_of(x, all(1.44269504f), shift) - shift;
  V r = fma_of(n, all(-0.693359375f), x);
  r = fma_of(n, all(2.12194440e-4f), r);
  V p = fma_of(all(1.9875691500e-4f), r, all(1.3981999507e-3f));
  p = fma_of(p, r, all(8.3334519073e-3f));
  p = fma_of(p, r, all(4.1665795894e-2f));
  p = fma_of(p, r, all(1.6666665459e-1f));
  p = fma_of(p, r, all(5.0000001201e-1f));
  p = fma_of(p * r, r, r) + 1.0f;
  return TIMES_TWO_TO(p, n);
}

static inline float one_exp(float x) { return exp_of(all(x))[0]; }

static float highest_of(const float *z, long columns) {
  V best[4];
  for (int i = 0; i < 4; i++) best[i] = all(-INFINITY);
  long j = 0;
  for (; j + 4 * LANES <= columns; j += 4 * LANES)
    for (int i = 0; i < 4; i++) {
      __builtin_prefetch(z + j + i * LANES + AHEAD);
      best[i] = max_of(load(z + j + i * LANES, LANES), best[i]);
    }
  for (; j < columns; j += LANES) best[0] = max_of(load(z + j, columns - j), best[0]);
  V all_of = max_of(max_of(best[0], best[1]), max_of(best[2], best[3]));
  float found = all_of[0];
  for (int i = 1; i < LANES; i++) found = all_of[i] > found ? all_of[i] : found;
  return found;
}

static inline float higher_of(float a, float b) { return a > b ? a : b; }
static inline float possible(float x) { return x < NEVER ? NEVER : x; }

/* One step of m = max x, s = sum e^(x-m), u = sum e^(x-m) (x-m) with x = z * scale, and the logit of
   the row's token, a column that may lie outside. */
void absorb_rows(long rows, long columns, long stride, float scale, int threads, const float *z,
                 const int64_t *token, long start, float *shift, float *total, float *weighted,
                 float *logit) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows * columns >= LARGE)
  for (long i = 0; i < rows; i++) {
    const float *row = z + i * stride;
    float higher = higher_of(shift[i], highest_of(row, columns) * scale);
    V s = {0}, u = {0};
    for (long j = 0; j < columns; j += LANES) {
      V below = max_of(all(NEVER), load(row + j, columns - j) * scale - higher);
      V e = exp_of(below);
      s += e;
      u = fma_of(e, below, u);
    }
    float moved = possible(shift[i] - higher), factor = one_exp(moved);
    weighted[i] = (weighted[i] + total[i] * moved) * factor + sum_of(u);
    total[i] = total[i] * factor + sum_of(s);
    shift[i] = higher;
    int64_t column = token[i] - start;
    if (column >= 0 && column < columns) logit[i] = row[column] * scale;
  }
}

/* z becomes p (constant + slope log p), and at_token in the token's column. */
void rows_to_slopes(long rows, long columns, long stride, float scale, int threads, float *z,
                    const int64_t *token, long start, const float *shift, const float *log_total,
                    const float *constant, const float *slope, const float *at_token) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows * columns >= LARGE)
  for (long i = 0; i < rows; i++) {
    float *row = z + i * stride;
    V first = all(constant[i]), by = all(slope[i]);
    float highest = shift[i], rest = log_total[i];
    for (long j = 0; j < columns; j += LANES) {
      __builtin_prefetch(row + j + AHEAD, 1);
      V below = load(row + j, columns - j) * scale - highest;
      V log_p = max_of(all(NEVER), below) - rest;
      store(row + j, exp_of(log_p) * fma_of(by, log_p, first), columns - j);
    }
    int64_t column = token[i] - start;
    if (column >= 0 && column < columns) row[column] = at_token[i];
  }
}

/* One step of m and s as for one row, of s' = sum e^(x'-m') with an m' near the highest, and of
   u = sum e^(x-m) ((x - m) - (x' - m')). m' moves with m, and else only where e^(x'-m') grows too
   large: so where one token has all the probability, u and the slopes round its x' - m' alike, and
   log p - log q - kl is 0 there. */
void absorb_row_pairs(long rows, long columns, long stride, float scale, int threads,
                      const float *z, const float *ref_z, float *shift, float *total,
                      float *weighted, float *ref_shift, float *ref_total) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows * columns >= LARGE)
  for (long i = 0; i < rows; i++) {
    const float *row = z + i * stride, *ref_row = ref_z + i * stride;
    float higher = higher_of(shift[i], highest_of(row, columns) * scale);
    float ref_best = highest_of(ref_row, columns) * scale;
    int moves = higher > shift[i] || ref_best - ref_shift[i] > FAR;
    float ref_higher = moves ? higher_of(ref_shift[i], ref_best) : ref_shift[i];
    V s = {0}, u = {0}, ref_s = {0};
    for (long j = 0; j < columns; j += LANES) {
      V below = max_of(all(NEVER), load(row + j, columns - j) * scale - higher);
      V ref_below = load(ref_row + j, columns - j) * scale - ref_higher;
      V e = exp_of(below);
      /* Infinite for a token that only the reference bans; one that both ban adds nothing. */
      V gap = e * (below - ref_below);
      s += e;
      u += (V)((I)gap & (e != 0.0f));
      ref_s += exp_of(ref_below);
    }
    float moved = shift[i] - higher, ref_moved = ref_shift[i] - ref_higher;
    float factor = one_exp(possible(moved));
    float carried = (weighted[i] + total[i] * (moved - ref_moved)) * factor;
    if (total[i] == 0 || factor == 0) carried = 0;
    weighted[i] = carried + sum_of(u);
    total[i] = total[i] * factor + sum_of(s);
    ref_total[i] = ref_total[i] * one_exp(possible(ref_moved)) + sum_of(ref_s);
    shift[i] = higher;
    ref_shift[i] = ref_higher;
  }
}

/* z becomes grad p (log p - log q - kl) and, where it is needed, ref_z grad (q - p). */
void row_pairs_to_slopes(long rows, long columns, long stride, float scale, int threads, float *z,
                         float *ref_z, const float *shift, const float *log_total,
                         const float *ref_shift, const float *ref_log_total, const float *kl,
                         const float *grad, int ref_needed) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows * columns >= LARGE)
  for (long i = 0; i < rows; i++) {
    float *row = z + i * stride, *ref_row = ref_z + i * stride;
    float highest = shift[i], rest = log_total[i], g = grad[i], mean = kl[i];
    float ref_highest = ref_shift[i], ref_rest = ref_log_total[i];
    for (long j = 0; j < columns; j += LANES) {
      long left = columns - j;
      __builtin_prefetch(row + j + AHEAD, 1);
      __builtin_prefetch(ref_row + j + AHEAD, 1);
      V log_p = max_of(all(NEVER), load(row + j, left) * scale - highest) - rest;
      V log_q = load(ref_row + j, left) * scale - ref_highest - ref_rest;
      V p = exp_of(log_p), slope = g * p * (log_p - log_q - mean);
      /* log q may be -inf, which a token that has no probability does not meet. */
      store(row + j, (V)((I)slope & (p != 0.0f)), left);
      if (ref_needed) store(ref_row + j, g * (exp_of(log_q) - p), left);
    }
  }
}

/* Zero in every page of memory that holds nothing yet. */
void take_pages(long bytes, long page, int threads, char *memory) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && bytes >= 4 * LARGE)
  for (long i = 0; i < bytes; i += page) memory[i] = 0;
  if (bytes > 0) memory[bytes - 1] = 0;
}
