"""What a run prints: rank 0's words, and every rank's warnings but those of libraries."""

import sys
from collections.abc import Callable

from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from shardemb.env import Env, leave_at_once
from shardemb.errors import OtherRankError


def refuse(error: Exception) -> int:
    """Prints an error that the user can mend in one line, and hands it to torchrun for its summary.

    Args:
        error: What is wrong.

    Returns:
        The exit status.
    """
    print(f"error: {error}", file=sys.stderr, flush=True)
    leave_at_once(1)
    if isinstance(error, OtherRankError):
        return 1
    try:
        raise error.with_traceback(None)  # torchrun shows the traceback that is being handled
    except type(error):
        get_error_handler().record_exception(error)
    return 1


def say_on_main(env: Env) -> Callable[[str], None]:
    """A `print` that prints on rank 0 only, at once."""

    def say(text: str) -> None:
        if env.is_main:
            print(text, flush=True)

    return say
