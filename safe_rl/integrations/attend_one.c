/* Attention of one new token a row over its cached keys and values.

   size: of a head. A row of `mixed` holds its query heads, key heads and value heads. Rotary:
   x * cos + [x2, x1] * sin, the sine of the first half negative. */

#include <math.h>

#include "decode.h"

static void rotate(const float *x, const float *cosine, const float *sine, long size, float *out) {
    long half = size / 2;
#pragma omp simd
    for (long i = 0; i < half; i++) {
        out[i] = x[i] * cosine[i] + x[half + i] * sine[i];
        out[half + i] = x[half + i] * cosine[half + i] + x[i] * sine[half + i];
    }
}

static float dot(const float *x, const float *y, long size) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (long i = 0; i < size; i++)
        sum += x[i] * y[i];
    return sum;
}

static void attend_head(const float *query, const float *keys, const float *values,
                        const unsigned char *visible, long length, long size, float scale,
                        float *seen) {
    float weight[length], most = -INFINITY, total = 0;
    for (long place = 0; place < length; place++)
        if (visible[place]) {
            weight[place] = scale * dot(query, keys + place * size, size);
            most = fmaxf(most, weight[place]);
        } else
            weight[place] = -INFINITY;
#pragma omp simd
    for (long place = 0; place < length; place++)
        weight[place] = vector_exp(weight[place] - most);
    for (long i = 0; i < size; i++)
        seen[i] = 0;
    for (long place = 0; place < length; place++)
        if (visible[place]) {
            float share = weight[place];
            total += share;
#pragma omp simd
            for (long i = 0; i < size; i++)
                seen[i] += share * values[place * size + i];
        }
    for (long i = 0; i < size; i++)
        seen[i] /= total;
}

/* The new token is the last of `length` places, and visible; its key and value are written there.
   Between two rows of the cache lie `cache_row` numbers, between two heads `cache_head`. */
void attend_team(const Attention *how, const float *mixed, long mixed_row, float *keys,
                 float *values, float *seen) {
    long heads = how->heads, key_heads = how->key_heads, size = how->size, length = how->length;
#pragma omp for collapse(2)
    for (long b = 0; b < how->rows; b++)
        for (long h = 0; h < key_heads; h++) {
            const float *own = mixed + b * mixed_row;
            const float *turn = how->cosine + b * size, *turn_sine = how->sine + b * size;
            float *row_keys = keys + b * how->cache_row + h * how->cache_head;
            float *row_values = values + b * how->cache_row + h * how->cache_head;
            float *new_value = row_values + (length - 1) * size, query[size];
            rotate(own + (heads + h) * size, turn, turn_sine, size, row_keys + (length - 1) * size);
            for (long i = 0; i < size; i++)
                new_value[i] = own[(heads + key_heads + h) * size + i];
            for (long q = h * heads / key_heads; q < (h + 1) * heads / key_heads; q++) {
                rotate(own + q * size, turn, turn_sine, size, query);
                attend_head(query, row_keys, row_values, how->visible + b * length, length, size,
                            how->scale, seen + (b * heads + q) * size);
            }
        }
}

void attend_one(const Attention *how, const float *mixed, float *keys, float *values, float *seen,
                int threads) {
    long mixed_row = (how->heads + 2 * how->key_heads) * how->size;
#pragma omp parallel num_threads(threads) if (threads > 1)
    attend_team(how, mixed, mixed_row, keys, values, seen);
}
