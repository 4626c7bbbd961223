/* Runs one layer of fixed_point.h: int8 codes in, int8 codes out, batch 1, channels last (HWC).
 *
 *     cc -O2 -std=c99 -o fixed_point_layer fixed_point_layer.c
 *     ./fixed_point_layer                                    lists the layers
 *     ./fixed_point_layer NAME HEIGHT WIDTH < in.raw > out.raw
 *
 * A matrix product is a 1 x 1 convolution: HEIGHT rows, WIDTH 1. The arithmetic is that of TFLite and CMSIS-NN: int32
 * sums, then an int32 multiplier and a shift, in two roundings. Exit code 2 for a wrong command or too little input.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "fixed_point.h"

/* sum * multiplier * 2^(shift - 31): to nearest, ties upwards; then the right shift, ties away from zero. */
static int32_t multiply_by_quantized_multiplier(int32_t sum, int32_t multiplier, int32_t shift)
{
    int64_t shifted = sum;
    int64_t high;
    if (shift > 0) {
        shifted = shifted * ((int64_t)1 << shift);
        if (shifted > INT32_MAX) shifted = INT32_MAX;
        if (shifted < INT32_MIN) shifted = INT32_MIN;
    }
    high = shifted * multiplier + ((int64_t)1 << 30);
    high = high >= 0 ? high >> 31 : -((-high + ((int64_t)1 << 31) - 1) >> 31); /* floor */
    if (shift < 0) {
        const int64_t half = (int64_t)1 << (-shift - 1);
        high = high >= 0 ? (high + half) >> -shift : -((-high + half) >> -shift);
    }
    return (int32_t)high;
}

/* Code number `index` of packed weights: 8, 4 or 2 bits, the first code in the lowest bits of a byte. */
static int32_t weight_at(const pq_layer *layer, size_t index)
{
    const size_t per_byte = 8u / layer->weight_bits;
    const unsigned byte = layer->weights[index / per_byte];
    if (per_byte == 1) return (int8_t)byte;
    return layer->table[(byte >> (layer->weight_bits * (index % per_byte))) & ((1u << layer->weight_bits) - 1u)];
}

/* Position of a weight: (output, row, column, input of the group), or (row, column, output) of a depthwise layer. */
static size_t weight_index(const pq_layer *layer, int32_t output, int32_t row, int32_t column, int32_t input)
{
    const int32_t inputs = layer->in_channels / layer->groups;
    if (layer->layout == PQ_HWC)
        return ((size_t)row * layer->kernel_w + column) * layer->out_channels + output;
    return (((size_t)output * layer->kernel_h + row) * layer->kernel_w + column) * inputs + input;
}

static int32_t sum_at(const pq_layer *layer, const int8_t *in, int32_t height, int32_t width, int32_t y, int32_t x,
                      int32_t output)
{
    const int32_t inputs = layer->in_channels / layer->groups;
    const int32_t first = output / (layer->out_channels / layer->groups) * inputs;
    int32_t sum = layer->bias[output];
    int32_t row, column, input;
    for (row = 0; row < layer->kernel_h; row++) {
        const int32_t in_y = y * layer->stride_h - layer->pad_top + row * layer->dilation_h;
        if (in_y < 0 || in_y >= height) continue; /* padding is the real value 0 */
        for (column = 0; column < layer->kernel_w; column++) {
            const int32_t in_x = x * layer->stride_w - layer->pad_left + column * layer->dilation_w;
            const int8_t *pixel;
            if (in_x < 0 || in_x >= width) continue;
            pixel = in + ((size_t)in_y * width + in_x) * layer->in_channels + first;
            for (input = 0; input < inputs; input++)
                sum += (pixel[input] + layer->input_offset) *
                       weight_at(layer, weight_index(layer, output, row, column, input));
        }
    }
    return sum;
}

static int32_t output_size(int32_t size, int32_t pads, int32_t kernel, int32_t dilation, int32_t stride)
{
    return (size + pads - (kernel - 1) * dilation - 1) / stride + 1;
}

static int run(const pq_layer *layer, int32_t height, int32_t width)
{
    const int32_t out_h = output_size(height, layer->pad_top + layer->pad_bottom, layer->kernel_h, layer->dilation_h,
                                      layer->stride_h);
    const int32_t out_w = output_size(width, layer->pad_left + layer->pad_right, layer->kernel_w, layer->dilation_w,
                                      layer->stride_w);
    const size_t in_bytes = (size_t)height * width * layer->in_channels;
    int8_t *in = malloc(in_bytes);
    int32_t y, x, output;
    if (in == NULL || fread(in, 1, in_bytes, stdin) != in_bytes) {
        fprintf(stderr, "%s reads %lu bytes of input\n", layer->name, (unsigned long)in_bytes);
        free(in);
        return 2;
    }
    for (y = 0; y < out_h; y++) {
        for (x = 0; x < out_w; x++) {
            for (output = 0; output < layer->out_channels; output++) {
                int64_t code = multiply_by_quantized_multiplier(sum_at(layer, in, height, width, y, x, output),
                                                                layer->multiplier[output], layer->shift[output]);
                code += layer->output_offset;
                if (code < layer->activation_min) code = layer->activation_min;
                if (code > layer->activation_max) code = layer->activation_max;
                putchar((int)((uint8_t)code));
            }
        }
    }
    free(in);
    return fflush(stdout) == 0 ? 0 : 2;
}

int main(int argc, char **argv)
{
    size_t index;
    if (argc == 1) {
        for (index = 0; index < PQ_LAYER_COUNT; index++)
            printf("%s: %ld channels in, %ld out, kernel %ld x %ld, weights of %d bits\n", pq_layers[index].name,
                   (long)pq_layers[index].in_channels, (long)pq_layers[index].out_channels,
                   (long)pq_layers[index].kernel_h, (long)pq_layers[index].kernel_w, pq_layers[index].weight_bits);
        return 0;
    }
    for (index = 0; argc == 4 && index < PQ_LAYER_COUNT; index++) {
        const long height = strtol(argv[2], NULL, 10), width = strtol(argv[3], NULL, 10);
        if (strcmp(pq_layers[index].name, argv[1]) == 0 && height > 0 && width > 0 && height < 65536 && width < 65536)
            return run(&pq_layers[index], (int32_t)height, (int32_t)width);
    }
    fprintf(stderr, "usage: %s NAME HEIGHT WIDTH < in.raw > out.raw\n", argv[0]);
    return 2;
}
