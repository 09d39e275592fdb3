"""One kernel by numba: a pooled sum, and row-wise Adagrad of merged rows. Times nothing.

Written as shardemb's C is: ids are packed with the bags they are of, sorted by row, gradients of
equal rows summed in the order of the bags, each row updated once; rows and gradients are
prefetched. Tables are shared out to threads, so results are the same on any number of them.
"""

# D embedding_dim, N ids of all tables, R rows of all tables, Q bags of all tables: bag * T + table

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic

EMBEDDING_DIM, LINE, AHEAD, SHARES, DIGIT = 64, 64, 12, 8, 11
HALF, LOW, MASK = np.uint64(32), np.uint64(0xFFFFFFFF), np.uint64((1 << DIGIT) - 1)


def _prefetch(_: Any, rows: Any, row: Any) -> Any:
    """Numba has none: writes LLVM's instruction for each line of a float32 row."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, args[0])
        row_bytes = cgutils.unpack_tuple(builder, array.strides)[0]
        place = ir.IntType(64)
        first = builder.add(builder.ptrtoint(array.data, place), builder.mul(args[1], row_bytes))
        pointer, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        prefetch_line = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(ir.VoidType(), [pointer, number, number, number]),
            "llvm.prefetch.p0i8",
        )
        for line in range(0, 4 * EMBEDDING_DIM, LINE):
            at = builder.inttoptr(builder.add(first, place(line)), pointer)
            builder.call(prefetch_line, [at, number(0), number(3), number(1)])
        return context.get_dummy_value()

    return types.void(rows, row), generate


prefetch = intrinsic(_prefetch)


def _look_up(weight_RD: Any, ids_N: Any, offsets: Any, pooled_QD: Any, num_tables: int) -> int:
    """Sums of rows; returns in how many shares of the work an id was not one of its table's."""
    num_bags, num_rows = len(pooled_QD) // num_tables, len(weight_RD) // num_tables
    bad = 0
    for share in prange(num_tables * SHARES):
        table, part = share // SHARES, share % SHARES
        bags, base = table * num_bags, table * num_rows
        end = offsets[bags + num_bags * (part + 1) // SHARES]
        bad_here = 0  # to raise here would make numba run the loop on one thread
        for bag in range(num_bags * part // SHARES, num_bags * (part + 1) // SHARES):
            out_D = pooled_QD[bag * num_tables + table]
            out_D[:] = np.float32(0)
            for index in range(offsets[bags + bag], offsets[bags + bag + 1]):
                if index + AHEAD < end:
                    prefetch(weight_RD, base + ids_N[index + AHEAD])
                row = ids_N[index]
                if row < 0 or row >= num_rows:
                    bad_here = 1
                    row = 0
                row_D = weight_RD[base + row]
                for column in range(EMBEDDING_DIM):
                    out_D[column] += row_D[column]
        bad += bad_here
    return bad


def _sort(entries_N: Any, spare_N: Any) -> None:
    """Sorts by the upper half, below 2**22, and keeps the order of equals: 11 bits at a time."""
    count_of = np.empty(1 << DIGIT, np.int64)
    for number in range(2):
        shift = np.uint64(32 + number * DIGIT)
        source_N, target_N = (spare_N, entries_N) if number else (entries_N, spare_N)
        count_of[:] = 0
        for entry in source_N:
            count_of[(entry >> shift) & MASK] += 1
        total = 0
        for digit in range(1 << DIGIT):
            count = count_of[digit]
            count_of[digit] = total
            total += count
        for entry in source_N:
            digit_of = (entry >> shift) & MASK
            target_N[count_of[digit_of]] = entry
            count_of[digit_of] += 1


sort = njit(nogil=True)(_sort)


def _update_table(weight_RD: Any, state_R: Any, entries_N: Any, grad_QD: Any, lr: Any) -> None:
    """Row-wise Adagrad of a table, whose entries are sorted: row, and row of the gradient."""
    sum_D, lanes = np.empty(EMBEDDING_DIM, np.float32), np.empty(16, np.float32)
    index, count, eps = 0, len(entries_N), np.float32(1e-8)
    while index < count:
        row = np.int64(entries_N[index] >> HALF)
        sum_D[:] = np.float32(0)
        while index < count and np.int64(entries_N[index] >> HALF) == row:
            if index + AHEAD < count:
                ahead = entries_N[index + AHEAD]
                prefetch(grad_QD, np.int64(ahead & LOW))
                prefetch(weight_RD, np.int64(ahead >> HALF))
            grad_D = grad_QD[np.int64(entries_N[index] & LOW)]
            for column in range(EMBEDDING_DIM):
                sum_D[column] += grad_D[column]
            index += 1
        lanes[:] = np.float32(0)  # a sum in order would be one addition at a time
        for column in range(EMBEDDING_DIM):
            lanes[column % 16] += sum_D[column] * sum_D[column]
        state_R[row] += lanes.sum() / np.float32(EMBEDDING_DIM)
        root = np.sqrt(state_R[row]) + eps
        row_D = weight_RD[row]
        for column in range(EMBEDDING_DIM):
            row_D[column] -= lr * (sum_D[column] / root)


update_table = njit(nogil=True, error_model="numpy")(_update_table)


def _update(
    weight_RD: Any, state_R: Any, ids_N: Any, offsets: Any, grad_QD: Any, lr: Any, num_tables: int
) -> None:
    """Row-wise Adagrad of all tables."""
    num_bags, num_rows = len(grad_QD) // num_tables, len(weight_RD) // num_tables
    entries_N, spare_N = np.empty(len(ids_N), np.uint64), np.empty(len(ids_N), np.uint64)
    for table in prange(num_tables):
        first, last = offsets[table * num_bags], offsets[(table + 1) * num_bags]
        for bag in range(num_bags):
            of = np.uint64(bag * num_tables + table)
            for index in range(
                offsets[table * num_bags + bag], offsets[table * num_bags + bag + 1]
            ):
                entries_N[index] = np.uint64(ids_N[index]) << HALF | of
        sort(entries_N[first:last], spare_N[first:last])
        base, end = table * num_rows, (table + 1) * num_rows
        update_table(weight_RD[base:end], state_R[base:end], entries_N[first:last], grad_QD, lr)


look_up = njit(parallel=True, nogil=True, cache=True)(_look_up)
update = njit(parallel=True, nogil=True, cache=True)(_update)
