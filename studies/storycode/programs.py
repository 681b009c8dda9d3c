"""Programs of a requirement: one of its many equivalent forms, drawn at random, as lines of Python."""

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

from studies.storycode.steps import Condition, Reduction, Step

INLINE, RENAMED, IN_PLACE, DIRECT = 0.2, 0.3, 0.4, 0.5  # how often a program takes a shorter or a longer way


class Chosen(NamedTuple):
    """A step with its constant."""

    piece: Step
    k: int

    def value(self, v: Any) -> Any:
        return self.piece.run(v, self.k)

    def told(self, rng: random.Random, it: str) -> str:
        return rng.choice(self.piece.told).format(it=it, k=self.k)

    def expression(self, rng: random.Random, v: str, plain: bool = False) -> str:
        """One of its forms. An expression in place of a variable is written once. plain: no conditional expression."""
        forms = [form for form in self.piece.forms if not plain or " if " not in form]
        if not v.isidentifier():
            forms, v = [form for form in forms if form.count("{v}") == 1], f"({v})"
        return rng.choice(forms).format(v=v, k=self.k)

    def statement(self, rng: random.Random, v: str, w: str) -> list[str]:
        """Sets `w` to its value of `v`."""
        if v == w and self.piece.changes and rng.random() < IN_PLACE:
            return rng.choice(self.piece.changes).format(v=v, k=self.k).split("\n")
        return [f"{w} = {self.expression(rng, v)}"]

    def end(self, rng: random.Random, v: str) -> list[str]:
        """Returns its value of `v`."""
        return [f"return {self.expression(rng, v)}"]


class Filter(NamedTuple):
    """A condition with its constant."""

    piece: Condition
    k: int

    def holds(self, v: int) -> bool:
        return self.piece.run(v, self.k)

    def told(self, rng: random.Random) -> str:
        return rng.choice(self.piece.told).format(k=self.k)

    def yes(self, rng: random.Random, v: str) -> str:
        return rng.choice(self.piece.yes).format(v=v, k=self.k)

    def no(self, rng: random.Random, v: str) -> str:
        return rng.choice(self.piece.no).format(v=v, k=self.k)


class Branch(NamedTuple):
    """One step where a condition holds, another one where it does not."""

    condition: Filter
    one: Chosen
    other: Chosen

    def value(self, v: int) -> int:
        return (self.one if self.condition.holds(v) else self.other).value(v)

    def told(self, rng: random.Random, it: str) -> str:
        rest = rng.choice(("else", "otherwise"))
        told = self.condition.told(rng), self.one.told(rng, it), self.other.told(rng, it)
        return f"if {it} is {told[0]}, {told[1]}, {rest} {told[2]}"

    def _either_way(self, rng: random.Random, v: str) -> tuple[str, str, str]:
        """The condition, the value where it holds and the value where not; or all three the other way round."""
        one, other = (step.expression(rng, v, plain=True) for step in (self.one, self.other))
        if rng.random() < 0.5:
            return self.condition.yes(rng, v), one, other
        return self.condition.no(rng, v), other, one

    def statement(self, rng: random.Random, v: str, w: str) -> list[str]:
        """Sets `w` to its value of `v`."""
        condition, one, other = self._either_way(rng, v)
        if rng.random() < DIRECT:
            return [f"{w} = {one} if {condition} else {other}"]
        return [f"if {condition}:", f"    {w} = {one}", "else:", f"    {w} = {other}"]

    def end(self, rng: random.Random, v: str) -> list[str]:
        """Returns its value of `v`."""
        condition, one, other = self._either_way(rng, v)
        if rng.random() < DIRECT:
            return [f"return {one} if {condition} else {other}"]
        return [f"if {condition}:", f"    return {one}", f"return {other}"]


def pipeline(rng: random.Random, steps: Sequence[Chosen | Branch], v: str, w: str, last: str = "") -> list[str]:
    """Lines that take the variable `v` through the steps and return it; `w` is free for values on the way.

    last: a function of the result, such as len.
    """
    lines: list[str] = []
    for step, following in zip(steps[:-1], steps[1:], strict=True):
        if isinstance(step, Chosen) and isinstance(following, Chosen) and rng.random() < INLINE:
            v = step.expression(rng, v)
            continue
        target = w if not v.isidentifier() or rng.random() < RENAMED else v
        lines += step.statement(rng, v, target)
        v = target
    if not last and rng.random() < DIRECT:
        return lines + steps[-1].end(rng, v)
    target = v if v.isidentifier() else w
    return [*lines, *steps[-1].statement(rng, v, target), f"return {last}({target})" if last else f"return {target}"]


def reduced(
    rng: random.Random, keep: Filter | None, steps: Sequence[Chosen], end: Reduction, names: Sequence[str]
) -> list[str]:
    """Lines that keep some numbers of a list, change each, and reduce the rest. names: the list, an item, a result."""
    xs, x, r = names
    if rng.random() < DIRECT:
        return _loop(rng, keep, steps, end, xs, x, r)
    e = x
    for step in steps:
        e = step.expression(rng, e)
    g = f"{e} for {x} in {xs}" + (f" if {keep.yes(rng, x)}" if keep else "")
    if rng.random() < DIRECT:
        return [f"return {rng.choice(end.whole).format(g=g)}"]
    return [f"{r} = [{g}]", f"return {rng.choice(end.named).format(r=r)}"]


def _loop(
    rng: random.Random, keep: Filter | None, steps: Sequence[Chosen], end: Reduction, xs: str, x: str, r: str
) -> list[str]:
    body = [line for step in steps[:-1] for line in step.statement(rng, x, x)]
    e = steps[-1].expression(rng, x, plain=True) if steps else x
    body.append(rng.choice(end.grow).format(r=r, e=e))
    if keep and rng.random() < DIRECT:
        body = [f"if {keep.yes(rng, x)}:", *_deeper(body)]
    elif keep:
        body = [f"if {keep.no(rng, x)}:", "    continue", *body]
    return [f"{r} = {end.first}", f"for {x} in {xs}:", *_deeper(body), f"return {rng.choice(end.done).format(r=r)}"]


def _deeper(lines: Sequence[str]) -> list[str]:
    return [f"    {line}" for line in lines]


def function(names: Sequence[str], body: Sequence[str]) -> str:
    """The function f."""
    return "\n".join([f"def f({', '.join(names)}):", *_deeper(body)])
