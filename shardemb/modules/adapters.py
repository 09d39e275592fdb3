"""Modules that are called as `nn.EmbeddingBag` and `nn.Embedding` are, and look up a collection.

`from_torch` makes them of torch's modules; it does not build them anew, so they have no `__init__`.
"""

# B bags, N ids, D embedding_dim

from typing import Any, NoReturn

import torch
import torchrec
from torch import nn
from torchrec import KeyedJaggedTensor

from shardemb.modules.training import note_training, noted_training

_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)


def feature_of(path: str) -> str:
    """The key by which an adapter hands its ids to its collection: its argument, `input`.

    Args:
        path: Of the adapter in the model.

    Returns:
        The key, which no batch of a user's is likely to have.

    Example:
        >>> feature_of("emb_l.0")
        'emb_l.0.input'
    """
    return f"{path}.input".removeprefix(".")


class _Adapter(nn.Module):
    """What both kinds share. Attributes of torch's module are kept beside these.

    Attributes:
        collection: TorchRec's, of one table; after `shard_modules` sharded.
        path: Of the adapter in the model.
        row_dtype: Of the weight, and so of what is returned.
        is_trained: Whether lookups have a gradient; after sharding, as it was before.
        num_embeddings: Number of rows.
        embedding_dim: Number of columns.
        padding_idx: A row without gradient, if not None.
    """

    collection: nn.Module
    path: str
    row_dtype: torch.dtype
    is_trained: bool
    num_embeddings: int
    embedding_dim: int
    padding_idx: int | None

    def __getattr__(self, name: str) -> Any:
        if name != "weight":
            return super().__getattr__(name)
        weight = _whole_weight(self.collection)
        if weight is None:
            raise AttributeError(
                f"module {self.path!r} is sharded and has no whole weight; its rows are in the "
                "model's state_dict()"
            )
        return weight

    def extra_repr(self) -> str:
        """What torch prints of the module."""
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}"

    def _looked_up(self, batch: KeyedJaggedTensor) -> Any:
        # without a gradient a frozen table may be looked up many times in one step
        weight = _whole_weight(self.collection)
        if weight is not None:
            self.is_trained = weight.requires_grad
        whole_on_cpu = weight is not None and weight.device.type == "cpu"
        try:
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.is_trained):
                return self.collection(batch)
        except (ValueError, IndexError, RuntimeError) as error:
            if isinstance(error, ValueError) or whole_on_cpu:
                self._check_rows(batch)  # it names what the user knows: module and ids
            raise

    def _check_rows(self, batch: KeyedJaggedTensor) -> None:
        ids_N = batch.values()
        outside = torch.nonzero((ids_N < 0) | (ids_N >= self.num_embeddings))
        if len(outside):
            at, ends = int(outside[0]), batch.lengths().cumsum(0)
            sample = int(torch.searchsorted(ends, at, right=True))
            self._refuse(
                f"id {int(ids_N[at])} of sample {sample} is outside 0..{self.num_embeddings - 1}; "
                f"the module has {self.num_embeddings} rows, mend the id or build it with more"
            )

    def _check_ids(self, ids: torch.Tensor) -> None:
        self._check_tensor("input", ids)
        if ids.dtype not in {torch.int32, torch.int64}:
            self._refuse(f"input must be int32 or int64, got {ids.dtype}; convert it")
        if ids.is_nested:
            self._refuse(
                "input is a nested tensor, which is not supported; give values and offsets"
            )

    def _check_tensor(self, name: str, value: object) -> None:
        if not isinstance(value, torch.Tensor):
            self._refuse(f"{name} must be a tensor, got {value!r:.80}; make one of it")

    def _refuse(self, reason: str) -> NoReturn:
        raise ValueError(f"module {self.path!r}: {reason}")


class AdaptedEmbeddingBag(_Adapter):
    """An `nn.EmbeddingBag` whose rows lie in a collection.

    Attributes:
        mode: "sum" or "mean".
        include_last_offset: Whether offsets end with the number of ids.
        is_weighted: Whether it may be called with per_sample_weights.
    """

    mode: str
    include_last_offset: bool
    is_weighted: bool

    def forward(
        self,
        input: torch.Tensor,
        offsets: torch.Tensor | None = None,
        per_sample_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Pools the rows of bags of ids, as `nn.EmbeddingBag` does.

        Args:
            input: Ids, int32 or int64 [N], or [B, L]: bags of L ids.
            offsets: Where in [N] each bag begins, integers [B], with `include_last_offset` [B + 1].
            per_sample_weights: What to multiply each row with, as `input`.

        Returns:
            The pooled rows, in the weight's dtype [B, embedding_dim]; zeros for an empty bag.

        Raises:
            ValueError: Arguments are no tensors, shapes or dtypes do not fit, an id is not in the
                table, or there are weights that the module was not made for, or that need a
                gradient where FBGEMM's kernel looks them up.
        """
        self._check_ids(input)
        for name, given in (("offsets", offsets), ("per_sample_weights", per_sample_weights)):
            if given is not None:
                self._check_tensor(name, given)
        lengths_B = self._lengths(input, offsets)
        weights_N = self._weights(input, per_sample_weights)
        ids_N = input.reshape(-1)
        batch = _one_feature(self.path, ids_N, lengths_B, weights_N)
        pooled_BD: torch.Tensor = self._looked_up(batch).values()
        return pooled_BD[: len(lengths_B)].to(self.row_dtype)

    def extra_repr(self) -> str:
        """What torch prints of the module."""
        return f"{super().extra_repr()}, mode={self.mode!r}"

    def _lengths(self, ids: torch.Tensor, offsets: torch.Tensor | None) -> torch.Tensor:
        if ids.dim() == 2 and offsets is None:
            return torch.full((ids.shape[0],), ids.shape[1], device=ids.device)
        if ids.dim() != 1 or offsets is None or offsets.dim() != 1:
            shape = None if offsets is None else list(offsets.shape)
            self._refuse(
                "input must be [N] with offsets [B], or [B, L] without offsets, got input "
                f"{list(ids.shape)} and offsets {shape}"
            )
        if offsets.dtype not in _INTEGERS:
            self._refuse(f"offsets must be integers, got {offsets.dtype}; convert them")
        bounds = offsets.long()
        if not self.include_last_offset:
            bounds = torch.cat([bounds, bounds.new_tensor([len(ids)])])
        lengths_B = bounds.diff()
        wrong = len(bounds) == 0 or (
            (bounds[0] != 0) | (bounds[-1] != len(ids)) | (lengths_B < 0).any()
        )
        if wrong:
            self._refuse(
                f"offsets must rise from 0 to at most the {len(ids)} ids, "
                f"{'and end there, ' if self.include_last_offset else ''}got "
                f"{offsets.tolist()!s:.80}"
            )
        return lengths_B

    def _weights(self, ids: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor | None:
        """A weight for each id where the collection is weighted, 1 where none are given."""
        is_sharded = _whole_weight(self.collection) is None
        dtype = torch.float32 if is_sharded else self.row_dtype  # as FBGEMM and torch want it
        if weights is None:
            ones = torch.ones(ids.numel(), dtype=dtype, device=ids.device)
            return ones if self.is_weighted else None
        if not self.is_weighted:
            self._refuse(
                "per_sample_weights are given, and its table is not made for them; name it in "
                f"from_torch(..., weighted=({self.path!r},))"
            )
        if weights.shape != ids.shape:
            self._refuse(
                f"per_sample_weights must have the shape of input, {list(ids.shape)}, got "
                f"{list(weights.shape)}"
            )
        return weights.reshape(-1).to(dtype)


class AdaptedEmbedding(_Adapter):
    """An `nn.Embedding` whose rows lie in a collection."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Looks up rows, as `nn.Embedding` does.

        Args:
            input: Ids of any shape, int32 or int64.

        Returns:
            The rows, in the weight's dtype [*input.shape, embedding_dim].

        Raises:
            ValueError: Ids are no tensor of integers, or one is not in the table.
        """
        self._check_ids(input)
        ids_N = input.reshape(-1)
        samples = max(1, input.shape[0] if input.dim() else 1)
        lengths_B = torch.full((samples,), len(ids_N) // samples, device=input.device)
        batch = _one_feature(self.path, ids_N, lengths_B, None)
        rows_ND: torch.Tensor = self._looked_up(batch)[feature_of(self.path)].values()
        return rows_ND.to(self.row_dtype).view(*input.shape, self.embedding_dim)


def adapt(
    path: str,
    module: nn.Module,
    collection: torchrec.EmbeddingBagCollection | torchrec.EmbeddingCollection,
) -> None:
    """Makes an adapter of torch's module, so that whatever refers to it goes on calling it.

    The weight stays the same object: optimizers that hold it and `model.to(device)` work as before.

    Args:
        path: Of the module in the model.
        module: The module, which is changed.
        collection: On meta, of one table; it takes the weight over.
    """
    adapter: Any = module
    weight = module.get_parameter("weight")
    pooled = isinstance(collection, torchrec.EmbeddingBagCollection)
    (table,) = (collection.embedding_bags if pooled else collection.embeddings).values()
    if weight.requires_grad:
        training = noted_training(table.weight)
        assert training is not None
        note_training(weight, training)
    table.weight = weight
    collection._device = weight.device
    del adapter.weight
    adapter.__class__ = AdaptedEmbeddingBag if pooled else AdaptedEmbedding
    adapter.collection = collection.train(module.training)
    adapter.path = path
    adapter.row_dtype, adapter.is_trained = weight.dtype, weight.requires_grad
    if pooled:
        adapter.is_weighted = collection.is_weighted()


def _whole_weight(collection: nn.Module) -> nn.Parameter | None:
    """The table of an unsharded collection."""
    if isinstance(collection, torchrec.EmbeddingBagCollection):
        (table,) = collection.embedding_bags.values()
    elif isinstance(collection, torchrec.EmbeddingCollection):
        (table,) = collection.embeddings.values()
    else:
        return None
    weight: nn.Parameter = table.weight
    return weight


def _one_feature(
    path: str, ids_N: torch.Tensor, lengths_B: torch.Tensor, weights_N: torch.Tensor | None
) -> KeyedJaggedTensor:
    """A batch for the collection at a path; of one empty bag where there is none."""
    return KeyedJaggedTensor(
        keys=[feature_of(path)],
        values=ids_N.long(),
        lengths=lengths_B if len(lengths_B) else lengths_B.new_zeros(1),
        weights=weights_N,
    )
