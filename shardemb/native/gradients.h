/* The gradient of a row: the sum of those of its ids. */

#ifndef SHARDEMB_GRADIENTS_H
#define SHARDEMB_GRADIENTS_H

#include "sort.h"

INLINE const struct source *source_at(const struct block_sources *its, uint32_t number)
{
    const struct source *source = its->sources;
    for (int32_t next = 1; next < its->count && its->sources[next].first <= number; next++)
        source = &its->sources[next];
    return source;
}

/* An id's gradient, and what it is multiplied by. */
INLINE const float *gradient_of(const struct block_sources *its, entry one, float *scale)
{
    uint32_t number = source_of_entry(one);
    *scale = 1.0f;
    if (its->bags) {
        *scale = its->weights[number];
        number = its->bags[number];
    }
    const struct source *source = source_at(its, number);
    int64_t of = number - source->first;
    if (source->lookup) {
        int64_t bag = source->base + of;
        *scale /= (float)(offset_at(source->lookup, bag + 1) - offset_at(source->lookup, bag));
    }
    return source->gradient + of * source->stride;
}

/* Whether all gradients of a block's ids are a stride apart, and none is multiplied by anything. */
INLINE int is_plain(const struct block_sources *its)
{
    return its->count == 1 && !its->bags && !its->sources[0].lookup;
}

INLINE void sum_lanes(const struct block_sources *its, const entry *entries, int64_t count,
                      int64_t column, int lanes, int plain, float *sum)
{
    vfloat sums[CHUNK / LANES] = {{0}};
    const float *first = its->sources[0].gradient;
    int64_t stride = its->sources[0].stride;
    int scaled = !plain && (its->bags || its->sources[0].lookup);
    for (int64_t id = 0; id < count; id++) {
        float scale = 1.0f;
        const float *gradient = plain ? first + source_of_entry(entries[id]) * stride
                                      : gradient_of(its, entries[id], &scale);
        gradient += column;
        for (int part = 0; part < lanes / LANES; part++) {
            vfloat own = load_lanes(gradient, FLOAT32, part * LANES);
            if (scaled)
                own *= scale;
            sums[part] += own;
        }
    }
    for (int part = 0; part < lanes / LANES; part++)
        *(vfloat *)(sum + column + part * LANES) = sums[part];
}

/* The sum of a row's gradients, in the order of its ids. */
INLINE void sum_gradients(const struct block_sources *its, const entry *entries, int64_t count,
                          int64_t width, float *sum)
{
    int64_t column = 0;
    int plain = is_plain(its);
    for (; column + CHUNK <= width; column += CHUNK)
        if (plain)
            sum_lanes(its, entries, count, column, CHUNK, 1, sum);
        else
            sum_lanes(its, entries, count, column, CHUNK, 0, sum);
    for (; column + LANES <= width; column += LANES)
        sum_lanes(its, entries, count, column, LANES, 0, sum);
    if (column == width)
        return;
    for (int64_t rest = column; rest < width; rest++)
        sum[rest] = 0;
    for (int64_t id = 0; id < count; id++) {
        float scale;
        const float *gradient = gradient_of(its, entries[id], &scale);
        for (int64_t rest = column; rest < width; rest++)
            sum[rest] += gradient[rest] * scale;
    }
}

INLINE int64_t same_row(const entry *entries, int64_t index, int64_t count)
{
    int64_t row = row_of_entry(entries[index]), end = index + 1;
    while (end < count && row_of_entry(entries[end]) == row)
        end++;
    return end;
}

INLINE void prefetch_gradient(const struct block_sources *its, entry one, int64_t width)
{
    float scale;
    prefetch(gradient_of(its, one, &scale), width * sizeof(float));
}

#endif
