"""What sharded tables are compared with: plain torch, one process, float64, dense gradients."""

# B batch, D width, R rows, N ids

from collections.abc import Sequence

import torch
from torch.nn import functional
from torchrec import KeyedJaggedTensor

from shardemb import TableConfig, optim


class Reference:
    """Tables in float64 with their optimizers written out.

    Args:
        tables: The tables.
        weights: Their initial rows.
        num_slices: For tables whose row-wise Adagrad keeps an accumulator for each slice of the
            columns, the number of slices.
    """

    def __init__(
        self,
        tables: Sequence[TableConfig],
        weights: dict[str, torch.Tensor],
        num_slices: dict[str, int] | None = None,
    ) -> None:
        self.tables = tables
        self.num_slices = num_slices or {}
        self.weights = {
            name: weight.double().clone().requires_grad_() for name, weight in weights.items()
        }
        self.state = {name: torch.zeros_like(weight) for name, weight in self.weights.items()}

    def names(self) -> list[tuple[TableConfig, str, str]]:
        """Each table with its features, and with the name of each in the output."""
        features = [feature for table in self.tables for feature in table.feature_names]
        return [
            (table, feature, f"{feature}@{table.name}" if features.count(feature) > 1 else feature)
            for table in self.tables
            for feature in table.feature_names
        ]

    def forward(self, batch: KeyedJaggedTensor) -> dict[str, torch.Tensor]:
        """Pooled features, float64 [B, D] each."""
        pooled = {}
        for table, feature, name in self.names():
            bags = batch[feature]
            weights_N = bags.weights_or_none()
            pooled[name] = functional.embedding_bag(
                bags.values(),
                self.weights[table.name],
                bags.offsets(),
                mode=table.pooling,
                include_last_offset=True,
                per_sample_weights=None if weights_N is None else weights_N.double(),
            )
        return pooled

    def forward_sequences(self, batch: KeyedJaggedTensor) -> dict[str, torch.Tensor]:
        """Rows of every id, float64 [N, D] each."""
        return {
            name: functional.embedding(batch[feature].values(), self.weights[table.name])
            for table, feature, name in self.names()
        }

    @torch.no_grad()
    def step(self) -> None:
        """Updates the rows and clears their gradients. A row-wise state fills its row."""
        for table in self.tables:
            weight, state = self.weights[table.name], self.state[table.name]
            optimizer, grad = table.optimizer, weight.grad
            if grad is None or not table.trainable:
                continue
            if isinstance(optimizer, optim.SGD):
                weight -= optimizer.lr * grad
            else:
                square = grad.square()
                if isinstance(optimizer, optim.RowWiseAdagrad):
                    slices_RSD = square.unflatten(1, (self.num_slices.get(table.name, 1), -1))
                    square = slices_RSD.mean(2, keepdim=True).expand_as(slices_RSD).flatten(1)
                state += square
                weight -= optimizer.lr * grad / (state.sqrt() + optimizer.eps)
            if table.dtype == "float16":
                weight.copy_(weight.half())
            weight.grad = None
