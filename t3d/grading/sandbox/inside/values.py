"""The line between a program and its tests: values as JSON, and everything else by reference.

Each side of the line is a `Peer`. Plain data cross as copies: numbers, texts, the containers of the standard library,
dates, arrays. They are rebuilt from the receiver's own classes, so that comparisons are honest. An instance of any
other class, a function and an iterator stay where they are. The other side gets a stand-in, which asks for every
attribute, call and operation. Enum, namedtuple and exception classes are rebuilt from their data.

    ["list", [...]], ["Fraction", "1/3"], ...   data, see `_encode_data`
    ["mine", n, class, operations]              an object of the sender: the n-th of its table
    ["yours", n]                                an object of the receiver
    ["given", n, data]                          a container of the tests: the program reports its changes in it
    ["copy", n, data]                           the present content of such a container, as a result
    ["lent", n, data]                           a container that an object of the program holds: changes go back to it

A request is [kind, target, ...], a reply ["value", value, changes], ["error", exception, changes] or ["unsupported",
text]. Each side may send a request while it answers one. So a program can call a function that its tests handed over.
"""

from __future__ import annotations

import builtins
import collections
import functools
import importlib
import json
import keyword
import os
import re
import struct
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

_MOST_BYTES = 64 << 20  # of one message
_BIG = 1 << 60  # integers from here on cross in hexadecimal, which has no limit of digits


class Unsupported(BaseException):
    """A value that cannot cross. Not an Exception: tests must not catch it."""


class Gone(BaseException):
    """The other side has ended or breaks the protocol. Not an Exception: tests must not catch it."""


# --- data ------------------------------------------------------------------------------------------------------------

CONTAINERS = (
    list, dict, set, bytearray,
    collections.deque, collections.Counter, collections.defaultdict, collections.OrderedDict,
)  # fmt: skip
_KINDS = {kind.__name__: kind for kind in CONTAINERS}
_VIEWS = {type({}.keys()): "keys", type({}.values()): "values", type({}.items()): "items"}
_BASES = (int, float, complex, str, bytes, bytearray, tuple, list, dict, set, frozenset, collections.deque)
# Attributes that Python reads to inspect a function, to derive from a class, or to list a dataclass's fields.
_READ_BY_PYTHON = ("__signature__", "__mro_entries__", "__dataclass_fields__")
_CONSTANTS = {"no traceback": None, "ellipsis": ..., "NotImplemented": NotImplemented}


def _write_datetime(value: Any) -> str:
    zone = getattr(value.tzinfo, "key", None)
    return f"{value.replace(tzinfo=None) if zone else value}|{value.fold}|{zone or ''}"


def _read_datetime(kind: Any, text: str) -> Any:
    moment, fold, zone = text.split("|")
    tzinfo = {"tzinfo": importlib.import_module("zoneinfo").ZoneInfo(zone)} if zone else {}
    return kind.fromisoformat(moment).replace(fold=int(fold), **tzinfo)


_TEXTS: dict[str, tuple[Callable, Callable]] = {  # classes that cross as text: how it is written and read
    "fractions.Fraction": (str, lambda kind, text: kind(text)),
    "decimal.Decimal": (str, lambda kind, text: kind(text)),
    "datetime.datetime": (_write_datetime, _read_datetime),
    "datetime.date": (str, lambda kind, text: kind.fromisoformat(text)),
    "datetime.time": (lambda value: value.isoformat(), lambda kind, text: kind.fromisoformat(text)),
    "datetime.timedelta": (
        lambda span: f"{span.days} {span.seconds} {span.microseconds}",
        lambda kind, text: kind(*map(int, text.split())),
    ),
    "datetime.timezone": (
        lambda zone: str(zone.utcoffset(None).total_seconds()),
        lambda kind, text: kind(importlib.import_module("datetime").timedelta(seconds=float(text))),
    ),
    "zoneinfo.ZoneInfo": (lambda zone: zone.key, lambda kind, text: kind(text)),
    "uuid.UUID": (str, lambda kind, text: kind(text)),
    "pathlib.PosixPath": (str, lambda kind, text: kind(text)),
    "pathlib.PurePosixPath": (str, lambda kind, text: kind(text)),
    "ipaddress.IPv4Address": (str, lambda kind, text: kind(text)),
    "ipaddress.IPv6Address": (str, lambda kind, text: kind(text)),
}
_DTYPE = re.compile(r"[<>|=](?:[biufc]\d+|[US]\d+|[mM]8(?:\[\d*[a-zA-Z]+\])?)")

# Operations that a class may define for its instances. A stand-in has the operations of its object's class.
_ASKED = """call len iter next reversed getitem setitem delitem contains str repr format bytes bool int float index
complex enter exit instancecheck subclasscheck hash length_hint round floor ceil trunc missing""".split()
_COMPARED = "lt le gt ge".split()
_UNARY = "neg pos invert abs".split()
_BINARY = "add sub mul matmul truediv floordiv mod divmod pow lshift rshift and xor or".split()
_ARITHMETIC = [*_BINARY, *(f"r{name}" for name in _BINARY), *(f"i{name}" for name in _BINARY if name != "divmod")]
_OPERATIONS = [f"__{name}__" for name in (*_ASKED, "eq", *_COMPARED, *_UNARY, *_ARITHMETIC)]


@functools.cache
def _operations(kind: type, than: type = object) -> list[str]:
    """Operations that a class or one of its bases defines differently from `than`, without operations it removes."""
    return [name for name in _OPERATIONS if _defined(kind, name) not in (None, _defined(than, name))]


def _defined(kind: type, name: str) -> Any:
    return next((vars(base)[name] for base in kind.__mro__ if name in vars(base)), None)


def _is_standard(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in sys.stdlib_module_names and kind.__module__ != "__main__"


@functools.cache
def _written_by(kind: type, modules: tuple[str, ...]) -> bool:
    """Whether all operations of a class come from these modules or from C."""
    own = [vars(base).get(name) for base in kind.__mro__ for name in _OPERATIONS]
    return all(getattr(each, "__module__", None) in (None, *modules) for each in own)


class StandIn:
    """An object of the other side. Each object has one stand-in, so that `is` and the default == keep their results."""

    __slots__ = ("__weakref__", "_number", "_peer")

    def __getattr__(self, name: str) -> Any:
        return self._peer.ask("attribute", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._peer.ask("set", self, name, value)

    def __delattr__(self, name: str) -> None:
        self._peer.ask("delete", self, name)

    def __copy__(self) -> Any:
        return self._peer.ask("copy", self, "copy")

    def __deepcopy__(self, _: dict) -> Any:
        return self._peer.ask("copy", self, "deepcopy")


def _documentation(stand_in: StandIn) -> Any:
    return stand_in._peer.ask("attribute", stand_in, "__doc__")


def _called(stand_in: StandIn, *arguments: Any, **keywords: Any) -> Any:
    return stand_in._peer.ask("call", stand_in, arguments, tuple(keywords.items()))


class Stream:
    """An iterator of the other side. After some items it is read ahead, by more items each time."""

    def __init__(self, peer: Peer, number: int) -> None:
        self._peer, self._number, self._ahead = peer, number, 0.125
        self._items: list[Any] = []
        self._end: list[Any] | None = None

    def __iter__(self) -> Iterator:
        return self

    def __next__(self) -> Any:
        if not self._items and self._end is None:
            self._ahead = min(self._ahead * 1.25, 1024)
            self._items, self._end = self._peer.ask("next", self, max(1, int(self._ahead)))
            self._items.reverse()
        if self._items:
            return self._items.pop()
        end, self._end = self._end, []
        if end:
            raise end[0]
        raise StopIteration

    def resume(self, name: str, *arguments: Any) -> Any:
        """A generator's send, throw or close."""
        if self._items:
            raise Unsupported(f"{name} of a generator that was read ahead")
        return self._peer.ask("resume", self, name, *arguments)

    def __getattr__(self, name: str) -> Any:
        return self._peer.ask("attribute", self, name)


def _generate(stream: Stream) -> Iterator:
    """A generator that forwards every sent value to the other side's generator."""
    following: Callable[[], Any] = lambda: next(stream)  # noqa: E731
    while True:
        try:
            value = following()
        except StopIteration as end:
            return end.value
        try:
            sent = yield value
        except GeneratorExit:
            stream.resume("close")
            raise
        except BaseException as error:
            following = functools.partial(stream.resume, "throw", error)
        else:
            following = functools.partial(stream.resume, "send", sent) if sent is not None else lambda: next(stream)


# --- one side of the line --------------------------------------------------------------------------------------------


class Peer:
    """One side of the line. Subclasses decide which values may cross (`may_share`) and which requests (`allow`)."""

    def __init__(self, channel: int) -> None:
        self._channel = channel
        self._objects: list[Any] = []  # ours, of which the other side has stand-ins
        self._numbers: dict[int, int] = {}  # by id, which stays an object's own while it is kept
        self._theirs: dict[int, tuple[int, Any]] = {}  # id of a stand-in or rebuilt class -> its number, itself
        self._stand_ins: dict[int, Any] = {}  # by their number
        self._classes: dict[Any, type] = {}  # the classes of stand-ins and of rebuilt values
        self.given: list[Any] = []  # containers of the tests that the current call has seen
        self._given_numbers: dict[int, int] = {}
        self.depth = 0

    # decisions of the subclasses

    gives = False  # True: containers are given, and changes reported; False: they are copied

    def may_share(self, value: Any) -> bool:
        """Whether the other side may have a stand-in of an object."""
        return True

    def allow(self, kind: str, target: Any, rest: list) -> None:
        """Raises AttributeError for a request that is not granted."""

    def operation(self, name: str) -> Callable:
        """The method for an operation of a stand-in."""

        def ask(stand_in: StandIn, *arguments: Any) -> Any:
            return self.ask("apply", stand_in, name, *arguments)

        return ask

    # messages

    def send(self, message: Any) -> None:
        data = json.dumps(message).encode()
        if len(data) > _MOST_BYTES:
            raise Unsupported(f"a value of {len(data)} bytes is too large to cross")
        data = struct.pack(">I", len(data)) + data
        while data:
            data = data[os.write(self._channel, data) :]

    def receive(self) -> Any:
        """The next message. Raises EOFError at the end, and ValueError for a message that is too long or no JSON."""
        size = struct.unpack(">I", self._read(4))[0]
        if size > _MOST_BYTES:
            raise ValueError("message too long")
        return json.loads(self._read(size))

    def _read(self, size: int) -> bytes:
        parts = []
        while size:
            part = os.read(self._channel, min(size, 1 << 20))
            if not part:
                raise EOFError
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def ask(self, kind: str, target: Any, *rest: Any) -> Any:
        """Send a request and wait for its reply; meanwhile answer the other side's requests. Raises its exception."""
        outcome, value = self.exchange(kind, target, *rest)
        if outcome == "error":
            raise value
        return value

    def exchange(self, kind: str, target: Any, *rest: Any) -> tuple[str, Any]:
        """The outcome of a request, "value" or "error", and its value or exception. Raises Unsupported."""
        self.depth += 1
        try:
            self.send([kind, self.encode(target), *map(self.encode, rest)])
            while (message := self.receive())[0] not in _REPLIES:
                self.answer(message)
            outcome, *parts = message
            if outcome == "unsupported":
                raise Unsupported(str(parts[0])[:500])
            value = self.decode(parts[0])
            self.changed(parts[1], value)
            return outcome, value
        finally:
            self.depth -= 1
            self._forget()

    def answer(self, message: list) -> None:
        """Carry out a request and send the reply."""
        self.depth += 1
        try:
            self.send(self._reply(message))
        except Unsupported as trouble:
            self.send(["unsupported", str(trouble)])
        except (RecursionError, ValueError) as trouble:  # from an endless or too deep value
            self.send(["unsupported", f"{type(trouble).__name__}: {trouble}"])
        except MemoryError as error:
            self.send(["error", self.encode(error), []])
        finally:
            self.depth -= 1
            self._forget()

    def _reply(self, message: list) -> list:
        kind, target, *rest = message
        target, rest = self.decode(target), [self.decode(part) for part in rest]
        try:
            outcome, value = "value", self.do(kind, target, rest)
        except (Unsupported, Gone):
            raise
        except BaseException as error:
            outcome, value = "error", error
        return [outcome, self.encode(value), self.changes()]

    def _forget(self) -> None:
        """Containers are given for one call of the tests."""
        if self.depth == 0:
            self.given.clear()
            self._given_numbers.clear()

    def do(self, kind: str, target: Any, rest: list) -> Any:
        self.allow(kind, target, rest)
        if kind == "call":
            return target(*rest[0], **dict(rest[1]))
        if kind == "attribute":
            return _attribute(target, rest[0])
        if kind == "set":
            return setattr(target, *rest)
        if kind == "delete":
            return delattr(target, *rest)
        if kind == "apply":
            return _apply(target, *rest)
        if kind == "next":
            return _some(target, rest[0])
        if kind == "resume":
            return getattr(target, rest[0])(*rest[1:])
        if kind == "update":
            return overwrite(target, rest[0])
        if kind == "copy" and rest[0] in ("copy", "deepcopy"):
            return getattr(importlib.import_module("copy"), rest[0])(target)
        raise ValueError(f"unknown request {kind!r}")

    def changes(self) -> list:
        """A reply's entries for given containers."""
        return []

    def changed(self, changes: list, value: Any) -> None:
        """Apply the entries for given containers in a reply with this value."""

    # values

    def encode(self, value: Any) -> Any:
        """JSON for a value. Raises Unsupported for one that must not cross."""
        kind = type(value)
        if value is None or kind is bool or kind is str or kind is float or (kind is int and -_BIG < value < _BIG):
            return value
        if kind in CONTAINERS:
            return self._encode_container(value)
        data = self._encode_data(value, kind)
        if data is not None:
            return data
        if id(value) in self._theirs:
            return ["yours", self._theirs[id(value)][0]]
        if isinstance(value, type):
            data = self._encode_class(value)
        elif isinstance(value, BaseException):
            data = self._encode_exception(value)
        elif _is_enum(kind) and not isinstance(value, StandIn):
            data = ["member", self.encode(kind), self.encode(value.value), value.name]
        elif _is_namedtuple(kind):
            data = ["record", self.encode(kind), [self.encode(item) for item in value]]
        elif kind.__module__ == "numpy":
            data = self._encode_numpy(value)
        return self._encode_object(value) if data is None else data

    def _encode_data(self, value: Any, kind: type) -> Any:
        if kind is int:
            return ["int", hex(value)]
        if kind in (tuple, frozenset):
            return [kind.__name__, [self.encode(item) for item in value]]
        if kind is complex:
            return ["complex", value.real, value.imag]
        if kind is bytes:
            return ["bytes", value.hex()]
        if kind in (range, slice):
            return [kind.__name__, *map(self.encode, (value.start, value.stop, value.step))]
        if kind in _VIEWS:
            return [_VIEWS[kind], [self.encode(item) for item in value]]
        for name, constant in _CONSTANTS.items():
            if value is constant:
                return [name]
        name = f"{kind.__module__}.{kind.__qualname__}"
        if name in _TEXTS:
            return [name, _TEXTS[name][0](value)]
        return None

    def _encode_container(self, value: Any) -> Any:
        number = self._given_numbers.get(id(value))
        if number is not None:
            return ["given", number] if self.gives else ["copy", number, self.content(value)]
        if not self.gives:
            return self.content(value)
        number = self._give(value)
        return ["given", number, self.content(value)]

    def _give(self, value: Any) -> int:
        self.given.append(value)
        return self._given_numbers.setdefault(id(value), len(self.given) - 1)

    def content(self, value: Any) -> list:
        """A container's class, items and other data."""
        kind = type(value)
        if kind is bytearray:
            return ["bytearray", value.hex()]
        if kind.__module__ == "numpy":
            return ["array", value.dtype.str, list(value.shape), value.tobytes().hex()]
        if isinstance(value, dict):
            items = [[self.encode(key), self.encode(item)] for key, item in value.items()]
            more = [self.encode(value.default_factory)] if isinstance(value, collections.defaultdict) else []
        else:
            items = [self.encode(item) for item in value]
            more = [value.maxlen] if kind is collections.deque else []
        return [kind.__name__, items, *more]

    def _encode_class(self, kind: type) -> Any:
        if getattr(builtins, kind.__name__, None) is kind:
            return ["builtin", kind.__name__]
        if issubclass(kind, BaseException):
            bases = [self.encode(base) for base in kind.__bases__ if issubclass(base, BaseException)]
            number = None if _is_standard(kind) else self._keep(kind)
            return ["exception class", number, kind.__module__, kind.__qualname__, bases]
        made: Any = kind  # its own attributes belong to an enum or a namedtuple
        if _is_enum(kind):
            flavour = next(base for base in kind.__mro__ if base.__module__ == "enum")
            members = [[name, self.encode(member.value)] for name, member in made.__members__.items()]
            mixin = next((base.__name__ for base in kind.__mro__ if base in _BASES), None)
            return ["enum", self._keep(kind), kind.__name__, flavour.__name__, mixin, members]
        if _is_namedtuple(kind):
            defaults = {name: self.encode(value) for name, value in made._field_defaults.items()}
            return ["namedtuple", self._keep(kind), kind.__name__, made._fields, list(defaults.values())]
        return None

    def _encode_exception(self, error: BaseException) -> list:
        try:
            text = str(error)[:4096]
        except BaseException:
            text = ""
        state = tuple((name, value) for name, value in vars(error).items() if name != "_text")
        # An OSError keeps its file's name outside `args`.
        arguments = error.__reduce__()[1] if type(error).__reduce__ is OSError.__reduce__ else error.args
        about = [arguments, state, error.__cause__]
        return ["exception", self.encode(type(error)), *map(self.encode, about), text]

    def _encode_numpy(self, value: Any) -> Any:
        if getattr(value, "shape", None) == ():
            return self.encode(value.item())
        if type(value).__name__ == "ndarray" and _DTYPE.fullmatch(value.dtype.str):
            return self._encode_container(value)
        return None

    def _encode_object(self, value: Any) -> list:
        kind: type = type(value)
        if kind is types.TracebackType:  # the last argument of __exit__
            return ["no traceback"]
        if not self.may_share(value):
            raise Unsupported(f"a {kind.__name__} cannot cross")
        number = self._keep(value)
        if isinstance(value, Iterator) and kind.__module__ in ("builtins", "itertools"):
            return ["stream", number, kind.__name__ == "generator"]
        if kind.__name__ == "coroutine":
            return ["coroutine", number]
        base = next((base for base in kind.__mro__ if base in _BASES), None)
        if base is not None:
            plain = base(value) if base is not str else str.__str__(value)
            return ["sub", number, kind.__name__, _operations(kind, base), self.encode(plain)]
        fields = getattr(value if isinstance(value, type) else kind, "__dataclass_fields__", ())
        return ["mine", number, kind.__name__, _operations(kind), list(fields)]

    def _keep(self, value: Any) -> int:
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self._objects)
            self._objects.append(value)
        return self._numbers[id(value)]

    def decode(self, data: Any) -> Any:
        """The value of `encode`'s JSON. Raises ValueError, TypeError or the like for other data."""
        if data is None or isinstance(data, bool | int | float | str):
            return data
        name, *parts = data
        if name in _KINDS:
            return self.fill(_KINDS[name](), *parts)
        if name in _TEXTS:
            module, _, attribute = name.rpartition(".")
            return _TEXTS[name][1](getattr(importlib.import_module(module), attribute), str(parts[0]))
        if name in _CONSTANTS:
            return _CONSTANTS[name]
        return getattr(self, "_decode_" + _DECODED[name])(*parts)

    def fill(self, container: Any, items: Any, *more: Any) -> Any:
        """Put the items that `content` wrote into an empty container. Returns it; for a bounded deque, a new one."""
        if isinstance(container, bytearray):
            container[:] = bytes.fromhex(items)
        elif isinstance(container, dict):
            if isinstance(container, collections.defaultdict):
                container.default_factory = self.decode(more[0])
            for key, item in items:
                container[self.decode(key)] = self.decode(item)
        elif isinstance(container, set):
            container.update(map(self.decode, items))
        else:
            if more and more[0] is not None and container.maxlen is None:
                container = collections.deque(maxlen=more[0])
            container.extend(map(self.decode, items))
        return container

    def _decode_given(self, number: int, content: Any = None) -> Any:
        if content is None:
            return self.given[number]
        name, *parts = content
        if name == "array":
            container = self.decode(content)
            self._give(container)
            return container
        container = collections.deque(maxlen=parts[1]) if name == "deque" else _KINDS[name]()
        self._give(container)  # before its items, which may hold it
        return self.fill(container, *parts)

    def _decode_copy(self, number: int, content: Any) -> Any:
        return self.decode(content)

    def _decode_sequence(self, items: Any) -> tuple:
        return tuple(map(self.decode, items))

    def _decode_frozenset(self, items: Any) -> frozenset:
        return frozenset(map(self.decode, items))

    def _decode_int(self, text: str) -> int:
        return int(text, 16)

    def _decode_complex(self, real: float, imaginary: float) -> complex:
        return complex(float(real), float(imaginary))

    def _decode_bytes(self, text: str) -> bytes:
        return bytes.fromhex(text)

    def _decode_range(self, *parts: Any) -> range:
        return range(*map(self.decode, parts))

    def _decode_slice(self, *parts: Any) -> slice:
        return slice(*map(self.decode, parts))

    def _decode_keys(self, items: Any) -> Any:
        return dict.fromkeys(map(self.decode, items)).keys()

    def _decode_values(self, items: Any) -> Any:
        return dict(enumerate(map(self.decode, items))).values()

    def _decode_items(self, items: Any) -> Any:
        return dict(map(self.decode, items)).items()

    def _decode_builtin(self, name: str) -> type:
        kind = getattr(builtins, str(name))
        if not isinstance(kind, type):
            raise ValueError(f"{name} is no class")
        return kind

    def _decode_array(self, dtype: str, shape: list, text: str) -> Any:
        if not _DTYPE.fullmatch(dtype):
            raise ValueError(f"no array of {dtype}")
        numpy = importlib.import_module("numpy")
        return numpy.frombuffer(bytes.fromhex(text), dtype).reshape([int(size) for size in shape]).copy()

    # objects and classes of the other side

    def _decode_yours(self, number: int) -> Any:
        return self._objects[number]

    def _stand_in(self, number: int, make: Callable[[], Any]) -> Any:
        if type(number) is not int:
            raise ValueError("not the number of an object")
        if number not in self._stand_ins:
            stand_in = self._stand_ins[number] = make()
            self._theirs[id(stand_in)] = number, stand_in
        return self._stand_ins[number]

    def _decode_mine(self, number: int, name: str, operations: list, fields: list) -> StandIn:
        def make() -> StandIn:
            kind: Any = self._class_of(str(name), (StandIn,), operations, *map(str, fields))
            stand_in: StandIn = object.__new__(kind)
            object.__setattr__(stand_in, "_peer", self)
            object.__setattr__(stand_in, "_number", number)
            if "__new__" not in vars(kind):  # type(x)(...) makes another object
                kind.__new__ = lambda _, *given, **named: self.ask("attribute", stand_in, "__class__")(*given, **named)
            return stand_in

        return self._stand_in(number, make)

    def _decode_stream(self, number: int, generates: bool) -> Iterator:
        def make() -> Iterator:
            stream = Stream(self, number)
            self._theirs[id(stream)] = number, stream
            return _generate(stream) if generates else stream

        return self._stand_in(number, make)

    def _decode_coroutine(self, number: int) -> Any:
        async def wait() -> Any:
            return self.ask("await", coroutine)

        coroutine = self._stand_in(number, wait)
        return coroutine

    def _decode_sub(self, number: int, name: str, operations: list, plain: Any) -> Any:
        """An instance of a subclass of a built-in class: its data here, its operations and attributes there."""
        value = self.decode(plain)
        if type(value) not in _BASES:
            raise ValueError("no value of a built-in class")
        make = self._class_of(str(name), (type(value),), operations)
        return self._stand_in(number, lambda: make(value))

    def _class_of(self, name: str, bases: tuple[type, ...], operations: list, *fields: str) -> type:
        key = name, bases, fields, *operations
        if key not in self._classes:
            space: dict[str, Any] = {each: self.operation(each) for each in operations if each in _OPERATIONS}
            if bases == (StandIn,):
                space |= {"__slots__": (), "__doc__": property(_documentation)}
                if "__call__" in space:
                    space["__call__"] = _called
                if "__eq__" in space:
                    space.setdefault("__hash__", None)
                if fields:
                    made: Any = importlib.import_module("dataclasses").make_dataclass("fields", fields)
                    space["__dataclass_fields__"] = made.__dataclass_fields__
            else:
                space.setdefault("__hash__", bases[0].__hash__)
                space["__getattr__"] = self._getter()
            self._classes[key] = type(name, bases, space)
        return self._classes[key]

    def _getter(self) -> Callable:
        """The method of a rebuilt value for the attributes that its class adds to the data."""

        def get(value: Any, name: str) -> Any:
            if name.startswith("_"):  # Python itself asks for these names
                raise AttributeError(name)
            return self.ask("attribute", value, name)

        return get

    def _decode_exception_class(self, number: int | None, module: str, name: str, bases: list) -> type:
        parents = tuple(map(self.decode, bases)) or (Exception,)
        if not all(issubclass(parent, BaseException) for parent in parents):
            raise ValueError(f"{name} is no exception")
        if number is None:  # of the standard library: its own class where this side has imported it
            kind = vars(sys.modules.get(module, builtins)).get(name)
            skips = str(module).startswith("unittest")  # its SkipTest would be a success
            if isinstance(kind, type) and issubclass(kind, BaseException) and _is_standard(kind) and not skips:
                return kind
            return self._classes.setdefault((module, name), _subclass(name, parents, {}))

        def make() -> type:
            def new(kind: type, *arguments: Any, **keywords: Any) -> Any:  # its own __init__ and __str__ are there
                return self.ask("call", kind, arguments, tuple(keywords.items()))

            return _subclass(name, parents, {"__new__": new, "__init__": lambda *_, **__: None})

        return self._stand_in(number, make)

    def _decode_exception(self, kind: Any, arguments: Any, state: Any, cause: Any, text: str) -> BaseException:
        kind, arguments, state, cause = map(self.decode, (kind, arguments, state, cause))
        state = dict(state)
        if type(arguments) is not tuple or not isinstance(cause, BaseException | None):
            raise ValueError("no exception")
        error = _exception(_as(BaseException, kind), arguments)
        error.__dict__.update(state)
        if str(error) != text:  # its class has a text of its own
            error = _exception(self._speaking(kind), arguments)
            error.__dict__.update(state, _text=text)
        error.__cause__ = cause
        return error

    def _speaking(self, kind: type) -> type:
        """The class of exceptions that keep the text they arrived with."""
        key = "speaking", kind
        if key not in self._classes:
            space = {"__str__": lambda error: error.__dict__["_text"], "__module__": kind.__module__}
            self._classes[key] = _subclass(kind.__name__, (kind,), space)
        return self._classes[key]

    def _decode_enum(self, number: int, name: str, flavour: str, mixin: str | None, members: list) -> type:
        def make() -> type:
            enum = importlib.import_module("enum")
            parent = getattr(enum, flavour)
            if not (isinstance(parent, type) and issubclass(parent, enum.Enum)):
                raise ValueError(f"{flavour} is no kind of enum")
            values = [(label, self.decode(value)) for label, value in members]
            if any(not label.isidentifier() or label.startswith("_") or label == "mro" for label, _ in values):
                raise ValueError("not the name of a member")
            plain = next((base for base in _BASES if base.__name__ == mixin), None)
            more = {"type": plain} if plain and parent in (enum.Enum, enum.Flag) else {}
            kind = parent(str(name), values, **more)
            kind.__getattr__ = self._getter()
            return kind

        return self._stand_in(number, make)

    def _decode_member(self, kind: Any, value: Any, name: str | None) -> Any:
        kind = _as(importlib.import_module("enum").Enum, self.decode(kind))
        return kind[name] if name in kind.__members__ else kind(self.decode(value))

    def _decode_namedtuple(self, number: int, name: str, fields: list, defaults: list) -> type:
        def make() -> type:
            if not all(field.isidentifier() and not keyword.iskeyword(field) for field in (name, *fields)):
                raise ValueError("not the name of a field")
            record = collections.namedtuple(name, fields, defaults=list(map(self.decode, defaults)))  # type: ignore[misc]
            return type(name, (record,), {"__slots__": (), "__getattr__": self._getter()})

        return self._stand_in(number, make)

    def _decode_record(self, kind: Any, items: list) -> Any:
        return _as(tuple, self.decode(kind))._make(map(self.decode, items))


_REPLIES = ("value", "error", "unsupported")
_DECODED = {name: name.replace(" ", "_") for name in (
    "given", "copy", "lent", "frozenset", "int", "complex", "bytes", "range", "slice", "keys", "values", "items",
    "builtin", "array", "yours", "mine", "stream", "coroutine", "sub", "exception class", "exception", "enum", "member",
    "namedtuple", "record",
)} | {"tuple": "sequence"}  # fmt: skip


def overwrite(container: Any, now: Any) -> None:
    """Give a container the content of another one of its class."""
    if isinstance(container, list | bytearray):
        container[:] = now
    elif isinstance(container, dict | set):
        container.clear()
        container.update(now)
    elif isinstance(container, collections.deque):
        container.clear()
        container.extend(now)
    else:  # an array
        container[...] = now


def _is_enum(kind: type) -> bool:
    enum = sys.modules.get("enum")
    return enum is not None and issubclass(kind, enum.Enum) and _written_by(kind, ("enum",))


def _is_namedtuple(kind: type) -> bool:
    return issubclass(kind, tuple) and hasattr(kind, "_field_defaults") and _written_by(kind, ("collections",))


def _as(base: type, kind: Any) -> Any:
    if not (isinstance(kind, type) and issubclass(kind, base)):
        raise ValueError(f"no class below {base.__name__}")
    return kind


def _exception(kind: type, arguments: tuple) -> BaseException:
    """An exception made without its class's own __init__, which may need other arguments than `args`."""
    base: Any = next(base for base in kind.__mro__ if base.__module__ == "builtins")
    try:
        error = base.__new__(kind, *arguments)
        base.__init__(error, *arguments)
    except TypeError:
        error = BaseException.__new__(kind)
        error.args = arguments
    return error


def _subclass(name: str, parents: tuple[type, ...], space: dict) -> type:
    try:
        return type(name, parents, space)
    except TypeError:  # the layouts of the bases conflict
        return type(name, parents[:1], space)


def _attribute(target: Any, name: str) -> Any:
    if name in _READ_BY_PYTHON:
        raise Unsupported(f"{name} of a {type(target).__name__}")
    return getattr(target, name)


def _apply(target: Any, name: str, *arguments: Any) -> Any:
    if name not in _OPERATIONS:
        raise AttributeError(name)
    return getattr(type(target), name)(target, *arguments)


def _some(iterator: Any, count: int) -> tuple[list, list | None]:
    """Up to `count` items, and the iterator's state: [] at its end, [an exception], None if it continues."""
    items: list[Any] = []
    try:
        while len(items) < count:
            items.append(next(iterator))
    except StopIteration:
        return items, []
    except Exception as error:
        return items, [error]
    return items, None
