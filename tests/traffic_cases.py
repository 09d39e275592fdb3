"""Tables in every layout with batches that are known beforehand, for `test_traffic.py`."""

# N ids of a feature in a batch

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torchrec import KeyedJaggedTensor

import shardemb as se
from shardemb import layouts, optim
from shardemb.data.profile import DataProfile, FeatureProfile
from shardemb.env import Env
from shardemb.layouts import Layout
from shardemb.workload import Workload

BATCH_SIZE = 8
IDS_PER_SAMPLE = {"user": 1, "item": 3, "clicked": 5, "tag": 2, "none": 0}


@dataclass(frozen=True, kw_only=True)
class Case:
    """Tables of one collection, where they lie, and how the ids of a batch spread over the rows."""

    name: str
    tables: Sequence[se.TableConfig]
    where: Mapping[str, Layout]
    is_sequence: bool = False
    is_weighted: bool = False
    is_even: bool = False

    @property
    def rows_of(self) -> dict[str, int]:
        """The rows that the ids of each feature may have."""
        rows: dict[str, int] = {}
        for config in self.tables:
            for feature in config.feature_names:
                rows[feature] = min(rows.get(feature, 10**9), config.num_embeddings)
        return rows

    def ids_of(self, feature: str) -> npt.NDArray[np.int64]:
        """The ids of every rank's batch [N], which ranks put in different orders."""
        num_ids, num_rows = BATCH_SIZE * IDS_PER_SAMPLE[feature], self.rows_of[feature]
        if self.is_even:
            return np.arange(num_ids) * num_rows // max(1, num_ids)
        drawn = np.random.default_rng(num_ids).geometric(0.1, num_ids) - 1
        return np.minimum(drawn, num_rows - 1)

    @property
    def workload(self) -> Workload:
        """What is known of those ids."""
        if self.is_even:
            return Workload(batch_size=BATCH_SIZE, ids_per_sample=IDS_PER_SAMPLE)
        features = {
            feature: profile_of(self.ids_of(feature), num_rows)
            for feature, num_rows in self.rows_of.items()
        }
        profile = DataProfile(source="this test", features=features)
        return Workload(batch_size=BATCH_SIZE, profile=profile)

    def batch(self, env: Env) -> KeyedJaggedTensor:
        generator = np.random.default_rng(env.rank)
        ids = [generator.permutation(self.ids_of(feature)) for feature in self.rows_of]
        values = torch.from_numpy(np.concatenate(ids))
        lengths = [IDS_PER_SAMPLE[feature] for feature in self.rows_of for _ in range(BATCH_SIZE)]
        return KeyedJaggedTensor(
            keys=list(self.rows_of),
            values=values,
            lengths=torch.tensor(lengths),
            weights=torch.rand(len(values)) if self.is_weighted else None,
        )


def profile_of(
    ids_N: npt.NDArray[np.int64], num_rows: int, *, block_rows: int = 1
) -> FeatureProfile:
    """A profile with one hot row; exact if a block is a row."""
    counts = np.bincount(ids_N, minlength=num_rows)
    hot = int(counts.argmax())
    others = counts.copy()
    others[hot] = 0
    blocks = np.add.reduceat(others, np.arange(0, num_rows, block_rows))
    return FeatureProfile(
        num_embeddings=num_rows,
        num_samples=BATCH_SIZE,
        num_ids=len(ids_N),
        num_rows_touched=int((counts > 0).sum()),
        block_rows=block_rows,
        block_counts=tuple(int(count) for count in blocks),
        hot_rows={hot: int(counts[hot])} if counts[hot] else {},
    )


def table(name: str, *features: str, **changed: Any) -> se.TableConfig:
    fields: dict[str, Any] = {"num_embeddings": 40, "embedding_dim": 8}
    fields |= {"optimizer": optim.Adagrad(lr=0.1)} | changed
    return se.TableConfig(name=name, feature_names=features, **fields)


TABLES = (
    table("a", "user", "item"),
    table("b", "item", "clicked", embedding_dim=16, num_embeddings=41),
    table("c", "tag", "none", embedding_dim=24, pooling="mean"),
)


def changed(**fields: Any) -> tuple[se.TableConfig, ...]:
    """The tables, but for some fields."""
    return tuple(replace(config, **fields) for config in TABLES)


def pooled_cases(env: Env) -> Iterator[Case]:
    """Every layout by itself and beside others, and every kind of table."""
    last, nodes = env.world_size - 1, tuple(range(env.num_nodes))
    rows, replicas, node = layouts.row_wise(), layouts.data_parallel(), layouts.table_row_wise
    whole, columns, grid = layouts.table_wise, layouts.column_wise, layouts.grid_shard
    node_columns = layouts.table_column_wise
    pooled: dict[str, tuple[Layout, ...]] = {
        "table_wise": (whole(0), whole(last), whole(0)),
        "row_wise": (rows, rows, rows),
        "column_wise": (columns([0, last]), columns([last, 0]), columns([1])),
        "table_column_wise": (node_columns([0, 1]), node_columns([last]), node_columns([1, 0])),
        "table_row_wise": (node(0), node(nodes[-1]), node(nodes[-1])),
        "grid_shard": (grid(nodes), grid(nodes[::-1]), grid([0])),
        "data_parallel": (replicas, replicas, replicas),
        "some of each": (rows, grid(nodes), replicas),
        "others of each": (columns([0, last]), node(0), whole(1)),
    }
    for name, where in pooled.items():
        yield Case(name=name, tables=TABLES, where=dict(zip("abc", where, strict=True)))
    mixed: dict[str, Layout] = {"a": rows, "b": node(nodes[-1]), "c": columns([1, 0])}
    yield Case(name="even", tables=changed(num_embeddings=40), where=mixed, is_even=True)
    yield Case(name="float16", tables=changed(dtype="float16"), where=mixed)
    yield Case(name="weighted", tables=changed(pooling="sum"), where=mixed, is_weighted=True)
    frozen = changed(trainable=False)
    yield Case(name="one frozen", tables=(frozen[0], *TABLES[1:]), where=mixed)
    yield Case(name="all frozen", tables=frozen, where=mixed)
    yield Case(name="all frozen, one replicated", tables=frozen, where=mixed | {"a": replicas})


def sequence_cases(env: Env) -> Iterator[Case]:
    """The layouts that sequences may have; slices of one collection have one width."""
    last, rows, replicas = env.world_size - 1, layouts.row_wise(), layouts.data_parallel()
    whole, columns, node_columns = (
        layouts.table_wise,
        layouts.column_wise,
        layouts.table_column_wise,
    )
    tables = changed(embedding_dim=8, pooling="sum")
    kept: dict[str, tuple[Layout, ...]] = {
        "table_wise": (whole(0), whole(last), whole(0)),
        "row_wise": (rows, rows, rows),
        "column_wise": (columns([0, last]), columns([last, 0]), columns([1, 0])),
        "both column_wise": (columns([0, last]), node_columns([0, 1]), node_columns([1, 0])),
        "data_parallel": (replicas, replicas, replicas),
        "each": (rows, whole(last), columns([0, last])),
    }
    for name, where in kept.items():
        yield Case(
            name=f"sequence {name}",
            tables=tables,
            where=dict(zip("abc", where, strict=True)),
            is_sequence=True,
        )
    frozen = (replace(tables[0], trainable=False), *tables[1:])
    apart: dict[str, Layout] = {"a": rows, "b": whole(0), "c": whole(1)}
    yield Case(name="sequence frozen", tables=frozen, where=apart, is_sequence=True)
