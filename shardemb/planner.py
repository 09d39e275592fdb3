"""TorchRec's planner, told what is fixed already. Decides; `plan.py` makes the plan of it."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.partitioners import GreedyPerfPartitioner
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import (
    KernelConfig,
    PlannerError,
    PlannerErrorType,
    ShardingOption,
    TopologyFactory,
    TrainerConfig,
)
from torchrec.distributed.types import ModuleSharder

from shardemb.cluster import Cluster
from shardemb.env import Env
from shardemb.errors import RunError
from shardemb.layout_rules import layouts_allowed
from shardemb.layouts import LAYOUTS, DataParallel, Layout, RowWise, TableWise
from shardemb.modules.discovery import Table

FUSED, DENSE = "fused", "dense"
_RESERVED = 0.15
"""Part of each rank's memory that is kept for everything but tables."""


class _AllLayouts:
    """What TorchRec's sharders offer only on CUDA: every layout, by fused kernels."""

    def sharding_types(self, compute_device_type: str) -> list[str]:  # noqa: ARG002
        """Names of the layouts; `layout_rules` says which of them a table may have."""
        return list(LAYOUTS)

    def compute_kernels(
        self,
        sharding_type: str,
        compute_device_type: str,  # noqa: ARG002
    ) -> list[str]:
        """Names of the kernels."""
        return [DENSE if sharding_type == DataParallel.torchrec_name else FUSED]


class PooledSharder(_AllLayouts, EmbeddingBagCollectionSharder):  # type: ignore[misc]
    """TorchRec's sharder of an `EmbeddingBagCollection`."""


class SequenceSharder(_AllLayouts, EmbeddingCollectionSharder):  # type: ignore[misc]
    """TorchRec's sharder of an `EmbeddingCollection`."""


def make_sharders() -> list[ModuleSharder[nn.Module]]:
    """Sharders of both kinds of collection."""
    return [PooledSharder(), SequenceSharder()]


class _NamedRanksFirst(GreedyPerfPartitioner):  # type: ignore[misc]
    """Places tables on the ranks that were named, and the others around them."""

    def __init__(self, rank_of: Mapping[str, int]) -> None:
        super().__init__()
        self._rank_of = rank_of

    def partition(
        self,
        proposal: list[ShardingOption],
        storage_constraint: Topology,
        **options: Any,
    ) -> list[ShardingOption]:
        """Sets the rank of every shard of a proposal, as its base class does.

        Raises:
            PlannerError: A table does not fit where it was named to be.
        """
        topology = copy.deepcopy(storage_constraint)
        rest = []
        for option in proposal:
            if option.name not in self._rank_of:
                rest.append(option)
                continue
            (shard,) = option.shards
            shard.rank = self._rank_of[option.name]
            device = topology.devices[shard.rank]
            if not shard.storage.fits_in(device.storage):
                raise PlannerError(
                    error_type=PlannerErrorType.PARTITION,
                    message=f"table {option.name!r} does not fit on rank {shard.rank}",
                )
            device.storage -= shard.storage
            device.perf += shard.perf
        super().partition(rest, topology, **options)
        return proposal


def choose_layouts(
    model: nn.Module,
    env: Env,
    layouts: Mapping[str, Layout],
    tables: Mapping[str, Table],
) -> dict[str, Layout]:
    """Completes layouts: for every table one, with its ranks or nodes.

    Args:
        model: Holds the tables.
        env: The ranks.
        layouts: Those that are named, by table.
        tables: All tables.

    Returns:
        Layouts by table; named ones as they were named.

    Raises:
        RunError: The planner finds no plan that fits.
    """
    rank_of = {
        name: layout.rank
        for name, layout in layouts.items()
        if isinstance(layout, TableWise) and layout.rank is not None
    }
    given = (vars(layout) for layout in layouts.values())
    if len(layouts) == len(tables) and not any(None in fields.values() for fields in given):
        return dict(layouts)
    planner = EmbeddingShardingPlanner(
        topology=topology_of(env),
        constraints={
            name: ParameterConstraints(
                sharding_types=_allowed(layouts.get(name), table, env),
                compute_kernels=[FUSED],
            )
            for name, table in tables.items()
        },
        partitioner=_NamedRanksFirst(rank_of),
        storage_reservation=FixedPercentageStorageReservation(percentage=_RESERVED),
        debug=False,
    )
    try:
        plan = planner.plan(model, make_sharders())
    except PlannerError as error:
        raise RunError(
            f"TorchRec's planner found no plan for {env.world_size} ranks: {error}"
        ) from error
    return {
        name: RowWise()
        if sharding.sharding_type == RowWise.torchrec_name
        else TableWise(rank=sharding.ranks[0])
        for module_plan in plan.plan.values()
        for name, sharding in module_plan.items()
    }


def topology_of(env: Env) -> Topology:
    """TorchRec's description of the ranks.

    On CUDA, where there is a device, with its memory; else with TorchRec's defaults: 32 GB of
    device memory, or 128 GB of host memory a rank on CPU.
    """
    memory = None
    if env.device.type == "cuda" and torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(env.device).total_memory
    return TopologyFactory.create_topology(
        trainer_config=TrainerConfig(
            world_size=env.world_size,
            local_world_size=env.local_world_size,
            hbm_cap_bytes=memory,
        ),
        kernel_config=KernelConfig(compute_device=env.device.type),
    )


def cluster_of(env: Env) -> Cluster:
    """The ranks of a run as a cluster, as TorchRec's topology describes them."""
    topology = topology_of(env)
    on_cuda = env.device.type == "cuda"
    storage = topology.devices[0].storage
    return Cluster(
        name="this run",
        num_nodes=env.num_nodes,
        ranks_per_node=env.local_world_size,
        device="cuda" if on_cuda else "cpu",
        memory_bytes=storage.hbm if on_cuda else storage.ddr,
        memory_gb_per_s=(topology.hbm_mem_bw if on_cuda else topology.ddr_mem_bw) * 1e3 / 1e9,
        intra_node_gb_per_s=topology.comms_bandwidths.intra_host_bw * 1e3 / 1e9,
        inter_node_gb_per_s=topology.comms_bandwidths.inter_host_bw * 1e3 / 1e9,
    )


def table_bytes_per_rank(env: Env) -> int:
    """Bytes of memory that a rank has for tables and their optimizer state."""
    storage = topology_of(env).devices[0].storage
    memory = storage.hbm if env.device.type == "cuda" else storage.ddr
    return int(memory * (1 - _RESERVED))


def _allowed(layout: Layout | None, table: Table, env: Env) -> list[str]:
    if layout is not None:
        return [layout.torchrec_name]
    allowed = layouts_allowed(
        table, world_size=env.world_size, local_world_size=env.local_world_size
    )
    return [name for name in allowed if name in {RowWise.torchrec_name, TableWise.torchrec_name}]
