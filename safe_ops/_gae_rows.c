/* Advantages and value targets of rows of steps, from the last step to the first. REAL is float or
   double. A few rows go side by side, since each waits for its step before. */

#include <stddef.h>
#include <stdint.h>

enum { SIDE_BY_SIDE = 4, LARGE = 32768 }; /* below it, threads cost more than they save */

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

static inline void step_of_row(const Arguments *a, long row, long t, REAL *value_behind,
                               REAL *advantage_behind) {
  long i = row * a->steps + t;
  int counts = a->mask[i], goes_on = counts & !a->terminated[i];
  int recurs = goes_on & !(a->truncated != NULL && a->truncated[i]);
  REAL discount = a->discount.from[row * a->discount.row + t * a->discount.step];
  REAL lambda = a->lambda.from[row * a->lambda.row + t * a->lambda.step];
  REAL behind = a->next_value != NULL ? a->next_value[i] : *value_behind;
  REAL error = a->reward[i] - a->value[i] + discount * (goes_on ? behind : 0);
  REAL advantage = error + (recurs ? discount * lambda * *advantage_behind : 0);
  a->advantage[i] = counts ? advantage : 0;
  a->target[i] = counts ? advantage + a->value[i] : 0;
  *advantage_behind = counts ? advantage : *advantage_behind;
  *value_behind = counts ? a->value[i] : *value_behind;
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
  for (long first = 0; first < rows; first += SIDE_BY_SIDE) {
    long count = rows - first < SIDE_BY_SIDE ? rows - first : SIDE_BY_SIDE;
    REAL values[SIDE_BY_SIDE], advantages[SIDE_BY_SIDE] = {0};
    for (long k = 0; k < count; k++)
      values[k] = a.bootstrap != NULL ? a.bootstrap[first + k] : 0;
    if (count == SIDE_BY_SIDE)
      for (long t = steps - 1; t >= 0; t--)
        for (int k = 0; k < SIDE_BY_SIDE; k++)
          step_of_row(&a, first + k, t, values + k, advantages + k);
    else
      for (long k = 0; k < count; k++)
        for (long t = steps - 1; t >= 0; t--)
          step_of_row(&a, first + k, t, values + k, advantages + k);
  }
}
