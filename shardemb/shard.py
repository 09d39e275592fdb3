"""Puts a plan into effect: shards collections, sets the initial rows, guards the ids."""

import hashlib
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torchrec
from torch import nn
from torchrec.distributed.embedding_types import ShardedEmbeddingModule
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ShardingEnv

from shardemb.agree import all_or_none
from shardemb.allocator import give_freed_memory_back
from shardemb.data.batches import limits_of
from shardemb.data.guarded_forward import GuardedForward
from shardemb.env import Env
from shardemb.errors import RunError
from shardemb.exchange import exchange_group
from shardemb.huge_pages import advise_huge
from shardemb.layouts import DataParallel
from shardemb.modules.discovery import Collection, Table, find_collections, tables_of
from shardemb.one_backward import refuse_second_backwards
from shardemb.one_rank import NoOtherRanks
from shardemb.optim import SGD, SparseOptimizer
from shardemb.outputs import FinishPooled, FinishSequences, outputs_of
from shardemb.placement import ShardingPlan, TablePlacement
from shardemb.planning.torchrec_plan import torchrec_plan
from shardemb.plans.file import plan_to_file_text
from shardemb.plans.fit import check_fits
from shardemb.replicated_sequences import keep_replicated_sequences_apart
from shardemb.rows import Origin, blocks_of, left_unfilled, origin_of, set_rows
from shardemb.uneven_batches import allow_uneven_batches
from shardemb.updates.install import Trained, is_fused
from shardemb.updates.replicated import watch_lookups
from shardemb.updates.sharded import PooledRowSharder, SequenceRowSharder, row_kernels
from shardemb.updates.slices import groups_of_slices
from shardemb.updates.trained import Backwards, TrainedModel, TrainedTable, note_trained


def shard_modules(
    model: nn.Module,
    plan: ShardingPlan,
    env: Env,
    *,
    check_ids: bool = True,
    declared_order: bool = True,
) -> DistributedModelParallel:
    """Shards a model's collections by a plan and makes the rest data parallel, in place.

    Rows get the initial values that their tables declare, whatever the layout. A collection that
    already holds weights keeps those of rank 0, as `DistributedDataParallel` does for dense
    parameters.

    Args:
        model: The model that the plan was made for.
        plan: Of `plan_sharding`, equal on all ranks.
        env: This process.
        check_ids: Whether a forward refuses ids that a table does not have. `TrainPipeline` checks
            batches on the CPU, before they move; in a loop of your own on CUDA the check waits for
            the device, and can be turned off when batches are checked where they are made.
        declared_order: Whether pooled features come in the order in which the tables declare them.
            TorchRec's order depends on the plan; where the two differ, this is one more copy. A
            model that reads features by name, by `pooled[name]`, `to_dict` or `regroup`, can do
            without.

    Returns:
        TorchRec's `DistributedModelParallel` around the model.

    Raises:
        ValueError: The plan does not fit the model, the ranks or their memory, or a TorchRec table
            has an `init_fn` that cannot be drawn shard by shard.
        RunError: The ranks differ in their plans, tables or seeds, or one of them was refused.
    """
    collections, origins = _checked(model, plan, env)
    layout_of = {table.table: table.layout for table in plan.tables}
    native = plan.kernel == "native"
    trained = _trained(collections, plan, env.device, native=native)
    _attach_fused_optimizers(collections, trained)
    with left_unfilled(collections.values()):
        sharded = DistributedModelParallel(
            module=model,
            env=ShardingEnv.from_process_group(exchange_group(env.device)),
            device=env.device,
            plan=torchrec_plan(
                plan.tables,
                local_world_size=env.local_world_size,
                device_type=env.device.type,
            ),
            sharders=[
                PooledRowSharder(trained, native=native),
                SequenceRowSharder(trained, native=native),
            ],
            data_parallel_wrapper=NoOtherRanks() if env.world_size == 1 else None,
        )
    tables: dict[str, TrainedTable] = {}
    backwards = Backwards()
    for path, collection in collections.items():
        module = sharded.module.get_submodule(path)
        keys = _fill(module, collection, origins, env)
        of_collection = {name: trained[name].training for name in keys if name in trained}
        for name, training in of_collection.items():
            key = ".".join(filter(None, (path, keys[name])))
            tables[name] = TrainedTable(key=key, training=training)
        replicated = {
            name: (module.get_parameter(keys[name]), training)
            for name, training in of_collection.items()
            if layout_of[name] == DataParallel.torchrec_name
        }
        watch_lookups(module, replicated)
        limits = limits_of(table.config for table in collection.tables.values())
        guard = GuardedForward(
            limits,
            is_weighted=collection.is_weighted,
            check_ids=check_ids,
            padding_of=collection.padding_of,
            keeps_int32=native and env.world_size == 1,
            weights_learn=native and collection.is_weighted,
        )
        module.register_forward_pre_hook(guard, with_kwargs=True)
        outputs = outputs_of(collection, layout_of)
        exchanges = any(layout_of[name] != DataParallel.torchrec_name for name in collection.tables)
        watch = partial(backwards.watch, path) if exchanges else _do_nothing
        if collection.is_pooled:
            _finish_pooled(
                module, FinishPooled(outputs, declared_order=declared_order, watch=watch), env
            )
        else:
            _finish_sequences(module, FinishSequences(outputs, watch), env)
    note_trained(sharded, TrainedModel(tables=tables, backwards=backwards))
    if env.world_size > 1:
        refuse_second_backwards(sharded)
    if not native:  # our own kernels made theirs on huge pages
        kept = [rows.state for kernel in row_kernels(sharded) for rows in kernel.trained]
        advise_huge(*(tensor for state in kept for tensor in state.values()))
    give_freed_memory_back()  # of what the rows were made from
    return sharded


def _finish_pooled(module: ShardedEmbeddingModule, finish: FinishPooled, env: Env) -> None:
    module._has_mean_pooling_callback = False  # FinishPooled divides
    allow_uneven_batches(module, env)
    module.register_forward_hook(finish)


def _finish_sequences(module: ShardedEmbeddingModule, finish: FinishSequences, env: Env) -> None:
    if env.device.type == "cpu":
        keep_replicated_sequences_apart(module)
    module.register_forward_hook(finish)


def _do_nothing(output: torch.Tensor) -> None:
    """No rank waits for another in the backward pass of replicated tables."""


def _fill(
    module: ShardedEmbeddingModule,
    collection: Collection,
    origins: Mapping[str, Origin],
    env: Env,
) -> dict[str, str]:
    """Gives a sharded collection its rows; returns the names of the tables' weights in it."""
    state = module.state_dict()
    within = "embedding_bags" if collection.is_pooled else "embeddings"
    keys = {name: f"{within}.{name}.weight" for name in collection.tables}
    advise_huge(*(block for key in keys.values() for block, _, _ in blocks_of(state[key])))
    for name, key in keys.items():
        set_rows(state[key], origins[name], env)
    return keys


def _checked(
    model: nn.Module, plan: ShardingPlan, env: Env
) -> tuple[dict[str, Collection], dict[str, Origin]]:
    """The collections to shard and where their rows come from, if all ranks agree on them.

    Raises:
        ValueError: This rank's model or plan is refused.
        RunError: The ranks differ, or another rank's is refused.
    """
    with all_or_none(env, "sharding the model"):
        collections = find_collections(model)
        check_fits(plan, collections, env, "the plan")
        tables = tables_of(collections)
        origins = {name: origin_of(table) for name, table in tables.items()}
        said = [plan_to_file_text(plan), repr(origins), *map(_declared, tables.values())]
    digests = [""] * env.world_size
    dist.all_gather_object(digests, hashlib.sha256("\n".join(said).encode()).hexdigest())
    other = next((rank for rank, digest in enumerate(digests) if digest != digests[0]), None)
    if other is not None:
        raise RunError(
            f"rank {other} has another plan, other tables, weights or seed than rank 0; declare "
            "and plan the same on every rank"
        )
    return collections, origins


def _declared(table: Table) -> str:
    """What ranks must agree on of a table, beside what the plan says."""
    return repr((table.name, table.padding_idx, table.training if table.trainable else None))


def _trained(
    collections: dict[str, Collection], plan: ShardingPlan, device: torch.device, *, native: bool
) -> dict[str, Trained]:
    """The tables that are to be updated, and by whom. On all ranks together."""
    tables = tables_of(collections)
    slices = {
        placement.table: _ranks_of_slices(placement)
        for placement in plan.tables
        if tables[placement.table].trainable
    }
    groups = groups_of_slices(
        (ranks for of in slices.values() for ranks in of.values()), device=device
    )
    return {
        name: Trained(
            training=tables[name].training,
            fused=not native
            and is_fused(tables[name].training, dtype=tables[name].dtype, slices=bool(of)),
            slices={first_row: groups[tuple(sorted(ranks))] for first_row, ranks in of.items()},
        )
        for name, of in slices.items()
    }


def _ranks_of_slices(placement: TablePlacement) -> dict[int, tuple[int, ...]]:
    """Where columns are split: by the first row of a block, the ranks that hold its slices."""
    if len({shard.first_column for shard in placement.shards}) < 2:
        return {}
    ranks: dict[int, tuple[int, ...]] = {}
    for shard in placement.shards:
        ranks[shard.first_row] = (*ranks.get(shard.first_row, ()), shard.rank)
    return ranks


def _attach_fused_optimizers(
    collections: dict[str, Collection], trained: Mapping[str, Trained]
) -> None:
    """Attaches what TorchRec picks a fused kernel by; it plans the dense one where there is none.

    Where FBGEMM does not update the rows, one without state that does nothing.
    """
    for table in tables_of(collections).values():
        kind: type[SparseOptimizer] = SGD
        given: dict[str, Any] = {"lr": 0.0}
        if table.name in trained and trained[table.name].fused:
            optimizer = table.training.optimizer
            kind = type(optimizer)
            given = {key: value for key, value in vars(optimizer).items() if value}
        table.weight._optimizer_classes = [  # type: ignore[attr-defined]
            getattr(torchrec.optim, kind.torchrec_class)
        ]
        table.weight._optimizer_kwargs = [given]  # type: ignore[attr-defined]
