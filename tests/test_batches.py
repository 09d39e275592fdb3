"""Batches from lists and arrays, and the id guard."""

from typing import Any

import numpy as np
import pytest
import torch
from torchrec import KeyedJaggedTensor

import shardemb as se
from shardemb.data.guarded_forward import CheckedBatch
from shardemb.data.id_guard import FeatureLimit, IdGuard

TABLES = [
    se.TableConfig(name="user", num_embeddings=10, embedding_dim=4, feature_names=("user_id",)),
    se.TableConfig(
        name="item", num_embeddings=5, embedding_dim=4, feature_names=("item_id", "clicked")
    ),
]
FULL: dict[str, Any] = {"user_id": [[1], [9]], "item_id": [[0], [4]], "clicked": [[], [1, 1, 3]]}


def test_lists_arrays_and_padded_arrays_make_the_same_batch() -> None:
    from_lists = se.keyed_jagged_tensor(FULL, TABLES)
    from_arrays = se.keyed_jagged_tensor(
        {
            "user_id": np.array([1, 9], dtype=np.int32),
            "item_id": torch.tensor([0, 4]),
            "clicked": np.array([[-1, -1, -1], [1, 1, 3]]),
        },
        TABLES,
    )
    for batch in (from_lists, from_arrays):
        assert batch.keys() == ["user_id", "item_id", "clicked"]
        assert batch.values().tolist() == [1, 9, 0, 4, 1, 1, 3]
        assert batch.lengths().tolist() == [1, 1, 1, 1, 0, 3]
        assert batch.values().dtype == torch.int64


def test_bags_may_be_arrays() -> None:
    bags = [np.array([1, 2], dtype=np.int32), np.array([], dtype=np.float64)]
    batch = se.keyed_jagged_tensor(FULL | {"clicked": bags}, TABLES)
    assert batch["clicked"].values().tolist() == [1, 2]
    assert batch["clicked"].lengths().tolist() == [2, 0]


def test_weights_that_no_table_would_use_are_refused() -> None:
    guard = IdGuard([FeatureLimit(feature="x", table="t", num_embeddings=5)])
    batch = KeyedJaggedTensor(
        keys=["x"], values=torch.tensor([1]), lengths=torch.tensor([1]), weights=torch.ones(1)
    )
    with pytest.raises(ValueError, match="the batch has weights, and the tables do not use them"):
        guard.check(batch)


def test_a_feature_that_is_there_twice_is_refused() -> None:
    guard = IdGuard([FeatureLimit(feature="x", table="t", num_embeddings=5)])
    ids = torch.tensor([1, 2])
    batch = KeyedJaggedTensor(keys=["x", "x"], values=ids, lengths=torch.tensor([1, 1]))
    with pytest.raises(ValueError, match=r"has a feature twice: \['x', 'x'\]"):
        guard.check(batch)


def test_a_checked_batch_is_known_again_only_as_it_was() -> None:
    ids, lengths = torch.tensor([1, 2]), torch.tensor([1, 1])
    batch = KeyedJaggedTensor(keys=["x", "y"], values=ids, lengths=lengths)
    checked = CheckedBatch(batch)
    assert checked.is_in(batch)
    assert checked.is_in(KeyedJaggedTensor(keys=["x", "y"], values=ids, lengths=lengths))
    assert not checked.is_in(KeyedJaggedTensor(keys=["y", "x"], values=ids, lengths=lengths))
    other = torch.tensor([0, 2])
    assert not checked.is_in(KeyedJaggedTensor(keys=["x", "y"], values=ids, lengths=other))
    ids.mul_(100)
    assert not checked.is_in(batch)


def test_padding_is_what_it_is_said_to_be() -> None:
    bags = FULL | {"clicked": np.array([[0, 0, 0], [1, 1, 0]])}
    batch = se.keyed_jagged_tensor(bags, TABLES, padding=0)
    assert batch["clicked"].lengths().tolist() == [0, 2]
    assert batch["item_id"].values().tolist() == [0, 4]


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        (
            {"user_id": [[1], [10]]},
            r"feature 'user_id', sample 1: id 10 is outside 0..9 of table 'us",
        ),
        (
            {"clicked": [[], [1, 1, 5]]},
            "feature 'clicked', sample 1: id 5 is outside 0..4 of table",
        ),
        ({"clicked": [[-7, 1], []]}, "feature 'clicked', sample 0: id -7 is outside"),
        (
            {"item_id": [[1], [0.5]]},
            r"feature 'item_id', sample 1: a bag must be a list of integer ",
        ),
        ({"item_id": [[1], ["a"]]}, r"feature 'item_id', sample 1: a bag .* got \['a'\]"),
        ({"item_id": [[1], None]}, "feature 'item_id', sample 1: a bag .* got None"),
        ({"item_id": [1, 2]}, "feature 'item_id', sample 0: a bag .* got 1"),
        ({"item_id": [[[1], [1, 2]], []]}, "feature 'item_id', sample 0: a bag"),
        (
            {"item_id": np.array([0.5, 1])},
            "feature 'item_id': ids must be integers, got torch.float",
        ),
        (
            {"item_id": np.zeros((2, 1, 1), dtype=int)},
            r"must be \[B\] or \[B, L\], got shape \[2, 1, 1\]",
        ),
        (
            {"item_id": [[1]]},
            "the same number of samples, got {'user_id': 2, 'item_id': 1, 'clicked': 2}",
        ),
    ],
)
def test_a_bad_batch_is_refused_as_the_user_made_it(changed: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        se.keyed_jagged_tensor(FULL | changed, TABLES)


def test_a_batch_without_a_table_s_feature_is_refused() -> None:
    with pytest.raises(ValueError, match="feature 'clicked' of table 'item' is not in the batch"):
        se.keyed_jagged_tensor({"user_id": [[1]], "item_id": [[1]]}, TABLES)
    with pytest.raises(ValueError, match="at least one feature"):
        se.keyed_jagged_tensor({}, TABLES)


@pytest.mark.parametrize(
    ("values", "lengths", "text"),
    [
        (torch.tensor([1.0]), [1, 0], r"ids must be int32 or int64 \[N\], got torch.float32"),
        (
            torch.tensor([[1]]),
            [1, 0],
            r"ids must be int32 or int64 \[N\], got torch.int64 \[1, 1\]",
        ),
        (torch.tensor([1]), [2, -1], "lengths of bags must not be negative, got -1"),
        (torch.tensor([1]), [1, 1], "lengths add up to 2, but the batch has 1 ids"),
        (torch.tensor([1, 7]), [0, 2], "sample 1: id 7 is outside 0..4"),
    ],
)
def test_the_guard_refuses_torchrec_batches_too(
    values: torch.Tensor, lengths: list[int], text: str
) -> None:
    guard = IdGuard([FeatureLimit(feature="x", table="t", num_embeddings=5)])
    batch = KeyedJaggedTensor(keys=["x"], values=values, lengths=torch.tensor(lengths))
    with pytest.raises(ValueError, match=text):
        guard.check(batch)


def test_a_feature_of_two_tables_is_held_to_the_smaller() -> None:
    limits = [
        FeatureLimit(feature="x", table="large", num_embeddings=9),
        FeatureLimit(feature="x", table="small", num_embeddings=3),
    ]
    batch = KeyedJaggedTensor(keys=["x"], values=torch.tensor([4]), lengths=torch.tensor([1]))
    with pytest.raises(ValueError, match=r"outside 0..2 of table 'small'"):
        IdGuard(limits).check(batch)


def test_empty_batches_and_other_features_pass() -> None:
    guard = IdGuard([FeatureLimit(feature="x", table="t", num_embeddings=5)])
    guard.check(
        KeyedJaggedTensor(
            keys=["y", "x"], values=torch.tensor([99, 4]), lengths=torch.tensor([1, 1])
        )
    )
    guard.check(
        KeyedJaggedTensor(
            keys=["x"], values=torch.tensor([], dtype=torch.int64), lengths=torch.tensor([0, 0])
        )
    )
