"""How the states of an optimizer step are grouped into micro-batches. Neither loss nor gradients depend on it.

A state's length is what the forward pays for: the tokens of its training layout, clean and noisy copy together.
"""

from collections.abc import Sequence

from t3d.states.base import State

Rows = list[list[State]]  # a micro-batch: each row is a list of states laid one after another


def micro_batches(states: Sequence[State], *, size: int, budget: int | None = None, packed: bool = False) -> list[Rows]:
    """States of like length together, the longest first, so that memory runs out at once or never.

    Args:
        size: states of a micro-batch where there is no budget.
        budget: most tokens of a micro-batch, padding included. A state longer than that goes alone.
        packed: lay the states of a micro-batch end to end in one row (FlexAttention skips what a row's states do not
            see of each other) in place of one a row (where the mask is dense, a long row costs its square).
    """
    ordered = sorted(states, key=len, reverse=True)
    if budget is None:
        return [[[state] for state in ordered[i : i + size]] for i in range(0, len(ordered), size)]
    if packed:
        return [[row] for row in _fill(ordered, budget)]
    batches: list[Rows] = []
    for state in ordered:
        if batches and (len(batches[-1]) + 1) * len(batches[-1][0][0]) <= budget:
            batches[-1].append([state])
        else:
            batches.append([[state]])
    return batches


def _fill(ordered: Sequence[State], budget: int) -> list[list[State]]:
    """First fit, the longest first: each state goes into the first row that has room for it."""
    rows: list[list[State]] = []
    room: list[int] = []
    for state in ordered:
        length = len(state)
        fitting = next((i for i, free in enumerate(room) if length <= free), None)
        if fitting is None:
            rows.append([state])
            room.append(budget - length)
        else:
            rows[fitting].append(state)
            room[fitting] -= length
    return rows
