"""Options of `from_torch` that name modules by their paths. Changes no module."""

from collections.abc import Callable, Iterable, Mapping

from torch import nn

from shardemb.optim import SparseOptimizer
from shardemb.text import some_names

Which = Iterable[str] | Callable[[str, nn.Module], bool]
"""Modules by their paths or by those of modules around them, or a test of (path, module)."""


def chosen_by(which: Which, found: Mapping[str, nn.Module], option: str) -> set[str]:
    """The modules that an option names.

    Args:
        which: What the option is.
        found: All modules that may be named, by their paths.
        option: Its name, for messages.

    Returns:
        Their paths.

    Raises:
        ValueError: A path is of none of them, or there are no paths.

    Example:
        >>> bags = {"emb_l.0": nn.EmbeddingBag(9, 4), "emb_l.1": nn.EmbeddingBag(9, 4)}
        >>> sorted(chosen_by(["emb_l"], bags, "skip"))
        ['emb_l.0', 'emb_l.1']
    """
    if isinstance(which, str):
        raise ValueError(f"{option} must hold paths, got the string {which!r}; use ({which!r},)")
    if callable(which):
        return {path for path, module in found.items() if which(path, module)}
    if not isinstance(which, Iterable):
        raise ValueError(f"{option} must hold paths, or be a test of them, got {which!r:.80}")
    named = list(which)
    _check_known(named, found, option)
    return {path for path in found if any(_is_in(path, around) for around in named)}


def _is_in(path: str, around: str) -> bool:
    return around in {"", path} or path.startswith(f"{around}.")


def _check_known(named: Iterable[str], found: Mapping[str, nn.Module], option: str) -> None:
    for around in named:
        if not any(_is_in(path, around) for path in found):
            raise ValueError(
                f"{option} names {around!r}, and the modules are {some_names(found, around)}"
            )


def optimizers_by(
    optimizer: SparseOptimizer | Mapping[str, SparseOptimizer], chosen: Mapping[str, nn.Module]
) -> dict[str, SparseOptimizer]:
    """The optimizer of each module.

    Args:
        optimizer: One for all, or one for each path, of which the longest counts.
        chosen: The modules by their paths.

    Returns:
        The optimizers by the modules' paths; a frozen module may have none.

    Raises:
        ValueError: A path is of no module, a module is left out, or what is given is no optimizer
            of shardemb's.

    Example:
        >>> from shardemb.optim import SGD, Adagrad
        >>> bags = {"emb_l.0": nn.EmbeddingBag(9, 4), "emb_l.1": nn.EmbeddingBag(9, 4)}
        >>> optimizers_by({"": SGD(lr=0.1), "emb_l.1": Adagrad(lr=0.2)}, bags)["emb_l.1"].lr
        0.2
    """
    given = optimizer if isinstance(optimizer, Mapping) else {"": optimizer}
    for around, config in given.items():
        if not isinstance(config, SparseOptimizer):
            raise ValueError(
                f"optimizer{f' of {around!r}' if around else ''} must be one of shardemb.optim, "
                f"such as optim.SGD(lr=0.1), got {config!r:.80}"
            )
    _check_known(given, chosen, "optimizer")
    optimizers = {}
    for path, module in chosen.items():
        fitting = [around for around in given if _is_in(path, around)]
        if fitting:
            optimizers[path] = given[max(fitting, key=len)]
        elif module.get_parameter("weight").requires_grad:
            raise ValueError(
                f"module {path!r} has no optimizer; add it to those by path, or '' for all others"
            )
    return optimizers
