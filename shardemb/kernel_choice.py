"""Which kernels look up and update the rows of a plan: shardemb's own or FBGEMM's. Has neither."""

from typing import Literal, get_args

from shardemb.native.library import missing

Kernel = Literal["native", "fbgemm"]
"""Shardemb's own, or FBGEMM's. Replicated tables have FBGEMM's dense one in either case."""
KernelChoice = Literal["auto", "native", "fbgemm"]
"""What a user may ask for; "auto" is "native" where it runs."""
WIDTH_STEP: dict[Kernel, int] = {"native": 1, "fbgemm": 4}
"""Of what a slice of columns must have a multiple: FBGEMM reads four values at a time."""


def choose_kernel(asked: KernelChoice, device: str) -> Kernel:
    """The kernel that is asked for, or by "auto" the native one where it runs.

    Args:
        asked: What a user wrote.
        device: "cpu" or "cuda".

    Returns:
        The kernel; by this machine's compiled code.

    Raises:
        ValueError: There is no such kernel, or the native one is asked for and does not run.

    Example:
        >>> choose_kernel("auto", "cuda")
        'fbgemm'
    """
    if asked not in get_args(KernelChoice):
        raise ValueError(f"kernel must be 'auto', 'native' or 'fbgemm', got {asked!r}")
    reason = why_not_native(device)
    if asked == "auto":
        return "fbgemm" if reason else "native"
    if asked == "native" and reason:
        raise ValueError(f"kernel='native': {reason}; or use kernel='auto' or 'fbgemm'")
    return asked


def why_not_native(device: str) -> str | None:
    """Why the native kernel does not run.

    Args:
        device: "cpu" or "cuda".

    Returns:
        The reason; None where it runs.

    Example:
        >>> why_not_native("cuda")
        'it is for ranks on the CPU, and these are on cuda'
    """
    if device != "cpu":
        return f"it is for ranks on the CPU, and these are on {device}"
    return missing()
