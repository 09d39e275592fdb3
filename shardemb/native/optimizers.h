/* What the optimizers do to one row.

   The formulas are those of `shardemb/updates/formulas.py`, which tells their sources. All is inlined
   into code that is made for some widths, in which the loops over a row are no loops. */

#ifndef SHARDEMB_OPTIMIZERS_H
#define SHARDEMB_OPTIMIZERS_H

#include "training.h"

#define EACH_PART(part, row) (int64_t part = 0; part * LANES < (row)->width; part++)

INLINE vfloat roots(vfloat values)
{
#if defined(__AVX512F__)
    return (vfloat)_mm512_sqrt_ps((__m512)values);
#else
    for (int lane = 0; lane < LANES; lane++)
        values[lane] = sqrtf(values[lane]);
    return values;
#endif
}

INLINE float square_sum(const vfloat *values, int64_t width)
{
    return dot((const float *)values, values, FLOAT32, width);
}

/* The norm; nan where the square overflowed, so that no row stays as it is in silence. */
INLINE float norm(const vfloat *values, int64_t width)
{
    float square = square_sum(values, width);
    return isinf(square) ? NAN : sqrtf(square);
}

INLINE void decay(const struct training *how, const struct row *row)
{
    float decay = (float)how->weight_decay;
    if (decay != 0)
        for EACH_PART (part, row)
            row->gradient[part] += decay * row->weight[part];
}

INLINE void clip(const struct training *how, const struct row *row)
{
    float scale = (float)how->max_gradient / norm(row->gradient, row->width);
    if (scale > 1.0f)
        scale = 1.0f;
    for EACH_PART (part, row)
        row->gradient[part] *= scale;
}

INLINE void sgd(const struct training *how, const struct row *row)
{
    float lr = (float)how->lr, momentum = (float)how->momentum_factor;
    decay(how, row);
    if (how->momentum)
        for EACH_PART (part, row)
            row->gradient[part] = row->momentum[part] =
                momentum * row->momentum[part] + row->gradient[part];
    for EACH_PART (part, row)
        row->weight[part] -= lr * row->gradient[part];
}

INLINE void lars_sgd(const struct training *how, const struct row *row)
{
    float weight = norm(row->weight, row->width), gradient = norm(row->gradient, row->width);
    float rate = (float)how->eta * weight / (gradient + (float)how->weight_decay * weight);
    if (weight == 0 || gradient == 0)
        rate = 1.0f;
    float step = (float)how->lr * rate, momentum = (float)how->momentum_factor;
    decay(how, row);
    for EACH_PART (part, row) {
        row->momentum[part] = momentum * row->momentum[part] + step * row->gradient[part];
        row->weight[part] -= row->momentum[part];
    }
}

INLINE void adagrad(const struct training *how, const struct row *row)
{
    float lr = (float)how->lr, eps = (float)how->eps;
    decay(how, row);
    for EACH_PART (part, row) {
        vfloat gradient = row->gradient[part];
        vfloat sum = row->momentum[part] + gradient * gradient;
        row->momentum[part] = sum;
        row->weight[part] -= lr * (gradient / (roots(sum) + eps));
    }
}

INLINE void row_wise_adagrad(const struct training *how, const struct row *row)
{
    float *sum = (float *)row->momentum, lr = (float)how->lr;
    decay(how, row);
    *sum += square_sum(row->gradient, row->width) / (float)how->embedding_dim;
    float root = sqrtf(*sum) + (float)how->eps;
    for EACH_PART (part, row)
        row->weight[part] -= lr * (row->gradient[part] / root);
}

/* The gradient becomes m_hat / (sqrt(v_hat) + eps). */
INLINE void ratio_of_moments(const struct training *how, const struct row *row)
{
    float beta1 = (float)how->beta1, beta2 = (float)how->beta2, eps = (float)how->eps;
    float rest1 = (float)(1 - how->beta1), rest2 = (float)(1 - how->beta2);
    float correction1 = (float)how->correction1, correction2 = (float)how->correction2;
    for EACH_PART (part, row) {
        vfloat gradient = row->gradient[part];
        vfloat moment = beta1 * row->momentum[part] + rest1 * gradient;
        vfloat square = beta2 * row->square[part] + rest2 * gradient * gradient;
        row->momentum[part] = moment;
        row->square[part] = square;
        row->gradient[part] = moment / (roots(square) / correction2 + eps) / correction1;
    }
}

/* The same where v is one of the row. */
INLINE void ratio_of_partial_moments(const struct training *how, const struct row *row)
{
    float beta1 = (float)how->beta1, rest1 = (float)(1 - how->beta1);
    float rest2 = (float)((1 - how->beta2) / how->embedding_dim);
    float correction1 = (float)how->correction1, *square = (float *)row->square;
    *square = (float)how->beta2 * *square + rest2 * square_sum(row->gradient, row->width);
    float root = sqrtf(*square) / (float)how->correction2 + (float)how->eps;
    for EACH_PART (part, row) {
        row->momentum[part] = beta1 * row->momentum[part] + rest1 * row->gradient[part];
        row->gradient[part] = row->momentum[part] / root / correction1;
    }
}

/* The row less lr times what the gradient has become. */
INLINE void move(const struct training *how, const struct row *row, float trust)
{
    float lr = (float)how->lr;
    for EACH_PART (part, row)
        row->weight[part] -= lr * (row->gradient[part] * trust);
}

INLINE void move_trusted(const struct training *how, const struct row *row)
{
    float weight = norm(row->weight, row->width), step = norm(row->gradient, row->width);
    move(how, row, weight == 0 || step == 0 ? 1.0f : weight / step);
}

/* Brings a row and its state to their new values; the gradient is used up. */
INLINE void apply(const struct training *how, const struct row *row)
{
    if (how->max_gradient >= 0)
        clip(how, row);
    switch (how->optimizer) {
    case SGD: sgd(how, row); return;
    case LARS_SGD: lars_sgd(how, row); return;
    case ADAGRAD: adagrad(how, row); return;
    case ROW_WISE_ADAGRAD: row_wise_adagrad(how, row); return;
    case ADAM: decay(how, row);
    }
    if (has_partial_moments(how))
        ratio_of_partial_moments(how, row);
    else
        ratio_of_moments(how, row);
    if (how->optimizer != ADAM)
        decay(how, row);
    if (how->optimizer == LAMB || how->optimizer == PARTIAL_ROW_WISE_LAMB)
        move_trusted(how, row);
    else
        move(how, row, 1.0f);
}

#endif
