"""Rows that the compiled kernels update, against the formulas written out in float64."""

from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from shardemb import optim
from shardemb.native.kernels import OPTIMIZERS, Block, Blocks, Merged, Training
from shardemb.optim import SparseOptimizer
from shardemb.updates.rounding import round_stochastically
from tests.native_cases import (
    DTYPES,
    THREADS,
    WIDTHS,
    Case,
    Shape,
    levels,
    make_case,
    needs_kernels,
    threads,
)
from tests.reference import dense_step

pytestmark = needs_kernels
CONFIGS: dict[str, SparseOptimizer] = {
    "sgd": optim.SGD(lr=0.1),
    "sgd_momentum": optim.SGD(lr=0.1, momentum=0.9, weight_decay=0.02),
    "lars": optim.LarsSGD(lr=0.5, eta=0.02, weight_decay=0.05),
    "adagrad": optim.Adagrad(lr=0.1, eps=1e-4, weight_decay=0.02),
    "row_wise_adagrad": optim.RowWiseAdagrad(lr=0.1, eps=1e-4, weight_decay=0.02),
    "adam": optim.Adam(lr=0.1, betas=(0.8, 0.95), eps=1e-4, weight_decay=0.02),
    "adam_w": optim.AdamW(lr=0.1, betas=(0.8, 0.95), eps=1e-4, weight_decay=0.02),
    "partial_adam": optim.PartialRowWiseAdam(lr=0.1, eps=1e-4, weight_decay=0.02),
    "lamb": optim.LAMB(lr=0.1, eps=1e-4, weight_decay=0.02),
    "partial_lamb": optim.PartialRowWiseLAMB(lr=0.1, eps=1e-4, weight_decay=0.02),
}
INT16, INT32 = torch.int16, torch.int32


@dataclass(frozen=True, kw_only=True)
class How:
    """What of an update is not the optimizer's; the fields of `Training`."""

    num_updates: int = 3
    scale: float = 1.0
    first_row: int = 0
    first_column: int = 0
    frozen_rows: int = 0
    padding_row: int = -1
    key: int = 77
    stochastic: int = 0


def as_bits(values: Tensor) -> Tensor:
    return values.view(INT16 if values.element_size() == 2 else INT32)


def state_of(optimizer: SparseOptimizer, weight_RD: Tensor) -> dict[str, Tensor]:
    """State of a block in the middle of training."""
    num_rows, width = weight_RD.shape
    shapes = {"row": (num_rows,), "element": (num_rows, width)}
    generator = torch.Generator().manual_seed(9)
    return {
        name: torch.rand(shapes[per], generator=generator) for name, per in optimizer.state.items()
    }


def training_of(
    optimizer: SparseOptimizer, state: dict[str, Tensor], how: How, *, embedding_dim: int
) -> Training:
    settings = vars(optimizer)
    beta1, beta2 = settings.get("betas", (0.0, 0.0))
    max_gradient = optimizer.max_gradient
    return Training(
        momentum=state["momentum1"].data_ptr() if "momentum1" in state else None,
        square=state["exp_avg_sq"].data_ptr() if "exp_avg_sq" in state else None,
        lr=optimizer.lr,
        eps=settings.get("eps", 0.0),
        weight_decay=optimizer.weight_decay,
        momentum_factor=settings.get("momentum", 0.0),
        beta1=beta1,
        beta2=beta2,
        eta=settings.get("eta", 0.0),
        max_gradient=-1.0 if max_gradient is None else max_gradient,
        correction1=1 - beta1**how.num_updates,
        correction2=(1 - beta2**how.num_updates) ** 0.5,
        embedding_dim=embedding_dim,
        optimizer=OPTIMIZERS.index(type(optimizer).__name__),
        **{field.name: getattr(how, field.name) for field in fields(how)},
    )


@dataclass(kw_only=True)
class Updated:
    """A case's blocks after one update, with their state."""

    case: Case
    states: list[dict[str, Tensor]]
    bad_rows: list[int]


def update(
    case: Case,
    optimizer: SparseOptimizer,
    how: How | None = None,
    *,
    level: int | None = None,
) -> Updated:
    """Updates copies of a case's rows."""
    copy = case.copied()
    states = [state_of(optimizer, weight) for weight in copy.weights]
    trainings = [
        training_of(optimizer, state, how or How(), embedding_dim=weight.shape[1])
        for state, weight in zip(states, copy.weights, strict=True)
    ]
    merged = copy.merged(level)
    return Updated(case=copy, states=states, bad_rows=merged.update(trainings))


def looked_up(case: Case, block: int) -> Tensor:
    """Whether each row was looked up [R]."""
    touched_R = torch.zeros(len(case.weights[block]), dtype=torch.bool)
    touched_R[case.merged().rows(block)[0]] = True
    return touched_R


def check(case: Case, optimizer: SparseOptimizer, how: How, *, rounding: float = 2e-6) -> None:
    """Compares an update with the formulas of `tests/reference.py`."""
    updated = update(case, optimizer, how)
    assert updated.bad_rows == [-1, -1]
    _, gradients, _ = case.reference()
    for block, old_RD in enumerate(case.weights):
        numbers_R = torch.arange(len(old_RD)) + how.first_row
        moves_R = looked_up(case, block)
        moves_R &= (numbers_R >= how.frozen_rows) & (numbers_R != how.padding_row)
        assert moves_R.any()
        assert not moves_R.all()
        old_state = state_of(optimizer, old_RD)
        wide = {
            name: (values if values.dim() == 2 else values[:, None].expand_as(old_RD)).double()
            for name, values in old_state.items()
        }
        new_RD, new_state = dense_step(
            optimizer,
            old_RD.double(),
            gradients[block] * how.scale,
            wide,
            num_updates=how.num_updates,
        )
        found_RD = updated.case.weights[block]
        torch.testing.assert_close(
            found_RD[moves_R].double(), new_RD[moves_R], rtol=rounding, atol=rounding
        )
        assert not torch.equal(found_RD[moves_R], old_RD[moves_R])
        assert torch.equal(as_bits(found_RD[~moves_R]), as_bits(old_RD[~moves_R]))
        for name, values in updated.states[block].items():
            expected = new_state[name] if values.dim() == 2 else new_state[name][:, 0]
            torch.testing.assert_close(
                values[moves_R].double(), expected[moves_R], rtol=rounding, atol=rounding
            )
            assert torch.equal(values[~moves_R], old_state[name][~moves_R])


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("width", WIDTHS)
def test_every_optimizer_equals_its_formula_in_float64(width: int, name: str) -> None:
    check(make_case(Shape(widths=(width, width), longest=2)), CONFIGS[name], How())


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_are_scaled_and_then_limited(name: str) -> None:
    limited = replace(CONFIGS[name], max_gradient=0.5)
    check(make_case(Shape(longest=2)), limited, How(scale=0.125, num_updates=1000))


@pytest.mark.parametrize("name", CONFIGS)
def test_frozen_rows_and_the_padding_row_stay_as_they_are(name: str) -> None:
    how = How(first_row=100, frozen_rows=107, padding_row=111)
    case = make_case(Shape(num_bags=200, widths=(12, 12)))
    check(case, CONFIGS[name], how)
    assert looked_up(case, 0)[[0, 6, 7, 11]].all()


@pytest.mark.parametrize(
    "shape", [Shape(weighted=True), Shape(pooling="mean"), Shape(pooling=None)]
)
def test_every_pooling_brings_its_gradients(shape: Shape) -> None:
    check(make_case(replace(shape, longest=2)), CONFIGS["adagrad"], How())


def test_rows_of_zeros_move_at_the_plain_rate() -> None:
    for name in ("lars", "lamb", "partial_lamb"):
        case = make_case(Shape(longest=2))
        for weight in case.weights:
            weight.zero_()
        check(case, CONFIGS[name], How())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("first_column", [0, 4, 6, 129])
def test_rounding_by_chance_is_that_of_the_formulas(first_column: int, dtype: torch.dtype) -> None:
    """SGD with numbers of few digits is exact in float32, so its rounding must be the same."""
    how = How(first_column=first_column, first_row=1000, stochastic=1, key=-(2**62) - 5)
    optimizer = optim.SGD(lr=2.0**-13)
    for width in WIDTHS:
        case = make_case(Shape(widths=(width, width), dtype=dtype))
        updated = update(case, optimizer, how)
        _, gradients, _ = case.reference()
        for block, old_RD in enumerate(case.weights):
            exact_RD = old_RD.double() - optimizer.lr * gradients[block]
            assert torch.equal(exact_RD.float().double(), exact_RD)
            expected_RD = round_stochastically(
                exact_RD.float(),
                dtype,
                key=how.key,
                rows_U=torch.arange(len(old_RD)) + how.first_row,
                first_column=first_column,
                num_updates=how.num_updates,
            )
            touched_R = looked_up(case, block)
            found_RD = updated.case.weights[block]
            assert torch.equal(as_bits(found_RD[touched_R]), as_bits(expected_RD[touched_R]))
            assert (found_RD.double() != exact_RD)[touched_R].any()


def test_slices_of_the_columns_draw_the_bits_of_whole_rows() -> None:
    optimizer, width = optim.SGD(lr=2.0**-13), 50
    case = make_case(Shape(widths=(width, width), dtype=torch.float16, pooling=None))
    whole = update(case, optimizer, How(stochastic=1)).case.weights[0]
    assert not torch.equal(whole, case.weights[0])
    for first, last in ((0, 4), (4, 21), (21, 22), (23, 50)):
        part = replace(
            case,
            weights=[weight[:, first:last].contiguous() for weight in case.weights],
            grad=case.grad[:, first:last].contiguous(),
        )
        found = update(part, optimizer, How(stochastic=1, first_column=first)).case.weights[0]
        assert torch.equal(as_bits(found), as_bits(whole[:, first:last]))


def set_rows(values_RD: Tensor, dtype: torch.dtype, *, stochastic: int) -> tuple[Tensor, list[int]]:
    """Rows of zeros that an update of SGD makes to be these values, in the dtype."""
    num_rows, width = values_RD.shape
    case = make_case(Shape(num_bags=num_rows))
    weight_RD = torch.zeros(num_rows, width, dtype=dtype)
    bags = replace(
        case.bags,
        ids_N=torch.arange(num_rows),
        offsets=torch.arange(num_rows + 1),
        num_features=1,
    )
    blocks = Blocks([Block(weight_RD=weight_RD, first_feature=0, num_features=1, first_column=0)])
    merged = Merged(blocks)
    grad = -values_RD.contiguous()
    merged.sort([(bags, grad)])
    how = How(stochastic=stochastic)
    return weight_RD, merged.update([training_of(optim.SGD(lr=1.0), {}, how, embedding_dim=width)])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [1, 16, 37])
def test_rounding_to_the_nearest_is_torchs_cast(width: int, dtype: torch.dtype) -> None:
    """All values, the ties between neighbours and what is next to those; subnormals too."""
    every = torch.arange(2**15 - 1).to(INT16).view(dtype)
    every = every[every.isfinite()].float()
    ties = (every[1:].double() + every[:-1].double()).div(2).float()
    towards = torch.tensor([torch.inf])
    near = [every, ties, torch.nextafter(ties, towards), torch.nextafter(ties, -towards)]
    values = torch.cat([*near, *(-part for part in near)])
    values = values[: len(values) // width * width].view(-1, width)
    found_RD, bad_rows = set_rows(values, dtype, stochastic=0)
    assert bad_rows == [-1]
    is_negative_zero = (values == 0) & values.signbit()  # 0 - 0 is not
    assert torch.equal(
        as_bits(found_RD)[~is_negative_zero], as_bits(values.to(dtype))[~is_negative_zero]
    )


@pytest.mark.parametrize("stochastic", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_what_the_dtype_cannot_hold_is_reported(dtype: torch.dtype, stochastic: int) -> None:
    top = torch.finfo(dtype).max
    tie = 65520.0 if dtype == torch.float16 else float.fromhex("0x1.ffp127")  # goes to infinity
    below = torch.nextafter(torch.tensor(tie), torch.tensor(0.0)).item()
    values = torch.tensor([[1.0, top], [1.0, below], [-below, 1.0], [1.0, tie], [-tie, 2.0]])
    found_RD, bad_rows = set_rows(values, dtype, stochastic=stochastic)
    assert bad_rows == [3]
    assert torch.equal(found_RD[:3], values[:3].to(dtype))
    assert not found_RD[3:].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("num_bags", [60, 30_000])
def test_a_row_that_would_not_be_finite_stays_as_it_was(
    num_bags: int, name: str, dtype: torch.dtype
) -> None:
    """The other rows are updated, as if it had not been looked up."""
    shape = Shape(widths=(5, 5), dtype=dtype, pooling=None, num_rows=500)
    case = make_case(replace(shape, num_bags=num_bags))
    plain = update(case, CONFIGS[name])
    bad_R = torch.zeros(500, dtype=torch.bool)
    touched_R = looked_up(case, 0)
    bad_R[touched_R.nonzero()[[3, 9, -1], 0]] = True
    end = int(case.bags.offsets[2 * case.bags.num_bags])
    grad = case.grad.clone()
    extremes = (torch.inf, -torch.inf, torch.nan)
    for row, extreme in zip(bad_R.nonzero().flatten(), extremes, strict=True):
        place = (case.bags.ids_N[:end] == row).nonzero()[-1, 0]
        grad[place, row % 5] = extreme
    updated = update(replace(case, grad=grad), CONFIGS[name])
    assert updated.bad_rows == [bad_R.nonzero()[0, 0].item(), -1]
    old = [case.weights[0], *state_of(CONFIGS[name], case.weights[0]).values()]
    new = [updated.case.weights[0], *updated.states[0].values()]
    expected = [plain.case.weights[0], *plain.states[0].values()]
    for was, found, good in zip(old, new, expected, strict=True):
        assert torch.equal(found[bad_R], was[bad_R])
        assert torch.equal(found[~bad_R], good[~bad_R])
    assert torch.equal(updated.case.weights[1], plain.case.weights[1])


def test_a_state_that_overflows_is_reported_too() -> None:
    """Its square is beyond float32, while the row itself would stay finite."""
    for name in ("adagrad", "row_wise_adagrad", "adam", "partial_adam", "lamb", "partial_lamb"):
        case = make_case(Shape(pooling=None, widths=(20, 20)))
        case.grad[0] = 1e25
        updated = update(case, CONFIGS[name])
        row = int(case.bags.ids_N[0])
        assert updated.bad_rows == [row, -1]
        assert torch.equal(updated.case.weights[0][row], case.weights[0][row])


def collect(case: Case, optimizer: SparseOptimizer, **where: Any) -> list[Tensor]:
    how = How(stochastic=int(case.weights[0].dtype != torch.float32))
    updated = update(case, optimizer, how, **where)
    states = [values for state in updated.states for values in state.values()]
    return [as_bits(values) for values in [*updated.case.weights, *states]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_threads_and_levels_update_to_the_same_bits(name: str, dtype: torch.dtype) -> None:
    limited = replace(CONFIGS[name], max_gradient=2.0)
    for num_bags, width in ((300, 100), (12_000, 7)):
        case = make_case(Shape(widths=(width, width), dtype=dtype, num_bags=num_bags, num_rows=300))
        case.grad.normal_(generator=torch.Generator().manual_seed(5))
        found = []
        for level in levels():
            for number in THREADS:
                with threads(number):
                    found.append(collect(case, limited, level=level))
        for other in found:
            assert all(torch.equal(*pair) for pair in zip(found[0], other, strict=True))


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_micro_batches_are_one_update(name: str) -> None:
    """Two lookups in one sort equal one lookup that has the bags of both."""
    shape = Shape(pooling="sum", num_bags=64, longest=3)
    first, second = make_case(shape), make_case(replace(shape, seed=1))
    second = replace(second, weights=first.weights)
    copy = first.copied()
    states = [state_of(CONFIGS[name], weight) for weight in copy.weights]
    merged = Merged(copy.blocks())
    merged.sort([(first.bags, first.grad), (second.bags, second.grad)])
    trainings = [training_of(CONFIGS[name], state, How(), embedding_dim=20) for state in states]
    assert merged.update(trainings) == [-1, -1]
    gradients = [a + b for a, b in zip(first.reference()[1], second.reference()[1], strict=True)]
    for block, old_RD in enumerate(first.weights):
        touched_R = looked_up(first, block) | looked_up(second, block)
        wide = {n: v.double() for n, v in state_of(CONFIGS[name], old_RD).items()}
        new_RD, _ = dense_step(
            CONFIGS[name], old_RD.double(), gradients[block], wide, num_updates=3
        )
        new_RD[~touched_R] = old_RD.double()[~touched_R]
        torch.testing.assert_close(copy.weights[block].double(), new_RD, rtol=2e-6, atol=2e-6)
