"""The card of a student: every fact in it is the run's, and its commands work."""

import json
import re
import shutil

from huggingface_hub import ModelCard

from t3d.models.loading import export_model, load_model
from t3d.share.card import main
from tests.conftest import raises_key


def written(trained, *more: str) -> ModelCard:
    main([str(trained.run), "--results", str(trained.results), *more])
    return ModelCard.load(trained.student / "README.md")


def test_an_export_has_no_card_of_its_teacher(trained):
    assert (trained.teacher / "README.md").exists() and not (trained.student / "README.md").exists()


def test_the_card_has_the_runs_facts(trained):
    card = written(trained, "--repo", "me/small", "--base-model", "JetLM/SDAR-1.7B-Chat", "--datasets", "me/set")
    data = card.data.to_dict()
    assert data["base_model"] == "JetLM/SDAR-1.7B-Chat" and data["base_model_relation"] == "finetune"
    assert data["datasets"] == ["me/set"] and data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "text-generation" and {"t3d", "block-diffusion"} <= set(data["tags"])
    assert [data[key] for key in ("license", "license_name", "license_link")] == [
        *("other", "own-terms", "https://example.org/terms")
    ]
    text = card.text
    assert text.lstrip().startswith("# small\n") and "the teacher's card" not in text
    assert "3 optimizer steps (epochs begun: 2), 12 sequences,\n600 tokens" in text
    assert "| `training.beta` | `0.07` |" in text and "`training.max_prompt_len`" not in text
    assert "L = L_DDO + lambda L_path" in text and "arXiv 2602.12262" in text
    assert "4 steps per block at temperature 0.5" in text, "the decode settings of the trajectories"


def test_the_table_has_the_student_and_its_teacher_with_intervals_and_speeds(trained):
    card = written(trained)
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in card.text.splitlines() if line[:2] == "| "]
    head = next(i for i, line in enumerate(table) if line[0] == "Method")
    lines = [dict(zip(table[head], line, strict=True)) for line in table[head + 2 : head + 5]]
    keys = ("Method", "Tokens/step", "Accuracy", "95 % interval", "Tokens/forward", "Tokens/s")
    assert [tuple(line[key] for key in keys) for line in lines] == [
        ("T3D", "1", "80.0 %", "70.0 – 85.0", "3.25", "812"),
        ("Original", "4", "25.0 %", "15.0 – 30.0", "3.25", "812"),
        ("T3D", "4", "70.0 %", "60.0 – 75.0", "3.25", "812"),
    ]
    assert "stranger" not in card.text and "99" not in card.text.partition("## Use")[0]
    results = card.data.eval_results
    assert [(result.dataset_name, result.metric_value) for result in results] == [("MATH500", 80.0), ("MATH500", 70.0)]


def test_the_folder_is_complete_and_can_move(trained, tmp_path):
    first = written(trained, "--repo", "me/small")
    moved = tmp_path / "moved"
    shutil.move(trained.student, moved)
    shutil.rmtree(trained.run)
    rows = json.loads((moved / "training" / "results.json").read_text())
    assert {row["model"] for row in rows} == {".", "teacher"} and len(rows) == 3
    assert (moved / "training" / "config.yaml").exists() and (moved / "training" / "log.jsonl").exists()
    main([str(moved), "--repo", "me/small", "--force"])
    again = ModelCard.load(moved / "README.md")
    assert again.content == first.content


def test_the_cards_code_runs(trained, capsys):
    card = written(trained, "--repo", "me/small")
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    local = code.replace("me/small", str(trained.student)).replace("max_new_tokens=256", "max_new_tokens=16")
    capsys.readouterr()
    scope: dict = {}
    exec(local, scope)
    assert scope["answer"].shape[1] > scope["prompt"]["input_ids"].shape[1] and capsys.readouterr().out


def test_without_results_or_licence_the_card_says_so(trained, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # its eval/ and mine/ are empty
    config = (trained.run / "config.yaml").read_text().replace(str(trained.teacher), str(tmp_path / "gone"))
    (trained.run / "config.yaml").write_text(config)
    main([str(trained.run)])
    card = ModelCard.load(trained.student / "README.md")
    assert not {"license", "base_model", "model-index"} & card.data.to_dict().keys()
    assert "names no licence" in card.text and "t3d eval evaluation.checkpoint_path=" in card.text


def test_results_are_found_in_the_working_folder(trained, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "eval" / "results").mkdir(parents=True)
    shutil.copy(trained.results, tmp_path / "eval" / "results" / "some.json")
    main([str(trained.run)])
    assert "70.0 %" in (trained.student / "README.md").read_text()


def test_a_teacher_in_the_hubs_cache_is_named_by_its_id(trained, tmp_path):
    snapshot = tmp_path / "models--JetLM--SDAR-4B-Chat" / "snapshots" / "abc"
    shutil.copytree(trained.teacher, snapshot)
    config = (trained.run / "config.yaml").read_text().replace(str(trained.teacher), str(snapshot))
    (trained.run / "config.yaml").write_text(config)
    assert written(trained).data["base_model"] == "JetLM/SDAR-4B-Chat"


def test_a_card_that_is_there_is_kept(trained):
    (trained.student / "README.md").write_text("mine")
    with raises_key("--force"):
        written(trained)
    assert (trained.student / "README.md").read_text() == "mine"
    assert written(trained, "--force").data["tags"]


def test_other_folders_are_refused(trained, tmp_path):
    model = load_model(str(trained.teacher))
    cases = {
        "folder": tmp_path / "nothing",
        "t3d.json": trained.teacher,
        "config.yaml": export_model(
            model, str(trained.teacher), tmp_path / "a" / "b", made_by={"objective": "sft", "step": 1, "teacher": "x"}
        ),
    }
    for key, folder in cases.items():
        with raises_key(key):
            main([str(folder)])


def test_an_unfinished_run_names_its_students(trained):
    trained.student.rename(trained.student.with_name("optimized-0-2"))
    with raises_key("folder", "optimized-0-2"):
        main([str(trained.run)])


def test_results_of_others_are_refused(trained, tmp_path):
    rows = [row for row in json.loads(trained.results.read_text()) if row["method"] == "sft"]
    (tmp_path / "other.json").write_text(json.dumps(rows))
    with raises_key("--results"):
        main([str(trained.run), "--results", str(tmp_path / "other.json")])
    assert not (trained.student / "README.md").exists()
