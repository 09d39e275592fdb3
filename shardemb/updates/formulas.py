"""The new values of touched rows, from their gradients, for every sparse optimizer.

What each computes, and its sources, stand in `shardemb.optim`. Knows no tables, ranks or batches.
"""

# U rows that a step touches, D columns of one slice of them, K sums

import math
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from shardemb.optim import (
    LAMB,
    SGD,
    Adagrad,
    Adam,
    AdamW,
    LarsSGD,
    PartialRowWiseAdam,
    PartialRowWiseLAMB,
    RowWiseAdagrad,
    SparseOptimizer,
)

RowSums = Generator[Tensor, Tensor, Tensor]
"""Yields sums over its columns [U, K], is sent those over all columns, and returns [U, D]."""


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """The rows of one column slice that a step updates; arguments of `update_rows`."""

    settings: Mapping[str, Any]
    weight_UD: Tensor
    grad_UD: Tensor
    state: Mapping[str, Tensor]
    num_updates: int
    embedding_dim: int

    @property
    def lr(self) -> float:
        return float(self.settings["lr"])

    @property
    def eps(self) -> float:
        return float(self.settings["eps"])

    @property
    def weight_decay(self) -> float:
        return float(self.settings["weight_decay"])


def update_rows(
    kind: type[SparseOptimizer],
    settings: Mapping[str, Any],
    *,
    weight_UD: Tensor,
    grad_UD: Tensor,
    state: Mapping[str, Tensor],
    num_updates: int,
    embedding_dim: int,
) -> RowSums:
    """Updates the rows of one slice of the columns; a generator, as some need sums of whole rows.

    Where rows are whole, `finish` drives it. Element-wise optimizers yield nothing; row-wise ones,
    LAMB and LARS yield once, `PartialRowWiseLAMB` twice, and `max_gradient` is once more. All
    slices of a table yield as often.

    Args:
        kind: The optimizer.
        settings: The fields of its config, such as "lr", as they hold for this step.
        weight_UD: The rows, float32 or float64 [U, D]. Not changed.
        grad_UD: Their summed gradients, of the same shape and dtype. Not changed.
        state: The state tensors of these rows by the names of `kind.state`, [U, D] where there is
            one value for each element, [U] for each row. Changed in place.
        num_updates: Number of steps of the optimizer, with this one, so at least 1.
        embedding_dim: Columns of whole rows.

    Yields:
        Sums over the D columns, [U, K]; to be sent the sums over all columns, of the same shape.

    Returns:
        The new rows [U, D].

    Example:
        >>> rows = {"weight_UD": torch.ones(1, 2), "grad_UD": torch.tensor([[3.0, 4.0]])}
        >>> of_step = {"state": {}, "num_updates": 1, "embedding_dim": 2}
        >>> finish(update_rows(SGD, vars(SGD(lr=0.5, max_gradient=2.5)), **rows, **of_step))
        tensor([[0.2500, 0.0000]])
    """
    rows = _Rows(
        settings=settings,
        weight_UD=weight_UD,
        grad_UD=grad_UD,
        state=state,
        num_updates=num_updates,
        embedding_dim=embedding_dim,
    )
    if settings["max_gradient"] is not None:
        rows = replace(rows, grad_UD=(yield from _clipped(rows)))
    if kind in _OF_ELEMENTS:
        return _OF_ELEMENTS[kind](rows)
    return (yield from _OF_WHOLE_ROWS[kind](rows))


def needs_whole_rows(kind: type[SparseOptimizer], settings: Mapping[str, Any]) -> bool:
    """Whether `update_rows` asks for sums over all columns."""
    return settings["max_gradient"] is not None or kind in _OF_WHOLE_ROWS


def finish(sums: RowSums, total: Callable[[Tensor], Tensor] = lambda sums_UK: sums_UK) -> Tensor:
    """Runs an update of one slice to its end.

    Args:
        sums: Of `update_rows`.
        total: Makes of the sums over the columns of this slice those over all columns. By default
            this slice has them all.

    Returns:
        The new rows [U, D].

    Example:
        >>> rows = {"weight_UD": torch.ones(1, 2), "grad_UD": torch.ones(1, 2)}
        >>> of_step = {"state": {}, "num_updates": 1, "embedding_dim": 2}
        >>> finish(update_rows(SGD, vars(SGD(lr=0.5)), **rows, **of_step))
        tensor([[0.5000, 0.5000]])
    """
    try:
        asked_UK = next(sums)
        while True:
            asked_UK = sums.send(total(asked_UK))
    except StopIteration as end:
        new_UD: Tensor = end.value
        return new_UD


def _clipped(rows: _Rows) -> RowSums:
    """The gradients, scaled down to the norm that they may have."""
    square_U1 = yield _square_sum(rows.grad_UD)
    scale_U1 = float(rows.settings["max_gradient"]) / _norm_of(square_U1)
    return rows.grad_UD * scale_U1.clamp_(max=1.0)  # a row of zeros has inf, clamped to 1


def _decayed(rows: _Rows) -> Tensor:
    """The gradients with those of L2 regularization."""
    if not rows.weight_decay:
        return rows.grad_UD
    return rows.grad_UD.add(rows.weight_UD, alpha=rows.weight_decay)


def _sgd(rows: _Rows) -> Tensor:
    step_UD = _decayed(rows)
    if "momentum1" in rows.state:  # not where it was declared without
        momentum = float(rows.settings["momentum"])
        step_UD = rows.state["momentum1"].mul_(momentum).add_(step_UD)
    return rows.weight_UD.add(step_UD, alpha=-rows.lr)


def _adagrad(rows: _Rows) -> Tensor:
    grad_UD = _decayed(rows)
    root_UD = rows.state["momentum1"].addcmul_(grad_UD, grad_UD).sqrt()
    return rows.weight_UD.addcdiv(grad_UD, root_UD.add_(rows.eps), value=-rows.lr)


def _row_wise_adagrad(rows: _Rows) -> RowSums:
    grad_UD = _decayed(rows)
    square_U1 = yield _square_sum(grad_UD)
    sum_U1 = rows.state["momentum1"].unsqueeze(1)
    root_U1 = sum_U1.add_(square_U1, alpha=1 / rows.embedding_dim).sqrt()
    return rows.weight_UD.addcdiv(grad_UD, root_U1.add_(rows.eps), value=-rows.lr)


def _adam(rows: _Rows) -> Tensor:
    return rows.weight_UD.sub(_ratio_of_moments(rows, _decayed(rows)), alpha=rows.lr)


def _adam_w(rows: _Rows) -> Tensor:
    return rows.weight_UD.sub(
        _with_decay(rows, _ratio_of_moments(rows, rows.grad_UD)), alpha=rows.lr
    )


def _partial_row_wise_adam(rows: _Rows) -> RowSums:
    ratio_UD = yield from _ratio_of_partial_moments(rows)
    return rows.weight_UD.sub(_with_decay(rows, ratio_UD), alpha=rows.lr)


def _lamb(rows: _Rows) -> RowSums:
    return (yield from _trusted(rows, _ratio_of_moments(rows, rows.grad_UD)))


def _partial_row_wise_lamb(rows: _Rows) -> RowSums:
    ratio_UD = yield from _ratio_of_partial_moments(rows)
    return (yield from _trusted(rows, ratio_UD))


def _lars_sgd(rows: _Rows) -> RowSums:
    weight_norm_U1, grad_norm_U1 = yield from _norms(rows.weight_UD, rows.grad_UD)
    rate_U1 = float(rows.settings["eta"]) * weight_norm_U1
    rate_U1 /= grad_norm_U1 + rows.weight_decay * weight_norm_U1
    rate_U1[(weight_norm_U1 == 0) | (grad_norm_U1 == 0)] = 1.0
    buffer_UD = rows.state["momentum1"].mul_(float(rows.settings["momentum"]))
    return rows.weight_UD.sub(buffer_UD.addcmul_(_decayed(rows), rate_U1, value=rows.lr))


def _ratio_of_moments(rows: _Rows, grad_UD: Tensor) -> Tensor:
    """m_hat / (sqrt(v_hat) + eps), of the moments with this gradient."""
    _, beta2 = rows.settings["betas"]
    square_UD = rows.state["exp_avg_sq"]
    square_UD.mul_(beta2).addcmul_(grad_UD, grad_UD, value=1 - beta2)
    return _unbiased(rows, grad_UD, square_UD)


def _ratio_of_partial_moments(rows: _Rows) -> RowSums:
    """The same where the second moment is one of the row."""
    _, beta2 = rows.settings["betas"]
    sum_U1 = yield _square_sum(rows.grad_UD)
    square_U1 = rows.state["exp_avg_sq"].unsqueeze(1)
    square_U1.mul_(beta2).add_(sum_U1, alpha=(1 - beta2) / rows.embedding_dim)
    return _unbiased(rows, rows.grad_UD, square_U1)


def _unbiased(rows: _Rows, grad_UD: Tensor, square: Tensor) -> Tensor:
    """m_hat / (sqrt(v_hat) + eps), of the first moment with this gradient and of a second one."""
    beta1, beta2 = rows.settings["betas"]
    moment_UD = rows.state["momentum1"].mul_(beta1).add_(grad_UD, alpha=1 - beta1)
    root = square.sqrt().div_(math.sqrt(1 - beta2**rows.num_updates)).add_(rows.eps)
    return moment_UD.div(root).div_(1 - beta1**rows.num_updates)


def _with_decay(rows: _Rows, ratio_UD: Tensor) -> Tensor:
    """Adds weight decay to the ratio of moments, which this uses up."""
    return ratio_UD.add_(rows.weight_UD, alpha=rows.weight_decay)


def _trusted(rows: _Rows, ratio_UD: Tensor) -> RowSums:
    """The rows less lr * norm(w) / norm(r) * r, where r is the ratio with weight decay."""
    step_UD = _with_decay(rows, ratio_UD)
    weight_norm_U1, step_norm_U1 = yield from _norms(rows.weight_UD, step_UD)
    trust_U1 = weight_norm_U1 / step_norm_U1
    trust_U1[(weight_norm_U1 == 0) | (step_norm_U1 == 0)] = 1.0
    return rows.weight_UD.addcmul(step_UD, trust_U1, value=-rows.lr)


def _norms(*parts_UD: Tensor) -> Generator[Tensor, Tensor, list[Tensor]]:
    """The norms of the rows of some tensors, [U, 1] each, by one exchange."""
    sums_UK = yield torch.cat([_square_sum(part_UD) for part_UD in parts_UD], 1)
    return [_norm_of(sum_U1) for sum_U1 in sums_UK.split(1, 1)]


def _norm_of(square_U1: Tensor) -> Tensor:
    """The roots; nan where a square overflowed, so that no row stays as it is in silence."""
    return square_U1.masked_fill(square_U1.isinf(), math.nan).sqrt()


def _square_sum(values_UD: Tensor) -> Tensor:
    return values_UD.square().sum(1, keepdim=True)


_OF_ELEMENTS: dict[type[SparseOptimizer], Callable[[_Rows], Tensor]] = {
    SGD: _sgd,
    Adagrad: _adagrad,
    Adam: _adam,
    AdamW: _adam_w,
}
_OF_WHOLE_ROWS: dict[type[SparseOptimizer], Callable[[_Rows], RowSums]] = {
    LarsSGD: _lars_sgd,
    RowWiseAdagrad: _row_wise_adagrad,
    PartialRowWiseAdam: _partial_row_wise_adam,
    LAMB: _lamb,
    PartialRowWiseLAMB: _partial_row_wise_lamb,
}
