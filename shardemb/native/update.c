/* Updates the rows that a step looked up: sums each row's gradients, and applies its optimizer. */

#include <float.h>
#include <omp.h>
#include <stdlib.h>

#include "gradients.h"
#include "optimizers.h"
#include "rounding.h"

#define ROWS_AHEAD 64 /* ids between the prefetch of a row and its use */

/* How many floats of a state each row has; 0: there is no such state. */
INLINE int64_t momentum_size(const struct training *how, int64_t width)
{
    return !how->momentum ? 0 : how->optimizer == ROW_WISE_ADAGRAD ? 1 : width;
}

INLINE int64_t square_size(const struct training *how, int64_t width)
{
    return !how->square ? 0 : has_partial_moments(how) ? 1 : width;
}

INLINE char *place_of(const struct block *block, int64_t number, int64_t width)
{
    return (char *)block->weight + number * width * size_of(block->dtype);
}

INLINE void load_state(float *loaded, const float *state, int64_t number, int64_t size)
{
    if (size)
        memcpy(loaded, state + number * size, size * sizeof(float));
}

INLINE void store_state(const float *loaded, float *state, int64_t number, int64_t size)
{
    if (size)
        memcpy(state + number * size, loaded, size * sizeof(float));
}

INLINE void load_row(const struct block *block, const struct training *how, int64_t number,
                     const struct row *row, vhalf *halves)
{
    const char *from = place_of(block, number, row->width);
    if (block->dtype == FLOAT32)
        memcpy(row->weight, from, row->width * sizeof(float));
    else {
        memcpy(halves, from, row->width * sizeof(uint16_t));
        for (int64_t part = 0; part * LANES < row->width; part++)
            row->weight[part] = load_lanes(halves, block->dtype, part * LANES);
    }
    load_state((float *)row->momentum, how->momentum, number, momentum_size(how, row->width));
    load_state((float *)row->square, how->square, number, square_size(how, row->width));
}

/* Whether no exponent has all bits; lanes beyond the count are looked at one by one. */
INLINE int all_finite(const vfloat *values, int64_t count)
{
    vint bad = {0};
    int64_t part = 0;
    for (; (part + 1) * LANES <= count; part++)
        bad |= ((vint)values[part] & 0x7f800000) == 0x7f800000;
#if defined(__AVX512F__)
    int finite = _mm512_test_epi32_mask((__m512i)bad, (__m512i)bad) == 0;
#else
    int32_t any = 0;
    for (int lane = 0; lane < LANES; lane++)
        any |= bad[lane];
    int finite = any == 0;
#endif
    for (int64_t index = part * LANES; index < count; index++)
        finite &= fabsf(((const float *)values)[index]) <= FLT_MAX;
    return finite;
}

/* Rounds a row to 16 bits; it becomes what those say. */
INLINE void round_row(const struct block *block, const struct training *how, int64_t number,
                      const struct row *row, vhalf *halves)
{
    uint64_t of_row = drawn((uint64_t)how->key, (uint64_t)(number + how->first_row));
    uint64_t seed = drawn(of_row, (uint64_t)how->num_updates);
    for (int64_t part = 0; part * LANES < row->width; part++) {
        vuint random = {0};
        if (how->stochastic)
            random = drawn_lanes(seed, how->first_column + part * LANES);
        halves[part] = round_lanes(row->weight[part], block->dtype, how->stochastic, random);
        row->weight[part] = load_lanes(halves, block->dtype, part * LANES);
    }
}

/* Writes a row and its state, if all of it is finite and they are to be written; whether it is. */
INLINE int store_row(const struct block *block, const struct training *how, int64_t number,
                     const struct row *row, vhalf *halves, int dry)
{
    int64_t momentum = momentum_size(how, row->width), square = square_size(how, row->width);
    if (block->dtype != FLOAT32)
        round_row(block, how, number, row, halves);
    int finite = all_finite(row->weight, row->width) && all_finite(row->momentum, momentum) &&
                 all_finite(row->square, square);
    if (!finite || dry)
        return finite;
    if (block->dtype == FLOAT32)
        memcpy(place_of(block, number, row->width), row->weight, row->width * sizeof(float));
    else
        memcpy(place_of(block, number, row->width), halves, row->width * sizeof(uint16_t));
    store_state((const float *)row->momentum, how->momentum, number, momentum);
    store_state((const float *)row->square, how->square, number, square);
    return 1;
}

INLINE void prefetch_row(const struct block *block, const struct training *how, int64_t number,
                         const struct row *row)
{
    int64_t momentum = momentum_size(how, row->width), square = square_size(how, row->width);
    prefetch(place_of(block, number, row->width), row->width * size_of(block->dtype));
    prefetch(how->momentum + number * momentum, momentum * sizeof(float));
    prefetch(how->square + number * square, square * sizeof(float));
}

static int moves(const struct training *how, int64_t row)
{
    return row + how->first_row >= how->frozen_rows && row + how->first_row != how->padding_row;
}

/* Brings a row, whose gradients are summed, to its new values; whether those are finite. */
INLINE int finish_row(const struct block *block, const struct training *how, int64_t number,
                      const struct row *row, vhalf *halves, int dry)
{
    if (how->scale != 1.0)
        for (int64_t part = 0; part * LANES < row->width; part++)
            row->gradient[part] *= (float)how->scale;
    load_row(block, how, number, row, halves);
    apply(how, row);
    return store_row(block, how, number, row, halves, dry);
}

/* Updates a unit's rows; returns the first that would not be finite, or -1. */
INLINE int64_t update_unit(const struct block *block, const struct training *how,
                           const struct block_sources *its, const struct unit *unit,
                           const struct row *row, vhalf *halves, int dry)
{
    int plain = is_plain(its);
    int64_t bad = -1;
    float *sum = (float *)row->gradient;
    memset(sum, 0, row->width * sizeof(float));
    for (int64_t id = 0; id < unit->count; id++) {
        entry one = unit->entries[id];
        if (id + GRADIENTS_AHEAD < unit->count)
            prefetch_gradient(its, unit->entries[id + GRADIENTS_AHEAD], row->width);
        if (id + ROWS_AHEAD < unit->count)
            prefetch_row(block, how, row_of_entry(unit->entries[id + ROWS_AHEAD]), row);
        add_gradient(its, plain, one, row->width, sum);
        if (!ends_row(unit, id))
            continue;
        int64_t number = row_of_entry(one);
        if (moves(how, number) && !finish_row(block, how, number, row, halves, dry) && bad < 0)
            bad = number;
        memset(sum, 0, row->width * sizeof(float));
    }
    return bad;
}

/* By code that is made for the width. */
static int64_t update_any(const struct block *block, const struct training *how,
                          const struct block_sources *its, const struct unit *unit, struct row row,
                          vhalf *halves, int dry)
{
    switch (row.width) {
#define CASE(WIDTH)                                                                                \
    case WIDTH: row.width = WIDTH; return update_unit(block, how, its, unit, &row, halves, dry);
        CASE(16)
        CASE(32)
        CASE(64)
        CASE(128)
#undef CASE
    }
    return update_unit(block, how, its, unit, &row, halves, dry);
}

/* Updates all rows of sorted ids, or writes nothing of it; `bad_rows` [num_blocks] tells of each
   block the first row that would not be finite and was left as it was, or -1. Returns 0, or -1
   where memory is missing. */
int se_update(const struct sorted *sorted, const struct block *blocks,
              const struct training *trainings, int dry, int64_t *bad_rows, int num_threads)
{
    int64_t width = widest(blocks, sorted->num_blocks);
    size_t bytes = (size_t)num_threads * 5 * width * sizeof(float);
    float *memory = aligned_alloc(LINE, bytes);
    int64_t *bad_of = malloc((sorted->num_units + 1) * sizeof(int64_t));
    for (int number = 0; number < sorted->num_blocks; number++)
        bad_rows[number] = -1;
    if (memory && bad_of) {
        memset(memory, 0, bytes); /* what stands beyond a row's width must not be slow numbers */
#pragma omp parallel for num_threads(num_threads) schedule(dynamic, 1)
        for (int64_t number = 0; number < sorted->num_units; number++) {
            const struct unit *unit = &sorted->units[number];
            float *own = memory + (int64_t)omp_get_thread_num() * 5 * width;
            const struct block *block = &blocks[unit->block];
            struct row row = {.weight = (vfloat *)own,
                              .gradient = (vfloat *)(own + width),
                              .momentum = (vfloat *)(own + 2 * width),
                              .square = (vfloat *)(own + 3 * width),
                              .width = block->width};
            bad_of[number] = -1;
            if (trainings[unit->block].optimizer < 0)
                continue;
            bad_of[number] = update_any(block, &trainings[unit->block],
                                        &sorted->blocks[unit->block], unit, row,
                                        (vhalf *)(own + 4 * width), dry);
        }
        for (int64_t number = 0; number < sorted->num_units; number++) {
            int64_t *bad = &bad_rows[sorted->units[number].block];
            if (*bad < 0)
                *bad = bad_of[number];
        }
    }
    int failed = !memory || !bad_of;
    free(memory);
    free(bad_of);
    return failed ? -1 : 0;
}
