"""What sharded tables are compared with: plain torch, one process, float64, dense gradients."""

# B batch, D width, R rows, N ids

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchrec import KeyedJaggedTensor

from shardemb import TableConfig, optim


class Reference:
    """Tables in float64 with their optimizers written out.

    Attributes:
        tables: The tables.
        weights: Their rows [R, D].
        optimizers: What updates them; a test of schedules changes the entries.
        state: Their state tensors by name, [R, D] each; one value for each row fills its row.
        touched: The rows [R] that were looked up since the last step.
        moved: The rows [R] that were ever updated, be it to what they were in 16 bits.
        num_updates: Steps so far.
    """

    def __init__(self, tables: Sequence[TableConfig], weights: dict[str, Tensor]) -> None:
        self.tables = tables
        self.weights = {
            name: weight.double().clone().requires_grad_() for name, weight in weights.items()
        }
        self.optimizers = {table.name: table.optimizer for table in tables}
        self.state = {
            name: {state: torch.zeros_like(self.weights[name]) for state in optimizer.state}
            for name, optimizer in self.optimizers.items()
        }
        self.touched = {
            name: torch.zeros(len(weight), dtype=torch.bool) for name, weight in weights.items()
        }
        self.moved = {name: torch.zeros_like(rows_R) for name, rows_R in self.touched.items()}
        self.num_updates = 0

    def names(self) -> list[tuple[TableConfig, str, str]]:
        """Each table with its features, and with the name of each in the output."""
        features = [feature for table in self.tables for feature in table.feature_names]
        return [
            (table, feature, f"{feature}@{table.name}" if features.count(feature) > 1 else feature)
            for table in self.tables
            for feature in table.feature_names
        ]

    def forward(self, batch: KeyedJaggedTensor) -> dict[str, Tensor]:
        """Pooled features, float64 [B, D] each."""
        pooled = {}
        for table, feature, name in self.names():
            bags = batch[feature]
            weights_N = bags.weights_or_none()
            self._touch(table, bags.values())
            pooled[name] = functional.embedding_bag(
                bags.values(),
                self.weights[table.name],
                bags.offsets(),
                mode=table.pooling,
                include_last_offset=True,
                per_sample_weights=None if weights_N is None else weights_N.double(),
                padding_idx=table.padding_idx,
            )
        return pooled

    def forward_sequences(self, batch: KeyedJaggedTensor) -> dict[str, Tensor]:
        """Rows of every id, float64 [N, D] each."""
        rows = {}
        for table, feature, name in self.names():
            ids_N = batch[feature].values()
            self._touch(table, ids_N)
            rows[name] = functional.embedding(
                ids_N, self.weights[table.name], padding_idx=table.padding_idx
            )
        return rows

    def _touch(self, table: TableConfig, ids_N: Tensor) -> None:
        if torch.is_grad_enabled():
            self.touched[table.name][ids_N] = True

    @torch.no_grad()
    def step(self, *, max_norm: float | None = None, dense: Iterable[nn.Parameter] = ()) -> None:
        """Updates the rows that were looked up and clears their gradients.

        Args:
            max_norm: If given, gradients are scaled before all else so that the norm of all of
                them is at most this.
            dense: Parameters whose gradients count for that norm, and are scaled with the others.
        """
        self.num_updates += 1
        trained = [table for table in self.tables if table.trainable]
        for table in trained:
            grad = self.weights[table.name].grad
            if grad is not None:
                grad[: table.frozen_rows] = 0
        if max_norm is not None:
            of_tables = [self.weights[table.name] for table in trained]
            nn.utils.clip_grad_norm_([*of_tables, *dense], max_norm)
        for table in trained:
            if self.weights[table.name].grad is not None:
                self._update(table)
        for name, weight in self.weights.items():
            weight.grad = None
            self.touched[name].zero_()

    def _update(self, table: TableConfig) -> None:
        weight, state = self.weights[table.name], self.state[table.name]
        assert weight.grad is not None
        moves_R = self.touched[table.name].clone()
        moves_R[: table.frozen_rows] = False
        if table.padding_idx is not None:
            moves_R[table.padding_idx] = False
        new_weight, new_state = dense_step(
            self.optimizers[table.name],
            weight,
            weight.grad,
            state,
            num_updates=self.num_updates,
        )
        if table.dtype != "float32":
            new_weight = new_weight.to(getattr(torch, table.dtype)).double()
        weight[moves_R] = new_weight[moves_R]
        self.moved[table.name] |= moves_R
        for name, values in state.items():
            values[moves_R] = new_state[name][moves_R]


def dense_step(
    optimizer: optim.SparseOptimizer,
    weight: Tensor,
    grad: Tensor,
    state: dict[str, Tensor],
    *,
    num_updates: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """New rows and state of a whole table, as if all rows were touched.

    Args:
        optimizer: What updates them.
        weight: The rows [R, D].
        grad: Their gradients [R, D].
        state: By name, [R, D] each.
        num_updates: Number of steps, with this one.

    Returns:
        The new rows, and the new state.
    """
    if optimizer.max_gradient is not None:
        norm_R1 = grad.norm(dim=1, keepdim=True)
        grad = torch.where(
            norm_R1 > optimizer.max_gradient, grad / norm_R1 * optimizer.max_gradient, grad
        )
    if isinstance(optimizer, optim.LarsSGD):
        weight_norm, grad_norm = weight.norm(dim=1), grad.norm(dim=1)
        ratio = optimizer.eta * weight_norm / (grad_norm + optimizer.weight_decay * weight_norm)
        ratio = torch.where(weight_norm * grad_norm > 0, ratio, 1.0)
        speed = optimizer.lr * ratio[:, None] * (grad + optimizer.weight_decay * weight)
        momentum = optimizer.momentum * state["momentum1"] + speed
        return weight - momentum, {"momentum1": momentum}
    if isinstance(optimizer, (optim.SGD, optim.Adagrad, optim.RowWiseAdagrad, optim.Adam)):
        grad = grad + optimizer.weight_decay * weight
    if isinstance(optimizer, optim.SGD):
        if not optimizer.momentum:
            return weight - optimizer.lr * grad, {}
        momentum = optimizer.momentum * state["momentum1"] + grad
        return weight - optimizer.lr * momentum, {"momentum1": momentum}
    square = grad**2
    if isinstance(
        optimizer, (optim.RowWiseAdagrad, optim.PartialRowWiseAdam, optim.PartialRowWiseLAMB)
    ):
        square = square.mean(1, keepdim=True).expand_as(square)
    if isinstance(optimizer, (optim.Adagrad, optim.RowWiseAdagrad)):
        total = state["momentum1"] + square
        step = optimizer.lr * grad / (total.sqrt() + optimizer.eps)
        return weight - step, {"momentum1": total}
    return _dense_adam(optimizer, weight, grad, square, state, num_updates)


def _dense_adam(
    optimizer: optim.Adam
    | optim.AdamW
    | optim.PartialRowWiseAdam
    | optim.LAMB
    | optim.PartialRowWiseLAMB,
    weight: Tensor,
    grad: Tensor,
    square: Tensor,
    state: dict[str, Tensor],
    num_updates: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The same for Adam and its kin, with the gradient and its square as the moments take them."""
    beta1, beta2 = optimizer.betas
    first = beta1 * state["momentum1"] + (1 - beta1) * grad
    second = beta2 * state["exp_avg_sq"] + (1 - beta2) * square
    first_hat, second_hat = first / (1 - beta1**num_updates), second / (1 - beta2**num_updates)
    step = first_hat / (second_hat.sqrt() + optimizer.eps)
    if not isinstance(optimizer, optim.Adam):
        step = step + optimizer.weight_decay * weight
    if isinstance(optimizer, (optim.LAMB, optim.PartialRowWiseLAMB)):
        weight_norm, step_norm = weight.norm(dim=1), step.norm(dim=1)
        ratio = torch.where(weight_norm * step_norm > 0, weight_norm / step_norm, 1.0)
        step = ratio[:, None] * step
    return weight - optimizer.lr * step, {"momentum1": first, "exp_avg_sq": second}
