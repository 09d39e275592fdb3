"""Which rank holds which rows. Allocates nothing; needs neither processes nor GPUs."""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch.distributed as dist
from torch import nn

from shardemb.agree import all_or_none
from shardemb.cluster import Cluster, check_where, cluster_of
from shardemb.constraints import Constraints
from shardemb.env import Env
from shardemb.errors import RunError
from shardemb.kernel_choice import Kernel, KernelChoice, choose_kernel
from shardemb.layouts import Layout
from shardemb.modules.discovery import Collection, Table, find_collections
from shardemb.placement import ShardingPlan, TablePlacement
from shardemb.planning.fits import what_does_not_fit
from shardemb.planning.layout_rules import check_slices
from shardemb.planning.planner import Choice, choose_layouts
from shardemb.planning.problem import Problem, check_problem
from shardemb.planning.search import DoesNotFitError
from shardemb.plans.fit import declared_of
from shardemb.plans.shards import shards_like
from shardemb.workload import Workload


class _Ranks(NamedTuple):
    """What a plan is for, and what looks up its rows there."""

    cluster: Cluster
    kernel: Kernel


def plan_sharding(
    model: nn.Module,
    where: Env | Cluster,
    layouts: Mapping[str, Layout] | None = None,
    *,
    workload: Workload | None = None,
    constraints: Constraints | None = None,
    kernel: KernelChoice = "auto",
) -> ShardingPlan:
    """Decides which rank holds which rows: named layouts as named, the rest by the planner.

    The planner takes TorchRec's estimates of what each layout costs a rank, and looks for the plan
    whose busiest rank is done soonest.

    Args:
        model: Holds one or more `EmbeddingBagCollection`s or `EmbeddingCollection`s whose tables
            have their optimizers attached.
        where: The ranks to plan for: those of this run, by the `Env` of `init_distributed`, or
            others by a `Cluster`. With the `Env` of this run every rank must call this.
        layouts: A layout for some or all tables, by table name.
        workload: The batches to plan for; by default 512 samples a rank with one id a feature.
        constraints: What the plan must keep to beside; by default 15 % of memory stays free.
        kernel: What looks up and updates the rows: "native", shardemb's own on CPU, which takes
            tables of any width and bfloat16 rows, or "fbgemm". By default "native" on CPU where its
            compiled code is there, on every rank of this run or else on this machine.

    Returns:
        The plan. The ranks of this run have agreed on it.

    Raises:
        ValueError: `where` is neither, the model has no collection or one that is not supported, a
            table or feature name is unknown or not unique, a layout does not fit its table or the
            ranks, the kernel does not run there or does not take a table, the profile is of other
            data, constraints contradict each other or leave no memory, or an argument is of another
            kind.
        RunError: The tables do not fit in the ranks' memory, ranks of this run come to different
            plans, or another rank failed.

    Example:
        >>> import shardemb as se, shardemb.layouts
        >>> table = se.TableConfig(
        ...     name="user", num_embeddings=1000, embedding_dim=64, feature_names=("user_id",)
        ... )
        >>> model = se.EmbeddingBagCollection([table])
        >>> plan = plan_sharding(model, Env(world_size=4), {"user": se.layouts.row_wise()})
        >>> [shard.num_rows for shard in plan.tables[0].shards]
        [250, 250, 250, 250]
    """
    check_where(where)
    wishes = (
        {} if layouts is None else layouts,
        Workload() if workload is None else workload,
        Constraints() if constraints is None else constraints,
    )
    if isinstance(where, Cluster) or not where.is_live:
        cluster = where if isinstance(where, Cluster) else cluster_of(where)
        return _plan(model, _Ranks(cluster, choose_kernel(kernel, cluster.device)), *wishes)
    ranks = _agreed_ranks(where, kernel)
    with all_or_none(where, "planning"):
        plan = _plan(model, ranks, *wishes)
    _check_agreed(plan, where)
    return plan


def _plan(
    model: nn.Module,
    ranks: _Ranks,
    named: Mapping[str, Layout],
    workload: Workload,
    constraints: Constraints,
) -> ShardingPlan:
    """Plans on this rank alone.

    Raises:
        ValueError: Something is refused.
        RunError: The tables do not fit.
    """
    cluster, kernel = ranks
    problem = Problem(
        collections=find_collections(model),
        cluster=cluster,
        kernel=kernel,
        named=named,
        workload=workload,
        constraints=constraints,
    )
    check_problem(problem)
    try:
        chosen = choose_layouts(problem)
    except DoesNotFitError as error:
        raise RunError(what_does_not_fit(problem, error)) from None
    plan = ShardingPlan(
        cluster=cluster,
        workload=workload,
        kernel=kernel,
        tables=tuple(
            _placement(found, table, chosen[name], cluster)
            for found in problem.collections.values()
            for name, table in found.tables.items()
        ),
    )
    check_slices(plan)
    assert max(plan.bytes_per_rank) <= problem.bytes_per_rank
    return plan


def _placement(found: Collection, table: Table, choice: Choice, cluster: Cluster) -> TablePlacement:
    placement = TablePlacement(
        table=table.name,
        layout=choice.layout.torchrec_name,
        chosen_by=choice.chosen_by,
        shards=(),
        **declared_of(found, table),
    )
    return replace(placement, shards=shards_like(placement, choice.layout, cluster))


def _agreed_ranks(env: Env, asked: KernelChoice) -> _Ranks:
    """The ranks of this run, with the least memory that one has and a kernel that all have.

    Raises:
        ValueError: A kernel is asked for that does not run here.
        RunError: A rank cannot say what it has, or was refused.
    """
    with all_or_none(env, "looking at the memory and the kernels"):
        cluster = cluster_of(env)
        mine = _Ranks(cluster, choose_kernel(asked, cluster.device))
    of_ranks = [mine] * env.world_size
    if env.world_size > 1:
        dist.all_gather_object(of_ranks, mine)
    least = min(ranks.cluster.memory_bytes for ranks in of_ranks)
    kernel = mine.kernel
    if asked == "auto" and any(ranks.kernel == "fbgemm" for ranks in of_ranks):
        kernel = "fbgemm"
    return _Ranks(replace(of_ranks[0].cluster, memory_bytes=least), kernel)


def _check_agreed(plan: ShardingPlan, env: Env) -> None:
    """Compares the plans of all ranks.

    Raises:
        RunError: A rank has another plan than rank 0.
    """
    if env.world_size == 1:
        return
    mine = _said(plan)
    digests = [""] * env.world_size
    dist.all_gather_object(digests, _digest(mine))
    other = next((rank for rank, digest in enumerate(digests) if digest != digests[0]), None)
    if other is None:
        return
    of_ranks: list[dict[str, str]] = [{}] * env.world_size
    dist.all_gather_object(of_ranks, mine if env.rank in {0, other} else {})
    raise RunError(
        f"rank {other} planned otherwise than rank 0, "
        f"{_what_differs(of_ranks[0], of_ranks[other])}; declare the same tables in the same order "
        "and give the same layouts, workload, constraints and kernel on every rank"
    )


def _said(plan: ShardingPlan) -> dict[str, str]:
    """What a plan says of itself and of each table, in few bytes; in the tables' order."""
    workload, profile = plan.workload, plan.workload.profile
    said: dict[str, object] = {
        "the kernel": plan.kernel,
        "batch_size of the workload": workload.batch_size,
        "ids_per_sample of the workload": sorted(workload.ids_per_sample.items()),
        "profile of the workload": profile and (profile.source, sorted(profile.features.items())),
    }
    for table in plan.tables:
        places = [shard.rank for shard in table.shards]
        said[f"table {table.table!r}"] = replace(table, shards=()), places
    return {name: _digest(value) for name, value in said.items()}


def _what_differs(one: Mapping[str, str], other: Mapping[str, str]) -> str:
    """Names of what two ranks said otherwise."""
    differ = [name for name in {**one, **other} if one.get(name) != other.get(name)]
    if not differ:
        return "in the order of its tables"
    return f"in {', '.join(differ[:5])}{' and more' if len(differ) > 5 else ''}"


def _digest(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]
