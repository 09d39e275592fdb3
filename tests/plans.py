"""Plans for tests: of a few tables by `plan_sharding`, and of many tables by their shards."""

from typing import Any

import pytest
import torchrec

import shardemb as se
from shardemb import layouts, optim
from shardemb.cluster import Cluster
from shardemb.data.profile import DataProfile, FeatureProfile
from shardemb.kernel_choice import Kernel, KernelChoice
from shardemb.layouts import Layout
from shardemb.native.library import missing
from shardemb.placement import ShardingPlan, TablePlacement
from shardemb.plans.shards import shards_of
from shardemb.workload import Workload

NEEDS_NATIVE = pytest.mark.skipif(missing() is not None, reason=str(missing()))
KERNELS: tuple[Kernel, ...] = ("fbgemm",) if missing() else ("native", "fbgemm")
"""Those that run on this machine's CPU."""
ENV = se.Env(world_size=4, num_nodes=2)
TWO_NODES = Cluster(
    name="two nodes of two",
    num_nodes=2,
    ranks_per_node=2,
    memory_bytes=1 << 30,
    memory_gb_per_s=50,
    intra_node_gb_per_s=5,
    inter_node_gb_per_s=1,
)
LAYOUTS: dict[str, Layout] = {
    "user": layouts.row_wise(),
    "item": layouts.column_wise(ranks=[2, 0]),
    "shop": layouts.table_row_wise(node=1),
    "word": layouts.grid_shard(nodes=[1, 0]),
    "city": layouts.table_wise(rank=3),
    "day": layouts.data_parallel(),
    "tag": layouts.table_column_wise(ranks=[3, 2]),
}
"""Every layout, by the table of `tables` that has it."""


def table(name: str, **changed: Any) -> se.TableConfig:
    fields: dict[str, Any] = {
        "name": name,
        "num_embeddings": 1000,
        "embedding_dim": 16,
        "feature_names": (f"{name}_id",),
        "optimizer": optim.Adagrad(lr=0.1),
    }
    return se.TableConfig(**fields | changed)


def sgd_table(name: str, num_embeddings: int = 10_000, **changed: Any) -> se.TableConfig:
    fields: dict[str, Any] = {
        "name": name,
        "num_embeddings": num_embeddings,
        "embedding_dim": 64,
        "feature_names": (name,),
        "optimizer": optim.SGD(lr=0.1),
    }
    return se.TableConfig(**fields | changed)


def tables(**changed: dict[str, Any]) -> list[se.TableConfig]:
    """One for each layout; `changed` are fields by table."""
    own: dict[str, dict[str, Any]] = {
        "user": {"num_embeddings": 1003, "dtype": "float16"},
        "item": {"feature_names": ("item_id", "clicked"), "embedding_dim": 32},
        "city": {"trainable": False},
        "tag": {"optimizer": optim.RowWiseAdagrad(lr=0.1), "pooling": "mean"},
    }
    return [table(name, **own.get(name, {}) | changed.get(name, {})) for name in LAYOUTS]


def model(**changed: dict[str, Any]) -> torchrec.EmbeddingBagCollection:
    return se.EmbeddingBagCollection(tables(**changed))


def hot_profile(num_embeddings: int = 1003) -> FeatureProfile:
    """Half of the ids are row 7, the others even."""
    return FeatureProfile(
        num_embeddings=num_embeddings,
        num_samples=100,
        num_ids=2 * num_embeddings,
        num_rows_touched=num_embeddings,
        block_rows=num_embeddings,
        block_counts=(num_embeddings,),
        hot_rows={7: num_embeddings},
    )


def every_layout(*, profile: bool = False, kernel: KernelChoice = "auto") -> ShardingPlan:
    workload = Workload(
        batch_size=128,
        ids_per_sample={"clicked": 2.5},
        profile=DataProfile(source="clicks.txt", features={"user_id": hot_profile()})
        if profile
        else None,
    )
    return se.plan_sharding(model(), ENV, LAYOUTS, workload=workload, kernel=kernel)


def many_tables(num_tables: int, *, num_nodes: int, ranks_per_node: int = 8) -> ShardingPlan:
    """Row-wise tables of different sizes on a large cluster."""
    cluster = Cluster(
        name="large",
        num_nodes=num_nodes,
        ranks_per_node=ranks_per_node,
        device="cuda",
        memory_bytes=80 << 30,
        memory_gb_per_s=3000,
        intra_node_gb_per_s=400,
        inter_node_gb_per_s=50,
    )
    placed = [
        TablePlacement(
            table=f"t{number}",
            module="sparse",
            feature_names=(f"f{number}",),
            num_embeddings=1_024_000 + 1024 * number,
            embedding_dim=64,
            dtype="float32",
            pooling="sum",
            is_weighted=False,
            trainable=True,
            layout="row_wise",
            chosen_by="named",
            optimizer="RowWiseAdagrad",
            shards=shards_of(
                layouts.row_wise(),
                (1_024_000 + 1024 * number, 64),
                ranks=(cluster.world_size, ranks_per_node),
                dtype="float32",
                optimizer="RowWiseAdagrad",
            ),
        )
        for number in range(num_tables)
    ]
    return ShardingPlan(
        cluster=cluster, workload=Workload(batch_size=64), kernel="fbgemm", tables=tuple(placed)
    )
