"""Trained tables that every rank holds whole: which of their rows were touched, by any rank."""

# R rows, D width, U touched rows

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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

from shardemb.exchange import exchange_group
from shardemb.modules.training import RowTraining
from shardemb.updates.lookups import (
    Features,
    Lookup,
    RowGradients,
    features_of,
    pooling_of,
    sample_of,
)
from shardemb.updates.rounding import key_of
from shardemb.updates.shard_rows import ShardRows, state_of

_ROWS = "_shardemb_rows"


@dataclass(frozen=True, kw_only=True)
class ReplicatedRows:
    """A trained table that every rank holds.

    The gradient of the whole table does not tell a row that was looked up from one that was not.

    Attributes:
        rows: What is to be updated.
        weight: Its parameter, which takes the gradient: of this rank until the step.
        counts_R: How many ids of this rank looked each row up since the gradients were forgotten,
            int32 [R].
        lookups: The pooled lookups since then, each with the table's features in it.
    """

    rows: ShardRows
    weight: nn.Parameter
    counts_R: torch.Tensor
    lookups: list[tuple[Lookup, Features]] = field(default_factory=list)

    @property
    def trained(self) -> list[ShardRows]:
        """The table, as kernels give their blocks."""
        return [self.rows]

    def clear(self) -> None:
        """Forgets the gradient and which rows were touched."""
        self.weight.grad = None
        self.counts_R.zero_()
        self.lookups.clear()
        self.rows.is_stale = False

    def done(self) -> None:
        """Forgets a gradient that was applied; the next one needs a `clear` before."""
        is_stale = self.rows.is_stale or self.weight.grad is not None
        self.clear()
        self.rows.is_stale = is_stale

    def sample_of(self, rows: ShardRows, row: int) -> tuple[int, int] | None:
        """Whose sample on this rank looked a row up in bags, if any.

        Args:
            rows: A block; of another table there is none.
            row: The row.

        Returns:
            The rank, and the number of the sample in its batch.
        """
        if rows is not self.rows:
            return None
        for lookup, features in self.lookups:
            found = sample_of([lookup], features, row)
            if found is not None:
                return found
        return None


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
                kernel.register_forward_hook(_Watch(kernel, rows))


def replicated_rows(model: nn.Module) -> list[ReplicatedRows]:
    """The replicated tables of a sharded model that are to be updated."""
    return [getattr(weight, _ROWS) for weight in model.parameters() if hasattr(weight, _ROWS)]


def _rows(name: str, weight: nn.Parameter, training: RowTraining) -> ReplicatedRows:
    held_RD = weight.detach()
    rows = ReplicatedRows(
        rows=ShardRows(
            table=name,
            training=training,
            weight_RD=held_RD,
            state=state_of(training.optimizer, held_RD),
            first_row=0,
            first_column=0,
            embedding_dim=held_RD.shape[1],
            key=key_of(name),
            replicated=True,
        ),
        weight=weight,
        counts_R=held_RD.new_zeros(len(held_RD), dtype=torch.int32),
    )
    setattr(weight, _ROWS, rows)
    return rows


class _Watch:
    """A forward hook of a dense kernel: notes rows as touched when their gradient comes.

    Args:
        kernel: The kernel.
        tables: Those that are to be updated, by name.
    """

    def __init__(
        self,
        kernel: BatchedDenseEmbeddingBag | BatchedDenseEmbedding,
        tables: Mapping[str, ReplicatedRows],
    ) -> None:
        its = kernel.config.embedding_tables
        features = features_of(its)
        self._pooling = pooling_of(kernel) if isinstance(kernel, BatchedDenseEmbeddingBag) else None
        self._num_features = sum(part.count for part in features)
        self._tables = [
            (tables[table.name], part)
            for table, part in zip(its, features, strict=True)
            if table.name in tables
        ]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:  # noqa: ARG002
        """What torch calls after a forward."""
        if output.requires_grad:
            output.register_hook(lambda gradient: self._note(args[0], gradient))

    def _note(self, batch: KeyedJaggedTensor, gradient: torch.Tensor) -> None:
        ends = batch.offset_per_key()
        lookup = Lookup(
            ids_N=batch.values(),
            offsets=batch.offsets(),
            weights_N=batch.weights_or_none(),
            gradient=gradient,
            batches=[(dist.get_rank(), batch.stride())],
            num_features=self._num_features,
            pooling=self._pooling,
        )
        for table, features in self._tables:
            table.rows.check_fresh()
            start, end = ends[features.first], ends[features.first + features.count]
            ids_N = batch.values()[start:end]
            table.counts_R.index_add_(0, ids_N, torch.ones_like(ids_N, dtype=torch.int32))
            if self._pooling is not None:  # FBGEMM makes another shape of sequences
                table.lookups.append((lookup, features))


def merge_replicated(tables: Sequence[ReplicatedRows]) -> list[tuple[ShardRows, RowGradients]]:
    """The rows that any rank touched, with the mean of their gradients.

    Args:
        tables: The same on every rank, all of which call this together.

    Returns:
        The movable rows of each table.
    """
    if not tables:
        return []
    touched = torch.cat([table.counts_R > 0 for table in tables]).to(torch.uint8)
    if dist.get_world_size() > 1:
        group = exchange_group(touched.device)
        dist.all_reduce(touched, op=dist.ReduceOp.MAX, group=group)
    found = []
    sizes = [len(table.counts_R) for table in tables]
    for table, mask_R in zip(tables, touched.split(sizes), strict=True):
        rows_U = mask_R.nonzero().squeeze(1)
        grad_UD = _mean_gradient(table).index_select(0, rows_U)
        gradients = RowGradients(rows_U, grad_UD, table.counts_R.index_select(0, rows_U).long())
        found.append((table.rows, table.rows.movable(gradients)))
    return found


def _mean_gradient(table: ReplicatedRows) -> torch.Tensor:
    """The mean of all ranks' gradients of a table [R, D]; this rank's own stays as it is."""
    if table.weight.grad is None:  # nothing of it is in this rank's loss
        mean_RD = torch.zeros_like(table.rows.weight_RD)
    else:
        mean_RD = table.weight.grad / dist.get_world_size()
    if dist.get_world_size() > 1:
        dist.all_reduce(mean_RD, group=exchange_group(mean_RD.device))
    return mean_RD
