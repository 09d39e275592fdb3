"""Numbers, names and tables for people to read."""

import difflib
from collections.abc import Iterable, Sequence


def format_bytes(num_bytes: float) -> str:
    """Bytes in binary units, three digits.

    Example:
        >>> format_bytes(256_000), format_bytes(3 * 2**30)
        ('250 KiB', '3.00 GiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if num_bytes < 1000 or unit == "TiB":
            break
        num_bytes /= 1024
    if unit == "B" or num_bytes >= 100:
        return f"{num_bytes:.0f} {unit}"
    return f"{num_bytes:.3g} {unit}" if num_bytes >= 10 else f"{num_bytes:.2f} {unit}"


def format_duration(seconds: float) -> str:
    """Seconds as a person says them.

    Example:
        >>> format_duration(7.2), format_duration(95), format_duration(7300)
        ('7 s', '1:35', '2:01:40')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def did_you_mean(name: object, names: Iterable[str]) -> str:
    """Asks for the name that may have been meant, if one of them is like it.

    Example:
        >>> did_you_mean("usr", ["user", "item"]), did_you_mean("shop", ["user", "item"])
        ("did you mean 'user'?", '')
    """
    close = difflib.get_close_matches(str(name), list(names), n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else ""


def some_names(names: Iterable[str], like: object) -> str:
    """A few names, and the one that may have been meant.

    Example:
        >>> some_names(["user", "item"], "usr")
        "'user', 'item'; did you mean 'user'?"
    """
    names = list(names)
    shown = ", ".join(map(repr, names[:10]))
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return f"{shown}{more}; {did_you_mean(like, names) or 'use one of these'}"


def format_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()
) -> str:
    """Aligned columns under a header.

    Args:
        header: A name for each column.
        rows: The cells.
        right: Columns that stand to the right, as numbers should.

    Returns:
        Lines without a trailing newline.

    Example:
        >>> print(format_table(("name", "n"), [("a", "10"), ("bcd", "2")], right=(1,)))
        name   n
        a     10
        bcd    2
    """
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = []
    for row in (header, *rows):
        cells = [
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
