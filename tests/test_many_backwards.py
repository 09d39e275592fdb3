"""Several lookups of a collection, or backward passes, before one step: each row moves once."""

from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import nn
from torchrec import KeyedJaggedTensor

import shardemb as se
from shardemb import layouts
from shardemb.env import Env
from tests.every_layout import Case, batch_of, check_rows, loss_of, on_both_kernels
from tests.reference import Reference
from tests.spmd import spmd
from tests.test_every_layout import every_layout, sequence_layouts
from tests.test_every_optimizer import case_of

Way = Literal["two lookups", "two lookups, two backwards", "one lookup, two backwards"]
WAYS: tuple[Way, ...] = ("two lookups", "two lookups, two backwards", "one lookup, two backwards")
NUM_SAMPLES = ([4, 3], [2, 5])
"""Of both ranks in the first lookup, and in the second."""


class Lookups(nn.Module):
    """Looks batches up, one after the other."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.collection, self.is_sequence = case.collection("meta"), case.sequence

    def forward(self, batches: list[KeyedJaggedTensor]) -> list[dict[str, torch.Tensor]]:
        found: list[Any] = [self.collection(batch) for batch in batches]
        if self.is_sequence:
            return [{name: rows.values() for name, rows in out.items()} for out in found]
        return [out.to_dict() for out in found]


def losses_of(
    values: list[dict[str, torch.Tensor]], batches: list[KeyedJaggedTensor], way: Way
) -> list[torch.Tensor]:
    """Two losses that weigh outputs differently, of two lookups or of one."""
    if way == "one lookup, two backwards":
        names = sorted(values[0])
        parts = [{name: values[0][name] for name in of} for of in (names, names[::3])]
        return [loss_of(part, batches[0].stride(), linear=True) for part in parts]
    return [
        loss_of(out, batch.stride(), linear=True) * (1 + number)
        for number, (out, batch) in enumerate(zip(values, batches, strict=True))
    ]


def batches_of(case: Case, step: int, rank: int, way: Way) -> list[KeyedJaggedTensor]:
    sizes = NUM_SAMPLES[:1] if way == "one lookup, two backwards" else NUM_SAMPLES
    return [
        batch_of(replace(case, num_samples=of), 10 * step + number, rank)
        for number, of in enumerate(sizes)
    ]


def check(env: Env, case: Case, way: Way) -> None:
    before = {
        name.split(".")[1]: weight.detach().clone()
        for name, weight in case.collection("cpu").named_parameters()
    }
    reference = Reference(case.tables, before)
    forward = reference.forward_sequences if case.sequence else reference.forward
    model = Lookups(case)
    plan = se.plan_sharding(model, env, case.where, kernel=case.kernel)
    sharded = se.shard_modules(model, plan, env)
    optimizer = se.build_optimizer(sharded)
    for step in range(case.num_steps):
        optimizer.zero_grad()
        mine = batches_of(case, step, env.rank, way)
        losses = losses_of(sharded(mine), mine, way)
        if way == "two lookups":
            torch.stack(losses).sum().backward()
        else:
            losses[0].backward(retain_graph=True)
            losses[1].backward()
        optimizer.step()
        for rank in range(env.world_size):
            batches = batches_of(case, step, rank, way)
            expected = losses_of([forward(batch) for batch in batches], batches, way)
            (torch.stack(expected).sum() / env.world_size).backward()
        reference.step()
    state = sharded.state_dict()
    check_rows(case, reference, before, state, optimizer.state_dict()["state"])


@spmd(world_size=2)
def test_lookups_and_backwards_before_a_step_are_merged_for_every_optimizer(env: Env) -> None:
    for number, way in enumerate(WAYS):
        pooled = [case_of(layout, sequence=False) for layout in every_layout(env)]
        sequences = [case_of(layout, sequence=True) for layout in sequence_layouts(env)]
        for case in on_both_kernels(pooled + sequences, first=number):
            check(env, case, way)


class Scored(Lookups):
    """The same and a dense layer: a score of all outputs."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.head = nn.Linear(16, 1)

    def forward(self, batches: list[KeyedJaggedTensor]) -> Any:
        (values,) = super().forward(batches)
        return [self.head(values[name]).mean() for name in sorted(values)[:2]]


@spmd(world_size=2)
def test_backwards_whose_dense_gradients_would_not_be_averaged_are_refused(env: Env) -> None:
    model = Scored(case_of(layouts.row_wise(), sequence=False))
    one = replace(case_of(layouts.row_wise(), sequence=False), num_samples=[3, 2])
    sharded = se.shard_modules(model, se.plan_sharding(model, env, one.where), env)
    se.build_optimizer(sharded, dense=lambda p: torch.optim.SGD(p, lr=0.1)).zero_grad()
    batch = batch_of(one, 0, env.rank)
    text = "in a second backward pass after one forward of the model, or in a forward of a part of"
    for _ in range(3):  # DistributedDataParallel learns its graph in the first
        first, second = sharded([batch])
        (first + second).backward(retain_graph=True)
        with pytest.raises(ValueError, match=text):
            (first + second).backward()
    with pytest.raises(ValueError, match=text):
        model.head(torch.ones(2, 16)).sum().backward()
    for _ in range(2):
        torch.stack(sharded([batch])).sum().backward()
