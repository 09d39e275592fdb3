"""One rank's block of a trained table, with its optimizer's state: updates some of its rows."""

# R rows of a block, D its width, U touched rows, k sums

from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from shardemb.modules.training import RowTraining
from shardemb.updates.formulas import update_rows
from shardemb.updates.lookups import RowGradients
from shardemb.updates.rounding import round_stochastically


@dataclass(kw_only=True)
class ShardRows:
    """A block of a trained table.

    Attributes:
        table: Name of the table.
        training: How its rows are trained.
        weight_RD: The block, of the table's dtype [R, D].
        state: Optimizer state by name, float32 [R, D] or [R].
        first_row: Row of the table at which the block begins.
        first_column: Column of the table at which it begins.
        embedding_dim: Columns of the whole table.
        key: A number that is the table's own, of which stochastic rounding is a function.
        slices: The ranks that hold the other columns of these rows, if they are split.
        settings: The table's parameter group, when there is an optimizer.
        check: A number that is finite if all values of the last update are; a scalar.
    """

    table: str
    training: RowTraining
    weight_RD: torch.Tensor
    state: Mapping[str, torch.Tensor]
    first_row: int
    first_column: int
    embedding_dim: int
    key: int
    slices: dist.ProcessGroup | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    check: torch.Tensor | None = None

    def movable(self, gradients: RowGradients) -> RowGradients:
        """Those rows that are to be updated: neither frozen nor padding."""
        training, (rows_U, grad_UD, num_ids) = self.training, gradients
        if training.frozen_rows == 0 and training.padding_idx is None:
            return gradients
        global_U = rows_U + self.first_row
        moves_U = global_U >= training.frozen_rows
        if training.padding_idx is not None:
            moves_U &= global_U != training.padding_idx
        return RowGradients(rows_U[moves_U], grad_UD[moves_U], num_ids)

    def update(self, gradients: RowGradients) -> Generator[torch.Tensor, torch.Tensor, None]:
        """Updates rows of the block.

        Args:
            gradients: Movable rows and their gradients.

        Yields:
            Sums over the columns of this block, float32 [U, k]; is to be sent those over all
            columns of the table.
        """
        rows_U, grad_UD, _ = gradients
        settings = self.settings
        gathered = {name: value.index_select(0, rows_U) for name, value in self.state.items()}
        new_UD = yield from update_rows(
            type(self.training.optimizer),
            settings,
            weight_UD=self.weight_RD.index_select(0, rows_U).float(),
            grad_UD=grad_UD,
            state=gathered,
            num_updates=settings["step"],
            embedding_dim=self.embedding_dim,
        )
        for name, value in gathered.items():
            self.state[name].index_copy_(0, rows_U, value)
        rounded_UD = self._rounded(new_UD, rows_U)
        self.weight_RD.index_copy_(0, rows_U, rounded_UD)
        self.check = torch.linalg.vector_norm(grad_UD) + rounded_UD.sum(dtype=torch.float32)

    def fault(self, gradients: RowGradients) -> str | None:
        """What is not finite after an update, if anything: "row 3 is nan".

        Args:
            gradients: The rows that were updated.

        Returns:
            The first such row of the table, and its gradient or value.
        """
        rows_U, grad_UD, _ = gradients
        values = {
            "the gradient of row": grad_UD,
            "row": self.weight_RD.index_select(0, rows_U),
            **{
                f"{name} of row": value.index_select(0, rows_U).view(len(rows_U), -1)
                for name, value in self.state.items()
            },
        }
        for what, value_UD in values.items():
            bad_UD = ~torch.isfinite(value_UD)
            if bad_UD.any():
                at, column = bad_UD.nonzero()[0].tolist()
                row = int(rows_U[at]) + self.first_row
                return f"{what} {row} of table {self.table!r} is {float(value_UD[at, column])}"
        return None

    def _rounded(self, new_UD: torch.Tensor, rows_U: torch.Tensor) -> torch.Tensor:
        dtype = self.weight_RD.dtype
        if dtype == torch.float32 or self.training.rounding == "nearest":
            return new_UD.to(dtype)
        return round_stochastically(
            new_UD,
            dtype,
            key=self.key,
            rows_U=rows_U + self.first_row,
            first_column=self.first_column,
            num_updates=self.settings["step"],
        )
