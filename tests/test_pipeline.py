"""The loop: the same at any world size, and one rank's trouble is every rank's, at once."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torchrec import KeyedJaggedTensor

import shardemb as se
from shardemb import layouts, optim
from shardemb.data.click_log import CriteoLoader, open_click_log
from shardemb.data.clicks import CATEGORY_NAMES
from shardemb.data.generated import write_click_log
from shardemb.env import Env
from shardemb.errors import OtherRankError
from shardemb.layouts import Layout
from shardemb.recipes.dlrm import Config, build_layouts, build_model
from shardemb.step_batches import num_samples_of
from tests.spmd import run_ranks, spmd

GOLDEN = Path(__file__).parent / "golden" / "dlrm_20_steps.json"
TABLE = se.TableConfig(
    name="t", num_embeddings=10, embedding_dim=4, feature_names=("t",), optimizer=optim.SGD(lr=0.1)
)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.collection = se.EmbeddingBagCollection([TABLE])

    def forward(self, batch: KeyedJaggedTensor) -> torch.Tensor:
        pooled_BD: torch.Tensor = self.collection(batch).values()
        return pooled_BD.square().sum(1).mean()


def small_pipeline(env: Env) -> tuple[nn.Module, se.TrainPipeline]:
    model = Small()
    sharded = se.shard_modules(model, se.plan_sharding(model, env, {"t": layouts.row_wise()}), env)
    return sharded, se.TrainPipeline(sharded, se.build_optimizer(sharded), env)


def unguarded(ids: list[int]) -> KeyedJaggedTensor:
    return KeyedJaggedTensor(
        keys=["t"],
        values=torch.tensor(ids, dtype=torch.int64),
        lengths=torch.ones(len(ids), dtype=torch.int64),
    )


def rows(model: nn.Module) -> torch.Tensor:
    (shard,) = model.state_dict()["collection.embedding_bags.t.weight"].local_shards()
    weight: torch.Tensor = shard.tensor.clone()
    return weight


def dlrm_losses(env: Env, folder: str) -> None:
    """The losses of 20 steps of the recipe's model, written by rank 0."""
    config = Config(num_embeddings=5000, batch_size=256)
    model = build_model(config)
    plan = se.plan_sharding(model, env, build_layouts(config))
    sharded = se.shard_modules(model, plan, env)
    optimizer = se.build_optimizer(sharded, dense=lambda p: torch.optim.AdamW(p, lr=1e-3))
    split = open_click_log(Path(folder), env=env)
    loader = CriteoLoader(
        split.train, env=env, batch_size=256, num_embeddings_F=[5000] * len(CATEGORY_NAMES)
    )
    losses = [float(loss) for _, loss in se.TrainPipeline(sharded, optimizer, env).run(loader, 20)]
    if env.is_main:
        Path(folder, f"losses-{env.world_size}.json").write_text(json.dumps(losses))


@pytest.mark.distributed
def test_one_two_and_four_ranks_give_the_golden_loss_curve(tmp_path: Path) -> None:
    """To make the file anew: delete it, run this test, look at what changed and why."""
    write_click_log(tmp_path, num_train=4000, num_test=10, seed=0)
    curves = {}
    for world_size in (1, 2, 4):
        run_ranks(dlrm_losses, (world_size, 1), {"folder": str(tmp_path)})
        curves[world_size] = json.loads((tmp_path / f"losses-{world_size}.json").read_text())
    if not GOLDEN.exists():
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(json.dumps([round(loss, 6) for loss in curves[1]], indent=1) + "\n")
        pytest.fail(f"{GOLDEN} was not there and is written; look at it and run again")
    golden = json.loads(GOLDEN.read_text())
    assert len(set(golden)) == 20
    assert golden[-1] < golden[0]
    np.testing.assert_allclose(curves[1], golden, atol=2e-5)
    np.testing.assert_allclose(curves[2], curves[1], atol=2e-6)
    np.testing.assert_allclose(curves[4], curves[1], atol=2e-6)


@spmd(world_size=2)
def test_an_error_in_one_loader_ends_the_run_on_all_ranks(env: Env) -> None:
    def loader() -> Iterator[KeyedJaggedTensor]:
        yield unguarded([1, 2])
        if env.rank == 1:
            raise OSError("the disk is gone")
        yield unguarded([3, 4])

    _, pipeline = small_pipeline(env)
    steps = pipeline.run(loader(), 5)
    assert next(steps)[0] == 1
    with pytest.raises(OSError if env.rank == 1 else OtherRankError) as caught:
        next(steps)
    assert "the disk is gone" in str(caught.value)
    if env.rank == 0:
        expected = "rank 1 failed while reading the batch of step 2: OSError: the disk is gone"
        assert str(caught.value) == expected


@spmd(world_size=2)
def test_an_id_outside_its_table_ends_the_run_before_any_row_moves(env: Env) -> None:
    model, pipeline = small_pipeline(env)
    batches = [unguarded([1, 2]), unguarded([3, 10 if env.rank == 0 else 4])]
    steps = pipeline.run(batches, 2)
    next(steps)
    before = rows(model)
    expected = ValueError if env.rank == 0 else OtherRankError
    with pytest.raises(expected, match="feature 't', sample 1: id 10 is outside"):
        next(steps)
    assert torch.equal(rows(model), before)


@spmd(world_size=1)
def test_a_forward_outside_the_pipeline_checks_ids_unless_told_not_to(env: Env) -> None:
    model, _ = small_pipeline(env)
    with pytest.raises(ValueError, match=r"sample 0: id -1 is outside 0\.\.9 of table 't'"):
        model(unguarded([-1]))
    model(unguarded([1]))
    with pytest.raises(ValueError, match="feature 't' of table 't' is not in the batch"):
        model(KeyedJaggedTensor(keys=["u"], values=torch.tensor([1]), lengths=torch.tensor([1])))
    plain = Small()
    plan = se.plan_sharding(plain, env, kernel="fbgemm")
    unchecked = se.shard_modules(plain, plan, env, check_ids=False)
    unchecked(unguarded([10]))  # FBGEMM warns and reads row 0
    with pytest.raises(ValueError, match="feature 't' of table 't' is not in the batch"):
        unchecked(
            KeyedJaggedTensor(keys=["u"], values=torch.tensor([1]), lengths=torch.tensor([1]))
        )


@spmd(world_size=2)
def test_loaders_that_differ_in_length_and_empty_batches_are_refused(env: Env) -> None:
    _, pipeline = small_pipeline(env)
    steps = pipeline.run([unguarded([1, 2])] * (2 + env.rank), 9)
    assert [next(steps)[0], next(steps)[0]] == [1, 2]
    with pytest.raises(RuntimeError, match="loaders of 1 of 2 ranks ended before step 3, that of"):
        next(steps)
    with pytest.raises(ValueError, match="a batch must have at least one sample, got none"):
        list(pipeline.run([unguarded([])], 9))


@spmd(world_size=2)
def test_a_step_on_batches_of_different_sizes_is_that_of_the_global_batch(env: Env) -> None:
    batches = [[1, 2, 3, 4, 4], [5, 6, 1, 1, 7]]
    parts = [slice(0, 1), slice(1, 5)]
    model, pipeline = small_pipeline(env)
    before = rows(model)
    mine = [unguarded(batch[parts[env.rank]]) for batch in batches]
    losses = [float(loss) for _, loss in pipeline.run(mine, 9)]
    even_model, even = small_pipeline(env)
    assert torch.equal(rows(even_model), before)
    whole = [unguarded(batch) for batch in batches]
    expected = [float(loss) for _, loss in even.run(whole, 9)]
    np.testing.assert_allclose(losses, expected, rtol=1e-6)
    assert not torch.equal(rows(model), before)
    torch.testing.assert_close(rows(model), rows(even_model), rtol=1e-6, atol=1e-7)


@spmd(world_size=2)
def test_a_run_ends_with_its_loader_or_at_its_last_step(env: Env) -> None:
    model, pipeline = small_pipeline(env)
    batches = [unguarded([1, 2])] * 3
    assert [step for step, _ in pipeline.run(batches, 9)] == [1, 2, 3]
    assert [step for step, _ in pipeline.run(batches, 2)] == [1, 2]
    assert [step for step, _ in pipeline.run(batches, 6, first_step=4)] == [5, 6]
    assert list(pipeline.run(batches, 4, first_step=4)) == []
    before = rows(model)
    assert len(list(pipeline.evaluate(batches))) == 3
    assert torch.equal(rows(model), before)


@spmd(world_size=1)
def test_a_forward_without_a_loss_is_refused(env: Env) -> None:
    class NoLoss(Small):
        def forward(self, batch: KeyedJaggedTensor) -> Any:
            return self.collection(batch)

    model = NoLoss()
    sharded = se.shard_modules(model, se.plan_sharding(model, env), env)
    pipeline = se.TrainPipeline(sharded, se.build_optimizer(sharded), env)
    with pytest.raises(
        ValueError, match="must return a loss of one element, or a tuple that begins with"
    ):
        list(pipeline.run([unguarded([1])], 1))


def test_the_size_of_a_batch_is_found_in_any_container() -> None:
    assert num_samples_of({"x": [unguarded([1, 2, 3]), torch.zeros(7)]}) == 3
    assert num_samples_of((torch.zeros(()), torch.zeros(7))) == 7
    assert num_samples_of((torch.arange(20), torch.arange(7), torch.zeros(7, 2))) == 7
    with pytest.raises(ValueError, match="samples of a batch of type str: it holds no tensor"):
        num_samples_of("batch")
    for weights in ((), (torch.zeros(20),)):
        with pytest.raises(ValueError, match=r"lengths \[7, 20\]; say it by TrainPipeline\(..., n"):
            num_samples_of((torch.arange(20), torch.arange(7), *weights))


class Keyed(Small):
    """Takes raw ids and makes its batch in the forward."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(unguarded(ids.tolist()))


def keyed_pipeline(env: Env) -> se.TrainPipeline:
    model = Keyed()
    sharded = se.shard_modules(model, se.plan_sharding(model, env), env)
    return se.TrainPipeline(sharded, se.build_optimizer(sharded), env)


@spmd(world_size=1)
def test_a_batch_made_in_the_forward_is_checked_there(env: Env) -> None:
    assert len(list(keyed_pipeline(env).run([torch.tensor([3])], 1))) == 1
    with pytest.raises(ValueError, match="sample 0: id 10 is outside"):
        list(keyed_pipeline(env).run([torch.tensor([10])], 1))


@spmd(world_size=1)
def test_a_model_that_is_not_sharded_is_refused(env: Env) -> None:
    with pytest.raises(ValueError, match="got Small, whose ranks would train apart"):
        se.TrainPipeline(Small(), small_pipeline(env)[1]._optimizer, env)
    sharded, _ = small_pipeline(env)
    other: Any = torch.optim.SGD([torch.zeros(1)])
    with pytest.raises(ValueError, match="got SGD, which would train no rows"):
        se.TrainPipeline(sharded, other, env)


@spmd(world_size=2)
def test_evaluating_leaves_the_mode_as_it_was_and_batches_of_any_shape_move(env: Env) -> None:
    class Pair(NamedTuple):
        features: KeyedJaggedTensor
        labels: torch.Tensor

    class First(Small):
        def forward(self, batch: Any) -> torch.Tensor:
            return super().forward(batch[0])

    model = First()
    sharded = se.shard_modules(model, se.plan_sharding(model, env, {"t": layouts.row_wise()}), env)
    pipeline = se.TrainPipeline(sharded, se.build_optimizer(sharded), env)
    batch = (unguarded([1, 2]), torch.zeros(2))
    losses = [float(loss) for _, loss in pipeline.run([batch, list(batch), Pair(*batch)], 9)]
    assert len(losses) == 3
    assert sharded.training
    assert len(list(pipeline.evaluate([batch]))) == 1
    assert sharded.training


@pytest.mark.distributed
def test_an_error_in_one_rank_s_forward_ends_all_processes_at_once(tmp_path: Path) -> None:
    script = """
import sys, torch, shardemb as se
env = se.init_distributed(device="cpu")
other = torch.distributed.new_group()  # in which rank 1 waits for rank 0, in vain
table = se.TableConfig(name="t", num_embeddings=8, embedding_dim=4, feature_names=("t",))
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.collection = se.EmbeddingBagCollection([table])
    def forward(self, batch):
        loss = self.collection(batch).values().mean()
        if env.rank == 1:
            torch.distributed.all_reduce(torch.zeros(1), group=other, async_op=True)
            raise ArithmeticError("rank 1 cannot add")
        return loss
model = Model()
model = se.shard_modules(model, se.plan_sharding(model, env), env)
pipeline = se.TrainPipeline(model, se.build_optimizer(model), env)
list(pipeline.run([se.keyed_jagged_tensor({"t": [[1]]}, [table])], 1))
"""
    (tmp_path / "script.py").write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "script.py"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=150, check=False
    )
    assert done.returncode == 1
    assert "rank 1 cannot add" in done.stderr


class Both(nn.Module):
    """The same feature in a plain and in a weighted collection."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = se.EmbeddingBagCollection([TABLE])
        self.weighted = se.EmbeddingBagCollection([replace(TABLE, name="w")], is_weighted=True)

    def forward(self, batch: dict[str, KeyedJaggedTensor]) -> torch.Tensor:
        both_BD = self.plain(batch["plain"]).values() + self.weighted(batch["weighted"]).values()
        loss: torch.Tensor = both_BD.square().sum(1).mean()
        return loss


@spmd(world_size=2)
def test_plain_and_weighted_batches_of_one_feature_reach_their_collections(env: Env) -> None:
    model = Both()
    where: dict[str, Layout] = {"t": layouts.row_wise(), "w": layouts.table_wise(rank=0)}
    sharded = se.shard_modules(model, se.plan_sharding(model, env, where), env)
    pipeline = se.TrainPipeline(sharded, se.build_optimizer(sharded), env)
    ids = [[1, 2], [3]]
    weighted = se.keyed_jagged_tensor({"t": ids}, [TABLE], weights={"t": [[1.0, -1.0], [0.5]]})
    batch = {"plain": se.keyed_jagged_tensor({"t": ids}, [TABLE]), "weighted": weighted}
    losses = [float(loss) for _, loss in pipeline.run([batch] * 3, 3)]
    assert losses[2] < losses[0]
    swapped = {"plain": batch["weighted"], "weighted": batch["plain"]}
    with pytest.raises(ValueError, match="the batch has weights, and the tables do not use them"):
        sharded(swapped)


@spmd(world_size=2)
def test_a_batch_of_other_features_or_weights_on_one_rank_is_refused_on_all(env: Env) -> None:
    wide = replace(TABLE, feature_names=("t", "u"))
    batch = se.keyed_jagged_tensor({"t": [[1]], "u": [[2]]}, [wide])
    other = KeyedJaggedTensor(keys=["t", "z"], values=batch.values(), lengths=batch.lengths())
    weighted = KeyedJaggedTensor(
        keys=["t", "u"],
        values=batch.values(),
        lengths=batch.lengths(),
        weights=torch.ones(2),
    )

    class Wide(Small):
        def __init__(self) -> None:
            super().__init__()
            self.collection = se.EmbeddingBagCollection([wide])

    model = Wide()
    sharded = se.shard_modules(model, se.plan_sharding(model, env, {"t": layouts.row_wise()}), env)
    pipeline = se.TrainPipeline(sharded, se.build_optimizer(sharded), env)
    expected = ValueError if env.rank == 1 else OtherRankError
    for wrong, text in ((other, "feature 'u' of table 't' is not in"), (weighted, "has weights")):
        mine = [batch, wrong if env.rank == 1 else batch]
        with pytest.raises(expected, match=text):
            list(pipeline.run(mine, 2))
