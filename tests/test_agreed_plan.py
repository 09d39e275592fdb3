"""A plan of the ranks of a run: one for all of them, or an error on all of them, at once."""

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from torch import nn

import shardemb as se
from shardemb import layouts, optim
from shardemb.data.profile import DataProfile
from shardemb.env import Env
from shardemb.errors import OtherRankError, RunError
from tests.spmd import run_ranks, spmd
from tests.traffic_cases import profile_of


def collection(*names: str, num_embeddings: int = 1000) -> Any:
    return se.EmbeddingBagCollection(
        [
            se.TableConfig(
                name=name,
                num_embeddings=num_embeddings,
                embedding_dim=64,
                feature_names=(name,),
                optimizer=optim.SGD(lr=0.1),
            )
            for name in names
        ]
    )


@spmd(world_size=3)
def test_all_ranks_have_one_plan_or_one_error(env: Env) -> None:
    plan = se.plan_sharding(collection("a", "b", "c"), env)
    plans = [""] * env.world_size
    dist.all_gather_object(plans, plan.to_json())
    assert len(set(plans)) == 1

    too_large = collection("a", num_embeddings=2**31 - 1 if env.rank == 1 else 1000)
    kind, text = (
        (RunError, r"table 'a' as .* needs")
        if env.rank == 1
        else (
            OtherRankError,
            r"rank 1 failed while planning: RunError: table 'a' as .* needs",
        )
    )
    alone = {"a": layouts.table_wise(rank=0)}
    with pytest.raises(kind, match=text):
        se.plan_sharding(too_large, env, alone)

    wrong = {"z": layouts.row_wise()} if env.rank == 2 else None
    with pytest.raises(ValueError if env.rank == 2 else OtherRankError, match="name table 'z'"):
        se.plan_sharding(collection("a"), env, wrong)

    for wish in (5, 0, "a", ["a"], {1: layouts.row_wise()}):
        given: Any = wish if env.rank == 1 else {}
        of_kind = ValueError if env.rank == 1 else OtherRankError
        with pytest.raises(of_kind, match="layouts must be given by table name"):
            se.plan_sharding(collection("a"), env, given)

    mine = collection("a", "extra") if env.rank == 2 else collection("a")
    with pytest.raises(
        RunError, match="rank 2 planned otherwise than rank 0, in table 'extra'; de"
    ):
        se.plan_sharding(mine, env, {"a": layouts.table_wise(rank=0)})
    named = {"b": layouts.table_wise(rank=1 if env.rank == 1 else 0)}
    with pytest.raises(RunError, match=r"rank 1 planned otherwise than rank 0, in .*table 'b'"):
        se.plan_sharding(collection("a", "b"), env, named)

    def of_workload(**fields: Any) -> None:
        alone = {"a": layouts.table_wise(rank=0)}
        se.plan_sharding(collection("a"), env, alone, workload=se.Workload(**fields))

    of_workload(batch_size=64, ids_per_sample={"a": 2.0})
    with pytest.raises(RunError, match=r"rank 2 planned .* in batch_size of the workload; decl"):
        of_workload(batch_size=64 if env.rank == 2 else 32)
    with pytest.raises(RunError, match="in ids_per_sample of the workload; declare"):
        of_workload(ids_per_sample={"a": 2.0} if env.rank == 1 else {})
    features = {"a": profile_of(np.arange(10), 1000)}
    profile = DataProfile(source="ten ids", features=features)
    of_workload(profile=profile)
    with pytest.raises(RunError, match="in profile of the workload; declare"):
        of_workload(profile=None if env.rank == 1 else profile)
    names = ("a", "b") if env.rank == 0 else ("b", "a")
    named = {name: layouts.table_wise(rank=0) for name in names}
    text = "rank 1 planned otherwise than rank 0, in the order of its tables; declare the same tab"
    with pytest.raises(RunError, match=text):
        se.plan_sharding(collection(*names), env, named)

    elsewhere = Env(rank=env.rank, world_size=env.world_size)
    here = se.plan_sharding(collection("a"), elsewhere, {"a": layouts.table_wise(rank=env.rank)})
    assert here.tables[0].shards[0].rank == env.rank  # by hand: nobody is asked
    if env.rank == 0:
        se.plan_sharding(collection("a"), elsewhere)
    dist.barrier()


class Deadly(nn.Module):
    """Ends the process of rank 1 when the planner looks into it."""

    def __init__(self, env: Env) -> None:
        super().__init__()
        self.env = env
        self.tables = collection("a")

    def named_modules(self, *given: Any, **options: Any) -> Any:
        if self.env.rank == 1:
            os._exit(3)
        return super().named_modules(*given, **options)


def die_while_planning(env: Env) -> None:
    with pytest.raises(RunError, match="another rank is gone, while planning"):
        se.plan_sharding(Deadly(env), env)


@pytest.mark.distributed
def test_a_rank_that_dies_while_planning_ends_the_others_at_once() -> None:
    with pytest.raises(AssertionError) as caught:
        run_ranks(die_while_planning, (2, 1), {})
    assert str(caught.value) == "rank 1: the process died"


def test_processes_that_hash_otherwise_make_the_same_plan() -> None:
    code = (
        "import shardemb as se, hashlib\n"
        "from tests.test_agreed_plan import collection\n"
        "c = se.Constraints(ranks={'b': [3, 1]}, colocate=[['a', 'd']], replicate=['e'])\n"
        "p = se.plan_sharding(collection(*'abcdefgh'), se.Cluster.preset('l4'), constraints=c)\n"
        "print(hashlib.sha256(p.to_json().encode()).hexdigest())"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(said) == 1
    assert len(said.pop()) == 65
