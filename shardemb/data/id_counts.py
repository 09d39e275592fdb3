"""How many ids batches had, and what became of those that were changed, on one rank or on all."""

# F features

from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing import get_context

import torch
import torch.distributed as dist

from shardemb.config import OutOfRange
from shardemb.env import Env
from shardemb.exchange import exchange_group

_DONE = {"drop": "dropped", "clamp": "clamped", "hash": "hashed", "oov_row": "oov"}


@dataclass(frozen=True, kw_only=True)
class IdCount:
    """What became of the ids of a feature.

    Attributes:
        out_of_range: The policy of its table.
        num_ids: Ids that were given.
        num_changed: Ids among them that were dropped, clamped, hashed or sent to the last row, as
            the policy says.
    """

    out_of_range: OutOfRange
    num_ids: int
    num_changed: int


class IdCounts:
    """Counts of each feature, also of batches that workers of DataLoaders make.

    The counts lie in shared memory, with a lock around each addition, so that the process that made
    them reads what its workers counted, of any number of loaders. Processes get them when they are
    started, by fork or spawn; the lock cannot be pickled otherwise.

    Args:
        policies: `out_of_range` by feature.

    Example:
        >>> counts = IdCounts({"clicked": "drop"})
        >>> counts.add({"clicked": (5, 2)})
        >>> counts.of_this_rank()["clicked"]
        IdCount(out_of_range='drop', num_ids=5, num_changed=2)
    """

    def __init__(self, policies: Mapping[str, OutOfRange]) -> None:
        self._policies = dict(policies)
        self._place = {feature: at for at, feature in enumerate(policies)}
        self._lock = get_context("spawn").Lock()  # fork's cannot be given to spawned processes
        self._counts_F2 = torch.zeros(len(policies), 2, dtype=torch.int64)
        self._counts_F2.share_memory_()
        self._forgotten_F2 = torch.zeros(len(policies), 2, dtype=torch.int64)

    def add(self, counts: Mapping[str, tuple[int, int]]) -> None:
        """Adds those of a batch.

        Args:
            counts: By feature, ids given and ids changed.
        """
        places = torch.tensor([self._place[feature] for feature in counts], dtype=torch.int64)
        added_F2 = torch.tensor(list(counts.values()), dtype=torch.int64)
        with self._lock:
            self._counts_F2.index_add_(0, places, added_F2)

    def reset(self) -> None:
        """Begins again at zero. To be called where the counts are read, not in a worker."""
        self._forgotten_F2 = self._counts_F2.clone()

    def of_this_rank(self) -> dict[str, IdCount]:
        """The counts since the last reset, by feature."""
        return self._by_feature(self._since_reset())

    def of_all_ranks(self, env: Env) -> dict[str, IdCount]:
        """The sums over ranks. A collective: every rank must call it.

        Args:
            env: This process.

        Returns:
            By feature, since each rank's last reset.
        """
        counts_F2 = self._since_reset().to(env.device)
        if env.world_size > 1:
            dist.all_reduce(counts_F2, group=exchange_group(env.device))
        return self._by_feature(counts_F2.cpu())

    def _since_reset(self) -> torch.Tensor:
        return self._counts_F2 - self._forgotten_F2

    def _by_feature(self, counts_F2: torch.Tensor) -> dict[str, IdCount]:
        return {
            feature: IdCount(out_of_range=policy, num_ids=num_ids, num_changed=num_changed)
            for (feature, policy), (num_ids, num_changed) in zip(
                self._policies.items(), counts_F2.tolist(), strict=True
            )
        }


def changes_of(counts: Mapping[str, IdCount]) -> dict[str, dict[str, int]]:
    """The features of which ids were changed, as plain numbers for a log.

    Args:
        counts: By feature.

    Returns:
        For each such feature `num_ids`, and the ids that were `dropped`, `clamped`, `hashed` or
        `oov` (sent to the last row).

    Example:
        >>> changes_of({"clicked": IdCount(out_of_range="drop", num_ids=5, num_changed=2)})
        {'clicked': {'num_ids': 5, 'dropped': 2}}
    """
    return {
        feature: {"num_ids": count.num_ids, _DONE[count.out_of_range]: count.num_changed}
        for feature, count in counts.items()
        if count.num_changed
    }


def describe_changes(counts: Mapping[str, IdCount]) -> str:
    """How many ids were changed how, of the ids of all features, for people.

    Args:
        counts: By feature.

    Returns:
        Some words, or none where no id was changed.

    Example:
        >>> describe_changes({"clicked": IdCount(out_of_range="drop", num_ids=5000, num_changed=2)})
        'ids: 2 of 5,000 dropped'
    """
    changed: dict[str, int] = {}
    for change in changes_of(counts).values():
        (done,) = change.keys() - {"num_ids"}
        changed[done] = changed.get(done, 0) + change[done]
    num_ids = sum(count.num_ids for count in counts.values())
    words = ", ".join(f"{number:,} of {num_ids:,} {done}" for done, number in changed.items())
    return f"ids: {words}" if words else ""
