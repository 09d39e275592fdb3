"""What only the native kernel takes, any width and bfloat16 on CPU, against float64."""

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch

import shardemb as se
from shardemb import init, layouts, optim
from shardemb.env import Env
from shardemb.layouts import Layout
from shardemb.optim import SparseOptimizer
from tests.every_layout import Case, check
from tests.plans import NEEDS_NATIVE
from tests.spmd import spmd

WIDTHS = (1, 3, 6, 64, 4)
TOLERANCE = {"float32": 2e-5, "float16": 1e-3, "bfloat16": 8e-3}  # an ulp of 16 bits
OPTIMIZERS: tuple[SparseOptimizer, ...] = (
    optim.SGD(lr=0.05),
    optim.RowWiseAdagrad(lr=0.1, eps=1e-6),
    optim.Adam(lr=0.05),
)
INT32, INT64 = torch.int32, torch.int64


def table(width: int, **fields: Any) -> se.TableConfig:
    """Two features on a table, its name by its width."""
    given: dict[str, Any] = {
        "name": f"wide_{width}",
        "num_embeddings": 37 + width,
        "embedding_dim": width,
        "feature_names": (f"seen_{width}", f"bought_{width}"),
        "pooling": "mean" if width in {3, 4} else "sum",
        "init": init.Uniform(low=-0.3, high=0.3),
        "rounding": "nearest",
    }
    return se.TableConfig(**given | fields)


def layouts_of(width: int) -> Iterator[Layout]:
    """Whole columns, and slices where they are equal."""
    yield layouts.row_wise()
    yield layouts.table_wise(rank=1)
    if width % 2 == 0:
        yield layouts.column_wise(ranks=[1, 0])


def case_of(where: Mapping[int, Layout], dtype: str, **fields: Any) -> Case:
    """Tables of some widths, of one dtype."""
    own = {name: fields.pop(name) for name in ("optimizer", "pooling") if name in fields}
    given: dict[str, Any] = {
        "tables": [table(width, dtype=dtype, **own) for width in where],
        "where": {f"wide_{width}": layout for width, layout in where.items()},
        "num_samples": [4, 7],
        "tolerance": TOLERANCE[dtype],
        "linear": dtype != "float32",
    }
    return Case(**given | fields)


def every_width(position: int) -> dict[int, Layout]:
    """The layouts at a position of `layouts_of`, or the first where a width has fewer."""
    found = {width: list(layouts_of(width)) for width in WIDTHS}
    return {width: of[position if position < len(of) else 0] for width, of in found.items()}


@NEEDS_NATIVE
@spmd(world_size=2)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_pooled_tables_of_any_width_equal_unsharded_float64(env: Env, dtype: str) -> None:
    for position in range(3):
        for optimizer in OPTIMIZERS:
            check(env, case_of(every_width(position), dtype, optimizer=optimizer))
        of_weighted = case_of(every_width(position), dtype, pooling="sum", weighted=True)
        check(env, of_weighted)


@NEEDS_NATIVE
@spmd(world_size=2)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_sequences_of_any_width_equal_unsharded_float64(env: Env, dtype: str) -> None:
    for width in WIDTHS:
        for layout in layouts_of(width):
            for optimizer in OPTIMIZERS:
                where = {width: layout}
                check(env, case_of(where, dtype, optimizer=optimizer, sequence=True, pooling="sum"))


@NEEDS_NATIVE
@spmd(world_size=2)
def test_replicated_tables_of_any_width_equal_unsharded_float64(env: Env) -> None:
    for optimizer in OPTIMIZERS:
        beside = {width: layouts.data_parallel() for width in WIDTHS} | {6: layouts.row_wise()}
        check(env, case_of(beside, "float32", optimizer=optimizer))
    for width in WIDTHS:
        alone = {width: layouts.data_parallel()}
        check(env, case_of(alone, "float32", sequence=True, pooling="sum"))


@NEEDS_NATIVE
@spmd(world_size=2)
def test_ids_of_32_bits_do_as_those_of_64_on_all_ranks_or_on_one(env: Env) -> None:
    for id_dtypes in ((INT32, INT32), (INT32, INT64), (INT64, INT32)):
        for position in range(3):
            check(env, case_of(every_width(position), "float32", id_dtypes=id_dtypes))
        alone = {64: layouts.row_wise()}
        check(env, case_of(alone, "float32", id_dtypes=id_dtypes, sequence=True, pooling="sum"))
        summed = case_of(alone, "float32", id_dtypes=id_dtypes, weighted=True)
        check(env, summed)


@NEEDS_NATIVE
@spmd(world_size=1)
def test_one_rank_equals_unsharded_float64_with_ids_of_either_width(env: Env) -> None:
    where: dict[int, Layout] = {width: layouts.table_wise(rank=0) for width in WIDTHS}
    for dtype in TOLERANCE:
        for id_dtype in (INT32, INT64):
            check(env, case_of(where, dtype, num_samples=[6], id_dtypes=[id_dtype]))
