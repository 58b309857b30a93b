#include <math.h>

/* y = weight * x / sqrt(mean(x^2) + eps), each row. */
void rms_norm(const float *x, const float *weight, float *y, long rows, long size, float eps) {
    for (long row = 0; row < rows; row++, x += size, y += size) {
        float squares = 0;
#pragma omp simd reduction(+ : squares)
        for (long i = 0; i < size; i++)
            squares += x[i] * x[i];
        float scale = 1 / sqrtf(squares / size + eps);
#pragma omp simd
        for (long i = 0; i < size; i++)
            y[i] = weight[i] * (x[i] * scale);
    }
}
