"""Trained tables that every rank holds whole: which of their rows were touched, by any rank."""

# R rows, D width, U touched rows

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torchrec import KeyedJaggedTensor
from torchrec.distributed.batched_embedding_kernel import (
    BatchedDenseEmbedding,
    BatchedDenseEmbeddingBag,
)
from torchrec.distributed.embedding_types import ShardedEmbeddingModule

from shardemb.modules.training import RowTraining
from shardemb.updates.install import key_of
from shardemb.updates.lookups import RowGradients
from shardemb.updates.shard_rows import ShardRows

_ROWS = "_shardemb_rows"


@dataclass(frozen=True, kw_only=True)
class ReplicatedRows:
    """A trained table that every rank holds.

    DistributedDataParallel averages a gradient of the whole table, which does not tell a row that
    was looked up from one that was not.

    Attributes:
        rows: What is to be updated.
        weight: Its parameter, which takes the gradient.
        touched_R: Which rows this rank looked up since the last step, uint8 [R].
    """

    rows: ShardRows
    weight: nn.Parameter
    touched_R: torch.Tensor

    def clear(self) -> None:
        """Forgets the gradient and which rows were touched."""
        self.weight.grad = None
        self.touched_R.zero_()


def watch_lookups(
    module: ShardedEmbeddingModule, tables: dict[str, tuple[nn.Parameter, RowTraining]]
) -> None:
    """Makes the replicated tables of a sharded collection note which rows are looked up.

    Args:
        module: The collection, of which dense kernels are hooked.
        tables: Weight and training of its replicated tables that are to be updated.
    """
    rows = {name: _rows(name, *table) for name, table in tables.items()}
    for lookup in module._lookups:
        for kernel in lookup.modules():
            if isinstance(kernel, (BatchedDenseEmbeddingBag, BatchedDenseEmbedding)):
                names = [table.name for table in kernel.config.embedding_tables]
                of_features = [rows.get(names[table]) for table in kernel._feature_table_map]
                kernel.register_forward_hook(_Watch(of_features))


def replicated_rows(model: nn.Module) -> list[ReplicatedRows]:
    """The replicated tables of a sharded model that are to be updated."""
    return [getattr(weight, _ROWS) for weight in model.parameters() if hasattr(weight, _ROWS)]


def _rows(name: str, weight: nn.Parameter, training: RowTraining) -> ReplicatedRows:
    held_RD = weight.detach()
    shape = {"row": held_RD.shape[:1], "element": held_RD.shape}
    rows = ReplicatedRows(
        rows=ShardRows(
            table=name,
            training=training,
            weight_RD=held_RD,
            state={
                state: held_RD.new_zeros(shape[per], dtype=torch.float32)
                for state, per in training.optimizer.state.items()
            },
            first_row=0,
            first_column=0,
            embedding_dim=held_RD.shape[1],
            key=key_of(name),
        ),
        weight=weight,
        touched_R=held_RD.new_zeros(len(held_RD), dtype=torch.uint8),
    )
    setattr(weight, _ROWS, rows)
    return rows


class _Watch:
    """A forward hook of a dense kernel: notes rows as touched when their gradient comes.

    Args:
        tables: That of each feature of the kernel, if it is to be updated.
    """

    def __init__(self, tables: Sequence[ReplicatedRows | None]) -> None:
        self._tables = tables

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:  # noqa: ARG002
        """What torch calls after a forward."""
        if output.requires_grad:
            output.register_hook(lambda _: self._note(args[0]))

    def _note(self, features: KeyedJaggedTensor) -> None:
        ends = features.offset_per_key()
        for table, start, end in zip(self._tables, ends[:-1], ends[1:], strict=True):
            if table is not None:
                table.touched_R.index_fill_(0, features.values()[start:end], 1)


def merge_replicated(tables: Sequence[ReplicatedRows]) -> list[tuple[ShardRows, RowGradients]]:
    """The rows that any rank touched, with the mean of their gradients.

    Args:
        tables: The same on every rank, all of which call this together.

    Returns:
        The movable rows of each table that has a gradient.
    """
    if not tables:
        return []
    masks = [table.touched_R for table in tables]
    touched = torch.cat(masks)
    if dist.get_world_size() > 1:
        dist.all_reduce(touched, op=dist.ReduceOp.MAX)
    found = []
    for table, mask_R in zip(tables, touched.split([len(mask) for mask in masks]), strict=True):
        if table.weight.grad is None:
            continue
        rows_U = mask_R.nonzero().squeeze(1)
        gradients = RowGradients(rows_U, table.weight.grad.index_select(0, rows_U), len(rows_U))
        found.append((table.rows, table.rows.movable(gradients)))
    return found
