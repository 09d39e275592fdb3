"""Which `nn.EmbeddingBag` and `nn.Embedding` can be sharded with the same result. Changes none."""

from collections.abc import Iterator, Mapping

import torch
from torch import nn
from torch.nn.utils import parametrize
from torchrec.modules.embedding_modules import (
    EmbeddingBagCollectionInterface,
    EmbeddingCollectionInterface,
)

_COLLECTIONS = (EmbeddingBagCollectionInterface, EmbeddingCollectionInterface)
_QUANTIZED = "torch.ao.nn.quantized"
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def find_embeddings(model: nn.Module) -> dict[str, nn.Module]:
    """Torch's embedding modules by their paths, those that cannot be converted among them.

    What lies in a collection of TorchRec's is not looked at.

    Args:
        model: Any module.

    Returns:
        Paths, in the model's order, and modules; one that is held twice is there twice.
    """
    return dict(_walk("", model))


def _walk(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(module, _COLLECTIONS):
        return
    if isinstance(module, (nn.EmbeddingBag, nn.Embedding)) or _is_quantized(module):
        yield path, module
        return
    for name, child in module._modules.items():
        if child is not None:
            yield from _walk(f"{path}.{name}".removeprefix("."), child)


def _is_quantized(module: nn.Module) -> bool:
    kind = type(module)
    return kind.__module__.startswith(_QUANTIZED) and "Embedding" in kind.__name__


def why_not_convertible(module: nn.Module) -> str | None:
    """What speaks against converting one module.

    Args:
        module: Of `find_embeddings`.

    Returns:
        The reason, to stand after the module's path, or None if there is none.
    """
    return _why_not_class(module) or _why_not_weight(module) or _why_not_option(module)


def _why_not_class(module: nn.Module) -> str | None:
    if parametrize.is_parametrized(module):
        return "its weight is parametrized; remove the parametrization"
    if type(module) not in {nn.EmbeddingBag, nn.Embedding}:
        base = "nn.EmbeddingBag" if isinstance(module, nn.EmbeddingBag) else "nn.Embedding"
        return f"{type(module).__qualname__} may compute something else than {base}; use that"
    if "forward" in vars(module) or vars(module).get("_compiled_call_impl") is not None:
        return "its forward was replaced or compiled, and would not be used; undo that"
    if list(module._parameters) != ["weight"] or module._buffers or module._modules:
        names = [*module._parameters, *module._buffers, *module._modules]
        return f"it holds {names}, and not just a weight; use a plain one"
    return None


def _why_not_weight(module: nn.Module) -> str | None:
    weight = module._parameters["weight"]
    if type(weight) is not nn.Parameter:
        return f"its weight is a {type(weight).__name__}, and not a plain nn.Parameter; use one"
    if weight.is_meta:
        return (
            "its weight is on meta, and has no rows to carry over; build the module on 'cpu', or "
            "declare the table by shardemb.TableConfig, whose rows are drawn where they lie"
        )
    if weight.dtype not in _DTYPES:
        return (
            f"its weight is {weight.dtype}, the kernels have float32, float16 and bfloat16; use "
            "one of them"
        )
    if weight.shape[1] == 0:
        return "embedding_dim must be a positive integer, got 0; give its rows columns"
    if hasattr(weight, "_in_backward_optimizers"):
        return "its weight has an optimizer in the backward pass; give that to from_torch instead"
    hooks = (weight._backward_hooks, getattr(weight, "_post_accumulate_grad_hooks", None))
    if any(hooks):
        return (
            "its weight has gradient hooks, and rows of a sharded table have no gradient to hook; "
            "remove them, and choose what updates the rows by `optimizer`"
        )
    return None


def _why_not_option(module: nn.Module) -> str | None:
    assert isinstance(module, (nn.EmbeddingBag, nn.Embedding))
    if isinstance(module, nn.EmbeddingBag) and module.mode not in {"sum", "mean"}:
        return f"mode={module.mode!r} is not supported; use 'sum' or 'mean'"
    if module.max_norm is not None:
        return f"max_norm={module.max_norm} is not supported, the kernels ignore it; use None"
    if module.scale_grad_by_freq:
        return "scale_grad_by_freq=True is not supported, the kernels sum gradients; use False"
    return None


def check_alone(model: nn.Module, chosen: Mapping[str, nn.Module]) -> None:
    """Refuses modules and weights that something else in the model holds as well.

    Args:
        model: The model.
        chosen: The modules to convert by their paths.

    Raises:
        ValueError: A module is held twice, or its weight is, or shares its memory.
    """
    path_of: dict[int, str] = {}
    for path, module in find_embeddings(model).items():
        first = path_of.setdefault(id(module), path)
        if first != path and path in chosen:
            raise ValueError(
                f"one module is in the model twice, as {first!r} and {path!r}, and its lookups "
                "would update its rows twice in a step; hold it once and call it once, or leave "
                f"both to torch by skip=({first!r}, {path!r})"
            )
    at: dict[object, list[tuple[str, torch.Tensor]]] = {}
    for name, tensor in _tensors(model):
        at.setdefault(_memory(tensor), []).append((name, tensor))
    for path, module in chosen.items():
        weight = module._parameters["weight"]
        assert weight is not None
        for name, tensor in at[_memory(weight)]:
            only_read = tensor is not weight and not (tensor.requires_grad or weight.requires_grad)
            if name != f"{path}.weight".removeprefix(".") and not only_read:
                raise ValueError(
                    f"module {path!r}: its weight is tied to {name!r}, and that of a sharded table "
                    "cannot be; give each its own, or leave the module to torch by "
                    f"skip=({path!r},)"
                )


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _memory(tensor: torch.Tensor) -> object:
    """What two tensors that share memory have in common."""
    if type(tensor) not in {nn.Parameter, torch.Tensor} or tensor.is_meta or not tensor.numel():
        return id(tensor)
    return tensor.device, tensor.untyped_storage().data_ptr()
