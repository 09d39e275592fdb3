"""What a table's weight says of how its rows are trained. Trains nothing."""

from dataclasses import dataclass

from torch import nn

from shardemb.optim import SparseOptimizer

_TRAINING = "_shardemb_training"


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
    rounding: str = "nearest"
    frozen_rows: int = 0
    padding_idx: int | None = None


def note_training(weight: nn.Parameter, training: RowTraining) -> None:
    """Notes on the weight of an unsharded table how it is trained."""
    setattr(weight, _TRAINING, training)


def noted_training(weight: nn.Parameter) -> RowTraining | None:
    """What was noted, if anything."""
    found: RowTraining | None = getattr(weight, _TRAINING, None)
    return found
