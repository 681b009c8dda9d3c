"""Turns a fresh process into a guarded, untrusted program: namespaces, limits, supervision.

    outer process      creates the namespaces, waits
      supervisor       pid 1 of its own pid namespace: builds the file system, then watches the tree and ends it
        program        an unprivileged user without capabilities, in an empty world

When the supervisor ends, the kernel ends every process in its namespace, daemons included. The supervisor ends when the
program's main process ends, at a limit, or when `control` (fd 0) is closed, as after a kill of the grader.

Without namespaces ("rlimits") the supervisor adopts orphans (PR_SET_CHILD_SUBREAPER) and kills all its descendants;
files and network are then not protected.
"""

from __future__ import annotations

import ctypes
import fcntl
import marshal
import os
import resource
import select
import signal
import struct
import sys
import time

_LIBC = ctypes.CDLL(None, use_errno=True)

# linux/sched.h, mount.h, prctl.h: the kernel's interface, the same on every architecture
_NEWNS, _NEWCGROUP, _NEWUTS, _NEWIPC = 0x00020000, 0x02000000, 0x04000000, 0x08000000
_NEWUSER, _NEWPID, _NEWNET = 0x10000000, 0x20000000, 0x40000000
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
_MNT_DETACH = 2
_ATTR_RDONLY, _ATTR_NOSUID, _ATTR_NODEV, _AT_RECURSIVE, _SYS_MOUNT_SETATTR = 1, 2, 4, 0x8000, 442
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_CAPBSET_DROP, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 1, 4, 24, 36, 38
_PR_SET_SECCOMP = 22
_CAPABILITY_VERSION_3 = 0x20080522

_NOBODY = 65534
_POLL = 0.02  # seconds between two looks at the tree
_DEVICES = ("null", "zero", "full", "random", "urandom")


def main() -> None:
    """Reads the order from fd 0: its length in 8 bytes, then marshal's data as `boxes.Box` writes it."""
    # Pid 1 receives only signals that it handles; without Python's handler SIGINT would not reach the program either.
    # If a parent ignored SIGCHLD, it would be ignored here, and the kernel would not count the children's time.
    for number in (signal.SIGINT, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    with open(0, "rb", buffering=0, closefd=False) as control:
        size = struct.unpack(">Q", _read_exactly(control, 8))[0]
        order = marshal.loads(_read_exactly(control, size))
    child, status = None, order["status"]
    try:
        proc = _enter(order)
        child = os.fork()
        if child:
            report = _supervise(order, proc, child)
        else:
            status = _become_program(order)
            _run(order, status)
    except BaseException as error:
        _report(status, {"end": "failed", "detail": f"{type(error).__name__}: {error}"})
        os._exit(1)
    _report(status, report)
    os._exit(0)


def _report(status: int, report: dict) -> None:
    os.write(status, marshal.dumps(report))


def _read_exactly(file, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        chunk = file.read(size - len(data))
        if not chunk:
            os._exit(1)
        data += chunk
    return bytes(data)


def _call(name: str, *arguments) -> int:
    result = getattr(_LIBC, name)(*arguments)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
    return result


def _prctl(option: int, value: int) -> int:
    return _LIBC.prctl(option, ctypes.c_ulong(value), 0, 0, 0)


def _write(path: str, text: str, folder: int | None = None) -> None:
    fd = os.open(path, os.O_WRONLY, dir_fd=folder)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


# --- the world of the program ----------------------------------------------------------------------------------------


def _enter(order: dict) -> int:
    """Enters the isolated world. Returns an open folder: the /proc with the processes to watch."""
    _prctl(_PR_SET_DUMPABLE, 0)  # other processes of the same user cannot look into this one
    if order["walls"] in ("namespaces-root", "namespaces-user"):
        return _enter_namespaces(order)
    proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
    if order["walls"] == "rlimits":
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    return proc


def _enter_namespaces(order: dict) -> int:
    by_user = order["walls"] == "namespaces-user"
    uid, gid = os.geteuid(), os.getegid()
    flags = _NEWNS | _NEWPID | _NEWNET | _NEWIPC | _NEWUTS | _NEWCGROUP
    _prctl(_PR_SET_DUMPABLE, 1)  # the kernel lets only such a process write its own uid_map
    _call("unshare", flags | (_NEWUSER if by_user else 0))
    if by_user:
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/uid_map", f"{_NOBODY} {uid} 1")
        _write("/proc/self/gid_map", f"{_NOBODY} {gid} 1")
    _prctl(_PR_SET_DUMPABLE, 0)
    child = os.fork()
    if child:
        os.closerange(0, 1 << 16)
        os.waitpid(child, 0)
        os._exit(0)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    return _build_root(order)


def _mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    names = [text.encode() if text is not None else None for text in (source, target, kind)]
    try:
        _call("mount", *names, ctypes.c_ulong(flags), options.encode() if options else None)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}: {target}") from error


def _set_attributes(target: str, attributes: int, recursive: bool) -> None:
    wanted = struct.pack("QQQQ", attributes, 0, 0, 0)
    flags = ctypes.c_uint(_AT_RECURSIVE if recursive else 0)
    _call("syscall", ctypes.c_long(_SYS_MOUNT_SETATTR), -100, target.encode(), flags, wanted, ctypes.c_size_t(32))


def _build_root(order: dict) -> int:
    """A root of its own: interpreter and libraries read-only, five devices, /dev/stdin, /tmp. No /proc, no /sys.

    The supervisor keeps the namespace's /proc as an open folder that has no path.
    """
    user = _NOBODY if order["walls"] == "namespaces-user" else order["user"]
    given = _input(order)
    _mount("none", "/", None, _MS_REC | _MS_PRIVATE)
    point = order["mountpoint"]
    _mount("tmpfs", point, "tmpfs", _MS_NOSUID | _MS_NODEV, f"size={len(given) + (2 << 20)},mode=755")
    os.mkdir(f"{point}/old")
    _call("pivot_root", point.encode(), f"{point}/old".encode())
    os.chdir("/")
    os.umask(0o022)
    os.mkdir("/tmp")  # first: the interpreter may lie in this machine's /tmp
    size = f"size={order['disk']},nr_inodes=4096,mode=700,uid={user},gid={user}"
    _mount("tmpfs", "/tmp", "tmpfs", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, size)
    _show(order)
    with open("/dev/stdin", "wb") as file:
        file.write(given)
    os.symlink("/tmp", "/dev/shm")
    os.mkdir("/proc")
    _mount("proc", "/proc", "proc", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC)
    proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
    for path in ("/proc", "/old"):
        _call("umount2", path.encode(), _MNT_DETACH)
        os.rmdir(path)
    _set_attributes("/", _ATTR_RDONLY, recursive=False)
    _call("sethostname", b"box", ctypes.c_size_t(3))
    return proc


def _show(order: dict) -> None:
    """Shows the parts of the machine that the order names, and a copy of this code; others may not read the code."""
    for path, target in order["links"]:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        os.symlink(target, path)
    for source, target in order["binds"]:
        _bind(f"/old{source}", target, _ATTR_RDONLY | _ATTR_NOSUID | _ATTR_NODEV)
    for path in order["masks"]:
        _mount("tmpfs", path, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=4k,mode=755")
        _set_attributes(path, _ATTR_RDONLY, recursive=False)
    for device in _DEVICES:
        _bind(f"/old/dev/{device}", f"/dev/{device}", _ATTR_NOSUID)
    _copy(f"/old{order['code_source']}", order["code"])


def _copy(source: str, target: str) -> None:
    """Copies a folder's files with their times. Python recognises its compiled files by the times."""
    os.makedirs(target)
    for entry in os.scandir(source):
        path = os.path.join(target, entry.name)
        if entry.is_dir():
            _copy(entry.path, path)
            continue
        with open(entry.path, "rb") as old, open(path, "wb") as new:
            new.write(old.read())
        os.utime(path, ns=(entry.stat().st_atime_ns, entry.stat().st_mtime_ns))


def _bind(source: str, target: str, attributes: int) -> None:
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
    _mount(source, target, None, _MS_BIND | _MS_REC)
    _set_attributes(target, attributes, recursive=True)


# --- the program's process -------------------------------------------------------------------------------------------


def _become_program(order: dict) -> int:
    """In the child: its own session, its limits, no privileges, and only the file descriptors that it needs.

    Returns the descriptor for a report of failure. Starting another program closes it.
    """
    os.setsid()
    os.umask(0o022)
    os.chdir(order["folder"])
    if "program" in order:
        _write_program(order)
    os.dup2(_standard_input(order), 0)
    channel, status = order["channel"], _out_of_the_way(order["status"])
    if channel is None:
        os.closerange(3, 4)
    elif channel != 3:
        os.dup2(channel, 3)
    os.dup2(status, 4, inheritable=False)
    os.closerange(5, 1 << 16)
    _limit(order)
    if order["user"] is not None and order["walls"] != "namespaces-user":
        os.setgroups([])
        os.setresgid(order["user"], order["user"], order["user"])
        os.setresuid(order["user"], order["user"], order["user"])
    _drop_capabilities()
    if order["walls"] != "rlimits" or os.uname().machine in _MACHINES:
        _filter_system_calls([*_DENIED.values(), *(_SIGNALS.values() if order["walls"] == "rlimits" else ())])
    return 4


def _out_of_the_way(fd: int) -> int:
    """The descriptor, or a copy with another number if its number is needed."""
    return fcntl.fcntl(fd, fcntl.F_DUPFD, 5) if fd < 5 else fd


def _write_program(order: dict) -> None:
    with open("answer.py", "wb") as file:
        file.write(order["program"].encode("utf-8", "surrogatepass"))
    if order["user"] is not None:
        os.chown("answer.py", order["user"], order["user"])


def _input(order: dict) -> bytes:
    return (order["stdin"] or "").encode("utf-8", "surrogatepass")


def _standard_input(order: dict) -> int:
    """A file, because a file can be opened again as /dev/stdin."""
    if order["stdin"] is None:
        return os.open(os.devnull, os.O_RDONLY)
    if order["walls"].startswith("namespaces"):
        return os.open("/dev/stdin", os.O_RDONLY)
    fd = os.memfd_create("stdin")
    with open(fd, "wb", closefd=False) as file:
        file.write(_input(order))
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


_QUIET = """
import builtins, os, runpy, sys
sys.path[0] = os.getcwd()
read = input
builtins.input = lambda prompt="": read()
runpy.run_path("answer.py", run_name="__main__")
"""


def _run(order: dict, status: int) -> None:
    """Starts the program in a new interpreter, as `python answer.py` does, or the trusted tests in this one."""
    role, code = order["role"], order["code"]
    if role == "check":
        os.close(status)
        sys.path[0] = code
        sys.path_importer_cache.clear()  # the world has changed
        import check

        check.main(order)
        os._exit(0)
    script = [order["python"], "answer.py"]
    if role == "quiet":
        script[1:] = ["-c", _QUIET]
    elif role == "serve":
        script[1:] = ["-c", f"import sys; sys.path[0] = {code!r}; import serve; serve.main()"]
    os.execve(script[0], script, os.environ)


def _limit(order: dict) -> None:
    seconds = int(order["cpu"]) + 2  # a rough second limit; the supervisor counts exactly, over the whole tree
    limits = {
        resource.RLIMIT_AS: order["memory"],
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_FSIZE: order["disk"],
        resource.RLIMIT_NOFILE: order["open_files"],
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    if order["walls"].startswith("namespaces"):  # otherwise the user's other processes would count too
        limits[resource.RLIMIT_NPROC] = order["processes"]
    for name, value in limits.items():
        hard = resource.getrlimit(name)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(name, (value, value))


def _drop_capabilities() -> None:
    for capability in range(64):
        _prctl(_PR_CAPBSET_DROP, capability)  # fails after the last capability, and without any to drop
    header = struct.pack("Ii", _CAPABILITY_VERSION_3, 0)
    _call("capset", header, bytes(24))
    if _prctl(_PR_SET_NO_NEW_PRIVS, 1) < 0:
        raise OSError("prctl(PR_SET_NO_NEW_PRIVS)")


# System calls that no program needs: access to other processes, further namespaces and mounts, memory that no limit
# counts, and parts of the kernel with frequent security holes. Numbers on (x86_64, aarch64).
_DENIED = {
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "pidfd_getfd": (438, 438),
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "chroot": (161, 51), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
    "open_by_handle_at": (304, 265), "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194),
    "msgget": (68, 186), "semget": (64, 190), "userfaultfd": (323, 282), "bpf": (321, 280),
    "perf_event_open": (298, 241), "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "init_module": (175, 105), "finit_module": (313, 273), "kexec_load": (246, 104), "setpriority": (141, 140),
}  # fmt: skip
# Without a pid namespace these are denied too: they could end the grader, or every process of its user.
_SIGNALS = {
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "pidfd_send_signal": (424, 424),
}  # fmt: skip
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column of the tables, AUDIT_ARCH
_CLONE3, _AF_UNIX = 435, 1
_NAMESPACES = _NEWNS | _NEWCGROUP | _NEWUTS | _NEWIPC | _NEWUSER | _NEWPID | _NEWNET
_F_SETOWN, _F_SETSIG, _F_SETOWN_EX, _FIOSETOWN, _SIOCSPGRP = 8, 10, 15, 0x8901, 0x8902
_EQUAL, _ANY_OF = 0x15, 0x45  # BPF: jeq, jset
# Calls that depend on an argument: (call, argument, comparison, values, True = refuse matches, False = refuse others).
_ARGUMENTS = [
    ((56, 220), 0, _ANY_OF, (_NAMESPACES,), True),  # clone
    ((41, 198), 0, _EQUAL, (_AF_UNIX,), False),  # socket: an empty network namespace does not stop AF_VSOCK
    ((13, 134), 0, _EQUAL, (signal.SIGCHLD,), True),  # rt_sigaction: ignoring SIGCHLD hides the children's CPU time
    # A program may change its own limits and scheduling. The supervisor may have the same user, so its own are refused.
    ((302, 261), 0, _EQUAL, (0,), False),  # prlimit64
    ((203, 122), 0, _EQUAL, (0,), False),  # sched_setaffinity
    ((144, 119), 0, _EQUAL, (0,), False),  # sched_setscheduler
    ((142, 118), 0, _EQUAL, (0,), False),  # sched_setparam
    ((314, 274), 0, _EQUAL, (0,), False),  # sched_setattr
    # These calls make a file or a socket send a signal to any process.
    ((72, 25), 1, _EQUAL, (_F_SETOWN, _F_SETSIG, _F_SETOWN_EX), True),  # fcntl
    ((16, 29), 1, _EQUAL, (_FIOSETOWN, _SIOCSPGRP), True),  # ioctl
]


def _filter_system_calls(denied: list[tuple[int, int]]) -> None:
    """A seccomp filter. The denied calls fail, and the calls of _ARGUMENTS fail for some arguments. A filter cannot see
    the flags of clone3, so clone3 "does not exist". Libraries then use clone.
    """
    column, machine = _MACHINES[os.uname().machine]
    load, equal, at_least, give = 0x20, _EQUAL, 0x35, 0x06  # BPF: ld abs, jeq, jge, ret
    allow, kill, refuse, missing = 0x7FFF0000, 0x80000000, 0x00050000 | 1, 0x00050000 | 38  # EPERM, ENOSYS
    number, architecture, arguments = 0, 4, 16  # offsets in struct seccomp_data
    program = [(load, 0, 0, architecture), (equal, 1, 0, machine), (give, 0, 0, kill), (load, 0, 0, number)]
    program += [(at_least, 0, 1, 0x40000000), (give, 0, 0, kill)]  # x32
    for row in denied:
        program += [(equal, 0, 1, row[column]), (give, 0, 0, refuse)]
    program += [(equal, 0, 1, _CLONE3), (give, 0, 0, missing)]
    for row, argument, test, values, refused in _ARGUMENTS:
        match, rest = (refuse, allow) if refused else (allow, refuse)
        tests = [(test, len(values) - i, 0, value) for i, value in enumerate(values)]
        tests = [(load, 0, 0, arguments + 8 * argument), *tests, (give, 0, 0, rest), (give, 0, 0, match)]
        program += [(equal, 0, len(tests), row[column]), *tests]
    program += [(give, 0, 0, allow)]
    code = b"".join(struct.pack("HBBI", *line) for line in program)
    buffer = ctypes.create_string_buffer(code)
    header = struct.pack("HP", len(program), ctypes.addressof(buffer))
    if _LIBC.prctl(_PR_SET_SECCOMP, ctypes.c_ulong(2), header, 0, 0) < 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_SECCOMP)")


# --- supervision -----------------------------------------------------------------------------------------------------


def _supervise(order: dict, proc: int, child: int) -> dict:
    """Watches the tree below the program's main process and ends it. Returns a report.

    - end: exit | signal | cpu | wall | memory | processes | disk | cancelled;
    - code: exit code or signal;
    - cpu, wall: seconds, from the start of its process;
    - peak: bytes of resident memory over the tree.
    """
    start = time.monotonic()
    own = os.getpid() if order["walls"] != "rlimits" else None
    for fd in [1, 2, order["channel"]]:
        if fd is not None:
            os.close(fd)
    try:
        _write(f"{child}/oom_score_adj", "1000", proc)
    except OSError:
        pass  # this helps the machine and protects nothing
    watch = os.pidfd_open(child)
    reaped, peak, look, end = 0.0, 0, 0, None
    while end is None:
        ready, _, _ = select.select([watch, 0], [], [], _POLL)
        finished, seconds = _reap(child)
        reaped += seconds
        processes = _tree(proc, own)
        cpu = reaped + sum(process[1] for process in processes)
        memory = sum(process[2] for process in processes)
        peak = max(peak, memory)
        used = {"cpu": cpu, "wall": time.monotonic() - start, "memory": memory, "processes": len(processes) / 2}
        if order["walls"] == "rlimits" and look % 10 == 0:
            used["disk"] = _disk_use(order["folder"])
        look += 1
        end = _end(order, used, finished, cancelled=0 in ready)  # fd 0 is ready only when it was closed
    if order["walls"] == "rlimits":
        _kill_descendants(proc)
    return end | {"cpu": cpu, "wall": used["wall"], "peak": peak}


def _end(limits: dict, used: dict, finished: int | None, cancelled: bool) -> dict | None:
    """The program's end, or the reason to end it now; None while it may continue. finished: the wait status."""
    over = [name for name, amount in used.items() if amount > limits[name]]
    if "cpu" in over:
        return {"end": "cpu"}
    if finished is not None:
        code = os.waitstatus_to_exitcode(finished)
        # The kernel's own limit may come first, when the supervisor had to wait for a core.
        late = code == -signal.SIGXCPU or (code == -signal.SIGKILL and used["cpu"] >= limits["cpu"])
        return {"end": "cpu" if late else "signal" if code < 0 else "exit", "code": abs(code)}
    if cancelled:
        return {"end": "cancelled"}
    return {"end": over[0]} if over else None


def _reap(child: int) -> tuple[int | None, float]:
    """The wait status of the main process if it ended, and the CPU seconds of all processes that ended."""
    status, seconds = None, 0.0
    while True:
        try:
            pid, code, used = os.wait4(-1, os.WNOHANG)
        except ChildProcessError:
            return status, seconds
        if pid == 0:
            return status, seconds
        seconds += used.ru_utime + used.ru_stime
        if pid == child:
            status = code


def _tree(proc: int, own: int | None) -> list[tuple[int, float, int]]:
    """(pid, CPU seconds, resident bytes) of the processes to watch: all except `own` in this pid namespace, or all
    descendants without a namespace.

    A process's CPU time includes the time of children that it waited for. The supervisor did not inherit these.
    """
    ticks, page = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
    found, parents = [], {}
    for name in os.listdir(proc):
        if not name.isdigit() or int(name) == own:
            continue
        try:
            fd = os.open(f"{name}/stat", os.O_RDONLY, dir_fd=proc)
        except OSError:
            continue  # it ended
        try:
            text = os.read(fd, 4096)
        except OSError:
            continue
        finally:
            os.close(fd)
        if not text:
            continue
        fields = text[text.rindex(b")") + 2 :].split()
        parents[int(name)] = int(fields[1])
        found.append((int(name), sum(map(int, fields[11:15])) / ticks, int(fields[21]) * page))
    if own is not None:
        return found
    return [process for process in found if _descends(process[0], parents)]


def _descends(pid: int, parents: dict[int, int]) -> bool:
    root = os.getpid()
    if pid == root:
        return False
    while pid in parents:
        pid = parents[pid]
        if pid == root:
            return True
    return False


def _disk_use(folder: str) -> int:
    return sum(
        os.lstat(os.path.join(path, name)).st_blocks * 512
        for path, _, names in os.walk(folder)
        for name in names
        if os.path.lexists(os.path.join(path, name))
    )


def _kill_descendants(proc: int) -> None:
    while processes := _tree(proc, None):
        for pid, _, _ in processes:
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                pass
        _reap(0)
        time.sleep(0.001)
