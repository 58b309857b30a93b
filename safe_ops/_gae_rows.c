/* Advantages and value targets of rows of steps, from the last step to the first. REAL is float or
   double. Chunk by chunk: what waits for no other step goes over many of them at a time, the
   recurrence that is left over a few rows side by side. No branch depends on the flags of one step. */

#include <stddef.h>
#include <stdint.h>

enum { CHUNK = 128, SIDE_BY_SIDE = 4, LINE = 64 };
enum { LARGE = 32768 }; /* below it, threads cost more than they save */

/* A number of each step, of each row or of all: how far apart they lie. */
typedef struct {
  const REAL *from;
  long row, step;
} Numbers;

typedef struct {
  long steps;
  const REAL *reward, *value;
  const uint8_t *mask, *terminated, *truncated; /* truncated and next_value may be missing */
  const REAL *bootstrap, *next_value;
  Numbers discount, lambda;
  REAL *advantage, *target;
} Arguments;

static void read_numbers(Numbers numbers, long row, long first, long count, REAL *to) {
  const REAL *from = numbers.from + row * numbers.row + first * numbers.step;
  if (numbers.step == 0)
    for (long t = 0; t < count; t++) to[t] = *from;
  else
    for (long t = 0; t < count; t++) to[t] = from[t * numbers.step];
}

/* gcc leaves out calls of functions that only fetch. */
#define INLINE static inline __attribute__((always_inline))

INLINE void fetch(const void *memory, long bytes) {
  for (long i = 0; i < bytes; i += LINE) __builtin_prefetch((const char *)memory + i, 0, 2);
}

/* The chunk that ends there, into the cache: processors do not look ahead where each row goes
   backwards in pieces. */
INLINE void fetch_chunk(const Arguments *a, long row, long end) {
  long first = end > CHUNK ? end - CHUNK : 0, count = end - first, i = row * a->steps + first;
  const long numbers = count * sizeof(REAL);
  fetch(a->reward + i, numbers);
  fetch(a->value + i, numbers);
  fetch(a->mask + i, count);
  fetch(a->terminated + i, count);
  if (a->truncated != NULL) fetch(a->truncated + i, count);
  fetch(a->advantage + i, numbers);
  fetch(a->target + i, numbers);
}

/* Of each step the value at the next one that counts, `last` behind them all; that of the step
   before the chunk is returned. */
static REAL values_behind(const uint8_t *mask, const REAL *value, long count, REAL last, REAL *to) {
  REAL values[CHUNK + 1];
  uint8_t all = 1;
  for (long t = 0; t < count; t++) {
    all &= mask[t];
    values[t] = value[t];
  }
  values[count] = last;
  if (all) {
    for (long t = 0; t < count; t++) to[t] = values[t + 1];
    return values[0];
  }
  int place[CHUNK], next = count;
  for (int t = 0; t < count; t++) place[t] = mask[t] ? t : count;
  for (int t = count - 1; t >= 0; t--) {
    to[t] = values[next];
    next = place[t] < next ? place[t] : next;
  }
  return values[next];
}

/* Of each step its one-step error and what it takes over of the advantage behind it: all of it
   where the step does not count. */
static void errors_of(const Arguments *a, long row, long first, long count, REAL *value_behind,
                      REAL *restrict error, REAL *restrict factor) {
  static const uint8_t none[CHUNK];
  long i = row * a->steps + first;
  const uint8_t *mask = a->mask + i, *terminated = a->terminated + i;
  const uint8_t *truncated = a->truncated == NULL ? none : a->truncated + i;
  const REAL *reward = a->reward + i, *value = a->value + i;
  REAL behind[CHUNK], discount[CHUNK], lambda[CHUNK];
  *value_behind = values_behind(mask, value, count, *value_behind, behind);
  const REAL *next = a->next_value == NULL ? behind : a->next_value + i;
  read_numbers(a->discount, row, first, count, discount);
  read_numbers(a->lambda, row, first, count, lambda);
  for (long t = 0; t < count; t++) {
    uint8_t goes_on = mask[t] & !terminated[t], recurs = goes_on & !truncated[t];
    REAL found = reward[t] - value[t] + (goes_on ? discount[t] * next[t] : 0);
    error[t] = mask[t] ? found : 0;
    factor[t] = recurs ? discount[t] * lambda[t] : !mask[t];
  }
}

/* The recurrence of some rows; `behind` moves from behind the chunk to before it. */
static inline void recur(long rows, long count, REAL (*error)[CHUNK], REAL (*factor)[CHUNK],
                         REAL *behind, REAL (*found)[CHUNK]) {
  REAL last[SIDE_BY_SIDE];
  for (long k = 0; k < rows; k++) last[k] = behind[k];
  for (long t = count - 1; t >= 0; t--)
    for (long k = 0; k < rows; k++) found[k][t] = last[k] = error[k][t] + factor[k][t] * last[k];
  for (long k = 0; k < rows; k++) {
    /* Something was not finite, and then all before it: again, and where the factor is 0 it stops. */
    if (!__builtin_isfinite(last[k])) {
      last[k] = behind[k];
      for (long t = count - 1; t >= 0; t--)
        found[k][t] = last[k] =
            factor[k][t] != 0 ? error[k][t] + factor[k][t] * last[k] : error[k][t];
    }
    behind[k] = last[k];
  }
}

static void write_results(const Arguments *a, long row, long first, long count,
                          const REAL *restrict found) {
  long i = row * a->steps + first;
  const uint8_t *mask = a->mask + i;
  const REAL *value = a->value + i;
  REAL *restrict advantage = a->advantage + i, *restrict target = a->target + i;
  for (long t = 0; t < count; t++) {
    advantage[t] = mask[t] ? found[t] : 0;
    target[t] = mask[t] ? found[t] + value[t] : 0;
  }
}

static void estimate_some(const Arguments *a, long first_row, long rows) {
  REAL error[SIDE_BY_SIDE][CHUNK], factor[SIDE_BY_SIDE][CHUNK], found[SIDE_BY_SIDE][CHUNK];
  REAL value_behind[SIDE_BY_SIDE], advantage_behind[SIDE_BY_SIDE] = {0};
  for (long k = 0; k < rows; k++)
    value_behind[k] = a->bootstrap != NULL ? a->bootstrap[first_row + k] : 0;
  for (long end = a->steps; end > 0; end -= CHUNK) {
    long first = end > CHUNK ? end - CHUNK : 0, count = end - first;
    for (long k = 0; k < rows; k++) {
      fetch_chunk(a, first_row + k, first);
      errors_of(a, first_row + k, first, count, value_behind + k, error[k], factor[k]);
    }
    if (rows == SIDE_BY_SIDE)
      recur(SIDE_BY_SIDE, count, error, factor, advantage_behind, found);
    else
      recur(rows, count, error, factor, advantage_behind, found);
    for (long k = 0; k < rows; k++) write_results(a, first_row + k, first, count, found[k]);
  }
}

void estimate_rows(long rows, long steps, int threads, const REAL *reward, const REAL *value,
                   const uint8_t *mask, const uint8_t *terminated, const uint8_t *truncated,
                   const REAL *bootstrap, const REAL *next_value, const REAL *discount,
                   long discount_row, long discount_step, const REAL *lambda, long lambda_row,
                   long lambda_step, REAL *advantage, REAL *target) {
  const Arguments a = {steps,      reward,     value,
                       mask,       terminated, truncated,
                       bootstrap,  next_value, {discount, discount_row, discount_step},
                       {lambda, lambda_row, lambda_step}, advantage, target};
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows * steps >= LARGE)
  for (long first = 0; first < rows; first += SIDE_BY_SIDE)
    estimate_some(&a, first, rows - first < SIDE_BY_SIDE ? rows - first : SIDE_BY_SIDE);
}
