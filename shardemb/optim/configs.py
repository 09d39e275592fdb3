"""Sparse optimizers as frozen configs: what each computes. Imports no torch.

All touch only the rows that were looked up since the last step, whether or not their gradient is
zero: only those decay and move. Gradients of ids that repeat are summed, then applied once. `g` is
that sum, `w` a row. FBGEMM's formulas are those of its release 1.8,
`fbgemm_gpu/codegen/genscript/optimizers.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from shardemb.optim.adam import LAMB, Adam, AdamW, PartialRowWiseAdam, PartialRowWiseLAMB
from shardemb.optim.base import Config, Per


@dataclass(frozen=True, kw_only=True)
class SGD(Config):
    """Stochastic gradient descent, with or without momentum, as `torch.optim.SGD`.

        g += weight_decay * w
        buf = momentum * buf + g
        w -= lr * buf

    Without momentum `buf` is `g`, and there is no state. FBGEMM's `EXACT_SGD` knows neither
    momentum nor weight decay.

    Attributes:
        lr: Learning rate.
        momentum: Share of the last `buf` that is kept.
        weight_decay: Added to the gradient (L2).
        max_gradient: Largest norm of a row's gradient; see `Config`.

    Raises:
        ValueError: A field is out of its range.

    Example:
        >>> SGD(lr=0.1).state_bytes(1000, 64), SGD(lr=0.1, momentum=0.9).state_bytes(1000, 64)
        (0, 256000)
    """

    momentum: float = 0.0
    torchrec_class: ClassVar[str] = "SGD"
    _fused_on_cpu: ClassVar[bool] = True

    @property
    def state(self) -> dict[str, Per]:
        """Its state tensors: one if there is momentum."""
        return {"momentum1": "element"} if self.momentum else {}

    @property
    def plan_name(self) -> str:
        """The name that a plan has for it, which says whether it has state."""
        return "SGD with momentum" if self.momentum else "SGD"

    @property
    def fused(self) -> bool:
        """Whether FBGEMM's fused CPU kernel does exactly this."""
        return super().fused and not self.momentum


@dataclass(frozen=True, kw_only=True)
class LarsSGD(Config):
    """LARS: SGD with momentum, at a rate that follows the norm of each row.

        rate = lr * eta * norm(w) / (norm(g) + weight_decay * norm(w))
        buf = momentum * buf + rate * (g + weight_decay * w)
        w -= buf

    You, Gitman and Ginsburg, "Large Batch Training of Convolutional Networks" (2017), algorithm 1,
    with a row where they have a layer: FBGEMM's `LARS_SGD`. Where norm(w) or norm(g) is 0, the rate
    is lr. FBGEMM computes it from the formula there too: a row of zeros never moves, and is NaN if
    its gradient is zero as well.

    Attributes:
        lr: Learning rate.
        momentum: Share of the last `buf` that is kept.
        eta: The trust coefficient.
        weight_decay: Added to the gradient (L2).
        max_gradient: Largest norm of a row's gradient; see `Config`.

    Raises:
        ValueError: A field is out of its range.

    Example:
        >>> LarsSGD(lr=0.1).state
        {'momentum1': 'element'}
    """

    momentum: float = 0.9
    eta: float = 0.001
    torchrec_class: ClassVar[str] = "LarsSGD"
    _state: ClassVar[Mapping[str, Per]] = {"momentum1": "element"}


@dataclass(frozen=True, kw_only=True)
class Adagrad(Config):
    """Adagrad with an accumulator for each element, as `torch.optim.Adagrad`.

        g += weight_decay * w
        h += g * g
        w -= lr * g / (sqrt(h) + eps)

    The diagonal form of Duchi et al., JMLR 12 (2011), figure 1. FBGEMM's `EXACT_ADAGRAD` has eps in
    the same place, and knows no weight decay.

    Attributes:
        lr: Learning rate.
        eps: Added to the root. FBGEMM's default; torch's is 1e-10.
        weight_decay: Added to the gradient (L2).
        max_gradient: Largest norm of a row's gradient; see `Config`.

    Raises:
        ValueError: A field is out of its range.

    Example:
        >>> Adagrad(lr=0.1).state_bytes(1000, 64)
        256000
    """

    eps: float = 1e-8
    torchrec_class: ClassVar[str] = "Adagrad"
    _state: ClassVar[Mapping[str, Per]] = {"momentum1": "element"}
    _fused_on_cpu: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class RowWiseAdagrad(Config):
    """Adagrad with one accumulator for each row: 1 / embedding_dim of Adagrad's state.

        g += weight_decay * w
        h += mean(g * g)
        w -= lr * g / (sqrt(h) + eps)

    The mean is over the row. FBGEMM's `EXACT_ROWWISE_ADAGRAD`, of whose modes of weight decay this
    is L2 (`WeightDecayMode.L2`). By default it ignores weight decay, and on CPU it does so in that
    mode too for most tables of float32. torch has no such optimizer.

    Attributes:
        lr: Learning rate.
        eps: Added to the root.
        weight_decay: Added to the gradient (L2).
        max_gradient: Largest norm of a row's gradient; see `Config`.

    Raises:
        ValueError: A field is out of its range.

    Example:
        >>> RowWiseAdagrad(lr=0.1).state_bytes(1000, 64)
        4000
    """

    eps: float = 1e-8
    torchrec_class: ClassVar[str] = "RowWiseAdagrad"
    _state: ClassVar[Mapping[str, Per]] = {"momentum1": "row"}
    _fused_on_cpu: ClassVar[bool] = True


SparseOptimizer = (
    SGD
    | LarsSGD
    | Adagrad
    | RowWiseAdagrad
    | Adam
    | AdamW
    | PartialRowWiseAdam
    | LAMB
    | PartialRowWiseLAMB
)
