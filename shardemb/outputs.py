"""What a sharded collection returns, made equal to what the unsharded one returns.

In the declared order; with exact means; without gradients for frozen tables; from batches that
differ in size between ranks.
"""

# B batch of this rank, D width of a feature, N rows of a shard's output

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torchrec import JaggedTensor, KeyedJaggedTensor, KeyedTensor
from torchrec.distributed.embedding_sharding import EmbeddingShardingContext
from torchrec.distributed.embedding_types import ShardedEmbeddingModule
from torchrec.distributed.sharding.grid_sharding import GridPooledEmbeddingDist
from torchrec.distributed.sharding.rw_sharding import RwPooledEmbeddingDist
from torchrec.distributed.sharding.twrw_sharding import TwRwPooledEmbeddingDist
from torchrec.distributed.types import Awaitable

from shardemb.env import Env
from shardemb.layouts import LAYOUTS, DataParallel
from shardemb.modules.discovery import Collection


@dataclass(frozen=True, kw_only=True)
class _Output:
    """What is to be done to one output of a collection.

    Attributes:
        feature: The key in the batch.
        mean: Whether it is a sum, to be divided by the number of its ids.
        frozen: Whether its table is not to be updated.
        replicated: Whether every rank has the whole table, and waits for a gradient.
    """

    feature: str
    mean: bool
    frozen: bool
    replicated: bool

    def of(self, values: torch.Tensor, batch: KeyedJaggedTensor) -> torch.Tensor:
        """The values that the unsharded collection would return."""
        if self.mean:
            lengths_B = batch[self.feature].lengths()
            values = values / lengths_B.clamp(min=1).unsqueeze(1)
        if self.frozen:
            # DistributedDataParallel needs a gradient, be it zero, of every replicated table
            values = _without_gradient(values) if self.replicated else values.detach()
        return values


def _without_gradient(values: torch.Tensor) -> torch.Tensor:
    same: torch.Tensor = _WithoutGradient.apply(values)  # type: ignore[no-untyped-call]
    return same


class _WithoutGradient(torch.autograd.Function):
    """The identity, whose gradient is zero but there."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:  # noqa: ARG004
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:  # noqa: ARG004
        return torch.zeros_like(gradients[0])


def outputs_of(collection: Collection, layout_of: Mapping[str, str]) -> dict[str, _Output]:
    """What is to be done to the outputs of a sharded collection, by their names, as declared.

    Args:
        collection: Unsharded.
        layout_of: TorchRec's name of each table's layout.

    Returns:
        One entry for each feature, and for a feature of two tables one for each "feature@table".
    """
    shared = set(collection.shared_features)
    outputs = {}
    for table in collection.tables.values():
        layout = layout_of[table.name]
        for feature in table.config.feature_names:
            name = f"{feature}@{table.name}" if feature in shared else feature
            outputs[name] = _Output(
                feature=feature,
                mean=table.pooling == "mean" and LAYOUTS[layout].splits_rows,
                frozen=not table.trainable,
                replicated=layout == DataParallel.torchrec_name,
            )
    return outputs


class FinishPooled:
    """A forward hook of a pooled collection.

    TorchRec returns features by layout, so that a model which reads all columns at once would be
    another model under another plan. A mean over rows of several shards is summed on each and
    divided afterwards, which TorchRec 1.6 and 1.8 do wrongly for features of other tables, for
    features of several tables and under `grid_shard`; so it is divided here.

    Args:
        outputs: Of `outputs_of`.
        declared_order: Whether to return the features as declared.
    """

    def __init__(self, outputs: Mapping[str, _Output], *, declared_order: bool) -> None:
        self._outputs, self._declared_order = outputs, declared_order
        self._only_order = not any(output.mean or output.frozen for output in outputs.values())

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:  # noqa: ARG002
        """What torch calls after a forward."""
        output.callbacks.append(lambda pooled: self._finish(pooled, args[0]))

    def _finish(self, pooled: KeyedTensor, batch: KeyedJaggedTensor) -> KeyedTensor:
        keys = list(self._outputs if self._declared_order else pooled.keys())
        if self._only_order and list(pooled.keys()) == keys:
            return pooled
        width_of = dict(zip(pooled.keys(), pooled.length_per_key(), strict=True))
        # on CPU two thirds of the time of KeyedTensor.regroup
        columns = dict(
            zip(width_of, pooled.values().split(list(width_of.values()), 1), strict=True)
        )
        return KeyedTensor(
            keys=keys,
            length_per_key=[width_of[key] for key in keys],
            values=torch.cat([self._outputs[key].of(columns[key], batch) for key in keys], 1),
        )


class FinishSequences:
    """A forward hook of a sequence collection.

    Args:
        outputs: Of `outputs_of`.
    """

    def __init__(self, outputs: Mapping[str, _Output]) -> None:
        self._outputs = outputs

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:  # noqa: ARG002
        """What torch calls after a forward."""
        output.callbacks.append(lambda rows: self._finish(rows, args[0]))

    def _finish(
        self, rows: Mapping[str, JaggedTensor], batch: KeyedJaggedTensor
    ) -> dict[str, JaggedTensor]:
        return {
            name: JaggedTensor(
                values=output.of(rows[name].values(), batch),
                lengths=rows[name].lengths(),
                weights=rows[name].weights_or_none(),
            )
            if output.frozen
            else rows[name]
            for name, output in self._outputs.items()
        }


class _EvenBatches(nn.Module):
    """An output distribution that pads the batches of all ranks to the largest, and cuts again.

    The reduce-scatter of pooled rows has a gradient on gloo only where batches are equal.

    Args:
        inner: TorchRec's output distribution.
        rank: Of this process.
        num_nodes: The order of ranks in the output of a shard is by local rank, then by node; 1
            where it is by rank.
    """

    def __init__(self, inner: nn.Module, *, rank: int, num_nodes: int) -> None:
        super().__init__()
        self._inner, self._rank, self._num_nodes = inner, rank, num_nodes

    def forward(
        self, pooled_ND: torch.Tensor, context: EmbeddingShardingContext | None = None
    ) -> Awaitable[torch.Tensor]:
        """Starts the exchange.

        Args:
            pooled_ND: This shard's part of the pooled rows of all ranks' samples.
            context: Knows the size of each rank's batch.

        Returns:
            The pooled rows of this rank's samples [B, D].
        """
        sizes = context.batch_size_per_rank if context is not None else []
        if context is None or len(set(sizes)) < 2 or context.variable_batch_per_feature:
            awaitable: Awaitable[torch.Tensor] = self._inner(pooled_ND, context)
            return awaitable
        largest = max(sizes)
        num_local = len(sizes) // self._num_nodes
        in_order = [
            sizes[local + node * num_local]
            for local in range(num_local)
            for node in range(self._num_nodes)
        ]
        padded = torch.cat(
            [
                functional.pad(part, (0, 0, 0, largest - len(part)))
                for part in pooled_ND.split(in_order)
            ]
        )
        even = copy.copy(context)
        even.batch_size_per_rank = [largest] * len(sizes)
        awaitable = self._inner(padded, even)
        awaitable.callbacks.append(lambda out_BD: out_BD[: sizes[self._rank]])
        return awaitable


def allow_uneven_batches(module: ShardedEmbeddingModule, env: Env) -> None:
    """Makes a sharded pooled collection take batches that differ in size between ranks.

    Args:
        module: The collection, which is changed.
        env: This process.
    """
    for position, inner in enumerate(module._output_dists):
        if isinstance(inner, (TwRwPooledEmbeddingDist, GridPooledEmbeddingDist)):
            num_nodes = env.num_nodes
        elif isinstance(inner, RwPooledEmbeddingDist):
            num_nodes = 1
        else:
            continue
        module._output_dists[position] = _EvenBatches(inner, rank=env.rank, num_nodes=num_nodes)


def keep_replicated_sequences_apart(module: ShardedEmbeddingModule) -> None:
    """Makes the replicated tables of a sharded sequence collection give a row for each id on CPU.

    FBGEMM's dense kernel pools bags there, also where it is told not to; so each id gets a bag of
    its own.

    Args:
        module: The collection, which is changed.
    """
    for lookup in module._lookups:
        if isinstance(lookup, DistributedDataParallel):
            lookup.register_forward_pre_hook(_one_id_per_bag)
            lookup.register_forward_hook(_rows_of_ids)


def _one_id_per_bag(module: nn.Module, args: tuple[Any, ...]) -> KeyedJaggedTensor:  # noqa: ARG001
    features: KeyedJaggedTensor = args[0]
    counts_F = torch.tensor(features.length_per_key(), device=features.device())
    bags_B = torch.arange(max(1, *features.length_per_key()), device=features.device())
    return KeyedJaggedTensor(
        keys=features.keys(),
        values=features.values(),
        lengths=(bags_B < counts_F.unsqueeze(1)).long().flatten(),
    )


def _rows_of_ids(
    module: DistributedDataParallel, args: tuple[Any, ...], flat: torch.Tensor
) -> torch.Tensor:
    """The rows of the ids of each feature, flat, without those of bags that only fill up."""
    features: KeyedJaggedTensor = args[0]
    bags, counts = features.stride(), features.length_per_key()
    width = flat.numel() // (bags * len(counts))
    of_groups = module.module._feature_splits
    groups = flat.split([bags * width * number for number in of_groups])
    rows = [
        rows_BD
        for group, number in zip(groups, of_groups, strict=True)
        for rows_BD in group.view(bags, number, width).unbind(1)
    ]
    kept = [rows_BD[:count] for rows_BD, count in zip(rows, counts, strict=True)]
    return torch.cat(kept).flatten()
