"""What a plan predicts of a step, against what its ranks then send, hold and look up."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torchrec import KeyedJaggedTensor

import shardemb as se
from shardemb import layouts
from shardemb.data.profile import DataProfile
from shardemb.env import Env
from shardemb.layouts import Layout
from shardemb.traffic import traffic_of
from shardemb.workload import Workload
from tests.spmd import spmd
from tests.traffic_cases import BATCH_SIZE, TABLES, Case, pooled_cases, profile_of, sequence_cases

NUM_STEPS = 4
"""DistributedDataParallel settles its buckets in the third step, so the fourth counts."""


class Sum(nn.Module):
    """A loss of all outputs, with one dense parameter."""

    def __init__(self, collection: nn.Module) -> None:
        super().__init__()
        self.collection = collection
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, batch: KeyedJaggedTensor) -> torch.Tensor:
        found: Any = self.collection(batch)
        outputs = found.to_dict() if hasattr(found, "to_dict") else found
        total = torch.zeros(())
        for output in outputs.values():
            rows = output if isinstance(output, torch.Tensor) else output.values()
            total = total + rows.square().sum()
        return self.scale * total


def check(case: Case, env: Env) -> None:
    """Trains some steps and counts the last."""
    if case.is_sequence:
        model = Sum(se.EmbeddingCollection(case.tables))
    else:
        model = Sum(se.EmbeddingBagCollection(case.tables, is_weighted=case.is_weighted))
    plan = se.plan_sharding(model, env, case.where, workload=case.workload)
    predicted = traffic_of(plan)
    sharded = se.shard_modules(model, plan, env)
    optimizer = se.build_optimizer(sharded, dense=lambda p: torch.optim.SGD(p, lr=0.1))
    looked_up: list[int] = []
    for lookup in sharded.module.collection._lookups:
        lookup.register_forward_pre_hook(lambda _, args: looked_up.append(args[0].values().numel()))
    batch = case.batch(env)
    for _ in range(NUM_STEPS):
        looked_up.clear()
        with se.CollectiveCounter() as counter:
            optimizer.zero_grad()
            sharded(batch).backward()
            optimizer.step()
    of_step = 2 * (env.world_size - 1) / env.world_size * (4 + 32)  # of scale; is all finite?
    same(case, "sent", counter.sent_bytes - of_step, predicted.sent_bytes_W[env.rank])
    same(case, "looked up", sum(looked_up), predicted.lookups_TW[:, env.rank].sum())
    if layouts.data_parallel() not in case.where.values():
        buffers = sum(count.buffer_bytes for count in counter.counts.values()) - (4 + 32)
        sizes = predicted.shared_bytes_W[env.rank] * env.world_size / (env.world_size - 1) * 2
        same(case, "held", buffers - sizes, predicted.activation_bytes_TW[:, env.rank].sum())


def same(case: Case, what: str, counted: float, predicted: float) -> None:
    """Equal to the byte: the rest is the rounding of a profile's shares."""
    assert abs(counted - predicted) < 1e-6, f"{case.name}: {what} {counted}, not {predicted}"


@spmd(world_size=2)
def test_two_ranks_send_hold_and_look_up_what_the_plan_predicts(env: Env) -> None:
    for case in (*pooled_cases(env), *sequence_cases(env)):
        check(case, env)


@spmd(world_size=4, num_nodes=2)
def test_four_ranks_of_two_nodes_send_hold_and_look_up_what_the_plan_predicts(env: Env) -> None:
    for case in (*pooled_cases(env), *sequence_cases(env)):
        check(case, env)


def test_a_table_costs_the_same_whatever_is_beside_it() -> None:
    env = Env(world_size=4, num_nodes=2)
    for case in (*pooled_cases(env), *sequence_cases(env)):
        if "frozen" in case.name:  # a trainable table makes others of its collection send zeros
            continue
        make = se.EmbeddingCollection if case.is_sequence else se.EmbeddingBagCollection
        together = traffic_of(se.plan_sharding(make(case.tables), env, case.where))
        for number, table in enumerate(case.tables):
            where = {table.name: case.where[table.name]}
            alone = traffic_of(se.plan_sharding(make([table]), env, where))
            assert np.array_equal(together.sent_bytes_TW[number], alone.sent_bytes_TW[0])
            assert together.sent_bytes_TW[number].sum() > 0
            assert np.array_equal(together.lookups_TW[number], alone.lookups_TW[0])


def skewed(block_rows: int) -> tuple[se.ShardingPlan, DataProfile]:
    ids = np.random.default_rng(0).geometric(0.1, 100 * BATCH_SIZE) % 40
    features = {"user": profile_of(ids, 40, block_rows=block_rows)}
    profile = DataProfile(source="drawn", features=features)
    model = se.EmbeddingBagCollection([TABLES[0]])
    workload = Workload(batch_size=BATCH_SIZE, profile=profile)
    env = Env(world_size=4)
    return se.plan_sharding(model, env, {"a": layouts.row_wise()}, workload=workload), profile


@pytest.mark.parametrize("block_rows", [1, 7, 40])
def test_lookups_follow_the_profile(block_rows: int) -> None:
    plan, profile = skewed(block_rows)
    user = profile.features["user"]
    shards = plan.tables[0].shards
    of_user = [100 * BATCH_SIZE * user.share(s.first_row, s.num_rows) for s in shards]
    of_item = BATCH_SIZE / len(shards)  # which has no profile: one id, anywhere
    expected = [4 * (count + of_item) for count in of_user]
    traffic = traffic_of(plan)
    assert traffic.lookups_TW[0] == pytest.approx(expected)
    assert traffic.skew_T[0] == pytest.approx(max(expected) / np.mean(expected))
    assert traffic.skew_T[0] > 1.2


def test_skew_counts_the_ranks_that_nobody_asks() -> None:
    features = {"user": profile_of(np.arange(8), 40)}  # all in the first of four shards
    workload = Workload(
        profile=DataProfile(source="low ids", features=features), ids_per_sample={"item": 0}
    )
    model = se.EmbeddingBagCollection(TABLES[:1])
    where: dict[str, Layout] = {"a": layouts.row_wise()}
    traffic = traffic_of(se.plan_sharding(model, Env(world_size=4), where, workload=workload))
    assert traffic.lookups_TW.tolist() == [[4 * 512, 0, 0, 0]]
    assert traffic.skew_T.tolist() == [4]


def test_even_layouts_and_tables_that_nobody_asks_have_no_skew() -> None:
    where: dict[str, Layout] = {
        "a": layouts.column_wise([1, 3]),
        "b": layouts.table_wise(0),
        "c": layouts.row_wise(),
    }
    workload = Workload(ids_per_sample={"user": 2.5, "item": 0, "clicked": 0})
    model = se.EmbeddingBagCollection(TABLES)
    traffic = traffic_of(se.plan_sharding(model, Env(world_size=4), where, workload=workload))
    assert traffic.skew_T.tolist() == [1, 1, 1]
    assert traffic.lookups_TW[0].tolist() == [0, 4 * 512 * 2.5, 0, 4 * 512 * 2.5]
    assert traffic.lookups_TW[1].tolist() == [0, 0, 0, 0]


def test_one_rank_sends_nothing() -> None:
    model = se.EmbeddingBagCollection(TABLES)
    where: dict[str, Layout] = dict.fromkeys("abc", layouts.row_wise())
    traffic = traffic_of(se.plan_sharding(model, Env(), where))
    assert traffic.sent_bytes_W.tolist() == [0]
    assert traffic.lookups_TW[:, 0].tolist() == [2 * 512, 2 * 512, 2 * 512]


def test_a_profile_of_more_rows_than_the_table_has_is_refused_when_planning_and_after() -> None:
    profile = DataProfile(source="old", features={"user": profile_of(np.array([3, 60]), 61)})
    model = se.EmbeddingBagCollection(TABLES[:1])
    workload = Workload(profile=profile)
    text = (
        "ids of feature 'user' that table 'a' does not have, of 40 rows; it was counted for 61: "
        "profile the data again with num_embeddings=40, or leave the feature out of the profile"
    )
    with pytest.raises(ValueError, match=text):
        se.plan_sharding(model, Env(), workload=workload)
    with pytest.raises(ValueError, match=text):
        traffic_of(replace(se.plan_sharding(model, Env()), workload=workload))
    fitting = profile_of(np.array([3, 39]), 40)
    more = {"user": fitting, "other": profile.features["user"]}  # of no table here
    se.plan_sharding(model, Env(), workload=Workload(profile=replace(profile, features=more)))
