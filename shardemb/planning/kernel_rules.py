"""What tables and slices of columns a kernel takes."""

from shardemb.kernel_choice import WIDTH_STEP, Kernel
from shardemb.layouts import Layout
from shardemb.modules.discovery import Table
from shardemb.planning.geometry import places_of

_NATIVE = "on the CPU kernel='native'"


def why_not_by_kernel(table: Table, kernel: Kernel, device: str) -> str | None:
    """What speaks against a table, however it lies, and what to use instead.

    Replicated tables are held to the same, though FBGEMM's dense kernel takes any width on CPU: a
    table that one layout takes, others take.

    Args:
        table: The table.
        kernel: That of the plan.
        device: "cpu" or "cuda".

    Returns:
        The reason, to stand after the table's name, or None if there is none.
    """
    width, step = table.config.embedding_dim, WIDTH_STEP[kernel]
    if width % step:
        return (
            f"embedding_dim must be a positive multiple of {step} for FBGEMM's kernels, got "
            f"{width}; use {width + -width % step}, or {_NATIVE}, which takes any"
        )
    if (table.dtype, kernel, device) == ("bfloat16", "fbgemm", "cpu"):
        return (
            "bfloat16 rows cannot be looked up on cpu, FBGEMM has no kernel for it; use "
            f"dtype='float16' or 'float32', or {_NATIVE}, or run on cuda"
        )
    return None


def why_not_sliced(table: Table, layout: Layout, kernel: Kernel) -> str | None:
    """What speaks against the slices of columns that a layout names, and what to use instead.

    Args:
        table: The table.
        layout: Its layout; ranks or nodes may be left to the planner.
        kernel: That of the plan.

    Returns:
        The reason, to stand after the table's name, or None if there is none.
    """
    places = places_of(layout) if layout.splits_columns else None
    width, step = table.config.embedding_dim, WIDTH_STEP[kernel]
    if places is None or width % (step * len(places)) == 0:
        return None
    wider = -(-width // (step * len(places))) * step * len(places)
    must = f"each must have a multiple of {step}" if step > 1 else "all must be equally wide"
    native = f", or {_NATIVE}" if width % len(places) == 0 else ""
    return (
        f"{layout} splits {width} columns into {len(places)} slices, and {must}; use fewer "
        f"slices, or embedding_dim={wider}{native}"
    )
