"""What a table's weight says of how its rows are trained. Trains nothing."""

# R rows, D width

from dataclasses import dataclass

import torch
from torch import nn

from shardemb.optim import SparseOptimizer

_TRAINING = "_shardemb_training"
_FROZEN_ROWS = "_shardemb_frozen_rows"


@dataclass(frozen=True, kw_only=True)
class RowTraining:
    """How the rows of a table are trained.

    Attributes:
        optimizer: What updates them.
        rounding: Of updated 16-bit rows: "stochastic" or "nearest".
        frozen_rows: So many of the first rows stay as they are.
        padding_idx: A row that stays as it is, and that pooled bags leave out.
    """

    optimizer: SparseOptimizer
    rounding: str = "stochastic"
    frozen_rows: int = 0
    padding_idx: int | None = None


def note_training(weight: nn.Parameter, training: RowTraining) -> None:
    """Notes on the weight of an unsharded table how it is trained."""
    setattr(weight, _TRAINING, training)


def noted_training(weight: nn.Parameter) -> RowTraining | None:
    """What was noted, if anything."""
    found: RowTraining | None = getattr(weight, _TRAINING, None)
    return found


def freeze_first_rows(weight: nn.Parameter, num_rows: int) -> None:
    """Lets no gradient through to the first rows of an unsharded table, and notes it.

    A deep copy of the weight knows nothing of it.

    Args:
        weight: The whole table, not on meta.
        num_rows: How many rows stay as they are.
    """

    def without_first_rows(grad_RD: torch.Tensor) -> torch.Tensor:
        grad_RD = grad_RD.clone()
        grad_RD[:num_rows] = 0
        return grad_RD

    weight.register_hook(without_first_rows)
    setattr(weight, _FROZEN_ROWS, num_rows)


def num_frozen_rows(weight: nn.Parameter) -> int:
    """How many first rows `freeze_first_rows` was told of."""
    return int(getattr(weight, _FROZEN_ROWS, 0))
