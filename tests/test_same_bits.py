"""Training on the native kernels gives the same bits: on any number of threads, watched or not."""

# B samples of a rank, D width

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torchrec import KeyedJaggedTensor

import shardemb as se
from shardemb import layouts, optim
from shardemb.env import Env
from shardemb.layouts import Layout
from shardemb.optim import SparseOptimizer
from tests.native_cases import threads
from tests.plans import NEEDS_NATIVE
from tests.spmd import spmd

pytestmark = NEEDS_NATIVE
ROWS, WIDTH, SAMPLES, LONGEST = 2000, 24, 128, 8
OPTIMIZERS: dict[str, tuple[SparseOptimizer, str]] = {
    "sgd": (optim.SGD(lr=0.1, momentum=0.9), "float32"),
    "adagrad": (optim.Adagrad(lr=0.1), "float16"),
    "row_wise": (optim.RowWiseAdagrad(lr=0.1), "float32"),
    "adam": (optim.Adam(lr=0.01), "bfloat16"),
    "lamb": (optim.PartialRowWiseLAMB(lr=0.01), "float32"),
    "limited": (optim.Adagrad(lr=0.1, max_gradient=0.1), "float32"),
}


def make_tables() -> list[se.TableConfig]:
    """One feature each, so that ids come in the order of samples; some rows stay as they are."""
    return [
        se.TableConfig(
            name=name,
            num_embeddings=ROWS,
            embedding_dim=WIDTH,
            feature_names=(name,),
            optimizer=optimizer,
            dtype=dtype,  # type: ignore[arg-type]
            frozen_rows=5 if name == "sgd" else 0,
            padding_idx=7 if name == "row_wise" else None,
        )
        for name, (optimizer, dtype) in OPTIMIZERS.items()
    ]


def batch_of(step: int, rank: int) -> dict[str, list[list[int]]]:
    """Bags of ids of which few are frequent."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    bags: dict[str, list[list[int]]] = {}
    for name in OPTIMIZERS:
        ids = (torch.rand(SAMPLES, LONGEST, generator=generator).pow(4) * ROWS).long()
        lengths = torch.randint(0, LONGEST + 1, (SAMPLES,), generator=generator)
        bags[name] = [
            own[:length] for own, length in zip(ids.tolist(), lengths.tolist(), strict=True)
        ]
    return bags


class Model(nn.Module):
    """The sum of a score of each sample, over as many as a rank has in a step."""

    def __init__(self, collection: nn.Module, *, dense: bool) -> None:
        super().__init__()
        self.collection = collection
        self.linear = nn.Linear(WIDTH * len(OPTIMIZERS), 1) if dense else None
        if self.linear is not None:
            nn.init.constant_(self.linear.weight, 0.5)
            nn.init.constant_(self.linear.bias, 0.1)

    def forward(self, batch: KeyedJaggedTensor) -> torch.Tensor:
        out_BD = torch.cat([self.collection(batch)[name] for name in OPTIMIZERS], 1)
        scores = self.linear(out_BD) if self.linear is not None else out_BD
        loss: torch.Tensor = (scores - 1.0).square().sum() / SAMPLES
        return loss


@dataclass(frozen=True, kw_only=True)
class Way:
    """How a model is trained.

    Attributes:
        max_norm: Of the optimizer.
        watched: Whether its health is watched.
        num_micro_batches: Of which a step's samples are made up.
        dense: Whether there are dense parameters.
    """

    max_norm: float | None = None
    watched: bool = False
    num_micro_batches: int = 1
    dense: bool = True


def where(env: Env) -> dict[str, Layout]:
    kinds: list[Layout] = [
        layouts.row_wise(),
        layouts.table_wise(rank=env.world_size - 1),
        layouts.column_wise(ranks=range(env.world_size)),
    ]
    return {name: kinds[number % 3] for number, name in enumerate(OPTIMIZERS)}


def trained(env: Env, way: Way) -> dict[str, torch.Tensor]:
    """All that training changes on this rank: rows, their states, dense parameters and theirs."""
    tables = make_tables()
    model = Model(se.EmbeddingBagCollection(tables), dense=way.dense)
    plan = se.plan_sharding(model, env, where(env), kernel="native")
    sharded = se.shard_modules(model, plan, env)
    dense = (lambda p: torch.optim.AdamW(p, lr=0.01)) if way.dense else None
    optimizer = se.build_optimizer(sharded, dense=dense, max_norm=way.max_norm)
    health = se.TrainingHealth(optimizer) if way.watched else None
    found: dict[str, torch.Tensor] = {}
    for step in range(3):
        bags, size = batch_of(step, env.rank), SAMPLES // way.num_micro_batches
        optimizer.zero_grad()
        for first in range(0, SAMPLES, size):
            part = {name: of[first : first + size] for name, of in bags.items()}
            sharded(se.keyed_jagged_tensor(part, tables)).backward()
        optimizer.step()
    for rows in optimizer.rows.blocks:
        place = f"{rows.table} {rows.first_row} {rows.first_column}"
        held = {"weight": rows.weight_RD, **rows.state}
        found |= {f"{name} of {place}": value.clone() for name, value in held.items()}
    for name, parameter in optimizer.dense_parameters.items():
        of_dense: Mapping[str, Any] = optimizer.state[parameter]
        held = {"parameter": parameter.detach(), **of_dense}
        found |= {f"{key} of {name}": value.clone() for key, value in held.items()}
    assert health is None or health.report().step == 3
    return found


def assert_same_bits(found: Mapping[str, torch.Tensor], first: Mapping[str, torch.Tensor]) -> None:
    assert list(found) == list(first)
    for name, value in found.items():
        assert torch.equal(value, first[name]), name
        assert len(value.unique()) > 10 or value.numel() < 10  # it is not what it started as


@spmd(world_size=1)
def test_threads_micro_batches_and_runs_give_the_same_bits_on_one_rank(env: Env) -> None:
    first = trained(env, Way())
    for number in (1, 2, 3):
        with threads(number):
            assert_same_bits(trained(env, Way()), first)
    whole = trained(env, Way(dense=False))  # dense gradients of parts would be sums of sums
    assert_same_bits(trained(env, Way(dense=False, num_micro_batches=4)), whole)


@spmd(world_size=2)
def test_what_is_watched_and_not_clipped_gets_the_same_bits_on_two_ranks(env: Env) -> None:
    first = trained(env, Way())
    for way in (Way(), Way(watched=True), Way(max_norm=1e6)):
        assert_same_bits(trained(env, way), first)
    parts = trained(env, Way(num_micro_batches=2))  # samples of ranks come in turns: another sum
    for name, value in parts.items():
        if value.dtype == torch.float32:  # of 16 bits the last may be rounded otherwise
            torch.testing.assert_close(value, first[name], rtol=1e-4, atol=1e-5, msg=name)
