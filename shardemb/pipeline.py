"""The training loop: every rank takes a step on its part of one global batch, or none does."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed.model_parallel import DistributedModelParallel

from shardemb.data.guarded_forward import guards_of, known_batches
from shardemb.env import Env
from shardemb.optimizer import Optimizer
from shardemb.step_batches import BatchReader, MicroBatch, StepBatches, num_samples_of


class TrainPipeline:
    """Runs a model's training steps.

    In every step the ranks exchange a few numbers, while a backward pass runs: the loss, and
    whether each has its next batches, and of what size. So an error in one rank's loader, or a
    loader that ends early, ends the run on all ranks before any of them waits for the others; and
    a loss that is not finite ends it before rows or parameters are updated. An error in the model's
    own forward or backward ends its rank, and that, at once, the others.

    Args:
        model: Of `shard_modules`. Its forward takes a batch and returns the loss, or a tuple that
            begins with it: the mean over the samples of the batch. Where batches differ in size,
            between ranks or micro-batches, each mean counts by its number of samples, so that the
            step is that of the global batch.
        optimizer: Of `build_optimizer`.
        env: This process.
        num_micro_batches: How many batches of the loader make a step: each has its own forward and
            backward pass, and one update follows. The step is that of one batch of all their
            samples, and takes the memory of the activations of one; held are the batches of a step
            with the gradients of what they looked up and, from its last backward pass on, the
            batches of the next.
        num_samples: Tells the number of samples of a batch, by which its mean loss counts.

    Raises:
        ValueError: The model is not sharded, the optimizer another one, or `num_micro_batches` not
            positive.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        env: Env,
        *,
        num_micro_batches: int = 1,
        num_samples: Callable[[Any], int] = num_samples_of,
    ) -> None:
        if not isinstance(model, DistributedModelParallel):
            raise ValueError(
                "TrainPipeline takes the model that shard_modules returned, got "
                f"{type(model).__name__}, whose ranks would train apart"
            )
        if not isinstance(optimizer, Optimizer):
            raise ValueError(
                "TrainPipeline takes the optimizer that build_optimizer returned, got "
                f"{type(optimizer).__name__}, which would train no rows"
            )
        if not isinstance(num_micro_batches, int) or num_micro_batches < 1:
            raise ValueError(f"num_micro_batches must be at least 1, got {num_micro_batches!r}")
        self._model, self._optimizer = model, optimizer
        self._num_micro_batches = num_micro_batches
        self._reader = BatchReader(guards=guards_of(model), env=env, num_samples=num_samples)

    def run(
        self, loader: Iterable[Any], num_steps: int, *, first_step: int = 0
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Trains until step `num_steps` or until the loader ends.

        Args:
            loader: Yields this rank's part of each global batch, or of each micro-batch: tensors
                and `KeyedJaggedTensor`s, or a dataclass, dict, list or tuple of such; with
                `num_samples` anything with `.to(device)`. Parts may differ in size. If it ends
                within a step, on all ranks at the same micro-batch, that step has fewer.
            num_steps: The step after which to stop, counted from 0.
            first_step: The number of the first step; above 0 after a checkpoint was loaded.

        Yields:
            The number of steps done, and the loss of the global batch before its update, a scalar
            (0-dim) tensor, float64: the mean over its samples, so that of the batches' losses by
            their numbers of samples.

        Raises:
            Exception: What this rank's loader raised.
            RunError: Another rank's loader failed or ended early; or a loss is not finite, and the
                step not taken.
            ValueError: The model's forward returns no loss.
        """
        if first_step >= num_steps:
            return
        batches = iter(loader)
        upcoming = self._next(batches)
        upcoming.announce()
        for step in range(first_step + 1, num_steps + 1):
            micro_batches = upcoming.agreed(step)
            if not micro_batches:
                return
            self._model.train()
            self._optimizer.zero_grad()
            losses = []
            # in the first, DistributedDataParallel learns its graph, by averaging
            with nullcontext() if step == first_step + 1 else self._no_sync():
                for micro_batch in micro_batches[:-1]:
                    loss = self._loss(micro_batch)
                    loss.backward()
                    losses.append(loss.detach())
            loss = self._loss(micro_batches[-1])
            upcoming = self._next(batches if step < num_steps else iter(()))
            upcoming.announce([*losses, loss.detach()])
            loss.backward()
            mean_loss = upcoming.mean_loss(step)
            self._optimizer.step()
            yield step, mean_loss

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

    def _next(self, batches: Iterator[Any]) -> StepBatches:
        return StepBatches(batches, self._num_micro_batches, self._reader)

    def _loss(self, micro_batch: MicroBatch) -> torch.Tensor:
        """This rank's part of the loss of a step."""
        with known_batches(micro_batch.checked):
            return _loss_of(self._model(micro_batch.batch)) * micro_batch.weight

    @contextmanager
    def _no_sync(self) -> Iterator[None]:
        """Lets dense gradients add up on each rank, to be averaged in a later backward pass."""
        with ExitStack() as stack:
            for module in self._model.modules():
                if isinstance(module, DistributedDataParallel):
                    stack.enter_context(module.no_sync())
            yield

    def _results(self, batches: Iterator[Any]) -> Iterator[tuple[Any, Any]]:
        for step in itertools.count(1):
            upcoming = StepBatches(batches, 1, self._reader)
            upcoming.announce()
            micro_batches = upcoming.agreed(step)
            if not micro_batches:
                return
            for micro_batch in micro_batches:
                with torch.no_grad(), known_batches(micro_batch.checked):
                    result = self._model(micro_batch.batch)
                yield micro_batch.batch, result


def _loss_of(result: Any) -> torch.Tensor:
    loss = result[0] if isinstance(result, tuple) else result
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        raise ValueError(
            "the model's forward must return a loss of one element, or a tuple that begins with "
            f"it, got {type(loss).__name__} {list(getattr(loss, 'shape', []))}"
        )
    return loss
