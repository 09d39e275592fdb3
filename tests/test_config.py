"""Tables refuse what they cannot be."""

from typing import Any

import pytest
import torch

from shardemb import EmbeddingBagCollection, EmbeddingCollection, TableConfig
from shardemb.config import check_tables
from shardemb.init import Normal

GOOD: dict[str, Any] = {
    "name": "user",
    "num_embeddings": 10,
    "embedding_dim": 8,
    "feature_names": ("user_id",),
}


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"name": ""}, "name must be a non-empty string without dots"),
        ({"name": "a.b"}, "table 'a.b': name must be a non-empty string without dots"),
        ({"num_embeddings": 0}, "table 'user': num_embeddings must be a positive integer, got 0"),
        ({"num_embeddings": 1.5}, "num_embeddings must be a positive integer, got 1.5"),
        ({"num_embeddings": 2**31}, "num_embeddings must be at most 2147483647, got 2147483648"),
        ({"embedding_dim": 0}, "embedding_dim must be a positive integer, got 0"),
        ({"embedding_dim": -4}, "embedding_dim must be a positive integer, got -4"),
        ({"feature_names": "user_id"}, r"got the string 'user_id'; use \('user_id',\)"),
        ({"feature_names": ()}, "feature_names must hold at least one name"),
        ({"feature_names": ("a", "a")}, "feature_names names a feature twice"),
        ({"pooling": "max"}, "pooling must be 'sum' or 'mean', got 'max'"),
        ({"dtype": "float64"}, "dtype must be 'float32', 'float16' or 'bfloat16', got 'float64'"),
        ({"trainable": None}, "trainable must be True or False, got None"),
        ({"out_of_range": "mod"}, "'raise', 'drop', 'clamp', 'hash' or 'oov_row', got 'mod'"),
        ({"optimizer": "adagrad"}, "optimizer must be one of shardemb.optim"),
        ({"init": 0.5}, "init must be one of shardemb.init"),
        ({"frozen_rows": -1}, "frozen_rows must be an integer in 0..9, got -1"),
        ({"frozen_rows": True}, "frozen_rows must be an integer in 0..9, got True"),
        ({"frozen_rows": 11}, "frozen_rows must be an integer in 0..9, got 11"),
        ({"frozen_rows": 10}, "frozen_rows=10 are all its rows; say trainable=False instead"),
        ({"padding_idx": 10}, "padding_idx must be None or an integer in -10..9, got 10"),
        ({"padding_idx": -11}, "padding_idx must be None or an integer in -10..9, got -11"),
        ({"padding_idx": False}, "padding_idx must be None or an integer in -10..9, got False"),
        (
            {"padding_idx": -1, "out_of_range": "oov_row"},
            "padding_idx=-1 is the row that out_of_range='oov_row' keeps for unknown ids",
        ),
        (
            {"padding_idx": 0, "out_of_range": "hash"},
            "out_of_range='hash' sends the id 0 to some other row, and other ids to the row pad",
        ),
    ],
)
def test_a_bad_table_is_refused_by_name(changed: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        TableConfig(**GOOD | changed)


def test_padding_is_counted_from_the_end_where_it_is_negative() -> None:
    assert TableConfig(**GOOD | {"padding_idx": -10}).padding_idx == 0
    last = TableConfig(**GOOD | {"padding_idx": -1, "out_of_range": "clamp"})
    assert last.padding_idx == 9
    assert TableConfig(**GOOD | {"padding_idx": 8, "out_of_range": "oov_row"}).padding_idx == 8


def test_an_unknown_field_is_refused() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'rows'"):
        TableConfig(**GOOD | {"rows": 5})


def test_default_init_is_uniform_within_one_over_root_of_rows() -> None:
    init = TableConfig(**GOOD | {"num_embeddings": 100}).initial_values
    assert (init.low, init.high) == (-0.1, 0.1)  # type: ignore[union-attr]


def test_tables_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="table 'user' is declared twice"):
        check_tables((TableConfig(**GOOD), TableConfig(**GOOD)))
    with pytest.raises(ValueError, match="at least one table, got none"):
        check_tables(())


@pytest.mark.parametrize("make", [EmbeddingBagCollection, EmbeddingCollection])
def test_whole_tables_have_the_dtype_that_is_declared_and_its_initial_values(make: Any) -> None:
    drawn = {}
    for dtype in ("float32", "float16", "bfloat16"):
        table = TableConfig(**GOOD | {"dtype": dtype, "init": Normal(std=100.0)})
        (weight,) = make([table], device="cpu").parameters()
        assert weight.dtype == getattr(torch, dtype)
        drawn[dtype] = weight.detach()
        (on_meta,) = make([table]).parameters()
        assert on_meta.dtype == weight.dtype
    for dtype, rows in drawn.items():
        assert torch.equal(rows, drawn["float32"].to(getattr(torch, dtype)))


@pytest.mark.parametrize("make", [EmbeddingBagCollection, EmbeddingCollection])
def test_a_name_that_torch_keeps_for_itself_is_refused(make: Any) -> None:
    with pytest.raises(ValueError, match=r"table 'half': torch's modules .*, such as 'half_table'"):
        make([TableConfig(**GOOD | {"name": "half"})])
