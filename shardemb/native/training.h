/* How the rows of a block are trained, and a row while it is updated. */

#ifndef SHARDEMB_TRAINING_H
#define SHARDEMB_TRAINING_H

#include "rows.h"

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

/* How a block is trained; `Training` in kernels.py. */
struct training {
    float *momentum;      /* the state "momentum1": of each element, or row; or NULL */
    float *square;        /* the state "exp_avg_sq", so too */
    double lr, eps, weight_decay, momentum_factor, beta1, beta2, eta;
    double max_gradient;  /* below 0: none */
    double correction1;   /* 1 - beta1 ** num_updates */
    double correction2;   /* sqrt(1 - beta2 ** num_updates) */
    double scale;         /* of all gradients */
    int64_t embedding_dim, first_row, first_column, frozen_rows, padding_row, num_updates, key;
    int32_t optimizer; /* below 0: the block stays as it is */
    int32_t stochastic;
};

/* A row while it is updated, lanes by lanes. What stands beyond its width counts nowhere. A state
   that is one of the whole row is the first of its floats. */
struct row {
    vfloat *weight, *gradient, *momentum, *square;
    int64_t width;
};

INLINE int has_partial_moments(const struct training *how)
{
    return how->optimizer == PARTIAL_ROW_WISE_ADAM || how->optimizer == PARTIAL_ROW_WISE_LAMB;
}

#endif
