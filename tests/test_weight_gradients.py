"""The gradients of the weights of weighted bags, against plain torch in float64."""

# N ids, K traits of an id, B samples

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torchrec import KeyedJaggedTensor

import shardemb as se
from shardemb import init, layouts, optim
from shardemb.collectives import CollectiveCounter
from shardemb.env import Env
from shardemb.errors import RunError
from shardemb.layouts import Layout
from shardemb.optimizer import Optimizer
from shardemb.updates.weight_gradients import codes
from tests.every_layout import Case, Loss, batch_of, check_rows, loss_of, whole_table
from tests.plans import NEEDS_NATIVE
from tests.reference import Reference
from tests.spmd import spmd
from tests.test_every_layout import every_layout

ADAGRAD = optim.Adagrad(lr=0.1)
SMALL = init.Uniform(low=-0.3, high=0.3)


def table(name: str, *feature_names: str, **fields: Any) -> se.TableConfig:
    given: dict[str, Any] = {
        "name": name,
        "num_embeddings": 53,
        "embedding_dim": 16,
        "feature_names": feature_names,
        "optimizer": ADAGRAD,
        "init": SMALL,
    }
    return se.TableConfig(**given | fields)


def make_tables(**changed: Any) -> list[se.TableConfig]:
    """Two features on one table, one feature in two tables, a padding row, two widths."""
    return [
        table("user", "user", padding_idx=2, **changed),
        table("item", "item", "clicked", **changed),
        table("wide", "tag", "item", embedding_dim=32, **changed),
    ]


def learning(batch: KeyedJaggedTensor, dtype: torch.dtype = torch.float32) -> KeyedJaggedTensor:
    """The same ids with weights of their own that require a gradient."""
    return KeyedJaggedTensor(
        keys=batch.keys(),
        values=batch.values(),
        lengths=batch.lengths(),
        weights=batch.weights().detach().to(dtype).clone().requires_grad_(),
    )


def numbered(case: Case, number: int, rank: int) -> KeyedJaggedTensor:
    """A rank's batch; every other has its features in another order, and none of the last rank."""
    batch = batch_of(case, number, rank)
    if number % 2:
        batch = batch.permute(list(reversed(range(len(batch.keys())))))
    if number % 4 == 3 and rank == len(case.num_samples) - 1:
        none = torch.zeros_like(batch.lengths())
        ids_N, weights_N = batch.values()[:0], batch.weights()[:0]
        batch = KeyedJaggedTensor(keys=batch.keys(), values=ids_N, lengths=none, weights=weights_N)
    return batch


def check(env: Env, case: Case) -> None:
    """Compares the gradients of weights in steps of two batches each, and the rows afterwards."""
    plain = case.collection("cpu")
    before = {
        name.split(".")[1]: weight.detach().clone() for name, weight in plain.named_parameters()
    }
    reference = Reference(case.tables, before)
    model = Loss(case, case.collection("meta"))
    sharded = se.shard_modules(model, se.plan_sharding(model, env, case.where), env)
    optimizer = se.build_optimizer(sharded)
    for step in range(2):
        optimizer.zero_grad()
        for number in (2 * step, 2 * step + 1):
            mine = learning(numbered(case, number, env.rank))
            sharded(mine)[0].backward()
            losses = []
            for rank in range(env.world_size):
                batch = learning(numbered(case, number, rank), torch.float64)
                out = reference.forward(batch)
                losses.append(loss_of(out, batch.stride(), linear=case.linear))
                if rank == env.rank:
                    (expected_N,) = torch.autograd.grad(
                        losses[-1], batch.weights(), retain_graph=True
                    )
            assert mine.weights().grad is not None
            case.assert_close(mine.weights().grad, expected_N, f"weights of batch {number}")
            assert len(expected_N) == 0 or expected_N.abs().max() > 0.1
            torch.stack(losses).mean().backward()
        optimizer.step()
        reference.step()
    check_rows(case, reference, before, sharded.state_dict(), optimizer.state_dict()["state"])


def cases(env: Env, layout: Layout) -> Iterator[Case]:
    """Tables of one layout: all trained, some frozen, all frozen, of 16 bits."""
    frozen = make_tables(trainable=False)
    for tables in (make_tables(), [frozen[0], *make_tables()[1:]], frozen):
        yield case_of(env, tables, layout)
    if layout != layouts.data_parallel():
        halves = make_tables(dtype="bfloat16", rounding="nearest")
        yield case_of(env, halves, layout, tolerance=8e-3, linear=True)  # an ulp of bfloat16


def case_of(env: Env, tables: Sequence[se.TableConfig], layout: Layout, **fields: Any) -> Case:
    return Case(
        tables=tables,
        where={table.name: layout for table in tables},
        num_samples=[3 + 2 * rank for rank in range(env.world_size)],
        weighted=True,
        **fields,
    )


def all_in_one(env: Env) -> Case:
    where = {layout.torchrec_name: layout for layout in every_layout(env)}
    tables = [table(name, name, "shared", embedding_dim=16) for name in where]
    return Case(
        tables=tables,
        where=where,
        num_samples=[3 + 2 * rank for rank in range(env.world_size)],
        weighted=True,
    )


@NEEDS_NATIVE
@spmd(world_size=1)
def test_gradients_of_weights_equal_float64_on_one_rank(env: Env) -> None:
    for layout in every_layout(env):
        for case in cases(env, layout):
            check(env, case)
    check(env, all_in_one(env))


@NEEDS_NATIVE
@spmd(world_size=2)
def test_gradients_of_weights_equal_float64_on_two_ranks(env: Env) -> None:
    for layout in every_layout(env):
        for case in cases(env, layout):
            check(env, case)
    check(env, all_in_one(env))


@NEEDS_NATIVE
@spmd(world_size=4, num_nodes=2)
def test_gradients_of_weights_equal_float64_on_two_nodes(env: Env) -> None:
    for layout in every_layout(env):
        check(env, case_of(env, make_tables(), layout))
    check(env, all_in_one(env))


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of the model below: rows, their width, traits of an id, and learning rates."""

    rows: int = 40
    width: int = 8
    traits: int = 3
    lr: float = 0.5


SIZES = Sizes()


class Attention(nn.Module):
    """Weighs clicked items by a score of their traits and of the user's row.

    Args:
        users: Looks up the user of a sample.
        items: Looks up its weighted items.
    """

    def __init__(self, users: nn.Module, items: nn.Module) -> None:
        super().__init__()
        self.users, self.items = users, items
        self.of_traits = nn.Linear(SIZES.traits, 1)
        self.of_user = nn.Linear(SIZES.width, 1, bias=False)
        with torch.no_grad():
            for weight in (*self.of_traits.parameters(), *self.of_user.parameters()):
                weight.copy_(torch.linspace(-1, 1, weight.numel()).view_as(weight))

    def forward(self, batch: Mapping[str, Any]) -> torch.Tensor:
        user_BD = self.users(batch["user"])["user"]
        clicked, traits_NK = batch["clicked"], batch["traits"]
        scores_B = self.of_user(user_BD).squeeze(1)
        scores_N = self.of_traits(traits_NK).squeeze(1)
        scores_N = torch.sigmoid(scores_N + scores_B.repeat_interleave(clicked.lengths()))
        weighted = KeyedJaggedTensor(
            keys=clicked.keys(),
            values=clicked.values(),
            lengths=clicked.lengths(),
            weights=scores_N,
        )
        pooled_BD = self.items(weighted)["clicked"]
        loss: torch.Tensor = (pooled_BD.sum(1) - 1.0).square().mean()
        return loss


class Plain(nn.Module):
    """A collection of one table in plain torch, float64."""

    def __init__(self, name: str, weight: torch.Tensor) -> None:
        super().__init__()
        self.name, self.weight = name, nn.Parameter(weight.double())

    def forward(self, batch: KeyedJaggedTensor) -> dict[str, torch.Tensor]:
        weights_N = batch.weights_or_none()
        pooled_BD = nn.functional.embedding_bag(
            batch.values(),
            self.weight,
            batch.offsets(),
            mode="sum",
            include_last_offset=True,
            per_sample_weights=weights_N,
        )
        return {self.name: pooled_BD}


def sample(number: int) -> tuple[int, list[int], torch.Tensor]:
    """A user, the items it clicked, of which there may be none, and their traits."""
    generator = torch.Generator().manual_seed(number)
    count = number % 5
    items = torch.randint(0, SIZES.rows, (count,), generator=generator).tolist()
    return number % 7, items, torch.randn(count, SIZES.traits, generator=generator)


def of_samples(numbers: Sequence[int], dtype: torch.dtype) -> dict[str, Any]:
    users, items, traits = zip(*map(sample, numbers), strict=True)
    return {
        "user": KeyedJaggedTensor.from_lengths_sync(
            ["user"], torch.tensor(users), torch.ones(len(numbers), dtype=torch.int64)
        ),
        "clicked": KeyedJaggedTensor.from_lengths_sync(
            ["clicked"],
            torch.tensor([item for of in items for item in of]),
            torch.tensor([len(of) for of in items]),
        ),
        "traits": torch.cat(traits).to(dtype),
    }


def parts(num_steps: int, env: Env) -> list[list[int]]:
    """This rank's samples of each micro-batch; the last rank has most."""
    found = []
    for step in range(num_steps):
        first = 12 * step
        cut = first + 12 if env.world_size == 1 else first + 5
        found.append([*range(first, cut)] if env.rank == 0 else [*range(cut, first + 12)])
    return found


def train_plain(start: Mapping[str, torch.Tensor], num_steps: int, micro: int) -> nn.Module:
    model = Attention(Plain("user", start["user"]), Plain("clicked", start["item"])).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=SIZES.lr)
    for step in range(num_steps):
        optimizer.zero_grad()
        numbers = range(12 * micro * step, 12 * micro * (step + 1))
        model(of_samples(numbers, torch.float64)).backward()
        optimizer.step()
    return model


def attention_tables() -> dict[str, se.TableConfig]:
    same: dict[str, Any] = {
        "num_embeddings": SIZES.rows,
        "embedding_dim": SIZES.width,
        "optimizer": optim.SGD(lr=SIZES.lr),
        "init": SMALL,
    }
    return {
        "user": se.TableConfig(name="user", feature_names=("user",), **same),
        "item": se.TableConfig(name="item", feature_names=("clicked",), **same),
    }


def check_attention(env: Env, layout: Layout, micro: int) -> None:
    """Trains attention scores by the pipeline, as one process does with plain torch."""
    tables = attention_tables()
    start = {
        name: next(se.EmbeddingBagCollection([one], device="cpu").parameters()).detach().clone()
        for name, one in tables.items()
    }
    sharded, before, pipeline = attention_pipeline(env, layout, micro)
    loader = [of_samples(numbers, torch.float32) for numbers in parts(4 * micro, env)]
    assert len(list(pipeline.run(loader, num_steps=4))) == 4
    expected = train_plain(start, 4, micro).state_dict()
    state: dict[str, Any] = sharded.state_dict()
    assert not torch.allclose(before, state["of_traits.weight"], atol=1e-2)
    for name in ("of_traits.weight", "of_traits.bias", "of_user.weight"):
        torch.testing.assert_close(state[name].double(), expected[name], rtol=1e-4, atol=1e-5)
    for path, name in (("users", "user"), ("items", "item")):
        rows_RD = whole_table(state[f"{path}.embedding_bags.{name}.weight"], start[name])
        torch.testing.assert_close(
            rows_RD.double(), expected[f"{path}.weight"], rtol=1e-4, atol=1e-5
        )


def attention_pipeline(
    env: Env, layout: Layout, micro: int
) -> tuple[nn.Module, torch.Tensor, se.TrainPipeline]:
    """The sharded model, its weights of traits at the start, and what trains it."""
    tables = attention_tables()
    model = Attention(
        se.EmbeddingBagCollection([tables["user"]]),
        se.EmbeddingBagCollection([tables["item"]], is_weighted=True),
    )
    before = model.of_traits.weight.detach().clone()
    where = {"user": layouts.table_wise(rank=env.world_size - 1), "item": layout}
    sharded = se.shard_modules(model, se.plan_sharding(model, env, where), env)
    optimizer = se.build_optimizer(sharded, dense=lambda p: torch.optim.SGD(p, lr=SIZES.lr))
    return sharded, before, se.TrainPipeline(sharded, optimizer, env, num_micro_batches=micro)


@NEEDS_NATIVE
@spmd(world_size=1)
def test_attention_scores_train_on_one_rank_as_in_plain_torch(env: Env) -> None:
    check_attention(env, layouts.row_wise(), micro=1)
    check_attention(env, layouts.data_parallel(), micro=2)
    sharded, _, pipeline = attention_pipeline(env, layouts.row_wise(), micro=1)
    wrong = of_samples(range(3), torch.float32)
    wrong["clicked"].values()[0] = SIZES.rows
    with pytest.raises(ValueError, match="id 40 is outside"):  # in the loader: no forward ran
        next(pipeline.run([wrong], num_steps=1))
    assert not sharded.get_submodule("module.items").weights_learn


@NEEDS_NATIVE
@spmd(world_size=2)
def test_attention_scores_train_on_two_ranks_as_in_plain_torch(env: Env) -> None:
    check_attention(env, layouts.row_wise(), micro=1)
    check_attention(env, layouts.table_wise(rank=0), micro=2)
    check_attention(env, layouts.data_parallel(), micro=1)


def one_table(env: Env, layout: Layout, **given: Any) -> tuple[nn.Module, Optimizer]:
    model = nn.Sequential(
        se.EmbeddingBagCollection([table("item", "item")], is_weighted=True, seed=3)
    )
    plan = se.plan_sharding(model, env, {"item": layout}, **given)
    sharded = se.shard_modules(model, plan, env)
    return sharded, se.build_optimizer(sharded)


def of_weights(weights_N: torch.Tensor) -> KeyedJaggedTensor:
    """Bags of ids 0, 1, 2, ..., two each."""
    count = len(weights_N)
    return KeyedJaggedTensor(
        keys=["item"],
        values=torch.arange(count),
        lengths=torch.full((count // 2,), 2),
        weights=weights_N,
    )


@NEEDS_NATIVE
@spmd(world_size=2)
def test_ranks_agree_in_the_first_batch_whether_weights_get_gradients(env: Env) -> None:
    rows_RD = next(
        se.EmbeddingBagCollection([table("item", "item")], device="cpu", seed=3).parameters()
    ).detach()
    model, _ = one_table(env, layouts.row_wise())
    for first in range(2):  # one rank's weights alone, first or later
        mine = torch.ones(4, requires_grad=env.rank == first)
        model(of_weights(mine)).values().sum().backward()
        if env.rank == first:
            torch.testing.assert_close(mine.grad, rows_RD[:4].sum(1))
        else:
            assert mine.grad is None

    model, _ = one_table(env, layouts.row_wise())
    model(of_weights(torch.ones(4)))
    with torch.no_grad():
        model(of_weights(torch.ones(4, requires_grad=True)))
    with pytest.raises(
        ValueError, match=r"\['item'\] got weights that .* in its first batch those"
    ):
        model(of_weights(torch.ones(4, requires_grad=True)))


@NEEDS_NATIVE
@spmd(world_size=2)
def test_weights_without_a_gradient_cost_no_exchange(env: Env) -> None:
    counts = []
    for kernel in ("native", "fbgemm"):
        model, _ = one_table(env, layouts.row_wise(), kernel=kernel)
        model(of_weights(torch.ones(4)))
        with CollectiveCounter() as counter:
            model(of_weights(torch.ones(4))).values().sum().backward()
            with torch.no_grad():
                model(of_weights(torch.ones(4, requires_grad=True)))
        counts.append({kind: vars(count) for kind, count in counter.counts.items()})
    assert counts[0] == counts[1] != {}


@NEEDS_NATIVE
@spmd(world_size=1)
def test_rows_must_not_change_between_a_lookup_and_its_backward_pass(env: Env) -> None:
    model, optimizer = one_table(env, layouts.table_wise(rank=0))
    early = model(of_weights(torch.ones(4, requires_grad=True))).values().sum()
    model(of_weights(torch.ones(4, requires_grad=True))).values().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(RunError, match=r"rows of tables \['item'\] were changed after a lookup"):
        early.backward()


@NEEDS_NATIVE
@spmd(world_size=2)
def test_a_converted_embedding_bag_gives_weights_their_gradient(env: Env) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.EmbeddingBag(10, 4, mode="sum"))
    ids = torch.tensor([[1, 2, 3], [3, 3, 9]])
    expected = torch.ones(2, 3, requires_grad=True)
    plain[0](ids, per_sample_weights=expected).square().sum().backward()
    bag = se.from_torch(plain, optim.SGD(lr=0.1), weighted=["0"])
    whole = torch.ones(2, 3, requires_grad=True)
    bag[0](ids, per_sample_weights=whole).square().sum().backward()
    torch.testing.assert_close(whole.grad, expected.grad)
    plan = se.plan_sharding(bag, env, {"0": layouts.row_wise()})
    sharded = se.shard_modules(bag, plan, env)
    se.build_optimizer(sharded)
    split = torch.ones(2, 3, requires_grad=True)
    sharded.module[0](ids, per_sample_weights=split).square().sum().backward()
    torch.testing.assert_close(split.grad, expected.grad)


def test_more_ids_than_codes_are_refused() -> None:
    with pytest.raises(ValueError, match="on 4 ranks each may have 536870911; make it of more"):
        codes(1 << 29, rank=0, world_size=4)
