"""Counts the bytes that the operators of torch and FBGEMM read and write, row by row in tables."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_OF_ROWS = (
    "aten::index_select",
    "aten::index_copy_",
    "aten::index_add_",
    "fbgemm::split_embedding_",
    "fbgemm::dense_embedding_codegen_lookup_function",
)
"""Operators that read or write only those rows that their indices name."""


class MovedBytes(TorchDispatchMode):
    """Sums the sizes of all tensors that operators read and write while it is entered.

    Where an operator is one that indexes rows, a table counts with the rows that are named, as
    often as they are; every other tensor counts as a whole, also where only its shape is taken.
    Views move nothing. What an operator does inside is not seen: the pages it accesses show that.

    Args:
        tables: The tables and their state, whose rows FBGEMM takes as one flat tensor.

    Attributes:
        read: Bytes.
        written: Bytes.
        operators: Their names.
    """

    def __init__(self, tables: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._row_bytes = {_storage(table): table.nbytes // len(table) for table in tables}
        self.read = self.written = 0
        self.operators: set[str] = set()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        arguments = dict(_arguments(func, args, kwargs or {}))
        out = func(*args, **(kwargs or {}))
        self.operators.add(func.name())
        if func.is_view:
            return out
        sizes = self._sizes_in_tables(func, arguments)
        changed = [
            tensor
            for argument in func._schema.arguments
            if argument.alias_info is not None and argument.alias_info.is_write
            for tensor in _tensors(arguments.get(argument.name))
        ]
        held = {_storage(tensor) for tensor in changed}
        made = [tensor for tensor in _tensors(out) if _storage(tensor) not in held]
        for tensor in _tensors(arguments):
            self.read += sizes.get(_storage(tensor), tensor.nbytes)
        for tensor in (*changed, *made):
            self.written += sizes.get(_storage(tensor), tensor.nbytes)
        return out

    def _sizes_in_tables(self, func: Any, arguments: Mapping[str, Any]) -> dict[int, int]:
        """Bytes of the rows that an operator names, by the storages that it finds them in."""
        if not func.name().startswith(_OF_ROWS) or arguments.get("dim", 0) != 0:
            return {}
        num_rows = arguments["index" if "index" in arguments else "indices"].numel()
        row_bytes = dict(self._row_bytes)
        if "self" in arguments:
            table = arguments["self"]
            row_bytes[_storage(table)] = table.nbytes // len(table)
        return {storage: num_rows * row for storage, row in row_bytes.items()}


def _arguments(
    func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Iterator[tuple[str, Any]]:
    names = [argument.name for argument in func._schema.arguments]
    yield from zip(names, args, strict=False)
    yield from kwargs.items()


def _tensors(found: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(found) if isinstance(leaf, torch.Tensor)]


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr() or id(tensor)
