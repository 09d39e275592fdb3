"""One rank's block of a trained table, with its optimizer's state: updates some of its rows."""

# R rows of a block, D its width, U touched rows, k sums

from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from shardemb.errors import RunError
from shardemb.huge_pages import zeros_huge
from shardemb.modules.training import RowTraining
from shardemb.optim import SparseOptimizer
from shardemb.updates.formulas import update_rows
from shardemb.updates.lookups import RowGradients
from shardemb.updates.rounding import round_stochastically


class NewRows(NamedTuple):
    """What an update makes of some rows of a block.

    Attributes:
        rows_U: Local rows, int64 [U].
        weight_UD: Their values, of the table's dtype.
        state: Their optimizer state by name, float32 [U, D] or [U].
    """

    rows_U: torch.Tensor
    weight_UD: torch.Tensor
    state: Mapping[str, torch.Tensor]


def state_of(optimizer: SparseOptimizer, weight_RD: torch.Tensor) -> dict[str, torch.Tensor]:
    """State of an optimizer that has not stepped yet, by name, float32 [R, D] or [R]."""
    shape = {"row": weight_RD.shape[:1], "element": weight_RD.shape}
    zeros = partial(torch.zeros, device=weight_RD.device) if weight_RD.is_cuda else zeros_huge
    return {name: zeros(shape[per]) for name, per in optimizer.state.items()}


@dataclass(kw_only=True, eq=False)
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
        replicated: Whether every rank holds the whole table.
        settings: The table's parameter group, when there is an optimizer.
        is_stale: Whether its gradients were applied, and not cleared since.
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
    replicated: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    is_stale: bool = False

    def check_fresh(self) -> None:
        """What a backward pass asks before it leaves a gradient behind.

        Raises:
            RunError: No optimizer was built, or the gradients of the step before were not cleared.
        """
        if not self.settings:
            raise RunError(
                f"table {self.table!r} has a gradient and no optimizer; call "
                "shardemb.build_optimizer before the first backward pass, its step updates rows"
            )
        if self.is_stale:
            raise RunError(
                f"table {self.table!r} has the gradients of a step that is done; call "
                "optimizer.zero_grad() before the next backward pass"
            )

    def moves(self, rows_U: torch.Tensor) -> torch.Tensor:
        """Which of some local rows are to be updated, bool [U]: neither frozen nor padding."""
        global_U = rows_U + self.first_row
        moves_U = global_U >= self.training.frozen_rows
        if self.training.padding_idx is not None:
            moves_U &= global_U != self.training.padding_idx
        return moves_U

    @property
    def all_move(self) -> bool:
        """Whether no row is frozen or padding."""
        return self.training.frozen_rows == 0 and self.training.padding_idx is None

    def movable(self, gradients: RowGradients) -> RowGradients:
        """Those of some rows that are to be updated."""
        if self.all_move:
            return gradients
        kept = self.moves(gradients.rows_U).nonzero().squeeze(1)
        return RowGradients(*(part.index_select(0, kept) for part in gradients))

    def updated(self, gradients: RowGradients) -> Generator[torch.Tensor, torch.Tensor, NewRows]:
        """What the next update makes of rows of the block, which stay as they are until `write`.

        Args:
            gradients: Movable rows and their gradients.

        Yields:
            Sums over the columns of this block, float32 [U, k]; is to be sent those over all
            columns of the table.

        Returns:
            The rows as they are to be.
        """
        rows_U, grad_UD, _ = gradients
        num_updates = self.settings["step"] + 1
        gathered = {name: value.index_select(0, rows_U) for name, value in self.state.items()}
        new_UD = yield from update_rows(
            type(self.training.optimizer),
            self.settings,
            weight_UD=self.weight_RD.index_select(0, rows_U).float(),
            grad_UD=grad_UD,
            state=gathered,
            num_updates=num_updates,
            embedding_dim=self.embedding_dim,
        )
        return NewRows(rows_U, self._rounded(new_UD, rows_U, num_updates), gathered)

    def write(self, new: NewRows) -> None:
        """Takes over what `updated` returned."""
        for name, value in new.state.items():
            _write(self.state[name], new.rows_U, value)
        _write(self.weight_RD, new.rows_U, new.weight_UD)

    @staticmethod
    def check(gradients: RowGradients, new: NewRows) -> torch.Tensor:
        """A number that is finite only if all values of an update are, float32; a scalar."""
        values = (gradients.grad_UD, new.weight_UD, *new.state.values())
        return torch.stack([value.sum(dtype=torch.float32) for value in values]).sum()

    def fault(self, gradients: RowGradients, new: NewRows | None) -> tuple[int, str] | None:
        """What is not finite in an update that was not written, if anything.

        Args:
            gradients: The rows to update.
            new: What becomes of them, if that is known.

        Returns:
            The first such local row, and words for it: "row 3 of table 'user' is nan".
        """
        rows_U = gradients.rows_U
        held = {name: value.index_select(0, rows_U) for name, value in self.state.items()}
        values = [
            ("the gradient of row", "is", gradients.grad_UD),
            ("row", "is", self.weight_RD.index_select(0, rows_U)),
            *((f"{name} of row", "is", value) for name, value in held.items()),
        ]
        if new is not None:
            values.append(("row", "becomes", new.weight_UD))
            values += [(f"{name} of row", "becomes", new.state[name]) for name in new.state]
        for what, verb, value_UD in values:
            bad = (~torch.isfinite(value_UD)).nonzero()
            if len(bad):
                row, value = int(rows_U[bad[0, 0]]), float(value_UD[tuple(bad[0])])
                where = f"row {row + self.first_row} of table {self.table!r}"
                return row, f"{what.removesuffix('row')}{where} {verb} {value}"
        return None

    def _rounded(
        self, new_UD: torch.Tensor, rows_U: torch.Tensor, num_updates: int
    ) -> torch.Tensor:
        dtype = self.weight_RD.dtype
        if dtype == torch.float32 or self.training.rounding == "nearest":
            return new_UD.to(dtype)
        return round_stochastically(
            new_UD,
            dtype,
            key=self.key,
            rows_U=rows_U + self.first_row,
            first_column=self.first_column,
            num_updates=num_updates,
        )


def _write(block: torch.Tensor, rows_U: torch.Tensor, values: torch.Tensor) -> None:
    """Replaces rows of a block [R, D] or [R]."""
    if block.dim() == 2 and block.dtype == torch.float32 and not block.is_cuda:
        # on CPU index_copy_ goes from element to element: four are one, where rows begin with fours
        in_fours = (*block.shape[1:], block.stride(0), block.storage_offset())
        if not any(number % 4 for number in in_fours):
            block, values = block.view(torch.complex128), values.view(torch.complex128)
    block.index_copy_(0, rows_U, values)
