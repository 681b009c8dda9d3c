"""The advantage of an answer over the other answers to its question.

    A_i = z(reward)_i + w [reward_i > 0] z(tokens per forward)_i

z is the distance from the question's mean in its standard deviations; 0 where all values are equal. The second z is
taken over the right answers (reward above 0), so speed never pays for a wrong one.
Sources: z(reward) as in GRPO (arXiv 2402.03300) and TraceRL (arXiv 2509.06949); the speed part as in LightningRL.
"""

import math
from collections.abc import Iterable, Sequence

from t3d.data.trajectory import Trajectory, split_id


def z_scores(values: Sequence[float]) -> list[float]:
    """(values - mean) / standard deviation, over all of them; zeros if they are equal."""
    mean = math.fsum(values) / len(values) if values else 0.0
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values)) if values else 0.0
    if deviation <= 1e-12 * abs(mean):  # equal values, whose mean was rounded
        return [0.0] * len(values)
    return [(value - mean) / deviation for value in values]


def advantages(rewards: Sequence[float], speeds: Sequence[float], speed_weight: float) -> list[float] | None:
    """The advantages of a question's answers; None if they do not vary, so that they teach nothing.

    Args:
        speeds: tokens per forward. speed_weight: w.
    """
    found = z_scores(rewards)
    right = [index for index, reward in enumerate(rewards) if reward > 0]
    if speed_weight:
        for index, z in zip(right, z_scores([speeds[index] for index in right]), strict=True):
            found[index] += speed_weight * z
    return found if any(found) else None


def of_round(answers: Iterable[Trajectory], speed_weight: float) -> dict[str, float | None]:
    """Id -> advantage, for the rewarded answers of a round. None: the answers to its question do not vary."""
    questions: dict[tuple[str, int], list[Trajectory]] = {}
    for answer in answers:
        questions.setdefault(split_id(answer.id)[:2], []).append(answer)
    result: dict[str, float | None] = {}
    for group in questions.values():
        rewards = [answer.reward or 0.0 for answer in group]
        speeds = [answer.length / max(answer.forwards, 1) for answer in group]
        found = advantages(rewards, speeds, speed_weight)
        result |= {answer.id: found[index] if found else None for index, answer in enumerate(group)}
    return result
