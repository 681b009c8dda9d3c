import functools
import os
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from pathlib import Path

import pytest

from t3d.common.errors import UserError
from t3d.grading import code, sandbox
from t3d.grading.code import CodeItem
from t3d.grading.sandbox import Limits, boxes, choice, world
from tests.conftest import raises_key
from tests.grading.attacks import FUNCTION, STDIO
from tests.grading.programs import INPUT, PROGRAMS, SNIPPETS, variations

TESTS = "marker = 'TOP-SECRET'\n\ndef check(candidate):\n    assert candidate(20) == 6765\n\ncheck(f)"
FUNCTION_ROW = {"test_method": "function", "test_list": [TESTS], "test_time_limit": 0.5}
STDIO_ROW = {"test_method": "stdio", "test_input": ["6 7\n"], "test_output": ["42\n"], "test_time_limit": 0.5}
ESCAPE = f"t3d-escape-{os.getpid()}"


def working_walls() -> list[str]:
    kinds = ["namespaces-root", "namespaces-user", "bubblewrap"]
    return [kind for kind in kinds if sandbox.can_try(kind) and sandbox.probe(kind) is None]


def boxes_alive() -> list[str]:
    """Processes, of any user, that were started for a box of this checkout."""
    signs, found = (str(world._INSIDE).encode(), b"\0answer.py\0", world._CODE.encode()), []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if any(sign in path.read_bytes() for sign in signs):
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


@pytest.fixture
def behind(monkeypatch):
    """``behind(walls)``: this test's programs are graded in boxes with these walls."""
    return lambda walls: monkeypatch.setattr(code, "walls", lambda allow_unsandboxed: walls)


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
        "always_equal": "unsupported_value",
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


SPIES = {
    "globals": "def f(g, node, numbers): return g.__globals__",
    "code": "def f(g, node, numbers): return g.__code__.co_consts",
    "closure": "def f(g, node, numbers): return g.__closure__[0].cell_contents",
    "class": "def f(g, node, numbers): return node.__class__.__init__.__globals__",
    "method": "def f(g, node, numbers): return node.show.__func__.__globals__",
    "self": "def f(g, node, numbers): return node.show.__self__.__dict__",
    "frame": "def f(g, node, numbers): return numbers.gi_frame.f_back.f_globals",
    "subclasses": "def f(g, node, numbers): return Node.__subclasses__()",
    "setting": "def f(g, node, numbers):\n    node.__class__ = int\n    return 1",
    "class attribute": "def f(g, node, numbers):\n    Node.show = lambda self: True\n    return 1",
}


LIAR = (
    "seen = []\n"
    "class A:\n    def __eq__(self, o): seen.append(o); return {eq}\n    def __hash__(self): return hash(6765)\n"
    "    def __lt__(self, o): seen.append(o); return True\n    __le__ = __gt__ = __ge__ = __contains__ = __lt__\n"
    "    def __sub__(self, o): seen.append(o); return self\n    __rsub__ = __add__ = __radd__ = __sub__\n"
    "    def __abs__(self): return self\n    def __bool__(self): return True\n"
    "class L(list):\n    def __contains__(self, o): seen.append(o); return True\n"
    "def f(n): return next((x for x in seen if isinstance(x, int)), {made})"
)
TRUSTING = [
    "assert f(20) == 6765",
    "assert not f(20) != 6765",
    "assert 6765 in f(20)",
    "assert f(20) in [6765]",
    "assert f(20) in {6765}",
    "assert abs(f(20) - 6765) < 1e-6",
    "assert abs(6765 - f(20)) < 1e-6",
    "assert f(20) >= 6765 and f(20) <= 6765",
    "assert [f(20)] == [6765]",
    "assert {6765: True}[f(20)]",
    "right = 0\nfor _ in range(2):\n    right = f(20) == 6765\nassert right",
    "try:\n    assert f(20) == 6765\nexcept BaseException:\n    assert f(20) == 6765",
]


@pytest.mark.parametrize("made", ["A()", "L()"])
def test_no_object_says_that_it_is_right_or_sees_what_would_be(made):
    best_walls()
    programs = [LIAR.replace("{eq}", eq).replace("{made}", made) for eq in ("True", "False", "NotImplemented")]
    items = [
        CodeItem(f"```python\n{program}\n```", FUNCTION_ROW | {"test_list": [tests], "test_time_limit": 2})
        for program in programs
        for tests in TRUSTING
    ]
    verdicts = code.grade_all(items, progress=False)
    assert [item.row["test_list"] for item, v in zip(items, verdicts, strict=True) if v.correct] == []


def test_a_program_sees_no_more_of_what_the_tests_hand_over_than_it_needs():
    best_walls()
    tests = (
        "secret = 'TOP-SECRET'\nclass Node:\n    def __init__(self): self.value = 1\n    def show(self): return 0\n"
        "def g(x): return (x, secret)[0]\nnode = Node()\nseen = f(g, node, (i for i in range(3)))\n"
        "assert 'TOP-SECRET' in str(seen) or type(seen) is dict or type(seen) is list or node.show() or Node().show()"
    )
    items = [
        CodeItem(f"```python\n{program}\n```", FUNCTION_ROW | {"test_list": [tests]}) for program in SPIES.values()
    ]
    verdicts = code.grade_all(items, progress=False)
    assert {name: v.reason for name, v in zip(SPIES, verdicts, strict=True) if v.reason not in ("error", "wrong")} == {}


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


def test_a_supervisor_of_the_same_user_is_out_of_reach(behind):
    if "namespaces-user" not in working_walls():
        pytest.skip("namespaces-user: not to be had on this machine")
    behind("namespaces-user")
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
    monkeypatch.setattr(choice, "_best_walls", lambda: ("rlimits", "namespaces-user: unshare: not permitted"))
    with raises_key("execute.allow_unsandboxed", "unshare: not permitted", "allow_unsandboxed=true"):
        code.grade_all([CodeItem("```python\nf = 1\n```", FUNCTION_ROW)], progress=False)
    assert sandbox.isolation(allow_unsandboxed=True) == "rlimits"


def test_limits_alone_still_end_everything(behind, monkeypatch, tmp_path):
    if sys.platform != "linux":
        pytest.skip("boxes need Linux")
    behind("rlimits")
    monkeypatch.setattr(boxes.tempfile, "tempdir", str(tmp_path))
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
    root = str(Path(sandbox.__file__).parents[3])
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


def test_a_box_that_cannot_start_is_no_verdict(behind, monkeypatch):
    behind("namespaces-user")
    monkeypatch.setattr(world, "python", lambda: "/nowhere/python")
    world.describe.cache_clear()
    verdict = code.grade_all([CodeItem("```python\ndef f(n): return 0\n```", FUNCTION_ROW)], progress=False)[0]
    world.describe.cache_clear()
    assert (verdict.correct, verdict.reason) == (False, "sandbox")


# --- as `python answer.py` runs them ---------------------------------------------------------------------------------


def outcome(stdout: bytes, code: int, stderr: bytes) -> tuple[bytes, int, bytes]:
    """What a program printed, its exit code, and the class of the exception that ended it."""
    lines = stderr.rstrip().split(b"\n")
    return stdout, code, lines[-1].partition(b":")[0] if code else b""


def run_plainly(program: str, folder: Path) -> tuple[bytes, int, bytes]:
    folder.mkdir()
    (folder / "answer.py").write_text(program, newline="")
    (folder.parent / "input").write_text(INPUT, newline="")
    environment = {"LANG": "C.UTF-8", "PATH": "/usr/bin:/bin", "PYTHONHASHSEED": "1"}
    environment |= {"TZ": os.environ["TZ"]} if "TZ" in os.environ else {}
    with open(folder.parent / "input", "rb") as given:
        run = subprocess.run(
            [world.python(), "answer.py"], stdin=given, capture_output=True, cwd=folder, env=environment, timeout=60
        )
    return outcome(run.stdout, run.returncode, run.stderr)


def run_boxed(program: str, walls: str) -> tuple[bytes, int, bytes]:
    box = sandbox.run_script(program, Limits(cpu=10.0), walls, stdin=INPUT)
    assert box.ending["end"] == "exit"
    return outcome(bytes(box.stdout), box.ending["code"], bytes(box.stderr))


def compare(programs: list[str], folder: Path) -> None:
    walls, different = best_walls(), {}
    for number, program in enumerate(programs):
        boxed, plain = run_boxed(program, walls), run_plainly(program, folder / str(number))
        if boxed != plain:
            different[program] = boxed, plain
    assert different == {}


def test_programs_run_as_python_runs_them(tmp_path):
    compare([variations(snippet)[number % 3] for number, snippet in enumerate(SNIPPETS)][::2], tmp_path)


@pytest.mark.slow
def test_all_programs_run_as_python_runs_them(tmp_path):
    assert len(PROGRAMS) >= 200
    compare(PROGRAMS, tmp_path)


def test_the_time_zone_is_this_machines(tmp_path, monkeypatch):
    monkeypatch.setenv("TZ", "Asia/Kathmandu")
    program = "import time\nprint(time.tzname, time.timezone)"
    boxed = run_boxed(program, best_walls())
    assert boxed == run_plainly(program, tmp_path / "plain")
    assert b"-20700" in boxed[0] or not Path("/usr/share/zoneinfo/Asia/Kathmandu").exists()


# --- an interpreter behind links --------------------------------------------------------------------------------------


def linked_environment(folder: Path) -> Path:
    """A virtual environment whose interpreter lies behind a link in a linked folder."""
    (folder / "real").mkdir()
    (folder / "real" / "python").symlink_to(sys.base_prefix)
    (folder / "link").symlink_to("real")
    home = folder / "link" / "python" / "bin"
    interpreter = next(path for path in (home / f"python3.{sys.version_info[1]}", home / "python3") if path.exists())
    (folder / "venv" / "bin").mkdir(parents=True)
    (folder / "venv" / "bin" / "python").symlink_to(interpreter)
    (folder / "venv" / "pyvenv.cfg").write_text(f"home = {home}\n")
    (folder / "linked").symlink_to("venv")
    return folder / "linked" / "bin" / "python"


def test_the_interpreter_may_lie_behind_links(tmp_path):
    best_walls()
    script = (
        "import sys\n"
        "from t3d.grading import sandbox\n"
        "box = sandbox.run_script('import ssl, ctypes, json; print(42)', sandbox.Limits(), sandbox.walls())\n"
        "print(box.stdout.decode(), sys.base_prefix)"
    )
    packages = [str(Path(code.__file__).parents[2]), sysconfig.get_path("purelib")]
    run = subprocess.run(
        [linked_environment(tmp_path), "-c", script],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(packages)},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["42", str(tmp_path / "link" / "python")]


def test_every_link_on_the_way_is_known(tmp_path):
    (tmp_path / "store" / "lib").mkdir(parents=True)
    (tmp_path / "a").symlink_to(tmp_path / "store")
    (tmp_path / "b").symlink_to("a")
    (tmp_path / "store" / "loop").symlink_to("lib")
    links = dict(world._links_to(str(tmp_path / "b" / "loop")))
    assert links == {
        str(tmp_path / "b"): str(tmp_path / "store"),
        str(tmp_path / "store" / "loop"): str(tmp_path / "store" / "lib"),
    }
