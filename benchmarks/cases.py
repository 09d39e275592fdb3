"""What contenders train on: tables, batches and optimizers. Holds no model and times nothing."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torchrec import KeyedJaggedTensor

from shardemb import optim
from shardemb.env import Env

NUM_TABLES, NUM_EMBEDDINGS, EMBEDDING_DIM, LR = 26, 100_000, 64, 0.01
START = 0.1
"""What every row starts with, so that contenders that do the same get the same."""
OPTIMIZERS: dict[str, optim.SparseOptimizer] = {
    "SGD": optim.SGD(lr=LR),
    "Adagrad": optim.Adagrad(lr=LR),
    "RowWiseAdagrad": optim.RowWiseAdagrad(lr=LR),
    "Adam": optim.Adam(lr=LR),
}
FUSED = ("SGD", "Adagrad", "RowWiseAdagrad")
"""Those that FBGEMM has on CPU."""
IdArray = npt.NDArray[np.int64]
Batches = list[KeyedJaggedTensor]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One workload; the batch is that of all ranks."""

    optimizer: str
    batch_size: int
    ids_per_bag: int
    layout: str = "table_wise"
    world_size: int = 1
    num_tables: int = NUM_TABLES
    num_embeddings: int = NUM_EMBEDDINGS

    @property
    def names(self) -> list[str]:
        """Of the tables, and of the features that look them up."""
        return [f"t{number}" for number in range(self.num_tables)]


def zipf_ids(num_embeddings: int, shape: tuple[int, ...], count: int) -> Iterator[IdArray]:
    """Arrays of Zipf(1.05) ids, scattered over the rows."""
    weights = 1 / np.arange(1, num_embeddings + 1) ** 1.05
    cdf = np.cumsum(weights / weights.sum())
    for number in range(count):
        popular = np.searchsorted(cdf, np.random.default_rng(number).random(shape))
        yield np.minimum(popular, num_embeddings - 1) * 7919 % num_embeddings


def uniform_ids(num_embeddings: int, shape: tuple[int, ...], count: int) -> Iterator[IdArray]:
    """Arrays of ids, all as likely."""
    for number in range(count):
        yield np.random.default_rng(number).integers(num_embeddings, size=shape)


def batches_of(case: Case, ids: Iterator[IdArray], env: Env) -> Batches:
    """This rank's part of global batches, from arrays of a row for each table."""
    mine = case.batch_size // env.world_size
    first = env.rank * mine * case.ids_per_bag
    lengths = torch.full((case.num_tables * mine,), case.ids_per_bag)
    parts = (ids_of_all[:, first : first + mine * case.ids_per_bag] for ids_of_all in ids)
    return [
        KeyedJaggedTensor(keys=case.names, values=torch.from_numpy(part.ravel()), lengths=lengths)
        for part in parts
    ]


def zipf_batches(case: Case, env: Env, count: int = 8) -> Batches:
    """This rank's part of global batches of Zipf ids."""
    shape = (case.num_tables, case.batch_size * case.ids_per_bag)
    return batches_of(case, zipf_ids(case.num_embeddings, shape, count), env)
