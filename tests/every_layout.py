"""Takes steps on sharded tables and compares all that they leave behind with the reference."""

# R rows, D width

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torchrec
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec import KeyedJaggedTensor

import shardemb as se
from shardemb.env import Env
from shardemb.kernel_choice import KernelChoice
from shardemb.layouts import Layout
from tests.plans import KERNELS
from tests.reference import Reference


@dataclass(frozen=True, kw_only=True)
class Case:
    """Tables of one collection and how they lie.

    Attributes:
        tables: The tables.
        where: Their layouts.
        num_samples: Of each rank in a step.
        sequence: Whether they are looked up as sequences.
        weighted: Whether bags are weighted.
        tolerance: Absolute and relative, of rows and outputs.
        num_steps: How many steps to take.
        linear: Whether the loss is linear in the rows, so that rounding errors do not grow.
        id_dtypes: Of each rank's ids; by default int64.
        kernel: What looks rows up and updates them; "auto" is the native one where it runs.
    """

    tables: Sequence[se.TableConfig]
    where: Mapping[str, Layout]
    num_samples: Sequence[int]
    sequence: bool = False
    weighted: bool = False
    num_steps: int = 3
    tolerance: float = 2e-5
    linear: bool = False
    id_dtypes: Sequence[torch.dtype] = ()
    kernel: KernelChoice = "auto"

    def collection(
        self, device: str
    ) -> torchrec.EmbeddingBagCollection | torchrec.EmbeddingCollection:
        if self.sequence:
            return se.EmbeddingCollection(self.tables, seed=3, device=device)
        return se.EmbeddingBagCollection(
            self.tables, seed=3, device=device, is_weighted=self.weighted
        )

    def assert_close(self, actual: torch.Tensor, expected: torch.Tensor, name: str) -> None:
        def message(text: str) -> str:
            return (
                f"{name}, kernel {self.kernel}, "
                f"{', '.join(f'{t} {layout}' for t, layout in self.where.items())}: {text}"
            )

        torch.testing.assert_close(
            actual.detach().cpu().double(),
            expected,
            rtol=self.tolerance,
            atol=self.tolerance,
            msg=message,
        )


def on_both_kernels(cases: Iterable[Case], *, first: int = 0) -> Iterator[Case]:
    """Each case, and every second one on FBGEMM's kernel too, where both kernels run.

    Args:
        cases: On "auto".
        first: Number of the first; an even number is tried on both.
    """
    for number, case in enumerate(cases, first):
        yield case
        if len(KERNELS) > 1 and number % 2 == 0:
            yield replace(case, kernel="fbgemm")


class Loss(nn.Module):
    """Weighs every output differently; a mean over samples."""

    def __init__(self, case: Case, collection: nn.Module) -> None:
        super().__init__()
        self.collection, self.case = collection, case

    def forward(self, batch: KeyedJaggedTensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        out = self.collection(batch)
        if self.case.sequence:
            values = {name: rows.values() for name, rows in out.items()}
        else:
            values = out.to_dict()
        return loss_of(values, batch.stride(), linear=self.case.linear), values


def loss_of(values: Mapping[str, torch.Tensor], num_samples: int, *, linear: bool) -> torch.Tensor:
    loss = torch.zeros(()).to(next(iter(values.values())))
    for position, name in enumerate(sorted(values)):
        out = values[name]
        ramp_D = torch.linspace(0.5, 2.0, out.shape[1]).to(out) * (position + 1)
        weighed = (out * ramp_D).sum(1)
        loss = loss + (weighed if linear else weighed.square()).sum() / num_samples
    return loss


def batch_of(case: Case, step: int, rank: int) -> KeyedJaggedTensor:
    """A rank's batch: ids that repeat, empty bags, and on odd ranks a feature without ids."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    rows: dict[str, int] = {}
    for table in case.tables:
        for feature in table.feature_names:
            rows[feature] = min(rows.get(feature, 1 << 30), table.num_embeddings)
    lengths, ids = [], []
    for position, feature in enumerate(rows):
        length_B = torch.randint(0, 5, (case.num_samples[rank],), generator=generator)
        if position == step % len(rows) and rank % 2:
            length_B.zero_()
        count = int(length_B.sum())
        many = torch.randint(0, rows[feature] * 2 // 3, (count,), generator=generator)
        few = torch.randint(0, 3, (count,), generator=generator)
        ids.append(torch.where(torch.arange(count) % 2 == 0, many, few))
        lengths.append(length_B)
    values = torch.cat(ids)
    weights = torch.rand(len(values), generator=generator) * 2 - 0.5 if case.weighted else None
    return KeyedJaggedTensor(
        keys=list(rows), values=values, lengths=torch.cat(lengths), weights=weights
    )


def given_to(case: Case, step: int, env: Env) -> KeyedJaggedTensor:
    """This rank's batch as the model gets it."""
    batch = batch_of(case, step, env.rank)
    if case.id_dtypes:
        batch = KeyedJaggedTensor(
            keys=batch.keys(),
            values=batch.values().to(case.id_dtypes[env.rank]),
            lengths=batch.lengths(),
            weights=batch.weights_or_none(),
        )
    return batch.to(env.device)


def check(env: Env, case: Case) -> None:
    """Compares forward, loss, rows and optimizer rows after all steps."""
    plain = case.collection("cpu")
    before = {
        name.split(".")[1]: weight.detach().clone() for name, weight in plain.named_parameters()
    }
    reference = Reference(case.tables, before)
    model = Loss(case, case.collection("meta"))
    plan = se.plan_sharding(model, env, case.where, kernel=case.kernel)
    assert {t.table: t.layout for t in plan.tables} == {
        name: layout.torchrec_name for name, layout in case.where.items()
    }
    sharded = se.shard_modules(model, plan, env)
    optimizer = se.build_optimizer(sharded)
    for step in range(case.num_steps):
        optimizer.zero_grad()
        loss, values = sharded(given_to(case, step, env))
        losses = []
        for rank in range(env.world_size):
            batch = batch_of(case, step, rank)
            expected = (reference.forward_sequences if case.sequence else reference.forward)(batch)
            losses.append(loss_of(expected, batch.stride(), linear=case.linear))
            if rank == env.rank:
                assert list(values) == list(expected)
                for name, out in values.items():
                    assert out.dtype == torch.float32
                    case.assert_close(out, expected[name].detach(), name)
                case.assert_close(loss, losses[-1].detach(), "loss")
        if loss.requires_grad:
            loss.backward()
        optimizer.step()
        torch.stack(losses).mean().backward()
        reference.step()
    check_rows(case, reference, before, sharded.state_dict(), optimizer.state_dict()["state"])


def check_rows(
    case: Case,
    reference: Reference,
    before: Mapping[str, torch.Tensor],
    state: Mapping[str, Any],
    optimizer_state: Mapping[str, Mapping[str, torch.Tensor]],
) -> None:
    prefix = "collection.embeddings" if case.sequence else "collection.embedding_bags"
    for table in case.tables:
        key = f"{prefix}.{table.name}.weight"
        weight = whole_table(state[key], before[table.name])
        if not table.trainable:
            assert torch.equal(weight, before[table.name])
            continue
        expected = reference.weights[table.name].detach()
        case.assert_close(weight, expected, table.name)
        touched_R = reference.moved[table.name]
        assert 0 < touched_R.sum() < table.num_embeddings
        assert torch.equal(weight[~touched_R], before[table.name][~touched_R])
        for name, expected in reference.state[table.name].items():
            rows_RD = optimizer_rows(optimizer_state, key, table, name)
            case.assert_close(rows_RD, expected, f"{name} of {table.name}")
            assert (rows_RD[touched_R] != 0).any(1).all()
            assert torch.equal(rows_RD[~touched_R], torch.zeros_like(rows_RD[~touched_R]))


def whole_table(weight: torch.Tensor | ShardedTensor, like: torch.Tensor) -> torch.Tensor:
    """The whole of a table, on every rank."""
    if not isinstance(weight, ShardedTensor):
        return weight.detach().to("cpu", copy=True)
    out = torch.zeros_like(like)
    for shard in weight.local_shards():
        (row, column), (rows, columns) = shard.metadata.shard_offsets, shard.metadata.shard_sizes
        out[row : row + rows, column : column + columns] = shard.tensor.cpu()
    dist.all_reduce(out)
    return out


def optimizer_rows(
    state: Mapping[str, Mapping[str, Any]], key: str, table: se.TableConfig, name: str
) -> torch.Tensor:
    """A state of a table's optimizer at full width, on every rank; a row-wise one fills its row."""
    row_wise = table.optimizer.state[name] == "row"
    shape = (table.num_embeddings, *(() if row_wise else (table.embedding_dim,)))
    found = [entry for parameter, entry in state.items() if parameter.endswith(key)]
    value = found[0][f"{table.name}.{name}"] if found else None
    pieces: list[tuple[list[int], torch.Tensor]] = []
    if isinstance(value, ShardedTensor):
        assert tuple(value.metadata().size) == shape
        pieces = [
            (list(shard.metadata.shard_offsets), shard.tensor.to("cpu", copy=True))
            for shard in value.local_shards()
        ]
    elif value is not None:
        pieces = [([0] * len(shape), value.to("cpu", copy=True))]
    of_ranks: list[list[tuple[list[int], torch.Tensor]]] = [[]] * dist.get_world_size()
    dist.all_gather_object(of_ranks, pieces)
    whole = torch.full(shape, float("nan"))
    for offsets, piece in (found for of_rank in of_ranks for found in of_rank):
        block = tuple(
            slice(first, first + size) for first, size in zip(offsets, piece.shape, strict=True)
        )
        whole[block] = piece
    return whole.view(table.num_embeddings, -1).expand(-1, table.embedding_dim)
