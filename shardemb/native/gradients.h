/* The gradient of a row: the sum of those of its ids. */

#ifndef SHARDEMB_GRADIENTS_H
#define SHARDEMB_GRADIENTS_H

#include "sort.h"

#define GRADIENTS_AHEAD 32 /* ids between the prefetch of a gradient and its use */

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

/* Adds an id's gradient to the sum of its row. */
INLINE void add_gradient(const struct block_sources *its, int plain, entry one, int64_t width,
                         float *sum)
{
    float scale = 1.0f;
    const float *gradient =
        plain ? its->sources[0].gradient + source_of_entry(one) * its->sources[0].stride
              : gradient_of(its, one, &scale);
    int64_t part = 0;
    for (; (part + 1) * LANES <= width; part++) {
        vfloat own = load_lanes(gradient, FLOAT32, part * LANES);
        if (!plain)
            own *= scale;
        *(vfloat *)(sum + part * LANES) += own;
    }
    for (int64_t column = part * LANES; column < width; column++)
        sum[column] += gradient[column] * scale;
}

/* Whether an entry is the last of its row; ids of a row are neighbours. A loop over ids that asks
   this mispredicts one branch where loops over rows and then over their ids mispredict several. */
INLINE int ends_row(const struct unit *unit, int64_t id)
{
    return id + 1 == unit->count ||
           row_of_entry(unit->entries[id + 1]) != row_of_entry(unit->entries[id]);
}

INLINE void prefetch_gradient(const struct block_sources *its, entry one, int64_t width)
{
    float scale;
    prefetch(gradient_of(its, one, &scale), width * sizeof(float));
}

#endif
