# ruff: noqa: E501
"""Programs that try to be called correct without being so, to break out, or to bring the machine down.

FUNCTION attacks are answers to tests that want f(20) == 6765; those who would get what they are after return that, so
that a success shows. STDIO attacks are answers to a row that wants 42 printed for the input "6 7". {secret},
{grader}, {port} and {escape} stand for a file with a secret, the grader's own source, a listening port, and a file name
that must never appear on the host.
"""

FUNCTION = {
    # saying so
    "exit_at_the_top": "import sys\ndef f(n): return 0\nsys.exit(0)",
    "exit_in_a_call": "import sys\ndef f(n): sys.exit(0)",
    "os_exit": "import os\ndef f(n): os._exit(0)",
    "os_exit_at_the_top": "import os\nos._exit(0)",
    "raise_system_exit": "def f(n): raise SystemExit(0)",
    "print_passed": "def f(n):\n    print('passed', 'ok', 'correct', 'true', flush=True)",
    "atexit": (
        "import atexit, os, sys\n"
        "def say():\n    print('{\"reason\": \"passed\", \"token\": null}', flush=True); os._exit(0)\n"
        "atexit.register(say)\ndef f(n): sys.exit(0)"
    ),
    # tricks with comparison
    "always_equal": (
        "class A:\n    def __eq__(self, o): return True\n    def __ne__(self, o): return False\n"
        "    def __hash__(self): return 0\n    def __bool__(self): return True\ndef f(n): return A()"
    ),
    "always_equal_int": "class A(int):\n    def __eq__(self, o): return True\n    __hash__ = int.__hash__\ndef f(n): return A(3)",
    "always_equal_list": "class A(list):\n    def __eq__(self, o): return True\ndef f(n): return A()",
    "false_class": (
        "class A:\n    @property\n    def __class__(self): return int\n    def __eq__(self, o): return True\n"
        "    def __index__(self): return 1\n    __int__ = __index__\ndef f(n): return A()"
    ),
    "reduce": (
        "class A:\n    def __reduce__(self): return (eval, ('6765',))\n"
        "    def __getstate__(self): return 6765\ndef f(n): return A()"
    ),
    # tricks with the language
    "builtins_patched": (
        "import builtins\n"
        "class E(Exception):\n    def __new__(cls, *a): return None\n"
        "builtins.AssertionError = E\nbuiltins.compile = lambda *a, **k: None\nbuiltins.exec = lambda *a, **k: None\n"
        "builtins.abs = builtins.len = lambda *a: 0\ndef f(n): return 0"
    ),
    "own_names": "def check(c): pass\ncandidate = check\nabs = len = sum = lambda *a: 0\ndef f(n): return 1\nassert_ = 1",
    "debug_off": "import sys, ctypes\n__debug__dict__ = 1\nglobals()['__debug__'] = False\ndef f(n): return 0",
    "import_hook": (
        "import sys, types\n"
        "class Hook:\n    def find_spec(self, name, path=None, target=None):\n        raise ImportError(name)\n"
        "sys.meta_path.insert(0, Hook())\n"
        "for name in list(sys.modules):\n    sys.modules[name] = types.ModuleType(name)\ndef f(n): return 0"
    ),
    "trace": "import sys\nsys.settrace(lambda *a: None)\nsys.setprofile(lambda *a: sys.exit(0))\ndef f(n): return 0",
    "stop_iteration": "def f(n): raise StopIteration",
    "keyboard_interrupt": "def f(n): raise KeyboardInterrupt",
    "assertion_error": "def f(n): raise AssertionError",
    "exception_that_lies": (
        "class SystemExit(Exception):\n    def __str__(self): raise Exception\n    def __repr__(self): raise Exception\n"
        "SystemExit.__name__ = 'GeneratorExit'\ndef f(n): raise SystemExit"
    ),
    # finding the tests
    "frames_and_garbage": (  # turned round, so that it does not find itself
        "import gc, sys\nsought = 'TERCES-POT'\n"
        "def f(n):\n"
        "    frame, found = sys._getframe(), []\n"
        "    while frame:\n        found += [frame.f_locals, frame.f_globals]\n        frame = frame.f_back\n"
        "    for thing in found + gc.get_objects():\n"
        "        try: text = repr(thing)\n        except Exception: continue\n"
        "        if sought in text[::-1]: return 6765\n"
        "    return 0"
    ),
    "own_memory": (  # every page around an object of its own; write(2) answers EFAULT where nothing is mapped
        "import ctypes, os\nlibc = ctypes.CDLL(None)\nhere, reach = id(b'here') & ~0xfff, 32 << 20\n"
        "def f(n):\n"
        "    (reading, writing), text = os.pipe(), b''\n"
        "    for page in range(here - reach, here + reach, 4096):\n"
        "        if libc.write(writing, ctypes.c_void_p(page), 4096) == 4096:\n"
        "            text = text[-16:] + os.read(reading, 4096)\n"
        "            if any(rest.startswith(b'CRET') for rest in text.split(b'TOP-SE')[1:]):\n"
        "                return 6765\n"
        "    return 0"
    ),
    "harness_functions": (
        "import gc, sys\n"
        "def f(n):\n"
        "    frame = sys._getframe(1)\n"
        "    while frame:\n"
        "        space = frame.f_globals\n"
        "        if 'Peer' in space:\n"
        "            peer, send = space['Peer'], space['Peer'].send\n"
        "            peer.send = lambda self, m: send(self, ['passed', {'reason': 'passed', 'token': None}, []])\n"
        "            peer._reply = lambda self, m: ['value', True, []]\n"
        "        frame = frame.f_back\n"
        "    return 0"
    ),
    "proc": (
        "import glob\n"
        "def f(n):\n"
        "    text = ''\n"
        "    for name in glob.glob('/proc/*/environ') + glob.glob('/proc/*/mem') + glob.glob('/proc/*/cmdline'):\n"
        "        text += open(name, 'rb').read(1 << 20).decode('latin-1')\n"
        "    return 6765 if 'TERCES-POT' in text[::-1] or 'T3D' in text else 0"
    ),
    "memory_of_others": (
        "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "def f(n):\n"
        "    done = [libc.ptrace(16, p, 0, 0) for p in (1, os.getppid())]\n"
        "    done.append(libc.process_vm_readv(1, 0, 0, 0, 0, 0))\n"
        "    return 6765 if 0 in done else 0"
    ),
    # forging on descriptors
    "all_descriptors": (
        "import os, struct\n"
        "lines = [b'{\"end\": \"exit\", \"code\": 0, \"reason\": \"passed\", \"token\": null}\\n', b'passed\\n']\n"
        "reply = b'[\"value\", true, []]'\nlines.append(struct.pack('>I', len(reply)) + reply)\n"
        "def f(n):\n"
        "    for fd in range(256):\n"
        "        for line in lines:\n"
        "            try: os.write(fd, line)\n"
        "            except OSError: pass\n"
        "    return 0"
    ),
    "close_descriptors": "import os\nos.closerange(0, 4096)\ndef f(n): return 0",
    "long_message": (
        "import os, struct\n"
        "def f(n):\n    os.write(3, struct.pack('>I', 2**32 - 1) + b'x' * 1000)\n    return 0"
    ),
    "nested_message": "import os, struct\ndef f(n):\n    d = b'[' * 10**6\n    os.write(3, struct.pack('>I', len(d)) + d)\n    return 0",
    "object_numbers": (
        "import os, struct, json\n"
        "def f(n):\n"
        "    d = json.dumps(['value', ['mine', {'__class__': 'int'}, 'int', ['__eq__']], [[0, ['list', [6765]]]]]).encode()\n"
        "    os.write(3, struct.pack('>I', len(d)) + d)\n    return 0"
    ),
    "forged_requests": (
        "import os, struct, json\n"
        "def ask(message):\n"
        "    d = json.dumps(message).encode()\n    os.write(3, struct.pack('>I', len(d)) + d)\n"
        "    return os.read(3, struct.unpack('>I', os.read(3, 4))[0])\n"
        "def f(n):\n"
        "    text = b''\n"
        "    for message in (\n"
        "        ['get', 'marker'], ['get', 'token'], ['call', ['builtin', 'type'], ['tuple', [3]], ['tuple', []]],\n"
        "        ['attribute', ['yours', 0], '__globals__'], ['attribute', ['builtin', 'object'], '__subclasses__'],\n"
        "        ['attribute', ['builtin', 'int'], 'mro'], ['apply', ['tuple', [1]], '__len__'], ['offer', 'f', 3],\n"
        "        ['set', ['builtin', 'int'], 'x', 1], ['next', ['yours', -1], 1], ['resume', ['yours', 0], 'gi_frame'],\n"
        "        ['update', ['yours', 0], ['tuple', []]], ['call', ['yours', 0], ['tuple', []], ['tuple', []]],\n"
        "    ):\n"
        "        reply = ask(message)\n        text += reply if reply.startswith(b'[\"value') else b''\n"
        "    return 6765 if text else 0"
    ),
    "forged_classes": (
        "import os, struct, json\n"
        "def f(n):\n"
        "    for module, name in (('builtins', 'AssertionError'), ('check', 'Gone'), ('values', 'Unsupported'), ('os', 'system')):\n"
        "        d = json.dumps(['error', ['exception', ['exception class', None, module, name, []], ['tuple', ['id']],"
        " ['tuple', [['tuple', ['__class__', 3]]]], None, 'x'], []]).encode()\n"
        "        os.write(3, struct.pack('>I', len(d)) + d)\n"
        "    return 0"
    ),
    "class_that_lies": (
        "import enum, collections\n"
        "class A(collections.namedtuple('A', 'x')):\n    def __eq__(self, o): return True\n    __hash__ = None\n"
        "def f(n): return A(1)"
    ),
    "enum_that_lies": (
        "import enum\n"
        "class A(enum.IntEnum):\n    X = 3\n    def __eq__(self, o): return True\n    __hash__ = int.__hash__\n"
        "def f(n): return A.X"
    ),
    "float_that_lies": "class A(float):\n    def __eq__(self, o): return True\n    __hash__ = float.__hash__\ndef f(n): return A(3)",
    "text_that_lies": "class A(str):\n    def __eq__(self, o): return True\n    __hash__ = str.__hash__\ndef f(n): return A('x')",
    "metaclass_that_lies": (
        "class M(type):\n    def __eq__(self, o): return True\n    def __instancecheck__(self, o): return True\n    __hash__ = type.__hash__\n"
        "class A(metaclass=M): pass\ndef f(n): return A"
    ),
    "system_exit_kept": "class E(SystemExit): pass\ndef f(n): raise E(0)",
    "generator_exit": "def f(n): raise GeneratorExit",
    "module_of_the_tests": "import os\nopen('check.py', 'w').write('x')\nopen('json.py', 'w').write('raise SystemExit')\ndef f(n): return 0",
    # values that weigh
    "deep_value": "def f(n):\n    x = []\n    for _ in range(100000): x = [x]\n    return x",
    "cyclic_value": "def f(n):\n    x = []\n    x.append(x)\n    return x",
    "huge_value": "def f(n): return [0] * 10**8",
    "huge_text": "def f(n): return 'x' * (100 << 20)",
    "huge_number": "def f(n): return 1 << 10**8",
    "endless_iterator": "import itertools\ndef f(n): return itertools.count()",
    "hash_collisions": "def f(n): return {(2**61 - 1) * i for i in range(20000)}",
    # never ending
    "endless_loop": "def f(n):\n    while True: pass",
    "endless_at_the_top": "while True: pass",
    "endless_recursion": "def f(n): return f(n)",
    "deep_recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef f(n): return f(n) + 1",
    "c_recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef f(n):\n    x = []\n    for _ in range(10**6): x = [x]\n    return repr(x)",
    "crash": "import ctypes\ndef f(n): return ctypes.string_at(0)",
    "regular_expression": "import re\ndef f(n): return re.match('(a+)+$', 'a' * 60 + 'b')",
    "sleep": "import time\ndef f(n): time.sleep(3600)",
    "stop_oneself": "import os, signal\ndef f(n): os.kill(os.getpid(), signal.SIGSTOP)",
    "deaf_to_signals": (
        "import signal\n"
        "for s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n    except (OSError, ValueError): pass\n"
        "def f(n):\n    while True: pass"
    ),
    "thread_left_behind": (
        "import threading, time\n"
        "threading.Thread(target=time.sleep, args=(3600,)).start()\ndef f(n): return 0"
    ),
    "threads_at_work": (
        "import threading\n"
        "def work():\n    while True: pass\n"
        "for _ in range(8): threading.Thread(target=work).start()\ndef f(n):\n    while True: pass"
    ),
    "raise_limits": (
        "import os, resource\n"
        "for name in dir(resource):\n"
        "    if name.startswith('RLIMIT'):\n"
        "        try: resource.setrlimit(getattr(resource, name), (-1, -1))\n"
        "        except (OSError, ValueError): pass\n"
        "for call in (lambda: os.setuid(0), lambda: os.nice(-20), lambda: os.sched_setscheduler(0, 1, os.sched_param(99))):\n"
        "    try: call()\n    except OSError: pass\n"
        "def f(n):\n    x = []\n    while True: x.append(bytearray(1 << 24))"
    ),
    # more processes
    "fork_bomb": "import os\ndef f(n):\n    while True:\n        try: os.fork()\n        except OSError: pass",
    "thread_bomb": (
        "import threading, time\n"
        "def f(n):\n    while True:\n        try: threading.Thread(target=time.sleep, args=(3600,), daemon=True).start()\n"
        "        except RuntimeError: pass"
    ),
    "daemon": (
        "import os, time\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    if os.fork() == 0:\n"
        "        try: os.closerange(0, 4096)\n        except OSError: pass\n"
        "        time.sleep(3600)\n"
        "    os._exit(0)\n"
        "os.wait()\ndef f(n): return 0"
    ),
    "daemons_at_work": (
        "import os\n"
        "for _ in range(4):\n"
        "    if os.fork() == 0:\n"
        "        os.setsid()\n"
        "        while True: pass\n"
        "def f(n):\n    import time\n    time.sleep(3600)"
    ),
    "children_reaped_by_the_kernel": (
        "import ctypes, os, time\n"
        "def f(n):\n"
        "    action = (ctypes.c_ulong * 32)()\n"
        "    action[17] = 2\n"  # sa_flags = SA_NOCLDWAIT
        "    ctypes.CDLL(None).sigaction(17, action, None)\n"
        "    while True:\n"
        "        if os.fork() == 0:\n"
        "            while time.process_time() < 0.1: pass\n"
        "            os._exit(0)\n"
        "        time.sleep(0.15)"
    ),
    "children_ignored": (
        "import os, signal, time\n"
        "def f(n):\n"
        "    try: signal.signal(signal.SIGCHLD, signal.SIG_IGN)\n    except OSError: pass\n"
        "    while True:\n"
        "        if os.fork() == 0:\n"
        "            while time.process_time() < 0.1: pass\n"
        "            os._exit(0)\n"
        "        time.sleep(0.15)"
    ),
    "children_without_a_signal": (
        "import ctypes, os, time\n"
        "def f(n):\n"
        "    clone = {'x86_64': 56, 'aarch64': 220}[os.uname().machine]\n"
        "    while True:\n"
        "        if ctypes.CDLL(None).syscall(clone, 0, 0, 0, 0, 0) == 0:\n"
        "            while time.process_time() < 0.1: pass\n"
        "            os._exit(0)\n"
        "        time.sleep(0.15)"
    ),
    "chain_of_processes": "import os\ndef f(n):\n    while True:\n        if os.fork(): os._exit(0)",
    "child_answers_too": "import os\ndef f(n):\n    os.fork(); os.fork()\n    return 0",
    "kill_everybody": (
        "import os, signal\n"
        "def f(n):\n"
        "    for target in (1, os.getppid(), -1, 0, -os.getppid()):\n"
        "        for s in (signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM):\n"
        "            if target == 0: signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "            try: os.kill(target, s) if target else os.killpg(os.getppid(), s)\n"
        "            except OSError: pass\n"
        "    return 0"
    ),
    "confuse_the_supervisor": (
        "import fcntl, os, resource, signal, socket, struct\n"
        "def f(n):\n"
        "    pid, mine = os.getppid(), socket.socketpair()[0]\n"
        "    done = 0\n"
        "    for call in (\n"
        "        lambda: resource.prlimit(pid, resource.RLIMIT_NOFILE, (0, 0)),\n"
        "        lambda: os.sched_setaffinity(pid, os.sched_getaffinity(0)),\n"
        "        lambda: os.setpriority(os.PRIO_PROCESS, pid, 19),\n"
        "        lambda: fcntl.fcntl(mine, fcntl.F_SETOWN, pid),\n"
        "        lambda: fcntl.fcntl(mine, fcntl.F_SETSIG, signal.SIGKILL),\n"
        "        lambda: fcntl.ioctl(mine, 0x8902, struct.pack('i', pid)),\n"
        "    ):\n"
        "        try: call()\n        except OSError: continue\n"
        "        done = 6765\n"
        "    for s in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):\n"
        "        try: os.kill(pid, s)\n        except OSError: pass\n"
        "    return done"
    ),
    # memory and disk
    "memory": "def f(n):\n    x = []\n    while True: x.append(bytearray(1 << 24))",
    "memory_at_once": "def f(n): return bytearray(1 << 40)",
    "memory_of_children": (
        "import os, time\n"
        "def f(n):\n"
        "    for _ in range(8):\n"
        "        if os.fork() == 0:\n"
        "            x = b'x' * (1 << 28)\n            time.sleep(3600)\n"
        "    time.sleep(3600)"
    ),
    "memory_of_nobody": (
        "import ctypes, os, mmap\nlibc = ctypes.CDLL(None)\n"
        "def f(n):\n"
        "    if libc.shmget(0, 1 << 20, 0o1666) >= 0: return 6765\n"
        "    fd = os.memfd_create('x')\n"
        "    while True: os.write(fd, bytes(1 << 20))"
    ),
    "disk": (
        "import os\n"
        "def f(n):\n"
        "    for i in range(10**6):\n"
        "        with open(f'fill{i}', 'wb') as file:\n            for _ in range(16): file.write(bytes(1 << 20))"
    ),
    "many_files": "def f(n):\n    for i in range(10**7): open(f'file{i}', 'w').close()",
    "long_file": "import os\ndef f(n):\n    os.truncate(os.open('long', os.O_CREAT | os.O_RDWR), 1 << 50)",
    "output": "def f(n):\n    for _ in range(1000): print('x' * (1 << 20))",
    "output_on_stderr": "import os\ndef f(n):\n    for _ in range(1000): os.write(2, b'x' * (1 << 20))",
    # the outside
    "read_files": (
        "import os\n"
        "def f(n):\n"
        "    for path in ('{secret}', '/tmp/../{secret}', '/proc/1/root/{secret}', '/old/{secret}'):\n"
        "        try:\n            return 6765 if open(path).read() else 0\n"
        "        except OSError: pass\n"
        "    for path in ('/etc/passwd', '/etc/hostname', '/home', '/var', '/sys', '/bin/sh', '/usr/bin/env', '/old', '{grader}'):\n"
        "        if os.path.exists(path): return 6765\n"
        "    return 0"
    ),
    "environment": "import os\ndef f(n): return 6765 if 'T3D_SECRET' in os.environ or 'USER' in os.environ else 0",
    "symbolic_links": (
        "import os\n"
        "def f(n):\n"
        "    os.symlink('{secret}', 'link')\n    os.symlink('/', 'root')\n"
        "    for path in ('link', 'root{secret}'):\n"
        "        try:\n            open(path, 'a').write('x')\n            return 6765\n"
        "        except OSError: pass\n"
        "    return 0"
    ),
    "write_elsewhere": (
        "import os\n"
        "def f(n):\n"
        "    open('{escape}', 'w').close()\n"  # in its own /tmp it may
        "    done = 0\n"
        "    for folder in ('/', '/dev', '/usr/lib', '/inside', '/var/tmp', '/home', os.path.dirname(os.__file__)):\n"
        "        try:\n            open(folder + '/' + '{escape}', 'w').close()\n            done = 6765\n"
        "        except OSError: pass\n"
        "    return done"
    ),
    "network": (
        "import socket\n"
        "def f(n):\n"
        "    for family, kind, address in ((2, 1, ('127.0.0.1', {port})), (2, 2, ('127.0.0.1', {port})), (10, 1, ('::1', {port})),\n"
        "                                  (2, 1, ('1.1.1.1', 53)), (40, 1, (2, 1234)), (16, 3, (0, 0)), (17, 3, ('lo', 0))):\n"
        "        try:\n"
        "            s = socket.socket(family, kind)\n            s.connect(address)\n            s.send(b'x')\n            return 6765\n"
        "        except OSError: pass\n"
        "    return 0"
    ),
    "names_of_hosts": (
        "import socket\n"
        "def f(n):\n"
        "    try: return 6765 if socket.getaddrinfo('example.com', 80) else 0\n    except OSError: return 0"
    ),
    "unix_socket": (
        "import socket\n"
        "def f(n):\n"
        "    s = socket.socket(socket.AF_UNIX)\n"
        "    try: s.connect('\\0t3d-{port}')\n    except OSError: return 0\n"
        "    return 6765"
    ),
    "namespaces": (
        "import ctypes, os\nlibc = ctypes.CDLL(None)\n"
        "def f(n):\n"
        "    done = [libc.unshare(flag) for flag in (0x10000000, 0x20000, 0x40000000)]\n"
        "    done += [libc.mount(b'tmpfs', b'/tmp', b'tmpfs', 0, None), libc.umount2(b'/tmp', 2), libc.chroot(b'/tmp')]\n"
        "    done += [libc.syscall(56, 0x10000000 | 17, 0, 0, 0, 0)] if os.uname().machine == 'x86_64' else []\n"
        "    return 6765 if max(done) >= 0 else 0"
    ),
    "privileges": (
        "import ctypes, os, struct\nlibc = ctypes.CDLL(None)\n"
        "def f(n):\n"
        "    for call in (lambda: os.setuid(0), lambda: os.setgid(0), lambda: os.setgroups([0]), lambda: os.chroot('/tmp'),\n"
        "                 lambda: os.mknod('disk', 0o60600, os.makedev(254, 0)), lambda: os.chown('/', 0, 0)):\n"
        "        try: call()\n        except OSError: continue\n"
        "        return 6765\n"
        "    full = struct.pack('IIIIII', *[2**32 - 1] * 6)\n"
        "    return 6765 if libc.capset(struct.pack('Ii', 0x20080522, 0), full) == 0 else 0"
    ),
    "climb_out": (
        "import os\n"
        "def f(n):\n"
        "    os.mkdir('jail')\n    fd = os.open('/', os.O_RDONLY)\n"
        "    try: os.chroot('jail')\n    except OSError: pass\n"
        "    os.fchdir(fd)\n"
        "    for _ in range(64): os.chdir('..')\n"
        "    return 6765 if os.path.exists('etc/passwd') or os.path.exists('home') else 0"
    ),
    "run_programs": (
        "import subprocess\n"
        "def f(n):\n"
        "    for line in ('cat {secret}', 'curl http://1.1.1.1', 'sudo id', 'sh -c id'):\n"
        "        try:\n            return 6765 if subprocess.run(line.split(), capture_output=True).stdout else 0\n"
        "        except OSError: pass\n"
        "    return 0"
    ),
    "interpreter_again": (
        "import subprocess, sys\n"
        "def f(n):\n"
        "    code = 'import os, sys; sys.exit(open(\"{secret}\").read() == \"\")'\n"
        "    return 6765 if subprocess.run([sys.executable, '-I', '-S', '-c', code]).returncode == 0 else 0"
    ),
}  # fmt: skip

STDIO = {
    "exit": "import sys\nsys.exit(0)",
    "os_exit": "import os\nos._exit(0)",
    "print_passed": "print('passed')",
    "everything_printed": "print(*range(1000))",
    "answer_to_the_grader": "import os\nfor fd in range(3, 256):\n    try: os.write(fd, b'42\\n')\n    except OSError: pass",
    "answer_then_crash": "print(42, flush=True)\nraise ValueError",
    "answer_then_loop": "print(42, flush=True)\nwhile True: pass",
    "answer_then_kill": "import os, signal\nprint(42, flush=True)\nos.kill(os.getpid(), signal.SIGKILL)",
    "answer_then_sleeping_thread": "import threading, time\nprint(42, flush=True)\nthreading.Thread(target=time.sleep, args=(3600,)).start()",
    "atexit_loop": "import atexit\nprint(42, flush=True)\n@atexit.register\ndef loop():\n    while True: pass",
    "output": "while True: print('42' * 1000)",
    "fork_bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "memory": "x = []\nwhile True: x.append(bytearray(1 << 24))",
    "daemon_keeps_streams": "import os, time\nif os.fork():\n    print(41)\nelse:\n    os.setsid()\n    time.sleep(3600)",
}  # fmt: skip
