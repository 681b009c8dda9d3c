"""data/download_data.py and data/rename_key.py as commands, from two working directories."""

import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from t3d.data.release import read_release_json, write_release_json
from t3d.data.shards import ShardWriter
from t3d.data.trajectory import Trajectory

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
QUESTIONS = [{"question": f"question {i}", "ground_truth_answer": str(i), "level": i} for i in range(3)]


@pytest.fixture
def copy(tmp_path) -> Path:
    """The scripts and the package in a folder of their own, so that no test writes into the repository's data/."""
    root = tmp_path / "repo"
    shutil.copytree(ROOT / "t3d", root / "t3d", ignore=shutil.ignore_patterns("__pycache__", "embedded"))
    (root / "data").mkdir()
    for name in ("download_data.py", "rename_key.py"):
        shutil.copy(ROOT / "data" / name, root / "data")
    return root


def run(root: Path, folder: str, script: str, *arguments: str, code: int = 0, **env: str) -> str:
    """Run data/<script> from <root>/<folder>; the output, or the one line on stderr when it should fail."""
    command = [sys.executable, str(Path("data" if folder == "." else ".") / script), *arguments]
    environ = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | env
    done = subprocess.run(command, cwd=root / folder, env=environ, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done.stderr if code else done.stdout


def record(row: int, sample: int = 0) -> Trajectory:
    return Trajectory(
        id=f"MATH_train/{row}/{sample}",
        prompt_ids=[5, 6],
        response_ids=[7, 8, 9, 2, 2, 2],
        unmask_step=[1, 2, 3, 3, 4, 4],
        length=4,
        block_size=4,
        finish_reason="stop",
        question=f"question {row}",
        ground_truth=str(row),
        text="some text",
    )


@pytest.mark.parametrize("folder", [".", "data"])
def test_rename_key_reads_the_data_folder(copy, folder):
    write_release_json(
        copy / "data" / "SDAR-1.7B-Chat-MATH_train.json", [record(0), record(2), record(2, 1)], QUESTIONS
    )
    said = run(copy, folder, "rename_key.py", "--model_name", "SDAR-1.7B-Chat", "--dataset", "MATH_train")
    output = copy / "data" / "SDAR-1.7B-Chat-MATH_train_renamed.json"
    assert list(read_release_json(output)) == [record(0), record(2), record(2, 1)]
    assert json.loads(output.read_text())[1]["answer"] == ["some text"] * 2
    for line in (
        "kept: 3 responses in 2 rows",
        "left out: 0 invalid, 0 mismatched, 0 repeated",
        "finish reasons: 3 stop",
        "tokens: 12, 4.0 per response",
        "tokens per step: 1.50",
        f"written: {output}",
    ):
        assert line in said.splitlines()


@pytest.mark.parametrize("folder", [".", "data"])
def test_rename_key_reads_a_project(copy, folder):
    temp = copy / "math" / "temp_data"
    command = ("rename_key.py", "--model_name", "teacher", "--dataset", "MATH_train", "--project", "math")
    output = copy / "data" / "teacher-MATH_train_renamed.json"

    said = run(copy, folder, *command, code=2)
    assert (
        "outputs-eval-teacher-MATH_train.json does not exist: run sample/sdar_sample.py with experiment.project=math"
        in said
    )
    assert said.count("\n") == 1

    (copy / "data" / "MATH_train.json").write_text(json.dumps(QUESTIONS))
    with ShardWriter(temp / "outputs-eval-teacher-MATH_train", 0) as writer:
        writer.write(record(1))
    run(copy, folder, *command)  # the shards of rollouts that have not ended
    assert list(read_release_json(output)) == [record(1)] and json.loads(output.read_text())[0]["level"] == 1

    write_release_json(temp / "outputs-eval-teacher-MATH_train.json", [record(2)], QUESTIONS)
    os.utime(temp / "outputs-eval-teacher-MATH_train.json", (0, 0))
    said = run(copy, folder, *command, code=2)  # rollouts that were started again and have not ended
    assert (
        "outputs-eval-teacher-MATH_train holds 1 newer answers that outputs-eval-teacher-MATH_train.json lacks" in said
    )
    write_release_json(temp / "outputs-eval-teacher-MATH_train.json", [record(2)], QUESTIONS)
    run(copy, folder, *command)
    assert list(read_release_json(output)) == [record(2)]


def test_rename_key_merges_all_nodes_or_none(copy):
    temp = copy / "math" / "temp_data"
    command = ("rename_key.py", "--model_name", "teacher", "--dataset", "MATH_train", "--project", "math")
    output = copy / "data" / "teacher-MATH_train_renamed.json"
    for node in (0, 2):
        write_release_json(temp / f"outputs-{node}-eval-teacher-MATH_train.json", [record(node)], QUESTIONS)
    assert "finish node 1's rollouts by starting them again" in run(copy, ".", *command, code=2)
    with ShardWriter(temp / "outputs-1-eval-teacher-MATH_train", 0) as writer:  # killed before its file was written
        writer.write(record(1))
    said = run(copy, ".", *command, code=2)
    assert "outputs-1-eval-teacher-MATH_train.json does not exist: finish node 1's" in said
    assert not output.exists()

    write_release_json(temp / "outputs-1-eval-teacher-MATH_train.json", [record(1)], QUESTIONS)
    run(copy, ".", *command)
    assert list(read_release_json(output)) == [record(0), record(1), record(2)]

    with ShardWriter(temp / "outputs-eval-teacher-MATH_train", 0) as writer:
        writer.write(record(1))
    said = run(copy, ".", *command, code=2)
    assert "outputs-eval-teacher-MATH_train and " in said and "outputs-0-eval-teacher-MATH_train.json: rollouts" in said
    assert "move away" in said and said.count("\n") == 1


def test_rename_key_does_not_overwrite_another_projects_file(copy):
    command = ("rename_key.py", "--model_name", "teacher", "--dataset", "MATH_train", "--project")
    output = copy / "data" / "teacher-MATH_train_renamed.json"
    for number, project in enumerate(("first", "second")):
        with ShardWriter(copy / project / "temp_data" / "outputs-eval-teacher-MATH_train", 0) as writer:
            writer.write(record(number))
    run(copy, ".", *command, "first")
    said = run(copy, ".", *command, "second", code=2)
    assert str(output) in said and str(copy / "first") in said and "--force" in said and said.count("\n") == 1
    assert list(read_release_json(output)) == [record(0)]
    run(copy, "data", *command, "first")  # its own again, from another folder
    run(copy, ".", *command, "second", "--output", "other.json")
    run(copy, ".", *command, "second", "--force")
    assert list(read_release_json(output)) == [record(1)]
    output.with_name(".teacher-MATH_train_renamed.origin").unlink()  # of another program, or put there by hand
    assert "--force" in run(copy, ".", *command, "second", code=2)


def test_rename_key_input_and_output(copy, tmp_path):
    with ShardWriter(tmp_path / "shards", 0) as writer:
        writer.write(record(1))
    command = ("rename_key.py", "--model_name", "any", "--dataset", "MATH_train", "--output", "out.json", "--input")
    run(copy, "data", *command, str(tmp_path / "shards"))
    assert list(read_release_json(copy / "data" / "out.json")) == [record(1)]
    (copy / "data" / "MATH_train.json").write_text(json.dumps(QUESTIONS))
    said = run(copy, "data", *command, "MATH_train.json", "--force", code=2)
    assert "row 0: key 'full_output' is missing; this is no rollout file" in said
    assert "data/any-MATH_train.json does not exist: run sample/sdar_sample.py first" in run(
        copy, "data", *command[:5], code=2
    )
    assert "Stage 2" in run(copy, ".", "rename_key.py", "--help")


@pytest.mark.parametrize("folder", [".", "data"])
def test_download_from_a_file(copy, folder, tmp_path):
    source = tmp_path / "source.json"
    source.write_text(json.dumps(QUESTIONS, indent=2))
    said = run(copy, folder, "download_data.py", "--dataset", "MATH500", "--from", str(source))
    output = copy / "data" / "MATH500.json"
    assert output.read_bytes() == source.read_bytes()
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    facts = ["rows: 3", "fields: question, ground_truth_answer, level", f"sha256: {digest}"]
    facts.append("another copy than the one that this version was tested with")
    assert said.splitlines() == [f"{output} written", *facts]

    source.write_text('[{"question": "new", "ground_truth_answer": "1"}]')
    said = run(copy, folder, "download_data.py", "--dataset", "MATH500", "--from", str(source))
    assert said.splitlines() == [f"{output} is there already (--force replaces it)", *facts]
    run(copy, folder, "download_data.py", "--dataset", "MATH500", "--from", str(source), "--force")
    assert output.read_text() == source.read_text()

    source.write_text('[{"question": "a"}, {"prompt": "b"}]')
    command = ("download_data.py", "--dataset", "GSM8K", "--from", str(source))
    assert "source.json: row 0: field 'ground_truth_answer' is missing" in run(copy, folder, *command, code=2)
    source.write_text(json.dumps(QUESTIONS))
    assert f"source.json: sha256 is {digest_of(source)}, not 12ab" in run(
        copy, folder, *command, "--sha256", "12ab", code=2
    )
    assert not (copy / "data" / "GSM8K.json").exists()
    run(copy, folder, *command, "--sha256", digest_of(source).upper())
    assert (copy / "data" / "GSM8K.json").exists()


def digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as a download needs: it announces a file's checksum, then sends it. It begins with `faults`,
    one per GET: a status to fail with, or "damaged" for other content of the announced length.
    """

    content, faults = json.dumps(QUESTIONS).encode(), []

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        fault = self.faults.pop(0) if self.faults and "/resolve/" in self.path else None
        if isinstance(fault, int):
            return self.send_error(fault)
        self.answer()
        self.wfile.write(self.content.replace(b"q", b"x") if fault == "damaged" else self.content)

    def answer(self):
        known = "/Gen-Verse/GSM8K/" in self.path
        self.send_response(200 if known else 404)
        if not known:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("X-Repo-Commit", 40 * "0")
        self.send_header("ETag", f'"{hashlib.sha256(self.content).hexdigest()}"')
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path):
    """The environment in which downloads come from a hub on this machine."""
    Hub.faults = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        yield {
            "HF_ENDPOINT": address,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
        }
        server.shutdown()


def test_a_download_is_tried_again(copy, hub):
    command = ("download_data.py", "--dataset", "GSM8K")
    Hub.faults = ["damaged", 503]
    said = run(copy, ".", *command, **hub)
    output = copy / "data" / "GSM8K.json"
    assert output.read_bytes() == Hub.content and f"sha256: {digest_of(output)}" in said
    assert Hub.faults == []


def test_what_the_hub_does_not_have_is_not_tried_again(copy, hub):
    said = run(copy, ".", "download_data.py", "--dataset", "MATH500", code=2, **hub)
    assert said.count("\n") == 1 and said.startswith(
        "error: cannot download test/MATH500.json of Gen-Verse/MATH500: 404"
    )


def test_without_a_connection_a_download_ends_within_seconds_in_one_line(copy, hub, tmp_path):
    with http.server.HTTPServer(("127.0.0.1", 0), Hub) as server:
        closed = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}
    began = time.monotonic()
    said = run(copy, ".", "download_data.py", "--dataset", "GSM8K", code=2, **hub | closed)
    assert time.monotonic() - began < 15 and said.count("\n") == 1 and "the hub cannot be reached" in said
    run(copy, ".", "download_data.py", "--dataset", "GSM8K", **hub)
    (copy / "data" / "GSM8K.json").unlink()
    run(copy, ".", "download_data.py", "--dataset", "GSM8K", **hub | {"HF_HUB_OFFLINE": "1"})  # from the cache
    assert (copy / "data" / "GSM8K.json").read_bytes() == Hub.content


def test_download_offline_says_what_to_do(copy, tmp_path):
    env = dict(HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "empty"))
    said = run(copy, ".", "download_data.py", "--dataset", "MATH_train", code=2, **env)
    assert said.startswith("error: cannot download train/MATH_train.json of Gen-Verse/MATH_train: ")
    assert "--from FILE" in said and said.count("\n") == 1
    assert "invalid choice" in run(copy, ".", "download_data.py", "--dataset", "MATH", code=2)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real question sets (../shared/data) are not here")
@pytest.mark.parametrize(
    "name, rows", [("MATH_train", 8523), ("MATH500", 500), ("GSM8K", 1319), ("MBPP", 498), ("HumanEval", 164)]
)
def test_real_question_sets(copy, name, rows):
    said = run(copy, "data", "download_data.py", "--dataset", name, "--from", str(SHARED / f"{name}.json"))
    assert f"rows: {rows}" in said and "\nthe copy that this version was tested with\n" in said
