/* Rows of float32, float16 or bfloat16 in blocks of tables, and the bags that look them up. */

#ifndef SHARDEMB_ROWS_H
#define SHARDEMB_ROWS_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define LANES 16
#define CHUNK 64 /* columns whose sums stay in registers */
#define AHEAD 96 /* ids between the prefetch of a row and its use, at most */
#define AHEAD_BYTES (32 << 10) /* of rows that are on their way: they are to stay in the cache */
#define LINE 64 /* bytes that memory brings at once */

enum { FLOAT32, FLOAT16, BFLOAT16 };
enum { NO_POOLING, SUM, MEAN };

/* Sums are of sixteen lanes on every machine, so that results do not depend on its level. */
typedef float vfloat __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float veight __attribute__((vector_size(32), aligned(4), may_alias));
typedef float vfour __attribute__((vector_size(16), aligned(4), may_alias));
typedef int32_t vint __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t vuint __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t vhalf __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

/* A block of a table; `_Block` in kernels.py. */
struct block {
    void *weight;         /* [num_rows, width] of dtype */
    int64_t num_rows;
    int64_t first_column; /* of its first feature in a pooled output */
    int32_t width;
    int32_t dtype;
    int32_t first_feature;
    int32_t num_features;
};

/* Bags of ids by features, with their output or its gradient; `_Lookup` in kernels.py. */
struct lookup {
    const void *ids;      /* local rows, feature after feature [N] */
    const void *offsets;  /* where bags begin, and the last ends [num_features * num_bags + 1] */
    const float *weights; /* of the ids [N], or NULL */
    float *output;        /* pooled [num_bags, stride], else [N, stride] */
    int64_t stride;
    int64_t num_bags;     /* of each feature */
    int32_t id_bytes;
    int32_t offset_bytes;
    int32_t pooling;
    int32_t num_features;
};

/* Columns that suffice for a row of any of some blocks, whole lanes. */
INLINE int64_t widest(const struct block *blocks, int num_blocks)
{
    int64_t width = 1;
    for (int number = 0; number < num_blocks; number++)
        width = blocks[number].width > width ? blocks[number].width : width;
    return (width + LANES - 1) / LANES * LANES;
}

INLINE int64_t whole(const void *values, int bytes, int64_t index)
{
    return bytes == 8 ? ((const int64_t *)values)[index] : ((const int32_t *)values)[index];
}

INLINE int64_t offset_at(const struct lookup *lookup, int64_t bag)
{
    return whole(lookup->offsets, lookup->offset_bytes, bag);
}

INLINE size_t size_of(int dtype) { return dtype == FLOAT32 ? 4 : 2; }

INLINE float float_of_half(uint16_t half)
{
    union { uint32_t bits; float value; } scaled = {(uint32_t)(half & 0x7fff) << 13};
    scaled.value *= 0x1p112f; /* the difference of the exponents' biases; right for subnormals */
    if ((half & 0x7c00) == 0x7c00)
        scaled.bits |= 0x7f800000u;
    scaled.bits |= (uint32_t)(half & 0x8000) << 16;
    return scaled.value;
}

INLINE float float_of_brain(uint16_t brain)
{
    union { uint32_t bits; float value; } wide = {(uint32_t)brain << 16};
    return wide.value;
}

/* The same of sixteen. */
INLINE vfloat floats_of_halves(vuint halves)
{
    vfloat scaled = (vfloat)((halves & 0x7fff) << 13) * 0x1p112f;
    vuint is_special = (vuint)((halves & 0x7c00) == 0x7c00);
    return (vfloat)((vuint)scaled | (is_special & 0x7f800000u) | (halves & 0x8000) << 16);
}

/* Sixteen columns. */
INLINE vfloat load_lanes(const void *row, int dtype, int64_t column)
{
    if (dtype == FLOAT32)
        return *(const vfloat *)((const float *)row + column);
    const uint16_t *half = (const uint16_t *)row + column;
    if (dtype == BFLOAT16)
        return (vfloat)(__builtin_convertvector(*(const vhalf *)half, vuint) << 16);
#if defined(__AVX512F__)
    return (vfloat)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)half));
#else
    return floats_of_halves(__builtin_convertvector(*(const vhalf *)half, vuint));
#endif
}

INLINE float load_one(const void *row, int dtype, int64_t column)
{
    if (dtype == FLOAT32)
        return ((const float *)row)[column];
    uint16_t half = ((const uint16_t *)row)[column];
    return dtype == FLOAT16 ? float_of_half(half) : float_of_brain(half);
}

INLINE void prefetch(const void *row, size_t bytes)
{
    for (size_t byte = 0; byte < bytes; byte += LINE)
        __builtin_prefetch((const char *)row + byte, 0, 3);
}

/* The sum of the lanes, halves by halves. */
INLINE float total(vfloat lanes)
{
    union { vfloat sixteen; veight eights[2]; } all = {lanes};
    union { veight eight; vfour fours[2]; } half = {all.eights[0] + all.eights[1]};
    vfour four = half.fours[0] + half.fours[1];
    return (four[0] + four[2]) + (four[1] + four[3]);
}

/* The sum of products of two rows, in a fixed order. */
INLINE float dot(const float *left, const void *right, int dtype, int64_t width)
{
    vfloat lanes = {0};
    int64_t column = 0;
    for (; column + LANES <= width; column += LANES)
        lanes += load_lanes(left, FLOAT32, column) * load_lanes(right, dtype, column);
    float sum = total(lanes);
    for (; column < width; column++)
        sum += left[column] * load_one(right, dtype, column);
    return sum;
}

#endif
