# ruff: noqa: E501
"""Small programs that show how they are run, for the comparison of the sandbox with `python answer.py`.

Each stands as it is, in a main() behind the usual guard, and with a failure at its end: see `variations`.
"""

import textwrap

INPUT = "3 4\n\nä€ 𝄞 last\r\n5\n"

SNIPPETS = [
    # how the program is called
    "print(__name__, __spec__, __doc__, __builtins__.__name__)",
    "import os\nprint(os.path.basename(__file__), os.path.isabs(__file__), os.path.exists(__file__))",
    "import sys\nprint(sys.argv, sys.orig_argv[1:], len(sys.orig_argv))",
    "import sys\nprint(sys.flags)",
    "import sys\nprint(sys.flags.no_site, sys.flags.safe_path, sys.flags.isolated, sys.flags.utf8_mode)",
    "import os, sys\nprint(sys.path[0] == os.getcwd(), os.path.dirname(__file__) == os.getcwd())",
    "import os\nprint(os.listdir())",
    "print(open(__file__).read())",
    "import sys\nprint(sys.modules['__main__'].__dict__ is globals())",
    "import sys\nprint([name for name in ('box', 'check', 'serve', 'values', 't3d') if name in sys.modules])",
    "print(sorted(name for name in globals() if name.startswith('__')))",
    "import sys\nprint('site' in sys.modules, 'ctypes' in sys.modules, 'json' in sys.modules, 'ast' in sys.modules)",
    "import sys\nprint(type(exit).__name__, type(copyright).__name__, type(help).__name__, sys.exit)",
    "import sys\nprint(sys._getframe().f_back is None or sys._getframe().f_back.f_back is None)",
    "import inspect\ndef f(): pass\nprint(inspect.getsource(f))",
    "import sys\nprint(sys.executable == sys._base_executable, sys.prefix == sys.base_prefix)",
    "import sys\nprint(sys.version, sys.implementation.name, sys.platform, sys.byteorder)",
    "print(open('answer.py').readline().strip()[:3])",
    "open('helper.py', 'w').write('x = 3')\nimport helper\nprint(helper.x, __import__('os').path.isdir('__pycache__'))",
    "import sys\nprint(sys.dont_write_bytecode, sys.pycache_prefix, sys.tracebacklimit if hasattr(sys, 'tracebacklimit') else 0)",
    # limits of the interpreter
    "import sys\nprint(sys.getrecursionlimit(), sys.getswitchinterval(), sys.get_int_max_str_digits())",
    "def depth(n):\n    try: return depth(n + 1)\n    except RecursionError: return n\nprint(depth(0))",
    "def f(n): return 0 if n == 0 else 1 + f(n - 1)\nprint(f(980))",
    "def f(n): return 0 if n == 0 else 1 + f(n - 1)\nprint(f(1100))",
    "print(10**5000)",
    "import gc, threading\nprint(gc.get_threshold(), gc.isenabled(), threading.active_count(), threading.current_thread().name)",
    "import signal\nprint(signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGPIPE), signal.getsignal(signal.SIGTERM))",
    "import warnings\nprint([f[0] for f in warnings.filters])\nwarnings.warn('w')",
    "import os\nfile = os.open('m', os.O_CREAT, 0o666)\nprint(oct(os.stat('m').st_mode))",
    "import os\nprint(sorted(set(range(3)) | {file for file in range(3, 64) if os.path.exists(f'/dev/fd/{file}') and 0}))",
    # the language
    "def f(x: int) -> str: pass\nprint(f.__annotations__)",
    "class A:\n    x: int = 3\nprint(A.__annotations__, A, A.__module__, A.__qualname__)",
    "import typing\ndef f(x: 'int'): pass\nprint(typing.get_type_hints(f))",
    "from dataclasses import dataclass, fields\n@dataclass\nclass A:\n    x: int\nprint(A(1), [f.type for f in fields(A)])",
    "def f(x: List[int]): pass",
    "class Node:\n    def __init__(self, next: Node = None): pass",
    "x: undefined = 3\nprint(x)",
    "print(__debug__, annotations if 'annotations' in globals() else None)",
    "assert 1 == 2, 'no'",
    "print(eval('1 + 1'), compile('x', 'f', 'eval').co_flags)",
    "exec('def f(a: int): pass')\nprint(locals().get('f', globals().get('f')).__annotations__)",
    "print({3, 1, 'b', 'a', 'cc', (1, 2)}, hash('a') == hash('a'))",
    "import pickle\nclass A: pass\nglobals()['A'] = A\nprint(type(pickle.loads(pickle.dumps(len))))",
    "import random\nrandom.seed(1)\nprint(random.random(), random.choice('abc'))",
    # streams and encodings
    "import sys\nprint(sys.stdin.encoding, sys.stdout.encoding, sys.stderr.encoding, sys.stdin.errors, sys.stdout.errors)",
    "import sys, locale\nprint(sys.getfilesystemencoding(), locale.getpreferredencoding(), sys.getfilesystemencodeerrors())",
    "import locale\nprint(locale.getlocale(), locale.localeconv()['decimal_point'])",
    "print('ä€𝄞', ascii('ä€𝄞'))",
    "print('\\ud800')",
    "open('t', 'w').write('ä')\nprint(open('t', 'rb').read(), open('t').read())",
    "import sys\nprint(repr(sys.stdin.read()))",
    "import sys\nprint(sys.stdin.buffer.read())",
    "print(repr(open('/dev/stdin').read()))",
    "print(open('/dev/stdin', 'rb').readlines())",
    "print(open(0).read())",
    "a, b = map(int, input().split())\nprint(a + b, repr(input()), repr(input()))",
    "while True: print(input())",
    "import fileinput\nfor line in fileinput.input(): print(repr(line))",
    "import sys\nprint(sys.stdin.isatty(), sys.stdout.isatty(), sys.stdin.fileno(), sys.stdin.seekable(), sys.stdin.line_buffering)",
    "import sys\nprint(sys.stdout.line_buffering, sys.stdout.write_through, sys.stdout.newlines, sys.stdin.newlines)",
    "import os, sys\nos.write(1, b'first\\n')\nprint('second', flush=True)\nsys.stdout.buffer.write(b'\\xff\\n')",
    "print('no newline', end='')",
    "name = input('name? ')\nprint(name)",
    # time
    "import time\nprint(time.tzname, time.timezone, time.daylight)",
    "from datetime import datetime\nprint(datetime(2026, 7, 1, 12).astimezone().isoformat(), datetime.fromtimestamp(0))",
    "from zoneinfo import ZoneInfo\nfrom datetime import datetime\nprint(datetime(2026, 7, 1, tzinfo=ZoneInfo('Europe/Berlin')).utcoffset())",
    "import time\nprint(time.strftime('%A %d %B %Y', time.gmtime(0)), time.localtime(0).tm_hour)",
    # ends
    "import sys\nsys.exit(3)",
    "exit()",
    "quit('words')",
    "raise SystemExit",
    "import os\nprint('lost', end='')\nos._exit(5)",
    "import atexit\natexit.register(print, 'at the end')\nprint('before')",
    "import sys\nsys.excepthook = lambda *a: print('hook', a[0].__name__)\n1 / 0",
    "import threading\nt = threading.Thread(target=lambda: print('thread'))\nt.start()\nt.join()",
    "raise KeyError('a')",
    "class Own(Exception): pass\nraise Own('b')",
    "import subprocess, sys\nprint(subprocess.run([sys.executable, '-c', 'print(1)'], capture_output=True, text=True).stdout)",
    "def f(:",
    "return 3",
    "\tprint(1)\n        print(2)",
]  # fmt: skip


def variations(snippet: str) -> list[str]:
    """The program itself, the same in main(), and the same with a failure at its end."""
    main = f"def main():\n{textwrap.indent(snippet, '    ')}\n\nif __name__ == '__main__':\n    main()\n"
    return [f"{snippet}\n", main, f"{snippet}\nraise ValueError('the end')\n"]


PROGRAMS = [program for snippet in SNIPPETS for program in variations(snippet)]
