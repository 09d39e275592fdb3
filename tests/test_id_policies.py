"""`out_of_range`: what becomes of ids that a table does not have, and how many there were."""

import random
import subprocess
import sys
from collections.abc import Iterator
from hashlib import blake2b
from multiprocessing import get_context
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset
from torchrec import KeyedJaggedTensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig

import shardemb as se
from shardemb.config import OutOfRange
from shardemb.data.id_counts import IdCount, IdCounts
from shardemb.data.id_hash import hash_ids, ids_of_strings
from shardemb.env import Env
from tests.spmd import spmd

ROWS = 10
MASK = (1 << 64) - 1


def table(
    out_of_range: OutOfRange, *features: str, name: str = "t", rows: int = ROWS
) -> se.TableConfig:
    return se.TableConfig(
        name=name,
        num_embeddings=rows,
        embedding_dim=4,
        feature_names=features or ("x",),
        out_of_range=out_of_range,
    )


def splitmix64(seed: int) -> int:
    """Of Python's integers, after https://prng.di.unimi.it/splitmix64.c."""
    z = (seed + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def row_of(out_of_range: str, row: int) -> int | None:
    """The row of an id as the documentation says; None if it is dropped."""
    if out_of_range == "hash":
        return splitmix64(row & MASK) % ROWS
    if out_of_range == "oov_row":
        return row if 0 <= row < ROWS - 1 else ROWS - 1
    if 0 <= row < ROWS:
        return row
    return None if out_of_range == "drop" else max(0, min(row, ROWS - 1))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("out_of_range", ["drop", "clamp", "hash", "oov_row"])
def test_ids_weights_and_counts_are_those_of_one_id_after_another(
    out_of_range: OutOfRange, seed: int
) -> None:
    draw = random.Random(seed)
    ids = [0, 1, ROWS - 2, ROWS - 1, ROWS, -1, 5, 2**63 - 1, -(2**63), 3]
    bags = [[draw.choice(ids) for _ in range(draw.choice([0, 1, 4]))] for _ in range(30)]
    weights = [[draw.random() for _ in bag] for bag in bags]
    batcher = se.Batcher([table(out_of_range, "x", "y")])
    features, given = {"x": bags, "y": bags[::-1]}, {"x": weights, "y": weights[::-1]}
    batch = batcher(features, weights=given)
    for name, raw in features.items():
        kept = [
            [(row_of(out_of_range, i), w) for i, w in zip(bag, of_bag, strict=True)]
            for bag, of_bag in zip(raw, given[name], strict=True)
        ]
        kept = [[(row, weight) for row, weight in bag if row is not None] for bag in kept]
        assert batch[name].values().tolist() == [row for bag in kept for row, _ in bag]
        assert batch[name].lengths().tolist() == [len(bag) for bag in kept]
        expected = torch.tensor([weight for bag in kept for _, weight in bag])
        assert torch.equal(batch[name].weights(), expected)
        changed = sum(i != row_of(out_of_range, i) for bag in raw for i in bag)
        if out_of_range in {"hash", "oov_row"}:
            real = ROWS - 1 if out_of_range == "oov_row" else 0
            changed = sum(not 0 <= i < real for bag in raw for i in bag)
        assert batcher.counts.of_this_rank()[name] == IdCount(
            out_of_range=out_of_range, num_ids=sum(map(len, raw)), num_changed=changed
        )


def test_ids_in_range_stay_as_they_are_and_count_as_looked_at() -> None:
    for policy in ("raise", "drop", "clamp", "oov_row"):
        batcher = se.Batcher([table(policy)])
        assert batcher({"x": [[0, 8], [], [3]]}).values().tolist() == [0, 8, 3]
        assert batcher({"x": [[1], [], []]}).lengths().tolist() == [1, 0, 0]
        count = batcher.counts.of_this_rank()["x"]
        assert (count.out_of_range, count.num_ids, count.num_changed) == (policy, 4, 0)
        batcher.counts.reset()
        assert batcher.counts.of_this_rank()["x"].num_ids == 0
        batcher({"x": [[1]]})
        assert batcher.counts.of_this_rank()["x"].num_ids == 1


def test_a_refused_batch_is_not_counted() -> None:
    batcher = se.Batcher([table("drop", "x", "z"), table("raise", "y", name="u")])
    with pytest.raises(
        ValueError, match=r"feature 'y', sample 0: id 10 is outside 0[.][.]9 of table 'u'"
    ):
        batcher({"x": [[99]], "z": [[1]], "y": [[10]]})
    counts = batcher.counts.of_this_rank()
    assert list(counts) == ["x", "z", "y"]
    assert {count.num_ids for count in counts.values()} == {0}


def test_the_hash_is_splitmix64_of_the_id_modulo_the_rows() -> None:
    # The first outputs for the seeds 0 and 1234567, as published with the reference implementation.
    assert splitmix64(0) == 0xE220A8397B1DCDAF
    assert splitmix64(1234567) == 6457827717110365317
    draw = np.random.default_rng(0)
    ids = np.concatenate([draw.integers(-(2**63), 2**63 - 1, 200), [0, -1, 2**63 - 1, -(2**63)]])
    for num_embeddings in (1, 10, 1000, 1_000_003, 2**31 - 1):
        expected = [splitmix64(int(row) & MASK) % num_embeddings for row in ids]
        assert hash_ids(ids, num_embeddings).tolist() == expected
    assert np.bincount(hash_ids(np.arange(100_000), 10), minlength=10) == pytest.approx(
        10_000, abs=500
    )


def test_ids_of_strings_are_blake2b_of_their_utf_8() -> None:
    # b2sum -l 64 prints ba6587c1bb84c490 for tea and e4a6a0577479b2b4 for nothing.
    known = {"tea": "ba6587c1bb84c490", "": "e4a6a0577479b2b4"}
    texts = ["tea", "", "tea", "Çay", "\ud800", "茶" * 100]
    ids = ids_of_strings(texts)
    assert ids.dtype == np.int64
    for text, row in zip(texts, ids, strict=True):
        digest = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
        assert known.get(text, digest) == digest
        assert int(row) == int.from_bytes(bytes.fromhex(digest), "little", signed=True)
    assert ids_of_strings([]).tolist() == []


def test_strings_are_hashed_in_every_form_and_process() -> None:
    bags = [["tea", "milk"], [], ["tea"]]
    rows = [splitmix64(int(row) & MASK) % ROWS for row in ids_of_strings(["tea", "milk", "tea"])]
    flat = np.array(["tea", "milk", "tea"])
    data: Any
    for data in (
        bags,
        [np.array(bag) for bag in bags],
        [np.array(bag, dtype=object) for bag in bags],
        [np.array(bag, dtype=np.dtypes.StringDType()) for bag in bags],
        (flat, [0, 2, 2]),
        (["tea", "milk", "tea"], [0, 2, 2]),
    ):
        batch = se.keyed_jagged_tensor({"x": data}, [table("hash")])
        assert batch.values().tolist() == rows
        assert batch.lengths().tolist() == [2, 0, 1]
    one_each = se.keyed_jagged_tensor({"x": flat}, [table("hash")])
    assert one_each.lengths().tolist() == [1, 1, 1]
    code = (
        "import shardemb as se; t = se.TableConfig(name='t', num_embeddings=10, embedding_dim=4, "
        "feature_names=('x',), out_of_range='hash'); "
        "print(se.keyed_jagged_tensor({'x': [['tea', 'milk', 'tea']]}, [t]).values().tolist())"
    )
    for hash_seed in ("1", "2"):  # of Python's own hash, on which nothing may depend
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": hash_seed, "PYTHONPATH": ":".join(sys.path)},
        )
        assert done.stdout.strip() == str(rows)


@pytest.mark.parametrize("policy", get_args(OutOfRange))
def test_two_tables_of_a_feature_must_agree(policy: OutOfRange) -> None:
    other: OutOfRange = "raise" if policy == "drop" else "drop"
    apart = [table(policy, "a", "x", name="one"), table(other, "x", name="two")]
    with pytest.raises(
        ValueError,
        match=f"feature 'x' looks up tables 'one' and 'two', .* out_of_range is '{policy}' and "
        f"'{other}'; give both the same",
    ):
        se.Batcher(apart)
    same = [table(policy, name="one"), table(policy, "x", "b", name="two")]
    batch = se.keyed_jagged_tensor({"x": [[1, 2]], "b": [[3]]}, same)
    assert batch.lengths().tolist() == [2, 1]
    uneven = [table(policy, name="one"), table(policy, name="two", rows=7)]
    if policy == "raise":
        with pytest.raises(ValueError, match=r"id 8 is outside 0[.][.]6 of table 'two'"):
            se.keyed_jagged_tensor({"x": [[8]]}, uneven)
        return
    with pytest.raises(
        ValueError,
        match=f"out_of_range='{policy}' cannot find in 10 and 7 rows; give both the same num_",
    ):
        se.keyed_jagged_tensor({"x": [[1]]}, uneven)


def test_torchrec_s_own_tables_raise() -> None:
    config = EmbeddingBagConfig(name="t", num_embeddings=9, embedding_dim=4, feature_names=["x"])
    assert se.keyed_jagged_tensor({"x": [[8]]}, [config]).values().tolist() == [8]
    with pytest.raises(ValueError, match=r"sample 0: id 9 is outside 0\.\.8 of table 't'"):
        se.keyed_jagged_tensor({"x": [[9]]}, [config])


class Batches(IterableDataset[KeyedJaggedTensor]):
    """Ten batches of two ids, of which one is out of range, in each worker."""

    def __init__(self, batcher: se.Batcher) -> None:
        self.batcher = batcher

    def __iter__(self) -> Iterator[KeyedJaggedTensor]:
        for _ in range(10):
            yield self.batcher({"x": [[1], [99]]})


def first(batches: list[KeyedJaggedTensor]) -> KeyedJaggedTensor:
    return batches[0]


@pytest.mark.distributed
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_of_a_data_loader_are_counted(method: str) -> None:
    batcher = se.Batcher([table("drop")])
    loader = DataLoader(
        Batches(batcher),
        batch_size=1,
        num_workers=2,
        collate_fn=first,
        multiprocessing_context=method,
    )
    for epoch in (1, 2):
        assert sum(1 for _ in loader) == 20
        count = batcher.counts.of_this_rank()["x"]
        assert (count.num_ids, count.num_changed) == (40 * epoch, 20 * epoch)
    batcher.counts.reset()
    batcher({"x": [[5]]})
    assert batcher.counts.of_this_rank()["x"].num_ids == 1


@pytest.mark.distributed
def test_a_process_waits_with_its_counts_until_no_other_adds() -> None:
    """As workers of two DataLoaders must, or one would write over what the other adds."""
    counts, context = IdCounts({"x": "drop"}), get_context("fork")
    here = context.Event()

    def add() -> None:
        here.set()
        counts.add({"x": (1, 0)})

    process = context.Process(target=add)
    with counts._lock:
        process.start()
        assert here.wait(60)
        process.join(1)
        assert process.is_alive()
        assert counts.of_this_rank()["x"].num_ids == 0
    process.join(60)
    counts.add({"x": (1, 0)})
    assert counts.of_this_rank()["x"].num_ids == 2


@spmd(world_size=2)
def test_counts_are_summed_over_ranks(env: Env) -> None:
    counts = IdCounts({"x": "clamp", "y": "raise"})
    counts.add({"y": (3, 0), "x": (10 + env.rank, env.rank)})
    assert counts.of_this_rank()["x"].num_ids == 10 + env.rank
    for _ in range(2):  # reading changes nothing
        assert counts.of_all_ranks(env) == {
            "x": IdCount(out_of_range="clamp", num_ids=21, num_changed=1),
            "y": IdCount(out_of_range="raise", num_ids=6, num_changed=0),
        }
