"""A sharded model and its float64 reference, which take the same steps."""

from typing import Any

import torch
from torch import nn
from torchrec import KeyedJaggedTensor

import shardemb as se
from shardemb import layouts, optim
from shardemb.env import Env
from shardemb.kernel_choice import KernelChoice
from shardemb.layouts import Layout
from shardemb.optim import SparseOptimizer
from tests.every_layout import whole_table
from tests.reference import Reference

WIDTH = 8
OPTIMIZERS: dict[str, SparseOptimizer] = {
    "fused": optim.Adagrad(lr=0.1),
    "own": optim.Adam(lr=0.1, eps=1e-4),
    "replicated": optim.RowWiseAdagrad(lr=0.1, eps=1e-4),
    "sliced": optim.RowWiseAdagrad(lr=0.1, eps=1e-4),
}
DENSE_LR = 0.1


def make_tables(**changed: Any) -> list[se.TableConfig]:
    return [
        se.TableConfig(
            name=name,
            num_embeddings=40,
            embedding_dim=WIDTH,
            feature_names=(name,),
            optimizer=optimizer,
            **changed,
        )
        for name, optimizer in OPTIMIZERS.items()
    ]


def where(env: Env) -> dict[str, Layout]:
    found: dict[str, Layout] = {
        "fused": layouts.row_wise(),
        "own": layouts.table_wise(rank=env.world_size - 1),
        "replicated": layouts.data_parallel(),
        "sliced": layouts.column_wise(ranks=range(env.world_size)),
    }
    return found


class Model(nn.Module):
    """Pooled rows through one linear layer; the loss is a mean over samples."""

    def __init__(self, collection: nn.Module) -> None:
        super().__init__()
        self.collection = collection
        self.linear = nn.Linear(WIDTH * len(OPTIMIZERS), 1).double()
        with torch.no_grad():
            self.linear.weight.copy_(torch.linspace(-1, 1, WIDTH * len(OPTIMIZERS)))
            self.linear.bias.zero_()

    def forward(self, batch: KeyedJaggedTensor) -> torch.Tensor:
        pooled = self.collection(batch)
        return loss_of(self.linear, torch.cat([pooled[name] for name in OPTIMIZERS], 1))


def loss_of(linear: nn.Module, pooled_BD: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = (linear(pooled_BD.double()) - 1.0).square().mean()
    return loss


def batch_of(step: int, rank: int, num_samples: int = 4) -> KeyedJaggedTensor:
    generator = torch.Generator().manual_seed(10 * step + rank)
    lengths = torch.randint(0, 4, (len(OPTIMIZERS) * num_samples,), generator=generator)
    ids_N = torch.randint(0, 20, (int(lengths.sum()),), generator=generator)
    return KeyedJaggedTensor(keys=list(OPTIMIZERS), values=ids_N, lengths=lengths)


class Both:
    """A sharded model and its float64 reference, which take the same steps.

    Args:
        env: This process.
        max_norm: Of both.
        kernel: What looks rows up and updates them.
    """

    def __init__(
        self, env: Env, max_norm: float | None = None, kernel: KernelChoice = "auto"
    ) -> None:
        tables = make_tables()
        plain = se.EmbeddingBagCollection(tables, device="cpu")
        self.before = {
            name.split(".")[1]: weight.detach().clone() for name, weight in plain.named_parameters()
        }
        self.env, self.max_norm = env, max_norm
        self.reference = Reference(tables, self.before)
        self.linear = Model(nn.Identity()).linear
        self.dense = torch.optim.SGD(self.linear.parameters(), lr=DENSE_LR)
        model = Model(se.EmbeddingBagCollection(tables))
        plan = se.plan_sharding(model, env, where(env), kernel=kernel)
        self.model = se.shard_modules(model, plan, env)
        self.optimizer = se.build_optimizer(
            self.model, dense=lambda p: torch.optim.SGD(p, lr=DENSE_LR), max_norm=max_norm
        )

    def step(self, step: int, num_micro_batches: int = 1) -> None:
        self.optimizer.zero_grad()
        numbers = range(step * num_micro_batches, (step + 1) * num_micro_batches)
        for number in numbers:
            (self.model(batch_of(number, self.env.rank)) / num_micro_batches).backward()
        self.optimizer.step()
        losses = []
        for number in numbers:
            for rank in range(self.env.world_size):
                pooled = self.reference.forward(batch_of(number, rank))
                losses.append(loss_of(self.linear, torch.cat([*pooled.values()], 1)))
        self.dense.zero_grad()
        torch.stack(losses).mean().backward()
        self.reference.step(max_norm=self.max_norm, dense=self.linear.parameters())
        self.dense.step()

    def assert_equal(self) -> None:
        state: dict[str, Any] = self.model.state_dict()
        for name, expected in self.reference.weights.items():
            rows = whole_table(state[f"collection.embedding_bags.{name}.weight"], self.before[name])
            torch.testing.assert_close(rows.double(), expected.detach(), rtol=1e-4, atol=1e-5)
            assert not torch.allclose(rows, self.before[name], atol=1e-2)
        weight = state["linear.weight"]
        torch.testing.assert_close(weight, self.linear.weight.detach(), rtol=1e-5, atol=1e-6)
