"""Sparse optimizers as frozen configs: what each computes. Imports no torch.

All touch only the rows that a batch looked up. Gradients of ids that repeat in a batch are summed,
then applied once. Formulas and the place of eps: FBGEMM 1.8,
`fbgemm_gpu/codegen/genscript/optimizers.py`.
"""

import math
from dataclasses import asdict, dataclass
from typing import ClassVar, Literal


@dataclass(frozen=True, kw_only=True)
class _SparseOptimizer:
    """A learning rate, and the names by which TorchRec and the plan know an optimizer."""

    lr: float
    torchrec_class: ClassVar[str]
    """The class in `torchrec.optim` by which TorchRec picks FBGEMM's fused kernel."""
    state_per: ClassVar[Literal["nothing", "row", "element"]]
    """What has a float32 of optimizer state of its own."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not is_number or not math.isfinite(value) or value <= 0:
                raise ValueError(
                    f"{type(self).__name__}: {name} must be a positive number, got {value!r}"
                )

    @classmethod
    def state_bytes(cls, num_rows: int, embedding_dim: int) -> int:
        """Bytes of optimizer state of a table or shard of that shape."""
        per_row = {"nothing": 0, "row": 4, "element": 4 * embedding_dim}[cls.state_per]
        return num_rows * per_row


@dataclass(frozen=True, kw_only=True)
class SGD(_SparseOptimizer):
    """Stochastic gradient descent: `w -= lr * g`. No state.

    Attributes:
        lr: Learning rate.

    Raises:
        ValueError: A value is not a positive number.

    Example:
        >>> SGD(lr=0.1).state_bytes(1000, 64)
        0
    """

    torchrec_class: ClassVar[str] = "SGD"
    state_per: ClassVar[Literal["nothing", "row", "element"]] = "nothing"


@dataclass(frozen=True, kw_only=True)
class Adagrad(_SparseOptimizer):
    """Adagrad with an accumulator for each element: `h += g * g; w -= lr * g / (sqrt(h) + eps)`.

    The diagonal form of Duchi et al., JMLR 12 (2011), figure 1, and that of `torch.optim.Adagrad`.

    Attributes:
        lr: Learning rate.
        eps: Added to the root. FBGEMM's default; torch's is 1e-10.

    Raises:
        ValueError: A value is not a positive number.

    Example:
        >>> Adagrad(lr=0.1).state_bytes(1000, 64)
        256000
    """

    eps: float = 1e-8
    torchrec_class: ClassVar[str] = "Adagrad"
    state_per: ClassVar[Literal["nothing", "row", "element"]] = "element"


@dataclass(frozen=True, kw_only=True)
class RowWiseAdagrad(_SparseOptimizer):
    """Adagrad with one accumulator for each row: `h += mean(g * g); w -= lr * g / (sqrt(h) + eps)`.

    The mean is over the row. FBGEMM's `EXACT_ROWWISE_ADAGRAD`: 1 / embedding_dim of Adagrad's
    state.

    Attributes:
        lr: Learning rate.
        eps: Added to the root.

    Raises:
        ValueError: A value is not a positive number.

    Example:
        >>> RowWiseAdagrad(lr=0.1).state_bytes(1000, 64)
        4000
    """

    eps: float = 1e-8
    torchrec_class: ClassVar[str] = "RowWiseAdagrad"
    state_per: ClassVar[Literal["nothing", "row", "element"]] = "row"


SparseOptimizer = SGD | Adagrad | RowWiseAdagrad
