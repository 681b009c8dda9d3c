"""How a command ends: its exit code, and one line on stderr for what a user can put right."""

import errno
import os
import subprocess
import sys

import pytest

from t3d.common import errors
from t3d.common.errors import UserError, disk_faults_as_user_errors, run_main
from t3d.common.jsonfiles import atomic_write
from tests.conftest import ROOT, raises_key


def _raise(error):
    raise error


@pytest.mark.parametrize(
    ("main", "code", "stderr"),
    [
        (lambda: None, None, ""),
        (lambda: 3, 3, ""),
        (lambda: _raise(UserError("a=1:\nwrong")), 2, "error: a=1: wrong\n"),
        (lambda: _raise(KeyboardInterrupt), 130, "interrupted\n"),
    ],
)
def test_run_main(main, code, stderr, capsys):
    with pytest.raises(SystemExit) as exit:
        run_main(main)
    assert exit.value.code == code
    assert capsys.readouterr().err == stderr


@pytest.mark.parametrize("error", [ZeroDivisionError(), OSError(errno.EIO, "broken"), FileNotFoundError(2, "x", "y")])
def test_run_main_keeps_other_tracebacks(error):
    with pytest.raises(type(error)):
        run_main(lambda: _raise(error))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_a_disk_that_takes_no_more_is_one_line_with_the_file(number, capsys):
    with pytest.raises(SystemExit) as exit:
        run_main(lambda: _raise(OSError(number, os.strerror(number), "/x/file")))
    said = capsys.readouterr().err
    assert exit.value.code == 2 and said.startswith(f"error: /x/file: {os.strerror(number)}; ")
    assert ("make room" in said) == (number in (errno.ENOSPC, errno.EDQUOT)) and said.count("\n") == 1


def test_a_write_that_does_not_know_its_file_gets_its_name():
    with raises_key("/x/file", "/x/file: "), disk_faults_as_user_errors("/x/file"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_in_the_text_of_a_library_is_the_same_line():
    with raises_key("/x/model", "make room"), disk_faults_as_user_errors("/x/model"):
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(RuntimeError), disk_faults_as_user_errors("/x/model"):
        raise RuntimeError("Error while deserializing: no such header (os error 2)")


def test_a_line_that_tells_it_already_is_left_alone():
    with raises_key("a", "could not be written"), disk_faults_as_user_errors("/x/model"):
        raise UserError("a: could not be written (No space left on device (os error 28)); continue", "a")


def test_a_file_that_cannot_be_written_leaves_the_one_before(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("before")
    with raises_key(path), atomic_write(path) as file:
        file.write("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert path.read_text() == "before" and len(list(tmp_path.iterdir())) == 1


def test_of_a_launchs_processes_the_main_one_says_it(monkeypatch, capsys):
    """The others wait, so that the launcher ends them; one that is left alone says it after all."""
    waits = []
    monkeypatch.setattr(errors.time, "sleep", waits.append)
    for rank, expected in (("0", []), ("1", [errors.WAIT])):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit):
            run_main(lambda: _raise(UserError("a=1: wrong")))
        assert waits == expected and capsys.readouterr().err == "error: a=1: wrong\n"
    with pytest.raises(SystemExit) as exit:
        run_main(lambda: _raise(KeyboardInterrupt))
    assert exit.value.code == 130 and not capsys.readouterr().err


def test_a_reader_that_has_had_enough_is_no_error():
    line = f"{sys.executable} -m t3d train --help-all | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", line], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.count("\n") == 1 and not done.stderr
