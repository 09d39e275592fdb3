"""Several batches of the loader in one step: the same as one batch of all their samples."""

# B samples of a batch, D width

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torchrec import KeyedJaggedTensor

import shardemb as se
from shardemb import layouts, optim
from shardemb.env import Env
from shardemb.errors import OtherRankError, RunError
from shardemb.layouts import Layout
from tests.every_layout import Case, check_rows, on_both_kernels
from tests.reference import Reference
from tests.spmd import run_ranks, spmd
from tests.test_every_optimizer import case_of, make_tables

WIDTH = 16
SIZES = {2: ((4, 1, 2), (3, 5, 2))}
"""Samples of each micro-batch, by rank."""
SHORT_STEP = 2
"""Micro-batches of the last step, after which the loaders end."""


class Scored(nn.Module):
    """One score for each row that is looked up, by a dense layer; the loss is their mean."""

    def __init__(self, case: Case, device: str) -> None:
        super().__init__()
        self.collection, self.is_sequence = case.collection(device), case.sequence
        self.head = nn.Linear(WIDTH, 1)
        with torch.no_grad():
            self.head.weight.copy_(torch.linspace(0.5, 2.0, WIDTH))
            self.head.bias.fill_(0.1)

    def forward(self, batch: KeyedJaggedTensor) -> torch.Tensor:
        out: Any = self.collection(batch)
        if self.is_sequence:
            return score({name: rows.values() for name, rows in out.items()}, batch, self.head)
        return score(out.to_dict(), batch, self.head)


def score(
    values: Mapping[str, torch.Tensor], batch: KeyedJaggedTensor, head: nn.Module
) -> torch.Tensor:
    scores = [
        head(values[name]).sum() * (position % 3 + 1)
        for position, name in enumerate(sorted(values))
    ]
    mean: torch.Tensor = torch.stack(scores).sum() / batch.stride()
    return mean


def samples_of(case: Case, step: int, count: int) -> list[dict[str, list[int]]]:
    """Samples of 0 to 4 ids a feature, half of them from a few, so that ids repeat."""
    generator = torch.Generator().manual_seed(step)
    samples: list[dict[str, list[int]]] = []
    for _ in range(count):
        sample = {}
        for table in case.tables:
            for feature in table.feature_names:
                length = int(torch.randint(0, 5, (1,), generator=generator))
                ids = torch.randint(
                    0, table.num_embeddings * 2 // 3, (length,), generator=generator
                )
                sample[feature] = [int(i) if k % 2 else int(i) % 25 for k, i in enumerate(ids)]
        samples.append(sample)
    return samples


def batch_of(case: Case, samples: list[dict[str, list[int]]]) -> KeyedJaggedTensor:
    features = {feature: [sample[feature] for sample in samples] for feature in samples[0]}
    return se.keyed_jagged_tensor(features, case.tables)


def steps_of(case: Case, sizes: tuple[tuple[int, ...], ...]) -> Iterator[Any]:
    """The samples of each step, and the same by rank and micro-batch."""
    for step in range(case.num_steps):
        of_ranks = [of[: SHORT_STEP if step == case.num_steps - 1 else None] for of in sizes]
        samples = samples_of(case, step, sum(map(sum, of_ranks)))
        left = iter(samples)
        parts = [[[next(left) for _ in range(size)] for size in of] for of in of_ranks]
        yield samples, parts


def check(env: Env, case: Case, *, max_norm: float | None = None) -> None:
    """Steps of micro-batches, against unsharded float64 steps of all their samples at once."""
    sizes = SIZES[env.world_size]
    steps = list(steps_of(case, sizes))
    plain = Scored(case, "cpu").double()
    before = {
        name.split(".")[2]: weight.detach().float()
        for name, weight in plain.named_parameters()
        if name.startswith("collection")
    }
    reference = Reference(case.tables, before)
    dense = torch.optim.SGD(plain.head.parameters(), lr=0.02, momentum=0.9)
    expected = []
    for samples, _ in steps:
        batch = batch_of(case, samples)
        dense.zero_grad()
        values = (reference.forward_sequences if case.sequence else reference.forward)(batch)
        loss = score(values, batch, plain.head)
        loss.backward()
        reference.step(max_norm=max_norm, dense=plain.head.parameters())
        dense.step()
        expected.append(float(loss.detach()))

    model = Scored(case, "meta")
    plan = se.plan_sharding(model, env, case.where, kernel=case.kernel)
    sharded = se.shard_modules(model, plan, env)
    optimizer = se.build_optimizer(
        sharded, dense=lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9), max_norm=max_norm
    )
    pipeline = se.TrainPipeline(sharded, optimizer, env, num_micro_batches=len(sizes[0]))
    mine = [batch_of(case, part) for _, parts in steps for part in parts[env.rank]]
    losses = [float(loss) for _, loss in pipeline.run(mine, 99)]
    if max_norm is not None:
        assert optimizer.grad_norm is not None
        assert optimizer.grad_norm > 2 * max_norm
    np.testing.assert_allclose(losses, expected, rtol=1e-5, err_msg=str(case.where))
    for weight, other in zip(model.head.parameters(), plain.head.parameters(), strict=True):
        case.assert_close(weight, other.detach(), "head")
    state = sharded.state_dict()
    check_rows(case, reference, before, state, optimizer.state_dict()["state"])


@spmd(world_size=2)
def test_micro_batches_equal_one_batch_of_all_samples_for_every_optimizer(env: Env) -> None:
    kinds: list[Layout] = [
        layouts.row_wise(),
        layouts.table_wise(rank=1),
        layouts.column_wise(ranks=[1, 0]),
        layouts.data_parallel(),
    ]
    for number, layout in enumerate(kinds):
        pooled, sequence = (case_of(layout, sequence=of_ids) for of_ids in (False, True))
        for case in on_both_kernels((pooled, sequence), first=number):
            check(env, case)
        for case in on_both_kernels([pooled], first=number):
            check(env, case, max_norm=0.7)


def losses_of_four_parts(env: Env, folder: str) -> None:
    """The losses of 1 rank x 4 micro-batches, 2 x 2 or 4 x 1, written by rank 0."""
    tables = [replace(table, optimizer=optim.AdamW(lr=0.05)) for table in make_tables()[:4]]
    where: list[Layout] = [
        layouts.row_wise(),
        layouts.data_parallel(),
        layouts.table_wise(rank=0),
    ]
    one = Case(
        tables=tables,
        where={table.name: where[number % 3] for number, table in enumerate(tables)},
        num_samples=[],
    )
    model = Scored(one, "meta")
    sharded = se.shard_modules(model, se.plan_sharding(model, env, one.where), env)
    optimizer = se.build_optimizer(
        sharded, dense=lambda p: torch.optim.SGD(p, lr=0.02), max_norm=1.0
    )
    count = 4 // env.world_size
    mine = [
        batch_of(one, samples[2 * part : 2 * part + 2])
        for samples in (samples_of(one, step, 8) for step in range(6))
        for part in range(env.rank * count, env.rank * count + count)
    ]
    pipeline = se.TrainPipeline(sharded, optimizer, env, num_micro_batches=count)
    losses = [float(loss) for _, loss in pipeline.run(mine, 6)]
    if env.is_main:
        Path(folder, f"{env.world_size}.json").write_text(json.dumps(losses))


@pytest.mark.distributed
def test_ranks_and_micro_batches_are_exchangeable(tmp_path: Path) -> None:
    curves = []
    for world_size in (1, 2, 4):
        run_ranks(losses_of_four_parts, (world_size, 1), {"folder": str(tmp_path)})
        curves.append(json.loads((tmp_path / f"{world_size}.json").read_text()))
    assert len(set(curves[0])) == 6
    np.testing.assert_allclose(curves[1], curves[0], rtol=2e-6)
    np.testing.assert_allclose(curves[2], curves[0], rtol=2e-6)


class Scaled(nn.Module):
    """Rows of two layouts and a dense layer, whose loss is scaled by a column of the batch."""

    def __init__(self) -> None:
        super().__init__()
        adam = optim.Adam(lr=0.1)
        self.tables = [
            se.TableConfig(
                name=name,
                num_embeddings=10,
                embedding_dim=4,
                feature_names=(name,),
                optimizer=adam if name == "a" else optim.SGD(lr=0.1),
            )
            for name in "abc"
        ]
        self.collection = se.EmbeddingBagCollection(self.tables)
        self.head = nn.Linear(4, 1)

    def forward(self, batch: dict[str, Any]) -> torch.Tensor:
        pooled = self.collection(batch["ids"])
        out_BD = pooled["a"] + pooled["b"] + pooled["c"]
        loss: torch.Tensor = (self.head(out_BD).squeeze(1) * batch["scale_B"]).mean()
        return loss

    def batch(self, scale: float = 1.0) -> dict[str, Any]:
        ids = se.keyed_jagged_tensor({name: [[1, 7]] for name in "abc"}, self.tables)
        return {"ids": ids, "scale_B": torch.tensor([scale])}


def scaled(
    env: Env, num_micro_batches: int
) -> tuple[Scaled, se.TrainPipeline, dict[str, torch.Tensor]]:
    """The model, its pipeline, and all that a step changes."""
    model = Scaled()
    where: dict[str, Layout] = {
        "a": layouts.row_wise(),
        "b": layouts.table_wise(rank=0),
        "c": layouts.data_parallel(),
    }
    sharded = se.shard_modules(model, se.plan_sharding(model, env, where), env)
    optimizer = se.build_optimizer(sharded, dense=lambda p: torch.optim.AdamW(p, lr=0.1))
    pipeline = se.TrainPipeline(sharded, optimizer, env, num_micro_batches=num_micro_batches)
    changed = {f"weight {rows.table}": rows.weight_RD for rows in optimizer.rows.blocks}
    for rows in optimizer.rows.blocks:
        changed |= {f"{name} {rows.table}": value for name, value in rows.state.items()}
    return model, pipeline, changed | dict(model.head.named_parameters())


@spmd(world_size=2)
def test_a_loss_that_is_not_finite_ends_the_run_before_its_update_on_all_ranks(env: Env) -> None:
    inf, nan = float("inf"), float("nan")
    way = "; lower the learning rates, or look for values in the data that are not finite. No row"
    for scales, num_micro_batches, text in (
        (([inf], [1.0]), 1, "the loss of step 3 is -?inf on rank 0"),
        (([1.0, 1.0], [1.0, nan]), 2, "the loss of micro-batch 2 of step 3 is nan on rank 1"),
        (([-inf, 1.0], [1.0, inf]), 2, "the loss of step 3 is not finite on all ranks"),
    ):
        model, pipeline, changed = scaled(env, num_micro_batches)
        start = {name: value.detach().clone() for name, value in changed.items()}
        good = [model.batch() for _ in range(2 * num_micro_batches)]
        bad = [model.batch(scale) for scale in scales[env.rank]]
        steps = pipeline.run([*good, *bad, *good], 9)
        assert [next(steps)[0], next(steps)[0]] == [1, 2]
        before = {name: value.detach().clone() for name, value in changed.items()}
        assert not any(torch.equal(start[name], before[name]) for name in before)
        with pytest.raises(RunError, match=f"^{text}{way}"):
            next(steps)
        for name, value in changed.items():
            assert torch.equal(value, before[name]), name
        assert [step for step, _ in pipeline.run(good, 2)] == [1, 2]
        assert not any(torch.equal(changed[name], before[name]) for name in before)


@spmd(world_size=2)
def test_a_loader_that_fails_or_ends_within_a_step_ends_the_run_on_all_ranks(env: Env) -> None:
    def loader() -> Iterator[Any]:
        for _ in range(3):
            yield model.batch()
        if env.rank == 1:
            raise OSError("the disk is gone")
        yield model.batch()

    model, pipeline, _ = scaled(env, 2)
    steps = pipeline.run(loader(), 9)
    assert next(steps)[0] == 1
    text = "the disk is gone"
    if env.rank == 0:
        text = "^rank 1 failed while reading the batches of step 2: OSError: the disk is gone$"
    with pytest.raises(OSError if env.rank == 1 else OtherRankError, match=text):
        next(steps)
    steps = pipeline.run([model.batch()] * (3 + env.rank), 9)
    assert next(steps)[0] == 1
    ends = "goes on" if env.rank else "ended"
    with pytest.raises(
        RunError,
        match="loaders of 1 of 2 ranks ended before micro-batch 2 of step 2, that of rank "
        f"{env.rank} {ends}; give every",
    ):
        next(steps)
    assert [step for step, _ in pipeline.run([model.batch()] * 3, 9)] == [1, 2]
    assert len(list(pipeline.evaluate([model.batch()] * 3))) == 3


@spmd(world_size=2)
def test_numbers_of_micro_batches_that_differ_or_are_none_are_refused(env: Env) -> None:
    model, pipeline, _ = scaled(env, 1 + env.rank)
    with pytest.raises(RunError, match=r"ranks differ in num_micro_batches: \[1, 2\]; give all"):
        list(pipeline.run([model.batch()] * 4, 9))
    with pytest.raises(ValueError, match="num_micro_batches must be at least 1, got 0"):
        scaled(env, 0)


@spmd(world_size=2)
def test_gradients_that_every_rank_has_are_exchanged_once_a_step(env: Env) -> None:
    sent = []
    for num_micro_batches in (1, 3):
        model, pipeline, _ = scaled(env, num_micro_batches)
        steps = pipeline.run([model.batch()] * (4 * num_micro_batches), 4)
        for _ in range(3):  # in which DistributedDataParallel settles
            next(steps)
        with se.CollectiveCounter() as counter:
            next(steps)
        sent.append([of for (kind, _), of in counter.counts.items() if kind == "all_reduce"])
    assert sent[0] == sent[1]
    assert sent[0][0].num_calls > 2
