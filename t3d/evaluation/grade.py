"""Grade answers from a file.

    t3d grade --data_type math|code|option --problems P.json --answers A.jsonl --out O.jsonl

Answers are lines {"index": i, "text": "..."}: i counts the problems from 0, and several lines may answer one problem.
Results are lines {"index", "correct", "verdict", "seconds"} in the same order. It needs neither a model nor torch. Exit
code 0: every answer has a verdict. 1: some have none, because there is no sandbox. 2: the input has a mistake.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from t3d.common.errors import UserError, run_main
from t3d.common.jsonfiles import atomic_write
from t3d.evaluation.statistics import wilson_interval
from t3d.grading import Verdict, code
from t3d.tasks import HELP, Answer, Grading, find_task
from t3d.tasks.problems import load_problems


def main(argv: Sequence[str] | None = None) -> int:
    """Grade answers; returns the exit code. ``argv``: None = the process's own arguments."""
    arguments = _parse(argv)
    task = find_task(arguments.data_type, "--data_type")
    how = Grading(
        workers=arguments.workers,
        time_limit=arguments.time_limit,
        allow_unsandboxed=arguments.allow_unsandboxed,
        extraction=arguments.extraction,
    )
    problems = load_problems(arguments.problems, arguments.data_type)
    answers = read_answers(arguments.answers, len(problems))
    isolation = task.isolation(how)
    check_writable(arguments.out)
    start = time.monotonic()
    verdicts = task.grade([Answer(text, problems[index].raw) for index, text in answers], how)
    with atomic_write(arguments.out) as file:
        for (index, _), verdict in zip(answers, verdicts, strict=True):
            line = {"index": index, "correct": verdict.correct, "verdict": verdict.reason}
            file.write(json.dumps(line | {"seconds": round(verdict.grading_seconds, 3)}) + "\n")
    print(summary(answers, verdicts))
    by = f"programs run in {isolation}; " if isolation else ""
    print(f"{by}{time.monotonic() - start:.1f} s; {arguments.out}")
    return int(any(verdict.reason == "sandbox" for verdict in verdicts))


def read_answers(path: Path, problems: int) -> list[tuple[int, str]]:
    """(index, text) of every line. Raises UserError, with the number of the line and the field at fault."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--answers {path}: cannot be read ({error}); give a file of JSON lines", "--answers"
        ) from error
    answers = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f'{where}: no JSON ({error}); write {{"index": 0, "text": "..."}}', "--answers") from error
        if not isinstance(row, dict):
            raise UserError(
                f'{where}: expected an object, found {line[:40]!r}; write {{"index": 0, "text": "..."}}', "--answers"
            )
        index, text = row.get("index"), row.get("text")
        if type(index) is not int or not 0 <= index < problems:
            raise UserError(
                f"{where}: field 'index' is {index!r}; it must be a problem's number, 0 to {problems - 1}", "index"
            )
        if not isinstance(text, str):
            raise UserError(f"{where}: field 'text' must be text, found {text!r}; put the answer there", "text")
        answers.append((index, text))
    return answers


def check_writable(path: Path) -> None:
    """Raises UserError if a file cannot be written, before the work begins."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
    except OSError as error:
        raise UserError(f"--out {path}: cannot be written ({error}); choose another file", "--out") from error


def summary(answers: list[tuple[int, str]], verdicts: list[Verdict]) -> str:
    """Accuracy over the answers with its 95 % Wilson interval, problems with a right answer, and the verdicts."""
    if not verdicts:
        return "0 answers"
    reasons = Counter(verdict.reason for verdict in verdicts).most_common()
    listed = "verdicts: " + ", ".join(f"{reason} {number}" for reason, number in reasons)
    if any(verdict.correct is None for verdict in verdicts):
        return listed
    count, correct = len(verdicts), sum(bool(verdict.correct) for verdict in verdicts)
    low, high = wilson_interval(correct, count)
    solved = {index for (index, _), verdict in zip(answers, verdicts, strict=True) if verdict.correct}
    return (
        f"{correct} of {count} answers are correct: {correct / count:.1%} (95 % interval {low:.1%} to {high:.1%})\n"
        f"{len(solved)} of {len({index for index, _ in answers})} problems have a correct answer\n"
        f"{listed}"
    )


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="t3d grade", description="Grade answers from a file.")
    parser.add_argument("--data_type", "--data-type", required=True, help=HELP)
    parser.add_argument("--problems", required=True, help="data set: a file of rows, or a name in data/")
    parser.add_argument("--answers", required=True, type=Path, help='lines {"index": i, "text": "..."}')
    parser.add_argument("--out", required=True, type=Path, help='lines {"index", "correct", "verdict", "seconds"}')
    parser.add_argument("--workers", type=_positive(int), help="answers graded side by side (default: one per core)")
    parser.add_argument(
        "--time-limit", type=_positive(float), help="CPU seconds for an answer (math: 10; code: the row's)"
    )
    parser.add_argument(
        "--allow-unsandboxed", action="store_true", help="run programs although files and network are open to them"
    )
    parser.add_argument(
        "--extraction", choices=code.EXTRACTIONS, help="code: the rule that chooses the answer's program"
    )
    return parser.parse_args(argv)


def _positive(kind: type):
    def read(text: str):
        value = kind(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return value

    return read


if __name__ == "__main__":
    run_main(main)
