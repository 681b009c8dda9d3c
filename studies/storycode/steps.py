"""The pieces of StoryCode's requirements: what a piece does, its wordings, and its forms in Python.

All forms of a piece have the same value. `{v}` is the variable, `{k}` the constant of the requirement, `{it}` the word
for the value in the question.
"""

from collections.abc import Callable
from typing import Any, NamedTuple


class Step(NamedTuple):
    """A piece that makes a value from a value.

    run: (value, constant) -> value. told: wordings. forms: expressions. changes: statements that change the variable.
    """

    run: Callable[[Any, Any], Any]
    told: tuple[str, ...]
    forms: tuple[str, ...]
    changes: tuple[str, ...] = ()


class Condition(NamedTuple):
    """A property of a number. told: wordings after "is". yes, no: expressions that are true where it holds, or not."""

    run: Callable[[int, int], bool]
    told: tuple[str, ...]
    yes: tuple[str, ...]
    no: tuple[str, ...]


class Start(NamedTuple):
    """A piece that makes a number from two, {a} and {b}."""

    run: Callable[[int, int], int]
    told: tuple[str, ...]
    forms: tuple[str, ...]


class Reduction(NamedTuple):
    """The end of a list function.

    told: the sentence that asks for it. whole: expressions of the generator {g}. named: expressions of the list {r}.
    first: the start of the accumulator {r} of a loop. grow: statements that add {e} to it. done: what the loop returns.
    """

    run: Callable[[list[int]], Any]
    told: tuple[str, ...]
    whole: tuple[str, ...]
    named: tuple[str, ...]
    first: str
    grow: tuple[str, ...]
    done: tuple[str, ...] = ("{r}",)


NUMBERS = (
    Step(
        lambda v, k: v + k,
        ("add {k} to {it}", "increase {it} by {k}", "make {it} {k} larger"),
        ("{v} + {k}", "{k} + {v}"),
        ("{v} += {k}",),
    ),
    Step(
        lambda v, k: v - k,
        ("subtract {k} from {it}", "lower {it} by {k}", "make {it} {k} smaller"),
        ("{v} - {k}", "-{k} + {v}"),
        ("{v} -= {k}",),
    ),
    Step(
        lambda v, k: v * k,
        ("multiply {it} by {k}", "scale {it} by a factor of {k}"),
        ("{v} * {k}", "{k} * {v}"),
        ("{v} *= {k}",),
    ),
    Step(
        lambda v, k: v * 2,
        ("double {it}", "add {it} to itself"),
        ("{v} * 2", "2 * {v}", "{v} + {v}"),
        ("{v} *= 2", "{v} += {v}"),
    ),
    Step(
        lambda v, k: v * v,
        ("square {it}", "multiply {it} by itself"),
        ("{v} * {v}", "{v} ** 2", "pow({v}, 2)"),
        ("{v} *= {v}", "{v} **= 2"),
    ),
    Step(
        lambda v, k: v // k,
        ("divide {it} by {k} and round down", "floor divide {it} by {k}"),
        ("{v} // {k}", "divmod({v}, {k})[0]"),
        ("{v} //= {k}",),
    ),
    Step(
        lambda v, k: v % k,
        ("reduce {it} modulo {k}", "take the remainder of {it} by {k}"),
        ("{v} % {k}", "divmod({v}, {k})[1]"),
        ("{v} %= {k}",),
    ),
    Step(
        lambda v, k: -v,
        ("negate {it}", "change the sign of {it}"),
        ("-{v}", "0 - {v}", "{v} * -1"),
        ("{v} *= -1",),
    ),
    Step(
        lambda v, k: abs(v),
        ("take the absolute value of {it}", "drop the sign of {it}"),
        ("abs({v})", "max({v}, -{v})", "max(-{v}, {v})", "{v} if {v} > 0 else -{v}"),
        ("if {v} < 0:\n    {v} = -{v}",),
    ),
    Step(
        lambda v, k: min(v, k),
        ("cap {it} at {k}", "make {it} at most {k}"),
        ("min({v}, {k})", "min({k}, {v})", "{v} if {v} < {k} else {k}", "{k} if {v} > {k} else {v}"),
        ("if {v} > {k}:\n    {v} = {k}",),
    ),
    Step(
        lambda v, k: max(v, k),
        ("make {it} at least {k}", "raise {it} to no less than {k}"),
        ("max({v}, {k})", "max({k}, {v})", "{v} if {v} > {k} else {k}", "{k} if {v} < {k} else {v}"),
        ("if {v} < {k}:\n    {v} = {k}",),
    ),
)

TEXTS = (
    Step(lambda v, k: v[::-1], ("reverse {it}", "turn {it} around"), ("{v}[::-1]", '"".join(reversed({v}))')),
    Step(lambda v, k: v.upper(), ("write {it} in capitals", "make {it} upper case"), ("{v}.upper()", "str.upper({v})")),
    Step(
        lambda v, k: v.lower(),
        ("write {it} in small letters", "make {it} lower case"),
        ("{v}.lower()", "str.lower({v})"),
    ),
    Step(
        lambda v, k: v * k,
        ("repeat {it} {k} times", "write {it} {k} times"),
        ("{v} * {k}", "{k} * {v}"),
        ("{v} *= {k}",),
    ),
    Step(
        lambda v, k: v[:k],
        ("keep the first {k} letters of {it}", "cut {it} after {k} letters"),
        ("{v}[:{k}]", "{v}[0:{k}]"),
    ),
    Step(
        lambda v, k: v[k:],
        ("drop the first {k} letters of {it}", "skip {k} letters of {it}"),
        ("{v}[{k}:]", "{v}[{k}::1]"),
    ),
    Step(lambda v, k: v[-k:], ("keep the last {k} letters of {it}",), ("{v}[-{k}:]", "{v}[::-1][:{k}][::-1]")),
    Step(lambda v, k: v[:-k], ("drop the last {k} letters of {it}",), ("{v}[:-{k}]", "{v}[0:-{k}]")),
    Step(
        lambda v, k: v + v,
        ("write {it} twice", "join {it} to itself"),
        ("{v} + {v}", "{v} * 2", "2 * {v}"),
        ("{v} += {v}", "{v} *= 2"),
    ),
)

CONDITIONS = (
    Condition(
        lambda v, k: v % 2 == 0,
        ("even",),
        ("{v} % 2 == 0", "not {v} % 2", "{v} % 2 < 1"),
        ("{v} % 2 == 1", "{v} % 2", "{v} % 2 > 0"),
    ),
    Condition(
        lambda v, k: v % 2 == 1,
        ("odd",),
        ("{v} % 2 == 1", "{v} % 2", "{v} % 2 > 0"),
        ("{v} % 2 == 0", "not {v} % 2", "{v} % 2 < 1"),
    ),
    Condition(lambda v, k: v > 0, ("positive", "above 0"), ("{v} > 0", "0 < {v}"), ("{v} <= 0", "0 >= {v}")),
    Condition(lambda v, k: v < 0, ("negative", "below 0"), ("{v} < 0", "0 > {v}"), ("{v} >= 0", "0 <= {v}")),
    Condition(
        lambda v, k: v > k, ("above {k}", "larger than {k}"), ("{v} > {k}", "{k} < {v}"), ("{v} <= {k}", "{k} >= {v}")
    ),
    Condition(
        lambda v, k: v < k, ("below {k}", "smaller than {k}"), ("{v} < {k}", "{k} > {v}"), ("{v} >= {k}", "{k} <= {v}")
    ),
    Condition(
        lambda v, k: v % k == 0,
        ("divisible by {k}", "evenly divisible by {k}"),
        ("{v} % {k} == 0", "not {v} % {k}"),
        ("{v} % {k} > 0", "{v} % {k} != 0"),
    ),
)

STARTS = (
    Start(
        lambda a, b: a + b, ("add the two", "take the sum of the two"), ("{a} + {b}", "{b} + {a}", "sum([{a}, {b}])")
    ),
    Start(lambda a, b: a * b, ("multiply the two", "take the product of the two"), ("{a} * {b}", "{b} * {a}")),
    Start(
        lambda a, b: a - b,
        ("subtract the second from the first", "take the first less the second"),
        ("{a} - {b}", "-{b} + {a}"),
    ),
    Start(
        lambda a, b: b - a,
        ("subtract the first from the second", "take the second less the first"),
        ("{b} - {a}", "-{a} + {b}"),
    ),
    Start(
        lambda a, b: max(a, b),
        ("take the larger of the two",),
        ("max({a}, {b})", "max({b}, {a})", "{a} if {a} > {b} else {b}", "{b} if {a} < {b} else {a}"),
    ),
    Start(
        lambda a, b: min(a, b),
        ("take the smaller of the two",),
        ("min({a}, {b})", "min({b}, {a})", "{a} if {a} < {b} else {b}", "{b} if {a} > {b} else {a}"),
    ),
)

REDUCTIONS = (
    Reduction(
        sum,
        ("Return their sum.", "Return the total."),
        ("sum({g})", "sum([{g}])"),
        ("sum({r})",),
        "0",
        ("{r} += {e}", "{r} = {r} + {e}", "{r} = {e} + {r}"),
    ),
    Reduction(
        list,
        ("Return the list.", "Return them in a list."),
        ("[{g}]", "list({g})"),
        ("{r}", "list({r})"),
        "[]",
        ("{r}.append({e})", "{r} += [{e}]"),
    ),
    Reduction(
        lambda r: r[::-1],
        ("Return them in reverse order.", "Return the list backwards."),
        ("[{g}][::-1]", "list(reversed([{g}]))"),
        ("{r}[::-1]", "list(reversed({r}))"),
        "[]",
        ("{r} = [{e}] + {r}", "{r}.insert(0, {e})"),
    ),
    Reduction(
        sorted,
        ("Return them in rising order.", "Return the sorted list."),
        ("sorted({g})", "sorted([{g}])"),
        ("sorted({r})",),
        "[]",
        ("{r}.append({e})", "{r} += [{e}]"),
        ("sorted({r})",),
    ),
)

COUNT = Reduction(
    len,
    ("Return how many there are.", "Return their number."),
    ("len([{g}])",),
    ("len({r})",),
    "0",
    ("{r} += 1", "{r} = {r} + 1"),
)
