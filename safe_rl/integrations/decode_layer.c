/* A whole layer of a Llama for one new token a row.

   h += W_o attention(rope(W_q n(h)), rope(W_k n(h)), W_v n(h))      n: RMS norm
   h += W_down (silu(W_gate n'(h)) * W_up n'(h))

   One call in the place of some twenty: between calls of a few microseconds' work the processor
   waits for Python and for the threads of the last one. */

#include <stddef.h>

#include "decode.h"

#define LARGE 100000 /* below it, threads cost more than they save */

/* A packed weight and its bias, which may be missing. */
typedef struct {
    const float *packed, *bias;
    long width;
} Linear;

typedef struct {
    const float *attention_norm, *feed_forward_norm;
    float attention_eps, feed_forward_eps;
    Linear query_key_value, attention_out, gate_up, down;
} Layer;

/* Room for what lies between two products, `rows` times: of `hidden` numbers, of padded(...). */
typedef struct {
    float *normed, *mixed, *seen, *both, *gated, *change;
} Room;

static void linear_team(const Linear *layer, const float *x, long rows, long depth, float *y) {
    long width = padded(layer->width);
    multiply_team(x, rows, depth, layer->packed, y, width);
    if (layer->bias != NULL) {
#pragma omp for
        for (long row = 0; row < rows; row++)
            for (long i = 0; i < layer->width; i++)
                y[row * width + i] += layer->bias[i];
    }
}

static void add_team(float *to, const float *change, long rows, long size) {
    long width = padded(size);
#pragma omp for
    for (long row = 0; row < rows; row++)
        for (long i = 0; i < size; i++)
            to[row * size + i] += change[row * width + i];
}

static void gate_team(const float *both, long rows, long inner, float *gated) {
    long width = padded(2 * inner);
#pragma omp for
    for (long row = 0; row < rows; row++) {
        const float *gate = both + row * width, *up = gate + inner;
#pragma omp simd
        for (long i = 0; i < inner; i++)
            gated[row * inner + i] = gate[i] / (1 + vector_exp(-gate[i])) * up[i];
    }
}

void decode_layer(const Layer *layer, const Attention *how, const Room *room, float *hidden,
                  long size, float *keys, float *values, int threads) {
    long rows = how->rows, inner = layer->gate_up.width / 2;
#pragma omp parallel num_threads(threads) if (threads > 1 && rows * size * inner >= LARGE)
    {
        rms_norm_team(hidden, layer->attention_norm, room->normed, rows, size,
                      layer->attention_eps);
        linear_team(&layer->query_key_value, room->normed, rows, size, room->mixed);
        attend_team(how, room->mixed, padded(layer->query_key_value.width), keys, values,
                    room->seen);
        linear_team(&layer->attention_out, room->seen, rows, how->heads * how->size, room->change);
        add_team(hidden, room->change, rows, size);
        rms_norm_team(hidden, layer->feed_forward_norm, room->normed, rows, size,
                      layer->feed_forward_eps);
        linear_team(&layer->gate_up, room->normed, rows, size, room->both);
        gate_team(room->both, rows, inner, room->gated);
        linear_team(&layer->down, room->gated, rows, inner, room->change);
        add_team(hidden, room->change, rows, size);
    }
}
