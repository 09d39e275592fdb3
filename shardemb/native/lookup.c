/* Looks up rows of blocks: pooled to bags, or one by one; and the gradient of the ids' weights. */

#include "rows.h"

/* Output beyond this size is not in a cache when it is read, and is written past it. */
#define LARGE_OUTPUT (16 << 20)

/* The bag at which a part of the work begins, if ids and bags cost the same. */
static int64_t bag_of_part(const struct lookup *lookup, int part, int parts)
{
    int64_t bags = lookup->num_bags * lookup->num_features;
    int64_t wanted = (offset_at(lookup, bags) - offset_at(lookup, 0) + bags) * part / parts;
    int64_t low = 0, high = bags;
    while (low < high) {
        int64_t middle = (low + high) / 2;
        if (offset_at(lookup, middle) - offset_at(lookup, 0) + middle < wanted)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

INLINE void store_lanes(float *output, vfloat lanes, int streamed)
{
#if defined(__AVX512F__)
    if (streamed) {
        _mm512_stream_ps(output, (__m512)lanes);
        return;
    }
#endif
    (void)streamed;
    *(vfloat *)output = lanes;
}

INLINE const void *row_of(const struct block *block, int dtype, int64_t row)
{
    return (const char *)block->weight + row * block->width * size_of(dtype);
}

/* Columns [column, column + count) of a bag's sum; count is CHUNK or LANES. */
INLINE void pool_lanes(const struct block *block, const struct lookup *lookup, int dtype,
                       int id_bytes, int weighted, const int64_t ids[2], int64_t column, int count,
                       float scale, float *output, int streamed)
{
    vfloat sums[CHUNK / LANES] = {{0}};
    for (int64_t id = ids[0]; id < ids[1]; id++) {
        const void *row = row_of(block, dtype, whole(lookup->ids, id_bytes, id));
        for (int part = 0; part < count / LANES; part++) {
            vfloat lanes = load_lanes(row, dtype, column + part * LANES);
            if (weighted)
                lanes *= lookup->weights[id];
            sums[part] += lanes;
        }
    }
    for (int part = 0; part < count / LANES; part++)
        store_lanes(output + column + part * LANES, sums[part] * scale, streamed);
}

/* The last columns, fewer than LANES. */
INLINE void pool_rest(const struct block *block, const struct lookup *lookup, int dtype,
                      int id_bytes, int weighted, const int64_t ids[2], int64_t column, float scale,
                      float *output)
{
    for (; column < block->width; column++) {
        float sum = 0;
        for (int64_t id = ids[0]; id < ids[1]; id++) {
            const void *row = row_of(block, dtype, whole(lookup->ids, id_bytes, id));
            float value = load_one(row, dtype, column);
            sum += weighted ? value * lookup->weights[id] : value;
        }
        output[column] = sum * scale;
    }
}

/* Checks and prefetches the ids up to AHEAD of a bag's; returns a bad id's place or -1. */
INLINE int64_t look_ahead(const struct block *block, const struct lookup *lookup, int dtype,
                          int id_bytes, int64_t *seen, int64_t until, int64_t end)
{
    int64_t bad = -1;
    if (until > end)
        until = end;
    for (; *seen < until; (*seen)++) {
        int64_t row = whole(lookup->ids, id_bytes, *seen);
        if ((uint64_t)row >= (uint64_t)block->num_rows) {
            bad = *seen;
            break;
        }
        prefetch(row_of(block, dtype, row), block->width * size_of(dtype));
    }
    return bad;
}

INLINE int64_t pool_feature(const struct block *block, const struct lookup *lookup, int dtype,
                            int id_bytes, int weighted, int64_t feature, int64_t first_bag,
                            int64_t last_bag, int streamed)
{
    int64_t base = feature * lookup->num_bags;
    int64_t end = offset_at(lookup, base + last_bag);
    int64_t seen = offset_at(lookup, base + first_bag);
    float *output = lookup->output + first_bag * lookup->stride + block->first_column +
                    (feature - block->first_feature) * block->width;
    int64_t ids[2] = {seen, seen};
    for (int64_t bag = first_bag; bag < last_bag; bag++, output += lookup->stride) {
        ids[0] = ids[1];
        ids[1] = offset_at(lookup, base + bag + 1);
        int64_t bad = look_ahead(block, lookup, dtype, id_bytes, &seen, ids[1] + AHEAD, end);
        if (bad >= 0)
            return bad;
        int64_t length = ids[1] - ids[0];
        float scale = lookup->pooling == MEAN && length > 1 ? 1.0f / length : 1.0f;
        int64_t column = 0;
        for (; column + CHUNK <= block->width; column += CHUNK)
            pool_lanes(block, lookup, dtype, id_bytes, weighted, ids, column, CHUNK, scale, output,
                       streamed);
        for (; column + LANES <= block->width; column += LANES)
            pool_lanes(block, lookup, dtype, id_bytes, weighted, ids, column, LANES, scale, output,
                       streamed);
        pool_rest(block, lookup, dtype, id_bytes, weighted, ids, column, scale, output);
    }
    return -1;
}

INLINE int64_t copy_rows(const struct block *block, const struct lookup *lookup, int dtype,
                         int id_bytes, int64_t feature, int64_t first_bag, int64_t last_bag,
                         int streamed)
{
    int64_t base = feature * lookup->num_bags;
    int64_t id = offset_at(lookup, base + first_bag), end = offset_at(lookup, base + last_bag);
    int64_t seen = id;
    for (; id < end; id++) {
        int64_t bad = look_ahead(block, lookup, dtype, id_bytes, &seen, id + AHEAD, end);
        if (bad >= 0)
            return bad;
        const void *row = row_of(block, dtype, whole(lookup->ids, id_bytes, id));
        float *output = lookup->output + id * lookup->stride;
        int64_t column = 0;
        for (; column + LANES <= block->width; column += LANES)
            store_lanes(output + column, load_lanes(row, dtype, column), streamed);
        for (; column < block->width; column++)
            output[column] = load_one(row, dtype, column);
    }
    return -1;
}

INLINE int64_t weigh(const struct block *block, const struct lookup *lookup, int dtype,
                     int id_bytes, int64_t feature, int64_t first_bag, int64_t last_bag,
                     float *gradient)
{
    int64_t base = feature * lookup->num_bags;
    int64_t end = offset_at(lookup, base + last_bag);
    int64_t id = offset_at(lookup, base + first_bag), seen = id;
    const float *output = lookup->output + first_bag * lookup->stride + block->first_column +
                          (feature - block->first_feature) * block->width;
    for (int64_t bag = first_bag; bag < last_bag; bag++, output += lookup->stride)
        for (int64_t last = offset_at(lookup, base + bag + 1); id < last; id++) {
            look_ahead(block, lookup, dtype, id_bytes, &seen, id + AHEAD, end);
            const void *row = row_of(block, dtype, whole(lookup->ids, id_bytes, id));
            gradient[id] = dot(output, row, dtype, block->width);
        }
    return -1;
}

enum { POOL, COPY, WEIGH };

INLINE int64_t run(int what, const struct block *block, const struct lookup *lookup, int dtype,
                   int id_bytes, int64_t feature, int64_t first, int64_t last, float *gradient,
                   int streamed)
{
    if (what == COPY)
        return copy_rows(block, lookup, dtype, id_bytes, feature, first, last, streamed);
    if (what == WEIGH)
        return weigh(block, lookup, dtype, id_bytes, feature, first, last, gradient);
    if (lookup->weights)
        return pool_feature(block, lookup, dtype, id_bytes, 1, feature, first, last, streamed);
    return pool_feature(block, lookup, dtype, id_bytes, 0, feature, first, last, streamed);
}

/* A part of a feature's bags, by code that is made for the types. */
static int64_t run_typed(int what, const struct block *block, const struct lookup *lookup,
                         int64_t feature, int64_t first, int64_t last, float *gradient,
                         int streamed)
{
#define CASE(DTYPE, BYTES)                                                                         \
    if (block->dtype == DTYPE && lookup->id_bytes == BYTES)                                        \
        return run(what, block, lookup, DTYPE, BYTES, feature, first, last, gradient, streamed);
    CASE(FLOAT32, 8)
    CASE(FLOAT32, 4)
    CASE(FLOAT16, 8)
    CASE(FLOAT16, 4)
    CASE(BFLOAT16, 8)
    CASE(BFLOAT16, 4)
#undef CASE
    return -1;
}

static int can_stream(const struct block *blocks, int num_blocks, const struct lookup *lookup,
                      int64_t num_outputs)
{
    int whole_lines = num_outputs * lookup->stride * 4 > LARGE_OUTPUT &&
                      (uintptr_t)lookup->output % LINE == 0 && lookup->stride % LANES == 0;
    for (int number = 0; number < num_blocks; number++)
        whole_lines &= blocks[number].first_column % LANES == 0 &&
                       blocks[number].width % LANES == 0;
    return whole_lines;
}

/* All features; returns the place of an id that its block does not have, or -1. */
static int64_t run_all(int what, const struct block *blocks, int num_blocks,
                       const struct lookup *lookup, float *gradient, int num_threads)
{
    int64_t bags = lookup->num_bags, found = INT64_MAX;
    int64_t num_outputs =
        what == COPY ? offset_at(lookup, bags * lookup->num_features) : bags;
    int streamed = what != WEIGH && can_stream(blocks, num_blocks, lookup, num_outputs);
#pragma omp parallel for num_threads(num_threads) reduction(min : found) schedule(static, 1)
    for (int part = 0; part < num_threads; part++) {
        int64_t begin = bag_of_part(lookup, part, num_threads);
        int64_t end = bag_of_part(lookup, part + 1, num_threads);
        for (int number = 0; number < num_blocks; number++) {
            const struct block *block = &blocks[number];
            for (int64_t of = 0; of < block->num_features; of++) {
                int64_t feature = block->first_feature + of;
                int64_t first = begin - feature * bags, last = end - feature * bags;
                first = first < 0 ? 0 : first;
                last = last > bags ? bags : last;
                if (first >= last)
                    continue;
                int64_t bad =
                    run_typed(what, block, lookup, feature, first, last, gradient, streamed);
                if (bad >= 0 && bad < found)
                    found = bad;
            }
        }
#if defined(__AVX512F__)
        _mm_sfence();
#endif
    }
    return found == INT64_MAX ? -1 : found;
}

/* Writes lookup->output: pooled rows, or each id's. */
int64_t se_look_up(const struct block *blocks, int num_blocks, const struct lookup *lookup,
                   int num_threads)
{
    int what = lookup->pooling == NO_POOLING ? COPY : POOL;
    return run_all(what, blocks, num_blocks, lookup, NULL, num_threads);
}

/* The gradient of a sum's weights [N], where lookup->output is the gradient of the output. */
void se_weigh(const struct block *blocks, int num_blocks, const struct lookup *lookup,
              float *gradient, int num_threads)
{
    run_all(WEIGH, blocks, num_blocks, lookup, gradient, num_threads);
}
