"""What sharded tables are compared with: plain torch, one process, float64, dense gradients."""

# B batch, D width, R rows

from collections.abc import Sequence

import torch
from torch.nn import functional
from torchrec import KeyedJaggedTensor

from shardemb import TableConfig, optim


class Reference:
    """Tables in float64 with their optimizers written out."""

    def __init__(self, tables: Sequence[TableConfig], weights: dict[str, torch.Tensor]) -> None:
        self.tables = tables
        self.weights = {
            name: weight.double().clone().requires_grad_() for name, weight in weights.items()
        }
        self.state = {name: torch.zeros_like(weight) for name, weight in self.weights.items()}

    def forward(self, batch: KeyedJaggedTensor) -> dict[str, torch.Tensor]:
        """Pooled features, float64 [B, D] each."""
        pooled = {}
        for table in self.tables:
            for feature in table.feature_names:
                bags = batch[feature]
                pooled[feature] = functional.embedding_bag(
                    bags.values(),
                    self.weights[table.name],
                    bags.offsets(),
                    mode=table.pooling,
                    include_last_offset=True,
                )
        return pooled

    @torch.no_grad()
    def step(self) -> None:
        """Updates the rows and clears their gradients. A row-wise state fills its row."""
        for table in self.tables:
            weight, state = self.weights[table.name], self.state[table.name]
            optimizer = table.optimizer
            assert weight.grad is not None
            grad = weight.grad
            if isinstance(optimizer, optim.SGD):
                weight -= optimizer.lr * grad
            else:
                square = grad.square()
                row_wise = isinstance(optimizer, optim.RowWiseAdagrad)
                state += square.mean(1, keepdim=True) if row_wise else square
                weight -= optimizer.lr * grad / (state.sqrt() + optimizer.eps)
            weight.grad = None
