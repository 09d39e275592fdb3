"""What is not finite stops a step on all ranks, by name, before anything of it is written."""

# B batch of a rank, N ids

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torchrec import KeyedJaggedTensor

import shardemb as se
from shardemb import init, layouts, optim
from shardemb.collectives import CollectiveCounter
from shardemb.env import Env
from shardemb.errors import RunError
from shardemb.kernel_choice import KernelChoice
from shardemb.layouts import Layout
from shardemb.optim import SparseOptimizer
from tests.plans import KERNELS
from tests.spmd import spmd
from tests.test_every_layout import every_layout, sequence_layouts

WIDTH, ROWS = 16, 64
NAN, INF = float("nan"), float("inf")


def make_table(name: str, optimizer: SparseOptimizer, **changed: Any) -> se.TableConfig:
    return se.TableConfig(
        name=name,
        num_embeddings=ROWS,
        embedding_dim=WIDTH,
        feature_names=(f"{name}_id", f"{name}_more"),
        optimizer=optimizer,
        init=init.Constant(value=1.0),
        **changed,
    )


class Model(nn.Module):
    """Weighs the outputs of each sample, or of each id of a sequence, and adds up."""

    def __init__(self, collection: nn.Module, *, sequence: bool) -> None:
        super().__init__()
        self.collection, self.sequence = collection, sequence
        self.linear = nn.Linear(WIDTH, 1, bias=False)
        with torch.no_grad():
            self.linear.weight.fill_(1.0)

    def forward(self, batch: KeyedJaggedTensor, weights: Mapping[str, torch.Tensor]) -> Any:
        out = self.collection(batch)
        loss = torch.zeros(())
        for name, weight in weights.items():
            rows = out[name].values() if self.sequence else out[name]
            loss = loss + (self.linear(rows).squeeze(1) * weight).sum()
        return loss / batch.stride()


class Run:
    """A sharded model that takes steps, in which samples may have weights that are not finite.

    Args:
        env: This process.
        where: Layouts of the tables, in their order.
        tables: The tables.
        sequence: Whether they are looked up as sequences.
        max_norm: Of the optimizer.
        kernel: What looks rows up and updates them.
    """

    def __init__(
        self,
        env: Env,
        where: Sequence[Layout],
        tables: Sequence[se.TableConfig],
        *,
        sequence: bool = False,
        max_norm: float | None = None,
        kernel: KernelChoice = "auto",
    ) -> None:
        kind = se.EmbeddingCollection if sequence else se.EmbeddingBagCollection
        model = Model(kind(tables), sequence=sequence)
        names = [table.name for table in tables]
        lie = dict(zip(names, where, strict=True))
        plan = se.plan_sharding(model, env, lie, kernel=kernel)
        self.model = se.shard_modules(model, plan, env)
        self.optimizer = se.build_optimizer(
            self.model, dense=lambda p: torch.optim.SGD(p, lr=0.01), max_norm=max_norm
        )
        self.env, self.tables, self.sequence = env, tables, sequence

    def backward(self, *, bad: Mapping[tuple[str, int, int], float] | None = None) -> None:
        """A backward pass; sample 1 of rank 2 looks up rows 2 * 8 + 1 * 2 = 18 and 19.

        Args:
            bad: The weights of some outputs: by feature, rank, and sample (or id of a sequence).
        """
        rank, size = self.env.rank, 2 + self.env.rank % 2
        features = [name for table in self.tables for name in table.feature_names]
        ids = torch.arange(rank * 8, rank * 8 + 2 * size).repeat(len(features))
        batch = KeyedJaggedTensor(
            keys=features, values=ids, lengths=torch.full((len(features) * size,), 2)
        )
        weights = {name: torch.ones(size * (1 + self.sequence)) for name in features}
        for (name, of_rank, sample), weight in (bad or {}).items():
            if of_rank == rank:
                weights[name][sample] = weight
        self.optimizer.zero_grad()
        self.model(batch, weights).backward()

    def state(self) -> list[torch.Tensor]:
        """All that a step changes on this rank, copied."""
        rows = [(block.weight_RD, *block.state.values()) for block in self.optimizer.rows.blocks]
        steps = torch.tensor([group["step"] for _, group in self.optimizer.rows.named_groups])
        dense = [p.detach() for p in self.optimizer.dense_parameters.values()]
        return [one.clone() for one in (*(one for of in rows for one in of), *dense, steps)]

    def refused(self, message: str) -> None:
        """Steps, which is to fail on all ranks alike and to leave all as it was."""
        before = self.state()
        with pytest.raises(RunError, match=message) as raised:
            self.optimizer.step()
        texts: list[str] = [""] * self.env.world_size
        dist.all_gather_object(texts, str(raised.value))
        assert len(set(texts)) == 1
        for now, then in zip(self.state(), before, strict=True):
            torch.testing.assert_close(now, then, rtol=0, atol=0, equal_nan=True)

    def goes_on(self) -> None:
        """Steps once, which changes what it should."""
        before = self.state()
        self.backward()
        self.optimizer.step()
        changed = [not torch.equal(now, b) for now, b in zip(self.state(), before, strict=True)]
        assert changed[-2:] == [True, True]  # dense parameters, counts of steps
        assert self.env.rank > 0 or any(changed[:-2])


OPTIMIZERS = (optim.Adagrad(lr=0.1), optim.RowWiseAdagrad(lr=0.1), optim.Adam(lr=0.1))


def check_samples(env: Env) -> None:
    """One bad gradient, of the last rank but one, in a table of each layout."""
    rank = env.world_size - 2
    for kernel, sequence in itertools.product(KERNELS, (False, True)):
        where = sequence_layouts(env) if sequence else every_layout(env)
        tables = [
            make_table(f"t{number}", OPTIMIZERS[number % 3]) for number, _ in enumerate(where)
        ]
        run = Run(env, where, tables, sequence=sequence, kernel=kernel)
        run.goes_on()
        for table, layout in zip(tables, where, strict=True):
            run.backward(bad={(f"{table.name}_more", rank, 1): NAN})
            row = rank * 8 + (1 if sequence else 2)
            sample = 0 if sequence else 1
            replicated = layout == layouts.data_parallel()
            on = "every rank" if replicated else r"rank \d"
            who = f", looked up by sample {sample} of rank {rank}"
            if sequence and replicated:
                who = ""
            run.refused(
                rf"step 2: the gradient of row {row} of table '{table.name}' is nan, on {on}{who}; "
                "nothing of this step was applied; lower the learning rates, clip by max_norm, or "
                "look for such values in the data$"
            )
        run.goes_on()


@spmd(world_size=2)
def test_a_gradient_of_one_sample_of_one_rank_stops_both_and_is_named(env: Env) -> None:
    check_samples(env)


@spmd(world_size=4, num_nodes=2)
def test_a_gradient_of_one_sample_of_one_rank_stops_two_nodes_and_is_named(env: Env) -> None:
    check_samples(env)


LAYOUTS: Sequence[Layout] = (
    layouts.row_wise(),
    layouts.table_wise(rank=1),
    layouts.column_wise(ranks=[1, 0]),
    layouts.data_parallel(),
)


@spmd(world_size=2)
def test_clipping_finds_what_is_not_finite_by_the_norm(env: Env) -> None:
    tables = [make_table(f"t{number}", OPTIMIZERS[number % 3]) for number in range(4)]
    for kernel in KERNELS:
        run = Run(env, LAYOUTS, tables, max_norm=0.1, kernel=kernel)
        run.goes_on()
        for table in tables:
            for bad in (NAN, -INF):
                run.backward(bad={(f"{table.name}_id", 1, 1): bad})
                run.refused(f"step 2: the gradient of row 10 of table '{table.name}' is {bad}, on ")
        run.backward(bad={("t0_id", 0, 0): 1e30})  # a square of which float32 has none
        run.optimizer.step()
        assert torch.isfinite(torch.cat([one.flatten().float() for one in run.state()])).all()


@spmd(world_size=2)
def test_a_setting_that_is_not_finite_on_one_rank_stops_both(env: Env) -> None:
    tables = [make_table(f"t{number}", OPTIMIZERS[number % 3]) for number in range(4)]
    run = Run(env, LAYOUTS, tables)
    run.goes_on()
    for number, group in enumerate(run.optimizer.param_groups):
        lr = group["lr"]
        if env.rank == 1:
            group["lr"] = NAN
        run.backward()
        where = f"table 't{number}'" if number < 4 else "the dense parameters"
        run.refused(f"step 2: lr of {where} is nan; nothing")
        group["lr"] = lr
    run.goes_on()


@spmd(world_size=2)
def test_a_row_that_was_loaded_infinite_stops_the_step_that_looks_it_up(env: Env) -> None:
    optimizers: tuple[SparseOptimizer, ...] = (optim.SGD(lr=0.1), *OPTIMIZERS)
    for kernel, optimizer in itertools.product(KERNELS, optimizers):
        tables = [make_table(f"t{number}", optimizer) for number in range(4)]
        run = Run(env, LAYOUTS, tables, kernel=kernel)
        run.goes_on()
        for table in tables:
            for row, value in ((9, -INF), (9, NAN), (40, NAN)):  # the last is not looked up
                blocks = [b for b in run.optimizer.rows.blocks if b.table == table.name]
                kept = [block.weight_RD.clone() for block in blocks]
                for block in blocks:
                    local = row - block.first_row
                    if block.first_column == 0 and 0 <= local < len(block.weight_RD):
                        block.weight_RD[local, 1] = value
                run.backward()
                if row == 9:
                    run.refused(
                        f"row 9 of table '{table.name}' is {value}, on .*by sample 0 of rank 1;"
                    )
                else:
                    run.optimizer.step()
                for block, rows_RD in zip(blocks, kept, strict=True):
                    block.weight_RD.copy_(rows_RD)


@spmd(world_size=2)
def test_16_bit_rows_that_overflow_stop_the_step(env: Env) -> None:
    for kernel, rounding in itertools.product(KERNELS, ("nearest", "stochastic")):
        tables = [
            make_table(f"t{number}", optim.SGD(lr=1.0), dtype="float16", rounding=rounding)
            for number in range(3)
        ]
        run = Run(env, LAYOUTS[:3], tables, kernel=kernel)
        run.goes_on()
        for table in tables:
            run.backward(bad={(f"{table.name}_id", 1, 2): 1e6})
            run.refused(
                f"row 12 of table '{table.name}' becomes -inf, on rank .*sample 2 of rank 1;"
            )
        run.goes_on()


@spmd(world_size=2)
def test_what_only_the_update_makes_infinite_stops_the_step(env: Env) -> None:
    cases: list[tuple[SparseOptimizer, float, float, str]] = [
        (optim.Adagrad(lr=0.1), 0.1, 1e25, "momentum1 of row 8 of table 't{}' becomes inf"),
        (optim.Adam(lr=0.1), 0.1, 1e25, "exp_avg_sq of row 8 of table 't{}' becomes inf"),
        (optim.SGD(lr=0.1), 1e30, 1e10, "row 8 of table 't{}' becomes -inf"),
    ]
    for kernel, (optimizer, lr, weight, message) in itertools.product(KERNELS, cases):
        tables = [make_table(f"t{number}", optimizer) for number in range(4)]
        run = Run(env, LAYOUTS, tables, kernel=kernel)
        for number in range(4):
            group = run.optimizer.param_groups[number]
            group["lr"] = lr
            run.backward(bad={(f"t{number}_id", 1, 0): weight})
            run.refused(message.format(number))
            group["lr"] = optimizer.lr
        run.goes_on()


@spmd(world_size=2)
def test_a_dense_gradient_or_parameter_that_is_not_finite_is_named(env: Env) -> None:
    run = Run(env, LAYOUTS[:1], [make_table("t0", optim.SGD(lr=0.1))])
    run.backward()
    (parameter,) = run.optimizer.dense_parameters.values()
    assert parameter.grad is not None
    parameter.grad[0, 3] = NAN
    run.refused("step 1: the gradient of 'linear.weight' is nan; nothing of this step was applied;")
    run.backward()
    run.optimizer.param_groups[-1]["lr"] = 3e38
    with pytest.raises(
        RunError, match=r"step 1: parameter 'linear\.weight' is -inf; do not save the model;"
    ):
        run.optimizer.step()


@spmd(world_size=2)
def test_the_check_is_one_small_collective(env: Env) -> None:
    tables = [make_table("t0", optim.Adam(lr=0.1))]
    for kernel in KERNELS:
        counted = []
        for max_norm in (None, 1.0):
            run = Run(env, LAYOUTS[:1], tables, max_norm=max_norm, kernel=kernel)
            run.backward()
            with CollectiveCounter() as counter:
                run.optimizer.step()
            ((kind, count),) = counter.counts.items()
            assert kind == ("all_reduce", 2)
            counted.append((count.num_calls, count.buffer_bytes))
        assert counted == [(1, 32), (2, 40)]
