"""What a collective is called, and what ranks that call different ones are told."""

from collections.abc import Sequence

import torch

Parts = tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[int]]
"""By rank: where the part for it begins, its bytes, where the part from it goes, its bytes."""
KINDS = ("barrier", "all_to_all", "all_gather", "all_reduce", "reduce_scatter", "broadcast")
OPERATIONS = ("sum", "avg", "product", "min", "max", "band", "bor", "bxor")
"""In the order of torch's `ReduceOp` and of exchange.c."""
_TYPES = ("float32", "float64", "float16", "bfloat16", "int8", "uint8", "int16", "int32", "int64")
TYPE_OF = {getattr(torch, name): number for number, name in enumerate(_TYPES)}
"""Dtypes that can be summed, by their numbers in exchange.c."""
BARRIER, ALL_TO_ALL, ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER, BROADCAST = range(6)
_REDUCES, _IN_PARTS, _OPERATION, _TYPE, _ROOT = 1 << 8, 1 << 9, 12, 16, 32


def reduction(kind: int, operation: int, dtype: int, *, in_parts: bool = False) -> int:
    """The number of a collective that sums numbers of a dtype, or takes the largest, and so on."""
    call = kind | _REDUCES | operation << _OPERATION | dtype << _TYPE
    return call | _IN_PARTS if in_parts else call


def from_root(kind: int, root: int) -> int:
    """The number of a collective that has a root."""
    return kind | (root + 1) << _ROOT


def name_of(call: int) -> str:
    """In words: "all_reduce (sum) of float32"."""
    name = KINDS[call & 0xFF]
    if call & _REDUCES:
        name += f" ({OPERATIONS[call >> _OPERATION & 0xF]}) of {_TYPES[call >> _TYPE & 0xFF]}"
    if call >> _ROOT:
        name += f" from rank {(call >> _ROOT) - 1} of the group"
    return name


class Head:
    """What one rank said of its collective.

    Args:
        rank: Its number among all ranks.
        words: As exchange.c lays them out.
        size: Number of ranks on the host.
    """

    def __init__(self, rank: int, words: Sequence[int], size: int) -> None:
        self.rank = rank
        self.call, self.item_bytes = words[:2]
        self.sent, self.awaited = words[3 : 3 + size], words[3 + size : 3 + 2 * size]

    def __str__(self) -> str:
        call = name_of(self.call)
        if self.call & _REDUCES:
            num_bytes = sum(self.sent) if self.call & _IN_PARTS else self.sent[0]
            call += f", {num_bytes} bytes"
        return f"rank {self.rank} calls {call}"


def difference_of(heads: Sequence[Head]) -> str:
    """What ranks do not agree on, in words.

    Args:
        heads: Of the ranks of a host; some pair of them does not fit.

    Returns:
        Which ranks, and how they differ.
    """
    first = heads[0]
    for other in heads:
        if other.call != first.call:
            return f"{first} and {other}"
    sender, receiver, sent, awaited = next(
        (sender, receiver, sender.sent[its], receiver.awaited[mine])
        for mine, sender in enumerate(heads)
        for its, receiver in enumerate(heads)
        if (sender.sent[its], sender.item_bytes) != (receiver.awaited[mine], receiver.item_bytes)
        and (sender.sent[its] or receiver.awaited[mine])
    )
    return (
        f"in {name_of(first.call)}, rank {sender.rank} has {sent} bytes for rank {receiver.rank}, "
        f"in items of {sender.item_bytes}, which expects {awaited}, in items of "
        f"{receiver.item_bytes}"
    )
