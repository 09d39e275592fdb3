"""Puts our kernels into those of TorchRec: around FBGEMM's, or in their place."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torchrec.distributed.batched_embedding_kernel import (
    BatchedFusedEmbeddingBag,
    EmbeddingFusedOptimizer,
)
from torchrec.distributed.embedding_types import ShardedEmbeddingTable

from shardemb.modules.training import RowTraining
from shardemb.updates.fbgemm_kernel import FbgemmKernel
from shardemb.updates.kernel import RowKernel, Shard
from shardemb.updates.lookups import features_of, pooling_of
from shardemb.updates.native_kernel import NativeKernel
from shardemb.updates.rounding import key_of
from shardemb.updates.shard_rows import ShardRows, state_of

_FIRST_STATE = "momentum1"  # as TorchRec calls the first state of any optimizer


@dataclass(frozen=True, kw_only=True)
class Trained:
    """How a table that is to be updated is trained.

    Attributes:
        training: How its rows are trained.
        fused: Whether FBGEMM's own update does just that.
        slices: Where columns are split: by the first row of a block, the ranks that hold it.
    """

    training: RowTraining
    fused: bool
    slices: Mapping[int, dist.ProcessGroup] = field(default_factory=dict)


def is_fused(training: RowTraining, *, dtype: str, slices: bool) -> bool:
    """Whether FBGEMM's own update does just what a table declares.

    Args:
        training: How its rows are trained.
        dtype: Of its rows.
        slices: Whether its columns are split over ranks.

    Returns:
        If not, our own updates the rows.
    """
    optimizer = training.optimizer
    return (
        optimizer.fused
        and dtype == "float32"  # 16 bits may overflow, which nothing would see
        and training.frozen_rows == 0
        and training.padding_idx is None
        and not (slices and "row" in optimizer.state.values())
    )


def install_fbgemm(kernel: Any, trained: Mapping[str, Trained]) -> RowKernel:
    """Puts our kernel around FBGEMM's in one of TorchRec's."""
    fbgemm = kernel.emb_module
    tables = kernel.config.embedding_tables
    fused = any(table.name in trained and trained[table.name].fused for table in tables)
    states = [
        dict(zip([_FIRST_STATE], state.values(), strict=True))
        for state in (fbgemm.get_optimizer_state() if fused else [])
    ]
    weights = fbgemm.split_embedding_weights()
    shards = _shards(tables, trained, weights, states)
    return _put(kernel, FbgemmKernel(fbgemm, shards, pooling=_pooling(kernel), fused=fused))


def install_native(kernel: Any, rows: Any, trained: Mapping[str, Trained]) -> RowKernel:
    """Puts our own kernel into one of TorchRec's that has none yet.

    Args:
        kernel: TorchRec's.
        rows: What holds its rows, as TorchRec asks FBGEMM's module for them.
        trained: By the names of tables; the others are frozen.
    """
    shards = _shards(kernel.config.embedding_tables, trained, rows.split_embedding_weights(), [])
    return _put(kernel, NativeKernel(rows, shards, pooling=_pooling(kernel)))


def _put(kernel: Any, mine: RowKernel) -> RowKernel:
    kernel._emb_module = mine
    kernel._optim = EmbeddingFusedOptimizer(kernel.config, mine, kernel._pg)
    return mine


def _pooling(kernel: Any) -> str | None:
    return pooling_of(kernel) if isinstance(kernel, BatchedFusedEmbeddingBag) else None


def _shards(
    tables: Sequence[ShardedEmbeddingTable],
    trained: Mapping[str, Trained],
    weights: Sequence[torch.Tensor],
    states: Sequence[Mapping[str, torch.Tensor]],
) -> list[Shard]:
    """The blocks of a kernel; those that are updated have states of their own if none are given."""
    shards = []
    for number, (table, features, weight_RD) in enumerate(
        zip(tables, features_of(tables), weights, strict=True)
    ):
        rows = None
        if table.name in trained:
            state = states[number] if states else None
            rows = _rows(table, trained[table.name], weight_RD, state)
        shards.append(Shard(table=table.name, features=features, rows=rows))
    return shards


def _rows(
    table: ShardedEmbeddingTable,
    trained: Trained,
    weight_RD: torch.Tensor,
    state: Mapping[str, torch.Tensor] | None,
) -> ShardRows:
    first_row, first_column = table.local_metadata.shard_offsets
    if state is None:
        state = state_of(trained.training.optimizer, weight_RD)
    return ShardRows(
        table=table.name,
        training=trained.training,
        weight_RD=weight_RD,
        state=state,
        first_row=first_row,
        first_column=first_column,
        embedding_dim=table.embedding_dim,
        key=key_of(table.name),
        slices=trained.slices.get(first_row),
    )
