"""What each way in which a table may lie costs a rank in a step, as TorchRec estimates it.

By `EmbeddingPerfEstimator`, of the largest block: blocks of one layout cost the same, so one of
them stands for a thousand.
"""

from collections.abc import Mapping
from dataclasses import replace

from torch import nn
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator, get_partition_by_type
from torchrec.distributed.planner.shard_estimators import EmbeddingPerfEstimator
from torchrec.distributed.planner.types import (
    HardwareConfig,
    KernelConfig,
    Shard,
    ShardingOption,
    Topology,
    TopologyFactory,
    TrainerConfig,
)
from torchrec.distributed.types import ModuleSharder

from shardemb.cluster import Cluster
from shardemb.modules.discovery import Collection, Table
from shardemb.planning.candidates import Candidate, Cost
from shardemb.planning.geometry import largest_block
from shardemb.planning.sharders import kernel_of
from shardemb.workload import Workload


def estimated(
    candidates: Mapping[str, list[Candidate]],
    collections: Mapping[str, Collection],
    cluster: Cluster,
    workload: Workload,
    sharders: list[ModuleSharder[nn.Module]],
) -> dict[str, list[Candidate]]:
    """Candidates with TorchRec's estimates.

    Args:
        candidates: By table.
        collections: Those of the tables, by path.
        cluster: The ranks.
        workload: The batches.
        sharders: TorchRec's, of all kinds of collections.

    Returns:
        The same candidates, with their costs.
    """
    topology = topology_of(cluster)
    enumerator = EmbeddingEnumerator(
        topology=topology,
        batch_size=workload.batch_size,
        estimator=[EmbeddingPerfEstimator(topology=topology)],
    )
    enumerator.enumerate(nn.Module(), sharders)  # of no tables: it only learns the sharders
    options = {
        name: [
            _option(found, found.tables[name], candidate, workload, cluster)
            for candidate in candidates[name]
        ]
        for found in collections.values()
        for name in found.tables
        if name in candidates
    }
    enumerator.populate_estimates([option for of in options.values() for option in of])
    return {
        name: [
            _with_cost(candidate, option)
            for candidate, option in zip(candidates[name], of, strict=True)
        ]
        for name, of in options.items()
    }


def topology_of(cluster: Cluster) -> Topology:
    """TorchRec's description of a cluster."""
    on_cuda = cluster.device == "cuda"
    memory = cluster.memory_bytes
    bytes_per_ms = cluster.memory_gb_per_s * 1e6
    return TopologyFactory.create_topology(
        trainer_config=TrainerConfig(
            world_size=cluster.world_size, local_world_size=cluster.ranks_per_node
        ),
        hardware_config=HardwareConfig(
            **{"hbm_cap_bytes" if on_cuda else "ddr_cap_bytes": memory},
            **{"hbm_mem_bw" if on_cuda else "ddr_mem_bw": bytes_per_ms},
            intra_host_bw=cluster.intra_node_gb_per_s * 1e6,
            inter_host_bw=cluster.inter_node_gb_per_s * 1e6,
        ),
        # without it, TorchRec 1.8 drops all bandwidths and takes its defaults
        kernel_config=KernelConfig(
            compute_device=cluster.device, use_hardware_based_bandwidth=True
        ),
    )


def _option(
    found: Collection, table: Table, candidate: Candidate, workload: Workload, cluster: Cluster
) -> ShardingOption:
    (layout,) = candidate.layouts
    size = largest_block(
        layout,
        (table.config.num_embeddings, table.config.embedding_dim),
        candidate.num_places,
        world_size=cluster.world_size,
        local_world_size=cluster.ranks_per_node,
    )
    return ShardingOption(
        name=table.name,
        tensor=table.weight,
        module=(found.path, found.module),
        input_lengths=[workload.ids_of(name) for name in table.config.feature_names],
        batch_size=workload.batch_size,
        sharding_type=candidate.kind,
        partition_by=get_partition_by_type(candidate.kind),
        compute_kernel=kernel_of(layout),
        shards=[Shard(size=list(size), offset=[0, 0])],
        is_pooled=found.is_pooled,
    )


def _with_cost(candidate: Candidate, option: ShardingOption) -> Candidate:
    perf = option.shards[0].perf
    lookup_ms = float(perf.fwd_compute + perf.bwd_compute + perf.prefetch_compute)
    cost = Cost(lookup_ms, float(perf.total) - lookup_ms)
    return replace(candidate, costs=(cost,), ms=float(perf.total))
