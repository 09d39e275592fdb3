"""Checkpoints: exact, whole or absent, and refused where they do not fit."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from torchrec import KeyedJaggedTensor

import shardemb as se
from shardemb import layouts, optim
from shardemb.checkpoint import latest_checkpoint
from shardemb.env import Env
from shardemb.errors import RunError
from shardemb.kernel_choice import KernelChoice
from shardemb.layouts import Layout
from shardemb.optim import SparseOptimizer
from tests.plans import KERNELS
from tests.spmd import run_ranks, spmd

ROW_WISE_ADAGRAD = optim.RowWiseAdagrad(lr=0.1)


class Model(nn.Module):
    def __init__(self, tables: list[se.TableConfig]) -> None:
        super().__init__()
        self.collection = se.EmbeddingBagCollection(tables)
        torch.manual_seed(0)
        self.linear = nn.Linear(48, 1)

    def forward(self, batch: KeyedJaggedTensor) -> torch.Tensor:
        pooled = self.collection(batch)
        logits_B1: torch.Tensor = self.linear(torch.cat([pooled[name] for name in "abcdef"], 1))
        return logits_B1.square().mean()


def make_tables(
    num_embeddings: int = 40,
    optimizer: SparseOptimizer = ROW_WISE_ADAGRAD,
    dtype: Literal["float32", "float16"] = "float32",
) -> list[se.TableConfig]:
    return [
        se.TableConfig(
            name=name,
            dtype=dtype,
            num_embeddings=num_embeddings,
            embedding_dim=8,
            feature_names=(name,),
            optimizer=optimizer,
        )
        for name in "abcdef"
    ]


def build(
    env: Env,
    where: dict[str, Layout] | None = None,
    num_embeddings: int = 40,
    optimizer: SparseOptimizer = ROW_WISE_ADAGRAD,
    dense: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
    dtype: Literal["float32", "float16"] = "float32",
    kernel: KernelChoice = "auto",
) -> tuple[nn.Module, Any]:
    model = Model(make_tables(num_embeddings, optimizer, dtype))
    where = where or {"a": layouts.row_wise(), "b": layouts.table_wise(rank=0)}
    for number, name in enumerate("cdef"):
        where[name] = layouts.table_wise(rank=number % env.world_size)
    plan = se.plan_sharding(model, env, where, kernel=kernel)
    sharded = se.shard_modules(model, plan, env)
    return sharded, se.build_optimizer(sharded, dense=lambda p: dense(p, lr=0.01))


def batches(env: Env, first: int, last: int) -> list[KeyedJaggedTensor]:
    size = 8 // env.world_size
    made = []
    for step in range(first, last):
        ids = torch.randint(0, 40, (6, 8), generator=torch.Generator().manual_seed(step))
        mine = ids[:, env.rank * size : (env.rank + 1) * size]
        features = dict(zip("abcdef", mine, strict=True))
        made.append(se.keyed_jagged_tensor(features, make_tables()))
    return made


def losses(model: nn.Module, optimizer: Any, env: Env, first: int, last: int) -> list[float]:
    pipeline = se.TrainPipeline(model, optimizer, env)
    return [
        float(loss) for _, loss in pipeline.run(batches(env, first, last), last, first_step=first)
    ]


@spmd(world_size=2)
def test_a_loaded_run_goes_on_bit_for_bit(env: Env, tmp_path: Path) -> None:
    for kernel in KERNELS:
        model, optimizer = build(env, kernel=kernel)
        losses(model, optimizer, env, 0, 3)
        for group in optimizer.param_groups:
            group["lr"] *= 0.5
        path = se.save_checkpoint(tmp_path / kernel, model, optimizer, step=3, env=env)
        expected = losses(model, optimizer, env, 3, 6)
        loaded, its_optimizer = build(env, kernel=kernel)
        fresh = losses(loaded, its_optimizer, env, 3, 6)
        assert fresh != expected
        loaded, its_optimizer = build(env, kernel=kernel)
        assert se.load_checkpoint(path, loaded, its_optimizer, env=env) == 3
        assert losses(loaded, its_optimizer, env, 3, 6) == expected
        assert its_optimizer.param_groups[0]["lr"] == pytest.approx(0.05)
        assert its_optimizer.param_groups[-1]["lr"] == pytest.approx(0.005)


@spmd(world_size=2)
def test_rows_and_states_that_are_not_finite_are_refused_on_all_ranks(
    env: Env, tmp_path: Path
) -> None:
    nan, inf = float("nan"), float("inf")
    bad = (("b", None, 27, -inf), ("b", None, 3, nan), ("a", "momentum1", 5, nan))
    slices: dict[str, Layout] = {"a": layouts.column_wise(ranks=[0, 1]), "b": layouts.row_wise()}
    for where, kernel in zip((slices, None), KERNELS, strict=False):
        model, optimizer = build(env, where, kernel=kernel)
        losses(model, optimizer, env, 0, 1)
        good = se.save_checkpoint(tmp_path / f"good {kernel}", model, optimizer, step=1, env=env)
        for number, (table, state, row, value) in enumerate((*bad, ("c", "momentum1", 39, inf))):
            for rows in optimizer.rows.blocks:
                held = rows.state[state] if state else rows.weight_RD
                if rows.table == table and 0 <= row - rows.first_row < len(held):
                    held[row - rows.first_row] = value
            path = tmp_path / f"{kernel}{number}"
            se.save_checkpoint(path, model, optimizer, step=1, env=env)
            weight = f"collection.embedding_bags.{table}.weight"
            name = f"optim/fused/{weight}/{table}.{state}" if state else f"model/{weight}"
            with pytest.raises(
                RunError,
                match=rf"{kernel}{number}: row {row} of '{name}' is {value}, on rank \d; the model "
                "holds it now and is not to be trained; load an older checkpoint$",
            ):
                se.load_checkpoint(path, model, optimizer, env=env)
            assert se.load_checkpoint(good, model, optimizer, env=env) == 1
        with torch.no_grad():
            optimizer.dense_parameters["linear.bias"].fill_(nan)
        path = se.save_checkpoint(tmp_path / f"bias {kernel}", model, optimizer, step=1, env=env)
        with pytest.raises(RunError, match=r"row 0 of 'model/linear\.bias' is nan, on rank 0; the"):
            se.load_checkpoint(path, model, optimizer, env=env)


def save_for_others(env: Env, folder: str) -> None:
    model, optimizer = build(env)
    losses(model, optimizer, env, 0, 3)
    se.save_checkpoint(Path(folder, "3"), model, optimizer, step=3, env=env)
    Path(folder, "expected.json").write_text(json.dumps(losses(model, optimizer, env, 3, 6)))


def load_from_others(env: Env, folder: str) -> None:
    model, optimizer = build(env, {"a": layouts.table_wise(rank=0), "b": layouts.row_wise()})
    assert se.load_checkpoint(Path(folder, "3"), model, optimizer, env=env) == 3
    expected = json.loads(Path(folder, "expected.json").read_text())
    torch.testing.assert_close(
        torch.tensor(losses(model, optimizer, env, 3, 6)), torch.tensor(expected), atol=1e-6, rtol=0
    )


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 4])
def test_a_checkpoint_of_two_ranks_opens_at_other_sizes_and_layouts(
    tmp_path: Path, world_size: int
) -> None:
    run_ranks(save_for_others, (2, 1), {"folder": str(tmp_path)})
    run_ranks(load_from_others, (world_size, 1), {"folder": str(tmp_path)})


@spmd(world_size=2)
def test_checkpoints_that_do_not_fit_are_refused(env: Env, tmp_path: Path) -> None:
    model, optimizer = build(env)
    losses(model, optimizer, env, 0, 1)
    path = se.save_checkpoint(tmp_path / "1", model, optimizer, step=1, env=env)
    before = path.stat().st_mtime_ns
    expected = FileExistsError if env.is_main else RunError
    with pytest.raises(expected, match="save each checkpoint to a new folder"):
        se.save_checkpoint(path, model, optimizer, step=1, env=env)
    assert path.stat().st_mtime_ns == before
    with pytest.raises(FileNotFoundError, match="nowhere is not a checkpoint: it has no shardemb"):
        se.load_checkpoint(tmp_path / "nowhere", model, optimizer, env=env)
    to_sgd, its_optimizer = build(env, optimizer=optim.SGD(lr=0.1))
    with pytest.raises(
        ValueError, match=r"a\.weight' was trained by RowWiseAdagrad, the model's table"
    ):
        se.load_checkpoint(path, to_sgd, its_optimizer, env=env)
    to_adagrad, its_optimizer = build(env, optimizer=optim.Adagrad(lr=0.1))
    with pytest.raises(ValueError, match=r"momentum1' of shape \[40\], the model of \[40, 8\]"):
        se.load_checkpoint(path, to_adagrad, its_optimizer, env=env)
    to_dense_sgd, its_optimizer = build(env, dense=torch.optim.SGD)
    with pytest.raises(
        ValueError, match=r"'dense\.linear\.weight' was saved with other settings, they"
    ):
        se.load_checkpoint(path, to_dense_sgd, its_optimizer, env=env)
    larger, its_optimizer = build(env, num_embeddings=50)
    with pytest.raises(ValueError, match=r"a.weight' of shape \[40, 8\], the model of \[50, 8\]"):
        se.load_checkpoint(path, larger, its_optimizer, env=env)
    half, its_optimizer = build(env, dtype="float16")
    with pytest.raises(
        ValueError,
        match=r"a.weight' of float32, the model of float16; build the model with float32",
    ):
        se.load_checkpoint(path, half, its_optimizer, env=env)
    losses(half, its_optimizer, env, 0, 1)
    halves = se.save_checkpoint(tmp_path / "halves", half, its_optimizer, step=1, env=env)
    with pytest.raises(ValueError, match=r"a.weight' of float16, the model of float32"):
        se.load_checkpoint(halves, model, optimizer, env=env)
    moved: dict[str, Layout] = {
        "a": layouts.column_wise(ranks=[1, 0]),
        "b": layouts.column_wise(ranks=[0, 1]),
    }
    half, its_optimizer = build(env, moved, dtype="float16", optimizer=optim.Adagrad(lr=0.1))
    losses(half, its_optimizer, env, 0, 1)
    path = se.save_checkpoint(tmp_path / "moved", half, its_optimizer, step=1, env=env)
    half, its_optimizer = build(env, dtype="float16", optimizer=optim.Adagrad(lr=0.1))
    assert se.load_checkpoint(path, half, its_optimizer, env=env) == 1
    with pytest.raises(ValueError, match="step must not be negative, got -1"):
        se.save_checkpoint(tmp_path / "-1", model, optimizer, step=-1, env=env)
    assert not list(tmp_path.glob("-1*"))


@spmd(world_size=2)
def test_a_one_cycle_schedule_goes_on_where_it_was(env: Env, tmp_path: Path) -> None:
    def schedule(optimizer: Any, last_epoch: int = -1) -> OneCycleLR:
        return OneCycleLR(
            optimizer, max_lr=0.4, total_steps=10, cycle_momentum=False, last_epoch=last_epoch
        )

    def rates(optimizer: Any, scheduler: OneCycleLR, num_steps: int) -> list[float]:
        seen = []
        for _ in range(num_steps):
            optimizer.step()
            scheduler.step()
            seen += [group["lr"] for group in optimizer.param_groups]
        return seen

    model, optimizer = build(env)
    losses(model, optimizer, env, 0, 1)
    scheduler = schedule(optimizer)
    rates(optimizer, scheduler, 4)
    path = se.save_checkpoint(tmp_path / "4", model, optimizer, step=4, env=env)
    saved = [group["lr"] for group in optimizer.param_groups]
    expected = rates(optimizer, scheduler, 5)
    fresh, its_optimizer = build(env)
    assert se.load_checkpoint(path, fresh, its_optimizer, env=env) == 4
    assert [group["lr"] for group in its_optimizer.param_groups] == pytest.approx(saved)
    scheduler = schedule(its_optimizer, last_epoch=3)
    assert rates(its_optimizer, scheduler, 5) == pytest.approx(expected)
    plain, its_optimizer = build(env)
    losses(plain, its_optimizer, env, 0, 1)
    path = se.save_checkpoint(tmp_path / "plain", plain, its_optimizer, step=1, env=env)
    schedule(optimizer)
    assert se.load_checkpoint(path, model, optimizer, env=env) == 1
    assert [group["max_lr"] for group in optimizer.param_groups] == [0.4] * len(
        optimizer.param_groups
    )


@spmd(world_size=2)
def test_a_broken_folder_is_not_the_latest(env: Env, tmp_path: Path) -> None:
    model, optimizer = build(env)
    losses(model, optimizer, env, 0, 1)
    assert latest_checkpoint(tmp_path) is None
    path = se.save_checkpoint(tmp_path / "9", model, optimizer, step=9, env=env)
    torch.distributed.barrier()
    if env.is_main:
        (tmp_path / "10.partial").mkdir()
        (tmp_path / "10.partial" / "shardemb.json").touch()
        (tmp_path / "11").mkdir()
    torch.distributed.barrier()
    assert latest_checkpoint(tmp_path) == path
    torch.distributed.barrier()
    if env.is_main:
        for file in path.glob("*.distcp"):
            file.write_bytes(file.read_bytes()[:100])
    torch.distributed.barrier()
    with pytest.raises(
        RunError, match=r"9 could not be read: rank 0: \w+: .*; see to the d"
    ) as caught:
        se.load_checkpoint(path, model, optimizer, env=env)
    assert "\n" not in str(caught.value)
    assert "Traceback" not in str(caught.value)


@spmd(world_size=2)
def test_a_damaged_checkpoint_is_called_so(env: Env, tmp_path: Path) -> None:
    model, optimizer = build(env)
    path = se.save_checkpoint(tmp_path / "9", model, optimizer, step=9, env=env)
    metadata, header = path / ".metadata", path / "shardemb.json"
    whole = json.loads(header.read_text())

    def refused(match: str) -> None:
        torch.distributed.barrier()
        with pytest.raises(ValueError, match=f"9 is damaged: {match}.*; remove the folder, and an"):
            se.load_checkpoint(path, model, optimizer, env=env)
        torch.distributed.barrier()

    def write(text: str) -> None:
        torch.distributed.barrier()
        if env.is_main:
            header.write_text(text)

    not_as_written = r"its shardemb\.json is not as it was written"
    for wrong in ({"settings": 5}, {"settings": {"fused": 1}}, {"step": "9"}, {"step": None}):
        write(json.dumps(whole | wrong))
        refused(not_as_written)
    for text in ("{", "[]", "5"):
        write(text)
        refused(not_as_written)
    with pytest.raises(ValueError, match=not_as_written):
        latest_checkpoint(tmp_path)
    write(json.dumps(whole))
    for garbage in (b"spam and eggs", b"", pickle.dumps(5)):
        torch.distributed.barrier()
        if env.is_main:
            metadata.write_bytes(garbage)
        refused(r"its \.metadata is not as it was written")
    if env.is_main:
        metadata.unlink()
    refused(r"it has no \.metadata")
