"""Rewards that a user might write, for answers of a tiny untrained model."""

from t3d.tasks import Answer


def letters(answer: Answer) -> float:
    """The share of the answer's characters that are vowels."""
    assert answer.row["ground_truth_answer"] and answer.row["question"]
    return sum(answer.text.count(vowel) for vowel in "aeiou") / max(1, len(answer.text))


def begins_with_number(answer: Answer) -> float:
    """1 if the first word is a digit."""
    return float(answer.text.strip()[:1].isdigit())


def constant(answer: Answer) -> float:
    """The same for all."""
    return 0.5


def broken(answer: Answer) -> float:
    """No number."""
    return float("nan")


no_function = 3
