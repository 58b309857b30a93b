#include <math.h>

#include "decode.h"

/* y = weight * x / sqrt(mean(x^2) + eps), each row. */
void rms_norm_team(const float *x, const float *weight, float *y, long rows, long size, float eps) {
#pragma omp for
    for (long row = 0; row < rows; row++) {
        const float *from = x + row * size;
        float *to = y + row * size, squares = 0;
#pragma omp simd reduction(+ : squares)
        for (long i = 0; i < size; i++)
            squares += from[i] * from[i];
        float scale = 1 / sqrtf(squares / size + eps);
#pragma omp simd
        for (long i = 0; i < size; i++)
            to[i] = weight[i] * (from[i] * scale);
    }
}

/* By one thread. */
void rms_norm(const float *x, const float *weight, float *y, long rows, long size, float eps) {
    rms_norm_team(x, weight, y, rows, size, eps);
}
