"""Question sets: rows checked, files intact, what may pass tried again."""

import hashlib
import json
import logging

from t3d.tasks import download as questions
from t3d.tasks.download import check_questions, fetch_questions, is_intact
from tests.conftest import raises_key

ROW = {"question": "a", "ground_truth_answer": "1"}


def test_rows_are_checked_before_the_file_gets_its_name(tmp_path):
    path, output = tmp_path / "set.json", tmp_path / "out" / "set.json"
    path.write_text(json.dumps([ROW | {"level": 1}, ROW | {"subject": "x"}]))
    found = fetch_questions("MATH500", output, path)
    assert (found.rows, found.fields) == (2, ["question", "ground_truth_answer", "level", "subject"])
    assert output.read_bytes() == path.read_bytes() and check_questions(output, "math") == found
    path.write_text(json.dumps([ROW, {"problem": "b"}]))
    with raises_key("question", "set.json: row 1"):
        fetch_questions("MATH500", output, path)
    with raises_key("test_method", "set.json: row 0"):
        fetch_questions("PrimeIntellect", output, path)
    assert check_questions(output, "math") == found  # the old file stays


def test_the_hubs_names_tell_whether_a_file_is_whole(tmp_path):
    content = b"some content"
    for name in (hashlib.sha256(content).hexdigest(), hashlib.sha1(b"blob 12\0" + content).hexdigest()):
        (tmp_path / name).write_bytes(content)
        link = tmp_path / f"{len(name)}.json"
        link.symlink_to(tmp_path / name)
        assert is_intact(link)
        (tmp_path / name).write_bytes(b"some c0ntent")
        assert not is_intact(link)
    (tmp_path / "plain.json").write_bytes(content)
    assert is_intact(tmp_path / "plain.json")


def test_waits_double_and_end(monkeypatch, caplog):
    from huggingface_hub.errors import LocalEntryNotFoundError

    waits, calls = [], []

    def unreachable(**request):
        calls.append(request)
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", unreachable)
    monkeypatch.setattr(questions, "unreachable", lambda: None)
    monkeypatch.setattr(questions.time, "sleep", waits.append)
    with caplog.at_level(logging.WARNING), raises_key("train/MATH_train.json", "--from FILE"):
        questions.download("MATH_train")
    assert waits == [1, 2, 4] and len(calls) == 4 and len(caplog.records) == 3
    assert calls[0] == {"repo_id": "Gen-Verse/MATH_train", "repo_type": "dataset", "filename": "train/MATH_train.json"}
    monkeypatch.setattr(questions, "unreachable", lambda: "HF_HUB_OFFLINE is set")
    with raises_key("train/MATH_train.json", "HF_HUB_OFFLINE is set"):
        questions.download("MATH_train")
    assert len(calls) == 4, "without a connection nothing is asked"
