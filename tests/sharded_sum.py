"""A small model of three tables that lie differently, for tests of sharding."""

from collections.abc import Mapping

import torch
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec import KeyedJaggedTensor

import shardemb as se
from shardemb import init, layouts
from shardemb.env import Env
from shardemb.kernel_choice import KernelChoice
from shardemb.layouts import Layout
from shardemb.optim import SparseOptimizer

NUM_SAMPLES = 8


def make_tables(optimizer: SparseOptimizer) -> list[se.TableConfig]:
    uniform = init.Uniform(low=-1.0, high=1.0)
    return [
        se.TableConfig(
            name="user",
            num_embeddings=101,
            embedding_dim=8,
            feature_names=("user",),
            optimizer=optimizer,
            init=uniform,
        ),
        se.TableConfig(
            name="item",
            num_embeddings=37,
            embedding_dim=8,
            feature_names=("item", "clicked"),
            pooling="mean",
            optimizer=optimizer,
            init=uniform,
        ),
        se.TableConfig(
            name="wide",
            num_embeddings=64,
            embedding_dim=16,
            feature_names=("tag",),
            optimizer=optimizer,
            init=uniform,
        ),
    ]


LAYOUTS: dict[str, Layout] = {
    "user": layouts.row_wise(),
    "item": layouts.table_wise(rank=0),
    "wide": layouts.row_wise(),
}


def global_bags(step: int) -> dict[str, list[list[int]]]:
    """Bags of 0 to 4 ids, half of them from a few, so that ids repeat in a bag and between bags."""
    generator = torch.Generator().manual_seed(step)
    sizes = {"user": 101, "item": 37, "clicked": 37, "tag": 64}
    bags: dict[str, list[list[int]]] = {}
    for feature, size in sizes.items():
        bags[feature] = []
        for _ in range(NUM_SAMPLES):
            length = int(torch.randint(0, 5, (1,), generator=generator))
            ids = torch.randint(0, size // 2, (length,), generator=generator)
            bags[feature].append([int(i) if k % 2 else int(i) % 3 for k, i in enumerate(ids)])
    return bags


class Sum(nn.Module):
    """A loss that weighs every output differently."""

    def __init__(self, collection: nn.Module) -> None:
        super().__init__()
        self.collection = collection

    def forward(self, batch: KeyedJaggedTensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        pooled = self.collection(batch).to_dict()
        return loss_of(pooled), pooled


def loss_of(pooled: dict[str, torch.Tensor]) -> torch.Tensor:
    loss = torch.zeros((), dtype=next(iter(pooled.values())).dtype)
    for position, feature in enumerate(sorted(pooled)):
        out_BD = pooled[feature]
        ramp = torch.linspace(0.5, 2.0, out_BD.shape[1], dtype=out_BD.dtype) * (position + 1)
        loss = loss + (out_BD * ramp).sum(1).square().mean()
    return loss


def part(bags: dict[str, list[list[int]]], env: Env) -> dict[str, list[list[int]]]:
    size = NUM_SAMPLES // env.world_size
    return {feature: of[env.rank * size : (env.rank + 1) * size] for feature, of in bags.items()}


def whole(tensor: ShardedTensor, env: Env) -> torch.Tensor | None:
    """The whole of a sharded tensor, on rank 0."""
    out = torch.empty(tensor.size()) if env.is_main else None
    tensor.gather(dst=0, out=out)
    return out


def sharded_model(
    optimizer: SparseOptimizer,
    env: Env,
    where: Mapping[str, Layout] = LAYOUTS,
    seed: int = 3,
    kernel: KernelChoice = "auto",
) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = Sum(se.EmbeddingBagCollection(make_tables(optimizer), seed=seed))
    plan = se.plan_sharding(model, env, where, kernel=kernel)
    sharded = se.shard_modules(model, plan, env)
    return sharded, se.build_optimizer(sharded)
