"""Which rank holds which rows. Allocates nothing; needs neither processes nor GPUs."""

import difflib
from collections.abc import Iterable, Mapping

from torch import nn
from torchrec.distributed.sharding_plan import construct_module_sharding_plan
from torchrec.distributed.sharding_plan import row_wise as torchrec_row_wise
from torchrec.distributed.sharding_plan import table_wise as torchrec_table_wise
from torchrec.distributed.types import ParameterSharding
from torchrec.distributed.types import ShardingPlan as TorchRecShardingPlan

from shardemb.env import Env
from shardemb.errors import RunError
from shardemb.layouts import Layout, RowWise, TableWise, row_wise_leaves_a_rank_empty
from shardemb.modules.discovery import find_collections, optimizer_of, tables_not_row_wise
from shardemb.placement import Shard, ShardingPlan, TablePlacement
from shardemb.planner import FUSED, Sharder, choose_layouts, table_bytes_per_rank
from shardemb.text import format_bytes


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
        The plan. Ranks of equal devices make the same one; `shard_modules` checks it.

    Raises:
        ValueError: The model has no collection or one that is not supported, a table name is
            unknown or not unique, or a layout does not fit its table or the ranks.
        RunError: The tables do not fit in the ranks' memory.

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
    named = dict(layouts or {})
    collections = find_collections(model)
    weights = {
        name: bag.weight
        for collection in collections.values()
        for name, bag in collection.embedding_bags.items()
    }
    num_embeddings = {name: weight.shape[0] for name, weight in weights.items()}
    not_row_wise = {
        table: feature
        for collection in collections.values()
        for table, feature in tables_not_row_wise(collection).items()
    }
    _check_layouts(named, num_embeddings, not_row_wise, env)
    too_small = {
        name
        for name, rows in num_embeddings.items()
        if row_wise_leaves_a_rank_empty(rows, env.world_size)
    }
    chosen = choose_layouts(model, env, named, list(weights), whole=too_small | set(not_row_wise))
    plan = TorchRecShardingPlan(plan={})
    placements = []
    for path, collection in collections.items():
        plan.plan[path] = construct_module_sharding_plan(
            collection,
            per_param_sharding={
                name: _torchrec_layout(chosen[name]) for name in collection.embedding_bags
            },
            sharder=Sharder(),
            local_size=env.local_world_size,
            world_size=env.world_size,
            device_type=env.device.type,
        )
        placements += [
            _placement(name, path, weights[name], sharding, _chosen_by(named.get(name)))
            for name, sharding in plan.plan[path].items()
        ]
    made = ShardingPlan(world_size=env.world_size, tables=tuple(placements), torchrec=plan)
    _check_memory(made, table_bytes_per_rank(env))
    return made


def _check_layouts(
    layouts: Mapping[str, Layout],
    num_embeddings: Mapping[str, int],
    not_row_wise: Mapping[str, str],
    env: Env,
) -> None:
    for name, layout in layouts.items():
        if name not in num_embeddings:
            raise ValueError(
                f"the layouts name table {name!r}, the model has {_some(num_embeddings, name)}"
            )
        if not isinstance(layout, Layout):
            raise ValueError(
                f"table {name!r}: the layout must come from shardemb.layouts, such as row_wise(), "
                f"got {layout!r}"
            )
        if isinstance(layout, TableWise) and (layout.rank or 0) >= env.world_size:
            raise ValueError(
                f"table {name!r}: table_wise(rank={layout.rank}) is planned for {env.world_size} "
                f"ranks; use a rank in 0..{env.world_size - 1}"
            )
        rows = num_embeddings[name]
        if isinstance(layout, RowWise) and row_wise_leaves_a_rank_empty(rows, env.world_size):
            raise ValueError(
                f"table {name!r}: row_wise over {env.world_size} ranks leaves a rank without "
                f"rows, the table has {rows}; use table_wise()"
            )
        if isinstance(layout, RowWise) and name in not_row_wise:
            raise ValueError(
                f"table {name!r} has mean pooling and cannot be row_wise in a collection in which "
                f"two tables look up feature {not_row_wise[name]!r}: TorchRec computes that "
                "wrongly; use table_wise(), or two collections"
            )


def _some(names: Iterable[str], like: str) -> str:
    """A few names, and the one that may have been meant."""
    names = list(names)
    close = difflib.get_close_matches(like, names, n=1)
    shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
    return shown + (f"; did you mean {close[0]!r}?" if close else "")


def _torchrec_layout(layout: Layout) -> object:
    if isinstance(layout, RowWise):
        return torchrec_row_wise(compute_kernel=FUSED)
    assert layout.rank is not None
    return torchrec_table_wise(rank=layout.rank, compute_kernel=FUSED)


def _chosen_by(layout: Layout | None) -> str:
    if layout is None:
        return "planner"
    return "named, rank by planner" if layout == TableWise() else "named"


def _placement(
    name: str, path: str, weight: nn.Parameter, sharding: ParameterSharding, chosen_by: str
) -> TablePlacement:
    optimizer = optimizer_of(weight)
    shards = []
    for shard in sharding.sharding_spec.shards:
        num_rows, num_columns = shard.shard_sizes
        shards.append(
            Shard(
                rank=shard.placement.rank(),
                first_row=shard.shard_offsets[0],
                num_rows=num_rows,
                weight_bytes=num_rows * num_columns * weight.element_size(),
                optimizer_bytes=optimizer.state_bytes(num_rows, num_columns),
            )
        )
    return TablePlacement(
        table=name,
        module=path,
        num_embeddings=weight.shape[0],
        embedding_dim=weight.shape[1],
        layout=sharding.sharding_type,
        chosen_by=chosen_by,
        optimizer=optimizer.__name__,
        shards=tuple(shards),
    )


def _check_memory(plan: ShardingPlan, limit: int) -> None:
    per_rank = plan.bytes_per_rank
    fullest = max(range(plan.world_size), key=per_rank.__getitem__)
    if per_rank[fullest] > limit:
        there = [
            (shard.num_bytes, table.table)
            for table in plan.tables
            for shard in table.shards
            if shard.rank == fullest
        ]
        num_bytes, table = max(there)
        raise RunError(
            f"rank {fullest} would hold {format_bytes(per_rank[fullest])} of tables and optimizer "
            f"state, and has {format_bytes(limit)} for them; most is of table {table!r}, "
            f"{format_bytes(num_bytes)}: use more ranks, row_wise() or fewer rows"
        )
