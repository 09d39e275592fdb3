/* Updates the rows that a step looked up: sums each row's gradients, and applies its optimizer.

   The formulas are those of `shardemb/updates/formulas.py`, which tells their sources. */

#include <float.h>
#include <omp.h>
#include <stdlib.h>

#include "gradients.h"
#include "rounding.h"

#define PREFETCHED 8 /* ids between the prefetch of a gradient or row and its use */

enum {
    SGD,
    LARS_SGD,
    ADAGRAD,
    ROW_WISE_ADAGRAD,
    ADAM,
    ADAM_W,
    PARTIAL_ROW_WISE_ADAM,
    LAMB,
    PARTIAL_ROW_WISE_LAMB,
};

/* How a block is trained; `shardemb/updates/native_kernel.py` fills it in. */
struct training {
    float *momentum;      /* the state "momentum1": of each element, or row; or NULL */
    float *square;        /* the state "exp_avg_sq", so too */
    double lr, eps, weight_decay, momentum_factor, beta1, beta2, eta;
    double max_gradient;  /* below 0: none */
    double correction1;   /* 1 - beta1 ** num_updates */
    double correction2;   /* sqrt(1 - beta2 ** num_updates) */
    double scale;         /* of all gradients */
    int64_t embedding_dim, first_row, first_column, frozen_rows, padding_row, num_updates, key;
    int32_t optimizer, stochastic;
};

/* A row while it is updated: float32 [width] each. */
struct row {
    float *weight, *gradient, *momentum, *square;
    float row_momentum, row_square; /* states of the whole row */
    int64_t width;
};

/* --- optimizers --- */

INLINE float square_sum(const float *values, int64_t width)
{
    return dot(values, values, FLOAT32, width);
}

/* The norm; nan where the square overflowed, so that no row stays as it is in silence. */
INLINE float norm(const float *values, int64_t width)
{
    float square = square_sum(values, width);
    return isinf(square) ? NAN : sqrtf(square);
}

INLINE void decay(const struct training *how, struct row *row)
{
    float decay = (float)how->weight_decay;
    if (decay != 0)
        for (int64_t column = 0; column < row->width; column++)
            row->gradient[column] += decay * row->weight[column];
}

INLINE void clip(const struct training *how, struct row *row)
{
    float scale = (float)how->max_gradient / norm(row->gradient, row->width);
    if (scale > 1.0f)
        scale = 1.0f;
    for (int64_t column = 0; column < row->width; column++)
        row->gradient[column] *= scale;
}

INLINE void sgd(const struct training *how, struct row *row)
{
    float lr = (float)how->lr, momentum = (float)how->momentum_factor;
    decay(how, row);
    if (how->momentum)
        for (int64_t column = 0; column < row->width; column++)
            row->gradient[column] = row->momentum[column] =
                momentum * row->momentum[column] + row->gradient[column];
    for (int64_t column = 0; column < row->width; column++)
        row->weight[column] -= lr * row->gradient[column];
}

INLINE void lars_sgd(const struct training *how, struct row *row)
{
    float weight = norm(row->weight, row->width), gradient = norm(row->gradient, row->width);
    float rate = (float)how->eta * weight / (gradient + (float)how->weight_decay * weight);
    if (weight == 0 || gradient == 0)
        rate = 1.0f;
    float step = (float)how->lr * rate, momentum = (float)how->momentum_factor;
    decay(how, row);
    for (int64_t column = 0; column < row->width; column++) {
        row->momentum[column] = momentum * row->momentum[column] + step * row->gradient[column];
        row->weight[column] -= row->momentum[column];
    }
}

INLINE void adagrad(const struct training *how, struct row *row)
{
    float lr = (float)how->lr, eps = (float)how->eps;
    decay(how, row);
    for (int64_t column = 0; column < row->width; column++) {
        float gradient = row->gradient[column];
        row->momentum[column] += gradient * gradient;
        row->weight[column] -= lr * (gradient / (sqrtf(row->momentum[column]) + eps));
    }
}

INLINE void row_wise_adagrad(const struct training *how, struct row *row)
{
    decay(how, row);
    row->row_momentum += square_sum(row->gradient, row->width) / (float)how->embedding_dim;
    float lr = (float)how->lr, root = sqrtf(row->row_momentum) + (float)how->eps;
    for (int64_t column = 0; column < row->width; column++)
        row->weight[column] -= lr * (row->gradient[column] / root);
}

/* The gradient becomes m_hat / (sqrt(v_hat) + eps); `of_row`: where v is one of the row. */
INLINE void ratio_of_moments(const struct training *how, struct row *row, int of_row)
{
    float beta1 = (float)how->beta1, beta2 = (float)how->beta2, eps = (float)how->eps;
    float rest1 = (float)(1 - how->beta1), rest2 = (float)(1 - how->beta2);
    float correction1 = (float)how->correction1, correction2 = (float)how->correction2;
    float root = 0;
    if (of_row) {
        float rest = (float)((1 - how->beta2) / how->embedding_dim);
        row->row_square =
            beta2 * row->row_square + rest * square_sum(row->gradient, row->width);
        root = sqrtf(row->row_square) / correction2 + eps;
    }
    for (int64_t column = 0; column < row->width; column++) {
        float gradient = row->gradient[column];
        row->momentum[column] = beta1 * row->momentum[column] + rest1 * gradient;
        if (!of_row) {
            row->square[column] = beta2 * row->square[column] + rest2 * gradient * gradient;
            root = sqrtf(row->square[column]) / correction2 + eps;
        }
        row->gradient[column] = row->momentum[column] / root / correction1;
    }
}

INLINE void adam(const struct training *how, struct row *row, int of_row, int decoupled)
{
    float lr = (float)how->lr;
    if (!decoupled)
        decay(how, row);
    ratio_of_moments(how, row, of_row);
    if (decoupled)
        decay(how, row);
    for (int64_t column = 0; column < row->width; column++)
        row->weight[column] -= lr * row->gradient[column];
}

INLINE void lamb(const struct training *how, struct row *row, int of_row)
{
    ratio_of_moments(how, row, of_row);
    decay(how, row);
    float weight = norm(row->weight, row->width), step = norm(row->gradient, row->width);
    float trust = weight == 0 || step == 0 ? 1.0f : weight / step;
    float lr = (float)how->lr;
    for (int64_t column = 0; column < row->width; column++)
        row->weight[column] -= lr * (row->gradient[column] * trust);
}

INLINE void apply(int optimizer, const struct training *how, struct row *row)
{
    if (how->max_gradient >= 0)
        clip(how, row);
    switch (optimizer) {
    case SGD: sgd(how, row); break;
    case LARS_SGD: lars_sgd(how, row); break;
    case ADAGRAD: adagrad(how, row); break;
    case ROW_WISE_ADAGRAD: row_wise_adagrad(how, row); break;
    case ADAM: adam(how, row, 0, 0); break;
    case ADAM_W: adam(how, row, 0, 1); break;
    case PARTIAL_ROW_WISE_ADAM: adam(how, row, 1, 1); break;
    case LAMB: lamb(how, row, 0); break;
    case PARTIAL_ROW_WISE_LAMB: lamb(how, row, 1); break;
    }
}

/* --- a row on its way from and to the block --- */

INLINE int is_per_row(int optimizer)
{
    return optimizer == ROW_WISE_ADAGRAD || optimizer == PARTIAL_ROW_WISE_ADAM ||
           optimizer == PARTIAL_ROW_WISE_LAMB;
}

/* Which state is one of the row: Adagrad's only one, and the second moment of the others. */
INLINE int momentum_per_row(int optimizer) { return optimizer == ROW_WISE_ADAGRAD; }
INLINE int square_per_row(int optimizer)
{
    return is_per_row(optimizer) && !momentum_per_row(optimizer);
}

INLINE void load_row(const struct block *block, const struct training *how, int optimizer,
                     int64_t number, struct row *row)
{
    int64_t width = row->width, first = number * width, column = 0;
    const char *weight = (const char *)block->weight + first * size_of(block->dtype);
    if (block->dtype == FLOAT32)
        memcpy(row->weight, weight, width * sizeof(float));
    else {
        for (; column + LANES <= width; column += LANES)
            *(vfloat *)(row->weight + column) = load_lanes(weight, block->dtype, column);
        for (; column < width; column++)
            row->weight[column] = load_one(weight, block->dtype, column);
    }
    if (how->momentum && momentum_per_row(optimizer))
        row->row_momentum = how->momentum[number];
    else if (how->momentum)
        memcpy(row->momentum, how->momentum + first, width * sizeof(float));
    if (how->square && square_per_row(optimizer))
        row->row_square = how->square[number];
    else if (how->square)
        memcpy(row->square, how->square + first, width * sizeof(float));
}

INLINE int all_finite(const float *values, int64_t width)
{
    int finite = 1;
    for (int64_t column = 0; column < width; column++)
        finite &= fabsf(values[column]) <= FLT_MAX;
    return finite;
}

/* Rounds the weights in place, as floats that the dtype holds, to 16 bits beside them. */
INLINE void round_row(const struct block *block, const struct training *how, int64_t number,
                      const struct row *row, uint16_t *rounded)
{
    uint64_t of_row = drawn((uint64_t)how->key, (uint64_t)(number + how->first_row));
    uint64_t seed = drawn(of_row, (uint64_t)how->num_updates), bits = 0;
    for (int64_t column = 0; column < row->width; column++) {
        int64_t global = column + how->first_column;
        if (how->stochastic && (column == 0 || global % 4 == 0))
            bits = drawn(seed, (uint64_t)(global / 4));
        uint32_t random = (uint32_t)(bits >> 16 * (global % 4)) & 0xffff;
        rounded[column] = round_one(row->weight[column], block->dtype, how->stochastic, random);
    }
}

/* Writes a row and its state, if all of it is finite and they are to be written; whether it is. */
INLINE int store_row(const struct block *block, const struct training *how, int optimizer,
                     int64_t number, struct row *row, uint16_t *rounded, int dry)
{
    int64_t width = row->width, first = number * width;
    int finite = 1, of_row = is_per_row(optimizer);
    if (block->dtype != FLOAT32) {
        round_row(block, how, number, row, rounded);
        for (int64_t column = 0; column < width; column++)
            row->weight[column] = load_one(rounded, block->dtype, column);
    }
    finite &= all_finite(row->weight, width);
    if (how->momentum && !momentum_per_row(optimizer))
        finite &= all_finite(row->momentum, width);
    if (how->square && !square_per_row(optimizer))
        finite &= all_finite(row->square, width);
    if (of_row)
        finite &= fabsf(momentum_per_row(optimizer) ? row->row_momentum : row->row_square) <= FLT_MAX;
    if (!finite || dry)
        return finite;
    char *weight = (char *)block->weight + first * size_of(block->dtype);
    if (block->dtype == FLOAT32)
        memcpy(weight, row->weight, width * sizeof(float));
    else
        memcpy(weight, rounded, width * sizeof(uint16_t));
    if (how->momentum && momentum_per_row(optimizer))
        how->momentum[number] = row->row_momentum;
    else if (how->momentum)
        memcpy(how->momentum + first, row->momentum, width * sizeof(float));
    if (how->square && square_per_row(optimizer))
        how->square[number] = row->row_square;
    else if (how->square)
        memcpy(how->square + first, row->square, width * sizeof(float));
    return 1;
}

INLINE void prefetch_row(const struct block *block, const struct training *how, int optimizer,
                         int64_t number)
{
    int64_t width = block->width;
    prefetch((char *)block->weight + number * width * size_of(block->dtype),
             width * size_of(block->dtype));
    if (how->momentum) {
        int one = momentum_per_row(optimizer);
        prefetch(how->momentum + (one ? number : number * width), 4 * (one ? 1 : width));
    }
    if (how->square) {
        int one = square_per_row(optimizer);
        prefetch(how->square + (one ? number : number * width), 4 * (one ? 1 : width));
    }
}

static int moves(const struct training *how, int64_t row)
{
    return row + how->first_row >= how->frozen_rows && row + how->first_row != how->padding_row;
}

/* Updates a unit's rows; returns the first that would not be finite, or -1. */
INLINE int64_t update_unit(int optimizer, const struct block *block, const struct training *how,
                           const struct block_sources *its, const struct unit *unit,
                           struct row row, uint16_t *rounded, int dry)
{
    int64_t bad = -1, seen = 0, previous = -1;
    for (int64_t index = 0, end; index < unit->count; index = end) {
        end = same_row(unit->entries, index, unit->count);
        for (; seen < unit->count && seen < end + PREFETCHED; seen++) {
            prefetch_gradient(its, unit->entries[seen], block->width);
            if (row_of_entry(unit->entries[seen]) != previous) {
                previous = row_of_entry(unit->entries[seen]);
                prefetch_row(block, how, optimizer, previous);
            }
        }
        int64_t number = row_of_entry(unit->entries[index]);
        if (!moves(how, number))
            continue;
        sum_gradients(its, unit->entries + index, end - index, block->width, row.gradient);
        if (how->scale != 1.0)
            for (int64_t column = 0; column < row.width; column++)
                row.gradient[column] *= (float)how->scale;
        load_row(block, how, optimizer, number, &row);
        apply(optimizer, how, &row);
        if (!store_row(block, how, optimizer, number, &row, rounded, dry) && bad < 0)
            bad = number;
    }
    return bad;
}

/* By code that is made for the optimizer. */
static int64_t update_any(const struct block *block, const struct training *how,
                          const struct block_sources *its, const struct unit *unit, struct row row,
                          uint16_t *rounded, int dry)
{
#define CASE(OPTIMIZER)                                                                            \
    case OPTIMIZER: return update_unit(OPTIMIZER, block, how, its, unit, row, rounded, dry);
    switch (how->optimizer) {
        CASE(SGD)
        CASE(LARS_SGD)
        CASE(ADAGRAD)
        CASE(ROW_WISE_ADAGRAD)
        CASE(ADAM)
        CASE(ADAM_W)
        CASE(PARTIAL_ROW_WISE_ADAM)
        CASE(LAMB)
        CASE(PARTIAL_ROW_WISE_LAMB)
    }
#undef CASE
    return -1;
}

static int64_t widest(const struct block *blocks, int num_blocks)
{
    int64_t width = 1;
    for (int number = 0; number < num_blocks; number++)
        width = blocks[number].width > width ? blocks[number].width : width;
    return (width + LANES - 1) / LANES * LANES;
}

/* Updates all rows of sorted ids, or writes nothing of it; `bad_rows` [num_blocks] tells of each
   block the first row that would not be finite and was left as it was, or -1. Returns 0, or -1
   where memory is missing. */
int se_update(const struct sorted *sorted, const struct block *blocks,
              const struct training *trainings, int dry, int64_t *bad_rows, int num_threads)
{
    int64_t width = widest(blocks, sorted->num_blocks);
    float *memory = aligned_alloc(LINE, (size_t)num_threads * 5 * width * sizeof(float));
    int64_t *bad_of = malloc((sorted->num_units + 1) * sizeof(int64_t));
    for (int number = 0; number < sorted->num_blocks; number++)
        bad_rows[number] = -1;
    if (memory && bad_of) {
#pragma omp parallel for num_threads(num_threads) schedule(dynamic, 1)
        for (int64_t number = 0; number < sorted->num_units; number++) {
            const struct unit *unit = &sorted->units[number];
            float *own = memory + (int64_t)omp_get_thread_num() * 5 * width;
            const struct block *block = &blocks[unit->block];
            struct row row = {.weight = own,
                              .gradient = own + width,
                              .momentum = own + 2 * width,
                              .square = own + 3 * width,
                              .width = block->width};
            bad_of[number] = update_any(block, &trainings[unit->block],
                                        &sorted->blocks[unit->block], unit, row,
                                        (uint16_t *)(own + 4 * width), dry);
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
