# ruff: noqa: E501
"""Pairs of a program and tests, whose values cross between two boxes: what the tests of `CROSSING` find is what plain
Python would show them. Those of `UNSUPPORTED` want what cannot cross. Those of `WRONG` fail in plain Python, too.
"""


def _pairs(text: str) -> dict[str, tuple[str, str]]:
    """From "=== name", the program, "---" and the tests."""
    pairs = {}
    for section in text.split("=== ")[1:]:
        name, _, code = section.partition("\n")
        program, _, tests = code.partition("\n---\n")
        pairs[name] = program, tests
    return pairs


CROSSING = _pairs(r'''
=== namedtuple
from collections import namedtuple
P = namedtuple('P', 'x y', defaults=[3])

def f():
    return P(1, 2)
---
p = f()
assert p == (1, 2) and p.x == 1 and (p._fields == ('x', 'y'))
assert repr(p) == 'P(x=1, y=2)'
assert isinstance(p, P) and type(p) is P and (p == P(1, 2)) and (P(1).y == 3) and (p._replace(x=5) == (5, 2)) and (p._asdict() == {'x': 1, 'y': 2})
=== NamedTuple
from typing import NamedTuple

class P(NamedTuple):
    x: int
    y: int = 2

    def norm(self):
        return self.x + self.y

def f(p=None):
    return p.norm() if p else P(1)
---
p = f()
assert p.norm() == 3 and p.y == 2 and (f(p) == 3) and (P(5).norm() == 7)
=== counter
from collections import Counter

def f():
    return Counter('aab')
---
c = f()
assert c['zz'] == 0 and c.most_common(1) == [('a', 2)] and (type(c).__name__ == 'Counter')
=== defaultdict
from collections import defaultdict

def f():
    d = defaultdict(list)
    d[1].append(2)
    return d

def g():
    return defaultdict(lambda: 7)
---
d = f()
assert d[5] == [] and d == {1: [2], 5: []}
assert g()['x'] == 7
=== ordered
from collections import OrderedDict

def f():
    return OrderedDict([(1, 2), (3, 4)])
---
from collections import OrderedDict
assert f() == OrderedDict([(1, 2), (3, 4)]) and f() != OrderedDict([(3, 4), (1, 2)])
d = f()
d.move_to_end(1)
assert list(d) == [3, 1]
=== deque
from collections import deque

def f():
    return deque([1, 2, 3], maxlen=2)

def g(d):
    d.append(9)
    d.rotate(1)
---
d = f()
assert d.maxlen == 2 and list(d) == [2, 3]
d.append(4)
assert list(d) == [3, 4]
g(d)
assert list(d) == [9, 4]
=== enum
from enum import Enum, IntEnum, Flag, auto

class C(Enum):
    RED = 1
    BLUE = 'b'

    def low(self):
        return self.name.lower()

class I(IntEnum):
    A = 1
    B = 2

class G(Flag):
    X = auto()
    Y = auto()

def f(n):
    return C(n)

def g():
    return I.B

def h():
    return G.X | G.Y

def k(c):
    return c is C.RED
---
c = f(1)
assert c is C.RED and c.name == 'RED' and (str(c) == 'C.RED') and (repr(c) == '<C.RED: 1>') and (C('b') is C.BLUE) and (C['BLUE'] == f('b'))
assert g() == 2 and g() is I.B and (g() + 1 == 3) and isinstance(g(), int)
assert h() == G.X | G.Y and G.X in h()
assert k(c) and k(C.RED) and (not k(C.BLUE))
assert c.low() == 'red' and len(C) == 2 and isinstance(c, C)
try:
    f(9)
    assert False
except ValueError as e:
    assert str(e) == '9 is not a valid C'
=== keyerror
def f():
    return {}['a']
---
try:
    f()
    assert False
except KeyError as e:
    assert str(e) == "'a'" and e.args == ('a',)
=== oserror
def f():
    open('/nowhere')
---
try:
    f()
    assert False
except FileNotFoundError as e:
    assert e.errno == 2 and 'nowhere' in str(e), str(e)
=== jsonerror
import json

def f():
    json.loads('{')
---
import json
try:
    f()
    assert False
except json.JSONDecodeError as e:
    assert e.pos == 1 and e.doc == '{' and ('line 1' in str(e)) and (type(e) is json.JSONDecodeError)
=== jsonerror2
import json

def f():
    json.loads('{')
---
try:
    f()
    assert False
except ValueError as e:
    assert type(e).__name__ == 'JSONDecodeError' and 'line 1' in str(e)
=== decimalerr
from decimal import *

def f():
    return Decimal('x')
---
import decimal
try:
    f()
    assert False
except decimal.InvalidOperation:
    pass
=== calledprocess
import subprocess

def f():
    raise subprocess.CalledProcessError(3, 'x')
---
import subprocess
try:
    f()
    assert False
except subprocess.CalledProcessError as e:
    assert e.returncode == 3 and 'exit status 3' in str(e)
=== unicodeerr
def f():
    return b'\xff'.decode()
---
try:
    f()
    assert False
except UnicodeDecodeError as e:
    assert e.start == 0 and 'invalid start byte' in str(e)
=== ownexc
class E(Exception):

    def __init__(self, code):
        self.code = code

    def __str__(self):
        return f'code {self.code}'

def f():
    raise E(4)
---
try:
    f()
    assert False
except E as e:
    assert e.code == 4 and str(e) == 'code 4'
try:
    raise E(5)
except E as e:
    assert str(e) == 'code 5'
=== ownexc2
class A(ValueError):
    pass

class B(A):
    pass

def f():
    raise B('x')
---
try:
    f()
    assert False
except A as e:
    assert isinstance(e, B) and e.args == ('x',) and isinstance(e, ValueError)
=== sysexit
import sys

def f():
    sys.exit(3)
---
try:
    f()
    assert False
except SystemExit as e:
    assert e.code == 3
=== group
def f():
    raise ExceptionGroup('g', [ValueError(1), TypeError(2)])
---
try:
    f()
    assert False
except* ValueError as g:
    assert len(g.exceptions) == 1
except* TypeError:
    pass
=== excvalue
def f():
    return ValueError('a')
---
e = f()
assert isinstance(e, ValueError) and str(e) == 'a'
=== nestedinplace
def f(g):
    g[0][0] = 9
    g.append([1])
    g[0], g[1] = (g[1], g[0])
---
a = [0]
b = [5]
g = [a, b]
f(g)
assert g == [[5], [9], [1]] and g[1] is a and (a == [9])
=== alias
def f(x, y):
    x.append(1)
    return x is y
---
a = []
assert f(a, a)
assert a == [1]
assert not f([], [])
=== kwinplace
def f(*, d):
    d['x'] = [1]
---
d = {}
f(d=d)
assert d == {'x': [1]}
=== andinplace
def f(n):
    n[:] = sorted(set(n))
    return len(n)
---
n = [2, 1, 1]
assert f(n) == 2 and n == [1, 2]
=== returnsarg
def f(x):
    x.append(1)
    return x
---
a = []
assert f(a) is a
b = f(a)
assert b is a and b == [1, 1]
b.append(3)
assert a == [1, 1, 3]
=== cyclicarg
def f(x):
    return x[0] is x
---
a = []
a.append(a)
assert f(a)
=== listnode
def reverse(head):
    prev = None
    while head:
        head.next, prev, head = (prev, head, head.next)
    return prev

def build():
    return ListNode(7, ListNode(8))
---
class ListNode:

    def __init__(self, val=0, next=None):
        self.val, self.next = (val, next)

def to(h):
    out = []
    while h:
        out.append(h.val)
        h = h.next
    return out
a = ListNode(1, ListNode(2, ListNode(3)))
last = a.next.next
r = reverse(a)
assert to(r) == [3, 2, 1] and r is last and (a.next is None)
assert to(reverse(ListNode(1, ListNode(2)))) == [2, 1]
assert to(build()) == [7, 8] and isinstance(build(), ListNode)
=== listnode2
class ListNode:

    def __init__(self, v, n=None):
        self.val, self.next = (v, n)

def f(h):
    return ListNode(0, h)
---
class ListNode:

    def __init__(self, val=0, next=None):
        self.val, self.next = (val, next)
n = ListNode(1)
r = f(n)
assert r.val == 0 and r.next is n and (r.next.val == 1)
=== abstract classes
class A:
    def __iter__(self):
        return iter([1])
    def __len__(self):
        return 1
def f():
    return A()
def g(x):
    from collections.abc import Iterable, Sized
    return isinstance(x, Iterable), isinstance(x, Sized)
---
from collections.abc import Iterable, Mapping, Sized
assert isinstance(f(), Iterable) and isinstance(f(), Sized) and not isinstance(f(), (Mapping, int, list))
class B:
    def __len__(self):
        return 2
assert g(B()) == (False, True)
=== many
def f(xs):
    xs[0] = -1
    return len(xs)
def g(xs, d):
    return sum(xs) + len(d)
def h(b, d):
    b[0] = 7
    d.move_to_end(1)
---
from collections import OrderedDict
xs = list(range(200_000))
assert f(xs) == 200_000
assert xs[:2] == [-1, 1]
assert g(xs, dict.fromkeys(xs)) == sum(xs) + 200_000
b, d = bytearray(b'abc'), OrderedDict.fromkeys([1, 2])
h(b, d)
assert b == bytearray(bytes([7]) + b'bc') and list(d) == [2, 1]
=== class of a node
def f(node):
    return node.__class__(node.value + 1)
def g(node):
    return (type(node).__name__, node.__class__.__name__, vars(node))
---
class Node:
    def __init__(self, value):
        self.value = value
assert f(Node(1)).value == 2 and type(f(Node(1))) is Node
assert g(Node(1)) == ('Node', 'Node', {'value': 1})
=== children
def f(n):
    n.children.append(4)
    n.data['k'] = 1
---
class N:

    def __init__(self):
        self.children = []
        self.data = {}
n = N()
c = n.children
f(n)
assert n.children == [4] and c == [4] and (n.data == {'k': 1})
=== cmpnode
import heapq

def f(xs):
    heapq.heapify(xs)
    return heapq.heappop(xs)
---
class N:

    def __init__(self, v):
        self.v = v

    def __lt__(self, o):
        return self.v < o.v
a, b = (N(2), N(1))
assert f([a, b]) is b
=== callback
def f(g, xs):
    return [g(x) for x in xs]

def h(g):
    return g
---
assert f(lambda x: x + 1, [1, 2]) == [2, 3]
assert f(len, ['a', 'bb']) == [1, 2]
k = lambda: 3
assert h(k) is k
=== generator
def f():
    a = 1
    while True:
        yield a
        a *= 2
---
import itertools
assert list(itertools.islice(f(), 5)) == [1, 2, 4, 8, 16]
g = f()
assert next(g) == 1 and next(g) == 2
=== genarg
def f(g):
    return sum(g)
---
assert f((x for x in range(5))) == 10
assert f(map(abs, [-1, 2])) == 3
=== gensend
def f():
    x = (yield 1)
    while True:
        x = (yield (x * 2))
---
g = f()
next(g)
assert g.send(5) == 10 and g.send(6) == 12
=== iterclass
class It:

    def __init__(self, n):
        self.n = n

    def __iter__(self):
        return self

    def __next__(self):
        if not self.n:
            raise StopIteration
        self.n -= 1
        return self.n
---
assert list(It(3)) == [2, 1, 0]
it = It(1)
assert next(it) == 0
try:
    next(it)
    assert False
except StopIteration:
    pass
=== point
from dataclasses import dataclass

@dataclass(order=True)
class P:
    x: int
    y: int = 0

    def __add__(s, o):
        return P(s.x + o.x, s.y + o.y)

def f():
    return P(1, 2)
---
p = f()
assert p == P(1, 2) and p != P(2, 2) and (p.x == 1) and (repr(p) == 'P(x=1, y=2)')
assert p + P(1, 1) == P(2, 3) and p < P(3) and isinstance(p, P) and (p is not None) and (p != None)
p.x = 7
assert p.x == 7 and type(p).__name__ == 'P'
assert sorted([P(2), P(1)]) == [P(1), P(2)]
=== container
class S:

    def __init__(self):
        self.d = {}

    def __setitem__(s, k, v):
        s.d[k] = v

    def __getitem__(s, k):
        return s.d[k]

    def __contains__(s, k):
        return k in s.d

    def __enter__(s):
        return s

    def __exit__(s, *a):
        s.d.clear()

    def __delitem__(s, k):
        del s.d[k]
---
s = S()
s['a'] = 1
assert s['a'] == 1 and 'a' in s and ('b' not in s)
with s as t:
    assert t is s
assert 'a' not in s
assert not hasattr(s, '__len__') and (not callable(s))
try:
    len(s)
    assert False
except TypeError:
    pass
=== sublist
class L(list):

    def total(self):
        return sum(self)

def f():
    return L([1, 2])
---
l = f()
assert l == [1, 2] and l.total() == 3 and isinstance(l, list) and (type(l) != list)
=== ndarray
import numpy as np

def f():
    return np.arange(4).reshape(2, 2)

def g(a):
    a += 1
---
import numpy as np
assert (f() == np.array([[0, 1], [2, 3]])).all() and f().shape == (2, 2) and np.allclose(f(), [[0, 1], [2, 3]])
a = np.zeros(2)
g(a)
assert a.tolist() == [1, 1]
=== global
memo = []
count = 0

def f():
    global count
    count += 1
    memo.append(1)
---
f()
assert memo == [1] and count == 1
=== tz
from zoneinfo import ZoneInfo
from datetime import datetime

def f():
    return datetime(2026, 7, 1, tzinfo=ZoneInfo('Europe/Berlin'))
---
assert f().utcoffset().total_seconds() == 7200 and f().tzinfo.key == 'Europe/Berlin' and (str(f().tzinfo) == 'Europe/Berlin')
=== types
import uuid, pathlib

def f():
    return [uuid.UUID(int=3), pathlib.Path('/a'), ..., slice(1, 2), int, ValueError]
---
import uuid, pathlib
assert f() == [uuid.UUID(int=3), pathlib.Path('/a'), ..., slice(1, 2), int, ValueError]
=== future
def f(x: int):
    return f.__annotations__['x'] is int
---
assert f(1)
=== testnt
def f(p):
    return (p.x + p[1], p._replace(x=9))
---
from collections import namedtuple
P = namedtuple('P', 'x y')
r = f(P(1, 2))
assert r[0] == 3 and r[1] == P(9, 2) and (type(r[1]) is P)
=== testenum
def f(c):
    return (c.name, c)
---
from enum import Enum

class C(Enum):
    A = 1
assert f(C.A) == ('A', C.A) and f(C.A)[1] is C.A
=== testexc
def f(g):
    try:
        g()
    except ValueError as e:
        return str(e)

def h(g):
    g()
---
class E(ValueError):
    pass

def g():
    raise E('q')
assert f(g) == 'q'
try:
    h(g)
    assert False
except E as e:
    assert str(e) == 'q'
=== closure
def f(n):

    def g(x):
        return x * n
    return g
---
assert f(3)(4) == 12 and list(map(f(2), [1, 2])) == [2, 4] and callable(f(1)) and (f.__name__ == 'f')
=== class method
class A:
    k = 5

    @classmethod
    def make(cls):
        return cls()

    @staticmethod
    def s(x):
        return x

    @property
    def p(self):
        return 8
---
a = A.make()
assert isinstance(a, A) and A.s(3) == 3 and (A.k == 5) and (a.p == 8) and (A.__name__ == 'A')
assert issubclass(A, object)
=== async
async def f(x):
    return x + 1
---
import asyncio
assert asyncio.run(f(1)) == 2
=== strenum
from enum import Enum, StrEnum

class S(str, Enum):
    A = 'a'

class T(StrEnum):
    B = 'b'

def f():
    return S.A

def g():
    return T.B
---
assert f() == 'a' and f().value == 'a' and (str(f()) == 'S.A') and (str(g()) == 'b') and isinstance(f(), str)
=== userdict
from collections import UserList, ChainMap

def f():
    return UserList([1, 2])

def g():
    return ChainMap({1: 2}, {3: 4})
---
assert list(f()) == [1, 2] and f()[0] == 1 and (dict(g()) == {1: 2, 3: 4})
=== simplens
from types import SimpleNamespace

def f():
    return SimpleNamespace(a=1)
---
assert f().a == 1
=== iofile
import io

def f():
    return io.StringIO('a\nb')
---
assert f().read() == 'a\nb' and list(f()) == ['a\n', 'b']
=== memory
def f(x):
    return memoryview(b'abc')
---
assert bytes(f(1)) == b'abc'
=== match
import re

def f():
    return re.match('(a)b', 'ab')
---
assert f().group(1) == 'a' and f()
=== jsonobj
class A:

    def __init__(s):
        s.x = 1

def f():
    return A()
---
assert vars(f()) == {'x': 1}
=== isdict
from collections import Counter, defaultdict

def f():
    return Counter('ab')
---
assert isinstance(f(), dict) and f() == {'a': 1, 'b': 1}
=== typeeq
class A:
    pass

def f():
    return A()
---
assert type(f()) == A and type(f()) is A
=== classeq
class A:
    pass

def f():
    return A()
---
assert f().__class__ == A and f().__class__ is A
=== isgen
def f():
    yield 1
---
import types, inspect
assert isinstance(f(), types.GeneratorType)
=== doc
def f():
    """hi"""

class A:
    """ho"""
---
assert f.__doc__ == 'hi' and A.__doc__ == 'ho'
=== annot
def f(a: int) -> str:
    pass
---
assert f.__annotations__ == {'a': int, 'return': str}
=== defaults
def f(a=3):
    pass
---
assert f.__defaults__ == (3,)
=== lru
import functools

@functools.lru_cache
def f(n):
    return n
---
assert f(1) == 1
assert f.cache_info().misses == 1
f.cache_clear()
=== partial
import functools

def g(a, b):
    return a - b

def f():
    return functools.partial(g, 5)
---
assert f()(2) == 3
=== mutattr
class S:

    def __init__(s):
        s.items = []

    def n(s):
        return len(s.items)
---
s = S()
s.items.append(1)
assert s.n() == 1
=== mutret
store = [1]

def f():
    return store

def n():
    return len(store)
---
f().append(2)
assert n() == 2
=== nested data
class P:

    def __init__(s, x):
        s.x = x

def f():
    return {'a': [P(1), P(2)]}
---
r = f()
assert r['a'][1].x == 2
=== tuple cmp
class P:

    def __init__(s, x):
        s.x = x

    def __eq__(s, o):
        return isinstance(o, P) and s.x == o.x

    def __hash__(s):
        return hash(s.x)

def f():
    return [P(1)]
---
assert f() == [P(1)] and P(1) in f() and ({P(1), P(1)} == {P(1)}) and (P(1) not in [None])
=== fstring
class P:

    def __str__(s):
        return 'pp'

    def __repr__(s):
        return 'rr'

    def __format__(s, spec):
        return 'ff' + spec
---
p = P()
assert f'{p:x}' == 'ffx' and str(p) == 'pp' and (f'{p!r}' == 'rr') and ([p].__repr__() == '[rr]')
=== int
class P:

    def __int__(s):
        return 3

    def __float__(s):
        return 2.5

    def __index__(s):
        return 1

    def __bool__(s):
        return False

    def __len__(s):
        return 4

    def __reversed__(s):
        return iter([1])

    def __round__(s, n=None):
        return 9

    def __call__(s, a, *, k):
        return a + k
---
p = P()
assert int(p) == 3 and float(p) == 2.5 and ([7, 8][p] == 8) and (not p) and (len(p) == 4) and (list(reversed(p)) == [1]) and (round(p) == 9) and (p(1, k=2) == 3)
=== unittest
def f(x):
    if x < 0:
        raise ValueError('neg')
    return x
---
import unittest

class T(unittest.TestCase):

    def test(self):
        self.assertEqual(f(1), 1)
        with self.assertRaises(ValueError):
            f(-1)
r = unittest.TextTestRunner(stream=__import__('io').StringIO()).run(unittest.defaultTestLoader.loadTestsFromTestCase(T))
assert r.wasSuccessful()
=== raises
def f(x):
    raise ValueError('neg')
---
import contextlib
with contextlib.suppress(ValueError):
    f(-1)
=== thread
def f(x):
    return x
---
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(4) as p:
    assert list(p.map(f, range(20))) == list(range(20))
=== sortkey
def f(x):
    return -x
---
assert sorted([1, 3, 2], key=f) == [3, 2, 1]
=== deco
def deco(g):

    def w(*a):
        return g(*a) + 1
    return w
---
@deco
def h(x):
    return x
assert h(1) == 2
=== nan
def f():
    return float('nan')
---
import math
assert math.isnan(f())
=== negzero
def f():
    return -0.0
---
assert str(f()) == '-0.0'
=== recur
def f(n):
    return 1 if n == 0 else f(n - 1)
---
try:
    f(10 ** 5)
    assert False
except RecursionError:
    pass
=== docexc
def f():
    assert False, 'm'
---
try:
    f()
except AssertionError as e:
    assert str(e) == 'm'
else:
    raise SystemError
=== warn
import warnings

def f():
    raise UserWarning('w')
---
try:
    f()
except Warning as e:
    assert str(e) == 'w'
=== cause
def f():
    try:
        1 / 0
    except ZeroDivisionError as e:
        raise ValueError('v') from e
---
try:
    f()
except ValueError as e:
    assert isinstance(e.__cause__, ZeroDivisionError)
=== notes
def f():
    e = ValueError('v')
    e.add_note('n')
    raise e
---
try:
    f()
except ValueError as e:
    assert e.__notes__ == ['n']
=== fields of a dataclass
from dataclasses import asdict, dataclass, field

@dataclass
class I:
    z: int = 1

@dataclass
class P:
    x: list = field(default_factory=lambda: [I(), I(2)])

def f():
    return P()

def g(p):
    return asdict(p)
---
from dataclasses import asdict, astuple, dataclass, fields, is_dataclass, replace
@dataclass
class Q:
    a: int
p = f()
assert is_dataclass(p) and is_dataclass(P) and [each.name for each in fields(P)] == ['x']
assert asdict(p) == {'x': [{'z': 1}, {'z': 2}]} and astuple(p) == ([(1,), (2,)],)
assert replace(p, x=3).x == 3 and g(Q(1)) == {'a': 1}
=== the file of an OSError
def f():
    open('/nonexistent')

def g():
    raise OSError(5, 'broken', 'a file')
---
import errno
for call, told in ((f, (errno.ENOENT, '/nonexistent')), (g, (5, 'a file'))):
    try:
        call()
    except OSError as error:
        assert (error.errno, error.filename) == told and len(error.args) == 2
    else:
        raise AssertionError
=== copies of objects
import copy

class A:
    def __init__(self):
        self.x = [1]

def f():
    return A()

def g(node):
    other = copy.deepcopy(node)
    other.value = 9
    return other
---
import copy
class N:
    def __init__(self, value, next=None):
        self.value, self.next = value, next
a = f()
b = copy.deepcopy([a])[0]
c = copy.copy(a)
b.x.append(2)
assert a.x == [1] and b.x == [1, 2] and c is not a
n = N(1, N(2))
m = g(n)
assert m.value == 9 and n.value == 1 and m.next.value == 2 and m.next is not n.next
=== a dictionary's missing key
class D(dict):
    def __missing__(self, key):
        return key

def f():
    return D(x=1)
---
assert f()['x'] == 1 and f()['q'] == 'q'
=== an exit with an exception
class A:
    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        self.seen = kind, str(error)
        return True
---
with A() as a:
    raise ValueError('no')
assert a.seen == (ValueError, 'no')
''')

UNSUPPORTED = _pairs(r"""
=== signature
def f(a, b=2):
    return a
---
import inspect
assert str(inspect.signature(f)) == '(a, b=2)'
=== a class below the program's
class A:
    def add(self):
        return 3
---
class B(A):
    pass
assert B().add() == 3
=== subclass argument
def f(x):
    x.append(1)
---
class L(list):
    pass
x = L()
f(x)
assert x == [1]
=== moneyeq
class M:

    def __init__(s, v):
        s.v = v

    def __eq__(s, o):
        return s.v == getattr(o, 'v', o)

def f():
    return M(3)
---
assert f() == 3
=== moneyne
class M:

    def __init__(s, v):
        s.v = v

    def __eq__(s, o):
        return s.v == getattr(o, 'v', o)

def f():
    return M(3)
---
assert f() == 4
=== moneylt
class M:

    def __lt__(s, o):
        return True

    def __sub__(s, o):
        return s

    def __abs__(s):
        return s

def f():
    return M()
---
assert abs(f() - 3) < 1e-06
=== module arg
def f(m):
    return m.sqrt(4)
---
import math
assert f(math) == 2
=== file arg
def f(m):
    return m.read()
---
import io
assert f(io.StringIO('a')) == 'a'
=== cyclic
def f():
    x = []
    x.append(x)
    return x
---
x = f()
assert x[0] is x
=== deep
def f():
    x = []
    for _ in range(10 ** 5):
        x = [x]
    return x
---
assert f()
=== stopiter
def f():
    raise StopIteration
---
try:
    f()
    assert False
except StopIteration:
    pass
=== badint
class A(int):

    def __eq__(self, o):
        return True
    __hash__ = int.__hash__

def f():
    return A(3)
---
assert f() == 6765
=== badlist
class A(list):

    def __eq__(self, o):
        return True

def f():
    return A([3])
---
assert f() == [3]
=== len
def f():
    return 'x' * (100 << 20)
---
assert len(f()) == 100 << 20
=== print
def f(x):
    print(x)
---
import io, contextlib
b = io.StringIO()
with contextlib.redirect_stdout(b):
    f(3)
assert b.getvalue() == '3\n'
=== mock
def f():
    return input()
---
from unittest.mock import patch
with patch('builtins.input', return_value='x'):
    assert f() == 'x'
""")

WRONG = _pairs(r"""
=== wrongtype
class A:
    pass

def f():
    return A()
---
assert f() == 3
""")
