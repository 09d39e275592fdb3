"""The optimizer of all tables of a sharded model: one parameter group for each."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import KeyedOptimizer

from shardemb.updates.install import row_kernels
from shardemb.updates.kernel import RowKernel
from shardemb.updates.lookups import RowGradients
from shardemb.updates.replicated import ReplicatedRows, merge_replicated, replicated_rows
from shardemb.updates.row_state import give_to_slices, saved_once
from shardemb.updates.shard_rows import ShardRows
from shardemb.updates.slices import run_together
from shardemb.updates.trained import TrainedTable

Touched = list[tuple[ShardRows, RowGradients]]


class RowOptimizer(KeyedOptimizer):  # type: ignore[misc]
    """Updates the rows of a sharded model's tables, each once a step.

    Args:
        model: Of `shard_modules`, whose backward pass no longer updates rows from now on.
        tables: Its trained tables, by name.
    """

    def __init__(self, model: DistributedModelParallel, tables: Mapping[str, TrainedTable]) -> None:
        self._tables = tables
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
        for kernel in self._kernels:
            kernel.take_over()

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
        of_kernels = [rows for kernel in self._kernels for rows in kernel.trained]
        return of_kernels + [table.rows for table in self._replicated]

    def zero_grad(self, set_to_none: bool = True) -> None:  # noqa: ARG002, FBT001, FBT002
        """Forgets all gradients."""
        for kernel in self._kernels:
            kernel.clear()
        for table in self._replicated:
            table.clear()

    def touched_sharded(self, *, fused: bool) -> Touched:
        """The rows to update of tables that are sharded, with their gradients.

        Args:
            fused: Whether FBGEMM may update rows itself where it can; these are not returned.

        Returns:
            Blocks, and the rows of each.
        """
        return [
            found
            for kernel in self._kernels
            if not (fused and kernel.step_fused())
            for found in kernel.merged()
        ]

    def touched_replicated(self) -> Touched:
        """The rows to update of tables that every rank holds. On all ranks together."""
        return merge_replicated(self._replicated)

    @torch.no_grad()
    def update(self, touched: Touched) -> None:
        """Updates rows. On all ranks together.

        Args:
            touched: Blocks, and the rows of each.
        """
        run_together((rows.update(gradients), rows.slices) for rows, gradients in touched)

    def begin_step(self) -> None:
        """Counts a step of every table, touched or not.

        Raises:
            ValueError: A table's SGD got momentum, and was made without state for it.
        """
        for name, group in self._groups.items():
            if group.get("momentum") and not self._tables[name].training.optimizer.state:
                raise ValueError(
                    f"table {name!r}: momentum is {group['momentum']} now, and its SGD was made "
                    "without; declare it with some momentum, of which a scheduler may change the "
                    "value"
                )
            group["step"] += 1

    def done(self) -> None:
        """Ends a step: its gradients will not be applied again."""
        for kernel in self._kernels:
            kernel.done()

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """Not of itself: `Optimizer.step` clips, checks and counts for all parts together."""
        raise NotImplementedError("step the optimizer of build_optimizer, not a part of it")
