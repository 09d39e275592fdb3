"""The training loop: every rank takes a step on its part of one global batch, or none does."""

# B batch on this rank

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torchrec import KeyedJaggedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel

from shardemb.agree import raise_on_all_ranks
from shardemb.data.guarded_forward import CheckedBatch, GuardedForward, guards_of, one_step
from shardemb.env import Env
from shardemb.errors import RunError

_FAILED, _ENDED, _SIZE, _LOSS = range(4)


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


class TrainPipeline:
    """Runs a model's training steps.

    In every step the ranks exchange a few numbers, while the backward pass runs: the loss, and
    whether each has its next batch, and of what size. So an error in one rank's loader, or a loader
    that ends early, ends the run on all ranks before any of them waits for the others. An
    error in the model's own forward or backward ends its rank, and that, at once, the others.

    Args:
        model: Of `shard_modules`. Its forward takes a batch and returns the loss, or a tuple that
            begins with it: the mean over the samples of this rank. Where ranks have batches of
            different sizes, each mean counts by its number of samples, so that the step is that of
            the global batch.
        optimizer: Of `build_optimizer`.
        env: This process.
        num_samples: Tells the number of samples of a batch, by which its mean loss counts.

    Raises:
        ValueError: The model is not sharded.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        env: Env,
        *,
        num_samples: Callable[[Any], int] = num_samples_of,
    ) -> None:
        if not isinstance(model, DistributedModelParallel):
            raise ValueError(
                "TrainPipeline takes the model that shard_modules returned, got "
                f"{type(model).__name__}, whose ranks would train apart"
            )
        self._model, self._optimizer, self._env = model, optimizer, env
        self._guards = guards_of(model)
        self._num_samples = num_samples

    def run(
        self, loader: Iterable[Any], num_steps: int, *, first_step: int = 0
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Trains until step `num_steps` or until the loader ends.

        Args:
            loader: Yields this rank's part of each global batch: tensors and `KeyedJaggedTensor`s,
                or a dataclass, dict, list or tuple of such; with `num_samples` anything with
                `.to(device)`. Parts may differ in size.
            num_steps: The step after which to stop, counted from 0.
            first_step: The number of the first step; above 0 after a checkpoint was loaded.

        Yields:
            The number of steps done, and the loss of the global batch before its update, a scalar
            (0-dim) tensor, float64.

        Raises:
            Exception: What this rank's loader raised.
            RunError: Another rank's loader failed or ended early, or the loss is not finite.
            ValueError: The model's forward returns no loss, or looks a collection up twice.
        """
        if first_step >= num_steps:
            return
        batches = iter(loader)
        upcoming = self._next(batches)
        upcoming.announce()
        for step in range(first_step + 1, num_steps + 1):
            batch = upcoming.agreed(step)
            if batch is None:
                return
            self._model.train()
            self._optimizer.zero_grad()
            with one_step(self._guards, upcoming.checked):
                loss = _loss_of(self._model(batch)) * upcoming.weight
            upcoming = self._next(batches if step < num_steps else iter(()))
            upcoming.announce(loss.detach())
            loss.backward()
            self._optimizer.step()
            yield step, upcoming.mean_loss(step)

    def evaluate(self, loader: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
        """Runs the model over all batches of a loader and changes nothing.

        Args:
            loader: As for `run`.

        Yields:
            Each batch, on the device, and what the model's forward returned for it.

        Raises:
            Exception: What this rank's loader raised.
            RunError: Another rank's loader failed or ended early.
        """
        was_training = self._model.training
        self._model.eval()
        try:
            yield from self._results(iter(loader))
        finally:
            self._model.train(was_training)

    def _next(self, batches: Iterator[Any]) -> "_NextBatch":
        return _NextBatch(batches, self._guards, self._env, self._num_samples)

    def _results(self, batches: Iterator[Any]) -> Iterator[tuple[Any, Any]]:
        for step in itertools.count(1):
            upcoming = self._next(batches)
            upcoming.announce()
            batch = upcoming.agreed(step)
            if batch is None:
                return
            with torch.no_grad(), one_step(self._guards, upcoming.checked):
                result = self._model(batch)
            yield batch, result


class _NextBatch:
    """A batch that was fetched and checked, and what the other ranks said of theirs."""

    def __init__(
        self,
        batches: Iterator[Any],
        guards: Sequence[GuardedForward],
        env: Env,
        num_samples: Callable[[Any], int],
    ) -> None:
        self._env = env
        self._error: Exception | None = None
        self._batch: Any = None
        self._mine = [0.0] * 4
        self.weight = 1.0
        """Of this rank's mean loss in the mean over ranks, known when all agreed."""
        self._sent: dist.Work | None = None
        self.checked: list[tuple[GuardedForward, CheckedBatch]] = []
        try:
            self._batch = next(batches)
            self._mine[_SIZE] = num_samples(self._batch)
            if self._mine[_SIZE] == 0:
                raise ValueError("a batch must have at least one sample, got none")
            who = [_check(guards, features) for features in _features(self._batch)]
            self._batch = _to_device(self._batch, env.device)
            for checked_by, features in zip(who, _features(self._batch), strict=True):
                self.checked += [(guard, CheckedBatch(features)) for guard in checked_by]
        except StopIteration:
            self._mine[_ENDED] = 1
        except Exception as error:  # noqa: BLE001 - raised by `agreed`, on every rank
            self._error = error
            self._mine[_FAILED] = 1

    def announce(self, loss: torch.Tensor | None = None) -> None:
        """Sends word to the other ranks, with the loss of the batch before; does not wait."""
        self._sum = torch.tensor(self._mine, dtype=torch.float64).to(self._env.device)
        if loss is not None:
            self._sum[_LOSS] = loss
        if self._env.world_size > 1:
            self._sent = dist.all_reduce(self._sum, async_op=True)

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
                f"the loss of step {step} is {float(mean)}; lower the learning rates, or look for "
                "values in the data that are not finite"
            )
        return mean

    def agreed(self, step: int) -> Any:
        """The batch, or None when all ranks' loaders have ended.

        Args:
            step: Number of the step, for messages.

        Returns:
            The batch, on the device.

        Raises:
            RunError: The ranks' loaders differ.
        """
        self._wait()
        failed, ended, size, _ = self._sum.tolist()
        world_size = self._env.world_size
        if failed:
            raise_on_all_ranks(self._env, f"reading the batch of step {step}", self._error)
        if ended == world_size:
            return None
        if ended:
            raise RunError(
                f"the loaders of {ended:.0f} of {world_size} ranks ended before step {step}, that "
                f"of rank {self._env.rank} {'ended' if self._mine[_ENDED] else 'goes on'}; give "
                "every rank the same number of batches"
            )
        self.weight = self._mine[_SIZE] * world_size / size
        return self._batch

    def _wait(self) -> None:
        if self._sent is not None:
            self._sent.wait()
            self._sent = None


def _loss_of(result: Any) -> torch.Tensor:
    loss = result[0] if isinstance(result, tuple) else result
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        raise ValueError(
            "the model's forward must return a loss of one element, or a tuple that begins with "
            f"it, got {type(loss).__name__} {list(getattr(loss, 'shape', []))}"
        )
    return loss


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
            meant.guard.check_features(batch)
    for guarded in able:
        guarded.guard.check(batch)
    return able


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
