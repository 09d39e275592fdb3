"""A training step moves the rows that it looked up, their state, and nothing of other rows.

What a step reads and writes is counted in two ways that know nothing of each other: by the pages of
the tables and their state that any code accesses, and by the bytes that operators read and write,
of whatever tensors. Both are the same for 10^4 rows and for 10^7.

They are not under data_parallel, where a backward pass makes a gradient of the whole table, which
ranks exchange: of float32 rows of width 16, each in the vocabulary costs a step on one rank, which
exchanges nothing, 75 bytes read and 71 written. Weight and state are accessed at touched rows only.
"""

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec import KeyedJaggedTensor

import shardemb as se
from shardemb import init, layouts, optim
from shardemb.env import Env
from shardemb.kernel_choice import Kernel
from shardemb.layouts import Layout
from shardemb.optim import SparseOptimizer
from tests.moved_bytes import MovedBytes
from tests.plans import KERNELS
from tests.spmd import spmd
from tests.touched_pages import (
    pages_of_rows,
    referenced_pages,
    refuse_huge_pages,
    whole_pages,
    why_not,
)

WIDTH, NUM_IDS = 16, 100
ROW_BYTES = 4 * WIDTH
FEWEST, MORE, MANY, MOST = 10**4, 10**5, 10**6, 10**7
WHOLE: Layout = layouts.table_wise(rank=0)


@dataclass(frozen=True, kw_only=True)
class Case:
    """How a table is trained.

    Attributes:
        optimizer: Its optimizer.
        max_norm: Of all gradients.
        sequence: Whether it is looked up by an EmbeddingCollection.
        layout: How it lies on one rank.
        kernel: What looks its rows up.
    """

    optimizer: SparseOptimizer
    max_norm: float | None = None
    sequence: bool = False
    layout: Layout = WHOLE
    kernel: Kernel = "fbgemm"


UPDATED_BY_FBGEMM = [
    Case(optimizer=optim.SGD(lr=0.1)),
    Case(optimizer=optim.Adagrad(lr=0.1)),
    Case(optimizer=optim.Adagrad(lr=0.1), sequence=True),
    Case(optimizer=optim.RowWiseAdagrad(lr=0.1), layout=layouts.row_wise()),
]
UPDATED_BY_SHARDEMB = [
    Case(optimizer=optim.Adam(lr=0.1)),
    Case(optimizer=optim.Adam(lr=0.1), max_norm=0.01),
    Case(optimizer=optim.Adam(lr=0.1), sequence=True),
    Case(optimizer=optim.AdamW(lr=0.1, weight_decay=0.01)),
    Case(optimizer=optim.RowWiseAdagrad(lr=0.1, weight_decay=0.01), layout=layouts.row_wise()),
    Case(optimizer=optim.PartialRowWiseLAMB(lr=0.1)),
]
CASES = UPDATED_BY_FBGEMM + UPDATED_BY_SHARDEMB
NATIVE = [replace(case, kernel="native") for case in CASES if "native" in KERNELS]
ADAM = UPDATED_BY_SHARDEMB[0]

WHY_NOT = why_not()
needs_pages = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))


def rows_of(num_embeddings: int) -> torch.Tensor:
    """Rows that lie on a page each, of 64 rows, and none on the first or the last."""
    return (70 + 99 * torch.arange(NUM_IDS)) * (num_embeddings // FEWEST)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A table that has taken one step, so that all its lazy parts are there.

    Attributes:
        case: How it is trained.
        tensors: Its weight and its optimizer's state, by name.
        step: Takes one more.
        rows_U: What a step looks up.
    """

    case: Case
    tensors: Mapping[str, torch.Tensor]
    step: Callable[[], None]
    rows_U: torch.Tensor


def train(env: Env, case: Case, num_embeddings: int) -> Trained:
    gc.collect()  # the table before this one, of up to 2 GB
    refuse_huge_pages()
    table = se.TableConfig(
        name="table",
        num_embeddings=num_embeddings,
        embedding_dim=WIDTH,
        feature_names=("feature",),
        init=init.Constant(value=0.5),
        optimizer=case.optimizer,
    )
    make = se.EmbeddingCollection if case.sequence else se.EmbeddingBagCollection
    model = nn.Sequential(make([table]))
    plan = se.plan_sharding(model, env, {"table": case.layout}, kernel=case.kernel)
    sharded = se.shard_modules(model, plan, env)
    optimizer = se.build_optimizer(sharded, max_norm=case.max_norm)
    rows_U = rows_of(num_embeddings)
    batch = KeyedJaggedTensor(
        keys=["feature"], values=rows_U.repeat(2), lengths=torch.full((NUM_IDS // 2,), 4)
    )

    def step() -> None:
        optimizer.zero_grad()
        found = sharded(batch)
        (found["feature"] if case.sequence else found).values().square().mean().backward()
        optimizer.step()

    step()
    (weight,) = sharded.state_dict().values()
    (state,) = optimizer.state_dict()["state"].values()
    tensors = {
        name.removeprefix("table."): held.local_shards()[0].tensor
        if isinstance(held, ShardedTensor)
        else held
        for name, held in {"weight": weight, **state}.items()
    }
    assert set(tensors) == {"weight", *case.optimizer.state}
    for value in tensors.values():
        value.mul_(1.0)  # pages that were never written are one page of zeros, which counts nowhere
    return Trained(case=case, tensors=tensors, step=step, rows_U=rows_U)


def moved_by(found: Trained, step: Callable[[], object]) -> tuple[int, int]:
    """Bytes that the operators of a step read, and bytes that they write."""
    with MovedBytes(found.tensors.values()) as moved:
        step()
    by_fbgemm = any("backward_codegen" in name for name in moved.operators)
    assert by_fbgemm == (found.case in UPDATED_BY_FBGEMM)
    return moved.read, moved.written


def assert_only_its_pages(found: Trained) -> None:
    """A step accesses the pages of its rows: one for each, unless the tensor has fewer pages."""
    expected = {name: pages_of_rows(value, found.rows_U) for name, value in found.tensors.items()}
    for name, value in found.tensors.items():
        assert expected[name] == NUM_IDS or len(whole_pages(value)) < NUM_IDS
    counted = referenced_pages(found.tensors, found.step)
    assert counted == expected, f"{found.case}: {counted} pages accessed, {expected} have rows"


def assert_only_its_rows(found: Trained) -> None:
    """A step changes its rows, in weight and state, and not a bit of others."""
    before = {name: value.clone() for name, value in found.tensors.items()}
    found.step()
    for name, value in found.tensors.items():
        changed_R = (value != before[name]).view(len(value), -1).any(1)
        assert torch.equal(changed_R.nonzero().squeeze(1), found.rows_U), (found.case, name)


def check_bytes_and_rows(env: Env, case: Case, num_embeddings: int) -> tuple[int, int]:
    found = train(env, case, num_embeddings)
    assert_only_its_rows(found)
    return moved_by(found, found.step)


def check_bytes_and_pages(env: Env, case: Case, num_embeddings: int) -> tuple[int, int]:
    found = train(env, case, num_embeddings)
    if WHY_NOT is None:
        assert_only_its_pages(found)
    return moved_by(found, found.step)


@spmd(world_size=1)
def test_a_step_moves_as_many_bytes_in_every_vocabulary_and_changes_only_its_rows(env: Env) -> None:
    for case in CASES:
        moved = {check_bytes_and_rows(env, case, number) for number in (FEWEST, MANY)}
        assert len(moved) == 1, f"{case}: {moved}"
    for case in NATIVE:  # of which no operator tells the bytes
        for number in (FEWEST, MANY):
            assert_only_its_rows(train(env, case, number))


@needs_pages
@spmd(world_size=1)
def test_a_step_accesses_only_the_pages_of_its_rows(env: Env) -> None:
    for case in CASES + NATIVE:
        for num_embeddings in (FEWEST, MANY):
            assert_only_its_pages(train(env, case, num_embeddings))


@pytest.mark.slow
@needs_pages
@spmd(world_size=1)
def test_bytes_and_pages_are_the_same_from_ten_thousand_to_ten_million_rows(env: Env) -> None:
    for case in CASES:
        moved = {check_bytes_and_pages(env, case, number) for number in (FEWEST, MORE, MANY, MOST)}
        assert len(moved) == 1, f"{case}: {moved}"


PASSES: list[Callable[[torch.Tensor], object]] = [
    torch.sum,
    torch.zeros_like,
    lambda value: value.mul_(1.0),
    lambda value: value.index_select(1, torch.tensor([0])),
]


def check_a_pass_is_noticed(
    env: Env, num_embeddings: int, one: Callable[[torch.Tensor], object]
) -> int:
    """Bytes of a step with a pass over a state's whole tensor, whose pages are all accessed."""
    found = train(env, ADAM, num_embeddings)
    moments = found.tensors["exp_avg_sq"]
    if one is not torch.zeros_like:  # which takes the shape, and makes pages of its own
        pages = referenced_pages(found.tensors, lambda: one(moments))
        assert pages == {"weight": 0, "momentum1": 0, "exp_avg_sq": len(whole_pages(moments))}

    def step() -> None:
        found.step()
        one(moments)

    return sum(moved_by(found, step))


@needs_pages
@spmd(world_size=1)
def test_what_passes_over_a_whole_table_or_state_is_noticed(env: Env) -> None:
    for one in PASSES:
        few, more = (check_a_pass_is_noticed(env, number, one) for number in (FEWEST, MORE))
        assert more - few >= ROW_BYTES * (MORE - FEWEST)


@spmd(world_size=1)
def test_a_replicated_table_moves_bytes_for_each_of_its_rows(env: Env) -> None:
    case = Case(optimizer=optim.Adam(lr=0.1), layout=layouts.data_parallel())
    few, more = (check_bytes_and_pages(env, case, number) for number in (FEWEST, MORE))
    for bytes_of_few, bytes_of_more in zip(few, more, strict=True):
        per_row = (bytes_of_more - bytes_of_few) / (MORE - FEWEST)
        assert ROW_BYTES < per_row < 4 * ROW_BYTES
