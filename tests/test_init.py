"""Initial values: a pure function of (seed, table, row)."""

import numpy as np
import pytest

from shardemb.init import Constant, Init, Normal, Uniform

INITS: list[Init] = [Uniform(low=-0.5, high=0.25), Normal(std=0.1), Constant(value=2.0)]


@pytest.mark.parametrize("init", INITS, ids=lambda init: type(init).__name__)
@pytest.mark.parametrize("embedding_dim", [1, 3, 4, 6, 8, 12, 100])
def test_any_block_of_rows_equals_the_same_rows_of_the_whole(
    init: Init, embedding_dim: int
) -> None:
    whole = init.rows(seed=7, table="t", first_row=0, num_rows=50, embedding_dim=embedding_dim)
    assert whole.shape == (50, embedding_dim)
    assert whole.dtype == np.float32
    for first in (0, 1, 13, 49):
        block = init.rows(
            seed=7, table="t", first_row=first, num_rows=50 - first, embedding_dim=embedding_dim
        )
        assert np.array_equal(block, whole[first:])


@pytest.mark.parametrize("init", INITS[:2], ids=lambda init: type(init).__name__)
def test_rows_tables_and_seeds_differ(init: Init) -> None:
    def draw(seed: int = 0, table: str = "a", first_row: int = 0) -> list[float]:
        rows = init.rows(seed=seed, table=table, first_row=first_row, num_rows=1, embedding_dim=8)
        return list(map(float, rows.ravel()))

    drawn = [draw(), draw(seed=1), draw(seed=-1), draw(table="b"), draw(first_row=1)]
    assert draw() == drawn[0]
    values = [value for row in drawn for value in row]
    assert len(set(values)) == len(values)


def test_first_rows_are_these_on_every_machine() -> None:
    rows = Uniform(low=0.0, high=1.0).rows(
        seed=0, table="user", first_row=10**12, num_rows=1, embedding_dim=4
    )
    expected = [0.752699077129364, 0.39389151334762573, 0.5056994557380676, 0.6959232091903687]
    assert rows.tolist() == [expected]


def test_uniform_and_normal_have_their_moments() -> None:
    uniform = Uniform(low=-1.0, high=3.0).rows(
        seed=0, table="t", first_row=0, num_rows=20_000, embedding_dim=16
    )
    assert -1.0 <= uniform.min() < -0.999
    assert 2.999 < uniform.max() < 3.0
    assert abs(uniform.mean() - 1.0) < 0.01
    assert abs(uniform.std() - 4 / 12**0.5) < 0.01
    normal = Normal(std=0.5).rows(seed=0, table="t", first_row=0, num_rows=20_000, embedding_dim=16)
    assert abs(normal.mean()) < 0.005
    assert abs(normal.std() - 0.5) < 0.005
    assert abs(np.corrcoef(normal[:, 0], normal[:, 1])[0, 1]) < 0.03
    assert abs((np.abs(normal) < 0.5).mean() - 0.6827) < 0.005


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Uniform(low=1.0, high=1.0), "low must be less than high, got 1.0 and 1.0"),
        (lambda: Uniform(low=0.0, high=float("nan")), "low must be less than high"),
        (lambda: Normal(std=0.0), "std must be a positive number, got 0.0"),
        (lambda: Constant(value=float("inf")), "value must be finite, got inf"),
    ],
)
def test_impossible_distributions_are_refused(make: object, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()  # type: ignore[operator]
