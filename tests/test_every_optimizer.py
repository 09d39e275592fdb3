"""Every optimizer under every layout for 20 steps, against unsharded plain torch in float64."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

import shardemb as se
from shardemb import init, layouts, optim
from shardemb.env import Env
from shardemb.layouts import Layout
from shardemb.optim import SparseOptimizer
from tests.every_layout import Case, check, on_both_kernels
from tests.spmd import spmd
from tests.test_every_layout import every_layout, sequence_layouts

OPTIMIZERS: dict[str, SparseOptimizer] = {
    "sgd": optim.SGD(lr=0.01),
    "sgd_decay": optim.SGD(lr=0.01, momentum=0.8, weight_decay=0.1),
    "adagrad": optim.Adagrad(lr=0.05, eps=1e-4, weight_decay=0.02),
    "row_wise_adagrad": optim.RowWiseAdagrad(lr=0.05, eps=1e-4),
    "row_wise_decay": optim.RowWiseAdagrad(lr=0.05, weight_decay=0.05),
    "adam": optim.Adam(lr=0.01, betas=(0.8, 0.95), eps=1e-4, weight_decay=0.05),
    "adam_w": optim.AdamW(lr=0.01, eps=1e-4, weight_decay=0.1),
    "partial_adam": optim.PartialRowWiseAdam(lr=0.01, eps=1e-4, weight_decay=0.1),
    "lamb": optim.LAMB(lr=0.02, eps=1e-3, weight_decay=0.1),
    "partial_lamb": optim.PartialRowWiseLAMB(lr=0.02, eps=1e-3, weight_decay=0.1),
    "lars": optim.LarsSGD(lr=0.5, eta=0.02, weight_decay=0.05),
    "limited": optim.Adagrad(lr=0.05, max_gradient=0.02),
}


def make_tables() -> list[se.TableConfig]:
    """A table for each optimizer, with its own features; of two, some rows stay as they are."""
    tables = [
        se.TableConfig(
            name=name,
            num_embeddings=41 + number,
            embedding_dim=16,
            feature_names=(f"{name}_id", f"{name}_ids"),
            pooling="mean" if number % 2 else "sum",
            optimizer=optimizer,
            init=init.Uniform(low=-0.3, high=0.3),
        )
        for number, (name, optimizer) in enumerate(OPTIMIZERS.items())
    ]
    decayed = replace(tables[1], padding_idx=1, frozen_rows=20)  # which would move any row
    adam = replace(tables[5], padding_idx=2)
    return [
        *tables,
        replace(decayed, name="first_frozen", feature_names=("first",)),
        replace(adam, name="padded", feature_names=("padded",)),
    ]


def case_of(layout: Layout, *, sequence: bool) -> Case:
    """All tables under one layout, for some steps; samples are left to the test."""
    tables = make_tables()
    return Case(
        tables=[replace(table, pooling="sum") for table in tables] if sequence else tables,
        where={table.name: layout for table in tables},
        num_samples=[],
        num_steps=4,
        sequence=sequence,
        tolerance=5e-5,
    )


def case(env: Env, layout: Layout, *, sequence: bool) -> Case:
    samples = [4] * env.world_size
    some = case_of(layout, sequence=sequence)
    return replace(some, num_samples=samples, num_steps=20, linear=True)


def cases(env: Env) -> Iterator[Case]:
    """Half of the layouts on FBGEMM's kernel too, and the other half on two nodes."""

    def every() -> Iterator[Case]:
        for layout in every_layout(env):
            yield case(env, layout, sequence=False)
        for layout in sequence_layouts(env):
            yield case(env, layout, sequence=True)

    for one in on_both_kernels(every(), first=env.num_nodes):
        yield replace(one, num_steps=6) if one.kernel == "fbgemm" else one


@spmd(world_size=1)
def test_every_optimizer_equals_unsharded_float64_on_one_rank(env: Env) -> None:
    for one in on_both_kernels([case(env, layouts.table_wise(rank=0), sequence=False)]):
        check(env, one)
    check(env, case(env, layouts.data_parallel(), sequence=False))


@spmd(world_size=2)
def test_every_optimizer_under_every_layout_equals_unsharded_float64_on_two_ranks(env: Env) -> None:
    for one in cases(env):
        check(env, one)


@spmd(world_size=4, num_nodes=2)
def test_every_optimizer_under_every_layout_equals_unsharded_float64_on_two_nodes(env: Env) -> None:
    for one in cases(env):
        check(env, one)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@spmd(world_size=1, device="cuda")
def test_every_optimizer_equals_unsharded_float64_on_cuda(env: Env) -> None:
    check(env, case(env, layouts.table_wise(rank=0), sequence=False))
    check(env, case(env, layouts.table_wise(rank=0), sequence=True))
    check(env, case(env, layouts.data_parallel(), sequence=False))
