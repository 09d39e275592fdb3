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
    partial = _partial(path)
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except BaseException:  # a full disk, a folder of that name, Ctrl-C
        if partial.is_file():
            partial.unlink()
        raise


def check_writable(path: str | Path) -> None:
    """Refuses a file that `write_whole` could not write, before the work that makes its text.

    Args:
        path: The file.

    Raises:
        IsADirectoryError: It is a folder.
        NotADirectoryError: Its folder is not there.
        OSError: Its folder cannot be written to.

    Example:
        >>> check_writable("/")
        Traceback (most recent call last):
        IsADirectoryError: / is a folder; give the name of a file
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give the name of a file")
    if not path.parent.is_dir():
        raise NotADirectoryError(f"there is no folder {path.parent} to write {path.name} to")
    partial = _partial(path)
    partial.touch()
    partial.unlink()


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")
