/* The ids of a step, block by block and row by row; what `sort.c` makes and `update.c` reads. */

#ifndef SHARDEMB_SORT_H
#define SHARDEMB_SORT_H

#include "rows.h"

/* An id: its row in the upper half, and in the lower what tells its gradient. */
typedef uint64_t entry;

INLINE int64_t row_of_entry(entry one) { return (int64_t)(one >> 32); }
INLINE uint32_t source_of_entry(entry one) { return (uint32_t)one; }

/* Neighbouring rows of a block, all of their ids. */
struct unit {
    int32_t block;
    entry *entries; /* by row, and for equal rows as they came */
    int64_t count;
};

/* The gradients of one feature in one lookup. */
struct source {
    int64_t first;         /* number of its first bag, or id where there is no pooling */
    const float *gradient; /* of that */
    int64_t stride;
    const struct lookup *lookup; /* where it is a mean, else NULL */
    int64_t base;                /* of its offsets */
};

/* What tells gradients of a block's ids. */
struct block_sources {
    struct source *sources;
    int32_t count;
    const uint32_t *bags;  /* where ids have weights: of each id its bag, and its weight */
    const float *weights;
};

struct sorted {
    struct unit *units;
    int64_t num_units;
    struct block_sources *blocks; /* of each block */
    int32_t num_blocks;
    /* memory, kept from step to step */
    entry *entries, *spare;
    int64_t capacity;
    uint32_t *bags;
    float *weights;
    int64_t weighted_capacity;
    struct source *all_sources;
};

#endif
