"""Which rank holds which rows. Allocates nothing; needs neither processes nor GPUs."""

import difflib
from collections.abc import Mapping
from typing import Any

import torch
import torchrec
from torch import nn
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import (
    KernelConfig,
    PlannerError,
    TopologyFactory,
    TrainerConfig,
)
from torchrec.distributed.sharding_plan import construct_module_sharding_plan
from torchrec.distributed.sharding_plan import row_wise as torchrec_row_wise
from torchrec.distributed.sharding_plan import table_wise as torchrec_table_wise
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ParameterSharding
from torchrec.distributed.types import ShardingPlan as TorchRecShardingPlan

from shardemb import optim
from shardemb.env import Env
from shardemb.layouts import Layout, RowWise, TableWise, row_wise_leaves_a_rank_empty
from shardemb.optim import SparseOptimizer
from shardemb.placement import Shard, ShardingPlan, TablePlacement

_FUSED = "fused"
_CONFIG_OF: dict[type, type[SparseOptimizer]] = {
    torch.optim.SGD: optim.SGD,
    torch.optim.Adagrad: optim.Adagrad,
    torchrec.optim.SGD: optim.SGD,
    torchrec.optim.Adagrad: optim.Adagrad,
    torchrec.optim.RowWiseAdagrad: optim.RowWiseAdagrad,
}


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
        return [_FUSED]


def plan_sharding(
    model: nn.Module, env: Env, layouts: Mapping[str, Layout] | None = None
) -> ShardingPlan:
    """Decides which rank holds which rows: named layouts as named, the rest by TorchRec's planner.

    Args:
        model: Holds one or more `EmbeddingBagCollection`s whose tables have their optimizers
            attached.
        env: The ranks to plan for; those of this run, or made by hand for another machine.
        layouts: A layout for some or all tables, by table name.

    Returns:
        The plan, the same on every rank that asks for it.

    Raises:
        ValueError: The model has no collection, a table name is unknown or not unique, a layout
            does not fit its table or the ranks, or a table has no optimizer that FBGEMM can fuse.
        RuntimeError: TorchRec's planner finds no plan that fits.

    Example:
        >>> import shardemb as se
        >>> table = se.TableConfig(
        ...     name="user", num_embeddings=1000, embedding_dim=64, feature_names=("user_id",)
        ... )
        >>> model = se.EmbeddingBagCollection([table])
        >>> plan = plan_sharding(model, Env(world_size=4), {"user": RowWise()})
        >>> [shard.num_rows for shard in plan.tables[0].shards]
        [250, 250, 250, 250]
    """
    layouts = dict(layouts or {})
    collections = find_collections(model)
    weights = _weights_by_table(collections)
    _check_names(layouts, list(weights))
    for name, weight in weights.items():
        _check_optimizer(name, weight)
        _check_layout(name, layouts.get(name), weight.shape[0], env)
    chosen = _ask_planner(model, env, layouts, weights)
    plan = TorchRecShardingPlan(plan={})
    placements = []
    for path, collection in collections.items():
        named = {
            name: _by_hand(layouts[name], chosen.get(name))
            for name in collection.embedding_bags
            if name in layouts
        }
        rest = {
            name: _as_chosen(chosen[name])
            for name in collection.embedding_bags
            if name not in layouts
        }
        module_plan: EmbeddingModuleShardingPlan = construct_module_sharding_plan(
            collection,
            per_param_sharding=named | rest,
            sharder=Sharder(),
            local_size=env.local_world_size,
            world_size=env.world_size,
            device_type=env.device.type,
        )
        plan.plan[path] = module_plan
        placements += [
            _placement(
                name,
                path,
                weights[name],
                module_plan[name],
                _chosen_by(layouts.get(name)),
            )
            for name in collection.embedding_bags
        ]
    return ShardingPlan(world_size=env.world_size, tables=tuple(placements), torchrec=plan)


def find_collections(model: nn.Module) -> dict[str, torchrec.EmbeddingBagCollection]:
    """The unsharded collections of a model by their paths.

    Args:
        model: Any module.

    Returns:
        Paths and collections, at least one.

    Raises:
        ValueError: There is none.
    """
    found = {
        path: module
        for path, module in model.named_modules()
        if type(module) is torchrec.EmbeddingBagCollection
    }
    if not found:
        raise ValueError(
            f"{type(model).__name__} holds no unsharded EmbeddingBagCollection; "
            "build one with shardemb.EmbeddingBagCollection(tables) and give it to the model"
        )
    return found


def _weights_by_table(
    collections: Mapping[str, torchrec.EmbeddingBagCollection],
) -> dict[str, nn.Parameter]:
    weights: dict[str, nn.Parameter] = {}
    for path, collection in collections.items():
        for name, bag in collection.embedding_bags.items():
            if name in weights:
                raise ValueError(
                    f"table {name!r} is in two collections, the second is {path!r}; rename one of "
                    "them"
                )
            weights[name] = bag.weight
    return weights


def _check_names(layouts: Mapping[str, Layout], tables: list[str]) -> None:
    for name, layout in layouts.items():
        if name not in tables:
            close = difflib.get_close_matches(name, tables, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(
                f"the layouts name table {name!r}, the model has {', '.join(tables)}{hint}"
            )
        if not isinstance(layout, Layout):
            raise ValueError(
                f"table {name!r}: the layout must come from shardemb.layouts, such as row_wise(), "
                f"got {layout!r}"
            )


def _check_optimizer(name: str, weight: nn.Parameter) -> None:
    classes = getattr(weight, "_optimizer_classes", None)
    if not classes:
        raise ValueError(
            f"table {name!r} has no optimizer, so TorchRec would plan a kernel that never updates "
            "it in the backward "
            "pass; build the collection with shardemb.EmbeddingBagCollection, or call "
            "torch.distributed.optim._apply_optimizer_in_backward on its weight before "
            "plan_sharding"
        )
    if classes[0] not in _CONFIG_OF:
        raise ValueError(
            f"table {name!r}: optimizer {classes[0].__name__} is not supported yet; use one of "
            "SGD, Adagrad and "
            "RowWiseAdagrad of shardemb.optim"
        )


def _check_layout(name: str, layout: Layout | None, num_embeddings: int, env: Env) -> None:
    if isinstance(layout, TableWise) and layout.rank is not None and layout.rank >= env.world_size:
        raise ValueError(
            f"table {name!r}: table_wise(rank={layout.rank}) is planned for {env.world_size} "
            "ranks; "
            f"use a rank in 0..{env.world_size - 1}"
        )
    if isinstance(layout, RowWise) and row_wise_leaves_a_rank_empty(num_embeddings, env.world_size):
        raise ValueError(
            f"table {name!r}: row_wise over {env.world_size} ranks leaves a rank without rows, the "
            "table has "
            f"{num_embeddings}; use table_wise()"
        )


def _ask_planner(
    model: nn.Module, env: Env, layouts: Mapping[str, Layout], weights: Mapping[str, nn.Parameter]
) -> dict[str, ParameterSharding]:
    """What TorchRec's planner would do, given the layouts; empty if there is nothing to decide.

    Raises:
        RuntimeError: It finds no plan.
    """
    if all(
        isinstance(layout, RowWise) or layout.rank is not None for layout in layouts.values()
    ) and len(layouts) == len(weights):
        return {}
    constraints = {}
    for name, weight in weights.items():
        if name in layouts:
            allowed = [layouts[name].torchrec_name]
        elif row_wise_leaves_a_rank_empty(weight.shape[0], env.world_size):
            allowed = [TableWise.torchrec_name]
        else:
            allowed = [RowWise.torchrec_name, TableWise.torchrec_name]
        constraints[name] = ParameterConstraints(sharding_types=allowed, compute_kernels=[_FUSED])
    planner = EmbeddingShardingPlanner(
        topology=_topology(env),
        constraints=constraints,
        storage_reservation=FixedPercentageStorageReservation(percentage=0.15),
        debug=False,
    )
    try:
        plan = planner.plan(model, [Sharder()])
    except PlannerError as error:
        raise RuntimeError(
            f"TorchRec's planner found no plan for {env.world_size} ranks: {error}"
        ) from error
    return {
        name: sharding
        for module_plan in plan.plan.values()
        for name, sharding in module_plan.items()
    }


def _topology(env: Env) -> Topology:
    memory = None
    if env.device.type == "cuda" and torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(env.device).total_memory
    return TopologyFactory.create_topology(
        trainer_config=TrainerConfig(
            world_size=env.world_size, local_world_size=env.local_world_size, hbm_cap_bytes=memory
        ),
        kernel_config=KernelConfig(compute_device=env.device.type),
    )


def _by_hand(layout: Layout, chosen: ParameterSharding | None) -> Any:
    if isinstance(layout, RowWise):
        return torchrec_row_wise(compute_kernel=_FUSED)
    rank = layout.rank
    if rank is None:
        assert chosen is not None
        rank = chosen.ranks[0]
    return torchrec_table_wise(rank=rank, compute_kernel=_FUSED)


def _as_chosen(chosen: ParameterSharding) -> Any:
    layout: Layout = RowWise() if chosen.sharding_type == RowWise.torchrec_name else TableWise()
    return _by_hand(layout, chosen)


def _chosen_by(layout: Layout | None) -> str:
    if layout is None:
        return "planner"
    return "you, rank by planner" if layout == TableWise() else "you"


def _placement(
    name: str, path: str, weight: nn.Parameter, sharding: ParameterSharding, why: str
) -> TablePlacement:
    optimizer = weight._optimizer_classes[0]  # type: ignore[attr-defined]
    shards = []
    for shard in sharding.sharding_spec.shards:
        num_rows, num_columns = shard.shard_sizes
        shards.append(
            Shard(
                rank=shard.placement.rank(),
                first_row=shard.shard_offsets[0],
                num_rows=num_rows,
                weight_bytes=num_rows * num_columns * weight.element_size(),
                optimizer_bytes=_CONFIG_OF[optimizer].state_bytes(num_rows, num_columns),
            )
        )
    return TablePlacement(
        table=name,
        module=path,
        num_embeddings=weight.shape[0],
        embedding_dim=weight.shape[1],
        layout=sharding.sharding_type,
        why=why,
        optimizer=optimizer.__name__,
        shards=tuple(shards),
    )
