"""Uploads, against a stand-in of the hub's HTTP interface."""

import shutil

import pytest
from huggingface_hub import constants

from t3d.common.errors import UserError
from t3d.models.loading import load_model
from t3d.share import card
from t3d.share.push import main
from tests.share.hub import Hub, running


@pytest.fixture
def hub(monkeypatch):
    stand_in = Hub()
    with running(stand_in) as address:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "right")
        yield stand_in


@pytest.fixture
def student(trained):
    card.main([str(trained.run), "--results", str(trained.results), "--repo", "me/small"])
    return trained.student


@pytest.fixture
def shards(tmp_path, story_trajectories):
    """A rollout's folder of shards, without a card."""
    folder = tmp_path / "trajectories"
    shutil.copytree(story_trajectories.with_name(story_trajectories.name.removesuffix(".json")), folder)
    return folder


def contents(folder) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusal(*arguments: str) -> UserError:
    with pytest.raises(UserError) as error:
        main(list(map(str, arguments)))
    assert "\n" not in str(error.value)
    return error.value


def test_a_student_arrives_whole_and_private(hub, trained, student, tmp_path, capsys):
    main([str(trained.run), "me/small"])
    uploaded = hub.repositories["me/small"]
    assert uploaded["private"] and uploaded["type"] == "model" and uploaded["files"] == contents(student)
    assert {"README.md", "model.safetensors", "training/config.yaml", "training/results.json"} <= set(uploaded["files"])
    assert capsys.readouterr().out.endswith("/me/small\n")
    for name, content in uploaded["files"].items():
        (tmp_path / "downloaded" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "downloaded" / name).write_bytes(content)
    assert load_model(str(tmp_path / "downloaded")).config.block_size == 4


def test_a_second_upload_replaces_the_first(hub, student):
    main([str(student), "me/small", "--public"])
    files = hub.repositories["me/small"]["files"]
    files |= {"model-00001-of-00002.safetensors": b"older weights", "picture.png": b"the owner's"}
    (student / "README.md").write_text((student / "README.md").read_text() + "more\n")
    main([str(student), "me/small", "--public"])
    assert not hub.repositories["me/small"]["private"]
    assert files == contents(student) | {"picture.png": b"the owner's"}


def test_a_private_upload_does_not_go_to_a_public_place(hub, student):
    main([str(student), "me/small", "--public"])
    before = dict(hub.repositories["me/small"]["files"])
    (student / "README.md").write_text((student / "README.md").read_text() + "secret\n")
    assert refusal(student, "me/small").key == "--public"
    assert hub.repositories["me/small"]["files"] == before


def test_a_dry_run_lists_the_files_and_asks_nobody(hub, student, capsys):
    main([str(student), "me/small", "--dry-run"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[-1] for line in lines[:-1]] == sorted(contents(student)) and not hub.requests
    sizes = {line[2]: f"{line[0]} {line[1]}" for line in lines[:-1]}
    assert sizes["t3d.json"] == f"{(student / 't3d.json').stat().st_size} B"
    assert sizes["model.safetensors"] == f"{(student / 'model.safetensors').stat().st_size / 1000:.1f} kB"


def test_an_incomplete_folder_uploads_nothing(hub, trained, student):
    for name, key in (("README.md", "README.md"), ("training/config.yaml", "README.md"), ("config.json", "folder"),
                      ("model.safetensors", "folder"), ("tokenizer_config.json", "folder")):  # fmt: skip
        aside = student.parent / "aside"
        (student / name).rename(aside)
        assert refusal(student, "me/small").key == key, name
        aside.rename(student / name)
    (student / "README.md").write_text((trained.teacher / "README.md").read_text())
    assert refusal(student, "me/small").key == "README.md"
    assert refusal(trained.teacher, "me/small").key == "README.md"
    assert not hub.requests


@pytest.mark.parametrize("name", ["small", "me/small/er", "me/sm all", "me/.small", "/small", ""])
def test_a_bad_name_is_refused_at_once(hub, student, name):
    assert refusal(student, name).key == "repo" and not hub.requests


def test_a_wrong_token_and_a_missing_right_are_told_apart(hub, student, monkeypatch):
    hub.refuse = {"repos/create": 403}
    assert "does not allow it" in str(error := refusal(student, "other/small")) and error.key == "token"
    monkeypatch.setenv("HF_TOKEN", "wrong")
    assert "refuses the token" in str(error := refusal(student, "me/small")) and error.key == "token"
    assert not hub.repositories


@pytest.mark.parametrize("part, said", [("/commit/", "500"), ("/blob/", "model.safetensors")])
def test_a_fault_of_the_hub_is_one_line(hub, student, part, said):
    hub.refuse = {part: 500 if part == "/commit/" else 400}  # a 500 for a blob is tried again for seconds
    error = refusal(student, "me/small")
    assert error.key == "hub" and said in str(error) and not hub.repositories["me/small"]["files"]


def test_without_a_connection_it_ends_at_once(hub, student, monkeypatch):
    with running(Hub()) as closed:
        pass
    monkeypatch.setattr(constants, "ENDPOINT", closed)
    assert refusal(student, "me/small").key == "hub"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in str(refusal(student, "me/small"))


# -- trajectories -----------------------------------------------------------------------------------------------------


def test_trajectories_arrive_as_a_data_set(hub, shards):
    assert refusal(shards, "me/set", "--dataset").key == "README.md"
    card.main([str(shards), "--repo", "me/set", "--license", "apache-2.0"])
    main([str(shards), "me/set", "--dataset"])
    uploaded = hub.repositories["me/set"]
    wanted = {
        name: content for name, content in contents(shards).items() if name not in ("config.yaml", "sessions.jsonl")
    }
    assert uploaded["private"] and uploaded["type"] == "dataset" and uploaded["files"] == wanted


def test_the_kind_of_folder_must_be_named(hub, shards, student):
    assert refusal(shards, "me/set").key == "--dataset" and refusal(student, "me/set", "--dataset").key == "--dataset"
    assert not hub.requests
