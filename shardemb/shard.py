"""Puts a plan into effect: shards collections, sets the initial values, guards the ids."""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torchrec
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec import KeyedTensor
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import LazyAwaitable, ShardingEnv
from torchrec.modules.embedding_configs import PoolingType

from shardemb.agree import all_or_none
from shardemb.data.batches import limits_of
from shardemb.data.id_guard import GuardedForward
from shardemb.env import Env
from shardemb.errors import RunError
from shardemb.init import Uniform
from shardemb.modules.discovery import find_collections
from shardemb.modules.embedding_bag import InitialValues
from shardemb.placement import ShardingPlan
from shardemb.planner import Sharder

_ROWS_AT_ONCE = 1 << 16


@dataclass(frozen=True, kw_only=True)
class _Origin:
    """Where the initial values of a table come from: drawn, or a weight that the model holds."""

    drawn: InitialValues | None = None
    held: torch.Tensor | None = field(default=None, repr=False)


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
        ValueError: The plan is for another number of ranks or another model, or a TorchRec table
            has an `init_fn` that cannot be drawn shard by shard.
        RunError: The ranks differ in their plans, tables or seeds, or one of them was refused.
    """
    collections, origins = _checked(model, plan, env)
    limits = {
        path: limits_of(collection.embedding_bag_configs())
        for path, collection in collections.items()
    }
    keys = {path: list(collection._embedding_names) for path, collection in collections.items()}
    with _left_unfilled(collections.values()):
        sharded = DistributedModelParallel(
            module=model,
            env=ShardingEnv.from_process_group(dist.group.WORLD),
            device=env.device,
            plan=plan.torchrec,
            sharders=[Sharder()],
        )
    for path, module in sharded.module.named_modules():
        if isinstance(module, ShardedEmbeddingBagCollection):
            _set_initial_values(module, origins[path], env)
            _keep_means_apart(module)
            module.register_forward_pre_hook(GuardedForward(limits[path], check_ids=check_ids))
            if declared_order:
                module.register_forward_hook(_InOrder(keys[path]))
    return sharded


def _checked(
    model: nn.Module, plan: ShardingPlan, env: Env
) -> tuple[dict[str, torchrec.EmbeddingBagCollection], dict[str, dict[str, _Origin]]]:
    """The collections to shard and where their rows come from, if all ranks agree on them.

    Raises:
        ValueError: This rank's model or plan is refused.
        RunError: The ranks differ, or another rank's is refused.
    """
    with all_or_none(env, "sharding the model"):
        if plan.world_size != env.world_size:
            raise ValueError(
                f"the plan is for {plan.world_size} ranks, this run has {env.world_size}; plan "
                "again with this env"
            )
        collections = find_collections(model)
        planned = {(t.table, t.module, t.num_embeddings, t.embedding_dim) for t in plan.tables}
        found = {
            (name, path, *bag.weight.shape)
            for path, module in collections.items()
            for name, bag in module.embedding_bags.items()
        }
        if planned != found:
            differ = sorted({name for name, *_ in planned ^ found})
            raise ValueError(
                f"the plan and the model differ in tables {differ}; plan again for this model"
            )
        origins = {path: _origins(collection) for path, collection in collections.items()}
        said = [plan.to_json(), repr(origins)]
        said += [
            repr((table.name, table.embedding_dim, table.feature_names, table.pooling))
            for collection in collections.values()
            for table in collection.embedding_bag_configs()
        ]
        said += [repr(getattr(p, "_optimizer_kwargs", None)) for p in model.parameters()]
    digests = [""] * env.world_size
    dist.all_gather_object(digests, hashlib.sha256("\n".join(said).encode()).hexdigest())
    other = next((rank for rank, digest in enumerate(digests) if digest != digests[0]), None)
    if other is not None:
        raise RunError(
            f"rank {other} has another plan, other tables or another seed than rank 0; declare "
            "and plan the same on every rank"
        )
    return collections, origins


def _origins(collection: torchrec.EmbeddingBagCollection) -> dict[str, _Origin]:
    origins = {}
    for config in collection.embedding_bag_configs():
        weight = collection.embedding_bags[config.name].weight
        if not weight.is_meta:
            origins[config.name] = _Origin(held=weight.detach())
        elif isinstance(config.init_fn, InitialValues):
            origins[config.name] = _Origin(drawn=config.init_fn)
        elif _is_uniform(config.init_fn):
            bounds = config.init_fn.keywords
            uniform = Uniform(low=bounds.get("a", 0.0), high=bounds.get("b", 1.0))
            origins[config.name] = _Origin(drawn=InitialValues(config.name, uniform, seed=0))
        else:
            raise ValueError(
                f"table {config.name!r} is on meta and has an init_fn of its own, which cannot be "
                "drawn shard by shard; build the collection on 'cpu', and its weights are "
                "carried over, or use shardemb.init"
            )
    return origins


class _InOrder:
    """A forward hook: the pooled features in the order in which the tables declare them.

    TorchRec returns them by layout, so that a model which reads all columns at once would be
    another model under another plan.
    """

    def __init__(self, keys: list[str]) -> None:
        self._keys = keys

    def __call__(
        self,
        module: nn.Module,  # noqa: ARG002
        args: tuple[Any, ...],  # noqa: ARG002
        output: LazyAwaitable[KeyedTensor],
    ) -> None:
        """What torch calls after a forward."""
        output.callbacks.append(self._reorder)

    def _reorder(self, pooled: KeyedTensor) -> KeyedTensor:
        if list(pooled.keys()) == self._keys:
            return pooled
        width_of = dict(zip(pooled.keys(), pooled.length_per_key(), strict=True))
        # on CPU two thirds of the time of KeyedTensor.regroup
        columns = dict(
            zip(width_of, pooled.values().split(list(width_of.values()), 1), strict=True)
        )
        return KeyedTensor(
            keys=self._keys,
            length_per_key=[width_of[key] for key in self._keys],
            values=torch.cat([columns[key] for key in self._keys], 1),
        )


def _is_uniform(init_fn: object) -> bool:
    """Whether an `init_fn` is nn.init.uniform_ with bounds, as TorchRec's default is."""
    return (
        isinstance(init_fn, partial)
        and init_fn.func is nn.init.uniform_
        and not init_fn.args
        and set(init_fn.keywords) <= {"a", "b"}
    )


def _keep_means_apart(module: ShardedEmbeddingBagCollection) -> None:
    """Keeps row-wise mean pooling off the features of other tables.

    A row-wise mean is summed on each shard and divided afterwards. TorchRec 1.6 and 1.8 divide all
    features of the collection but those of row-wise sum tables: table-wise features too, which are
    complete already.
    """
    row_wise = module._pooling_type_to_rs_features
    means = set(row_wise[PoolingType.MEAN.value])
    features = [
        feature
        for names in module._table_name_to_config.values()
        for feature in names.feature_names
    ]
    row_wise[PoolingType.SUM.value] = [feature for feature in features if feature not in means]


@contextmanager
def _left_unfilled(collections: Iterable[torchrec.EmbeddingBagCollection]) -> Iterator[None]:
    """Keeps TorchRec from filling shards; it tells no `init_fn` which rows a shard holds."""
    configs = [
        config for collection in collections for config in collection.embedding_bag_configs()
    ]
    fills = [config.init_fn for config in configs]
    for config in configs:
        config.init_fn = lambda _: None
    try:
        yield
    finally:
        for config, fill in zip(configs, fills, strict=True):
            config.init_fn = fill


@torch.no_grad()
def _set_initial_values(
    module: ShardedEmbeddingBagCollection, origins: dict[str, _Origin], env: Env
) -> None:
    state = module.state_dict()
    for name, origin in origins.items():
        weight: ShardedTensor = state[f"embedding_bags.{name}.weight"]
        if origin.held is not None:
            _take_from_main(origin.held, weight, env)
            continue
        assert origin.drawn is not None
        for shard in weight.local_shards():
            first_row, first_column = shard.metadata.shard_offsets
            origin.drawn.fill(
                shard.tensor,
                first_row=first_row,
                first_column=first_column,
                embedding_dim=weight.metadata().size[1],
            )


def _take_from_main(held_RD: torch.Tensor, weight: ShardedTensor, env: Env) -> None:
    """Copies rank 0's whole table into the shards, some rows at a time."""
    for start in range(0, held_RD.shape[0], _ROWS_AT_ONCE):
        rows = held_RD[start : start + _ROWS_AT_ONCE].to(env.device, copy=True)
        dist.broadcast(rows, src=0)
        for shard in weight.local_shards():
            first, column = shard.metadata.shard_offsets
            num_rows, num_columns = shard.metadata.shard_sizes
            low, high = max(first, start), min(first + num_rows, start + len(rows))
            if low < high:
                shard.tensor[low - first : high - first].copy_(
                    rows[low - start : high - start, column : column + num_columns]
                )
