"""Who trains the tables of a case: shardemb, and what a user would take instead. Times nothing."""

# B batch, D embedding_dim

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import cycle
from typing import Any

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
from benchmarks.cases import EMBEDDING_DIM, LR, OPTIMIZERS, START, Batches, Case, zipf_batches
from shardemb import init, layouts
from shardemb.env import Env
from shardemb.kernel_choice import KernelChoice
from shardemb.planning.sharders import PooledSharder

TORCHREC, PIPELINE, OWN_LOOP, IN_ORDER, PLAIN = (
    "TorchRec used directly",
    "shardemb, TrainPipeline",
    "shardemb, own loop",
    "shardemb, own loop, declared order",
    "nn.EmbeddingBag(sparse=True)",
)
Step = Callable[[], object]
"""A step of training; what it returns is of no account."""


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
        return torch.cat(self.pooled(batch), 1).mean()

    def pooled(self, batch: KeyedJaggedTensor) -> list[torch.Tensor]:
        """Of each bag; the batch keeps its features' offsets, as a user would."""
        features = batch.to_dict()
        return [
            bag(features[name].values(), features[name].offsets())
            for name, bag in zip(features, self.bags, strict=True)
        ]


def some_bags(case: Case, *, sparse: bool) -> Bags:
    """Those of the tables."""
    return Bags(
        nn.EmbeddingBag.from_pretrained(
            torch.full((case.num_embeddings, EMBEDDING_DIM), START),
            freeze=False,
            mode="sum",
            sparse=sparse,
            include_last_offset=True,
        )
        for _ in case.names
    )


def loop(model: nn.Module, optimizer: Any, batches: Batches) -> Step:
    """A step of a plain training loop; returns the loss."""
    upcoming = cycle(batches)

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        loss: torch.Tensor = model(next(upcoming))
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


TORCH_OPTIMIZERS = {
    "SGD": torch.optim.SGD,
    "Adagrad": torch.optim.Adagrad,
    "RowWiseAdagrad": torch.optim.Adagrad,
    "Adam": torch.optim.SparseAdam,
}
"""Adagrad stands for its row-wise kin."""


def plain(case: Case, batches: Batches, env: Env) -> Step:  # noqa: ARG001 - called as others are
    """nn.EmbeddingBag with a torch optimizer."""
    model = some_bags(case, sparse=True)
    return loop(model, TORCH_OPTIMIZERS[case.optimizer](model.parameters(), lr=LR), batches)


def torchrec_directly(case: Case, batches: Batches, env: Env) -> Step:
    """TorchRec as its tutorials have it."""
    collection = EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(
                name=name,
                num_embeddings=case.num_embeddings,
                embedding_dim=EMBEDDING_DIM,
                feature_names=[name],
                init_fn=partial(nn.init.constant_, val=START),
            )
            for name in case.names
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
        for number, name in enumerate(case.names)
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


def shardemb(
    case: Case, env: Env, *, declared_order: bool = False, kernel: KernelChoice = "auto"
) -> tuple[nn.Module, Any]:
    """The same through shardemb."""
    tables = [
        se.TableConfig(
            name=name,
            num_embeddings=case.num_embeddings,
            embedding_dim=EMBEDDING_DIM,
            feature_names=(name,),
            optimizer=OPTIMIZERS[case.optimizer],
            init=init.Constant(value=START),
        )
        for name in case.names
    ]
    model = Mean(se.EmbeddingBagCollection(tables))
    where: dict[str, layouts.Layout] = {
        name: layouts.row_wise()
        if case.layout == "row_wise"
        else layouts.table_wise(rank=number % env.world_size)
        for number, name in enumerate(case.names)
    }
    plan = se.plan_sharding(model, env, where, kernel=kernel)
    sharded = se.shard_modules(model, plan, env, declared_order=declared_order)
    return sharded, se.build_optimizer(sharded)


def pipeline(model: nn.Module, optimizer: Any, batches: Batches, env: Env) -> Step:
    """A step of a TrainPipeline; returns the number of the step and its loss."""
    endless: Iterator[Any] = se.TrainPipeline(model, optimizer, env).run(cycle(batches), 10**9)
    return lambda: next(endless)


def contenders(case: Case, env: Env) -> dict[str, Step]:
    """A step of each."""
    batches = zipf_batches(case, env)
    steps = {TORCHREC: torchrec_directly(case, batches, env)}
    steps[PIPELINE] = pipeline(*shardemb(case, env), batches, env)
    steps[OWN_LOOP] = loop(*shardemb(case, env), batches)
    if case.layout == "table_wise" and env.world_size > 1:
        steps[IN_ORDER] = loop(*shardemb(case, env, declared_order=True), batches)
    if env.world_size == 1:
        steps[PLAIN] = plain(case, batches, env)
    return steps
