"""TorchRec's own planner, and its rating of any plan, to compare with."""

import random
from collections.abc import Mapping
from typing import NamedTuple

from torch import nn
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.perf_models import NoopPerfModel
from torchrec.distributed.planner.shard_estimators import EmbeddingPerfEstimator
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation

import shardemb as se
from shardemb.constraints import DEFAULT_HEADROOM
from shardemb.modules.discovery import Table, find_collections
from shardemb.optim import SparseOptimizer
from shardemb.planning.estimates import topology_of
from shardemb.planning.layout_rules import layouts_allowed
from shardemb.planning.sharders import make_sharders

KERNELS = ["fused", "dense"]


class Placed(NamedTuple):
    """How a table lies: what TorchRec needs to make the same shards, and their ranks."""

    layout: str
    width: int
    ranks: list[int]


def some_tables(
    num_tables: int, seed: int, optimizer: SparseOptimizer, *, most_rows: float = 1e7
) -> tuple[nn.Module, se.Workload]:
    """Tables of many sizes, from a thousand rows, and a workload of their features."""
    draw = random.Random(seed)
    tables = [
        se.TableConfig(
            name=f"t{i}",
            num_embeddings=int(1000 * (most_rows / 1000) ** draw.random()),
            embedding_dim=draw.choice([32, 64, 128, 256]),
            feature_names=(f"f{i}",),
            optimizer=optimizer,
        )
        for i in range(num_tables)
    ]
    ids = {f"f{i}": draw.choice([1.0, 1.0, 1.0, 5.0, 20.0, 50.0]) for i in range(num_tables)}
    workload = se.Workload(batch_size=1024, ids_per_sample=ids)
    return se.EmbeddingBagCollection(tables), workload


def of_plan(plan: se.ShardingPlan) -> dict[str, Placed]:
    """How the tables of a plan lie."""
    return {
        table.table: Placed(
            table.layout, table.shards[0].num_columns, [shard.rank for shard in table.shards]
        )
        for table in plan.tables
    }


def torchrec_placed(
    model: nn.Module, cluster: se.Cluster, workload: se.Workload, *, narrowest: int = 128
) -> dict[str, Placed]:
    """How the tables lie by TorchRec's planner, of the layouts that shardemb's may choose too.

    It splits columns into slices of one width only, by default of 128.
    """
    tables = _tables(model)
    constraints = {
        name: _constraints(
            table,
            layouts_allowed(
                table, world_size=cluster.world_size, local_world_size=cluster.ranks_per_node
            ),
            workload,
            narrowest if table.config.embedding_dim > narrowest else None,
        )
        for name, table in tables.items()
    }
    planner = EmbeddingShardingPlanner(
        topology=topology_of(cluster),
        batch_size=workload.batch_size,
        constraints=constraints,
        storage_reservation=FixedPercentageStorageReservation(percentage=DEFAULT_HEADROOM),
        debug=False,
    )
    found = {}
    for module_plan in planner.plan(model, make_sharders()).plan.values():
        for name, sharding in module_plan.items():
            spec = sharding.sharding_spec
            width = tables[name].config.embedding_dim
            found[name] = Placed(
                sharding.sharding_type,
                width if spec is None else spec.shards[0].shard_sizes[1],
                list(sharding.ranks)
                if spec is None
                else [shard.placement.rank() for shard in spec.shards],
            )
    return found


def rated_ms(
    model: nn.Module, cluster: se.Cluster, workload: se.Workload, placed: Mapping[str, Placed]
) -> float:
    """Milliseconds of the busiest rank, by TorchRec's estimate of every single shard."""
    topology = topology_of(cluster)
    tables = _tables(model)
    constraints = {
        name: _constraints(
            table,
            [placed[name].layout],
            workload,
            placed[name].width if placed[name].width < table.config.embedding_dim else None,
        )
        for name, table in tables.items()
    }
    enumerator = EmbeddingEnumerator(
        topology=topology,
        batch_size=workload.batch_size,
        constraints=constraints,
        estimator=[EmbeddingPerfEstimator(topology=topology, constraints=constraints)],
    )
    options = enumerator.enumerate(model, make_sharders())
    assert {option.name for option in options} == set(placed)
    for option in options:
        for shard, rank in zip(option.shards, placed[option.name].ranks, strict=True):
            shard.rank = rank
    return float(NoopPerfModel(topology).rate(options))


def _tables(model: nn.Module) -> dict[str, Table]:
    return {
        name: table
        for found in find_collections(model).values()
        for name, table in found.tables.items()
    }


def _constraints(
    table: Table, layouts: list[str], workload: se.Workload, width: int | None
) -> ParameterConstraints:
    return ParameterConstraints(
        sharding_types=layouts,
        compute_kernels=KERNELS,
        pooling_factors=[workload.ids_of(name) for name in table.config.feature_names],
        min_partition=width,
    )
