/* Attention of one new token a row over its cached keys and values.

   size: of a head. A row of `mixed` holds its query heads, key heads and value heads. Rotary:
   x * cos + [x2, x1] * sin, the sine of the first half negative. */

#include <math.h>

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
        }
    for (long i = 0; i < size; i++)
        seen[i] = 0;
    for (long place = 0; place < length; place++)
        if (visible[place]) {
            float share = expf(weight[place] - most);
            total += share;
#pragma omp simd
            for (long i = 0; i < size; i++)
                seen[i] += share * values[place * size + i];
        }
    for (long i = 0; i < size; i++)
        seen[i] /= total;
}

/* The new token is the last of `length` places, and visible; its key and value are written there.
   Between two rows of the cache lie `row` numbers, between two heads `head`. */
void attend_one(const float *mixed, const float *cosine, const float *sine, float *keys,
                float *values, const unsigned char *visible, float *seen, long rows, long heads,
                long key_heads, long size, long length, long row, long head, float scale,
                int threads) {
#pragma omp parallel for collapse(2) num_threads(threads) if (threads > 1)
    for (long b = 0; b < rows; b++)
        for (long h = 0; h < key_heads; h++) {
            const float *own = mixed + b * (heads + 2 * key_heads) * size;
            const float *turn = cosine + b * size, *turn_sine = sine + b * size;
            float *row_keys = keys + b * row + h * head, *row_values = values + b * row + h * head;
            float *new_value = row_values + (length - 1) * size, query[size];
            rotate(own + (heads + h) * size, turn, turn_sine, size, row_keys + (length - 1) * size);
            for (long i = 0; i < size; i++)
                new_value[i] = own[(heads + key_heads + h) * size + i];
            for (long q = h * heads / key_heads; q < (h + 1) * heads / key_heads; q++) {
                rotate(own + q * size, turn, turn_sine, size, query);
                attend_head(query, row_keys, row_values, visible + b * length, length, size, scale,
                            seen + (b * heads + q) * size);
            }
        }
}
