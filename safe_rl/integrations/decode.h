/* Parts of a step of decoding. Those with `team` in their name are called by every thread of a
   parallel region, which share the work and wait for each other at the end. */

#ifndef DECODE_H
#define DECODE_H

#include <stdint.h>
#include <string.h>

typedef struct {
    const float *cosine, *sine;
    const unsigned char *visible;
    long rows, heads, key_heads, size, length, cache_row, cache_head;
    float scale;
} Attention;

/* Of y: `width` numbers in whole panels. */
long padded(long width);
void multiply_team(const float *x, long rows, long depth, const float *packed, float *y, long width);
void attend_team(const Attention *how, const float *mixed, long mixed_row, float *keys,
                 float *values, float *seen);
void rms_norm_team(const float *x, const float *weight, float *y, long rows, long size, float eps);

/* e^x, for loops that the compiler makes vectors of: 2^n e^r, |r| <= log(2) / 2, with the polynomial
   of Cephes' expf. Below -87 and above 88 that of the bound. */
static inline float vector_exp(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    float n = (x * 1.44269504f + 12582912.0f) - 12582912.0f; /* 1.5 * 2^23: sums have no fraction */
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t bits = ((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return p * power;
}

#endif
