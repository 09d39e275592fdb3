/* Sorts the ids of a step by row, so that each is updated once, on any number of threads alike. */

#include <omp.h>
#include <stdlib.h>

#include "sort.h"

#define IN_CACHE 65536 /* entries that are sorted together */
#define LARGEST_DIGIT 11

/* One block's ids in one lookup. */
struct span {
    const struct lookup *lookup;
    int64_t start, end;     /* places of its ids */
    int64_t first_bag;      /* of its features, over all of the lookup's */
    int64_t num_bags;
    uint32_t first_source;  /* number of its first bag or id among the block's */
};

static int bits_of(uint64_t largest)
{
    return largest ? 64 - __builtin_clzll(largest) : 0;
}

static struct span span_of(const struct block *block, const struct lookup *lookup)
{
    int64_t first = block->first_feature * lookup->num_bags;
    int64_t count = block->num_features * lookup->num_bags;
    return (struct span){
        .lookup = lookup,
        .start = offset_at(lookup, first),
        .end = offset_at(lookup, first + count),
        .first_bag = first,
        .num_bags = count,
    };
}

/* The bag, over all features, that has the id at a place. */
static int64_t bag_at(const struct span *span, int64_t place)
{
    int64_t low = span->first_bag, high = span->first_bag + span->num_bags;
    while (high - low > 1) {
        int64_t middle = (low + high) / 2;
        if (offset_at(span->lookup, middle) <= place)
            low = middle;
        else
            high = middle;
    }
    return low;
}

/* What the entries of a block go to: partitions by the upper bits of rows. */
struct target {
    entry *entries;
    int shift;        /* of a row to its partition */
    int64_t *places;  /* next free of each partition; NULL: one after the other */
    uint32_t *bags;   /* by the place of an id among the block's, where ids have weights */
    float *weights;
};

INLINE void put(struct target *target, int64_t *next, int64_t row, uint32_t source)
{
    int64_t place = target->places ? target->places[row >> target->shift]++ : (*next)++;
    target->entries[place] = (entry)row << 32 | source;
}

/* Entries of the ids at [start, end) of a span; `first_id` is the number of the span's first. */
static void make_entries(struct span span, int64_t start, int64_t end, uint32_t first_id,
                         struct target target)
{
    const struct lookup *lookup = span.lookup;
    int64_t next = start - span.start + first_id;
    if (lookup->pooling == NO_POOLING || start == end) {
        for (int64_t id = start; id < end; id++)
            put(&target, &next, whole(lookup->ids, lookup->id_bytes, id),
                (uint32_t)(id - span.start) + span.first_source);
        return;
    }
    int64_t bag = bag_at(&span, start);
    for (int64_t id = start; id < end; bag++) {
        int64_t last = offset_at(lookup, bag + 1);
        last = last < end ? last : end;
        uint32_t source = (uint32_t)(bag - span.first_bag) + span.first_source;
        for (; id < last; id++) {
            uint32_t number = (uint32_t)(id - span.start) + first_id;
            if (target.bags) {
                target.bags[number] = source;
                target.weights[number] = lookup->weights[id];
            }
            put(&target, &next, whole(lookup->ids, lookup->id_bytes, id),
                target.bags ? number : source);
        }
    }
}

/* Sorts by `bits` bits of the rows; returns where they are, here or in the spare. */
static entry *sort_entries(entry *entries, entry *spare, int64_t count, int bits)
{
    int passes = (bits + LARGEST_DIGIT - 1) / LARGEST_DIGIT;
    int digit = passes ? (bits + passes - 1) / passes : 0;
    int64_t places[1 << LARGEST_DIGIT];
    for (int pass = 0; pass < passes; pass++) {
        int shift = 32 + pass * digit;
        uint64_t mask = ((uint64_t)1 << digit) - 1;
        memset(places, 0, sizeof(int64_t) << digit);
        for (int64_t index = 0; index < count; index++)
            places[entries[index] >> shift & mask]++;
        int64_t next = 0;
        for (uint64_t value = 0; value <= mask; value++) {
            int64_t here = places[value];
            places[value] = next;
            next += here;
        }
        for (int64_t index = 0; index < count; index++)
            spare[places[entries[index] >> shift & mask]++] = entries[index];
        entry *swapped = entries;
        entries = spare;
        spare = swapped;
    }
    return entries;
}

/* One block on its way to units. */
struct job {
    const struct block *block;
    struct span *spans; /* of each lookup */
    int64_t count;      /* ids */
    int64_t first;      /* of its entries among all */
    int64_t first_weighted;
    int64_t first_unit;
    int partition_bits;
    int64_t *places; /* where parts of the ids go [num_lookups * num_threads, partitions] */
};

static int64_t num_partitions(const struct job *job) { return (int64_t)1 << job->partition_bits; }

static int row_bits(const struct job *job)
{
    return bits_of((uint64_t)job->block->num_rows - 1);
}

static int partition_shift(const struct job *job)
{
    int shift = row_bits(job) - job->partition_bits;
    return shift < 0 ? 0 : shift;
}

/* So many that a partition's entries fit into a cache, and that all threads have some. */
static int bits_for(const struct job *job, int num_jobs, int num_threads)
{
    int64_t wanted = job->count / IN_CACHE;
    if (num_jobs < 4 * num_threads && num_threads > 1 && wanted < 4 * num_threads &&
        job->count > IN_CACHE / 8)
        wanted = 4 * num_threads;
    int bits = wanted > 1 ? bits_of((uint64_t)wanted - 1) : 0;
    int most = row_bits(job);
    most = most < LARGEST_DIGIT ? most : LARGEST_DIGIT;
    return bits < most ? bits : most;
}

static struct target target_of(const struct sorted *sorted, const struct job *job, int64_t *places)
{
    int weighted = job->first_weighted >= 0;
    return (struct target){
        .entries = sorted->entries + job->first,
        .shift = partition_shift(job),
        .places = places,
        .bags = weighted ? sorted->bags + job->first_weighted : NULL,
        .weights = weighted ? sorted->weights + job->first_weighted : NULL,
    };
}

/* The ids of a lookup that are a thread's. */
static void part_of(const struct span *span, int part, int parts, int64_t *start, int64_t *end)
{
    int64_t count = span->end - span->start;
    *start = span->start + count * part / parts;
    *end = span->start + count * (part + 1) / parts;
}

/* Puts a large block's entries into partitions; all threads together. */
static void partition(const struct sorted *sorted, struct job *job, int num_lookups, int part,
                      int parts)
{
    int64_t size = num_partitions(job), start, end;
    int shift = partition_shift(job);
    for (int number = 0; number < num_lookups; number++) {
        int64_t *places = job->places + ((int64_t)number * parts + part) * size;
        const struct span *span = &job->spans[number];
        part_of(span, part, parts, &start, &end);
        memset(places, 0, size * sizeof(int64_t));
        for (int64_t id = start; id < end; id++)
            places[whole(span->lookup->ids, span->lookup->id_bytes, id) >> shift]++;
    }
#pragma omp barrier
#pragma omp single
    {
        int64_t next = 0;
        for (int64_t value = 0; value < size; value++) {
            struct unit *unit = &sorted->units[job->first_unit + value];
            unit->entries = sorted->entries + job->first + next;
            int64_t begin = next;
            for (int64_t chunk = 0; chunk < (int64_t)num_lookups * parts; chunk++) {
                int64_t here = job->places[chunk * size + value];
                job->places[chunk * size + value] = next;
                next += here;
            }
            unit->count = next - begin;
        }
    }
    uint32_t first_id = 0;
    for (int number = 0; number < num_lookups; number++) {
        const struct span *span = &job->spans[number];
        part_of(span, part, parts, &start, &end);
        make_entries(*span, start, end, first_id,
                     target_of(sorted, job, job->places + ((int64_t)number * parts + part) * size));
        first_id += (uint32_t)(span->end - span->start);
    }
#pragma omp barrier
}

static void make_all_entries(const struct sorted *sorted, const struct job *job, int num_lookups)
{
    uint32_t first_id = 0;
    for (int number = 0; number < num_lookups; number++) {
        struct span span = job->spans[number];
        make_entries(span, span.start, span.end, first_id, target_of(sorted, job, NULL));
        first_id += (uint32_t)(span.end - span.start);
    }
}

/* Tells where the gradients of a block's ids are. */
static void fill_sources(struct block_sources *its, const struct job *job, int num_lookups)
{
    its->count = 0;
    for (int number = 0; number < num_lookups; number++) {
        const struct span *span = &job->spans[number];
        const struct lookup *lookup = span->lookup;
        if (lookup->pooling == NO_POOLING) {
            its->sources[its->count++] = (struct source){
                .first = span->first_source,
                .gradient = lookup->output + span->start * lookup->stride,
                .stride = lookup->stride,
            };
            continue;
        }
        for (int64_t of = 0; of < job->block->num_features; of++)
            its->sources[its->count++] = (struct source){
                .first = span->first_source + of * lookup->num_bags,
                .gradient =
                    lookup->output + job->block->first_column + of * job->block->width,
                .stride = lookup->stride,
                .lookup = lookup->pooling == MEAN ? lookup : NULL,
                .base = span->first_bag + of * lookup->num_bags,
            };
    }
}

static void *grown(void *memory, int64_t *capacity, int64_t wanted, size_t size)
{
    if (wanted <= *capacity && memory)
        return memory;
    free(memory);
    *capacity = wanted + wanted / 4 + 1;
    return malloc(*capacity * size);
}

void *se_sorted_new(void) { return calloc(1, sizeof(struct sorted)); }

/* What was sorted; memory for the next ids stays. */
static void forget(struct sorted *sorted)
{
    free(sorted->units);
    free(sorted->blocks);
    free(sorted->all_sources);
    sorted->units = NULL;
    sorted->blocks = NULL;
    sorted->all_sources = NULL;
    sorted->num_units = 0;
    sorted->num_blocks = 0;
}

static void forget_all(struct sorted *sorted)
{
    forget(sorted);
    free(sorted->entries);
    free(sorted->spare);
    free(sorted->bags);
    free(sorted->weights);
    *sorted = (struct sorted){0};
}

void se_sorted_free(struct sorted *sorted)
{
    if (!sorted)
        return;
    forget_all(sorted);
    free(sorted);
}

/* Ids, spans and sizes of each block; returns the number of all sources, or -1: too many ids. */
static int64_t plan_jobs(struct job *jobs, struct span *spans, const struct block *blocks,
                         int num_blocks, const struct lookup *lookups, int num_lookups,
                         int64_t *num_ids, int64_t *num_weighted)
{
    int64_t num_sources = 0;
    int weighted = num_lookups > 0 && lookups[0].weights && lookups[0].pooling != NO_POOLING;
    *num_ids = *num_weighted = 0;
    for (int number = 0; number < num_blocks; number++) {
        struct job *job = &jobs[number];
        *job = (struct job){.block = &blocks[number],
                            .spans = spans + (int64_t)number * num_lookups,
                            .first = *num_ids,
                            .first_weighted = weighted ? *num_weighted : -1};
        int64_t sources = 0;
        for (int of = 0; of < num_lookups; of++) {
            struct span *span = &job->spans[of];
            *span = span_of(job->block, &lookups[of]);
            span->first_source = (uint32_t)sources;
            int pooled = lookups[of].pooling != NO_POOLING;
            sources += pooled ? span->num_bags : span->end - span->start;
            num_sources += pooled ? job->block->num_features : 1;
            job->count += span->end - span->start;
        }
        if (job->count > UINT32_MAX || sources > UINT32_MAX)
            return -1;
        *num_ids += job->count;
        *num_weighted += weighted ? job->count : 0;
    }
    return num_sources;
}

/* Entries, units and sources of all blocks; 0, or -1 where memory or the numbers do not suffice. */
static int reserve(struct sorted *sorted, struct job *jobs, int num_blocks, int num_lookups,
                   int64_t num_sources, int64_t num_ids, int64_t num_weighted, int num_threads)
{
    int64_t capacity = sorted->capacity;
    sorted->entries = grown(sorted->entries, &capacity, num_ids, sizeof(entry));
    sorted->spare = grown(sorted->spare, &sorted->capacity, num_ids, sizeof(entry));
    capacity = sorted->weighted_capacity;
    sorted->bags = grown(sorted->bags, &capacity, num_weighted, sizeof(uint32_t));
    sorted->weights =
        grown(sorted->weights, &sorted->weighted_capacity, num_weighted, sizeof(float));
    int num_jobs = 0;
    for (int number = 0; number < num_blocks; number++)
        num_jobs += jobs[number].count > 0;
    for (int number = 0; number < num_blocks; number++) {
        struct job *job = &jobs[number];
        job->partition_bits = bits_for(job, num_jobs, num_threads);
        job->first_unit = sorted->num_units;
        sorted->num_units += num_partitions(job);
        if (job->partition_bits)
            job->places = malloc(num_partitions(job) * num_lookups * num_threads * sizeof(int64_t));
    }
    sorted->num_blocks = num_blocks;
    sorted->units = calloc(sorted->num_units + 1, sizeof(struct unit));
    sorted->blocks = calloc(num_blocks + 1, sizeof(struct block_sources));
    sorted->all_sources = calloc(num_sources + 1, sizeof(struct source));
    int missing = !sorted->entries || !sorted->spare || !sorted->bags || !sorted->weights ||
                  !sorted->units || !sorted->blocks || !sorted->all_sources;
    for (int number = 0; number < num_blocks; number++)
        missing |= jobs[number].partition_bits && !jobs[number].places;
    return missing ? -1 : 0;
}

static void describe(struct sorted *sorted, const struct job *jobs, int num_lookups)
{
    struct source *next = sorted->all_sources;
    for (int number = 0; number < sorted->num_blocks; number++) {
        const struct job *job = &jobs[number];
        struct block_sources *its = &sorted->blocks[number];
        its->sources = next;
        fill_sources(its, job, num_lookups);
        next += its->count;
        if (job->first_weighted >= 0) {
            its->bags = sorted->bags + job->first_weighted;
            its->weights = sorted->weights + job->first_weighted;
        }
        for (int64_t unit = 0; unit < num_partitions(job); unit++) {
            sorted->units[job->first_unit + unit].block = number;
            sorted->units[job->first_unit + unit].entries = sorted->entries + job->first;
        }
        if (!job->partition_bits)
            sorted->units[job->first_unit].count = job->count;
    }
}

static void sort_jobs(struct sorted *sorted, struct job *jobs, int num_lookups, int num_threads)
{
#pragma omp parallel num_threads(num_threads)
    {
        int part = omp_get_thread_num(), parts = omp_get_num_threads();
        for (int number = 0; number < sorted->num_blocks; number++)
            if (jobs[number].partition_bits)
                partition(sorted, &jobs[number], num_lookups, part, parts);
#pragma omp for schedule(dynamic, 1)
        for (int64_t number = 0; number < sorted->num_units; number++) {
            struct unit *unit = &sorted->units[number];
            const struct job *job = &jobs[unit->block];
            if (!job->partition_bits)
                make_all_entries(sorted, job, num_lookups);
            entry *spare = sorted->spare + (unit->entries - sorted->entries);
            int bits = job->partition_bits ? partition_shift(job) : row_bits(job);
            unit->entries = sort_entries(unit->entries, spare, unit->count, bits);
        }
    }
}

/* Sorts the ids of some lookups, which se_look_up found to be rows of their blocks; the lookups are
   pooled alike, and all or none have weights. 0, or -1 where memory or 32 bits do not suffice. */
int se_sort(struct sorted *sorted, const struct block *blocks, int num_blocks,
            const struct lookup *lookups, int num_lookups, int num_threads)
{
    forget(sorted);
    struct job *jobs = malloc((num_blocks + 1) * sizeof(struct job));
    struct span *spans = malloc(((int64_t)num_blocks * num_lookups + 1) * sizeof(struct span));
    int64_t num_ids, num_weighted, num_sources = -1;
    int failed = !jobs || !spans;
    if (!failed)
        num_sources = plan_jobs(jobs, spans, blocks, num_blocks, lookups, num_lookups, &num_ids,
                                &num_weighted);
    failed |= num_sources < 0;
    if (!failed) {
        failed = reserve(sorted, jobs, num_blocks, num_lookups, num_sources, num_ids, num_weighted,
                         num_threads);
        if (!failed) {
            describe(sorted, jobs, num_lookups);
            sort_jobs(sorted, jobs, num_lookups, num_threads);
        }
        for (int number = 0; number < num_blocks; number++)
            free(jobs[number].places);
    }
    free(jobs);
    free(spans);
    if (failed) /* what there is of it fits to nothing */
        forget_all(sorted);
    return failed ? -1 : 0;
}
