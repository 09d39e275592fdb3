"""Adam and its kin as frozen configs: what each computes. Imports no torch.

`g` is the summed gradient of a row `w` that was looked up; other rows neither decay nor move, and
their moments stay as they are (lazy, as `torch.optim.SparseAdam`). `t` counts the steps of the
optimizer, whatever the row: FBGEMM's `iter`. All of them keep the moments

    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g

and correct their bias by m_hat = m / (1 - beta1**t), v_hat = v / (1 - beta2**t). FBGEMM's formulas
are those of its release 1.8, `fbgemm_gpu/codegen/genscript/optimizers.py`, which has no CPU kernel
for any of these.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from shardemb.optim.base import Config, Per

_MOMENTS: Mapping[str, Per] = {"momentum1": "element", "exp_avg_sq": "element"}
_PARTIAL: Mapping[str, Per] = {"momentum1": "element", "exp_avg_sq": "row"}


@dataclass(frozen=True, kw_only=True)
class _WithMoments(Config):
    """The fields that all of them have."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8


@dataclass(frozen=True, kw_only=True)
class Adam(_WithMoments):
    """Adam, as `torch.optim.Adam` on the touched rows: weight decay is part of the gradient.

        g += weight_decay * w
        w -= lr * m_hat / (sqrt(v_hat) + eps)

    Kingma and Ba, ICLR 2015, algorithm 1. `torch.optim.SparseAdam` adds eps to sqrt(v) instead,
    before the bias is corrected, and has no weight decay. FBGEMM's `ADAM` has eps where this has
    it, and decouples weight decay: see `AdamW`.

    Attributes:
        lr: Learning rate.
        betas: Decay rates of the two moments.
        eps: Added to the root.
        weight_decay: Added to the gradient (L2).
        max_gradient: Largest norm of a row's gradient; see `Config`.

    Raises:
        ValueError: A field is out of its range.

    Example:
        >>> Adam(lr=0.1).state
        {'momentum1': 'element', 'exp_avg_sq': 'element'}
    """

    torchrec_class: ClassVar[str] = "Adam"
    _state: ClassVar[Mapping[str, Per]] = _MOMENTS


@dataclass(frozen=True, kw_only=True)
class AdamW(_WithMoments):
    """Adam with decoupled weight decay, as `torch.optim.AdamW` and as FBGEMM's `ADAM`.

        w -= lr * (m_hat / (sqrt(v_hat) + eps) + weight_decay * w)

    Loshchilov and Hutter, ICLR 2019, algorithm 2, with their schedule multiplier
    equal to lr and their alpha 1.

    Attributes:
        lr: Learning rate.
        betas: Decay rates of the two moments.
        eps: Added to the root.
        weight_decay: Share of a touched row that a step takes away, times lr. FBGEMM's default
            is 0.
        max_gradient: Largest norm of a row's gradient; see `Config`.

    Raises:
        ValueError: A field is out of its range.

    Example:
        >>> AdamW(lr=0.1).state_bytes(1000, 64)
        512000
    """

    weight_decay: float = 0.01
    torchrec_class: ClassVar[str] = "Adam"
    _state: ClassVar[Mapping[str, Per]] = _MOMENTS


@dataclass(frozen=True, kw_only=True)
class PartialRowWiseAdam(_WithMoments):
    """Adam with one second moment for each row: about half of Adam's state.

        v = beta2 * v + (1 - beta2) * mean(g * g)
        w -= lr * (m_hat / (sqrt(v_hat) + eps) + weight_decay * w)

    The mean is over the row. FBGEMM's `PARTIAL_ROWWISE_ADAM`; torch has no such optimizer.

    Attributes:
        lr: Learning rate.
        betas: Decay rates of the two moments.
        eps: Added to the root.
        weight_decay: Share of a touched row that a step takes away, times lr (decoupled).
        max_gradient: Largest norm of a row's gradient; see `Config`.

    Raises:
        ValueError: A field is out of its range.

    Example:
        >>> PartialRowWiseAdam(lr=0.1).state_bytes(1000, 64)
        260000
    """

    torchrec_class: ClassVar[str] = "PartialRowWiseAdam"
    _state: ClassVar[Mapping[str, Per]] = _PARTIAL


@dataclass(frozen=True, kw_only=True)
class LAMB(_WithMoments):
    """LAMB: Adam at a rate that follows the norm of each row.

        r = m_hat / (sqrt(v_hat) + eps) + weight_decay * w
        w -= lr * norm(w) / norm(r) * r

    You et al., ICLR 2020, algorithm 2, with a row where they have a layer and the identity as their
    phi: FBGEMM's `LAMB`. Where norm(w) or norm(r) is 0, their ratio is taken as 1, as in the LAMB
    of TensorFlow Addons and of Apex. FBGEMM divides: a row of zeros never moves, and is NaN if its
    moments are zero as well.

    Attributes:
        lr: Learning rate.
        betas: Decay rates of the two moments.
        eps: Added to the root.
        weight_decay: Part of r (decoupled).
        max_gradient: Largest norm of a row's gradient; see `Config`.

    Raises:
        ValueError: A field is out of its range.

    Example:
        >>> LAMB(lr=0.1).state_bytes(1000, 64)
        512000
    """

    torchrec_class: ClassVar[str] = "LAMB"
    _state: ClassVar[Mapping[str, Per]] = _MOMENTS


@dataclass(frozen=True, kw_only=True)
class PartialRowWiseLAMB(_WithMoments):
    """LAMB with the second moment of `PartialRowWiseAdam`: FBGEMM's `PARTIAL_ROWWISE_LAMB`.

        v = beta2 * v + (1 - beta2) * mean(g * g)

    All else is as in `LAMB`, the ratio of a row of zeros too.

    Attributes:
        lr: Learning rate.
        betas: Decay rates of the two moments.
        eps: Added to the root.
        weight_decay: Part of r (decoupled).
        max_gradient: Largest norm of a row's gradient; see `Config`.

    Raises:
        ValueError: A field is out of its range.

    Example:
        >>> PartialRowWiseLAMB(lr=0.1).state
        {'momentum1': 'element', 'exp_avg_sq': 'row'}
    """

    torchrec_class: ClassVar[str] = "PartialRowWiseLAMB"
    _state: ClassVar[Mapping[str, Per]] = _PARTIAL
