"""A DLRM in plain torch, changed in one line, trains as before on 1, 2 and 4 ranks."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import shardemb as se
from shardemb import layouts, optim
from shardemb.env import Env
from shardemb.layouts import Layout
from shardemb.optim import SparseOptimizer
from tests.classic_dlrm import ClassicDLRM, clicks_of
from tests.converted import torch_optimizer, weights_of
from tests.spmd import spmd

NUM_STEPS, NUM_SAMPLES, NUM_DENSE = 20, 12, 5
ROWS = [101, 37, 64, 53, 8]
clicks = partial(clicks_of, rows_of_tables=ROWS, num_dense=NUM_DENSE)


def torch_model(env: Env) -> ClassicDLRM:
    """With weights of a checkpoint of the torch model, equal on all ranks."""
    torch.manual_seed(0)
    checkpoint = ClassicDLRM(ROWS, 8, NUM_DENSE).state_dict()
    torch.manual_seed(1 + env.rank)
    model = ClassicDLRM(ROWS, 8, NUM_DENSE)
    model.load_state_dict(checkpoint)
    return model


def torch_losses(model: nn.Module, optimizer: SparseOptimizer) -> list[float]:
    """Trains the torch model on the global batches in float64."""
    model.double()
    dense = torch_optimizer(model, optimizer)
    losses = []
    for step in range(NUM_STEPS):
        dense.zero_grad()
        loss = model(clicks(step, range(NUM_SAMPLES), dtype=torch.float64))
        loss.backward()
        dense.step()
        losses.append(float(loss.detach()))
    return losses


def check(env: Env, optimizer: SparseOptimizer) -> None:
    plain = torch_model(env)
    model = torch_model(env)

    model = se.from_torch(model, optimizer, skip=["emb_l.4"])
    plan = se.plan_sharding(
        model,
        env,
        {
            "emb_l_0": layouts.row_wise(),
            "emb_l_1": layouts.table_wise(rank=env.world_size - 1),
            "emb_l_2": layouts.column_wise(ranks=range(min(2, env.world_size))),
            "emb_l_3": layouts.data_parallel(),
        },
    )
    assert "emb_l_4" not in str(plan)
    sharded = se.shard_modules(model, plan, env)
    combined = se.build_optimizer(
        sharded, dense=lambda p: torch_optimizer(nn.ParameterList(p), optimizer)
    )
    size = NUM_SAMPLES // env.world_size
    mine = range(env.rank * size, (env.rank + 1) * size)
    loader = (clicks(step, mine, dtype=torch.float32) for step in range(NUM_STEPS))
    pipeline = se.TrainPipeline(sharded, combined, env)
    losses = [float(loss) for _, loss in pipeline.run(loader, NUM_STEPS)]

    before = copy.deepcopy(plain.state_dict())
    expected = torch_losses(plain, optimizer)
    assert len({round(loss, 4) for loss in expected}) == NUM_STEPS
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-5, atol=1e-6)
    after = weights_of(sharded, plain)
    for name, weight in plain.state_dict().items():
        assert not torch.equal(weight.float(), before[name])
        torch.testing.assert_close(after[name].double(), weight, rtol=1e-4, atol=1e-5)


@spmd(world_size=2)
def test_a_checkpoint_of_a_converted_model_opens_in_another_layout(
    env: Env, tmp_path: Path
) -> None:
    def trained(seed: int, layout: Layout, num_steps: int) -> tuple[nn.Module, Any, list[float]]:
        torch.manual_seed(seed)
        model = se.from_torch(ClassicDLRM(ROWS, 8, NUM_DENSE), optim.Adagrad(lr=0.05))
        where = {f"emb_l_{table}": layout for table in range(4)}
        sharded = se.shard_modules(model, se.plan_sharding(model, env, where), env)
        optimizer = se.build_optimizer(sharded, dense=lambda p: torch.optim.SGD(p, lr=0.1))
        loader = (clicks(0, range(NUM_SAMPLES), dtype=torch.float32) for _ in range(num_steps))
        steps = se.TrainPipeline(sharded, optimizer, env).run(loader, num_steps)
        return sharded, optimizer, [float(loss) for _, loss in steps]

    model, optimizer, losses = trained(0, layouts.row_wise(), 1)
    se.save_checkpoint(tmp_path / "1", model, optimizer, step=1)
    other, other_optimizer, other_losses = trained(1, layouts.column_wise([1, 0]), 1)
    assert other_losses != losses
    assert se.load_checkpoint(tmp_path / "1", other, other_optimizer) == 1
    batch = clicks(1, range(NUM_SAMPLES), dtype=torch.float32)
    for _ in range(2):  # the second after a step, for which Adagrad's rows count
        both = [each(batch) for each in (model, other)]
        torch.testing.assert_close(both[1], both[0], rtol=1e-6, atol=1e-6)
        for loss, each in zip(both, (optimizer, other_optimizer), strict=True):
            each.zero_grad()
            loss.backward()
            each.step()


@spmd(world_size=1)
def test_a_classic_dlrm_trains_as_before_on_one_rank(env: Env) -> None:
    check(env, optim.SGD(lr=0.1))
    check(env, optim.Adagrad(lr=0.05))


@spmd(world_size=2)
def test_a_classic_dlrm_trains_as_before_on_two_ranks(env: Env) -> None:
    check(env, optim.SGD(lr=0.1))
    check(env, optim.Adagrad(lr=0.05))


@spmd(world_size=4)
def test_a_classic_dlrm_trains_as_before_on_four_ranks(env: Env) -> None:
    check(env, optim.SGD(lr=0.1))
    check(env, optim.Adagrad(lr=0.05))
