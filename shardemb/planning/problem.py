"""What is to be planned: tables, ranks, batches and wishes, and whether the wishes make sense."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from shardemb.cluster import Cluster
from shardemb.constraints import Constraints
from shardemb.kernel_choice import Kernel
from shardemb.layouts import Layout
from shardemb.modules.discovery import Collection, Table, tables_of
from shardemb.planning.contradictions import check_constraints
from shardemb.planning.kernel_rules import why_not_by_kernel, why_not_sliced
from shardemb.planning.layout_rules import why_not
from shardemb.text import some_names
from shardemb.workload import Workload


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What is to be planned.

    Attributes:
        collections: By path.
        cluster: The ranks.
        kernel: What looks up and updates the rows.
        named: Layouts that are named, by table.
        workload: The batches.
        constraints: What the plan must keep to.
    """

    collections: Mapping[str, Collection]
    cluster: Cluster
    kernel: Kernel
    named: Mapping[str, Layout] = field(default_factory=dict)
    workload: Workload = field(default_factory=Workload)
    constraints: Constraints = field(default_factory=Constraints)

    @property
    def tables(self) -> dict[str, Table]:
        """All tables by name."""
        return tables_of(self.collections)

    @property
    def sizes(self) -> dict[str, int]:
        """Number of ranks, and of those on each node."""
        return {
            "world_size": self.cluster.world_size,
            "local_world_size": self.cluster.ranks_per_node,
        }

    @property
    def bytes_per_rank(self) -> int:
        """Bytes of memory that a rank has for tables and their optimizer state."""
        return int(self.cluster.memory_bytes * (1 - self.constraints.headroom))


def check_problem(problem: Problem) -> None:
    """Refuses names, workloads and constraints that no plan can keep to, whatever the memory.

    Args:
        problem: What is to be planned.

    Raises:
        ValueError: A wish is of another kind, the kernel does not take a table, a table or feature
            is unknown, a layout does not fit its table, the kernel or the ranks, the profile does
            not fit the tables, constraints leave no memory for them, or contradict layouts or each
            other.
    """
    _check_kinds(problem)
    _check_memory(problem)
    _check_kernel(problem)
    _check_named(problem)
    _check_workload(problem)
    check_constraints(problem.constraints, problem.tables, problem.named, **problem.sizes)


def _check_kinds(problem: Problem) -> None:
    """Refuses wishes of another kind, before anything is asked of them.

    Raises:
        ValueError: There is one.
    """
    if not isinstance(problem.named, Mapping) or not all(isinstance(n, str) for n in problem.named):
        raise ValueError(
            "layouts must be given by table name, such as {'user': row_wise()}, got "
            f"{problem.named!r}"
        )
    if not isinstance(problem.workload, Workload):
        raise ValueError(
            f"workload must be a Workload, such as Workload(batch_size=512), got "
            f"{problem.workload!r}"
        )
    if not isinstance(problem.constraints, Constraints):
        raise ValueError(
            "constraints must be Constraints, such as Constraints(headroom=0.2), got "
            f"{problem.constraints!r}"
        )


def _check_memory(problem: Problem) -> None:
    """Refuses a headroom that is all of the memory.

    Raises:
        ValueError: It is.
    """
    if problem.bytes_per_rank < 1:
        raise ValueError(
            f"no memory is left for tables: the cluster has "
            f"memory_bytes={problem.cluster.memory_bytes} on a rank, and the constraints keep "
            f"headroom={problem.constraints.headroom!r} of it free; use more memory or less "
            "headroom"
        )


def _check_kernel(problem: Problem) -> None:
    """Refuses tables that the kernel does not take.

    Raises:
        ValueError: There is one.
    """
    for name, table in problem.tables.items():
        reason = why_not_by_kernel(table, problem.kernel, problem.cluster.device)
        if reason:
            raise ValueError(f"table {name!r}: {reason}")


def _check_named(problem: Problem) -> None:
    """Refuses layouts of no table, and those that do not fit their table, the kernel or the ranks.

    Raises:
        ValueError: There is one.
    """
    tables = problem.tables
    for name, layout in problem.named.items():
        if name not in tables:
            raise ValueError(
                f"the layouts name table {name!r}, the model has {some_names(tables, name)}"
            )
        if not isinstance(layout, Layout):
            raise ValueError(
                f"table {name!r}: the layout must come from shardemb.layouts, such as row_wise(), "
                f"got {layout!r}"
            )
        reason = why_not(tables[name], layout, **problem.sizes) or why_not_sliced(
            tables[name], layout, problem.kernel
        )
        if reason:
            raise ValueError(f"table {name!r}: {reason}")


def _check_workload(problem: Problem) -> None:
    """Refuses ids of a feature that no table looks up, and a profile of other tables.

    Raises:
        ValueError: There are such ids.
    """
    tables = problem.tables.values()
    features = [feature for table in tables for feature in table.config.feature_names]
    for feature in problem.workload.ids_per_sample:
        if feature not in features:
            raise ValueError(
                f"workload: ids_per_sample names feature {feature!r}, the tables look up "
                f"{some_names(features, feature)}"
            )
    profile = problem.workload.profile
    if profile is not None and not set(profile.features) & set(features):
        raise ValueError(
            f"workload: the profile of {profile.source} is of other data: it counts "
            f"{_few(profile.features)}, and the tables look up {_few(features)}; name the features "
            "alike, or profile this model's data"
        )
    for table in tables:
        for feature in table.config.feature_names:
            problem.workload.profile_of(
                feature, table=table.name, num_embeddings=table.config.num_embeddings
            )


def _few(names: Iterable[str]) -> str:
    first, *rest = list(names) or ["nothing"]
    return f"{first!r}" + (f" and {len(rest)} more" if rest else "")
