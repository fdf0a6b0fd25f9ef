"""What vlabs writes is whole or not there, and never over something of the user's."""

import json
import subprocess
import sys

import pytest

from vlabs.errors import UserError
from vlabs.utils.files import check_absent, locked, new_folder, replacing, write_json, write_text


def in_another_process(code, *arguments):
    result = subprocess.run(
        [sys.executable, "-c", f"import sys\nfrom vlabs.utils.files import *\n{code}", *map(str, arguments)],
        capture_output=True, text=True,
    )  # fmt: skip
    return result.returncode, result.stderr


def test_a_file_is_replaced_when_it_is_whole_and_left_alone_when_it_is_not(tmp_path):
    path = write_text(tmp_path / "a", "before")
    with pytest.raises(TypeError):
        write_text(path, 3)
    assert (path.read_text(), list(tmp_path.iterdir())) == ("before", [path])
    assert path.stat().st_mode & 0o777 == (tmp_path / "a").stat().st_mode & 0o777


def test_names_that_are_no_utf8_are_written_as_their_escapes(tmp_path):
    assert json.loads(write_json(tmp_path / "a.json", ["caf\udce9", "é"]).read_text()) == ["caf\udce9", "é"]


def test_leftovers_of_a_killed_process_go_and_what_another_writes_now_stays(tmp_path):
    code = "import os\nwith replacing(sys.argv[1]) as partial:\n    os._exit(9)"
    assert in_another_process(code, tmp_path / "a")[0] == 9
    (left,) = tmp_path.iterdir()
    with replacing(tmp_path / "a") as first:
        first.write_text("first")
        assert not left.exists()
        with replacing(tmp_path / "a") as second:
            assert first.exists()
            second.write_text("second")
        assert (tmp_path / "a").read_text() == "second"
    assert (tmp_path / "a").read_text() == "first"


@pytest.mark.parametrize("name", ["x" * 300, "folder", "file/inside", "full"])
def test_what_cannot_be_written_is_one_sentence(name, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("of the user")
    (tmp_path / "full").symlink_to("/dev/full")
    with pytest.raises(UserError, match="cannot be written|is a folder"):
        write_text(tmp_path / name, "x" * 100_000)
    assert (tmp_path / "file").read_text() == "of the user"


def test_an_error_about_what_is_read_meanwhile_is_not_about_what_is_written(tmp_path):
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "a"):
        (tmp_path / "nowhere").read_text()
    with pytest.raises(OSError, match="truncated"), new_folder(tmp_path / "b", "--out"):
        raise OSError("image file is truncated")


def test_a_file_that_a_user_named_is_overwritten_only_when_asked_to(tmp_path):
    path = write_text(tmp_path / "a", "before")
    with pytest.raises(UserError, match="--out .*a already exists.*--overwrite"):
        check_absent(path, "--out")
    check_absent(path, "--out", overwrite=True)
    check_absent(tmp_path / "b", "--out")


def test_a_folder_gets_its_name_when_it_is_whole_without_marks(tmp_path):
    out = tmp_path / "out"
    with new_folder(out, "--out") as partial:
        (partial / "a").write_text("1")
        assert not out.exists()
    assert [path.name for path in out.iterdir()] == ["a"]
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("place", ["out", "out.vlabs-partial"])
def test_a_folder_of_the_users_is_refused_and_kept(place, tmp_path):
    (tmp_path / place).mkdir()
    (tmp_path / place / "thesis").write_text("of the user")
    with pytest.raises(UserError, match=place), new_folder(tmp_path / "out", "--out"):
        pass
    assert (tmp_path / place / "thesis").read_text() == "of the user"


def test_work_that_was_stopped_continues_where_it_may_and_is_removed_where_not(tmp_path):
    killed = (
        "import os\nwith new_folder(sys.argv[1], '--out') as partial:\n    (partial / 'half').touch()\n    os._exit(9)"
    )
    assert in_another_process(killed, tmp_path / "out")[0] == 9
    goes_on = "with new_folder(sys.argv[1], '--out', resumable=True) as partial:\n    (partial / 'half').rename(1 / 0)"
    assert "ZeroDivisionError" in in_another_process(goes_on, tmp_path / "out")[1]
    assert (tmp_path / "out.vlabs-partial" / "half").exists()
    with new_folder(tmp_path / "out", "--out") as partial:
        assert not (partial / "half").exists()


def test_one_process_at_a_time_works_on_a_folder(tmp_path):
    code = "with new_folder(sys.argv[1], '--out'):\n    pass"
    with new_folder(tmp_path / "out", "--out", resumable=True):
        status, said = in_another_process(code, tmp_path / "out")
    assert status != 0
    assert "is being made by another process" in said
    with locked(tmp_path, "busy"):
        assert (
            "busy"
            in in_another_process("from pathlib import Path\nwith locked(Path(sys.argv[1]), 'busy'): pass", tmp_path)[1]
        )


def test_a_folder_is_overwritten_only_where_it_was_made_by_the_same(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").touch()
    with pytest.raises(UserError, match="was not made by"), new_folder(out, "--out", replaces=lambda path: False):
        pass
    with new_folder(out, "--out", replaces=lambda path: (path / "old").exists()) as partial:
        (partial / "new").touch()
    assert [path.name for path in out.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [out]
