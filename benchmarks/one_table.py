"""What `vocabulary.py` measures: one table by each contender, and its batches. Times nothing."""

# D embedding_dim, N ids

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torchrec import KeyedJaggedTensor

import shardemb as se
from benchmarks.cases import EMBEDDING_DIM, LR, START, Batches, zipf_ids
from benchmarks.contenders import Bags, Mean
from shardemb import init, layouts, optim
from shardemb.env import Env

VOCABULARIES = (10**4, 10**5, 10**6, 10**7)
FEWEST = VOCABULARIES[0]
BATCH_SIZE, IDS_PER_BAG, ROW = 2048, 20, 4 * EMBEDDING_DIM
SAME, ALL = "the same rows", "Zipf of all rows"

Trained = tuple[nn.Module, torch.optim.Optimizer]


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One way to train the table.

    Attributes:
        of: What shardemb's optimizer of the same state is.
        make: A model and its optimizer, of so many rows.
        row_bytes: Memory for each row at the peak of a step, as estimated beforehand.
    """

    of: optim.SparseOptimizer
    make: Callable[[int, Env], Trained]
    row_bytes: int


def shardemb(optimizer: optim.SparseOptimizer) -> Contender:
    """By shardemb, on one rank."""

    def make(num_embeddings: int, env: Env) -> Trained:
        table = se.TableConfig(
            name="table",
            num_embeddings=num_embeddings,
            embedding_dim=EMBEDDING_DIM,
            feature_names=("feature",),
            optimizer=optimizer,
            init=init.Constant(value=START),
        )
        model = Mean(se.EmbeddingBagCollection([table]))
        plan = se.plan_sharding(model, env, {"table": layouts.table_wise(rank=0)})
        sharded = se.shard_modules(model, plan, env)
        return sharded, se.build_optimizer(sharded)

    state_bytes = optimizer.state_bytes(1, EMBEDDING_DIM)
    return Contender(of=optimizer, make=make, row_bytes=ROW + state_bytes)


def torch_sparse(
    of: optim.SparseOptimizer, kind: Callable[..., torch.optim.Optimizer]
) -> Contender:
    """By nn.EmbeddingBag with sparse gradients."""
    return Contender(
        of=of,
        make=lambda num_embeddings, _: of_torch(num_embeddings, kind, sparse=True),
        row_bytes=ROW + of.state_bytes(1, EMBEDDING_DIM),
    )


def of_torch(
    num_embeddings: int, kind: Callable[..., torch.optim.Optimizer], *, sparse: bool
) -> Trained:
    """nn.EmbeddingBag and an optimizer of torch."""
    weight_RD = torch.full((num_embeddings, EMBEDDING_DIM), START)
    bag = nn.EmbeddingBag.from_pretrained(
        weight_RD, freeze=False, mode="sum", sparse=sparse, include_last_offset=True
    )
    model = Bags([bag])
    return model, kind(model.parameters(), lr=LR)


ADAM, ADAGRAD, ROW_WISE = optim.Adam(lr=LR), optim.Adagrad(lr=LR), optim.RowWiseAdagrad(lr=LR)
DENSE = Contender(
    of=ADAM,
    make=lambda num_embeddings, _: of_torch(num_embeddings, torch.optim.Adam, sparse=False),
    row_bytes=6 * ROW,  # weight, two moments, gradient, and two more while it updates
)
GROUPS: Mapping[str, Mapping[str, Contender]] = {
    "torch SparseAdam": {
        "torch SparseAdam": torch_sparse(ADAM, torch.optim.SparseAdam),
        "shardemb Adam": shardemb(ADAM),
        "torch Adam, dense gradient": DENSE,
    },
    "torch Adagrad, sparse gradient": {
        "torch Adagrad, sparse gradient": torch_sparse(ADAGRAD, torch.optim.Adagrad),
        "shardemb Adagrad": shardemb(ADAGRAD),
        "shardemb RowWiseAdagrad": shardemb(ROW_WISE),
    },
}
"""By the one that the others are compared with."""


def batches_of(num_embeddings: int, ids: str) -> Batches:
    """Batches with ids of all rows, or of as many rows in every vocabulary."""
    spread = num_embeddings // FEWEST if ids == SAME else 1
    size = (BATCH_SIZE * IDS_PER_BAG,)
    lengths = torch.full((BATCH_SIZE,), IDS_PER_BAG)
    return [
        KeyedJaggedTensor(
            keys=["feature"], values=torch.from_numpy(ids_N * spread), lengths=lengths
        )
        for ids_N in zipf_ids(num_embeddings // spread, size, count=8)
    ]
