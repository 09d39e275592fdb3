"""A sharding plan as TorchRec's own, which `DistributedModelParallel` takes."""

from collections.abc import Iterable

from torch.distributed._shard.sharding_spec import EnumerableShardingSpec, ShardMetadata
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.sharding_plan import placement
from torchrec.distributed.types import (
    EmbeddingModuleShardingPlan,
    ParameterSharding,
)
from torchrec.distributed.types import ShardingPlan as TorchRecShardingPlan

from shardemb.layouts import ColumnWise, DataParallel, TableColumnWise
from shardemb.placement import TablePlacement


def torchrec_plan(
    tables: Iterable[TablePlacement], *, local_world_size: int, device_type: str
) -> TorchRecShardingPlan:
    """TorchRec's plan of the same shards.

    Args:
        tables: Where each table lies.
        local_world_size: Number of ranks on each node.
        device_type: "cpu" or "cuda".

    Returns:
        The plan: fused kernels, and the dense kernel for data-parallel tables.
    """
    plan = TorchRecShardingPlan(plan={})
    for table in tables:
        module_plan = plan.plan.setdefault(table.module, EmbeddingModuleShardingPlan())
        module_plan[table.table] = _parameter_sharding(table, local_world_size, device_type)
    return plan


def _parameter_sharding(
    table: TablePlacement, local_world_size: int, device_type: str
) -> ParameterSharding:
    ranks = [shard.rank for shard in table.shards]
    if table.layout == DataParallel.torchrec_name:
        return ParameterSharding(
            sharding_type=table.layout,
            compute_kernel=EmbeddingComputeKernel.DENSE.value,
            ranks=ranks,
        )
    layout = table.layout
    if table.pooling is None and layout == TableColumnWise.torchrec_name:
        layout = ColumnWise.torchrec_name  # TorchRec's sequences know it by no other name
    return ParameterSharding(
        sharding_type=layout,
        compute_kernel=EmbeddingComputeKernel.FUSED.value,
        ranks=ranks,
        sharding_spec=EnumerableShardingSpec(
            [
                ShardMetadata(
                    shard_offsets=[shard.first_row, shard.first_column],
                    shard_sizes=[shard.num_rows, shard.num_columns],
                    placement=placement(device_type, shard.rank, local_world_size),
                )
                for shard in table.shards
            ]
        ),
    )
