"""TorchRec's planner, told what is fixed already. Decides; `plan.py` makes the plan of it."""

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn
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

from shardemb.env import Env
from shardemb.errors import RunError
from shardemb.layouts import Layout, RowWise, TableWise

FUSED = "fused"
_RESERVED = 0.15
"""Part of each rank's memory that is kept for everything but tables."""


class Sharder(EmbeddingBagCollectionSharder):  # type: ignore[misc]
    """TorchRec's sharder, which also offers row-wise on CPU, and only what shardemb supports."""

    def sharding_types(self, compute_device_type: str) -> list[str]:  # noqa: ARG002
        """Names of the layouts."""
        return [RowWise.torchrec_name, TableWise.torchrec_name]

    def compute_kernels(
        self,
        sharding_type: str,  # noqa: ARG002
        compute_device_type: str,  # noqa: ARG002
    ) -> list[str]:
        """Names of the kernels."""
        return [FUSED]


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
    tables: Sequence[str],
    *,
    whole: Collection[str],
) -> dict[str, Layout]:
    """Completes layouts: for every table one, and for every table-wise one a rank.

    Args:
        model: Holds the tables.
        env: The ranks.
        layouts: Those that are named, by table.
        tables: Names of all tables.
        whole: Those that must not be row-wise.

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
    num_fixed = len(rank_of) + sum(isinstance(layout, RowWise) for layout in layouts.values())
    if num_fixed == len(tables):
        return dict(layouts)
    planner = EmbeddingShardingPlanner(
        topology=topology_of(env),
        constraints={
            name: ParameterConstraints(
                sharding_types=_allowed(layouts.get(name), whole=name in whole),
                compute_kernels=[FUSED],
            )
            for name in tables
        },
        partitioner=_NamedRanksFirst(rank_of),
        storage_reservation=FixedPercentageStorageReservation(percentage=_RESERVED),
        debug=False,
    )
    try:
        plan = planner.plan(model, [Sharder()])
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


def table_bytes_per_rank(env: Env) -> int:
    """Bytes of memory that a rank has for tables and their optimizer state."""
    storage = topology_of(env).devices[0].storage
    memory = storage.hbm if env.device.type == "cuda" else storage.ddr
    return int(memory * (1 - _RESERVED))


def _allowed(layout: Layout | None, *, whole: bool) -> list[str]:
    if layout is not None:
        return [layout.torchrec_name]
    return [TableWise.torchrec_name] if whole else [RowWise.torchrec_name, TableWise.torchrec_name]
