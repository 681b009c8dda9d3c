"""A folder of shards with a card is a data set for `datasets`, and still one for training."""

import json
from dataclasses import asdict

import pytest
from huggingface_hub import DatasetCard

from t3d.data.shards import ShardWriter, read_shards
from t3d.data.trajectory import Trajectory
from t3d.share.card import main
from tests.conftest import raises_key


def trajectory(row: int, **more) -> Trajectory:
    given = {
        "id": f"Sums/{row}/0", "prompt_ids": [1, 2], "response_ids": [3, 4], "unmask_step": [1, 2], "length": 2,
        "block_size": 4, "finish_reason": "stop", "forwards": 3, "seconds": 1.5, "model": "small", "question": "1+1?",
        "ground_truth": "2", "text": "two", "decode": {"temperature": 0, "top_k": 0, "self_verify": False},
    }  # fmt: skip
    return Trajectory(**given | more)


@pytest.fixture
def shards(tmp_path):
    """Records as several runs leave them: a list filled in one alone, whole and broken numbers, a later setting."""
    second = {"temperature": 0.5, "top_k": 5, "self_verify": True, "eb_bound": "sum"}
    for rank, records in enumerate(
        ([trajectory(0), trajectory(1)], [trajectory(2, initial_ids=[7, 8], decode=second)])
    ):
        with ShardWriter(tmp_path / "set", rank) as writer:
            for record in records:
                writer.write(record)
    (tmp_path / "set" / "settings.json").write_text('{"block_size": 4}')
    return tmp_path / "set"


def test_datasets_loads_the_folder_offline(shards, cache_aside, monkeypatch):
    import datasets

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    main([str(shards)])
    found = datasets.load_dataset(str(shards), split="train")
    assert found.num_rows == 3
    for row, record in zip(found, read_shards(shards), strict=True):
        wanted = asdict(record)
        decode = wanted.pop("decode")
        assert {key: row[key] for key in wanted} == wanted
        assert {key: value for key, value in row["decode"].items() if value is not None} == decode


def test_a_real_rollout_loads_too(story_trajectories, cache_aside, tmp_path):
    import datasets

    shards = story_trajectories.with_name(story_trajectories.name.removesuffix(".json"))
    try:
        main([str(shards), "--repo", "me/set"])
        found = datasets.load_dataset(str(shards), split="train")
    finally:
        (shards / "README.md").unlink(missing_ok=True)
    assert [(row["id"], row["unmask_step"]) for row in found] == [(t.id, t.unmask_step) for t in read_shards(shards)]


def test_the_card_counts_the_trajectories(shards):
    main([str(shards), "--repo", "me/sums", "--license", "apache-2.0"])
    card = DatasetCard.load(shards / "README.md")
    data = card.data.to_dict()
    assert data["license"] == "apache-2.0" and data["size_categories"] == ["n<1K"] and "trajectories" in data["tags"]
    assert card.text.lstrip().startswith("# sums\n")
    for said in ("answers: 3, 6 tokens, 1.00 tokens per denoising step", "stop: 3", "| `temperature` | `0`, `0.5` |"):
        assert said in card.text
    assert 'load_dataset("me/sums"' in card.text


def test_a_stopped_rollout_gets_no_card(shards):
    with open(shards / "shard-00001.jsonl", "a") as file:
        file.write(json.dumps(asdict(trajectory(3)))[:40])
    with raises_key("folder"):
        main([str(shards)])
    assert not (shards / "README.md").exists()
