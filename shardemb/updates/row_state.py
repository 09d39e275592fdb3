"""State of one number a row, where columns are split: every slice holds it, and it is saved once.

TorchRec would save it slice after slice, in another shape than under other layouts.
"""

# R rows

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor
from torch.distributed._shard.sharded_tensor.metadata import ShardedTensorMetadata, TensorProperties
from torch.distributed._shard.sharding_spec import ShardMetadata

from shardemb.updates.shard_rows import ShardRows


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
