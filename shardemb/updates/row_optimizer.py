"""The optimizer of all tables of a sharded model: one parameter group for each."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import KeyedOptimizer

from shardemb.updates.faults import Fault
from shardemb.updates.kernel import RowKernel
from shardemb.updates.lookups import RowGradients
from shardemb.updates.replicated import ReplicatedRows, merge_replicated, replicated_rows
from shardemb.updates.shard_rows import NewRows, ShardRows
from shardemb.updates.sharded import row_kernels
from shardemb.updates.slices import give_to_slices, run_together, saved_once
from shardemb.updates.trained import TrainedTable

Touched = list[tuple[ShardRows, RowGradients]]
"""Blocks of tables, and the rows of each that a step is to update."""


class RowOptimizer(KeyedOptimizer):  # type: ignore[misc]
    """Updates the rows of a sharded model's tables, each once a step.

    Args:
        model: Of `shard_modules`, whose backward pass no longer updates rows from now on.
        tables: Its trained tables, by name.
    """

    def __init__(self, model: DistributedModelParallel, tables: Mapping[str, TrainedTable]) -> None:
        self._number_of = {name: number for number, name in enumerate(tables)}
        self._kernels: Sequence[RowKernel] = row_kernels(model)
        self._replicated: Sequence[ReplicatedRows] = replicated_rows(model)
        keys = {table.key for table in tables.values()}
        fused = model.fused_optimizer
        params = {key: weight for key, weight in fused.params.items() if key in keys}
        state = {weight: fused.state.get(weight, {}) for weight in params.values()}
        key_of = {name: table.key for name, table in tables.items()}
        for table in self._replicated:
            params[key_of[table.rows.table]] = table.weight
            state[table.weight] = {
                f"{table.rows.table}.{name}": value for name, value in table.rows.state.items()
            }
        self._groups = {
            name: {
                "params": [params[table.key]] if table.key in params else [],
                "table": name,
                "optimizer": type(table.training.optimizer).__name__,
                **vars(table.training.optimizer),
                "step": 0,
            }
            for name, table in tables.items()
        }
        super().__init__(params, state, list(self._groups.values()))
        self.declared = {name: table.training.optimizer for name, table in tables.items()}
        """The optimizer of each table."""
        self.named_groups = [(table.key, self._groups[name]) for name, table in tables.items()]
        """Each group with the name of its table's weight, the same on every rank."""
        self._sharded = {
            name: params[table.key]
            for name, table in tables.items()
            if isinstance(params.get(table.key), ShardedTensor)
        }
        for rows in self.blocks:
            rows.settings = self._groups[rows.table]
            if rows.slices is not None:
                self._save_once(rows.table)
        held = dict(model.named_parameters())
        replicated = {table.rows.table for table in self._replicated}
        self._parameters = {
            name: held[table.key]
            for name, table in tables.items()
            if table.key in held and name not in replicated
        }
        self.device: torch.device = model.device
        """Of the tables, on every rank."""

    def _save_once(self, table: str) -> None:
        """Replaces the row-wise states of a table whose columns are split."""
        blocks = [rows for rows in self.blocks if rows.table == table]
        weight = self._sharded[table]
        for name, value in blocks[0].state.items():
            if value.dim() == 1:
                self.state[weight][f"{table}.{name}"] = saved_once(weight, name, blocks)

    def post_load_state_dict(self) -> None:
        """Gives every slice of a row what the first was loaded with. On all ranks together."""
        give_to_slices(self._sharded, self.blocks)

    @property
    def blocks(self) -> list[ShardRows]:
        """The blocks of tables that are trained on this rank."""
        return sorted(
            (rows for source in self._sources for rows in source.trained), key=self._place
        )

    @property
    def _sources(self) -> list[RowKernel | ReplicatedRows]:
        """Where gradients of rows come from."""
        return [*self._kernels, *self._replicated]

    def _place(self, rows: ShardRows) -> tuple[int, int, int]:
        """Where a block comes in the order that all ranks share; that of their kernels differs."""
        return self._number_of[rows.table], rows.first_row, rows.first_column

    def zero_grad(self, set_to_none: bool = True) -> None:  # noqa: ARG002, FBT001, FBT002
        """Forgets all gradients."""
        for source in self._sources:
            source.clear()
        for weight in self._parameters.values():
            weight.grad = None

    def fault_of_parameters(self) -> Fault | None:
        """The first table of which the loss has a gradient beside its lookups, if there is one."""
        for name, weight in self._parameters.items():
            if weight.grad is not None:
                return Fault(
                    f"the weight of table {name!r} has a gradient beside that of its lookups, as "
                    "of a penalty on model.parameters(), and rows take none",
                    way_out="penalize what the lookups return, or use weight_decay",
                )
        return None

    def touched(self, *, watched: bool) -> Touched:
        """The rows to update, with their gradients. On all ranks together.

        Args:
            watched: Whether the gradients are to be seen or scaled before.

        Returns:
            Blocks, and the rows of each, in the same order on all ranks; without those that kernels
            update by themselves.
        """
        for kernel in self._kernels:
            kernel.choose(watched=watched)
        sharded = [found for kernel in self._kernels for found in kernel.merged()]
        found = sharded + merge_replicated(self._replicated)
        return sorted(found, key=lambda one: self._place(one[0]))

    def with_those_of_kernels(self, touched: Touched) -> Touched:
        """The rows that a step touches, also where kernels update them by themselves."""
        return sorted([*touched, *self.left_to_kernels()], key=lambda one: self._place(one[0]))

    def left_to_kernels(self) -> Touched:
        """The rows that kernels update by themselves, with their gradients."""
        return [found for kernel in self._kernels for found in kernel.own_merged()]

    @torch.no_grad()
    def updated(self, touched: Touched) -> list[NewRows]:
        """What an update makes of rows, which stay as they are. On all ranks together.

        Args:
            touched: Blocks, and the rows of each.

        Returns:
            The new rows of each block.
        """
        return run_together((rows.updated(gradients), rows.slices) for rows, gradients in touched)

    def square_of_kernels(self) -> float:
        """The sum of the squares of the gradients that are left to kernels."""
        return math.fsum(kernel.own_square() for kernel in self._kernels)

    def write(
        self, touched: Touched, new: Sequence[NewRows], *, scale: float
    ) -> tuple[ShardRows, int] | None:
        """Ends a step: writes new rows, and lets kernels update what was left to them.

        Args:
            touched: Of `touched`.
            new: Of `updated`.
            scale: What gradients are multiplied by in the kernels.

        Returns:
            A block and a row of it that a kernel left as it was, as its state is not finite.
        """
        left = [found for kernel in self._kernels for found in kernel.step(scale).items()]
        for (rows, _), its in zip(touched, new, strict=True):
            rows.write(its)
        for _, group in self.named_groups:
            group["step"] += 1
        for source in self._sources:
            source.done()
        return left[0] if left else None

    def fault(self, touched: Touched, new: Sequence[NewRows | None]) -> Fault | None:
        """The first value of an update on this rank that is not finite.

        Args:
            touched: Of `touched`.
            new: What becomes of the rows of each, as far as it is known.
        """
        left = self.left_to_kernels()
        becoming = [*new, *[None] * len(left)]
        for (rows, gradients), its in zip([*touched, *left], becoming, strict=True):
            found = rows.fault(gradients, its)
            if found is not None:
                row, what = found
                where = "every rank" if rows.replicated else f"rank {dist.get_rank()}"
                return Fault(f"{what}, on {where}", self._sample_of(rows, row))
        return None

    def _sample_of(self, rows: ShardRows, row: int) -> tuple[int, int] | None:
        found = (source.sample_of(rows, row) for source in self._sources)
        return next((sample for sample in found if sample is not None), None)

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """Not of itself: `Optimizer.step` clips, checks and counts for all parts together."""
        raise NotImplementedError("step the optimizer of build_optimizer, not a part of it")
