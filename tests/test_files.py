"""Files that are whole or not there, and refused before the work that makes them."""

from pathlib import Path

import pytest

from shardemb import cli
from shardemb.files import check_writable, write_whole


def test_what_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    folder = tmp_path / "plan.json"
    folder.mkdir()
    with pytest.raises(IsADirectoryError):
        write_whole(folder, "{}")
    with pytest.raises(UnicodeEncodeError):
        write_whole(tmp_path / "text", "\ud800")
    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / "none" / "text", "{}")
    assert list(tmp_path.iterdir()) == [folder]


def test_a_file_is_checked_without_a_trace(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    check_writable(file)
    assert not list(tmp_path.iterdir())
    file.write_text("old")
    check_writable(str(file))
    assert [found.read_text() for found in tmp_path.iterdir()] == ["old"]
    with pytest.raises(
        NotADirectoryError, match=r"there is no folder .*none to write plan.json to"
    ):
        check_writable(tmp_path / "none" / "plan.json")


def test_a_profile_is_not_counted_where_it_could_not_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "no log"  # would be refused next
    assert cli.main(["data", "profile", str(log), "--out", str(tmp_path)]) == 1
    assert f"error: {tmp_path} is a folder; give the name of a file" in capsys.readouterr().err
    assert cli.main(["data", "profile", str(log), "--out", str(tmp_path / "profile.json")]) == 1
    assert "does not exist" in capsys.readouterr().err
