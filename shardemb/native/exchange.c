/* Collectives of the ranks of one host through memory that they share: publish, wait, copy or sum.
 *
 * Each rank owns one piece of memory, which the others map: its control words, two heads and two
 * halves of data. A collective is one turn, or several where it does not fit into a half. In a turn
 * a rank writes what it sends into the half whose turn it is, counts the turn up, waits until all
 * others have counted theirs up, and reads. Nobody waits before writing: who writes turn t + 2 has
 * seen all ranks in turn t + 1, and so done with reading turn t from the same half.
 *
 * The head of the first turn says what is called and how many bytes go to whom. All ranks compare
 * all heads, so that they all find the same mismatch, in the same turn.
 */

#if defined(__linux__) /* elsewhere ranks have no neighbours */

#include <linux/futex.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { DONE, WAITING, MISMATCH };                   /* what se_exchange_run returns */
enum { SUM, AVG, PRODUCT, MIN, MAX, BAND, BOR, BXOR };
enum { F32, F64, F16, BF16, I8, U8, I16, I32, I64 };
enum { PUT, WAIT, GET };

typedef struct {
    _Alignas(64) _Atomic uint32_t turn; /* a futex */
    int64_t token; /* at byte 8: by it others know that they have found the right memory */
    _Alignas(64) _Atomic uint32_t waiters;
    _Alignas(64) _Atomic uint32_t left;
} Control;

typedef struct {
    int64_t what, item_bytes, longest; /* what is called; the largest part for another rank */
    int64_t bytes[];                   /* to each rank, then those awaited from each */
} Head;

typedef struct {
    int size, me;
    uint32_t turn;
    int64_t half_bytes, spin_ns;
    char **memory; /* of each rank */
    /* of the collective under way, by rank: where a part is, and where one goes */
    char **from, **to;
    int64_t *sent, *awaited;
    int64_t what, item_bytes, round, num_rounds;
    int shared, type, op, stage; /* shared: one part for all ranks; type: -1 where nothing is summed */
    char *total;
} Exchange;

static int64_t round_up(int64_t bytes, int64_t to) { return (bytes + to - 1) / to * to; }
static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static int64_t head_bytes(int size) { return round_up(sizeof(Head) + 16 * (int64_t)size, 64); }
static int64_t data_offset(int size)
{
    return round_up(sizeof(Control) + 2 * head_bytes(size), 4096);
}

/* Bytes that each of `size` ranks shares. */
int64_t se_exchange_bytes(int size, int64_t half_bytes) { return data_offset(size) + 2 * half_bytes; }

static Control *control_of(const Exchange *x, int rank) { return (Control *)x->memory[rank]; }

static Head *head_of(const Exchange *x, int rank)
{
    return (Head *)(x->memory[rank] + sizeof(Control) + (x->turn & 1) * head_bytes(x->size));
}

/* The largest piece of a part that one turn carries. */
static int64_t piece_bytes(const Exchange *x)
{
    return x->shared ? x->half_bytes : x->half_bytes / (x->size - 1) / 64 * 64;
}

/* Where a sender keeps what it has for a receiver in this turn. */
static char *slot_of(const Exchange *x, int sender, int receiver)
{
    char *half = x->memory[sender] + data_offset(x->size) + (x->turn & 1) * x->half_bytes;
    return x->shared ? half : half + (receiver - (receiver > sender)) * piece_bytes(x);
}

/* Maps memory that other processes have or will map; workers that are forked do not keep it. */
void *se_exchange_map(int file, int64_t bytes)
{
    void *memory = mmap(0, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (memory == MAP_FAILED)
        return 0;
    madvise(memory, bytes, MADV_DONTFORK);
    return memory;
}

void se_exchange_unmap(void *memory, int64_t bytes) { munmap(memory, bytes); }

void *se_exchange_open(int size, int me, char **memory, int64_t half_bytes, int64_t spin_ns)
{
    Exchange *x = calloc(1, sizeof(Exchange) + 5 * size * sizeof(int64_t));
    if (!x)
        return 0;
    char **words = (char **)(x + 1);
    *x = (Exchange){.size = size, .me = me, .half_bytes = half_bytes, .spin_ns = spin_ns};
    x->memory = words;
    x->from = words + size;
    x->to = words + 2 * size;
    x->sent = (int64_t *)(words + 3 * size);
    x->awaited = (int64_t *)(words + 4 * size);
    memcpy(x->memory, memory, size * sizeof(char *));
    return x;
}

void se_exchange_close(Exchange *x) { free(x); }

/* Five arrays of `size` words: memory, from, to, sent, awaited. */
void *se_exchange_arrays(Exchange *x) { return x->memory; }

static void wake(Control *control)
{
    if (atomic_load(&control->waiters))
        syscall(SYS_futex, &control->turn, FUTEX_WAKE, INT32_MAX, 0, 0, 0);
}

/* Tells the others that this rank takes part in nothing more, and why: a number above 0. */
void se_exchange_leave(Exchange *x, int why)
{
    atomic_store(&control_of(x, x->me)->left, why);
    wake(control_of(x, x->me));
}

static int has_come(const Exchange *x, int rank)
{
    uint32_t turn = atomic_load_explicit(&control_of(x, rank)->turn, memory_order_acquire);
    return (int32_t)(turn - x->turn) >= 0;
}

/* Whether a rank has come to this turn: -1; else why it left, or 0 if it has not. */
int se_exchange_peer(const Exchange *x, int rank)
{
    int left = atomic_load(&control_of(x, rank)->left); /* before: it may have come, then left */
    return has_come(x, rank) ? -1 : left;
}

/* What a rank has said in this turn. */
const int64_t *se_exchange_head(const Exchange *x, int rank) { return &head_of(x, rank)->what; }

static int64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000ll + now.tv_nsec;
}

static void pause_cpu(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

/* Waits for a rank, but not for long: signals are handled, and deaths noticed, by the caller. */
static int wait_for(const Exchange *x, int rank)
{
    if (has_come(x, rank))
        return 1;
    for (int64_t end = now_ns() + x->spin_ns; now_ns() < end;)
        for (int i = 0; i < 32; i++) {
            if (has_come(x, rank))
                return 1;
            pause_cpu();
        }
    Control *control = control_of(x, rank);
    struct timespec slice = {.tv_nsec = 50000000};
    atomic_fetch_add(&control->waiters, 1);
    uint32_t seen = atomic_load(&control->turn);
    if ((int32_t)(seen - x->turn) < 0 && !atomic_load(&control->left))
        syscall(SYS_futex, &control->turn, FUTEX_WAIT, seen, &slice, 0, 0);
    atomic_fetch_sub(&control->waiters, 1);
    return has_come(x, rank);
}

static void write_head(const Exchange *x)
{
    Head *head = head_of(x, x->me);
    int64_t longest = 0;
    for (int rank = 0; rank < x->size; rank++)
        if (rank != x->me && x->sent[rank] > longest)
            longest = x->sent[rank];
    head->what = x->what;
    head->item_bytes = x->item_bytes;
    head->longest = longest;
    memcpy(head->bytes, x->sent, x->size * sizeof(int64_t));
    memcpy(head->bytes + x->size, x->awaited, x->size * sizeof(int64_t));
}

static int heads_agree(const Exchange *x)
{
    for (int sender = 0; sender < x->size; sender++) {
        const Head *from = head_of(x, sender);
        if (from->what != x->what)
            return 0;
        for (int receiver = 0; receiver < x->size; receiver++) {
            const Head *to = head_of(x, receiver);
            int64_t bytes = from->bytes[receiver];
            if (bytes != to->bytes[x->size + sender])
                return 0;
            if (bytes && from->item_bytes != to->item_bytes)
                return 0;
        }
    }
    return 1;
}

static int64_t rounds_of(const Exchange *x)
{
    int64_t longest = 1;
    for (int rank = 0; rank < x->size; rank++)
        if (head_of(x, rank)->longest > longest)
            longest = head_of(x, rank)->longest;
    return (longest + piece_bytes(x) - 1) / piece_bytes(x);
}

static void put(Exchange *x)
{
    int64_t start = x->round * piece_bytes(x);
    x->turn++;
    for (int rank = 0; rank < x->size; rank++) {
        int receiver = x->shared ? x->me : rank;
        int skip = x->shared ? rank > 0 : rank == x->me;
        if (!skip && x->sent[receiver] > start)
            memcpy(slot_of(x, x->me, receiver), x->from[receiver] + start,
                   least(piece_bytes(x), x->sent[receiver] - start));
    }
    if (x->round == 0)
        write_head(x);
    atomic_store(&control_of(x, x->me)->turn, x->turn);
    wake(control_of(x, x->me));
}

/* While the others come. */
static void keep_own(const Exchange *x)
{
    int64_t bytes = least(x->sent[x->me], x->awaited[x->me]);
    if (bytes && x->to[x->me] != x->from[x->me])
        memmove(x->to[x->me], x->from[x->me], bytes);
}

static void get(const Exchange *x)
{
    int64_t start = x->round * piece_bytes(x);
    for (int step = 1; step < x->size; step++) {
        int sender = (x->me + step) % x->size;
        if (x->awaited[sender] > start)
            memcpy(x->to[sender] + start, slot_of(x, sender, x->me),
                   least(piece_bytes(x), x->awaited[sender] - start));
    }
}

enum { BLOCK = 512 }; /* elements that are summed at once */

#define EACH(expression)                                                                          \
    for (int i = 0; i < n; i++) {                                                                 \
        __typeof__(acc[0]) a = acc[i], b = LOAD(values[i]);                                       \
        acc[i] = (expression);                                                                    \
    }                                                                                             \
    break
/* Numbers that are not finite stay so. */
#define EXTREMES                                                                                  \
    case MIN: EACH(b < a || b != b ? b : a);                                                      \
    case MAX: EACH(b > a || b != b ? b : a);

/* In the order of ranks, in A, rounded once at the end. */
#define REDUCER(name, T, A, CASES, FINISH)                                                        \
    static void name(int op, char *out, char *const *parts, int size, int64_t count)              \
    {                                                                                             \
        A acc[BLOCK];                                                                             \
        for (int64_t first = 0; first < count; first += BLOCK) {                                  \
            int n = least(BLOCK, count - first);                                                  \
            for (int i = 0; i < n; i++)                                                           \
                acc[i] = LOAD(((const T *)parts[0])[first + i]);                                  \
            for (int rank = 1; rank < size; rank++) {                                             \
                const T *values = (const T *)parts[rank] + first;                                 \
                switch (op) {                                                                     \
                    CASES                                                                         \
                    EXTREMES                                                                      \
                }                                                                                 \
            }                                                                                     \
            FINISH                                                                                \
            for (int i = 0; i < n; i++)                                                           \
                ((T *)out)[first + i] = STORE(acc[i]);                                            \
        }                                                                                         \
    }

#define FLOAT_CASES                                                                               \
    case SUM: case AVG: EACH(a + b);                                                              \
    case PRODUCT: EACH(a * b);
#define DIVIDE                                                                                    \
    if (op == AVG)                                                                                \
        for (int i = 0; i < n; i++)                                                               \
            acc[i] /= size;
/* Unsigned, where an overflow is defined. */
#define INTEGER_CASES                                                                             \
    case SUM: EACH((uint64_t)a + (uint64_t)b);                                                    \
    case PRODUCT: EACH((uint64_t)a * (uint64_t)b);                                                \
    case BAND: EACH(a & b);                                                                       \
    case BOR: EACH(a | b);                                                                        \
    case BXOR: EACH(a ^ b);

#define LOAD(value) (value)
#define STORE(value) (value)
REDUCER(reduce_f32, float, float, FLOAT_CASES, DIVIDE)
REDUCER(reduce_f64, double, double, FLOAT_CASES, DIVIDE)
REDUCER(reduce_i8, int8_t, int8_t, INTEGER_CASES, )
REDUCER(reduce_u8, uint8_t, uint8_t, INTEGER_CASES, )
REDUCER(reduce_i16, int16_t, int16_t, INTEGER_CASES, )
REDUCER(reduce_i32, int32_t, int32_t, INTEGER_CASES, )
REDUCER(reduce_i64, int64_t, int64_t, INTEGER_CASES, )
#undef LOAD
#undef STORE

typedef union {
    float value;
    uint32_t bits;
} Word;

static float of_bf16(uint16_t half) { return (Word){.bits = (uint32_t)half << 16}.value; }

/* To nearest, ties to even, as all here. */
static uint16_t to_bf16(float value)
{
    uint32_t bits = (Word){.value = value}.bits;
    return value != value ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

static float of_f16(uint16_t half)
{
    Word word = {.bits = (uint32_t)(half & 0x7fff) << 13};
    word.value *= 0x1p112f; /* the difference between the biases of exponents */
    if ((half & 0x7c00) == 0x7c00)
        word.bits |= 0x7f800000;
    word.bits |= (uint32_t)(half & 0x8000) << 16;
    return word.value;
}

static uint16_t to_f16(float value)
{
    uint32_t bits = (Word){.value = value}.bits, sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    if (size > 0x7f800000)
        return sign | 0x7e00;
    if (size >= 0x47800000)
        return sign | 0x7c00;
    if (size < 0x38800000) /* subnormal: steps as large as those after .5 */
        return sign | ((Word){.value = (Word){.bits = size}.value + 0.5f}.bits - 0x3f000000);
    return sign | ((size - 0x38000000 + 0xfff + ((size >> 13) & 1)) >> 13);
}

#define LOAD(value) of_bf16(value)
#define STORE(value) to_bf16(value)
REDUCER(reduce_bf16, uint16_t, float, FLOAT_CASES, DIVIDE)
#undef LOAD
#undef STORE
#define LOAD(value) of_f16(value)
#define STORE(value) to_f16(value)
REDUCER(reduce_f16, uint16_t, float, FLOAT_CASES, DIVIDE)
#undef LOAD
#undef STORE

typedef void Reducer(int op, char *out, char *const *parts, int size, int64_t count);
static Reducer *const REDUCERS[] = {
    [F32] = reduce_f32, [F64] = reduce_f64, [F16] = reduce_f16, [BF16] = reduce_bf16,
    [I8] = reduce_i8,   [U8] = reduce_u8,   [I16] = reduce_i16, [I32] = reduce_i32,
    [I64] = reduce_i64,
};

/* One number of each of `size` parts after the other, in the order of the parts. */
void se_exchange_reduce(int type, int op, char *out, char *const *parts, int size, int64_t count)
{
    REDUCERS[type](op, out, parts, size, count);
}

static void reduce(const Exchange *x)
{
    int64_t start = x->round * piece_bytes(x);
    int64_t bytes = least(piece_bytes(x), x->awaited[x->me] - start);
    char *parts[x->size];
    for (int rank = 0; rank < x->size; rank++)
        parts[rank] = rank == x->me ? x->from[rank] + start : slot_of(x, rank, x->me);
    if (bytes > 0)
        REDUCERS[x->type](x->op, x->total + start, parts, x->size, bytes / x->item_bytes);
}

/* Goes on with the collective under way; again after WAITING. */
int se_exchange_go(Exchange *x)
{
    for (;;) {
        if (x->stage == PUT) {
            put(x);
            if (x->round == 0 && x->type < 0)
                keep_own(x);
            x->stage = WAIT;
        }
        if (x->stage == WAIT) {
            for (int rank = 0; rank < x->size; rank++)
                if (rank != x->me && !wait_for(x, rank))
                    return WAITING;
            if (x->round == 0 && !heads_agree(x))
                return MISMATCH;
            if (x->round == 0)
                x->num_rounds = rounds_of(x);
            x->stage = GET;
        }
        if (x->type < 0)
            get(x);
        else
            reduce(x);
        if (++x->round == x->num_rounds)
            return DONE;
        x->stage = PUT;
    }
}

/* Starts what the arrays from, to, sent and awaited say, in bytes; the sum of parts goes to total. */
int se_exchange_run(Exchange *x, int64_t what, int64_t item_bytes, int shared, int type, int op,
                    char *total)
{
    x->what = what;
    x->item_bytes = item_bytes;
    x->shared = shared;
    x->type = type;
    x->op = op;
    x->total = total;
    x->round = 0;
    x->stage = PUT;
    return se_exchange_go(x);
}

#endif
