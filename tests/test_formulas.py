"""Updates of gathered rows against dense float64 tables and against torch.optim."""

# R rows, U touched rows, D columns

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torchrec import KeyedJaggedTensor

import shardemb as se
from shardemb import optim
from shardemb.optim import SparseOptimizer
from shardemb.updates.formulas import RowSums, finish, update_rows
from tests.reference import Reference

NUM_STEPS, NUM_ROWS, WIDTH = 20, 12, 8

PLAIN: list[SparseOptimizer] = [
    optim.SGD(lr=0.05),
    optim.SGD(lr=0.05, momentum=0.9),
    optim.LarsSGD(lr=0.5, eta=0.1),
    optim.Adagrad(lr=0.1),
    optim.RowWiseAdagrad(lr=0.1),
    optim.Adam(lr=0.05),
    optim.AdamW(lr=0.05),
    optim.PartialRowWiseAdam(lr=0.05),
    optim.LAMB(lr=0.05),
    optim.PartialRowWiseLAMB(lr=0.05),
]
CHANGES: dict[str, Any] = {
    "lr": 0.02,
    "eps": 0.3,
    "eta": 0.2,
    "momentum": 0.5,
    "weight_decay": 0.2,
    "max_gradient": 0.7,
    "betas": (0.7, 0.9),
}


def name_of(optimizer: SparseOptimizer) -> str:
    return optimizer.plan_name


def start() -> Tensor:
    """Rows of which the first two are zeros."""
    generator = torch.Generator().manual_seed(0)
    rows_RD = torch.randn(NUM_ROWS, WIDTH, generator=generator, dtype=torch.float64)
    rows_RD[:2] = 0
    return rows_RD


def gradients(*, all_rows: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
    """For each step the rows that it touches and their gradients, of which some are zeros."""
    generator = torch.Generator().manual_seed(1)
    for step in range(NUM_STEPS):
        touched_R = torch.rand(NUM_ROWS, generator=generator) < 0.5
        touched_R[step % 2 :: 5] = True
        if all_rows:
            touched_R[:] = True
        (rows_U,) = touched_R.nonzero(as_tuple=True)
        grad_UD = torch.randn(len(rows_U), WIDTH, generator=generator, dtype=torch.float64)
        grad_UD[step % 3 :: 4] *= 0
        yield rows_U, grad_UD


def empty_state(optimizer: SparseOptimizer) -> dict[str, Tensor]:
    shapes = {"row": (NUM_ROWS,), "element": (NUM_ROWS, WIDTH)}
    return {
        name: torch.zeros(shapes[per], dtype=torch.float64) for name, per in optimizer.state.items()
    }


Update = Callable[[SparseOptimizer, Tensor, Tensor, dict[str, Tensor], int], Tensor]


def update_whole(
    optimizer: SparseOptimizer,
    weight_UD: Tensor,
    grad_UD: Tensor,
    state: dict[str, Tensor],
    num_updates: int,
) -> Tensor:
    return finish(sums_of(optimizer, weight_UD, grad_UD, state, num_updates))


def sums_of(
    optimizer: SparseOptimizer,
    weight_UD: Tensor,
    grad_UD: Tensor,
    state: dict[str, Tensor],
    num_updates: int,
) -> RowSums:
    return update_rows(
        type(optimizer),
        vars(optimizer),
        weight_UD=weight_UD,
        grad_UD=grad_UD,
        state=state,
        num_updates=num_updates,
        embedding_dim=WIDTH,
    )


def train(
    optimizer: SparseOptimizer, *, update: Update = update_whole, all_rows: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """Rows and state of the whole table after all steps."""
    weight_RD, state = start(), empty_state(optimizer)
    for step, (rows_U, grad_UD) in enumerate(gradients(all_rows=all_rows), start=1):
        gathered = {name: values[rows_U] for name, values in state.items()}
        weight_RD[rows_U] = update(optimizer, weight_RD[rows_U], grad_UD, gathered, step)
        for name, values in gathered.items():
            state[name][rows_U] = values
    return weight_RD, state


def train_reference(optimizer: SparseOptimizer, **fields: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The same, by ids that are looked up and a loss whose gradient is the one given."""
    table = se.TableConfig(
        name="t",
        num_embeddings=NUM_ROWS,
        embedding_dim=WIDTH,
        feature_names=("t",),
        optimizer=optimizer,
        **fields,
    )
    reference = Reference([table], {"t": start()})
    for rows_U, grad_UD in gradients():
        ids = KeyedJaggedTensor(keys=["t"], values=rows_U, lengths=torch.ones_like(rows_U))
        (reference.forward_sequences(ids)["t"] * grad_UD).sum().backward()
        reference.step()
    return reference.weights["t"].detach(), reference.state["t"]


def assert_equal(actual: tuple[Tensor, dict[str, Tensor]], expected: Any, what: str) -> None:
    weight_RD, state = actual
    torch.testing.assert_close(weight_RD, expected[0], rtol=1e-12, atol=1e-12, msg=what)
    assert list(state) == list(expected[1])
    for name, values in state.items():
        whole = values.view(NUM_ROWS, -1).expand(NUM_ROWS, WIDTH)
        torch.testing.assert_close(whole, expected[1][name], rtol=1e-12, atol=1e-12, msg=what)


@pytest.mark.parametrize("plain", PLAIN, ids=name_of)
def test_every_optimizer_and_each_of_its_options_equal_dense_float64(
    plain: SparseOptimizer,
) -> None:
    after = train(plain)
    assert_equal(after, train_reference(plain), plain.plan_name)
    assert (after[0] != start()).any(1).all()  # rows of zeros too
    for option, value in CHANGES.items():
        if option not in vars(plain) or (option == "momentum" and not plain.state):
            continue
        changed = replace(plain, **{option: value})
        other = train(changed)
        assert (other[0] - after[0]).abs().max() > 1e-3, option
        assert_equal(other, train_reference(changed), f"{changed}")


@pytest.mark.parametrize("plain", PLAIN, ids=name_of)
def test_sums_over_column_slices_make_slices_equal_the_whole(plain: SparseOptimizer) -> None:
    def update_slices(
        optimizer: SparseOptimizer,
        weight_UD: Tensor,
        grad_UD: Tensor,
        state: dict[str, Tensor],
        num_updates: int,
    ) -> Tensor:
        columns = [slice(0, 3), slice(3, WIDTH)]
        own = [
            {
                name: values[:, of_slice].clone() if values.dim() == 2 else values.clone()
                for name, values in state.items()
            }
            for of_slice in columns
        ]
        slices = [
            sums_of(optimizer, weight_UD[:, c], grad_UD[:, c], of, num_updates)
            for c, of in zip(columns, own, strict=True)
        ]
        pieces = run_together(slices)
        for name, values in state.items():
            if values.dim() == 2:
                values.copy_(torch.cat([of[name] for of in own], 1))
            else:
                assert torch.equal(own[0][name], own[1][name])
                values.copy_(own[0][name])
        return torch.cat(pieces, 1)

    for optimizer in (plain, replace(plain, weight_decay=0.1, max_gradient=0.7)):
        expected = train(optimizer)
        weight_RD, state = train(optimizer, update=update_slices)
        torch.testing.assert_close(weight_RD, expected[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(state, expected[1], rtol=1e-12, atol=1e-12)


def run_together(slices: list[RowSums]) -> list[Tensor]:
    """The new rows of slices that exchange their sums; all must ask as often."""
    sums: list[Tensor | None] = [None] * len(slices)
    while True:
        asked, done = [], []
        for one, total in zip(slices, sums, strict=True):
            try:
                asked.append(next(one) if total is None else one.send(total))
            except StopIteration as end:
                done.append(end.value)
        if done:
            assert not asked
            return done
        sums = [torch.stack(asked).sum(0)] * len(slices)


def recorded(sums: RowSums, asked: list[Tensor]) -> RowSums:
    """Passes on what an update asks for, and keeps it."""
    try:
        asked.append(next(sums))
        while True:
            total_UK = yield asked[-1]
            asked.append(sums.send(total_UK))
    except StopIteration as end:
        new_UD: Tensor = end.value
        return new_UD


@pytest.mark.parametrize("plain", PLAIN, ids=name_of)
def test_only_what_needs_whole_rows_asks_for_sums(plain: SparseOptimizer) -> None:
    once = (
        optim.RowWiseAdagrad,
        optim.PartialRowWiseAdam,
        optim.LAMB,
        optim.PartialRowWiseLAMB,
        optim.LarsSGD,
    )
    expected = int(isinstance(plain, once)) + isinstance(plain, optim.PartialRowWiseLAMB)
    for optimizer, number in ((plain, expected), (replace(plain, max_gradient=1.0), expected + 1)):
        weight_UD, grad_UD = start()[2:5].float(), start()[5:8].float()
        state = {
            name: torch.ones(3) if per == "row" else torch.ones(3, WIDTH)
            for name, per in optimizer.state.items()
        }
        before = copy.deepcopy((weight_UD, grad_UD))
        asked: list[Tensor] = []
        new_UD = finish(recorded(sums_of(optimizer, weight_UD, grad_UD, state, 1), asked))
        assert [tuple(sums.shape)[:1] for sums in asked] == [(3,)] * number
        assert {sums.dtype for sums in asked} | {new_UD.dtype} == {torch.float32}
        assert torch.equal(weight_UD, before[0])
        assert torch.equal(grad_UD, before[1])


@pytest.mark.parametrize(
    ("optimizer", "of_torch"),
    [
        (optim.SGD(lr=0.1, weight_decay=0.1), torch.optim.SGD),
        (optim.SGD(lr=0.1, momentum=0.9, weight_decay=0.1), torch.optim.SGD),
        (optim.Adagrad(lr=0.1, eps=1e-3, weight_decay=0.1), torch.optim.Adagrad),
        (optim.Adam(lr=0.1, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.1), torch.optim.Adam),
        (optim.AdamW(lr=0.1, betas=(0.8, 0.95), eps=1e-3), torch.optim.AdamW),
    ],
    ids=["SGD", "SGD with momentum", "Adagrad", "Adam", "AdamW"],
)
def test_where_all_rows_are_touched_it_is_torch_optim(
    optimizer: SparseOptimizer, of_torch: Callable[..., torch.optim.Optimizer]
) -> None:
    weight = start().requires_grad_()
    options = {name: value for name, value in vars(optimizer).items() if name != "max_gradient"}
    plain = of_torch([weight], **options)
    for _, grad in gradients(all_rows=True):
        weight.grad = grad
        plain.step()
    after, _ = train(optimizer, all_rows=True)
    torch.testing.assert_close(after, weight.detach(), rtol=1e-12, atol=1e-12)


def test_lazy_adam_is_torchs_sparse_adam_but_for_the_place_of_eps() -> None:
    def sparse_adam(eps: float) -> Tensor:
        weight = start().requires_grad_()
        plain = torch.optim.SparseAdam([weight], lr=0.1, eps=eps)
        for rows_U, grad_UD in gradients():
            weight.grad = torch.sparse_coo_tensor(
                rows_U[None], grad_UD, weight.shape, check_invariants=True
            )
            plain.step()
        return weight.detach()

    after, _ = train(optim.Adam(lr=0.1, eps=1e-14))
    torch.testing.assert_close(after, sparse_adam(1e-14), rtol=1e-10, atol=1e-10)
    coarse, _ = train(optim.Adam(lr=0.1, eps=0.1))
    assert (coarse - sparse_adam(0.1)).abs().max() > 1e-2


def test_the_first_step_of_adam_is_lr_in_the_direction_of_the_gradient() -> None:
    weight_UD = start()[2:5]
    grad_UD = torch.linspace(-1.05, 1.0, 3 * WIDTH, dtype=torch.float64).view(3, WIDTH)
    zeros = {name: torch.zeros_like(grad_UD) for name in ("momentum1", "exp_avg_sq")}
    adam = optim.Adam(lr=0.1, eps=1e-12)
    first = update_whole(adam, weight_UD, grad_UD, copy.deepcopy(zeros), 1)
    torch.testing.assert_close(first, weight_UD - 0.1 * grad_UD.sign(), rtol=1e-9, atol=1e-9)
    hundredth = update_whole(adam, weight_UD, grad_UD, zeros, 100)  # a row touched late
    bias = (1 - 0.999**100) ** 0.5 / (1 - 0.9**100) * 0.1 / 0.001**0.5
    expected = weight_UD - 0.1 * bias * grad_UD.sign()
    torch.testing.assert_close(hundredth, expected, rtol=1e-9, atol=1e-9)


def test_a_row_or_gradient_of_zeros_has_no_trust_ratio() -> None:
    grad_UD = torch.tensor([[3.0, 4.0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    weight_UD = torch.tensor([[0.0, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]])
    zeros = torch.zeros(3, 4)
    lars = optim.LarsSGD(lr=0.1, weight_decay=0.5)
    new_UD = update_whole(lars, weight_UD, grad_UD, {"momentum1": zeros.clone()}, 1)
    expected = torch.tensor([[-0.3, -0.4, 0, 0], [0, 0, 0, 0], [0.95, 0, 0, 0]])
    torch.testing.assert_close(new_UD, expected)
    for kind, shape in ((optim.LAMB, (3, 4)), (optim.PartialRowWiseLAMB, (3,))):
        state = {"momentum1": zeros.clone(), "exp_avg_sq": torch.zeros(shape)}
        new_UD = update_whole(kind(lr=0.1), weight_UD, grad_UD, state, 1)
        assert torch.equal(new_UD[1:], weight_UD[1:])
        assert (new_UD[0, :2] < -0.05).all()


def test_momentum_may_end() -> None:
    weight_UD, grad_UD = torch.ones(2, 1, 4)
    state = {"momentum1": torch.full((1, 4), 5.0)}
    new_UD = update_whole(optim.SGD(lr=0.1), weight_UD, grad_UD, state, 2)
    torch.testing.assert_close(new_UD, torch.full((1, 4), 0.9))
    assert torch.equal(state["momentum1"], torch.ones(1, 4))


@pytest.mark.parametrize("plain", PLAIN, ids=name_of)
def test_a_step_that_touches_no_rows_is_possible(plain: SparseOptimizer) -> None:
    state = {name: values[:0] for name, values in empty_state(plain).items()}
    optimizer = replace(plain, max_gradient=1.0)
    nothing = torch.zeros(0, WIDTH, dtype=torch.float64)
    assert update_whole(optimizer, nothing, nothing, state, 1).shape == (0, WIDTH)


def test_the_reference_leaves_frozen_and_padding_rows_as_they_are() -> None:
    sgd = optim.SGD(lr=0.1, momentum=0.9, weight_decay=0.1)
    free, _ = train_reference(sgd)
    fixed, state = train_reference(sgd, frozen_rows=3, padding_idx=7)
    still = torch.tensor([0, 1, 2, 7])
    others = torch.tensor([row for row in range(NUM_ROWS) if row not in still])
    assert torch.equal(fixed[still], start()[still])
    assert not state["momentum1"][still].any()
    assert (free[still] != start()[still]).any(1).all()
    assert torch.equal(fixed[others], free[others])


def test_the_reference_clips_the_norm_of_all_gradients() -> None:
    sgd = optim.SGD(lr=1.0)
    tables = [
        se.TableConfig(
            name=name, num_embeddings=4, embedding_dim=4, feature_names=(name,), optimizer=sgd
        )
        for name in ("a", "b")
    ]
    before = {"a": torch.zeros(4, 4), "b": torch.ones(4, 4)}
    ids = KeyedJaggedTensor(
        keys=["a", "b"], values=torch.tensor([0, 0, 1]), lengths=torch.tensor([2, 1])
    )
    for max_norm, scale in ((1.0, 0.2), (10.0, 1.0)):
        reference = Reference(tables, before)
        bias = torch.nn.Parameter(torch.zeros(9))
        out = reference.forward(ids)
        (out["a"][0, 0] + out["b"][0, 1] * 2 + bias.sum() * 4 / 3).backward()  # 2 + 2**2 + 4**2
        (out["a"].new_zeros(()) + reference.weights["b"][1, 0]).backward()  # and 1: 25
        reference.step(max_norm=max_norm, dense=[bias])
        torch.testing.assert_close(
            [reference.weights["a"][0, 0].item(), reference.weights["b"][1].tolist()[:2]],
            [-2.0 * scale, [1 - scale, 1 - 2 * scale]],
            rtol=1e-5,
            atol=1e-5,
        )
        torch.testing.assert_close(bias.grad, torch.full((9,), 4 / 3 * scale))
