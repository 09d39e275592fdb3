"""Who looks up rows in `kernels.py`, without backward; and how fast memory gives random rows."""

# B batch, D embedding_dim, N ids, R rows

from collections.abc import Callable, Iterator, Mapping
from itertools import cycle
from typing import Any, NamedTuple

import torch
from torchrec import KeyedJaggedTensor

from benchmarks.bare_kernel import Tables
from benchmarks.cases import (
    EMBEDDING_DIM,
    START,
    Batches,
    Case,
    IdArray,
    batches_of,
    uniform_ids,
    zipf_ids,
)
from benchmarks.contenders import OWN_LOOP, Step, shardemb, some_bags
from benchmarks.kernel_contenders import BARE, FBGEMM, fbgemm_tables
from shardemb.env import Env
from shardemb.huge_pages import advise_huge

BATCH_SIZES = {1: 8192, 20: 2048, 50: 1024, 1000: 40}
"""By the ids of a bag; with 1,000 of them little is written."""
LONG, ROW_BYTES = 1000, 4 * EMBEDDING_DIM
BAGS, BAGS_HUGE, GATHER = "nn.EmbeddingBag", "nn.EmbeddingBag, huge pages", "torch.index_select"
UNIFORM, ZIPF = "uniform", "Zipf"
IDS: dict[str, Callable[[int, tuple[int, ...], int], Iterator[IdArray]]] = {
    UNIFORM: uniform_ids,
    ZIPF: zipf_ids,
}
LookUp = Callable[[KeyedJaggedTensor], object]


class Lookup(NamedTuple):
    """What is measured: the ids, how many a bag has, and who looks them up."""

    ids: str
    ids_per_bag: int
    contender: str

    @property
    def row_bytes(self) -> int:
        """Bytes of the rows that it reads."""
        case = case_of(self.ids_per_bag)
        return case.num_tables * case.batch_size * case.ids_per_bag * ROW_BYTES


def case_of(ids_per_bag: int) -> Case:
    """The workload with bags of that many ids: 2 GB of rows, much more than a cache holds."""
    return Case(
        optimizer="SGD",
        batch_size=BATCH_SIZES[ids_per_bag],
        ids_per_bag=ids_per_bag,
        num_tables=8,
        num_embeddings=1_000_000,
    )


def look_ups(env: Env) -> dict[str, LookUp]:
    """The lookup of each contender, with tables of its own."""
    case = case_of(1)
    sharded: Any = shardemb(case, env)[0]
    huge = some_bags(case, sparse=False)
    advise_huge(*(weight_RD.data for weight_RD in huge.parameters()))
    tables = fbgemm_tables(case)
    return {
        OWN_LOOP: lambda batch: sharded.module.collection(batch).values(),
        BARE: Tables(case).look_up,
        BAGS: some_bags(case, sparse=False).pooled,
        BAGS_HUGE: huge.pooled,
        FBGEMM: lambda batch: tables(batch.values(), batch.offsets()),
    }


def forwards(env: Env) -> dict[Lookup, Step]:
    """All lookups that are measured."""
    found = dict[Lookup, Step]()
    of_all = look_ups(env)
    for ids, ids_per_bag in ((UNIFORM, 1), (UNIFORM, 20), (UNIFORM, 50), (ZIPF, 20), (ZIPF, 50)):
        found |= measured(ids, ids_per_bag, of_all, env)
    found |= measured(UNIFORM, LONG, of_all, env)
    weight_RD = torch.full((8_000_000, EMBEDDING_DIM), START)
    advise_huge(weight_RD)
    gather = Lookup(UNIFORM, 1, GATHER)
    ids_N = torch.randint(len(weight_RD), (gather.row_bytes // ROW_BYTES,))
    out_ND = torch.empty(len(ids_N), EMBEDDING_DIM)
    found[gather] = lambda: torch.index_select(weight_RD, 0, ids_N, out=out_ND)
    return found


def measured(
    ids: str, ids_per_bag: int, of_all: Mapping[str, LookUp], env: Env
) -> dict[Lookup, Step]:
    """Those of one kind of batches."""
    case = case_of(ids_per_bag)
    shape = (case.num_tables, case.batch_size * ids_per_bag)
    batches = batches_of(case, IDS[ids](case.num_embeddings, shape, 4), env)
    return {
        Lookup(ids, ids_per_bag, name): without_grad(look_up, batches)
        for name, look_up in of_all.items()
    }


def without_grad(look_up: LookUp, batches: Batches) -> Step:
    """A lookup alone."""
    upcoming = cycle(batches)

    def step() -> object:
        with torch.no_grad():
            return look_up(next(upcoming))

    return step
