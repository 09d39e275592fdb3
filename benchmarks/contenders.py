"""What `step.py` measures: the same tables and batches by each contender. Times nothing."""

# B batch, D embedding_dim

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
import torchrec
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import (
    construct_module_sharding_plan,
    row_wise,
    table_wise,
)
from torchrec.distributed.types import ShardingEnv, ShardingPlan

import shardemb as se
from shardemb import layouts, optim
from shardemb.env import Env
from shardemb.planning.sharders import PooledSharder

NUM_TABLES, NUM_EMBEDDINGS, EMBEDDING_DIM, LR = 26, 100_000, 64, 0.01
NAMES = [f"t{number}" for number in range(NUM_TABLES)]
TORCHREC, PIPELINE, OWN_LOOP, IN_ORDER, PLAIN = (
    "TorchRec used directly",
    "shardemb, TrainPipeline",
    "shardemb, own loop",
    "shardemb, own loop, declared order",
    "nn.EmbeddingBag(sparse=True)",
)
OPTIMIZERS: dict[str, optim.SparseOptimizer] = {
    "SGD": optim.SGD(lr=LR),
    "Adagrad": optim.Adagrad(lr=LR),
    "RowWiseAdagrad": optim.RowWiseAdagrad(lr=LR),
}
IdArray = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One workload."""

    optimizer: str
    batch_size: int
    ids_per_bag: int
    layout: str
    world_size: int


CASES = [
    Case(
        optimizer=optimizer, batch_size=batch_size, ids_per_bag=ids, layout=layout, world_size=ranks
    )
    for batch_size, ids in ((8192, 1), (2048, 20))
    for optimizer in OPTIMIZERS
    for ranks, layout in ((1, "table_wise"), (2, "table_wise"), (2, "row_wise"))
    if optimizer == "RowWiseAdagrad" or ranks == 1
]


class Mean(nn.Module):
    """The collection and a loss."""

    def __init__(self, collection: nn.Module) -> None:
        super().__init__()
        self.collection = collection

    def forward(self, batch: KeyedJaggedTensor) -> torch.Tensor:
        """The loss."""
        values_BD: torch.Tensor = self.collection(batch).values()
        return values_BD.mean()


class Bags(nn.Module):
    """The same with nn.EmbeddingBags, called one by one.

    Args:
        bags: One for each key of a batch.
    """

    def __init__(self, bags: Iterable[nn.EmbeddingBag]) -> None:
        super().__init__()
        self.bags = nn.ModuleList(bags)

    def forward(self, batch: KeyedJaggedTensor) -> torch.Tensor:
        """The loss."""
        features = [batch[name] for name in batch.keys()]  # noqa: SIM118 - not a dict
        pooled = [
            bag(feature.values(), feature.offsets())
            for bag, feature in zip(self.bags, features, strict=True)
        ]
        return torch.cat(pooled, 1).mean()


def some_bags(*, sparse: bool) -> Bags:
    """Those of the tables."""
    return Bags(
        nn.EmbeddingBag(
            NUM_EMBEDDINGS, EMBEDDING_DIM, mode="sum", sparse=sparse, include_last_offset=True
        )
        for _ in NAMES
    )


def zipf_ids(num_embeddings: int, shape: tuple[int, ...], count: int) -> Iterator[IdArray]:
    """Arrays of Zipf(1.05) ids, scattered over the rows."""
    weights = 1 / np.arange(1, num_embeddings + 1) ** 1.05
    cdf = np.cumsum(weights / weights.sum())
    for number in range(count):
        popular = np.searchsorted(cdf, np.random.default_rng(number).random(shape))
        yield np.minimum(popular, num_embeddings - 1) * 7919 % num_embeddings


def zipf_batches(case: Case, env: Env, count: int = 8) -> list[KeyedJaggedTensor]:
    """This rank's part of global batches."""
    mine = case.batch_size // env.world_size
    first = env.rank * mine * case.ids_per_bag
    lengths = torch.full((NUM_TABLES * mine,), case.ids_per_bag)
    shape = (NUM_TABLES, case.batch_size * case.ids_per_bag)
    parts = (
        ids[:, first : first + mine * case.ids_per_bag]
        for ids in zipf_ids(NUM_EMBEDDINGS, shape, count)
    )
    return [
        KeyedJaggedTensor(keys=NAMES, values=torch.from_numpy(part.ravel()), lengths=lengths)
        for part in parts
    ]


Batches = list[KeyedJaggedTensor]


def loop(model: nn.Module, optimizer: Any, batches: Batches) -> Callable[[], object]:
    """A step of a plain training loop."""
    upcoming = cycle(batches)

    def step() -> None:
        optimizer.zero_grad()
        model(next(upcoming)).backward()
        optimizer.step()

    return step


def plain(case: Case, batches: list[KeyedJaggedTensor]) -> Callable[[], object]:
    """nn.EmbeddingBag with a torch optimizer; Adagrad stands for its row-wise kin."""
    model = some_bags(sparse=True)
    make = torch.optim.SGD if case.optimizer == "SGD" else torch.optim.Adagrad
    return loop(model, make(model.parameters(), lr=LR), batches)


def torchrec_directly(case: Case, batches: Batches, env: Env) -> Callable[[], object]:
    """TorchRec as its tutorials have it."""
    collection = EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(
                name=name,
                num_embeddings=NUM_EMBEDDINGS,
                embedding_dim=EMBEDDING_DIM,
                feature_names=[name],
            )
            for name in NAMES
        ],
        device=torch.device("meta"),
    )
    config = OPTIMIZERS[case.optimizer]
    options = {name: value for name, value in vars(config).items() if value}
    for parameter in collection.parameters():
        _apply_optimizer_in_backward(
            getattr(torchrec.optim, config.torchrec_class), [parameter], dict(options)
        )
    model = Mean(collection)
    where = {
        name: row_wise(compute_kernel="fused")
        if case.layout == "row_wise"
        else table_wise(rank=number % env.world_size, compute_kernel="fused")
        for number, name in enumerate(NAMES)
    }
    plan = construct_module_sharding_plan(
        collection, where, PooledSharder(), env.world_size, env.world_size, "cpu"
    )
    sharded = DistributedModelParallel(
        model,
        env=ShardingEnv.from_process_group(dist.group.WORLD),
        device=env.device,
        plan=ShardingPlan({"collection": plan}),
        sharders=[PooledSharder()],
    )
    return loop(sharded, sharded.fused_optimizer, batches)


def shardemb(case: Case, env: Env, *, declared_order: bool = False) -> tuple[nn.Module, Any]:
    """The same through shardemb."""
    tables = [
        se.TableConfig(
            name=name,
            num_embeddings=NUM_EMBEDDINGS,
            embedding_dim=EMBEDDING_DIM,
            feature_names=(name,),
            optimizer=OPTIMIZERS[case.optimizer],
        )
        for name in NAMES
    ]
    model = Mean(se.EmbeddingBagCollection(tables))
    where: dict[str, layouts.Layout] = {
        name: layouts.row_wise()
        if case.layout == "row_wise"
        else layouts.table_wise(rank=number % env.world_size)
        for number, name in enumerate(NAMES)
    }
    plan = se.plan_sharding(model, env, where)
    sharded = se.shard_modules(model, plan, env, declared_order=declared_order)
    return sharded, se.build_optimizer(sharded)


def contenders(case: Case, env: Env) -> dict[str, Callable[[], object]]:
    """A step of each."""
    batches = zipf_batches(case, env)
    steps = {TORCHREC: torchrec_directly(case, batches, env)}
    model, optimizer = shardemb(case, env)
    endless: Iterator[Any] = se.TrainPipeline(model, optimizer, env).run(cycle(batches), 10**9)
    steps[PIPELINE] = lambda: next(endless)
    steps[OWN_LOOP] = loop(*shardemb(case, env), batches)
    if case.layout == "table_wise" and env.world_size > 1:
        steps[IN_ORDER] = loop(*shardemb(case, env, declared_order=True), batches)
    if env.world_size == 1:
        steps[PLAIN] = plain(case, batches)
    return steps
