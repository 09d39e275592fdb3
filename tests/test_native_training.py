"""Models whose rows the native kernels update: clipping, what is not finite, memory that moves."""

# R rows, U looked up, D width

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn
from torchrec import KeyedJaggedTensor

import shardemb as se
from shardemb import init, layouts, optim
from shardemb.env import Env
from shardemb.errors import RunError
from shardemb.layouts import Layout
from shardemb.optim import SparseOptimizer
from shardemb.updates.shard_rows import ShardRows
from tests.every_layout import Case, batch_of, check_rows, loss_of
from tests.plans import KERNELS, NEEDS_NATIVE
from tests.reference import Reference
from tests.spmd import spmd

pytestmark = NEEDS_NATIVE
ROWS, WIDTH = 40, 6
NAN = float("nan")
WHOLE: Layout = layouts.table_wise(rank=0)


def make_table(name: str, optimizer: SparseOptimizer, **changed: Any) -> se.TableConfig:
    fields: dict[str, Any] = {
        "name": name,
        "num_embeddings": ROWS,
        "embedding_dim": WIDTH,
        "feature_names": (name,),
        "optimizer": optimizer,
        "init": init.Uniform(low=-0.5, high=0.5),
    }
    return se.TableConfig(**fields | changed)


class Run:
    """A collection on the native kernels.

    Args:
        env: This process.
        where: Layout of each table.
        tables: The tables.
        max_norm: Of the optimizer.
        check_ids: Of `shard_modules`.
    """

    def __init__(
        self,
        env: Env,
        where: Mapping[str, Layout],
        *tables: se.TableConfig,
        max_norm: float | None = None,
        check_ids: bool = True,
    ) -> None:
        model = nn.Sequential(se.EmbeddingBagCollection(tables, seed=3))
        plan = se.plan_sharding(model, env, where, kernel="native")
        self.model = se.shard_modules(model, plan, env, check_ids=check_ids)
        self.optimizer = se.build_optimizer(self.model, max_norm=max_norm)
        self.tables = tables

    def look_up(self, *ids: int) -> torch.Tensor:
        """The sum of some rows of each table."""
        features = {table.name: [[one] for one in ids] for table in self.tables}
        lengths = torch.ones(len(features) * len(ids), dtype=torch.int64)
        batch = KeyedJaggedTensor(
            keys=list(features), values=torch.tensor(ids * len(features)), lengths=lengths
        )
        total: torch.Tensor = self.model(batch).values().sum()
        return total

    def rows_of(self, table: str) -> ShardRows:
        return next(rows for rows in self.optimizer.rows.blocks if rows.table == table)


@spmd(world_size=2)
def test_clipping_in_the_kernel_equals_float64_without_frozen_rows_and_padding(env: Env) -> None:
    tables = [
        make_table("sgd", optim.SGD(lr=0.5, momentum=0.5)),
        make_table("adagrad", optim.Adagrad(lr=0.1), frozen_rows=9),
        make_table("row_wise", optim.RowWiseAdagrad(lr=0.1), padding_idx=1, pooling="mean"),
        make_table("adam", optim.Adam(lr=0.1, eps=1e-4), frozen_rows=3, padding_idx=5),
        make_table("limited", optim.Adagrad(lr=0.1, max_gradient=0.01)),
    ]
    where = {
        table.name: layouts.row_wise() if number % 2 else layouts.table_wise(rank=number // 2 % 2)
        for number, table in enumerate(tables)
    }
    case = Case(tables=tables, where=where, num_samples=[4, 3], kernel="native", num_steps=4)
    plain = case.collection("cpu")
    before = {name.split(".")[1]: w.detach().clone() for name, w in plain.named_parameters()}
    reference = Reference(tables, before)
    run = Run(env, where, *tables, max_norm=0.5)
    for step in range(case.num_steps):
        run.optimizer.zero_grad()
        batches = [batch_of(case, step, rank) for rank in range(2)]
        mine = batches[env.rank]
        loss_of(run.model(mine).to_dict(), mine.stride(), linear=False).backward()
        assert not run.optimizer.rows.touched(watched=True)  # all is left to the kernels
        run.optimizer.step()
        losses = [
            loss_of(reference.forward(batch), batch.stride(), linear=False) for batch in batches
        ]
        torch.stack(losses).mean().backward()
        grads = []
        for table in tables:
            grad_RD = reference.weights[table.name].grad
            assert grad_RD is not None
            assert grad_RD[: table.frozen_rows].any() == (table.frozen_rows > 0)
            grads.append(grad_RD[table.frozen_rows :].flatten())
        expected = float(torch.cat(grads).norm())
        assert expected > 1.0
        assert float(run.optimizer.grad_norm) == pytest.approx(expected, rel=1e-4)  # type: ignore[arg-type]
        reference.step(max_norm=0.5)
    state = {f"collection.{k.partition('.')[2]}": v for k, v in run.model.state_dict().items()}
    optimizer_state = {
        f"collection.{name.partition('.0.')[2]}": entry
        for name, entry in run.optimizer.state_dict()["state"].items()
    }
    check_rows(case, reference, before, state, optimizer_state)


@spmd(world_size=1)
def test_frozen_rows_and_padding_count_nothing_in_the_norm(env: Env) -> None:
    some = make_table("some", optim.Adagrad(lr=0.1), frozen_rows=5, padding_idx=7)
    run = Run(env, {"some": WHOLE}, some, max_norm=1e6)
    run.look_up(0, 3, 4, 7).backward()
    run.optimizer.step()
    assert run.optimizer.grad_norm == 0.0
    run.optimizer.zero_grad()
    run.look_up(*range(10)).backward()
    run.optimizer.step()
    assert run.optimizer.grad_norm == pytest.approx((4 * WIDTH) ** 0.5)


@spmd(world_size=1)
def test_a_row_of_16_bits_that_overflows_is_refused_before_any_is_written(env: Env) -> None:
    tables = [
        make_table("small", optim.SGD(lr=1e4), dtype="float16", rounding="nearest"),
        make_table("full", optim.Adagrad(lr=0.1)),
    ]
    for max_norm in (None, 1e6):
        run = Run(env, dict.fromkeys(("small", "full"), WHOLE), *tables, max_norm=max_norm)
        before = [rows.weight_RD.clone() for rows in run.optimizer.rows.blocks]
        (10 * run.look_up(1, 2)).backward()
        with pytest.raises(
            RunError,
            match=r"row 1 of table 'small' becomes -inf, on rank 0, looked up by sample 0 of rank "
            "0; nothing of this step was applied",
        ):
            run.optimizer.step()
        for rows, weight_RD in zip(run.optimizer.rows.blocks, before, strict=True):
            assert torch.equal(rows.weight_RD, weight_RD)
        run.optimizer.zero_grad()
        run.look_up(1, 2).backward()
        run.optimizer.step()
        for rows, weight_RD in zip(run.optimizer.rows.blocks, before, strict=True):
            assert (
                (rows.weight_RD != weight_RD).nonzero()[:, 0].unique() == torch.tensor([1, 2])
            ).all()


@spmd(world_size=1)
def test_a_state_or_row_that_was_made_nan_by_hand_stays_and_is_told(env: Env) -> None:
    optimizers: tuple[SparseOptimizer, ...] = (
        optim.Adagrad(lr=0.1),
        optim.RowWiseAdagrad(lr=0.1),
        optim.Adam(lr=0.1),
    )
    for optimizer in optimizers:
        for name in ("weight", *optimizer.state):
            run = Run(env, {"t": WHOLE}, make_table("t", optimizer))
            rows = run.rows_of("t")
            loss = run.look_up(3, 4)  # of rows that are finite still
            held = rows.weight_RD if name == "weight" else rows.state[name]
            held[3] = NAN
            before_RD, state = rows.weight_RD.clone(), {k: v.clone() for k, v in rows.state.items()}
            loss.backward()
            with pytest.raises(
                RunError,
                match=r"^step 1: row 3 of table 't', or its state, was not finite or would not be; "
                "that row was left as it was, and all else of this step was applied; do not save "
                "the model; ",
            ):
                run.optimizer.step()
            moved_R = ~torch.isclose(rows.weight_RD, before_RD, rtol=0, atol=0, equal_nan=True)
            assert moved_R.any(1).nonzero().flatten().tolist() == [4]
            for key, value in rows.state.items():
                torch.testing.assert_close(
                    value[3], state[key][3], rtol=0, atol=0, equal_nan=True, msg=key
                )
            run.optimizer.zero_grad()
            run.look_up(5, 4).backward()
            run.optimizer.step()
            if name == "weight":
                run.optimizer.zero_grad()
                run.look_up(3, 4).backward()
                with pytest.raises(RunError, match=r"row 3 of table 't' is nan, on rank 0, .*noth"):
                    run.optimizer.step()


@spmd(world_size=1)
def test_an_unchecked_id_out_of_range_names_its_table(env: Env) -> None:
    tables = make_table("first", optim.SGD(lr=0.1)), make_table("last", optim.SGD(lr=0.1))
    run = Run(env, dict.fromkeys(("first", "last"), WHOLE), *tables, check_ids=False)
    before = run.look_up(0, ROWS - 1)
    for bad in (ROWS, -1, 2**40):
        batch = KeyedJaggedTensor(
            keys=["first", "last"], values=torch.tensor([1, 2, bad]), lengths=torch.tensor([1, 2])
        )
        text = (
            f"a block of {ROWS} rows, of table 'last', was asked for its row {bad}; check ids "
            "where batches are made"
        )
        with pytest.raises(ValueError, match=text):
            run.model(batch)
    assert torch.equal(run.look_up(0, ROWS - 1), before)


@spmd(world_size=1)
def test_rows_whose_memory_moves_are_found_and_trained(env: Env) -> None:
    tables = [make_table("a", optim.Adagrad(lr=0.1)), make_table("b", optim.Adam(lr=0.1))]
    where = dict.fromkeys("ab", WHOLE)
    still, early, late = runs = [Run(env, where, *tables) for _ in range(3)]

    def move(run: Run) -> None:
        address = run.rows_of("a").weight_RD.data_ptr()
        run.model.share_memory()
        assert run.rows_of("a").weight_RD.data_ptr() != address

    for step in range(4):
        for run in runs:
            run.optimizer.zero_grad()
            if run is early and step == 1:
                move(run)
            loss = run.look_up(step, step + 1, 7)
            if run is late and step == 1:
                move(run)
            loss.square().backward()
            run.optimizer.step()
    for moved in (early, late):
        blocks = zip(still.optimizer.rows.blocks, moved.optimizer.rows.blocks, strict=True)
        for one, other in blocks:
            assert torch.equal(one.weight_RD, other.weight_RD)
            for name, value in one.state.items():
                assert torch.equal(value, other.state[name])


@spmd(world_size=1)
def test_ids_of_32_bits_reach_replicated_tables_beside_native_ones(env: Env) -> None:
    tables = [
        make_table("a", optim.SGD(lr=0.1)),
        make_table("b", optim.SGD(lr=0.1), embedding_dim=8),
    ]
    run = Run(env, {"a": WHOLE, "b": layouts.data_parallel()}, *tables)
    before = {name: run.rows_of(name).weight_RD.clone() for name in "ab"}
    ids = torch.tensor([1, 2, 2, 39], dtype=torch.int32)
    lengths = torch.tensor([2, 2], dtype=torch.int64)
    run.model(
        KeyedJaggedTensor(keys=["a", "b"], values=ids, lengths=lengths)
    ).values().sum().backward()
    run.optimizer.step()
    for name, touched in (("a", [1, 2]), ("b", [2, 39])):
        expected = before[name].clone()
        expected[touched] -= 0.1
        torch.testing.assert_close(run.rows_of(name).weight_RD, expected)


@spmd(world_size=1)
def test_a_huge_weight_among_strided_ones_stops_the_step_before_any_row_moves(env: Env) -> None:
    table = make_table("t", optim.SGD(lr=10.0), init=init.Constant(value=0.0))
    model = nn.Sequential(se.EmbeddingBagCollection([table], is_weighted=True))
    sharded = se.shard_modules(model, se.plan_sharding(model, env, {"t": WHOLE}), env)
    optimizer = se.build_optimizer(sharded)
    weights = torch.tensor([1.0, 1.0, 1.0, 1.0, 3e38, 1.0])[::2]
    batch = KeyedJaggedTensor(
        keys=["t"],
        values=torch.tensor([1, 2, 3]),
        lengths=torch.tensor([1, 2]),
        weights=weights,
    )
    (sharded(batch).values() * torch.tensor([[1.0], [2.0]])).sum().backward()
    with pytest.raises(
        RunError, match=r"the gradient of row 3 .* nothing of this step was applied"
    ):
        optimizer.step()
    (rows,) = optimizer.rows.blocks
    assert not rows.weight_RD.any()


@spmd(world_size=1)
def test_a_batch_that_is_filled_anew_before_the_step_trains_the_rows_it_had(env: Env) -> None:
    for kernel in KERNELS:
        table = make_table("t", optim.SGD(lr=1.0), init=init.Constant(value=0.0), embedding_dim=4)
        model = nn.Sequential(se.EmbeddingBagCollection([table]))
        plan = se.plan_sharding(model, env, {"t": WHOLE}, kernel=kernel)
        sharded = se.shard_modules(model, plan, env, check_ids=False)
        optimizer = se.build_optimizer(sharded)
        ids, lengths = torch.tensor([1, 2, 3]), torch.tensor([1, 2])
        for first in (1, 11):  # two micro-batches in one buffer
            ids.copy_(torch.arange(first, first + 3))
            sharded(
                KeyedJaggedTensor(keys=["t"], values=ids, lengths=lengths)
            ).values().sum().backward()
        ids.fill_(10**6)
        lengths.fill_(0)
        optimizer.step()
        (rows,) = optimizer.rows.blocks
        moved = rows.weight_RD.any(1).nonzero().squeeze(1)
        assert moved.tolist() == [1, 2, 3, 11, 12, 13], kernel
