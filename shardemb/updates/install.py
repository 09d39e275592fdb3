"""Puts our kernels around FBGEMM's, in those of TorchRec."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.batched_embedding_kernel import (
    BatchedFusedEmbeddingBag,
    EmbeddingFusedOptimizer,
)
from torchrec.distributed.embedding_types import GroupedEmbeddingConfig, ShardedEmbeddingTable

from shardemb.modules.training import RowTraining
from shardemb.updates.kernel import RowKernel, Shard
from shardemb.updates.lookups import features_of, pooling_of
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


def install(kernel: nn.Module, trained: Mapping[str, Trained]) -> RowKernel:
    """Puts our kernel around FBGEMM's in one of TorchRec's."""
    config: GroupedEmbeddingConfig = kernel.config
    tables = config.embedding_tables
    fbgemm: Any = kernel.emb_module
    fused = any(table.name in trained and trained[table.name].fused for table in tables)
    states = fbgemm.get_optimizer_state() if fused else []
    shards = []
    for number, (table, features, weight_RD) in enumerate(
        zip(tables, features_of(tables), fbgemm.split_embedding_weights(), strict=True)
    ):
        rows = None
        if table.name in trained:
            state = (
                dict(zip([_FIRST_STATE], states[number].values(), strict=True)) if states else None
            )
            rows = _rows(table, trained[table.name], weight_RD, state)
        shards.append(Shard(features=features, rows=rows))
    pooled = isinstance(kernel, BatchedFusedEmbeddingBag)
    mine = RowKernel(fbgemm, shards, pooling=pooling_of(kernel) if pooled else None, fused=fused)
    kernel._emb_module = mine
    kernel._optim = EmbeddingFusedOptimizer(config, mine, kernel._pg)
    return mine


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
