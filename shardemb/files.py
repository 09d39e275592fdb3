"""Files that are there whole or not at all. Knows nothing of what they hold."""

from pathlib import Path


def write_whole(path: str | Path, text: str) -> None:
    """Writes a text file as UTF-8; one that is there is replaced in one move.

    Who reads it at the same time, or after a crash, sees the old text or the new one.

    Args:
        path: The file. Until it is whole its name ends with `.partial`.
        text: What it is to hold.

    Raises:
        OSError: It cannot be written.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "plan.json"
        >>> write_whole(file, "{}")
        >>> file.read_text(), [found.name for found in file.parent.iterdir()]
        ('{}', ['plan.json'])
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
