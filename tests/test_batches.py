"""Batches of lists, arrays, padded arrays and offsets, with weights; the same from every form."""

import random
import re
from typing import Any

import numpy as np
import pytest
import torch

import shardemb as se

TABLES = [
    se.TableConfig(name="user", num_embeddings=10, embedding_dim=4, feature_names=("user_id",)),
    se.TableConfig(
        name="item", num_embeddings=5, embedding_dim=4, feature_names=("item_id", "clicked")
    ),
]
FULL: dict[str, Any] = {"user_id": [[1], [9]], "item_id": [[0], [4]], "clicked": [[], [1, 1, 3]]}
WEIGHTS: dict[str, Any] = {"user_id": [[1], [2]], "item_id": [[3], [4]], "clicked": [[], [5, 6, 7]]}
ONE = [se.TableConfig(name="t", num_embeddings=1000, embedding_dim=4, feature_names=("x",))]


def padded(bags: list[list[Any]], filler: Any, dtype: Any) -> np.ndarray[Any, Any]:
    array = np.full((len(bags), max(map(len, bags), default=0)), filler, dtype=dtype)
    for row, bag in zip(array, bags, strict=True):
        row[: len(bag)] = bag
    return array


def objects(bags: list[Any]) -> np.ndarray[Any, Any]:
    array = np.empty(len(bags), dtype=object)
    for at, bag in enumerate(bags):
        array[at] = bag
    return array


def masked(*values: float) -> Any:
    """An array whose last value is masked."""
    return np.ma.masked_equal(np.array(values), values[-1])


def nested() -> torch.Tensor:
    return torch.nested.nested_tensor(
        [torch.tensor([1, 2]), torch.tensor([3])], layout=torch.jagged
    )


def with_offsets(bags: list[list[Any]], dtype: Any) -> tuple[Any, list[int]]:
    flat = np.array([value for bag in bags for value in bag], dtype=dtype)
    return flat, [sum(map(len, bags[:at])) for at in range(len(bags))]


def forms(bags: list[list[Any]], filler: Any, dtype: Any) -> dict[str, Any]:
    """One feature in every form that takes bags."""
    arrays = [np.array(bag, dtype=dtype) for bag in bags]
    flat, offsets = with_offsets(bags, dtype)
    narrow = np.dtype(dtype).char.lower().replace("l", "i").replace("d", "f")
    return {
        "lists": bags,
        "tuples in a list": [tuple(bag) for bag in bags],
        "arrays": arrays,
        "arrays of several dtypes": [
            a.astype(narrow if i % 2 else dtype) for i, a in enumerate(arrays)
        ],
        "tensors": [torch.from_numpy(array) for array in arrays],
        "all kinds of bags": [
            [bag, array, torch.from_numpy(array), tuple(bag)][at % 4]
            for at, (bag, array) in enumerate(zip(bags, arrays, strict=True))
        ],
        "objects": objects(arrays),
        "objects of lists": objects(bags),
        "padded": padded(bags, filler, dtype),
        "padded narrow": padded(bags, filler, narrow),
        "padded tensor": torch.from_numpy(padded(bags, filler, dtype)),
        "padded, not contiguous": np.asfortranarray(padded(bags, filler, dtype)),
        "(ids, offsets)": (flat, offsets),
        "(ids, offsets) of tensors": (torch.from_numpy(flat), torch.tensor(offsets)),
        "lists with offsets": (flat.tolist(), np.array(offsets, dtype=np.int32)),
        "Offsets": se.Offsets(ids=flat, offsets=offsets),
        "Offsets to the last": se.Offsets(
            ids=flat, offsets=[*offsets, len(flat)], include_last_offset=True
        ),
    }


@pytest.mark.parametrize("seed", range(8))
def test_every_form_of_random_bags_makes_the_batch_of_their_lists(seed: int) -> None:
    draw = random.Random(seed)
    num_samples = draw.choice([1, 2, 7, 40])
    lengths = [draw.choice([0, 0, 1, 2, 5]) for _ in range(num_samples)]
    bags = [[draw.randrange(1000) for _ in range(length)] for length in lengths]
    weights = [[draw.randrange(-8, 8) / 4 for _ in bag] for bag in bags]
    weights_of = forms(weights, np.nan, np.float64)
    for form, data in forms(bags, -1, np.int64).items():
        plain = se.keyed_jagged_tensor({"x": data}, ONE)
        assert plain.weights_or_none() is None
        weighted = se.keyed_jagged_tensor({"x": data}, ONE, weights={"x": weights_of[form]})
        for batch in (plain, weighted):
            assert batch.values().tolist() == [row for bag in bags for row in bag], form
            assert batch.lengths().tolist() == lengths, form
            assert (batch.values().dtype, batch.lengths().dtype) == (torch.int64, torch.int64)
        assert weighted.weights().tolist() == [weight for bag in weights for weight in bag], form
        assert weighted.weights().dtype == torch.float32


def test_weights_need_not_repeat_the_offsets_and_may_be_in_another_form() -> None:
    bags, weights = [[1], [], [2, 3]], [[0.5], [], [1, 2]]
    ids, offsets = with_offsets(bags, np.int64)
    for data, given in (
        ((ids, offsets), [0.5, 1, 2]),
        (se.Offsets(ids=ids, offsets=offsets), torch.tensor([0.5, 1, 2], dtype=torch.bfloat16)),
        ((ids, offsets), (np.array([0.5, 1, 2]), offsets)),
        (bags, (np.array([0.5, 1, 2]), offsets)),
        (
            (ids, offsets),
            se.Offsets(ids=[0.5, 1.0, 2.0], offsets=[0, 1, 1, 3], include_last_offset=True),
        ),
    ):
        batch = se.keyed_jagged_tensor({"x": data}, ONE, weights={"x": given})
        assert batch.weights().tolist() == [0.5, 1, 2], given
        assert batch.lengths().tolist() == [1, 0, 2]
    assert weights[0] == [0.5]


@pytest.mark.parametrize(
    "ids",
    [
        np.array([1, 9], dtype=np.uint8),
        np.array([1, 9], dtype=np.uint64),
        np.array([1, 9], dtype=object),
        np.ma.array([1, 9], mask=False),
        np.array([1, 9], dtype=">i4"),
        np.array([0, 1, 0, 9])[1::2],
        torch.tensor([1, 9], dtype=torch.int16),
        torch.tensor([[0, 1], [0, 9]])[:, 1],
    ],
)
def test_an_array_of_one_dimension_is_one_id_a_sample(ids: Any) -> None:
    batch = se.keyed_jagged_tensor(FULL | {"user_id": ids}, TABLES)
    assert batch.keys() == ["user_id", "item_id", "clicked"]
    assert batch.values().tolist() == [1, 9, 0, 4, 1, 1, 3]
    assert batch.lengths().tolist() == [1, 1, 1, 1, 0, 3]


def test_a_batch_is_a_copy() -> None:
    ids = np.array([1, 9])
    batch = se.keyed_jagged_tensor({"x": ids}, ONE)
    ids[:] = 7
    assert batch.values().tolist() == [1, 9]


def test_an_empty_bag_may_be_of_any_dtype_and_a_batch_may_be_empty() -> None:
    bags = [np.array([1, 2], dtype=np.int32), np.array([], dtype=np.float64), []]
    batch = se.keyed_jagged_tensor({"x": bags}, ONE)
    assert batch.lengths().tolist() == [2, 0, 0]
    empty: Any
    for empty in ([], np.empty(0), np.empty((0, 3), int), ([], []), torch.empty(0)):
        batch = se.keyed_jagged_tensor({"x": empty}, ONE, weights={"x": empty})
        assert (batch.stride(), batch.values().numel(), batch.weights().numel()) == (0, 0, 0)
    without_ids: Any
    for without_ids in (np.full((2, 3), -1), ([], [0, 0]), [[], ()]):
        batch = se.keyed_jagged_tensor({"x": without_ids}, ONE)
        assert batch.lengths().tolist() == [0, 0]


def test_padding_is_what_it_is_said_to_be() -> None:
    bags = FULL | {"clicked": np.array([[0, 0, 0], [1, 0, 1]])}
    batch = se.keyed_jagged_tensor(bags, TABLES, padding=0)
    assert batch["clicked"].lengths().tolist() == [0, 2]
    assert batch["clicked"].values().tolist() == [1, 1]
    assert batch["item_id"].values().tolist() == [0, 4]
    wide = se.keyed_jagged_tensor({"x": np.array([[3, 4]], dtype=np.uint8)}, ONE, padding=-7)
    assert wide.values().tolist() == [3, 4]
    with pytest.raises(ValueError, match=r"padding must be an integer, got 0\.5"):
        se.Batcher(TABLES, padding=0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="padding must be an integer, got None"):
        se.keyed_jagged_tensor(bags, TABLES, padding=None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        (
            {"user_id": [[1], [10]]},
            "feature 'user_id', sample 1: id 10 is outside 0..9 of table 'us",
        ),
        ({"clicked": [[], [1, 1, 5]]}, "feature 'clicked', sample 1: id 5 is outside 0..4 of tabl"),
        ({"clicked": [[-7, 1], []]}, "feature 'clicked', sample 0: id -7 is outside"),
        (
            {"item_id": [[1], [0.5]]},
            "feature 'item_id', sample 1: ids must be integers, or strings",
        ),
        (
            {"item_id": [[1], [2, 0.5]]},
            "feature 'item_id', sample 1: ids must be integers, or stri",
        ),
        (
            {"item_id": [[1], ["a"]]},
            "sample 1: ids must be all integers or all strings, got 1 and 'a",
        ),
        ({"item_id": [["a"], ["b"]]}, "sample 0: id 'a' is a string, and table 'item' has out_of_"),
        ({"item_id": np.array(["a", "b"])}, "sample 0: id 'a' is a string, and table 'item' has o"),
        (
            {"item_id": [[1], None]},
            "feature 'item_id', sample 1: a bag must be a list or an array, ",
        ),
        (
            {"item_id": [[1], [None]]},
            "feature 'item_id', sample 1: ids must be integers, or strings ",
        ),
        (
            {"item_id": [[1], [True]]},
            "sample 1: ids must be integers, or strings for a table that has",
        ),
        (
            {"item_id": [[0], [1, True]]},
            "feature 'item_id', sample 1: ids must be integers, or strin",
        ),
        (
            {"item_id": [1, 2]},
            "feature 'item_id', sample 0: a bag must be a list or an array, got 1;",
        ),
        (
            {"item_id": ["a", "b"]},
            "sample 0: a bag must be a list or an array, got 'a'; for one valu",
        ),
        (
            {"item_id": [[[1], [1, 2]], []]},
            "feature 'item_id', sample 0: ids must be integers, or ",
        ),
        (
            {"item_id": [[1], np.array([[1]])]},
            "sample 1: a bag must have one dimension, got shape [1,",
        ),
        (
            {"item_id": [[1], torch.tensor(3)]},
            "sample 1: a bag must have one dimension, got shape []",
        ),
        (
            {"item_id": [[1], np.array([0.5])]},
            "sample 1: ids must be integers, or strings for a tab",
        ),
        ({"item_id": [[1], np.array([True])]}, "feature 'item_id', sample 1: ids must be integers"),
        (
            {"item_id": np.array([0.5, 1])},
            "sample 0: ids must be integers, or strings for a table tha",
        ),
        (
            {"item_id": torch.tensor([1.0, 2.0])},
            "got 1.0 of dtype float32; convert them where the ",
        ),
        (
            {"item_id": np.array([True, False])},
            "sample 0: ids must be integers, or strings for a tab",
        ),
        (
            {"item_id": np.array([[-1], [np.nan]])},
            "feature 'item_id', sample 1: ids must be integers,",
        ),
        (
            {"item_id": np.array([[1], [2**63]], dtype=np.uint64)},
            "sample 1: id 9223372036854775808 do",
        ),
        (
            {"item_id": [[1], [2**63]]},
            "sample 1: id 9223372036854775808 does not fit into int64; take",
        ),
        (
            {"item_id": [[1], [-(2**63) - 1]]},
            "sample 1: id -9223372036854775809 does not fit into int",
        ),
        (
            {"item_id": objects([1, None])},
            "feature 'item_id', sample 1: ids must be integers, or strin",
        ),
        (
            {"item_id": objects([[1], None])},
            "feature 'item_id', sample 1: a bag must be a list or an",
        ),
        ({"item_id": np.zeros((2, 1, 1), dtype=int)}, "an Arrow column, got shape [2, 1, 1]"),
        (
            {"item_id": np.array([["a"], ["b"]])},
            "a padded array must hold numbers, got <U1; give a l",
        ),
        (
            {"item_id": {"a": 1}},
            "feature 'item_id': bags must be a list of bags, an array [B] or [B, L],",
        ),
        (
            {"item_id": None},
            "feature 'item_id': bags must be a list of bags, an array [B] or [B, L], ",
        ),
        ({"item_id": "ab"}, "an Arrow column, got 'ab'"),
        (
            {"item_id": torch.ones(2, device="meta")},
            "a batch is made of plain tensors on the CPU, got",
        ),
        (
            {"item_id": masked(1, 2)},
            "feature 'item_id': an array has masked values, 1 of 2; fill an",
        ),
        ({"item_id": masked(1, 2).reshape(2, 1)}, "array [B, L] with the padding, such as .filled"),
        ({"item_id": [[1], masked(1, 2)]}, "feature 'item_id', sample 1: an array has masked valu"),
        ({"item_id": objects([[1], masked(1, 2)])}, "sample 1: an array has masked values, 1 of 2"),
        ({"item_id": (masked(1, 2), [0, 1])}, "feature 'item_id': an array has masked values, 1"),
        ({"item_id": ([1, 2], masked(0, 1))}, "feature 'item_id': an array has masked values, 1"),
        ({"item_id": nested()}, "feature 'item_id': a nested tensor is not supported; give a list"),
        ({"item_id": [[1], nested()]}, "feature 'item_id', sample 1: a nested tensor is not supp"),
        ({"item_id": torch.ones(2).to_sparse()}, "got one that is torch.sparse_coo; make it there"),
        (
            {"item_id": [[1]]},
            "the same number of samples, got {'user_id': 2, 'item_id': 1, 'clicked':",
        ),
        (
            {"item_id": ([1, 2, 3], [0, 1, 3])},
            "with the number of ids need Offsets(..., include_last",
        ),
        (
            {"item_id": ([1], [2], [3])},
            "a tuple must be (ids, offsets), got 3 elements; give bags as a",
        ),
        (
            {"item_id": ([1, 2], [0, 3])},
            "sample 1: its ids begin at 3 and end at 2 of 2; offsets must n",
        ),
        (
            {"item_id": ([1, 2], [0, -1])},
            "feature 'item_id', sample 0: its ids begin at 0 and end at -1",
        ),
        (
            {"item_id": ([1, 2], [1, 2])},
            "feature 'item_id': the first offset must be 0, got 1 for 2 ids",
        ),
        (
            {"item_id": ([1, 2], [])},
            "feature 'item_id': offsets are empty, and there are 2 ids; give each bag the position",
        ),
        (
            {"item_id": ([1, 2], [0.0, 1.0])},
            "offsets must be integers [B], got float64 [2]; if these",
        ),
        (
            {"item_id": ([1, 2], [[0], [1]])},
            "offsets must be integers [B], got object [2]; if these a",
        ),
        (
            {"item_id": ([[1], [2]], [0, 1])},
            "feature 'item_id', sample 0: ids must be integers, or str",
        ),
        (
            {"item_id": (np.ones((2, 1), int), [0, 1])},
            "values must be one list, array or column witho",
        ),
        (
            {"item_id": se.Offsets(ids=[1, 2], offsets=[0, 1, 3], include_last_offset=True)},
            "feature 'item_id': the last offset must be the number of ids, 2, got [3]; mend it, or",
        ),
        (
            {"item_id": se.Offsets(ids=[1, 2, 3], offsets=[0, 2, 1, 3], include_last_offset=True)},
            "feature 'item_id', sample 1: its ids begin at 2 and end at 1 of 3; offsets must not d",
        ),
    ],
)
def test_a_bad_batch_is_refused_as_the_user_made_it(changed: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)) as refused:
        se.keyed_jagged_tensor(FULL | changed, TABLES)
    assert str(refused.value).startswith(("feature '", "all features of a batch"))


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        (
            {"clicked": [[], [1, 2]]},
            "weights of feature 'clicked', sample 1: there are 2 for 3 ids;",
        ),
        (
            {"clicked": [[5], [6, 7]]},
            "weights of feature 'clicked', sample 0: there are 1 for 0 ids",
        ),
        (
            {"clicked": [[]]},
            "weights of feature 'clicked': there are 1 samples, and 2 of ids; give th",
        ),
        (
            {"clicked": np.ones((2, 3))},
            "weights of feature 'clicked', sample 0: there are 3 for 0 ids",
        ),
        (
            {"clicked": [[], [1, float("nan"), 1]]},
            "sample 1: a weight must be a finite float32, got n",
        ),
        (
            {"item_id": np.array([1, np.inf])},
            "'item_id', sample 1: a weight must be a finite float32, ",
        ),
        (
            {"item_id": np.array([1, 1e39])},
            "sample 1: a weight must be a finite float32, got 1e+39; m",
        ),
        (
            {"item_id": [["a"], ["b"]]},
            "sample 0: a weight must be a finite float32, got 'a'; mend it,",
        ),
        (
            {"item_id": [[1.0], [None]]},
            "sample 1: a weight must be a finite float32, got None; mend it",
        ),
        (
            {"item_id": [[1.0], [True]]},
            "sample 1: a weight must be a finite float32, got True; mend it",
        ),
        (
            {"item_id": np.array([True, True])},
            "sample 0: a weight must be a finite float32, got True;",
        ),
        ({"item_id": masked(1.0, 2.0)}, "weights of feature 'item_id': an array has masked valu"),
        ({"item_id": [[1.0], masked(2.0)]}, "weights of feature 'item_id', sample 1: an array has"),
        (
            {"item_id": torch.ones(2, requires_grad=True)},
            "a batch passes no gradients on, got a tens",
        ),
        (
            {"itm_id": [[1], [1]]},
            "there are weights of feature 'itm_id', which is not in the batch; di",
        ),
    ],
)
def test_bad_weights_are_refused_as_the_user_made_them(changed: dict[str, Any], text: str) -> None:
    se.keyed_jagged_tensor(FULL, TABLES, weights=WEIGHTS)
    with pytest.raises(ValueError, match=re.escape(text)):
        se.keyed_jagged_tensor(FULL, TABLES, weights=WEIGHTS | changed)


def test_as_many_weights_as_ids_with_offsets() -> None:
    with pytest.raises(
        ValueError, match="weights of feature 'x': there are 2 for 3 ids; give ever"
    ):
        se.keyed_jagged_tensor({"x": ([1, 2, 3], [0, 1])}, ONE, weights={"x": [1.0, 2.0]})
    with pytest.raises(ValueError, match="weights of feature 'x', sample 0: there are 2 for 1 ids"):
        se.keyed_jagged_tensor(
            {"x": ([1, 2, 3], [0, 1])}, ONE, weights={"x": ([1.0, 2.0, 3.0], [0, 2])}
        )


def test_weights_of_padding_are_not_looked_at() -> None:
    weights = {"x": np.array([[0.5, np.nan], [np.inf, 2.0]])}
    batch = se.keyed_jagged_tensor({"x": np.array([[3, -1], [-1, 4]])}, ONE, weights=weights)
    assert batch.values().tolist() == [3, 4]
    assert batch.weights().tolist() == [0.5, 2.0]


def test_all_features_of_the_tables_and_no_others() -> None:
    with pytest.raises(ValueError, match="feature 'clicked' of table 'item' is not in the batch"):
        se.keyed_jagged_tensor({"user_id": [[1]], "item_id": [[1]]}, TABLES)
    with pytest.raises(
        ValueError,
        match=r"feature 'clickd' is looked up by none of the tables; did you mean 'clicked'\? Else",
    ):
        se.keyed_jagged_tensor({"user_id": [[1]], "item_id": [[1]], "clickd": [[1]]}, TABLES)
    with pytest.raises(ValueError, match="feature 'zzz' is looked up by none of the tables; leave"):
        se.keyed_jagged_tensor(FULL | {"zzz": [[1], [1]]}, TABLES)
    with pytest.raises(ValueError, match="at least one feature"):
        se.keyed_jagged_tensor({}, TABLES)
    with pytest.raises(ValueError, match="features must be a dict by feature, got list"):
        se.keyed_jagged_tensor([[1]], TABLES)  # type: ignore[arg-type]
    some = {"user_id": [[1], [2]], "item_id": [[3], [4]]}
    with pytest.raises(
        ValueError, match="feature 'clicked' has no weights; give all features weig"
    ):
        se.keyed_jagged_tensor(FULL, TABLES, weights=some)


@pytest.mark.parametrize(
    ("tables", "text"),
    [
        ("t", "got 't'"),
        (None, "got None"),
        ({"t": ONE[0]}, "got dict"),
        (ONE[0], "got the one of 't'; use [table]"),
        (se.EmbeddingBagCollection(ONE), "got EmbeddingBagCollection"),
        (["t"], "got one with 't'"),
        ([ONE], "got one with [TableConfig("),
    ],
)
def test_tables_are_a_list_of_tables(tables: Any, text: str) -> None:
    with pytest.raises(
        ValueError, match=re.escape(f"tables must be a list of TableConfigs, {text}")
    ):
        se.keyed_jagged_tensor({"x": [[1]]}, tables)
    with pytest.raises(ValueError, match=re.escape(text)):
        se.Batcher(tables)
    assert se.keyed_jagged_tensor({"x": [[1]]}, tuple(ONE)).values().tolist() == [1]
