"""The batches of one step: read, checked and moved, and what all ranks know of each other's."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torchrec import KeyedJaggedTensor

from shardemb.agree import raise_on_all_ranks
from shardemb.data.guarded_forward import CheckedBatch, GuardedForward
from shardemb.env import Env
from shardemb.errors import RunError
from shardemb.exchange import exchange_group

_FAILED, _COUNT, _COUNT_SQUARED, _SIZE, _LOSS = range(5)


def num_samples_of(batch: Any) -> int:
    """The samples of a batch, on which every part of it that has one row a sample agrees.

    Args:
        batch: A tensor, a `KeyedJaggedTensor`, or a dataclass, dict, list or tuple that holds some.

    Returns:
        The number of samples: of its first `KeyedJaggedTensor`; else the length of its dense
        features, floating and of two dimensions or more; else that of its tensors.

    Raises:
        ValueError: There is neither, or their lengths differ: some may be flat ids.

    Example:
        >>> num_samples_of({"ids": torch.zeros(20).long(), "dense": torch.zeros(8, 3)})
        8
    """
    leaves = list(_leaves(batch))
    for leaf in leaves:
        if isinstance(leaf, KeyedJaggedTensor):
            return int(leaf.stride())
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.dim() > 0]
    dense = [tensor for tensor in tensors if tensor.is_floating_point() and tensor.dim() > 1]
    telling = dense or tensors
    lengths = sorted({len(tensor) for tensor in telling})
    if len(lengths) != 1:
        why = f"its tensors have lengths {lengths}" if lengths else "it holds no tensor"
        raise ValueError(
            f"cannot tell the samples of a batch of type {type(batch).__name__}: {why}; say it by "
            "TrainPipeline(..., num_samples=lambda batch: ...)"
        )
    return lengths[0]


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """One batch of a step.

    Attributes:
        batch: As the loader gave it, on the device.
        num_samples: Of this rank.
        checked: Guards, and the features that each has checked.
        weight: Of its mean loss, so that the mean over ranks of the sum over micro-batches is the
            mean over all samples; known when all ranks agreed.
    """

    batch: Any
    num_samples: int
    checked: Sequence[tuple[GuardedForward, CheckedBatch]]
    weight: float = math.nan


@dataclass(frozen=True, kw_only=True)
class BatchReader:
    """Reads batches.

    Attributes:
        guards: What checks them.
        env: This process.
        num_samples: Tells the samples of one.
    """

    guards: Sequence[GuardedForward]
    env: Env
    num_samples: Callable[[Any], int]

    def read(self, batch: Any) -> MicroBatch:
        """Checks a batch and moves it to the device.

        Raises:
            ValueError: It is refused.
        """
        num_samples = self.num_samples(batch)
        if num_samples == 0:
            raise ValueError("a batch must have at least one sample, got none")
        who = [_check(self.guards, features) for features in _features(batch)]
        moved = _to_device(batch, self.env.device)
        checked = [
            (guard, CheckedBatch(features))
            for checked_by, features in zip(who, _features(moved), strict=True)
            for guard in checked_by
        ]
        return MicroBatch(batch=moved, num_samples=num_samples, checked=checked)


class StepBatches:
    """The next batches of this rank, and what the other ranks said of theirs.

    Args:
        batches: Where they come from; at once as many are taken as a step has.
        most: How many a step has, unless the loader ends.
        reader: Reads them.
    """

    def __init__(self, batches: Iterator[Any], most: int, reader: BatchReader) -> None:
        self._most, self._env = most, reader.env
        self._error: Exception | None = None
        self._micro_batches: list[MicroBatch] = []
        self._losses: Sequence[torch.Tensor] = ()
        self._sent: dist.Work | None = None
        try:
            while len(self._micro_batches) < most:
                self._micro_batches.append(reader.read(next(batches)))
        except StopIteration:
            pass
        except Exception as error:  # noqa: BLE001 - raised by `agreed`, on every rank
            self._error = error

    def announce(self, losses: Sequence[torch.Tensor] = ()) -> None:
        """Sends word to the other ranks; does not wait.

        Args:
            losses: Of the step before, weighted.
        """
        count = len(self._micro_batches)
        said = [0.0] * 5
        said[_FAILED] = self._error is not None
        said[_COUNT], said[_COUNT_SQUARED] = count, count**2
        said[_SIZE] = sum(micro_batch.num_samples for micro_batch in self._micro_batches)
        self._sum = torch.tensor(said, dtype=torch.float64).to(self._env.device)
        self._losses = losses
        for loss in losses:
            self._sum[_LOSS] += loss.squeeze()
        if self._env.world_size > 1:
            group = exchange_group(self._env.device)
            self._sent = dist.all_reduce(self._sum, group=group, async_op=True)

    def mean_loss(self, step: int) -> torch.Tensor:
        """The mean of the losses that were announced, a scalar (0-dim) float64 tensor.

        Args:
            step: Number of their step, for messages.

        Returns:
            The mean over ranks.

        Raises:
            RunError: It is not finite.
        """
        self._wait()
        mean = self._sum[_LOSS] / self._env.world_size
        if not torch.isfinite(mean):
            raise RunError(
                f"{self._not_finite(step)}; lower the learning rates, or look for values in the "
                "data that are not finite. No row or parameter was updated in that step"
            )
        return mean

    def agreed(self, step: int) -> list[MicroBatch]:
        """The batches, none when all ranks' loaders have ended.

        Args:
            step: Number of the step, for messages.

        Returns:
            As many on each rank, at most as many as a step has.

        Raises:
            RunError: The ranks' loaders differ.
        """
        self._wait()
        failed, count, count_squared, size, _ = self._sum.tolist()
        world_size = self._env.world_size
        if failed:
            what = "batch" if self._most == 1 else "batches"
            raise_on_all_ranks(self._env, f"reading the {what} of step {step}", self._error)
        if count_squared * world_size != count**2:  # some have more than others
            raise RunError(self._uneven(step))
        return [
            replace(micro_batch, weight=micro_batch.num_samples * world_size / size)
            for micro_batch in self._micro_batches
        ]

    def _wait(self) -> None:
        if self._sent is not None:
            self._sent.wait()
            self._sent = None

    def _of_ranks(self, mine: Any) -> list[Any]:
        of_ranks = [mine] * self._env.world_size
        if self._env.world_size > 1:
            dist.all_gather_object(of_ranks, mine)
        return of_ranks

    def _uneven(self, step: int) -> str:
        """Which loader ended too early. On all ranks together."""
        mine = len(self._micro_batches)
        counts, most = zip(*self._of_ranks((mine, self._most)), strict=True)
        if len(set(most)) > 1:
            return f"the ranks differ in num_micro_batches: {list(most)}; give all the same"
        ended = [count < max(counts) for count in counts]
        of = f"micro-batch {min(counts) + 1} of " if self._most > 1 else ""
        return (
            f"the loaders of {sum(ended)} of {len(counts)} ranks ended before {of}step {step}, "
            f"that of rank {self._env.rank} {'ended' if ended[self._env.rank] else 'goes on'}; "
            "give every rank the same number of batches"
        )

    def _not_finite(self, step: int) -> str:
        """Which of the announced losses are not finite. On all ranks together."""
        of_ranks = self._of_ranks([float(loss) for loss in self._losses])
        bad = [
            (rank, number, loss)
            for rank, losses in enumerate(of_ranks)
            for number, loss in enumerate(losses, start=1)
            if not math.isfinite(loss)
        ]
        first, number, loss = bad[0]
        ranks = {rank for rank, _, _ in bad}
        of = f"micro-batch {number} of " if len(self._losses) > 1 else ""
        if self._env.world_size == 1:
            return f"the loss of {of}step {step} is {loss}"
        if len(ranks) == 1:
            return f"the loss of {of}step {step} is {loss} on rank {first}"
        on = "all ranks" if len(ranks) == len(of_ranks) else f"ranks {sorted(ranks)}"
        return f"the loss of step {step} is not finite on {on}"


def _check(guards: Sequence[GuardedForward], batch: KeyedJaggedTensor) -> list[GuardedForward]:
    """Checks a batch by the guards whose features it has, and returns them."""
    keys, has_weights = set(batch.keys()), batch.weights_or_none() is not None
    able = [
        guarded
        for guarded in guards
        if keys.issuperset(guarded.guard.feature_names) and guarded.guard.is_weighted == has_weights
    ]
    if not able:  # it may be meant for the collection with which it shares the most features
        meant = max(guards, key=lambda one: len(keys & {*one.guard.feature_names}), default=None)
        if meant is not None and keys & {*meant.guard.feature_names}:
            if meant.weights_learn and not has_weights:  # the model may compute them
                batch = _weighted(batch)
            meant.guard.check(batch)
    for guarded in able:
        guarded.guard.check(batch)
    return able


def _weighted(batch: KeyedJaggedTensor) -> KeyedJaggedTensor:
    ones_N = torch.ones(batch.values().shape)
    return KeyedJaggedTensor(
        keys=batch.keys(), values=batch.values(), lengths=batch.lengths(), weights=ones_N
    )


def _features(batch: Any) -> list[KeyedJaggedTensor]:
    return [leaf for leaf in _leaves(batch) if isinstance(leaf, KeyedJaggedTensor)]


def _leaves(batch: Any) -> Iterator[Any]:
    if is_dataclass(batch) and not isinstance(batch, type):
        for field in fields(batch):
            yield from _leaves(getattr(batch, field.name))
    elif isinstance(batch, dict):
        for value in batch.values():
            yield from _leaves(value)
    elif isinstance(batch, (list, tuple)):
        for value in batch:
            yield from _leaves(value)
    else:
        yield batch


def _to_device(batch: Any, device: torch.device) -> Any:
    if hasattr(batch, "to"):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {name: _to_device(value, device) for name, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_to_device(value, device) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(_to_device(value, device) for value in batch)
    if is_dataclass(batch) and not isinstance(batch, type):
        moved = {f.name: _to_device(getattr(batch, f.name), device) for f in fields(batch)}
        return replace(batch, **moved)
    return batch
