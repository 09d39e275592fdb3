"""The id guard: what it refuses of a batch that TorchRec would look up, and what it lets pass."""

import re
from typing import Any

import pytest
import torch
from torchrec import KeyedJaggedTensor

from shardemb.data.guarded_forward import CheckedBatch
from shardemb.data.id_guard import FeatureLimit, IdGuard

GUARD = IdGuard([FeatureLimit(feature="x", table="t", num_embeddings=5)])
WEIGHTED = IdGuard([FeatureLimit(feature="x", table="t", num_embeddings=5)], is_weighted=True)


def batch_of(
    values: torch.Tensor, lengths: list[int], weights: torch.Tensor | None = None
) -> KeyedJaggedTensor:
    return KeyedJaggedTensor(
        keys=["x"], values=values, lengths=torch.tensor(lengths), weights=weights
    )


@pytest.mark.parametrize(
    ("values", "lengths", "text"),
    [
        (torch.tensor([1.0]), [1, 0], "ids must be int32 or int64 of one dimension, got torch.flo"),
        (torch.tensor([[1]]), [1, 0], "int64 of one dimension, got torch.int64 [1, 1]; convert"),
        (torch.tensor([1]), [2, -1], "feature 'x', sample 1: the length of a bag must not be nega"),
        (torch.tensor([1]), [1, 1], "lengths add up to 2, but the batch has 1 ids"),
        (torch.tensor([1, 7]), [0, 2], "feature 'x', sample 1: id 7 is outside 0..4 of table 't'"),
        (torch.tensor([1, -1]), [1, 1], "feature 'x', sample 1: id -1 is outside 0..4 of table "),
        (torch.tensor([7]), [1], "TableConfig whose out_of_range is 'drop', 'clamp', 'hash' or"),
    ],
)
def test_malformed_ids_and_lengths_are_refused(
    values: torch.Tensor, lengths: list[int], text: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        GUARD.check(batch_of(values, lengths))


def test_lengths_are_named_by_their_feature_and_must_be_as_many_as_bags() -> None:
    guard = IdGuard([FeatureLimit(feature=f, table=f, num_embeddings=9) for f in ("a", "b")])
    ids = torch.arange(4)
    batch = KeyedJaggedTensor(keys=["a", "b"], values=ids, lengths=torch.tensor([2, 1, 3, -2]))
    with pytest.raises(ValueError, match="feature 'b', sample 1: the length of a bag must not be"):
        guard.check(batch)
    batch = KeyedJaggedTensor(keys=["a", "b"], values=ids, lengths=torch.tensor([2, 1, 1]))
    with pytest.raises(ValueError, match=r"2 features and 1 samples must have 2 lengths, .* got 3"):
        guard.check(batch)
    narrow = KeyedJaggedTensor(
        keys=["a", "b"], values=ids, lengths=torch.tensor([2, 1, 1, 0], dtype=torch.int16)
    )
    with pytest.raises(ValueError, match="lengths must be int32 or int64 of one dimension, got to"):
        guard.check(narrow)
    by_offsets = KeyedJaggedTensor(
        keys=["a", "b"], values=ids, offsets=torch.tensor([0, 3, 2, 3, 4])
    )
    with pytest.raises(ValueError, match=r"feature 'a', sample 1: .* got -1; offsets, if there ar"):
        guard.check(by_offsets)


def test_weights_must_be_as_the_collection_uses_them() -> None:
    ids, weights = torch.tensor([1, 2, 3]), torch.tensor([0.5, 1.0, -2.0])
    WEIGHTED.check(batch_of(ids, [1, 0, 2], weights))
    GUARD.check(batch_of(ids, [1, 0, 2]))
    with pytest.raises(ValueError, match="the batch has weights, and the tables do not use them"):
        GUARD.check(batch_of(ids, [1, 0, 2], weights))
    with pytest.raises(ValueError, match="the batch has no weights, and the tables are of a weig"):
        WEIGHTED.check(batch_of(ids, [1, 0, 2]))
    with pytest.raises(ValueError, match=r"weights must be float32 \[3\], .* got torch.float64"):
        WEIGHTED.check(batch_of(ids, [1, 0, 2], weights.double()))
    with pytest.raises(ValueError, match=r"weights must be float32 \[3\], .* \[2\]"):
        WEIGHTED.check(batch_of(ids, [1, 0, 2], weights[:2]))
    for bad in (float("nan"), float("inf"), -float("inf")):
        weights[2] = bad
        with pytest.raises(ValueError, match=f"feature 'x', sample 2: a weight is {bad}; leave"):
            WEIGHTED.check(batch_of(ids, [1, 0, 2], weights))


def test_a_feature_of_two_tables_is_held_to_the_smaller() -> None:
    limits = [
        FeatureLimit(feature="x", table="large", num_embeddings=9),
        FeatureLimit(feature="x", table="small", num_embeddings=3),
    ]
    with pytest.raises(ValueError, match=r"outside 0..2 of table 'small'"):
        IdGuard(limits).check(batch_of(torch.tensor([4]), [1]))


def test_a_feature_that_is_there_twice_is_refused() -> None:
    ids = torch.tensor([1, 2])
    batch = KeyedJaggedTensor(keys=["x", "x"], values=ids, lengths=torch.tensor([1, 1]))
    with pytest.raises(ValueError, match=r"has a feature twice: \['x', 'x'\]"):
        GUARD.check(batch)


def test_empty_batches_and_other_features_pass() -> None:
    GUARD.check(
        KeyedJaggedTensor(
            keys=["y", "x"], values=torch.tensor([99, 4]), lengths=torch.tensor([1, 1])
        )
    )
    GUARD.check(batch_of(torch.tensor([], dtype=torch.int64), [0, 0]))
    GUARD.check(batch_of(torch.tensor([4], dtype=torch.int32), [1]))


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


def two_features(**carried: Any) -> KeyedJaggedTensor:
    return KeyedJaggedTensor(
        keys=["a", "b"],
        values=torch.arange(4),
        **{"lengths": torch.tensor([2, 1, 1, 0])} | carried,
    )


def test_offsets_and_sums_that_contradict_the_lengths_are_refused() -> None:
    guard = IdGuard([FeatureLimit(feature=f, table=f, num_embeddings=9) for f in ("a", "b")])
    offsets = torch.tensor([0, 2, 3, 4, 4])
    guard.check(two_features(offsets=offsets.int(), length_per_key=[3, 1]))
    guard.check(two_features(length_per_key=[3, 1], offset_per_key=[0, 3, 4]))
    guard.check(two_features(lengths=None, offsets=offsets))
    guard.check(two_features().permute([1, 0]))
    for bad in (torch.tensor([0, 1, 3, 4, 4]), torch.tensor([1, 2, 3, 4, 4])):
        with pytest.raises(
            ValueError, match=r"has offsets \[., ., 3, 4, 4\], .* be \[0, 2, 3, 4, 4\]; "
        ):
            guard.check(two_features(offsets=bad))
    with pytest.raises(ValueError, match=r"the batch has offsets .* make the batch of one of them"):
        guard.check(two_features(lengths=None, offsets=torch.tensor([1, 2, 3, 4, 5])))
    with pytest.raises(
        ValueError, match=r"has length_per_key \[2, 2\], .* it would be \[3, 1\]; le"
    ):
        guard.check(two_features(length_per_key=[2, 2]))
    with pytest.raises(
        ValueError, match=r"has offset_per_key \[0, 2, 4\], .* be \[0, 3, 4\]; leave"
    ):
        guard.check(two_features(length_per_key=[3, 1], offset_per_key=[0, 2, 4]))


def test_lengths_without_integers_are_named_before_samples_are_counted() -> None:
    batch = batch_of(torch.tensor([1, 2]), [1, 1])
    batch._lengths = torch.tensor([1.0, 1.0])  # TorchRec's constructor refuses it, its fields not
    with pytest.raises(
        ValueError, match=r"lengths must be int32 or int64 .* got torch.float32 \[2"
    ):
        GUARD.check_features(batch)
