"""Which rank holds which rows. Allocates nothing; needs neither processes nor GPUs."""

import difflib
from collections.abc import Iterable, Mapping

from torch import nn

from shardemb.config import BYTES_OF
from shardemb.env import Env
from shardemb.errors import RunError
from shardemb.geometry import Block, blocks_of
from shardemb.layout_rules import why_not
from shardemb.layouts import Layout
from shardemb.modules.discovery import Table, find_collections
from shardemb.placement import Shard, ShardingPlan, TablePlacement
from shardemb.planner import choose_layouts, cluster_of, table_bytes_per_rank
from shardemb.text import format_bytes
from shardemb.workload import Workload


def plan_sharding(
    model: nn.Module,
    env: Env,
    layouts: Mapping[str, Layout] | None = None,
    *,
    workload: Workload | None = None,
) -> ShardingPlan:
    """Decides which rank holds which rows: named layouts as named, the rest by TorchRec's planner.

    Args:
        model: Holds one or more `EmbeddingBagCollection`s or `EmbeddingCollection`s whose tables
            have their optimizers attached.
        env: The ranks to plan for; those of this run, or made by hand for another machine.
        layouts: A layout for some or all tables, by table name.
        workload: The batches to plan for; by default 512 samples a rank with one id a feature.

    Returns:
        The plan. Ranks of equal devices make the same one; `shard_modules` checks it.

    Raises:
        ValueError: The model has no collection or one that is not supported, a table name is
            unknown or not unique, or a layout does not fit its table or the ranks.
        RunError: The tables do not fit in the ranks' memory.

    Example:
        >>> import shardemb as se, shardemb.layouts
        >>> table = se.TableConfig(
        ...     name="user", num_embeddings=1000, embedding_dim=64, feature_names=("user_id",)
        ... )
        >>> model = se.EmbeddingBagCollection([table])
        >>> plan = plan_sharding(model, Env(world_size=4), {"user": se.layouts.row_wise()})
        >>> [shard.num_rows for shard in plan.tables[0].shards]
        [250, 250, 250, 250]
    """
    named = dict(layouts or {})
    collections = find_collections(model)
    tables = {name: table for found in collections.values() for name, table in found.tables.items()}
    ranks = {"world_size": env.world_size, "local_world_size": env.local_world_size}
    _check_layouts(named, tables, ranks)
    chosen = choose_layouts(model, env, named, tables)
    placements = [
        TablePlacement(
            table=name,
            module=found.path,
            feature_names=tuple(table.config.feature_names),
            num_embeddings=table.config.num_embeddings,
            embedding_dim=table.config.embedding_dim,
            dtype=table.dtype,
            pooling=table.pooling,
            is_weighted=table.is_weighted,
            trainable=table.trainable,
            layout=chosen[name].torchrec_name,
            chosen_by=_chosen_by(named.get(name), chosen[name]),
            optimizer=table.optimizer.__name__ if table.trainable else "none",
            shards=tuple(
                _shard(table, block) for block in blocks_of(chosen[name], _shape(table), **ranks)
            ),
        )
        for found in collections.values()
        for name, table in found.tables.items()
    ]
    made = ShardingPlan(
        cluster=cluster_of(env), workload=workload or Workload(), tables=tuple(placements)
    )
    _check_slices(made)
    _check_memory(made, table_bytes_per_rank(env))
    return made


def _check_layouts(
    layouts: Mapping[str, Layout], tables: Mapping[str, Table], ranks: Mapping[str, int]
) -> None:
    for name, layout in layouts.items():
        if name not in tables:
            raise ValueError(
                f"the layouts name table {name!r}, the model has {_some(tables, name)}"
            )
        if not isinstance(layout, Layout):
            raise ValueError(
                f"table {name!r}: the layout must come from shardemb.layouts, such as row_wise(), "
                f"got {layout!r}"
            )
        reason = why_not(tables[name], layout, **ranks)
        if reason:
            raise ValueError(f"table {name!r}: {reason}")


def _some(names: Iterable[str], like: str) -> str:
    """A few names, and the one that may have been meant."""
    names = list(names)
    close = difflib.get_close_matches(like, names, n=1)
    shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
    return shown + (f"; did you mean {close[0]!r}?" if close else "")


def _chosen_by(named: Layout | None, chosen: Layout) -> str:
    if named is None:
        return "planner"
    return "named" if named == chosen else "named, ranks by planner"


def _shape(table: Table) -> tuple[int, int]:
    return table.config.num_embeddings, table.config.embedding_dim


def _shard(table: Table, block: Block) -> Shard:
    return Shard(
        **block._asdict(),
        weight_bytes=block.num_rows * block.num_columns * BYTES_OF[table.dtype],
        optimizer_bytes=table.optimizer.state_bytes(block.num_rows, block.num_columns)
        if table.trainable
        else 0,
    )


def _check_slices(plan: ShardingPlan) -> None:
    """Refuses slices of two widths in one sequence collection, which TorchRec would mix up.

    Raises:
        ValueError: There are two.
    """
    widths: dict[str, tuple[int, str]] = {}
    for table in plan.tables:
        if table.pooling is not None or "column" not in table.layout:
            continue
        width = table.shards[0].num_columns
        first_width, first = widths.setdefault(table.module, (width, table.table))
        if width != first_width:
            raise ValueError(
                f"tables {first!r} and {table.table!r} of one EmbeddingCollection have slices of "
                f"{first_width} and {width} columns, and TorchRec needs one width; give both the "
                "same number of slices, or a collection each"
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
