"""A kind of task from a file outside the package runs through the commands."""

import json
import os
import subprocess
import sys

from t3d.common.paths import ROOT

TOY = '''
from t3d.grading import Verdict
from t3d.tasks import Task


class Toy(Task):
    """Is the text longer than the row asks for?"""

    fields = ("question", "at_least")

    def turn(self, row, think=False):
        return f"{row['question']} Write {row['at_least']} letters."

    def opening(self, row, think=False):
        return "I"

    def extract(self, text, row):
        return text[:3]

    def grade(self, answers, how):
        long = [len(answer.text) >= int(answer.row["at_least"]) for answer in answers]
        return [Verdict(right, answer.text[:3], "long" if right else "short") for right, answer in zip(long, answers)]
'''
ROWS = [{"question": "Tom has 3 apples.", "at_least": number} for number in ("1", "100000")]


def run(folder, script: str, *overrides: str) -> subprocess.CompletedProcess:
    """A command in a folder of its own, where nothing but that folder makes the module known."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, str(ROOT / script), *overrides], cwd=folder, env=environment, capture_output=True, text=True
    )


def test_a_task_of_ones_own(tmp_path, story_teacher):
    from transformers import AutoTokenizer

    (tmp_path / "my_module.py").write_text(TOY)
    data = tmp_path / "Toy.json"
    data.write_text(json.dumps(ROWS))
    common = (
        f"experiment.project={tmp_path / 'project'}",
        f"evaluation.checkpoint_path={story_teacher}",
        f"evaluation.eval_dataset={data}",
        "evaluation.data_type=my_module:Toy",
        "rollout.max_token=8",
    )
    done = run(tmp_path, "sample/sdar_sample.py", *common)
    assert done.returncode == 0, done.stderr
    (output,) = (tmp_path / "project" / "temp_data").glob("*.json")
    rows = json.loads(output.read_text())
    tokenizer = AutoTokenizer.from_pretrained(story_teacher)
    for row, asked in zip(rows, ROWS, strict=True):
        turn = [{"role": "user", "content": f"Tom has 3 apples. Write {asked['at_least']} letters."}]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) + "I"
        assert row["prompt_ids"] == tokenizer(text, add_special_tokens=False)["input_ids"]
        assert row["extracted_output"] == [text[:3] for text in row["full_output"]]

    done = run(tmp_path, "eval.py", *common, f"evaluation.output={tmp_path / 'results.json'}")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "results.json").read_text())
    assert row["verdicts"] == {"long": 1, "short": 1} and row["accuracy"] == 0.5

    done = run(tmp_path, "eval.py", *common, "evaluation.data_type=my_module:Toys")
    assert done.returncode == 2 and done.stderr.startswith("error: evaluation.data_type=my_module:Toys: ")
    assert done.stderr.count("\n") == 1


def test_answers_that_nothing_grades_have_no_accuracy(tmp_path, story_teacher):
    data = tmp_path / "Words.json"
    data.write_text(json.dumps([{"question": "Tom has 3 apples."}] * 2))
    results = tmp_path / "results.json"
    common = (
        f"experiment.project={tmp_path / 'project'}",
        f"evaluation.checkpoint_path={story_teacher}",
        f"evaluation.eval_dataset={data}",
        f"evaluation.output={results}",
        "evaluation.data_type=text",
        "rollout.max_token=8",
    )
    for seeds, count in (("null", 1), ("[1,2]", 2)):
        done = run(tmp_path, "eval.py", *common, f"evaluation.seeds={seeds}")
        assert done.returncode == 0, done.stderr
        rows = json.loads(results.read_text())
        assert [row["verdicts"] for row in rows] == [{"ungraded": 2}] * count
        assert all(not {"accuracy", "ci_low"} & row.keys() and row["mean_length"] > 0 for row in rows)
        assert "ungraded 2" in done.stdout and "Accuracy" not in done.stdout
