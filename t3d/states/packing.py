"""How the states of an optimizer step are grouped into micro-batches. Neither loss nor gradients depend on it.

A state's length is its number of tokens in the forward: clean and noisy copy of the training layout together.
"""

from collections.abc import Sequence

from t3d.states.base import State

Rows = list[list[State]]  # a micro-batch: each row is a list of states laid one after another


def micro_batches(states: Sequence[State], *, size: int, budget: int | None = None, packed: bool = False) -> list[Rows]:
    """States of like length together, the longest first, so that memory runs out at once or never.

    Args:
        size: states of a micro-batch without a budget.
        budget: most tokens of a micro-batch, padding included. A longer state forms its own micro-batch.
        packed: lay the states of a micro-batch end to end in one row, instead of one state per row. FlexAttention skips
            pairs of tokens in different states; with a dense mask the cost grows with the square of a row's length.
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
