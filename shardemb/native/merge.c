/* The rows of sorted ids with the sums of their gradients, and the squares of those. */

#include <omp.h>
#include <stdlib.h>

#include "gradients.h"

/* How many rows each unit has, counted up [num_units + 1]. */
static int64_t *first_rows(const struct sorted *sorted, int num_threads)
{
    int64_t *first = malloc((sorted->num_units + 1) * sizeof(int64_t));
    if (!first)
        return NULL;
#pragma omp parallel for num_threads(num_threads) schedule(dynamic, 1)
    for (int64_t number = 0; number < sorted->num_units; number++) {
        const struct unit *unit = &sorted->units[number];
        int64_t rows = 0;
        for (int64_t id = 0; id < unit->count; id++)
            rows += ends_row(unit, id);
        first[number + 1] = rows;
    }
    first[0] = 0;
    for (int64_t number = 0; number < sorted->num_units; number++)
        first[number + 1] += first[number];
    return first;
}

/* How many rows each block has [num_blocks]; 0, or -1 where memory is missing. */
int se_count_rows(const struct sorted *sorted, int64_t *counts, int num_threads)
{
    int64_t *first = first_rows(sorted, num_threads);
    if (!first)
        return -1;
    memset(counts, 0, sorted->num_blocks * sizeof(int64_t));
    for (int64_t number = 0; number < sorted->num_units; number++)
        counts[sorted->units[number].block] += first[number + 1] - first[number];
    free(first);
    return 0;
}

/* What is wanted of the rows of some blocks; what is NULL is not. */
struct wanted {
    int64_t *rows, *counts;
    float *gradients;
    double *squares;
};

typedef double vdouble __attribute__((vector_size(8 * LANES), aligned(8)));

static double square_of(const float *values, int64_t width)
{
    vdouble lanes = {0};
    int64_t column = 0;
    for (; column + LANES <= width; column += LANES) {
        vdouble wide = __builtin_convertvector(load_lanes(values, FLOAT32, column), vdouble);
        lanes += wide * wide;
    }
    double square = 0;
    for (int lane = 0; lane < LANES; lane++)
        square += lanes[lane];
    for (; column < width; column++)
        square += (double)values[column] * values[column];
    return square;
}

static void fill_unit(const struct sorted *sorted, const struct unit *unit, int64_t width,
                      int64_t next, struct wanted wanted, float *sum)
{
    const struct block_sources *its = &sorted->blocks[unit->block];
    int plain = is_plain(its);
    for (int64_t id = 0, first = 0; id < unit->count; id++) {
        if (id + GRADIENTS_AHEAD < unit->count)
            prefetch_gradient(its, unit->entries[id + GRADIENTS_AHEAD], width);
        if (wanted.rows)
            sum = wanted.gradients + next * width;
        if (id == first)
            memset(sum, 0, width * sizeof(float));
        add_gradient(its, plain, unit->entries[id], width, sum);
        if (!ends_row(unit, id))
            continue;
        if (wanted.rows) {
            wanted.rows[next] = row_of_entry(unit->entries[id]);
            wanted.counts[next] = id + 1 - first;
        }
        if (wanted.squares)
            wanted.squares[next] = square_of(sum, width);
        first = id + 1;
        next++;
    }
}

/* A block's rows in order [U], how many ids looked each up [U], and the sums of their gradients
   [U, width]; 0, or -1 where memory is missing. */
int se_merge(const struct sorted *sorted, const struct block *blocks, int block, int64_t *rows,
             int64_t *counts, float *gradients, int num_threads)
{
    int64_t *first = first_rows(sorted, num_threads), begin = 0;
    if (!first)
        return -1;
    while (begin < sorted->num_units && sorted->units[begin].block != block)
        begin++;
    struct wanted wanted = {.rows = rows, .counts = counts, .gradients = gradients};
#pragma omp parallel for num_threads(num_threads) schedule(dynamic, 1)
    for (int64_t number = begin; number < sorted->num_units; number++)
        if (sorted->units[number].block == block)
            fill_unit(sorted, &sorted->units[number], blocks[block].width,
                      first[number] - first[begin], wanted, NULL);
    free(first);
    return 0;
}

/* The sum over each block's rows of the squares of their summed gradients [num_blocks], in the same
   order on any number of threads; 0, or -1 where memory is missing. */
int se_squares(const struct sorted *sorted, const struct block *blocks, double *squares,
               int num_threads)
{
    int64_t *first = first_rows(sorted, num_threads), width = widest(blocks, sorted->num_blocks);
    double *of_rows = first ? malloc((first[sorted->num_units] + 1) * sizeof(double)) : NULL;
    float *sums = malloc((size_t)num_threads * width * sizeof(float));
    int failed = !first || !of_rows || !sums;
    if (!failed) {
        struct wanted wanted = {.squares = of_rows};
#pragma omp parallel for num_threads(num_threads) schedule(dynamic, 1)
        for (int64_t number = 0; number < sorted->num_units; number++)
            fill_unit(sorted, &sorted->units[number], blocks[sorted->units[number].block].width,
                      first[number], wanted, sums + omp_get_thread_num() * width);
        memset(squares, 0, sorted->num_blocks * sizeof(double));
        for (int64_t number = 0; number < sorted->num_units; number++)
            for (int64_t row = first[number]; row < first[number + 1]; row++)
                squares[sorted->units[number].block] += of_rows[row];
    }
    free(first);
    free(of_rows);
    free(sums);
    return failed ? -1 : 0;
}

/* The largest magnitude of some values; infinity where one is not finite. */
float se_largest(const float *values, int64_t count, int num_threads)
{
    uint32_t largest = 0;
    int64_t part = (count + num_threads - 1) / num_threads;
#pragma omp parallel for num_threads(num_threads) reduction(max : largest) schedule(static, 1)
    for (int thread = 0; thread < num_threads; thread++) {
        int64_t end = (thread + 1) * part < count ? (thread + 1) * part : count;
        for (int64_t index = thread * part; index < end; index++) {
            uint32_t bits;
            memcpy(&bits, values + index, sizeof bits);
            bits &= 0x7fffffff; /* magnitudes order as their bits do, and not-a-number is largest */
            largest = bits > largest ? bits : largest;
        }
    }
    float value;
    memcpy(&value, &largest, sizeof value);
    return value <= 3.4028235e38f ? value : INFINITY;
}
