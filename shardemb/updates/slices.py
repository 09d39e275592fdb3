"""Rows of which ranks hold different columns: sums over whole rows, and state of one number a row.

Every slice holds such state, and it is saved once; TorchRec would save it slice after slice, in
another shape than under other layouts.
"""

# R rows

from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor
from torch.distributed._shard.sharded_tensor.metadata import ShardedTensorMetadata, TensorProperties
from torch.distributed._shard.sharding_spec import ShardMetadata

from shardemb.exchange import group_of
from shardemb.updates.shard_rows import ShardRows

T = TypeVar("T")


def run_together(
    updates: Iterable[tuple[Generator[torch.Tensor, torch.Tensor, T], dist.ProcessGroup | None]],
) -> list[T]:
    """Runs updates side by side, with one collective a round for each group of ranks.

    Args:
        updates: Each with the ranks that hold the other columns of its rows, if there are any. All
            ranks of a group run the same updates of it in the same order.

    Returns:
        What each returned.
    """
    results: dict[int, T] = {}
    runs = dict(enumerate(updates))
    asked: dict[int, torch.Tensor] = {}

    def advance(number: int, total: torch.Tensor | None) -> None:
        update, _ = runs[number]
        try:
            asked[number] = next(update) if total is None else update.send(total)
        except StopIteration as end:
            results[number] = end.value

    for number in runs:
        advance(number, None)
    while asked:
        waiting, parts = list(asked), list(asked.values())
        asked.clear()
        totals = _summed(parts, [runs[number][1] for number in waiting])
        for number, total in zip(waiting, totals, strict=True):
            advance(number, total)
    return [results[number] for number in runs]


def _summed(
    parts: Sequence[torch.Tensor], groups: Sequence[dist.ProcessGroup | None]
) -> list[torch.Tensor]:
    """Each part, where it has a group summed over its ranks."""
    totals = list(parts)
    for group in dict.fromkeys(group for group in groups if group is not None):
        own = [number for number, its in enumerate(groups) if its is group]
        flat = torch.cat([parts[number].flatten() for number in own])
        dist.all_reduce(flat, group=group)
        pieces = flat.split([parts[number].numel() for number in own])
        for number, piece in zip(own, pieces, strict=True):
            totals[number] = piece.view_as(parts[number])
    return totals


def groups_of_slices(
    rank_sets: Iterable[Sequence[int]], *, device: torch.device
) -> dict[tuple[int, ...], dist.ProcessGroup]:
    """A process group for each set of ranks, made on all ranks together.

    Args:
        rank_sets: Sets of at least two ranks, the same on every rank.
        device: Of the tables.

    Returns:
        Groups by their ranks, ascending.
    """
    return {
        ranks: group_of(ranks, device)
        for ranks in sorted({tuple(sorted(ranks)) for ranks in rank_sets})
    }


def saved_once(weight: ShardedTensor, state: str, blocks: Iterable[ShardRows]) -> ShardedTensor:
    """A row-wise state as one tensor over all rows, of which the first slice has the shards.

    Args:
        weight: The table.
        state: Name of the state.
        blocks: Those of the table on this rank.

    Returns:
        A float32 tensor [R] of the same storage.
    """
    of_weight = weight.metadata()
    shards = [
        ShardMetadata(
            shard_offsets=shard.shard_offsets[:1],
            shard_sizes=shard.shard_sizes[:1],
            placement=shard.placement,
        )
        for shard in of_weight.shards_metadata
        if shard.shard_offsets[1] == 0
    ]
    held = {rows.first_row: rows.state[state] for rows in blocks if rows.first_column == 0}
    local = [
        Shard(held[shard.shard_offsets[0]], shard)
        for shard in shards
        if shard.shard_offsets[0] in held
    ]
    metadata = ShardedTensorMetadata(
        shards_metadata=shards,
        size=torch.Size(of_weight.size[:1]),
        tensor_properties=TensorProperties(
            dtype=torch.float32, layout=torch.strided, requires_grad=False
        ),
    )
    return ShardedTensor._init_from_local_shards_and_global_metadata(
        local, metadata, process_group=weight._process_group
    )


def give_to_slices(weights: Mapping[str, ShardedTensor], blocks: Iterable[ShardRows]) -> None:
    """Gives all slices the row-wise states that the first one was loaded with.

    Args:
        weights: The tables by name.
        blocks: Those of this rank, in the same order on all ranks of a table.
    """
    for rows in blocks:
        if rows.slices is None:
            continue
        of_table = weights[rows.table].metadata().shards_metadata
        first = next(
            shard for shard in of_table if list(shard.shard_offsets) == [rows.first_row, 0]
        )
        for value in rows.state.values():
            if value.dim() == 1:
                assert first.placement is not None
                dist.broadcast(value, src=first.placement.rank(), group=rows.slices)
