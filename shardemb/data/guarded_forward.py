"""Checks every batch that a sharded collection looks up, and hands on what is to be looked up."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torchrec import KeyedJaggedTensor

from shardemb.data.bag_padding import leave_padding_out
from shardemb.data.id_guard import FeatureLimit, IdGuard


class CheckedBatch:
    """What makes a checked batch known again: the same ids and weights, unchanged, in their bags.

    Args:
        batch: The batch, on the device.
    """

    def __init__(self, batch: KeyedJaggedTensor) -> None:
        self._keys = list(batch.keys())
        self._tensors = _tensors_of(batch)
        self._versions = [tensor._version for tensor in self._tensors]

    def is_in(self, batch: KeyedJaggedTensor) -> bool:
        """Whether a batch has these ids, with these weights, in these bags."""
        tensors = _tensors_of(batch)
        return (
            len(tensors) == len(self._tensors)
            and all(mine is its for mine, its in zip(self._tensors, tensors, strict=True))
            and [tensor._version for tensor in tensors] == self._versions
            and list(batch.keys()) == self._keys
        )


def _tensors_of(batch: KeyedJaggedTensor) -> list[torch.Tensor]:
    tensors = (batch.values(), batch.lengths(), batch.weights_or_none())
    return [tensor for tensor in tensors if tensor is not None]


class GuardedForward:
    """A forward pre-hook of a sharded collection: checks its batch, and hands on what is looked up.

    TorchRec freezes the order of keys at the first batch, and a batch with the same keys in another
    order would look up the wrong tables, in silence; and ranks whose ids differ in dtype die. It
    knows of no padding rows, so their ids are taken out of the bags.

    Args:
        limits: One for each pair of feature and table of the collection.
        is_weighted: Whether the collection weighs its ids.
        check_ids: Whether to check every batch that was not checked already.
        padding_of: The row of each feature that its bags leave out, if there is one.
        keeps_int32: Whether ids of 32 bits stay so, where no other rank's may have 64 and the
            kernel takes them; if not, all become int64.
        weights_learn: Whether weights may require gradients.
    """

    def __init__(
        self,
        limits: Sequence[FeatureLimit],
        *,
        is_weighted: bool,
        check_ids: bool,
        padding_of: Mapping[str, int],
        keeps_int32: bool = False,
        weights_learn: bool = False,
    ) -> None:
        self.guard = IdGuard(limits, is_weighted=is_weighted)
        self.checked: list[CheckedBatch] = []
        """Batches that need no further check."""
        self._check_ids, self._padding_of = check_ids, padding_of
        self._keys, self._keeps_int32 = self.guard.feature_names, keeps_int32
        self.weights_learn = weights_learn

    def __call__(
        self,
        module: nn.Module,  # noqa: ARG002
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What torch calls before a forward.

        Args:
            module: The collection.
            args: What its forward was called with.
            kwargs: What it was called with by name.

        Returns:
            The batch as it is to be looked up, and no arguments by name.

        Raises:
            ValueError: The batch is refused.
        """
        (batch,) = (*args, *kwargs.values())
        if not isinstance(batch, KeyedJaggedTensor):
            raise ValueError(
                f"the collection of features {self._keys} looks up a KeyedJaggedTensor, got "
                f"{type(batch).__name__}; shardemb.keyed_jagged_tensor makes one"
            )
        if batch.variable_stride_per_key():
            raise ValueError(
                f"the collection of features {self._keys} got a batch whose features differ in "
                "their number of samples, which is not supported; give each sample a bag of every "
                "feature, be it empty"
            )
        self._check_weights(batch)
        self.guard.check_features(batch)
        if self._check_ids and not any(checked.is_in(batch) for checked in self.checked):
            self.guard.check(batch)
        keys = list(batch.keys())
        if keys != self._keys:
            batch = batch.permute([keys.index(key) for key in self._keys])
        ids_N = batch.values() if self._keeps_int32 else batch.values().long()
        if ids_N is not batch.values() or batch.lengths().dtype != torch.int64:
            batch = KeyedJaggedTensor(
                keys=self._keys,
                values=ids_N,
                lengths=batch.lengths().long(),
                weights=batch.weights_or_none(),
            )
        if self._padding_of:
            batch = leave_padding_out(batch, self._padding_of)
        return (batch,), {}

    def _check_weights(self, batch: KeyedJaggedTensor) -> None:
        weights_N = batch.weights_or_none()
        if (
            weights_N is not None
            and weights_N.requires_grad
            and torch.is_grad_enabled()
            and self.guard.is_weighted
            and not self.weights_learn
        ):
            raise ValueError(
                f"the collection of features {self._keys} got weights that require a gradient, and "
                "FBGEMM's kernel gives weights none when it is sharded; detach them, or plan with "
                "kernel='native', on ranks on the CPU"
            )


def guards_of(model: nn.Module) -> list[GuardedForward]:
    """The guards that `shard_modules` put on the collections of a model."""
    hooks = (hook for module in model.modules() for hook in module._forward_pre_hooks.values())
    return [hook for hook in hooks if isinstance(hook, GuardedForward)]


@contextmanager
def known_batches(checked: Sequence[tuple[GuardedForward, CheckedBatch]]) -> Iterator[None]:
    """Runs a forward that passes batches which were checked already.

    Args:
        checked: Guards, and the batches that each has checked.

    Yields:
        Nothing.
    """
    for guarded, batch in checked:
        guarded.checked.append(batch)
    try:
        yield
    finally:
        for guarded, _ in checked:
            guarded.checked.clear()
