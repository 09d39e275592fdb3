"""`padding_idx` and `frozen_rows`: bags without padding, sharded or not, as in torch."""

# B samples, R rows, D width

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torchrec import KeyedJaggedTensor

import shardemb as se
from shardemb import layouts, optim
from shardemb.data.bag_padding import leave_padding_out
from shardemb.data.guarded_forward import CheckedBatch, GuardedForward
from shardemb.data.id_guard import FeatureLimit
from shardemb.env import Env
from shardemb.init import Pretrained
from shardemb.kernel_choice import KernelChoice
from shardemb.layouts import Layout
from shardemb.modules.discovery import find_collections, tables_of
from tests.every_layout import whole_table
from tests.plans import KERNELS
from tests.spmd import spmd

NUM_ROWS, WIDTH, LR = 23, 16, 0.25
FEATURES = ("x", "y", "z")


def make_tables() -> list[se.TableConfig]:
    """One feature ("x") in two tables, and tables with a padding row, without, and frozen."""

    def table(name: str, *features: str, **fields: Any) -> se.TableConfig:
        generator = torch.Generator().manual_seed(len(name))
        given_RD = torch.randn(NUM_ROWS, WIDTH, generator=generator)
        init = Pretrained(weights=given_RD)  # of which the padding row is kept, and not zeros
        shape: dict[str, Any] = {"num_embeddings": NUM_ROWS, "embedding_dim": WIDTH, "init": init}
        options: dict[str, Any] = {"optimizer": optim.SGD(lr=LR), "padding_idx": 3} | fields
        return se.TableConfig(name=name, feature_names=features, **shape | options)

    return [
        table("summed", "x", "y"),
        table("mean", "x", pooling="mean"),
        table("plain", "z", pooling="mean", padding_idx=None),
        table("frozen", "y", pooling="mean", trainable=False),
    ]


def batch_of(num_samples: int, seed: int, *, weighted: bool = False) -> KeyedJaggedTensor:
    """Every third id is the padding; bags are empty, or of padding alone, in one feature all."""
    generator = torch.Generator().manual_seed(seed)
    count = len(FEATURES) * num_samples
    lengths = torch.randint(0, 5, (count,), generator=generator)
    lengths[0] = 0
    lengths[1:3] = 3
    num_ids = int(lengths.sum())
    ids_N = torch.randint(0, NUM_ROWS, (num_ids,), generator=generator)
    ids_N[::3] = 3
    ids_N[:3] = 3
    if seed % 2:
        ids_N[int(lengths[:num_samples].sum()) : int(lengths[: 2 * num_samples].sum())] = 3
    weights_N = torch.rand(num_ids, generator=generator) - 0.3 if weighted else None
    return KeyedJaggedTensor(keys=list(FEATURES), values=ids_N, lengths=lengths, weights=weights_N)


class InTorch:
    """The tables as torch's modules in float64, each output by its own call.

    Args:
        tables: The tables.
        weights: Their rows.
    """

    def __init__(
        self, tables: list[se.TableConfig], weights: Mapping[str, torch.Tensor], *, pooled: bool
    ) -> None:
        self.tables = tables
        self.modules: dict[str, nn.EmbeddingBag | nn.Embedding] = {}
        for table in tables:
            rows_RD = weights[table.name].detach().double().clone()
            options: dict[str, Any] = {
                "padding_idx": table.padding_idx,
                "freeze": not table.trainable,
            }
            if pooled:
                options |= {"mode": table.pooling, "include_last_offset": True}
            kind: Any = nn.EmbeddingBag if pooled else nn.Embedding
            self.modules[table.name] = kind.from_pretrained(rows_RD, **options)

    def outputs(self, batch: KeyedJaggedTensor) -> dict[str, torch.Tensor]:
        """By the names that collections give them."""
        features = [name for table in self.tables for name in table.feature_names]
        found = {}
        for table in self.tables:
            for name in table.feature_names:
                bags, module = batch[name], self.modules[table.name]
                args: tuple[Any, ...] = (bags.values(),)
                if isinstance(module, nn.EmbeddingBag):
                    weights_N = bags.weights_or_none()
                    args += (bags.offsets(), None if weights_N is None else weights_N.double())
                shared = features.count(name) > 1
                found[f"{name}@{table.name}" if shared else name] = module(*args)
        return found


def values_of(outputs: Any) -> dict[str, torch.Tensor]:
    if hasattr(outputs, "to_dict"):
        pooled: dict[str, torch.Tensor] = outputs.to_dict()
        return pooled
    return {name: rows.values() for name, rows in outputs.items()}


def loss_of(outputs: Mapping[str, torch.Tensor], num_samples: int) -> torch.Tensor:
    total = torch.zeros((), dtype=next(iter(outputs.values())).dtype)
    for position, name in enumerate(sorted(outputs)):
        out = outputs[name]
        ramp_D = torch.linspace(0.5, 2.0, WIDTH, dtype=out.dtype) * (1 + position)
        total = total + (out * ramp_D).square().sum() / num_samples
    return total


def close(actual: torch.Tensor, expected: torch.Tensor, text: str) -> None:
    torch.testing.assert_close(
        actual.detach().double(), expected.detach(), rtol=1e-5, atol=1e-5, msg=lambda m: text + m
    )


def weights_of(collection: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name.split(".")[1]: weight.detach().clone()
        for name, weight in collection.state_dict().items()
    }


def build(tables: list[se.TableConfig], kind: str, device: str) -> nn.Module:
    collection: nn.Module
    if kind == "sequence":
        collection = se.EmbeddingCollection(tables, device=device)
    else:
        weighted = kind == "weighted"
        collection = se.EmbeddingBagCollection(tables, device=device, is_weighted=weighted)
    return collection


def tables_for(kind: str) -> list[se.TableConfig]:
    """Weighted bags and sequences have no mean."""
    if kind == "bags":
        return make_tables()
    return [replace(table, pooling="sum") for table in make_tables()]


KINDS = ("bags", "weighted", "sequence")


@pytest.mark.parametrize("kind", KINDS)
def test_an_unsharded_collection_computes_and_trains_as_torch_s_modules(kind: str) -> None:
    tables = tables_for(kind)
    collection = build(tables, kind, "cpu")
    for name, weight in collection.named_parameters():
        assert weight[3].any()
        assert ("frozen" in name) != weight.requires_grad
    torchs = InTorch(tables, weights_of(collection), pooled=kind != "sequence")
    for seed in range(4):
        batch = batch_of(5, seed, weighted=kind == "weighted")
        outputs, expected = values_of(collection(batch)), torchs.outputs(batch)
        assert list(outputs) == list(expected)
        for name, out in outputs.items():
            close(out, expected[name], name)
        loss_of(outputs, 5).backward()
        loss_of(expected, 5).backward()
    for name, weight in collection.named_parameters():
        of_torch = torchs.modules[name.split(".")[1]].weight
        if not weight.requires_grad:
            continue
        assert weight.grad is not None
        assert of_torch.grad is not None
        close(weight.grad, of_torch.grad, name)
        assert bool(weight.grad[3].any()) == ("plain" in name)


def every_layout() -> Iterator[Layout]:
    yield layouts.row_wise()
    yield layouts.table_wise(rank=1)
    yield layouts.column_wise(ranks=[1, 0])
    yield layouts.data_parallel()
    yield layouts.table_row_wise(node=0)
    yield layouts.grid_shard(nodes=[0])


def check_sharded(env: Env, kind: str, layout: Layout, kernel: KernelChoice = "auto") -> None:
    """Compares the outputs of a step with torch's, and for bags the rows after it."""
    tables = tables_for(kind)
    before = weights_of(build(tables, kind, "cpu"))
    model = build(tables, kind, "meta")
    plan = se.plan_sharding(model, env, {table.name: layout for table in tables}, kernel=kernel)
    sharded = se.shard_modules(model, plan, env)
    optimizer = se.build_optimizer(sharded)
    torchs = InTorch(tables, before, pooled=kind != "sequence")
    sizes = [3 + rank for rank in range(env.world_size)]
    losses = []
    for rank, size in enumerate(sizes):
        batch = batch_of(size, rank, weighted=kind == "weighted")
        expected = torchs.outputs(batch)
        losses.append(loss_of(expected, size))
        if rank == env.rank:
            optimizer.zero_grad()
            if kind == "bags":  # keys in another order, and narrow
                batch = batch.permute([2, 0, 1])
                batch = KeyedJaggedTensor(
                    keys=batch.keys(), values=batch.values().int(), lengths=batch.lengths().int()
                )
            outputs = values_of(sharded(batch))
            assert list(outputs) == list(expected)
            for name, out in outputs.items():
                close(out, expected[name], f"{layout}, {kind}, {name}: ")
            loss_of(outputs, size).backward()
            optimizer.step()
    torch.stack(losses).mean().backward()
    if kind == "sequence":
        return
    after = sharded.state_dict()
    for key, weight in after.items():
        name = key.split(".")[-2]
        rows_RD = whole_table(weight, before[name])
        grad_RD = torchs.modules[name].weight.grad
        expected_RD = before[name] if grad_RD is None else before[name] - LR * grad_RD
        close(rows_RD, expected_RD.double(), f"{layout}, {kind}, rows of {name}: ")
        moved = not torch.equal(rows_RD[3], before[name][3])
        assert moved == (name == "plain")
        assert torch.equal(rows_RD, before[name]) == (name == "frozen")


@spmd(world_size=2)
def test_sharded_bags_leave_padding_out_in_every_layout_as_torch_does(env: Env) -> None:
    for layout in every_layout():
        check_sharded(env, "bags", layout)
        for kernel in KERNELS:
            check_sharded(env, "weighted", layout, kernel)
    check_sharded(env, "bags", layouts.row_wise(), "fbgemm")


@spmd(world_size=2)
def test_sharded_sequences_return_the_padding_row_as_torch_does(env: Env) -> None:
    for layout in every_layout():
        if not isinstance(layout, (layouts.TableRowWise, layouts.GridShard)):
            for kernel in KERNELS:
                check_sharded(env, "sequence", layout, kernel)


class Model(nn.Module):
    """The mean over samples of what bags sum up to."""

    def __init__(self, collection: nn.Module) -> None:
        super().__init__()
        self.collection = collection

    def forward(self, batch: KeyedJaggedTensor) -> torch.Tensor:
        return loss_of(values_of(self.collection(batch)), batch.stride())


@spmd(world_size=2)
def test_a_pipeline_trains_on_padded_bags_as_torch_does(env: Env) -> None:
    tables = make_tables()
    before = weights_of(build(tables, "bags", "cpu"))
    model = Model(build(tables, "bags", "meta"))
    plan = se.plan_sharding(model, env, {table.name: layouts.row_wise() for table in tables})
    sharded = se.shard_modules(model, plan, env)
    pipeline = se.TrainPipeline(sharded, se.build_optimizer(sharded), env)
    torchs = InTorch(tables, before, pooled=True)
    dense = torch.optim.SGD(
        [p for module in torchs.modules.values() for p in module.parameters() if p.requires_grad],
        lr=LR,
    )
    batches = [batch_of(4, 10 * step + env.rank) for step in range(3)]
    for step, loss in pipeline.run(iter(batches), 3):
        both = [batch_of(4, 10 * (step - 1) + rank) for rank in range(2)]
        expected = torch.stack([loss_of(torchs.outputs(batch), 4) for batch in both]).mean()
        close(loss, expected, f"step {step}: ")
        dense.zero_grad()
        expected.backward()
        dense.step()


def guarded(padding_of: Mapping[str, int], **options: bool) -> GuardedForward:
    limits = [FeatureLimit(feature=name, table=name, num_embeddings=9) for name in ("a", "b")]
    return GuardedForward(
        limits, is_weighted=False, check_ids=True, padding_of=padding_of, **options
    )


def two_features(ids: list[int]) -> KeyedJaggedTensor:
    return KeyedJaggedTensor(
        keys=["a", "b"], values=torch.tensor(ids), lengths=torch.tensor([2, 1, 0, 2])
    )


def test_ids_are_checked_before_padding_is_left_out_and_checked_batches_known_again() -> None:
    guard = guarded({"a": 0})
    batch = two_features([0, 4, 0, 0, 5])
    ((out,), kwargs) = guard(nn.Identity(), (batch,), {})
    assert not kwargs
    assert out.values().tolist() == [4, 0, 5]
    assert out.lengths().tolist() == [1, 0, 0, 2]
    assert batch.values().tolist() == [0, 4, 0, 0, 5]
    outside = two_features([0, 9, 0, 0, 5])
    with pytest.raises(ValueError, match="feature 'a', sample 0: id 9 is outside"):
        guard(nn.Identity(), (outside,), {})
    guard.checked.append(CheckedBatch(outside))  # as TrainPipeline says that it was
    ((out,), _) = guard(nn.Identity(), (outside,), {})
    assert out.values().tolist() == [9, 0, 5]
    ((out,), _) = guarded({})(nn.Identity(), (batch,), {})
    assert out is batch


def test_ids_of_32_bits_stay_so_where_they_may_and_else_become_64() -> None:
    wide = two_features([0, 4, 2, 0, 5])
    narrow = KeyedJaggedTensor(keys=["a", "b"], values=wide.values().int(), lengths=wide.lengths())
    ((out,), _) = guarded({})(nn.Identity(), (narrow,), {})
    assert out.values().dtype == torch.int64
    assert out.values().tolist() == wide.values().tolist()
    keeping = guarded({}, keeps_int32=True)
    for batch in (narrow, wide):
        ((out,), _) = keeping(nn.Identity(), (batch,), {})
        assert out is batch
    short = KeyedJaggedTensor(
        keys=["a", "b"], values=narrow.values(), lengths=narrow.lengths().int()
    )
    ((out,), _) = keeping(nn.Identity(), (short,), {})
    assert out.values() is narrow.values()
    assert out.lengths().dtype == torch.int64
    ((out,), _) = guarded({"a": 0}, keeps_int32=True)(nn.Identity(), (narrow,), {})
    assert out.values().dtype == torch.int32
    assert (out.values().tolist(), out.lengths().tolist()) == ([4, 2, 0, 5], [1, 1, 0, 2])


def test_a_batch_without_padding_is_handed_on_as_it_is() -> None:
    batch = two_features([1, 4, 2, 0, 5])
    assert leave_padding_out(batch, {"a": 0}) is batch
    empty = KeyedJaggedTensor(
        keys=["a", "b"], values=torch.zeros(0).long(), lengths=torch.zeros(0).long()
    )
    assert leave_padding_out(empty, {"a": 0}) is empty
    both = leave_padding_out(batch, {"a": 4, "b": 5})
    assert (both.values().tolist(), both.lengths().tolist()) == ([1, 2, 0], [1, 1, 0, 1])


def test_tables_of_one_feature_must_agree_on_padding_where_bags_are_pooled() -> None:
    summed, mean = make_tables()[:2]
    other = replace(mean, padding_idx=None)
    text = (
        "feature 'x' looks up tables 'summed' and 'mean', which get the same ids, and padding_idx "
        "is 3 and None: .* give both the same, or each a feature of its own"
    )
    with pytest.raises(ValueError, match=text):
        se.EmbeddingBagCollection([summed, other])
    collection = se.EmbeddingBagCollection([summed, mean])
    collection.embedding_bags["mean"].padding_idx = None
    with pytest.raises(ValueError, match=text):
        se.plan_sharding(collection, Env())
    sequences = se.EmbeddingCollection([summed, replace(other, pooling="sum")])
    assert se.plan_sharding(sequences, Env()).tables


def test_what_trains_a_table_is_told_of_rows_that_stay() -> None:
    tables = [replace(table, frozen_rows=5) for table in make_tables()[:3]]
    collections = find_collections(se.EmbeddingBagCollection(tables))
    found = {name: table.training for name, table in tables_of(collections).items()}
    assert {(t.frozen_rows, t.padding_idx) for t in found.values()} == {(5, 3), (5, None)}
    on_cpu = se.EmbeddingBagCollection(tables, device="cpu")
    for bag in on_cpu.embedding_bags.values():
        bag.weight._optimizer_classes = [torch.optim.SGD]
        bag.weight._optimizer_kwargs = [{"lr": 0.1}]
    found = {n: table.training for n, table in tables_of(find_collections(on_cpu)).items()}
    assert {(t.frozen_rows, t.padding_idx) for t in found.values()} == {(5, 3), (5, None)}


def test_frozen_rows_of_an_unsharded_collection_get_no_gradient() -> None:
    tables = [replace(table, frozen_rows=5) for table in make_tables()]
    collection = se.EmbeddingBagCollection(tables, device="cpu")
    batch = batch_of(20, 0)
    loss_of(values_of(collection(batch)), 20).backward()
    for name, weight in collection.named_parameters():
        if "frozen" in name:
            assert weight.grad is None
            continue
        assert weight.grad is not None
        assert not weight.grad[:5].any()
        assert weight.grad[5:].any()
