/* Looks up rows of blocks: pooled to bags, or one by one; and the gradient of the ids' weights. */

#include "rows.h"

/* Output beyond this size is not in a cache when it is read, and is written past it. */
#define LARGE_OUTPUT (16 << 20)

/* Magnitudes of floats order as their bits do; those of not-a-number are largest. */
#define MAGNITUDE 0x7fffffffu

/* Some neighbouring bags of a feature, which are a thread's. */
struct part {
    const struct block *block;
    const struct lookup *lookup;
    int64_t feature, first_bag, last_bag;
    float *gradient; /* of the ids' weights, where that is wanted */
    int streamed;    /* whether to write past the caches */
    vuint largest;   /* magnitudes of outputs so far, as bits */
};

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

INLINE void store_lanes(struct part *part, float *output, vfloat lanes)
{
    vuint bits = (vuint)lanes & MAGNITUDE, larger = (vuint)(bits > part->largest);
    part->largest = (bits & larger) | (part->largest & ~larger);
#if defined(__AVX512F__)
    if (part->streamed) {
        _mm512_stream_ps(output, (__m512)lanes);
        return;
    }
#endif
    *(vfloat *)output = lanes;
}

INLINE void store_one(struct part *part, float *output, float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    bits &= MAGNITUDE;
    part->largest[0] = bits > part->largest[0] ? bits : part->largest[0];
    *output = value;
}

INLINE const void *row_of(const struct block *block, int dtype, int64_t row)
{
    return (const char *)block->weight + row * block->width * size_of(dtype);
}

INLINE const void *row_at(const struct part *part, int dtype, int id_bytes, int64_t id)
{
    return row_of(part->block, dtype, whole(part->lookup->ids, id_bytes, id));
}

/* Columns [column, column + count) of a bag's sum; count is CHUNK or LANES. */
INLINE void pool_lanes(struct part *part, int dtype, int id_bytes, int weighted,
                       const int64_t ids[2], int64_t column, int count, float scale, float *output)
{
    vfloat sums[CHUNK / LANES] = {{0}};
    for (int64_t id = ids[0]; id < ids[1]; id++) {
        const void *row = row_at(part, dtype, id_bytes, id);
        for (int number = 0; number < count / LANES; number++) {
            vfloat lanes = load_lanes(row, dtype, column + number * LANES);
            if (weighted)
                lanes *= part->lookup->weights[id];
            sums[number] += lanes;
        }
    }
    for (int number = 0; number < count / LANES; number++)
        store_lanes(part, output + column + number * LANES, sums[number] * scale);
}

/* The last columns, fewer than LANES. */
INLINE void pool_rest(struct part *part, int dtype, int id_bytes, int weighted,
                      const int64_t ids[2], int64_t column, float scale, float *output)
{
    for (; column < part->block->width; column++) {
        float sum = 0;
        for (int64_t id = ids[0]; id < ids[1]; id++) {
            float value = load_one(row_at(part, dtype, id_bytes, id), dtype, column);
            sum += weighted ? value * part->lookup->weights[id] : value;
        }
        store_one(part, output + column, sum * scale);
    }
}

/* How many ids ahead of their use rows are prefetched. */
static int64_t ids_ahead(const struct part *part)
{
    int64_t fit = AHEAD_BYTES / (int64_t)(part->block->width * size_of(part->block->dtype)) + 1;
    return fit < AHEAD ? fit : AHEAD;
}

/* Checks the ids [first, last), and prefetches those that come so many after them, before `end`;
   returns a bad one's place, or -1. Where a row is not there, a prefetch does nothing. */
INLINE int64_t check_ids(const struct part *part, int dtype, int id_bytes, const int64_t ids[2],
                         int64_t ahead, int64_t end)
{
    for (int64_t id = ids[0]; id < ids[1]; id++) {
        int64_t row = whole(part->lookup->ids, id_bytes, id);
        if ((uint64_t)row >= (uint64_t)part->block->num_rows)
            return id;
        if (id + ahead < end)
            prefetch(row_at(part, dtype, id_bytes, id + ahead),
                     part->block->width * size_of(dtype));
    }
    return -1;
}

/* Where a feature's part of a pooled output begins, or of its gradient. */
INLINE float *pooled_output(const struct part *part)
{
    const struct block *block = part->block;
    return part->lookup->output + part->first_bag * part->lookup->stride + block->first_column +
           (part->feature - block->first_feature) * block->width;
}

INLINE int64_t pool(struct part *part, int dtype, int id_bytes, int weighted)
{
    const struct lookup *lookup = part->lookup;
    int64_t base = part->feature * lookup->num_bags, width = part->block->width;
    int64_t end = offset_at(lookup, base + part->last_bag), ahead = ids_ahead(part);
    int64_t ids[2] = {0, offset_at(lookup, base + part->first_bag)};
    float *output = pooled_output(part);
    for (int64_t bag = part->first_bag; bag < part->last_bag; bag++, output += lookup->stride) {
        ids[0] = ids[1];
        ids[1] = offset_at(lookup, base + bag + 1);
        int64_t bad = check_ids(part, dtype, id_bytes, ids, ahead, end);
        if (bad >= 0)
            return bad;
        int64_t length = ids[1] - ids[0], column = 0;
        float scale = lookup->pooling == MEAN && length > 1 ? 1.0f / length : 1.0f;
        for (; column + CHUNK <= width; column += CHUNK)
            pool_lanes(part, dtype, id_bytes, weighted, ids, column, CHUNK, scale, output);
        for (; column + LANES <= width; column += LANES)
            pool_lanes(part, dtype, id_bytes, weighted, ids, column, LANES, scale, output);
        pool_rest(part, dtype, id_bytes, weighted, ids, column, scale, output);
    }
    return -1;
}

static int64_t copy(struct part *part)
{
    const struct lookup *lookup = part->lookup;
    int dtype = part->block->dtype, id_bytes = lookup->id_bytes;
    int64_t base = part->feature * lookup->num_bags, width = part->block->width;
    int64_t id = offset_at(lookup, base + part->first_bag), ahead = ids_ahead(part);
    int64_t end = offset_at(lookup, base + part->last_bag);
    for (; id < end; id++) {
        if (check_ids(part, dtype, id_bytes, (int64_t[2]){id, id + 1}, ahead, end) >= 0)
            return id;
        const void *row = row_at(part, dtype, id_bytes, id);
        float *output = lookup->output + id * lookup->stride;
        int64_t column = 0;
        for (; column + LANES <= width; column += LANES)
            store_lanes(part, output + column, load_lanes(row, dtype, column));
        for (; column < width; column++)
            store_one(part, output + column, load_one(row, dtype, column));
    }
    return -1;
}

static int64_t weigh(struct part *part)
{
    const struct lookup *lookup = part->lookup;
    int dtype = part->block->dtype, id_bytes = lookup->id_bytes;
    int64_t base = part->feature * lookup->num_bags;
    int64_t id = offset_at(lookup, base + part->first_bag), ahead = ids_ahead(part);
    int64_t end = offset_at(lookup, base + part->last_bag);
    const float *output = pooled_output(part);
    for (int64_t bag = part->first_bag; bag < part->last_bag; bag++, output += lookup->stride)
        for (int64_t last = offset_at(lookup, base + bag + 1); id < last; id++) {
            check_ids(part, dtype, id_bytes, (int64_t[2]){id, id + 1}, ahead, end);
            const void *row = row_at(part, dtype, id_bytes, id);
            part->gradient[id] = dot(output, row, dtype, part->block->width);
        }
    return -1;
}

/* Pooling is by code that is made for the types. */
static int64_t run(struct part *part)
{
    if (part->gradient)
        return weigh(part);
    if (part->lookup->pooling == NO_POOLING)
        return copy(part);
    int weighted = part->lookup->weights != NULL;
#define CASE(DTYPE, BYTES)                                                                         \
    if (part->block->dtype == DTYPE && part->lookup->id_bytes == BYTES)                            \
        return weighted ? pool(part, DTYPE, BYTES, 1) : pool(part, DTYPE, BYTES, 0);
    CASE(FLOAT32, 8)
    CASE(FLOAT32, 4)
    CASE(FLOAT16, 8)
    CASE(FLOAT16, 4)
    CASE(BFLOAT16, 8)
    CASE(BFLOAT16, 4)
#undef CASE
    return -1;
}

static int can_stream(const struct block *blocks, int num_blocks, const struct lookup *lookup)
{
    int64_t bags = lookup->num_bags;
    int64_t num_outputs =
        lookup->pooling == NO_POOLING ? offset_at(lookup, bags * lookup->num_features) : bags;
    int whole_lines = num_outputs * lookup->stride * 4 > LARGE_OUTPUT &&
                      (uintptr_t)lookup->output % LINE == 0 && lookup->stride % LANES == 0;
    for (int number = 0; number < num_blocks; number++)
        whole_lines &= blocks[number].first_column % LANES == 0 &&
                       blocks[number].width % LANES == 0;
    return whole_lines;
}

/* The bags [begin, end), which are numbered feature after feature; the place of a bad id, or -1. */
static int64_t run_bags(struct part *part, const struct block *blocks, int num_blocks,
                        int64_t begin, int64_t end)
{
    int64_t bags = part->lookup->num_bags;
    for (int number = 0; number < num_blocks; number++)
        for (int64_t of = 0; of < blocks[number].num_features; of++) {
            int64_t feature = blocks[number].first_feature + of;
            int64_t first = begin - feature * bags, last = end - feature * bags;
            part->block = &blocks[number];
            part->feature = feature;
            part->first_bag = first < 0 ? 0 : first;
            part->last_bag = last > bags ? bags : last;
            int64_t bad = part->first_bag < part->last_bag ? run(part) : -1;
            if (bad >= 0)
                return bad;
        }
    return -1;
}

/* All features; the place of an id that its block does not have, or -1. */
static int64_t run_all(const struct block *blocks, int num_blocks, const struct lookup *lookup,
                       float *gradient, float *largest, int num_threads)
{
    int64_t found = INT64_MAX;
    uint32_t highest = 0;
    int streamed = !gradient && can_stream(blocks, num_blocks, lookup);
#pragma omp parallel for num_threads(num_threads) reduction(min : found) reduction(max : highest) \
    schedule(static, 1)
    for (int thread = 0; thread < num_threads; thread++) {
        struct part part = {.lookup = lookup, .gradient = gradient, .streamed = streamed};
        int64_t begin = bag_of_part(lookup, thread, num_threads);
        int64_t end = bag_of_part(lookup, thread + 1, num_threads);
        int64_t bad = run_bags(&part, blocks, num_blocks, begin, end);
        if (bad >= 0 && bad < found)
            found = bad;
        for (int lane = 0; lane < LANES; lane++)
            highest = part.largest[lane] > highest ? part.largest[lane] : highest;
#if defined(__AVX512F__)
        _mm_sfence(); /* what was streamed is there before the threads meet */
#endif
    }
    if (largest)
        memcpy(largest, &highest, sizeof highest);
    return found == INT64_MAX ? -1 : found;
}

/* Writes lookup->output: pooled rows, or each id's; and its largest magnitude, which is not finite
   where any is not. */
int64_t se_look_up(const struct block *blocks, int num_blocks, const struct lookup *lookup,
                   float *largest, int num_threads)
{
    return run_all(blocks, num_blocks, lookup, NULL, largest, num_threads);
}

/* The gradient of a sum's weights [N], where lookup->output is the gradient of the output, and
   se_look_up found all ids to be rows. */
void se_weigh(const struct block *blocks, int num_blocks, const struct lookup *lookup,
              float *gradient, int num_threads)
{
    run_all(blocks, num_blocks, lookup, gradient, NULL, num_threads);
}
