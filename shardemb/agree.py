"""One rank's error becomes every rank's, so that nobody waits for a rank that left."""

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar, cast

import torch.distributed as dist

from shardemb.env import Env
from shardemb.errors import OtherRankError, RunError

T = TypeVar("T")


@contextmanager
def all_or_none(env: Env, doing: str) -> Iterator[None]:
    """Runs a block on every rank; if it fails on one, raises on all.

    The block must not contain a collective that a failing rank would miss. Costs one small
    collective.

    Args:
        env: This process.
        doing: What the block does, for the message: "reading the data".

    Yields:
        Nothing.

    Raises:
        Exception: On the rank that failed, what it raised.
        OtherRankError: On the others, naming the rank and its error.

    Example:
        >>> with all_or_none(Env(), "adding up"):
        ...     total = 1 + 1
    """
    error: BaseException | None = None
    try:
        yield
    except (Exception, SystemExit) as caught:  # noqa: BLE001 - raised again below, on every rank
        error = caught
    raise_on_all_ranks(env, doing, error)


def raise_on_all_ranks(env: Env, doing: str, error: BaseException | None) -> None:
    """Raises on every rank when any rank passes an error; returns when none does.

    Args:
        env: This process.
        doing: What was being done, for the message.
        error: This rank's error, or None.

    Raises:
        Exception: This rank's own error.
        OtherRankError: Another rank's error, with its rank and text.
        RunError: Another rank ended, or did not answer in the process group's time.
    """
    if env.world_size > 1:
        mine = None if error is None else f"{type(error).__name__}: {error}"
        texts: list[str | None] = [None] * env.world_size
        try:
            dist.all_gather_object(texts, mine)
        except RuntimeError as gone:
            raise RunError(f"another rank is gone, while {doing}: {gone}") from (error or gone)
        failed = [(rank, text) for rank, text in enumerate(texts) if text is not None]
        if failed and error is None:
            rank, text = failed[0]
            raise OtherRankError(f"rank {rank} failed while {doing}: {text}")
    if error is not None:
        raise error


def by_main(env: Env, doing: str, function: Callable[[], T]) -> T:
    """Calls a function on rank 0 and gives every rank what it returns, or raises.

    Args:
        env: This process.
        doing: What the function does, for the message.
        function: Returns something that can be pickled.

    Returns:
        What the function returned on rank 0.

    Raises:
        Exception: On rank 0, what the function raised.
        OtherRankError: On the others, naming the error.

    Example:
        >>> by_main(Env(), "adding up", lambda: 1 + 1)
        2
    """
    pickled = b""
    with all_or_none(env, doing):
        if env.is_main:
            pickled = pickle.dumps(function())
    if env.world_size > 1:
        box = [pickled]
        dist.broadcast_object_list(box, src=0)
        (pickled,) = box
    return cast("T", pickle.loads(pickled))
