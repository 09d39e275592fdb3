"""Puts a plan into effect: shards collections, sets the initial rows, guards the ids."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
import torchrec
from torch import nn
from torchrec.distributed.embedding_types import ShardedEmbeddingModule
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ShardingEnv

from shardemb.agree import all_or_none
from shardemb.data.batches import limits_of
from shardemb.data.guarded_forward import GuardedForward
from shardemb.env import Env
from shardemb.errors import RunError
from shardemb.layouts import DataParallel
from shardemb.modules.discovery import Collection, Table, find_collections, tables_of
from shardemb.optim import SGD, SparseOptimizer
from shardemb.optim.replicated import mark_replicated
from shardemb.outputs import FinishPooled, FinishSequences, outputs_of
from shardemb.placement import ShardingPlan
from shardemb.planning.sharders import make_sharders
from shardemb.planning.torchrec_plan import torchrec_plan
from shardemb.plans.file import plan_to_file_text
from shardemb.plans.fit import check_fits
from shardemb.replicated_sequences import keep_replicated_sequences_apart
from shardemb.rows import Origin, left_unfilled, origin_of, set_rows
from shardemb.uneven_batches import allow_uneven_batches


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
    _attach_fused_optimizers(collections)
    replicated = {
        name: _trained_by(table)
        for name, table in tables_of(collections).items()
        if layout_of[name] == DataParallel.torchrec_name
    }
    with left_unfilled(collections.values()):
        sharded = DistributedModelParallel(
            module=model,
            env=ShardingEnv.from_process_group(dist.group.WORLD),
            device=env.device,
            plan=torchrec_plan(
                plan.tables,
                local_world_size=env.local_world_size,
                device_type=env.device.type,
            ),
            sharders=make_sharders(),
        )
    for path, collection in collections.items():
        module = sharded.module.get_submodule(path)
        _fill(module, collection, origins, replicated, env)
        limits = limits_of(table.config for table in collection.tables.values())
        guard = GuardedForward(
            limits,
            is_weighted=collection.is_weighted,
            check_ids=check_ids,
            padding_of=collection.padding_of,
        )
        module.register_forward_pre_hook(guard, with_kwargs=True)
        outputs = outputs_of(collection, layout_of)
        if collection.is_pooled:
            module._has_mean_pooling_callback = False  # FinishPooled divides
            allow_uneven_batches(module, env)
            module.register_forward_hook(FinishPooled(outputs, declared_order=declared_order))
        else:
            if env.device.type == "cpu":
                keep_replicated_sequences_apart(module)
            module.register_forward_hook(FinishSequences(outputs))
    return sharded


def _fill(
    module: ShardedEmbeddingModule,
    collection: Collection,
    origins: Mapping[str, Origin],
    replicated: Mapping[str, tuple[type[SparseOptimizer], dict[str, Any]]],
    env: Env,
) -> None:
    """Gives a sharded collection its rows, and its replicated tables what trains them."""
    state = module.state_dict()
    within = "embedding_bags" if collection.is_pooled else "embeddings"
    for name in collection.tables:
        weight = f"{within}.{name}.weight"
        set_rows(state[weight], origins[name], env)
        if name in replicated:
            mark_replicated(module.get_parameter(weight), *replicated[name])


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
            f"rank {other} has another plan, other tables or another seed than rank 0; declare "
            "and plan the same on every rank"
        )
    return collections, origins


def _declared(table: Table) -> str:
    """What ranks must agree on of a table, beside what the plan says."""
    return repr((table.name, table.padding_idx, table.training if table.trainable else None))


def _attach_fused_optimizers(collections: dict[str, Collection]) -> None:
    """Attaches what TorchRec picks a fused kernel by; it plans the dense one where there is none.

    To frozen tables too: one without state, and `outputs.py` lets no gradient through.
    """
    for table in tables_of(collections).values():
        kind, given = _trained_by(table)
        table.weight._optimizer_classes = [  # type: ignore[attr-defined]
            getattr(torchrec.optim, kind.torchrec_class)
        ]
        table.weight._optimizer_kwargs = [given]  # type: ignore[attr-defined]


def _trained_by(table: Table) -> tuple[type[SparseOptimizer], dict[str, Any]]:
    """Class and settings of the optimizer of a table, for a frozen one of one that does nothing."""
    if not table.trainable:
        return SGD, {"lr": 0.0}
    given = vars(table.training.optimizer).items()
    return table.optimizer, {name: value for name, value in given if value}  # the others do nothing
