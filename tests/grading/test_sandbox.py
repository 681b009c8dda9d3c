import functools
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from t3d.common.errors import UserError
from t3d.grading import code, sandbox
from t3d.grading.code import CodeItem
from t3d.grading.sandbox import Limits
from tests.grading.attacks import FUNCTION, STDIO

TESTS = "marker = 'TOP-SECRET'\n\ndef check(candidate):\n    assert candidate(20) == 6765\n\ncheck(f)"
FUNCTION_ROW = {"test_method": "function", "test_list": [TESTS], "test_time_limit": 0.5}
STDIO_ROW = {"test_method": "stdio", "test_input": ["6 7\n"], "test_output": ["42\n"], "test_time_limit": 0.5}
ESCAPE = f"t3d-escape-{os.getpid()}"


def working_walls() -> list[str]:
    kinds = ["namespaces-root", "namespaces-user", "bubblewrap"]
    return [kind for kind in kinds if sandbox.can_try(kind) and sandbox.probe(kind) is None]


def boxes_alive() -> list[str]:
    """Processes, of any user, that were started for a box of this checkout."""
    sign, found = str(Path(sandbox.__file__).parent / "inside").encode(), []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if sign in path.read_bytes():
                found.append(path.parent.name)
        except OSError:
            pass
    return found


@functools.cache
def graded_attacks(walls: str) -> dict[str, code.Verdict]:
    """The verdicts on all attacks, with a host around them that should not notice."""
    secret = Path.home() / f".{ESCAPE}-secret"
    secret.write_text("6765")
    bystander = subprocess.Popen(["sleep", "600"])
    visits = []
    with socket.socket() as tcp, socket.socket(type=socket.SOCK_DGRAM) as udp, socket.socket(socket.AF_UNIX) as unix:
        tcp.bind(("127.0.0.1", 0))
        port = tcp.getsockname()[1]
        udp.bind(("127.0.0.1", port))
        unix.bind(f"\0t3d-{port}")
        for listening in (tcp, unix):
            listening.listen()
            threading.Thread(target=lambda s=listening: visits.append(s.accept()), daemon=True).start()
        udp.setblocking(False)

        def answer(program: str) -> str:
            for name, value in (("secret", secret), ("grader", code.__file__), ("port", port), ("escape", ESCAPE)):
                program = program.replace(f"{{{name}}}", str(value))
            return f"```python\n{program}\n```"

        items = [CodeItem(answer(text), FUNCTION_ROW) for text in FUNCTION.values()]
        items += [CodeItem(answer(text), STDIO_ROW) for text in STDIO.values()]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(code, "walls", lambda allow_unsandboxed: walls)
            patch.setattr(code, "Limits", functools.partial(Limits, wall=6.0, memory=512 << 20))
            patch.setenv("T3D_SECRET", "6765")
            verdicts = code.grade_all(items, workers=16, progress=False)
        with pytest.raises(BlockingIOError):
            udp.recv(10)
    assert visits == []
    assert secret.read_text() == "6765"
    secret.unlink()
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait()
    assert boxes_alive() == []
    for folder in (Path.cwd(), Path.home(), *map(Path, ("/", "/tmp", "/dev", "/dev/shm", "/var/tmp", "/usr/lib"))):
        assert not (folder / ESCAPE).exists()
    return dict(zip([*FUNCTION, *(f"stdio_{name}" for name in STDIO)], verdicts, strict=True))


def best_walls() -> str:
    try:
        return sandbox.walls()
    except UserError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", [*FUNCTION, *(f"stdio_{name}" for name in STDIO)])
def test_an_attack_does_not_pass_and_does_not_outlive_its_limit(name):
    verdict = graded_attacks(best_walls())[name]
    assert not verdict.correct
    assert verdict.reason in code.REASONS and verdict.reason not in ("sandbox", "no_code")
    assert verdict.grading_seconds < 6 + 20  # the wall limit, and what a busy machine adds
    expected = {
        "endless_loop": "timeout",
        "sleep": "timeout",
        "daemons_at_work": "timeout",
        "fork_bomb": "timeout",
        "memory_at_once": "memory",
        "stop_oneself": "timeout",
        "output": "output_limit",
        "output_on_stderr": "output_limit",
        "stdio_output": "output_limit",
        "always_equal": "wrong",
        "frames_and_garbage": "wrong",
        "read_files": "wrong",
        "write_elsewhere": "wrong",
        "network": "wrong",
        "namespaces": "wrong",
        "confuse_the_supervisor": "wrong",
        "stdio_exit": "wrong",
        "stdio_answer_then_loop": "timeout",
    }
    assert verdict.reason == expected.get(name, verdict.reason)


@pytest.mark.parametrize("name", ["frames_and_garbage", "own_memory"])
def test_the_search_for_the_tests_would_find_them(name):
    """The control: with the tests' mark in the program's process these attacks do succeed."""
    program = f"leak = b'TOP-SECRET'\n{FUNCTION[name]}"
    best_walls()
    assert code.grade_all([CodeItem(f"```python\n{program}\n```", FUNCTION_ROW)], progress=False)[0].correct


def test_memory_is_counted_over_the_tree():
    limits = Limits(cpu=20.0, memory=256 << 20)
    program = FUNCTION["memory_of_children"].replace("1 << 28", "1 << 26") + "\nf(0)"
    box = sandbox.run_script(program, limits, best_walls())
    assert box.ending["end"] == "memory"
    assert box.ending["peak"] < 2 * limits.memory


@pytest.mark.parametrize("name", [name for name in FUNCTION if name.startswith("children_")])
def test_no_child_hides_its_time(name):
    limits = Limits(cpu=0.5, wall=8.0)
    box = sandbox.run_script(FUNCTION[name] + "\nf(0)", limits, best_walls())
    assert box.ending["end"] == "cpu"


def test_a_supervisor_of_the_same_user_is_out_of_reach(monkeypatch):
    if "namespaces-user" not in working_walls():
        pytest.skip("namespaces-user: not to be had on this machine")
    monkeypatch.setattr(code, "walls", lambda allow_unsandboxed: "namespaces-user")
    items = [CodeItem(f"```python\n{FUNCTION['confuse_the_supervisor']}\n```", FUNCTION_ROW)]
    verdict = code.grade_all(items, progress=False)[0]
    assert verdict.reason == "wrong"


@pytest.mark.slow
@pytest.mark.parametrize("walls", ["namespaces-root", "namespaces-user", "bubblewrap"])
def test_the_attacks_fail_behind_all_walls(walls):
    if walls not in working_walls():
        pytest.skip(f"{walls}: not to be had on this machine")
    verdicts = graded_attacks(walls)
    assert [name for name, verdict in verdicts.items() if verdict.correct or verdict.reason == "sandbox"] == []


def test_without_walls_nothing_runs_unless_asked_for(monkeypatch):
    monkeypatch.setattr(sandbox, "_best_walls", lambda: ("rlimits", "namespaces-user: unshare: not permitted"))
    with pytest.raises(UserError, match="unshare: not permitted.*allow_unsandboxed=true"):
        code.grade_all([CodeItem("```python\nf = 1\n```", FUNCTION_ROW)], progress=False)
    assert sandbox.isolation(allow_unsandboxed=True) == "rlimits"


def test_limits_alone_still_end_everything(monkeypatch, tmp_path):
    if sys.platform != "linux":
        pytest.skip("boxes need Linux")
    monkeypatch.setattr(code, "walls", lambda allow_unsandboxed: "rlimits")
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))
    right = "def f(n):\n    a, b = 0, 1\n    for _ in range(n): a, b = b, a + b\n    return a"
    signals = "import os\ndef f(n):\n    os.kill(os.getppid(), 0)\n    return 6765"
    attacks = ("endless_loop", "daemon", "disk", "memory", "always_equal", "os_exit", "confuse_the_supervisor")
    programs = [right, signals, *(FUNCTION[name] for name in attacks)]
    items = [CodeItem(f"```python\n{program}\n```", FUNCTION_ROW) for program in programs]
    verdicts = code.grade_all(items, workers=4, progress=False)
    reasons = [verdict.reason for verdict in verdicts]
    assert reasons[:3] == ["correct", "error", "timeout"]
    assert not any(verdict.correct for verdict in verdicts[1:]) and "sandbox" not in reasons
    assert boxes_alive() == []
    assert list(tmp_path.iterdir()) == []


def test_a_killed_grader_takes_its_boxes_along():
    walls = best_walls()
    script = (
        "from t3d.grading.sandbox import Limits, run_script\n"
        "print('go', flush=True)\n"
        f"run_script('import time; time.sleep(3600)', Limits(wall=3600.0), {walls!r})"
    )
    root = str(Path(sandbox.__file__).parents[2])
    grader = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": root}
    )
    grader.stdout.readline()
    while len(boxes_alive()) < 3:
        time.sleep(0.05)
    grader.kill()
    grader.wait()
    grader.stdout.close()
    end = time.monotonic() + 20
    while boxes_alive() and time.monotonic() < end:
        time.sleep(0.05)
    assert boxes_alive() == []


def test_a_box_that_cannot_start_is_no_verdict(monkeypatch):
    monkeypatch.setattr(code, "walls", lambda allow_unsandboxed: "namespaces-user")
    monkeypatch.setattr(sandbox, "_python", lambda: "/nowhere/python")
    sandbox._world.cache_clear()
    verdict = code.grade_all([CodeItem("```python\ndef f(n): return 0\n```", FUNCTION_ROW)], progress=False)[0]
    sandbox._world.cache_clear()
    assert (verdict.correct, verdict.reason) == (False, "sandbox")
